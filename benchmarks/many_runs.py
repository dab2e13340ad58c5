"""How long ``kwta-exp list`` and ``summary`` take on many run folders, and how much memory.

    python -m benchmarks.many_runs [--rounds 3] [--runs 1000] [--json FILE]

The folders are copies of one real run at scale=tiny with other seeds and ratios, half and all of ``--runs``:
time and memory should at most double.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import Row, arguments, report
from kwta_exp.run_folder import CONFIG_FILES
from kwta_exp.storage import read_json, sha256_of_file, write_json

ROOT = Path(__file__).parents[1]
RATIOS = [round(0.01 * k, 2) for k in range(1, 101)]


def main() -> None:
    asked = arguments(__doc__, rounds=3, runs=1000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = made_run(Path(scratch) / "one")
        halves = asked.runs // 2, asked.runs
        for number in halves:
            copies(run, Path(scratch) / str(number), number)
        for command in ("list", "summary"):
            sides = {number: [command, str(Path(scratch) / str(number))] for number in halves}
            took = {number: [measured(side) for _ in range(asked.rounds)] for number, side in sides.items()}
            seconds, memory = (
                {
                    number: sorted(each[what] for each in found)[len(found) // 2]
                    for number, found in took.items()
                }
                for what in (0, 1)
            )
            half, whole = halves
            what = f"kwta-exp {command} of {whole:,} runs"
            rows.append(Row(what, seconds[whole], f"of {half:,}", seconds[half], "s", "cost"))
            rows.append(Row(f"{what}, peak memory", memory[whole], f"of {half:,}", memory[half], "MiB", "cost"))
    report("Many runs", rows, [], asked)


def made_run(outputs: Path) -> Path:
    """The folder of a real run at scale=tiny."""
    command = [sys.executable, "run.py", "scale=tiny", f"paths.outputs={outputs}"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (found,) = outputs.glob("*/s*")
    return found


def copies(run: Path, outputs: Path, number: int) -> None:
    """``number`` copies of a run folder, each with a seed and a ratio of its own; weights are left out."""
    (evaluation,) = run.glob("evaluation/*")
    results, environment = read_json(evaluation / "results.json"), read_json(run / "environment.json")
    config = (run / "config.yaml").read_text()
    for at in range(number):
        seed, ratio = at // len(RATIOS), RATIOS[at % len(RATIOS)]
        folder = outputs / f"tiny-digits-cnn-kwta{ratio}-natural" / f"s{seed}-{number:010d}"
        (folder / "evaluation").mkdir(parents=True)
        shutil.copytree(evaluation, folder / "evaluation" / evaluation.name)
        shutil.copy(run / "overrides.yaml", folder)
        text = config.replace("\nseed: 0\n", f"\nseed: {seed}\n").replace("ratio: 0.1\n", f"ratio: {ratio}\n")
        (folder / "config.yaml").write_text(text if seed else text.replace("seed: 0\n", f"seed: {seed}\n", 1))
        digests = {name: sha256_of_file(folder / name) for name in CONFIG_FILES}
        write_json(folder / "environment.json", {**environment, "files": digests})
        accuracy = (seed * 7 + int(100 * ratio)) % 64 / 64
        results["run"]["seed"], results["clean"]["accuracy"] = seed, accuracy
        write_json(folder / "evaluation" / evaluation.name / "results.json", results)
        write_json(folder / "results.json", results)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and the peak memory, MiB, of one command."""
    measure = (
        "import json, resource, subprocess, sys;"
        " subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        " print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", measure, sys.executable, "-m", "kwta_exp", *command],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return time.monotonic() - started, json.loads(done.stdout) / 1024


if __name__ == "__main__":
    main()
