"""tests.cpus runs the suite under each setting that the CPU supports, and reports the others and failures."""

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from kwta_exp import hardware
from tests import cpus
from tests.cpus import INSTRUCTIONS, SIMULATED_CPU, Outcome, main, missing, outcome_of, settings

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({}, set()),
        ({"avx2", "fma3"}, {("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")}),
        ({name for names in INSTRUCTIONS.values() for name in names}, set(INSTRUCTIONS)),
    ],
    ids=["none", "avx2", "all"],
)
def test_only_settings_that_the_cpu_supports_are_run(
    has: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict.fromkeys(has, True)))
    runs = {item for variables in settings().values() for item in variables.items() if not missing(variables)}
    assert runs & set(INSTRUCTIONS) == expected | {("ATEN_CPU_CAPABILITY", "default")}
    assert {value for name, value in runs if name == SIMULATED_CPU} == set(cpus.CPUS)


def test_failures_and_crashes_are_counted_and_give_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in {"fine": "pass", "wrong": "assert False", "crash": "__import__('os')._exit(3)"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_it(): {body}\n")

    def outcome(name: str) -> Outcome:
        return outcome_of(
            name, {}, [str(tmp_path / f"test_{name}.py"), "-p", "no:cacheprovider", "-p", "no:xdist"]
        )

    fine, wrong, crash = (outcome(name) for name in ("fine", "wrong", "crash"))
    assert (fine.passed, fine.failed) == (1, 0)
    assert (wrong.passed, wrong.failed) == (0, 1)
    assert (crash.failed, crash.note) == (1, "pytest ended with status 3")

    monkeypatch.setattr(cpus, "settings", lambda: {"first": {}, "ONEDNN_MAX_CPU_ISA=x": {"x": "y"}})
    monkeypatch.setattr(cpus, "missing", lambda variables: ["amx_bf16"] if variables else [])
    for found, status in ((fine, 0), (wrong, 1), (crash, 1)):
        monkeypatch.setattr(cpus, "outcome_of", lambda *_, found=found: found)
        assert main([]) == status
        assert "ONEDNN_MAX_CPU_ISA=x  not on this machine (amx_bf16)" in capsys.readouterr().out


@pytest.mark.parametrize("cpu", cpus.CPUS, indirect=True)
def test_hardware_reports_the_simulated_cpu(cpu: str) -> None:
    device = torch.device("cpu")
    assert (hardware.computes_in_bfloat16(device), hardware.has_matrix_units(device)) == cpus.CPUS[cpu]


def test_a_forked_run_simulates_the_cpu_too() -> None:
    code = (
        "import io, sys, tests.forked as forked; from kwta_exp import hardware; sys.stdin = io.StringIO();"
        "forked._load = bool; forked._serve(); print(hardware.has_matrix_units(None))"
    )
    environment = os.environ | {SIMULATED_CPU: "amx"}
    answered = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert answered.stdout.strip() == "True"
