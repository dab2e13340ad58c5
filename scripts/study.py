"""Make ``docs/results.md`` from run folders, through small records that are committed.

    python -m scripts.study collect NAME [LABEL=]RUN_FOLDER...   # writes docs/results/NAME.json
    python -m scripts.study page                                 # writes docs/results.md from all records

A record holds what the tables need, and the command, commit and machine behind it. ``docs/results/NAME.md`` is
the text above a study's table. Every number on the page is computed from the records.
"""

import argparse
import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored
from kwta_exp.run_folder import RunFolder
from kwta_exp.sealed import read_metadata
from kwta_exp.storage import damaged, read_json, read_lines, write_text

RECORDS = Path("docs/results")
PAGE = Path("docs/results.md")

Record = Mapping[str, Any]


def collect(name: str, folders: Iterable[Path | tuple[str, Path]], records: Path = RECORDS) -> Path:
    """Write the records of finished runs to ``<records>/<name>.json``, sorted by name and seed.

    A label replaces a run's name. Audits need one: the training in their name is always "none".

    Raises:
        UserError: for a folder without results, a run at a reduced scale, or a mix of runs with and without
            attacks.
    """
    labelled = [folder if isinstance(folder, tuple) else (None, folder) for folder in folders]
    found = sorted((_record(folder, label) for label, folder in labelled), key=_key)
    if len({record["worst_case"] is None for record in found}) > 1:
        raise UserError(f"{name}: some runs ran attacks and some did not; expected one study")
    path = records / f"{name}.json"
    write_text(path, json.dumps({"records": found}, indent=2, allow_nan=False) + "\n")
    return path


def _record(folder: Path, label: str | None = None) -> dict[str, Any]:
    run, stored = RunFolder(folder), Stored.read(folder)
    results = stored.results
    if results["run"].get("scale", "full") != "full":
        raise UserError(f"{folder}: run at scale={results['run']['scale']}; expected scale=full")
    epochs, environment = _epochs(run), read_json(run.environment)
    hard = _cost_on_hard_images(stored)
    return {
        **{key: results["run"][key] for key in ("name", "seed", "commit", "weights_sha256")},
        **({"name": label} if label else {}),
        **({"late": hard} if hard else {}),
        "command": _without_local_paths(results["run"]["command"]),
        "threat": results["threat"],
        "clean": results["clean"],
        "attacks": {
            attack: {key: found[key] for key in _KEPT if key in found}
            for attack, found in results["attacks"].items()
        },
        "worst_case": results["worst_case"],
        "verdict": results["masking"]["verdict"],
        "epochs": len(epochs),
        "sparsity_ratio": epochs[-1].get("sparsity_ratio") if epochs else None,
        "images_per_second": statistics.median(e["images_per_second"] for e in epochs) if epochs else None,
        "device": environment["processor"] if environment["device"] == "cpu" else environment["device"],
        "torch": environment["packages"]["torch"],
    }


_KEPT = ("robust_accuracy", "n", "ci95", "over_draws", "forwards", "backwards", "seconds")
"""What a record keeps of an attack."""

EARLY = 20 * 101 + 20 * 1001
"""Forward passes of the first 40 steps of ``nes``: 100 or 1,000 samples a step, and the iterate itself."""


