"""From run folders to small committed records, and from records to ``docs/results.md``.

    python -m scripts.study collect NAME [LABEL=]RUN_FOLDER...   writes docs/results/NAME.json
    python -m scripts.study page                            writes docs/results.md from all of them

A record holds what the tables need and where it came from, nothing more; ``docs/results/NAME.md`` is the text
that goes before a study's table. Every number of the page is computed from the records.
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
from kwta_exp.storage import damaged, read_json, read_lines, read_metadata, write_text

RECORDS = Path("docs/results")
PAGE = Path("docs/results.md")

Record = Mapping[str, Any]


def collect(name: str, folders: Iterable[Path | tuple[str, Path]], records: Path = RECORDS) -> Path:
    """Write the records of finished runs to ``<records>/<name>.json``, in the order of their names.

    A run may come with a label that takes its name's place: all audits are of training "none".

    Raises:
        UserError: for a folder without results, or one of a reduced scale.
    """
    labelled = [folder if isinstance(folder, tuple) else (None, folder) for folder in folders]
    found = sorted((_record(folder, label) for label, folder in labelled), key=_key)
    if len({record["worst_case"] is None for record in found}) > 1:
        raise UserError(f"{name}: some of the runs were attacked and some not; expected one study")
    path = records / f"{name}.json"
    write_text(path, json.dumps({"records": found}, indent=2, allow_nan=False) + "\n")
    return path


def _record(folder: Path, label: str | None = None) -> dict[str, Any]:
    run, stored = RunFolder(folder), Stored.read(folder)
    results = stored.results
    if results["run"].get("scale", "full") != "full":
        raise UserError(f"{folder}: run at scale={results['run']['scale']}; that is no result")
    epochs, environment = _epochs(run), read_json(run.environment)
    about = ("name", "seed", "commit", "weights_sha256")
    late = _late(stored)
    return {
        **{key: results["run"][key] for key in about},
        **({"name": label} if label else {}),
        **({"late": late} if late else {}),
        "command": _portable(results["run"]["command"]),
        "threat": results["threat"],
        "clean": results["clean"],
        "attacks": {
            attack: {key: found[key] for key in ("robust_accuracy", "n", "forwards", "backwards")}
            for attack, found in results["attacks"].items()
        },
        "worst_case": results["worst_case"],
        "verdict": results["masking"]["verdict"],
        "epochs": len(epochs),
        "sparsity_ratio": epochs[-1].get("sparsity_ratio") if epochs else None,
        "images_per_second": statistics.median(each["images_per_second"] for each in epochs)
        if epochs
        else None,
        "device": environment["processor"] if environment["device"] == "cpu" else environment["device"],
        "torch": environment["packages"]["torch"],
    }


EARLY = 20 * 101 + 20 * 1001
"""Passes of the first 40 steps of ``nes``, with their looks at the iterate."""


def _epochs(run: RunFolder) -> list[dict[str, Any]]:
    """The records of all epochs of a training; none where weights were only judged."""
    found = read_lines(run.metrics) if run.metrics.exists() else []
    trained = int(read_metadata(run.last).get("epoch", 0)) if run.last.exists() else 0
    if [each.get("epoch") for each in found] != list(range(1, trained + 1)):
        raise damaged(run.metrics, f"it has {len(found)} epochs, not the {trained} of the training")
    return found


def _late(stored: Stored) -> dict[str, Any] | None:
    """What each attack spent on the images that withstand the first 40 steps of ``nes``, until they fell."""
    rows = {name: record.columns for name, record in stored.outcome.records.items() if len(record)}
    if "nes" not in rows:
        return None
    hard = rows["nes"]["index"][rows["nes"]["queries"] > EARLY]
    spent = {
        name: int((columns["queries"] + columns["steps"])[np.isin(columns["index"], hard)].sum())
        for name, columns in rows.items()
    }
    return {"images": len(hard), "passes": spent}


def _portable(command: str) -> str:
    """A command line without the places of one machine: its paths are left out, files keep their names."""
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
        " largest. The worst case is per image over all attacks of the suite. A verdict of `masked` means that"
        " the number under PGD is no measure of robustness; `untested` that nothing yet speaks for the rest."
        " Images per second are of the machine as it was, with whatever else it did, and no benchmark."
        " Under each table stands the processor, or `cpu` where the record does not name it.",
    ]
    for path in sorted(records.glob("*.json")):
        found: list[Record] = json.loads(path.read_text())["records"]
        if not path.with_suffix(".md").is_file():
            raise UserError(
                f"{path}: has no {path.with_suffix('.md').name} beside it; expected the study's text"
            )
        parts += [path.with_suffix(".md").read_text().strip(), *_study(found)]
    return "\n\n".join(parts) + "\n"


def _study(records: Sequence[Record]) -> list[str]:
    by_name: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_name[record["name"]].append(record)
    attacked = any(record["worst_case"] for record in records)
    threats = {(record["threat"]["norm"], record["threat"]["eps"]) for record in records}
    beside = attacked and (len(records) == 1 or len(threats) > 1)
    parts = [_attacks(records) if beside else _table(by_name, attacked)]
    if lines := [_price(record) for record in records if {"bpda", "nes"} <= record["attacks"].keys()]:
        parts.append("\n".join(lines))
    differences = (
        [] if beside else _differences_from_relu(by_name) if attacked else _paired_differences(by_name)
    )
    if differences:
        parts.append("\n".join(differences))
    machines = sorted({f"{record['device']}, torch {record['torch']}" for record in records})
    commits = sorted({_short(str(record["commit"])) for record in records})
    count = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    parts.append(f"*{count}, on {'; '.join(machines)}; commit {', '.join(commits)}.*")
    return parts


def _short(commit: str) -> str:
    """The first digits of a commit; whether the source differed from it stays said."""
    head, plus, changes = commit.partition("+")
    return head[:10] + plus + changes


def _table(by_name: Mapping[str, Sequence[Record]], attacked: bool) -> str:
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


def _attacks(records: Sequence[Record]) -> str:
    """Runs beside each other, attack by attack: what each leaves, and what it asks of the network."""
    names = list(dict.fromkeys(name for record in records for name in record["attacks"]))
    titles = [
        f"{r['name']}, seed {r['seed']}, {r['threat']['norm']} eps {r['threat']['eps']:.3g},"
        f" n = {r['clean']['n']}: {r['verdict']}"
        for r in records
    ]
    heads = ["accuracy left, and passes", *(cell for title in titles for cell in (title, "passes"))]
    rows = [["none (clean)", *(cell for r in records for cell in (f"{100 * r['clean']['accuracy']:.1f}", ""))]]
    for name in names:
        rows.append([name])
        for record in records:
            attack = record["attacks"].get(name)
            passes = attack and f"{attack['forwards'] + attack['backwards']:,}"
            rows[-1] += [f"{100 * attack['robust_accuracy']:.1f}", passes] if attack else ["n/a", ""]
    worst = (f"**{100 * record['worst_case']['robust_accuracy']:.1f}**" for record in records)
    rows.append(["**worst case**", *(cell for each in worst for cell in (each, ""))])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _price(record: Record) -> str:
    """What the bpda and the published attack cost where the latter has to work."""
    if late := record.get("late"):
        mine, theirs = (late["passes"][name] for name in ("bpda", "nes"))
        return (
            f"- {record['name']}: on the {late['images']} images that withstand the first 40 steps of `nes`, it"
            f" takes {theirs:,} passes and the bpda {mine:,}, a {theirs // max(mine, 1):,}th part."
        )
    # Not counted image by image: a bound, with all that the bpda took and the least that `nes` did.
    mine, theirs = (
        record["attacks"][name]["forwards"] + record["attacks"][name]["backwards"] for name in ("bpda", "nes")
    )
    attacked = round(record["clean"]["accuracy"] * record["clean"]["n"])
    least = theirs - attacked * EARLY
    return (
        f"- {record['name']}: on the images that withstand its first 40 steps, `nes` takes at least {least:,}"
        f" passes, and the bpda at most {mine:,}, a {least // mine:,}th part."
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _differences_from_relu(by_name: Mapping[str, Sequence[Record]]) -> list[str]:
    """For each run beside one that differs in having ReLU: what PGD says of the two, and what is so."""
    lines = []
    for name, runs in by_name.items():
        dataset, model, activation, training = name.rsplit("-", 3)
        relu = by_name.get(f"{dataset}-{model}-relu-{training}")
        if activation == "relu" or not relu or not all("pgd" in run["attacks"] for run in (*runs, *relu)):
            continue

        def gap(path: Sequence[str], runs: Sequence[Record] = runs, relu: Sequence[Record] = relu) -> str:
            mine, theirs = (statistics.mean(_at(run, path) for run in each) for each in (runs, relu))
            return f"{100 * (mine - theirs):+.1f}"

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
    holds = "Zero lies inside: no difference is shown." if abs(mean) <= half else "Zero lies outside."
    return [
        f"{names[0]} minus {names[1]}, same seed and images: {mean:+.2f} points (95% t interval over"
        f" {len(seeds)} seeds: {mean - half:+.2f} to {mean + half:+.2f}). {holds}"
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
