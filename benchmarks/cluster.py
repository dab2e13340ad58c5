"""A grid of many jobs on a cluster whose nodes fail: what failures cost, and what the shared file system sees.

    python -m benchmarks.cluster [--jobs 10000] [--nodes 100] [--gpus 8] [--hours 2] [--mtbf-days 5] [--seed 0]

Nodes fail at random, with exponential times between failures. A failure ends all jobs of the node, which is
back after half an hour. A job loses what it did since its last save, at most five minutes, and its start.
Operations on files are counted in a real job at scale=tiny, by Python's audit events (stat calls have
none), and scaled to the job's hours.
"""

import argparse
import heapq
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAVE_SECONDS = 300.0  # Trainer.train's checkpoint_seconds
START_SECONDS = 60.0
REPAIR_SECONDS = 1800.0

WATCH = """
import json, os, sys
from collections import Counter
outputs, seen = {outputs!r}, Counter()
EVENTS = {{"open", "os.rename", "os.mkdir", "os.remove", "os.scandir", "os.listdir", "os.chmod", "os.rmdir"}}
def hook(event, arguments):
    if event in EVENTS and arguments and isinstance(arguments[0], (str, os.PathLike)) \\
            and os.fspath(arguments[0]).startswith(outputs):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        seen["open to write" if writes else "open to read" if event == "open" else event] += 1
sys.addaudithook(hook)
sys.argv = ["run.py", *{overrides!r}, "paths.outputs=" + outputs]
from kwta_exp.command import main
main()
open({report!r}, "w").write(json.dumps(seen))
"""


@dataclass(frozen=True)
class Outcome:
    """What a simulated grid cost.

    Attributes:
        days: from the first start to the last end.
        failures: of nodes.
        hit: jobs that ran on them.
        lost: seconds of work done again, over all jobs.
        work: seconds of work that the grid needs.
    """

    days: float
    failures: int
    hit: int
    lost: float
    work: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--gpus", type=int, default=8, help="jobs at once on a node")
    parser.add_argument("--hours", type=float, default=2.0, help="of a job")
    parser.add_argument("--mtbf-days", type=float, default=5.0, help="mean time between failures of a node")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shape = (asked.jobs, asked.nodes, asked.gpus, asked.hours * 3600, asked.mtbf_days * 86400)
    for save in (SAVE_SECONDS, 3600.0, float("inf")):
        found = simulated(*shape, save, random.Random(asked.seed))
        what = "never" if save == float("inf") else f"every {save / 60:.0f} min"
        print(
            f"state saved {what}: {found.days:.2f} days; {found.failures} node failures hit {found.hit} jobs;"
            f" {found.lost / max(1, found.hit) / 60:.1f} min of work lost for each,"
            f" {found.lost / found.work:.3%} of all"
        )
    counted = operations()
    total, hours = sum(counted.values()), asked.hours
    saves = hours * 3600 / SAVE_SECONDS
    print(f"\na job of two epochs and two attacks: {total} operations on files: {dict(counted.most_common())}")
    per_job = total + 3 * saves  # write, rename, sync of the folder
    at_once = asked.nodes * asked.gpus
    print(
        f"with a save every {SAVE_SECONDS:.0f} s about {per_job:.0f} a job of {hours:g} h;"
        f" {at_once} jobs at once: {at_once * per_job / (hours * 3600):.1f} a second on the shared file system"
    )


def simulated(
    jobs: int, nodes: int, gpus: int, seconds: float, mtbf: float, save: float, draw: random.Random
) -> Outcome:
    """Run a grid in simulated time; all jobs need the same number of seconds."""
    left = [seconds] * jobs
    waiting, running = list(range(jobs))[::-1], dict[int, list[tuple[int, float]]]()
    events = [(draw.expovariate(1 / mtbf), "fails", node) for node in range(nodes)]
    events += [(0.0, "is free", node) for node in range(nodes) for _ in range(gpus)]
    heapq.heapify(events)
    lost, failures, hit, end, done = 0.0, 0, 0, 0.0, 0
    epoch = Counter[int]()  # of each node: how often it has failed
    pending: dict[tuple[float, int], tuple[int, int]] = {}
    while done < jobs:
        now, what, node = heapq.heappop(events)
        if what == "fails":
            failures += 1
            epoch[node] += 1
            for job, started in running.pop(node, []):
                worked = max(0.0, now - started - START_SECONDS)
                kept = worked // save * save if save != float("inf") else 0.0
                lost += worked - kept + START_SECONDS
                left[job] -= kept
                waiting.append(job)
                hit += 1
            back = now + REPAIR_SECONDS
            heapq.heappush(events, (back + draw.expovariate(1 / mtbf), "fails", node))
            for _ in range(gpus):
                heapq.heappush(events, (back, "is free", node))
        elif what == "is free":
            if waiting:
                job = waiting.pop()
                running.setdefault(node, []).append((job, now))
                finish = now + START_SECONDS + left[job]
                pending[finish, job] = (node, epoch[node])
                heapq.heappush(events, (finish, f"ends {job}", node))
            elif done < jobs:
                heapq.heappush(events, (now + 60, "is free", node))
        else:
            job = int(what.split()[1])
            at, age = pending.pop((now, job), (node, -1))
            if age == epoch[at]:  # else the node has failed since
                running[at] = [each for each in running[at] if each[0] != job]
                done, end = done + 1, now
                heapq.heappush(events, (now, "is free", at))
    return Outcome(end / 86400, failures, hit, lost, jobs * seconds)


def operations() -> Counter[str]:
    """The operations on files below the outputs in one job at scale=tiny, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        report, outputs = Path(folder, "report"), Path(folder, "outputs")
        overrides = ["scale=tiny", "runtime=cpu", "runtime.threads=1"]
        text = WATCH.format(outputs=str(outputs), overrides=overrides, report=str(report))
        subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return Counter(json.loads(report.read_text()))


if __name__ == "__main__":
    main()