def _epochs(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics of all epochs; empty for an audit.

    Raises:
        DamagedError: if they are not one line for each epoch of the training.
    """
    found = read_lines(run.metrics) if run.metrics.exists() else []
    trained = int(read_metadata(run.last).get("epoch", 0)) if run.last.exists() else 0
    if [each.get("epoch") for each in found] != list(range(1, trained + 1)):
        raise damaged(run.metrics, f"it has {len(found)} epochs, not the {trained} of the training")
    return found


def _cost_on_hard_images(stored: Stored) -> dict[str, Any] | None:
    """Passes of each attack on the images that withstand the first 40 steps of ``nes``, until fooled."""
    rows = {name: record.columns for name, record in stored.outcome.records.items() if len(record)}
    if "nes" not in rows:
        return None
    hard = rows["nes"]["index"][rows["nes"]["queries"] > EARLY]
    spent = {
        name: int((columns["queries"] + columns["steps"])[np.isin(columns["index"], hard)].sum())
        for name, columns in rows.items()
    }
    return {"images": len(hard), "passes": spent}


def _without_local_paths(command: str) -> str:
    """A command line without the paths of one machine: ``paths.*`` removed, files by name only."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        if key.startswith("paths."):
            continue
        words.append(f"{key}={Path(value).name}" if equals and key in ("weights", "dataset.path") else word)
    return shlex.join(words)


def _key(record: Record) -> tuple[str, int]:
    return record["name"], record["seed"]


def page(records: Path = RECORDS) -> str:
    """The content of ``docs/results.md``."""
    parts = [
        "# Results",
        "Made by `make results` from the records in [results/](results); every figure is computed from them."
        " Accuracies are percentages; with several seeds, their mean and, in brackets, the smallest and the"
        " largest. The worst case is per image over all attacks of the suite. The verdict `masked` means that"
        " the number under PGD does not measure robustness; `untested` that the checks behind a stronger"
        " verdict were not made. A robust accuracy is an upper bound, found by the commit below its table; the"
        " bpda of a later one may find more ([changes](../CHANGELOG.md)). Images per second were measured on"
        " shared machines and are no benchmark. The"
        " line under each table names the processor, or `cpu` where the record does not.",
    ]
    for path in sorted(records.glob("*.json")):
        found: list[Record] = json.loads(path.read_text())["records"]
        if not path.with_suffix(".md").is_file():
            raise UserError(
                f"{path}: {path.with_suffix('.md').name} is missing beside it; expected the study's text"
            )
        parts += [path.with_suffix(".md").read_text().strip(), *_study(found)]
    return "\n\n".join(parts) + "\n"


def _study(records: Sequence[Record]) -> list[str]:
    by_name: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_name[record["name"]].append(record)
    attacked = any(record["worst_case"] for record in records)
    threats = {(record["threat"]["norm"], record["threat"]["eps"]) for record in records}
    networks = {record["weights_sha256"] for record in records}
    if attacked and (len(networks) == 1 or len(threats) > 1):
        parts, differences = [_table_by_attack(records)], []
    else:
        parts = [_table_by_run(by_name, attacked)]
        differences = _differences_from_relu(by_name) if attacked else _paired_differences(by_name)
    costs = [_cost(record) for record in records if {"bpda", "nes"} <= record["attacks"].keys()]
    parts += ["\n".join(lines) for lines in (costs, differences) if lines]
    machines = sorted({f"{record['device']}, torch {record['torch']}" for record in records})
    commits = sorted({_short(str(record["commit"])) for record in records})
    count = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    parts.append(f"*{count}, on {'; '.join(machines)}; commit {', '.join(commits)}.*")
    return parts


def _short(commit: str) -> str:
    """The first ten digits of a commit, and ``+changes`` if the source differed from it."""
    head, plus, changes = commit.partition("+")
    return head[:10] + plus + changes


def _table_by_run(by_name: Mapping[str, Sequence[Record]], attacked: bool) -> str:
    """A row for each run, averaged over its seeds."""
    attacks = list(dict.fromkeys(name for runs in by_name.values() for run in runs for name in run["attacks"]))
    heads = ["run", "seeds", "n", "clean", *attacks, *(["worst case", "verdict"] if attacked else [])]
    heads.append("images/s in training")
    rows = []
    for name, runs in by_name.items():
        row = [
            name,
            str(len(runs)),
            f"{runs[0]['clean']['n']:,}",
            _spread([r["clean"]["accuracy"] for r in runs]),
        ]
        for attack in attacks:
            values = [r["attacks"][attack]["robust_accuracy"] for r in runs if attack in r["attacks"]]
            row.append(_spread(values) if values else "n/a")
        if attacked:
            row.append(_spread([r["worst_case"]["robust_accuracy"] for r in runs]))
            row.append(", ".join(sorted({r["verdict"] for r in runs})))
        speeds = [r["images_per_second"] for r in runs if r["images_per_second"] is not None]
        row.append(f"{statistics.median(speeds):,.0f}" if speeds else "n/a")
        rows.append(row)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table_by_attack(records: Sequence[Record]) -> str:
    """A row for each attack, with its robust accuracy and passes on each run."""
    names = list(dict.fromkeys(name for record in records for name in record["attacks"]))
    titles = [
        f"{r['name']}, seed {r['seed']}, {r['threat']['norm']} eps {r['threat']['eps']:.3g},"
        f" n = {r['clean']['n']}: {r['verdict']}"
        for r in records
    ]
    heads = ["robust accuracy, and passes", *(cell for title in titles for cell in (title, "passes"))]
    alone = len(records) <= 2  # there is room for intervals
    rows = [
        ["none (clean)", *(cell for r in records for cell in (_share(r["clean"], r["clean"]["n"], alone), ""))]
    ]
    for name in names:
        rows.append([name])
        for record in records:
            attack = record["attacks"].get(name)
            passes = attack and f"{attack['forwards'] + attack['backwards']:,}"
            n = record["clean"]["n"]
            rows[-1] += [_share(attack, n, alone), passes] if attack else ["n/a", ""]
    worst = (f"**{_share(record['worst_case'], record['clean']['n'], alone)}**" for record in records)
    rows.append(["**worst case**", *(cell for each in worst for cell in (each, ""))])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(found: Record, n: int, with_interval: bool) -> str:
    """A share in percent; with its interval, the mean over draws and another number of images than ``n``."""
    accuracy = found["accuracy"] if "accuracy" in found else found["robust_accuracy"]
    text = f"{100 * accuracy:.1f}"
    if with_interval and "ci95" in found:
        low, high = found["ci95"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    if found["n"] != n:
        text += f" of {found['n']}"
    if over_draws := found.get("over_draws"):
        text += f"; over draws {100 * over_draws['accuracy']:.1f}"
    return text


def _cost(record: Record) -> str:
    """What ``bpda`` and ``nes`` cost on the images that withstand the first 40 steps of ``nes``."""
    if hard := record.get("late"):
        bpda, nes = (hard["passes"][name] for name in ("bpda", "nes"))
        return (
            f"- {record['name']}: on the {hard['images']} images that withstand its first 40 steps, `nes` takes"
            f" {nes:,} passes and `bpda` {bpda:,}, {nes // max(bpda, 1):,} times fewer."
        )
    # No counts for single images, so a bound: all passes of bpda, against those of nes less its early ones.
    bpda, total = (
        record["attacks"][name]["forwards"] + record["attacks"][name]["backwards"] for name in ("bpda", "nes")
    )
    attacked = round(record["clean"]["accuracy"] * record["clean"]["n"])
    nes = total - attacked * EARLY
    return (
        f"- {record['name']}: on the images that withstand its first 40 steps, `nes` takes at least {nes:,}"
        f" passes and `bpda` at most {bpda:,}, {nes // bpda:,} times fewer."
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _differences_from_relu(by_name: Mapping[str, Sequence[Record]]) -> list[str]:
    """For each run with a ReLU counterpart: the differences in clean accuracy, under PGD, in the worst case."""
    lines = []
    for name, runs in by_name.items():
        dataset, model, activation, training = name.rsplit("-", 3)
        relu = by_name.get(f"{dataset}-{model}-relu-{training}")
        if activation == "relu" or not relu or not all("pgd" in run["attacks"] for run in (*runs, *relu)):
            continue

        def gap(path: Sequence[str], runs: Sequence[Record] = runs, relu: Sequence[Record] = relu) -> str:
            ours, relus = (statistics.mean(_at(run, path) for run in each) for each in (runs, relu))
            return f"{100 * (ours - relus):+.1f}"

        lines.append(
            f"- {activation}, {training}, against ReLU: {gap(['clean', 'accuracy'])} points clean,"
            f" {gap(['attacks', 'pgd', 'robust_accuracy'])} under PGD,"
            f" {gap(['worst_case', 'robust_accuracy'])} in the worst case."
        )
    return lines


def _at(record: Record, path: Sequence[str]) -> float:
    value: Any = record
    for name in path:
        value = value[name]
    return float(value)


def _paired_differences(by_name: Mapping[str, Sequence[Record]]) -> list[str]:
    """The mean difference in clean accuracy of two runs over their common seeds, with a 95% t interval."""
    from scipy.stats import t

    names = sorted(by_name, key=lambda name: "to" not in name)
    if len(names) != 2:
        return []
    first, second = ({run["seed"]: run["clean"]["accuracy"] for run in by_name[name]} for name in names)
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return []
    differences = [100 * (first[seed] - second[seed]) for seed in seeds]
    mean = statistics.mean(differences)
    half = t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
    significant = "a" if abs(mean) > half else "no"
    return [
        f"{names[0]} minus {names[1]}, same seed and images: {mean:+.2f} points (95% t interval over"
        f" {len(seeds)} seeds: {mean - half:+.2f} to {mean + half:+.2f}), {significant} significant difference."
    ]


def _labelled(given: str) -> Path | tuple[str, Path]:
    label, equals, folder = given.rpartition("=")
    return (label, Path(folder)) if equals else Path(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write docs/results/NAME.json from run folders")
    collecting.add_argument("name")
    collecting.add_argument("folders", nargs="+", type=_labelled, metavar="[LABEL=]RUN_FOLDER")
    commands.add_parser("page", help="write docs/results.md from all records")
    given = parser.parse_args()
    try:
        if given.command == "collect":
            print(collect(given.name, given.folders))
        else:
            write_text(PAGE, page())
            print(PAGE)
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
