"""Complete finished evaluations from made-up outcomes, and a forger who updates every checksum."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import CallableAttack
from kwta_exp.data.batches import Split
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation, Outcome, summarise
from kwta_exp.evaluation.records import ATTACK_COLUMNS, Record
from kwta_exp.results_file import evaluation_info
from kwta_exp.run_folder import CONFIG_FILES
from kwta_exp.storage import CHECKSUM, sha256_of_json, write_json

RUN = {
    "name": "d-m-relu-natural", "seed": 0, "suite": "quick", "weights_sha256": "0" * 64, "scale": "full",
    "command": "python run.py", "commit": "0123456789abcdef",
}  # fmt: skip


def evaluation(
    run: Path,
    name: str,
    correct: Sequence[bool],
    fooled: Mapping[str, Collection[int]],
    /,
    *,
    threat: Threat | None = None,
    verdict: str | None = None,
    columns: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Write the evaluation ``name`` of a run, as its latest, and return its results.

    Args:
        run: the run's folder.
        name: the name of the evaluation's folder.
        correct: whether each image is clean-correct.
        fooled: the images that each attack fools; each attack runs on all clean-correct images.
        threat: default L-inf 0.1.
        verdict: replaces the verdict that follows from the outcomes.
        columns: values that replace zeros, by attack and column; of ``clean``, the labels alone. The prediction
            on a clean image is the label, or one more where it is wrong.
        about: values that replace those of :data:`RUN`.
    """
    folder, threat = run / "evaluation" / name, threat or Threat(norm="linf", eps=0.1)
    index = np.arange(len(correct))
    digest = np.array([b"%016x" % i for i in index], dtype="S16")
    wrong = (~np.array(correct)).astype(np.int64)
    margin, label = np.zeros(len(correct), np.float32), np.zeros(len(correct), np.int64)
    label += np.array((columns or {}).get("clean", {}).get("label", 0))
    rows = {"index": index, "digest": digest, "label": label, "prediction": label + wrong, "margin": margin}
    clean = Record(folder / "clean.npz")
    clean.append(rows, len(correct), 0, 0.0)
    clean.save()
    outcome = Outcome(clean)
    due = outcome.due(None)
    for attack, indices in fooled.items():
        rows = {
            column: np.zeros(len(due), f"{kind}8" if kind != "b" else bool)
            for column, kind in ATTACK_COLUMNS.items()
        }
        rows |= {"index": index[due], "digest": digest[due], "fooled": np.isin(due, list(indices))}
        rows |= {column: np.array(values) for column, values in (columns or {}).get(attack, {}).items()}
        outcome.records[attack] = Record(folder / f"{attack}.npz")
        outcome.records[attack].append(rows, 1, 2, 3.0)
        outcome.records[attack].save()
    suite = {attack: CallableAttack(lambda model, x, y, keys: x, threat) for attack in fooled}
    pixels = torch.zeros(len(correct), 1, 1, 1, dtype=torch.uint8)
    images = Split(pixels, torch.zeros(len(correct)), torch.tensor(index))
    made = Evaluation(torch.nn.Flatten(), images, suite, threat, folder)
    results = summarise({**RUN, **about}, made, outcome)
    results["masking"]["verdict"] = verdict or results["masking"]["verdict"]
    identity = {"attacks": [[attack, {"steps": 5}] for attack in fooled], "batch_size": 10}
    write_json(folder / "evaluation.json", {"identity": identity})
    results["evaluation"] = evaluation_info(folder)
    for place in (folder, run):
        write_json(place / "results.json", results)
    return results


def described(run: Path, activation: str, seed: int = 0, **values: Any) -> Path:
    """Write the files that say what was run: an activation, its values, a seed; returns the folder."""
    run.mkdir(parents=True, exist_ok=True)
    config = {"seed": seed, "paths": {"outputs": str(run)}, "activation": {"_target_": activation, **values}}
    choices = {"dataset": "d", "model": "m", "activation": activation, "training": "natural"}
    texts = {"config.yaml": config, "overrides.yaml": {"overrides": [], "choices": choices}}
    for name, content in texts.items():
        (run / name).write_text(yaml.safe_dump(content, sort_keys=False))
    files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in CONFIG_FILES}
    write_json(run / "environment.json", {"command": "python run.py", "commit": None, "files": files})
    return run


def forge(run: Path) -> None:
    """Update every checksum in a run folder whose file can still be read."""
    described = _json(run / "environment.json")
    if described is not None or not (run / "environment.json").exists():
        texts = {name: run / name for name in CONFIG_FILES if _is_readable(run / name)}
        files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in texts.items()}
        _seal(run / "environment.json", {**(described or {}), "files": files})
    for path in sorted(run.glob("evaluation/*/evaluation.json")):
        if (content := _json(path)) is not None:
            _seal(path, content)
    latest = _json(run / "results.json")
    for path in sorted(run.glob("evaluation/*/results.json")):
        if (results := _json(path)) is None:
            continue
        if isinstance(results.get("evaluation"), dict) and not _is_sparse(path.parent / "evaluation.json"):
            with suppress(UserError):  # it contains a special file
                results["evaluation"] = evaluation_info(path.parent)
        _seal(path, results)
        if latest is not None and isinstance(latest.get("evaluation"), dict):
            latest["evaluation"] = results.get("evaluation")
    if latest is not None:
        _seal(run / "results.json", latest)


def _is_readable(path: Path) -> bool:
    return path.is_file() and not _is_sparse(path)


def _is_sparse(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 2**30


def _json(path: Path) -> dict[str, Any] | None:
    if not _is_readable(path):
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _seal(path: Path, content: dict[str, Any]) -> None:
    content.pop(CHECKSUM, None)
    path.write_text(json.dumps({**content, CHECKSUM: sha256_of_json(content)}, indent=2) + "\n")
