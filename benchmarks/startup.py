"""How long a user waits for help, a finished run, and the first k-WTA.

    python -m benchmarks.startup [--rounds 5] [--json FILE]

Each command runs in its own process; the baseline is a process that imports torch. Compiled kernels are
cached, as after the first run on a machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Row, arguments, interleaved, report

ROOT = Path(__file__).parents[1]
FIRST = """
import torch
from kwta_exp.activations import kwta
kwta(torch.ones(2, 8, requires_grad=True), 0.1).sum().backward()
"""


def main() -> None:
    asked = arguments(__doc__, rounds=5)
    with tempfile.TemporaryDirectory() as outputs:
        tiny = ["run.py", "scale=tiny", "suite=none", f"paths.outputs={outputs}"]
        python(*tiny)
        commands = {
            "python -c 'import torch'": ["-c", "import torch"],
            "run.py --help": ["run.py", "--help"],
            "run.py --cfg job": ["run.py", "--cfg", "job"],
            "run.py, already finished": tiny,
            "import torch, first k-WTA and gradient": ["-c", FIRST],
        }
        sides = {name: (lambda command=command: python(*command)) for name, command in commands.items()}
        took = interleaved(sides, asked.rounds)
    baseline = "python -c 'import torch'"
    rows = [
        Row(name, took[name], baseline, took[baseline], "s", "cost") for name in commands if name != baseline
    ]
    report("Starting", rows, [], asked)


def python(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)


if __name__ == "__main__":
    main()
