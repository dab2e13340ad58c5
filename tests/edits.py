"""Edits of a finished run folder, as an accident or a forger would make them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml

from kwta_exp.checkpoint import read_weights, save_weights
from kwta_exp.sealed import read_arrays, read_metadata, write_arrays
from kwta_exp.storage import CHECKSUM

Edit = Callable[[Path, Random], None]

FILES = [
    "config.yaml", "overrides.yaml", "environment.json", "results.json", "evaluation/*/results.json",
    "evaluation/*/evaluation.json", "evaluation/*/clean.npz", "evaluation/*/pgd.npz",
    "evaluation/*/bpda.npz",
    "evaluation/*/images/pgd-*.npz", "evaluation/*/images/fgsm-*.npz", "checkpoints/best.safetensors",
    "checkpoints/last.safetensors",
]  # fmt: skip

FOLDERS = ["checkpoints", "evaluation", "evaluation/*", "evaluation/*/images"]

NAMES = [
    "../../x",
    "../../../../../../tmp/x",
    "/tmp/kwta-x",
    "a/b",
    "a\nb",
    "a\x1b[2Jb",
    "",
    "clean",
    "x" * 300,
]

VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**9, 10**30, float("nan"), float("inf"), 1e400, "", "x", "${oc.env:SECRET}", "${",
    "${activation}", "${threat}", "../../x", "\ud800", [], [1], {}, {"a": 1}, "???",
    {"_target_": "os.system", "command": "true"},
]  # fmt: skip


def chosen(run: Path, pattern: str, rng: Random) -> Path:
    return rng.choice(sorted(run.glob(pattern)))


def _removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        _removed(path)
        make(path)

    return edit


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": _removed,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "a link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "a broken link": _replaced(lambda path: path.symlink_to("nothing")),
}


def sparse(run: Path, rng: Random) -> None:
    """Extend a text file to a terabyte of zeros that take no space on disk."""
    os.truncate(
        chosen(run, rng.choice([file for file in FILES if file.endswith(("yaml", "json"))]), rng), 2**40
    )


def damage(kind: str, files: list[str]) -> Edit:
    return lambda run, rng: DAMAGE[kind](chosen(run, rng.choice(files), rng)) and None


def key_paths(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value in nested dictionaries and lists."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [keys for key, value in items for keys in ((*prefix, key), *key_paths(value, (*prefix, key)))]


def put(content: Any, keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def edited_json(change: Callable[[dict[str, Any], Random], object], *patterns: str) -> Edit:
    """Change all files that match the patterns in the same way."""

    def edit(run: Path, rng: Random) -> None:
        seed = rng.random()
        for path in sorted(path for pattern in patterns for path in run.glob(pattern)):
            content = json.loads(path.read_text())
            change(content, Random(seed))
            path.write_text(json.dumps(content))

    return edit


def results(change: Callable[[dict[str, Any], Random], object]) -> Edit:
    """Change an evaluation's results and the run's copy in the same way."""
    return edited_json(change, "results.json", "evaluation/*/results.json")


def any_value(content: dict[str, Any], rng: Random) -> None:
    content.pop(CHECKSUM, None)
    paths = [keys for keys in key_paths(content) if "files" not in keys[:-1] and keys[-1] != "command"]
    put(content, rng.choice(paths), rng.choice(VALUES))


def renamed(content: dict[str, Any], rng: Random) -> None:
    content["attacks"][rng.choice(NAMES)] = content["attacks"].pop("pgd")


def renamed_in_both(run: Path, rng: Random) -> None:
    name = rng.choice(NAMES)
    results(lambda content, _: content["attacks"].__setitem__(name, content["attacks"].pop("pgd")))(run, rng)
    edited_json(
        lambda content, _: [
            pair.__setitem__(0, name) for pair in content["identity"]["attacks"] if pair[0] == "pgd"
        ],
        "evaluation/*/evaluation.json",
    )(run, rng)


def nested(depth: int) -> Edit:
    """Add a deeply nested value to the results."""

    def edit(run: Path, rng: Random) -> None:
        for path in (run / "results.json", *run.glob("evaluation/*/results.json")):
            text = path.read_text().rstrip().removesuffix("}")
            path.write_text(f'{text}, "extra": {"[" * depth}{"]" * depth}}}')

    return edit


def edited_yaml(name: str, change: Callable[[dict[str, Any], Random], object]) -> Edit:
    def edit(run: Path, rng: Random) -> None:
        content = yaml.safe_load((run / name).read_text())
        change(content, rng)
        text = yaml.dump(content, sort_keys=False)
        (run / name).write_text(text, errors="replace")

    return edit


GROUPS = ("dataset", "threat", "activation", "model")


def value_of_group(config: dict[str, Any], rng: Random) -> None:
    group = rng.choice(GROUPS)
    put(config, rng.choice([(group,), *key_paths(config[group], (group,))]), rng.choice(VALUES))


def hydra_key(config: dict[str, Any], rng: Random) -> None:
    name, values = rng.choice([
        ("_partial_", [True, False, 3, None]),
        ("_args_", [[], [1], ["x"], 3]),
        ("_recursive_", [True, False]),
        ("_convert_", ["none", "all", "object", 3]),
    ])  # fmt: skip
    group = config[rng.choice(GROUPS)]
    inner = [group, *(value for value in group.values() if isinstance(value, dict))]
    rng.choice(inner)[name] = rng.choice(values)


TARGETS = [
    "torch.nn.ReLU", "torch.nn.Linear", "os.system", "kwta_exp.models.CNN", "kwta_exp.models.Torchvision",
    "kwta_exp.models.Converted", "kwta_exp.activations.LWTA", "kwta_exp.activations.StochasticLWTA",
    "kwta_exp.activations.MeanSparse", "kwta_exp.data.datasets.MNIST",
    "kwta_exp.data.image_folder.ImageFolder", "kwta_exp.data.datasets.Synthetic", "kwta_exp.attacks.Threat",
    "kwta_exp.storage.write_text", "", "..", "nothing", "kwta_exp.models", None, 3,
]  # fmt: skip


def other_class(config: dict[str, Any], rng: Random) -> None:
    config[rng.choice(GROUPS)]["_target_"] = rng.choice(TARGETS)


def merged(**groups: Mapping[str, Any]) -> Callable[[dict[str, Any], Random], None]:
    def change(config: dict[str, Any], rng: Random) -> None:
        for group, content in groups.items():
            if "_target_" in content:
                config[group] = {}
            config[group].update(content)

    return change


def appended(text: str, name: str = "config.yaml") -> Edit:
    def edit(run: Path, rng: Random) -> None:
        (run / name).write_text((run / name).read_text() + text)

    return edit


def synthetic(**values: Any) -> Callable[[dict[str, Any], Random], None]:
    return merged(dataset={"_target_": "kwta_exp.data.datasets.Synthetic", **values})


def option(config: dict[str, Any], rng: Random) -> None:
    names = [*NAMES, "${oc.env:SECRET}", "${paths.data}", {"a": 1}, [1], None, 3]
    config["choices"] = rng.choice([None, [], 3, "x"]) if rng.random() < 0.2 else config["choices"]
    if isinstance(config["choices"], dict):
        config["choices"][rng.choice(GROUPS)] = rng.choice(names)


def record(pattern: str, change: Callable[[dict[str, Any], Random], object]) -> Edit:
    """Change the arrays of one file and update its checksum."""

    def edit(run: Path, rng: Random) -> None:
        path = chosen(run, pattern, rng)
        arrays = read_arrays(path)
        change(arrays, rng)
        write_arrays(path, arrays)

    return edit


RECORDS = "evaluation/*/[cfps]*.npz"
IMAGES = "evaluation/*/images/*.npz"


def _columns(arrays: Mapping[str, Any]) -> list[str]:
    return [name for name, array in arrays.items() if array.ndim]


def dropped(arrays: dict[str, Any], rng: Random) -> None:
    del arrays[rng.choice(sorted(arrays))]


def retyped(arrays: dict[str, Any], rng: Random) -> None:
    name = rng.choice(sorted(arrays))
    kind = rng.choice(["i1", "u8", "f2", "f8", "S1", "U3", "c16", "M8[s]", "?", "i8"])
    try:
        arrays[name] = arrays[name].astype(kind)
    except ValueError:
        arrays[name] = np.zeros(arrays[name].shape, kind)


def repeated(arrays: dict[str, Any], rng: Random) -> None:
    for name in _columns(arrays):
        arrays[name] = np.concatenate([arrays[name], arrays[name][-1:]])


def shortened(arrays: dict[str, Any], rng: Random) -> None:
    rows = rng.choice([0, 1, 3])
    for name in _columns(arrays):
        arrays[name] = arrays[name][:rows]


def shuffled(arrays: dict[str, Any], rng: Random) -> None:
    for name in _columns(arrays):
        arrays[name] = arrays[name][::-1]


def reshaped(arrays: dict[str, Any], rng: Random) -> None:
    name = rng.choice(_columns(arrays))
    arrays[name] = rng.choice([arrays[name][:, None], arrays[name][None], arrays[name][:0], np.zeros((), "i8")])


def other_rows(arrays: dict[str, Any], rng: Random) -> None:
    """Change one column for every third image."""
    name = rng.choice(
        ["fooled" if "fooled" in arrays else "prediction", "index", "prediction", "label", "digest"]
    )
    for row in range(0, len(arrays["index"]), 3):
        old = arrays[name][row]
        arrays[name][row] = (
            not old if name == "fooled" else b"0" if name == "digest" else rng.choice([-1, 3, 2**62])
        )


def corrupt_images(arrays: dict[str, Any], rng: Random) -> None:
    x = arrays["x_adv"]
    rng.choice([
        lambda: x.__setitem__(0, 1 - x[0]),
        lambda: x.__setitem__(0, np.nan),
        lambda: x.__setitem__(0, 7.0),
        lambda: arrays.__setitem__("x_adv", x[..., :-1]),
        lambda: arrays.__setitem__("x_adv", x[:, :, 0]),
        lambda: arrays.__setitem__("x_adv", x.astype("f8")),
        lambda: arrays["index"].__setitem__(0, -1),
        lambda: arrays["index"].__setitem__(0, 10**12),
        lambda: arrays["index"].__setitem__(slice(None), arrays["index"][0]),
        lambda: arrays.__setitem__("index", arrays["index"][:, None]),
        lambda: arrays.update(index=arrays["index"][:0], x_adv=x[:0]),
        lambda: arrays.pop("index"),
        lambda: arrays.__setitem__("x_adv", np.zeros((len(x), 1, 3000, 3000), "f4")),
    ])()  # fmt: skip


def weights(change: Callable[[dict[str, Any], dict[str, str], Random], object]) -> Edit:
    """Change both checkpoints and update their checksums."""

    def edit(run: Path, rng: Random) -> None:
        seed = rng.random()
        for path in sorted(run.glob("checkpoints/*.safetensors")):
            content, metadata = read_weights(path), read_metadata(path)
            change(content, metadata, Random(seed))
            save_weights(path, content, metadata)

    return edit


def corrupt_weights(content: dict[str, Any], metadata: dict[str, str], rng: Random) -> None:
    name = rng.choice(sorted(content))
    rng.choice([
        lambda: content[name].fill_(float("nan")),
        lambda: content[name].view(-1)[0].fill_(float("inf")),
        lambda: content.__setitem__(name, content[name].double()),
        lambda: content.__setitem__(name, content[name].to(torch.int8)),
        lambda: content.__setitem__(name, content[name].flatten()[:1].clone()),
        lambda: content.__setitem__("more", content[name].clone()),
        lambda: content.pop(name),
        lambda: content.clear(),
        lambda: content[name].mul_(1e30),
    ])()  # fmt: skip


def corrupt_ratio(content: dict[str, Any], metadata: dict[str, str], rng: Random) -> None:
    values = [float("nan"), 2.0, -1.0, 0.0, 1e-300, 0.5, [0.1, 0.2]]
    for name in content:
        if name.endswith("_extra_state"):
            content[name] = torch.tensor(rng.choice(values), dtype=torch.float64)


def corrupt_metadata(content: dict[str, Any], metadata: dict[str, str], rng: Random) -> None:
    name, values = rng.choice([
        ("activation", ["", "[]", "{", '{"_target_": "os.system"}', '{"_target_": 3}', "[" * 3000, "NaN"]),
        ("epoch", ["x", "\ud7ff"]),
    ])  # fmt: skip
    metadata[name] = rng.choice(values)


def batch_size(content: dict[str, Any], rng: Random) -> None:
    content["identity"]["batch_size"] = rng.choice([10**9, 0, -1, "16", True, 2**16, 2**16 + 1, None, 16.0])


EDITS: dict[str, Edit] = {
    **{f"file: {kind}": damage(kind, FILES) for kind in DAMAGE},
    "file: sparse": sparse,
    **{
        f"folder: {kind}": damage(kind, FOLDERS)
        for kind in ("deleted", "a pipe", "a link to a device", "a link to itself")
    },
    "results: any value": results(any_value),
    "results: any value, again": results(any_value),
    "results: one of two copies": edited_json(any_value, "evaluation/*/results.json"),
    "results: an attack renamed": results(renamed),
    "results: an attack renamed everywhere": renamed_in_both,
    "results: nested 900 deep": nested(900),
    "results: nested 5,000 deep": nested(5000),
    "results: an extra key in the threat": results(lambda content, _: content["threat"].update(more=1)),
    "results: another threat": results(lambda content, _: content["threat"].update(eps=1e-9)),
    "results: more images": results(lambda content, _: content["clean"].update(n=10**9)),
    "results: a file outside the folder": results(
        lambda content, _: content["evaluation"]["files"].update({"../../x.npz": "0" * 64})
    ),
    "evaluation.json: any value": edited_json(any_value, "evaluation/*/evaluation.json"),
    "evaluation.json: batch size": edited_json(batch_size, "evaluation/*/evaluation.json"),
    "environment.json: any value": edited_json(any_value, "environment.json"),
    "config: any value": edited_yaml("config.yaml", value_of_group),
    "config: any value, again": edited_yaml("config.yaml", value_of_group),
    "config: any value, once more": edited_yaml("config.yaml", value_of_group),
    "config: a Hydra key": edited_yaml("config.yaml", hydra_key),
    "config: a Hydra key, again": edited_yaml("config.yaml", hydra_key),
    "config: another class": edited_yaml("config.yaml", other_class),
    "config: another class, again": edited_yaml("config.yaml", other_class),
    "config: a wide network": edited_yaml("config.yaml", merged(model={"hidden": [10**8, 10**8]})),
    "config: a deep network": edited_yaml("config.yaml", merged(model={"hidden": [1] * 100_000})),
    "config: a very deep network": edited_yaml("config.yaml", merged(model={
        "_target_": "kwta_exp.models.WideResNet", "_partial_": True, "activation": "${activation}",
        "depth": 6 * 10**7 + 4, "widen_factor": 1,
    })),
    "config: large images": edited_yaml("config.yaml", synthetic(image_size=100_000)),
    "config: many images": edited_yaml("config.yaml", synthetic(channels=1, image_size=8, train=10**10)),
    "config: many classes": edited_yaml("config.yaml", synthetic(channels=1, image_size=8, num_classes=10**10)),
    "config: images of the same shape": edited_yaml("config.yaml", synthetic(channels=1, image_size=8)),
    "config: data to download": edited_yaml("config.yaml", merged(dataset={
        "_target_": "kwta_exp.data.datasets.FashionMNIST", "root": "${paths.data}", "download": True,
    })),
    "config: an alias": appended("extra: &a [1]\nmore: [*a, *a]\n"),
    "config: nested deep": appended("extra: " + "[" * 3000 + "]" * 3000 + "\n"),
    "config: keys that are not strings": edited_yaml("config.yaml", merged(model={3: 1})),  # type: ignore[dict-item]
    "config: other types": appended(
        "model: {_target_: kwta_exp.models.MLP, _partial_: true, activation: '${activation}',"
        " hidden: !!set {1, 2}, more: 2001-01-01, bytes: !!binary aGVsbG8=}\n"
    ),
    "config: a large number": appended(
        f"threat: {{_target_: kwta_exp.attacks.Threat, norm: linf, eps: 0x{'f' * 9000}}}\n"
    ),
    "config: a large file": appended("# " + "x" * 2**21),
    "overrides: an option": edited_yaml("overrides.yaml", option),
    "overrides: an option, again": edited_yaml("overrides.yaml", option),
    "record: a column dropped": record(RECORDS, dropped),
    "record: another dtype": record(RECORDS, retyped),
    "record: a row twice": record(RECORDS, repeated),
    "record: few rows": record(RECORDS, shortened),
    "record: other order": record(RECORDS, shuffled),
    "record: another shape": record(RECORDS, reshaped),
    "record: other rows": record(RECORDS, other_rows),
    "images: corrupted": record(IMAGES, corrupt_images),
    "images: corrupted, again": record(IMAGES, corrupt_images),
    "weights: corrupted": weights(corrupt_weights),
    "weights: corrupted metadata": weights(corrupt_metadata),
    "weights: corrupted ratio": weights(corrupt_ratio),
}  # fmt: skip
"""Each edit by its name, ``"what: how"``."""
