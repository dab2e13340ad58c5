"""CPUs other than this machine's: simulated within a process, and emulated for the whole suite.

``python -m tests.cpus`` (``make test-cpus``) runs the fast tests under each setting that this CPU supports, and
prints a table; arguments go to pytest. Settings that need instructions this CPU lacks are listed, not run.
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
"""For each kind of CPU: whether it computes in bfloat16, and whether it has matrix units."""

FAST = "not slow and not gpu and not slurm and not network and not browser"

SIMULATED_CPU = "KWTA_EXP_TEST_CPU"
"""The environment variable that makes all tests run as on one of :data:`CPUS`."""

INSTRUCTIONS = {
    ("ATEN_CPU_CAPABILITY", "default"): (),
    ("ATEN_CPU_CAPABILITY", "avx2"): ("avx2", "fma3"),
    ("ATEN_CPU_CAPABILITY", "avx512"): ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): ("avx2",),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"): ("avx512_bf16",),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"): ("amx_bf16",),
}
"""The ``torch.cpu.get_capabilities()`` that each setting of an environment variable needs."""


def simulate(cpu: str, setattr: Callable[..., None]) -> None:
    """Make ``hardware`` report one of :data:`CPUS`. Results stay correct, but may be computed more slowly."""
    for function, value in zip(("computes_in_bfloat16", "has_matrix_units"), CPUS[cpu], strict=True):
        setattr(hardware, function, lambda device, value=value: value)


@dataclass
class Outcome:
    setting: str
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    note: str = ""


def settings() -> dict[str, dict[str, str]]:
    """The environment variables of each run, by its name in the table."""
    named = {f"{name}={value}": {name: value} for name, value in INSTRUCTIONS}
    return {"native": {}} | named | {f"{SIMULATED_CPU}={cpu}": {SIMULATED_CPU: cpu} for cpu in CPUS}


def missing(variables: dict[str, str]) -> list[str]:
    """The instructions that a setting needs and this CPU lacks."""
    import torch

    has = torch.cpu.get_capabilities()
    return [need for item in variables.items() for need in INSTRUCTIONS.get(item, ()) if not has.get(need)]


def outcome_of(setting: str, variables: dict[str, str], arguments: list[str]) -> Outcome:
    """Run pytest in a new process with the environment ``variables``."""
    ours = {SIMULATED_CPU, *(name for name, _ in INSTRUCTIONS)}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", FAST, f"--junitxml={report}", *arguments]
        started = time.perf_counter()
        status = subprocess.run(command, env=environment, check=False).returncode
        outcome = Outcome(setting, seconds=time.perf_counter() - started)
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
