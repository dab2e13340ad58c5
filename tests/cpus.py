"""Other CPUs than the machine's: pretended within a process, and emulated for the whole suite.

``python -m tests.cpus`` (``make test-cpus``) runs the fast tests under each setting that the machine can follow
and ends with a table; arguments go to pytest. Settings for instructions that this CPU lacks are named, not run.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kwta_exp import hardware

CPUS = {"plain": (False, False), "bf16": (True, False), "amx": (True, True)}
"""Kinds of CPU: does it compute in bfloat16, and has it matrix units?"""

FAST = "not slow and not gpu and not slurm and not network"

PRETENDED = "KWTA_EXP_TEST_CPU"
"""The environment variable by which all tests run as on one of :data:`CPUS`."""

INSTRUCTIONS = {
    ("ATEN_CPU_CAPABILITY", "default"): (),
    ("ATEN_CPU_CAPABILITY", "avx2"): ("avx2", "fma3"),
    ("ATEN_CPU_CAPABILITY", "avx512"): ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): ("avx2",),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"): ("avx512_bf16",),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"): ("amx_bf16",),
}
"""What a CPU must have, by ``torch.cpu.get_capabilities()``, for a variable to hold torch or oneDNN to it."""


def pretend(cpu: str, setattr: Callable[..., None]) -> None:
    """Make the hardware answer as one of :data:`CPUS` would; what is computed stays right, if slower."""
    for question, answer in zip(("computes_in_bfloat16", "has_matrix_units"), CPUS[cpu], strict=True):
        setattr(hardware, question, lambda device, answer=answer: answer)


@dataclass
class Outcome:
    setting: str
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    note: str = ""


def settings() -> dict[str, dict[str, str]]:
    """The environment of each run, by the name it has in the table."""
    named = {f"{name}={value}": {name: value} for name, value in INSTRUCTIONS}
    return {"native": {}} | named | {f"{PRETENDED}={cpu}": {PRETENDED: cpu} for cpu in CPUS}


def missing(variables: dict[str, str]) -> list[str]:
    """Instructions that this CPU lacks for a setting."""
    import torch

    can = torch.cpu.get_capabilities()
    return [need for item in variables.items() for need in INSTRUCTIONS.get(item, ()) if not can.get(need)]


def outcome_of(setting: str, variables: dict[str, str], arguments: list[str]) -> Outcome:
    """Run pytest in a process of its own under ``variables``."""
    ours = {PRETENDED, *(name for name, _ in INSTRUCTIONS)}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", FAST, f"--junitxml={report}", *arguments]
        began = time.perf_counter()
        status = subprocess.run(command, env=environment, check=False).returncode
        outcome = Outcome(setting, seconds=time.perf_counter() - began)
        if report.exists():
            suites = list(ET.parse(report).getroot().iter("testsuite"))
            total, failed, skipped = (
                sum(int(suite.get(name, 0)) for suite in suites for name in names)
                for names in (("tests",), ("failures", "errors"), ("skipped",))
            )
            outcome.failed, outcome.passed = failed, total - failed - skipped
        if status and not outcome.failed:
            outcome.failed, outcome.note = 1, f"pytest ended with status {status}"
    return outcome


def table(outcomes: list[Outcome]) -> str:
    width = max(len(outcome.setting) for outcome in outcomes)
    lines = [f"{'setting':{width}}  passed  failed  seconds"]
    for each in outcomes:
        if each.seconds:
            line = f"{each.setting:{width}}  {each.passed:6}  {each.failed:6}  {each.seconds:7.0f}  {each.note}"
        else:
            line = f"{each.setting:{width}}  {each.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    outcomes = []
    for setting, variables in settings().items():
        if lacking := missing(variables):
            outcomes.append(Outcome(setting, note=f"not on this machine ({', '.join(lacking)})"))
            continue
        print(f"\n== {setting}", flush=True)
        outcomes.append(outcome_of(setting, variables, arguments))
    print(f"\n{table(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
