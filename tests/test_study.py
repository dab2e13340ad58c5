"""docs/results.md: which records are collected, which are refused, and that the committed page matches them."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from scripts.study import collect, page

from kwta_exp.checkpoint import save_weights
from kwta_exp.errors import UserError
from kwta_exp.storage import write_json, write_lines
from tests import stored
from tests.conftest import ROOT

COMMAND = (
    "python run.py experiment=study/x paths.outputs=/home/me/out weights=/home/me/out/run/s0-1 threat.eps=8/255"
)


def run_folder(
    outputs: Path, name: str, seed: int, clean: float, pgd: float | None = None, worst: float | None = None,
    scale: str = "full", epochs: int = 2,
) -> Path:  # fmt: skip
    """A finished run's folder with 100 images: accuracy ``pgd`` under PGD, ``worst`` under all attacks."""
    folder = outputs / name / f"s{seed}-x"
    right = round(100 * clean)
    left = {"pgd": pgd, "more": worst}
    fooled = {attack: range(round(100 * share), right) for attack, share in left.items() if share is not None}
    stored.evaluation(
        folder, "quick-x", [i < right for i in range(100)], fooled, verdict="masked" if fooled else None,
        name=name, seed=seed, command=COMMAND, scale=scale,
        weights_sha256=sha256(f"{name} {seed}".encode()).hexdigest(),
    )  # fmt: skip
    speeds = [10.0, 30.0][:epochs]
    if epochs:
        write_lines(
            folder / "metrics.jsonl",
            [{"epoch": i, "images_per_second": speed} for i, speed in enumerate(speeds, 1)],
        )
        save_weights(folder / "checkpoints" / "last.safetensors", {"a": torch.zeros(1)}, {"epoch": str(epochs)})
    write_json(folder / "environment.json", {"device": "cpu", "processor": "EPYC", "packages": {"torch": "2"}})
    return folder


def test_the_page_is_computed_from_the_records(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path, "d-m-relu-pgd", 0, 0.9, 0.50),
        run_folder(tmp_path, "d-m-relu-pgd", 1, 0.8, 0.60),
        run_folder(tmp_path, "d-m-kwta0.1-pgd", 0, 0.7, 0.65, 0.2),
    ]
    records = tmp_path / "records"
    collect("first", folders, records)
    (records / "first.md").write_text("## A study\n")
    text = page(records)
    assert "## A study" in text
    (command,) = {record["command"] for record in json.loads((records / "first.json").read_text())["records"]}
    assert command == "python run.py experiment=study/x weights=s0-1 threat.eps=8/255"
    spread = "85.0 (80.0 to 90.0) | 55.0 (50.0 to 60.0) | n/a | 55.0 (50.0 to 60.0)"
    assert f"| d-m-relu-pgd | 2 | 100 | {spread} | masked | 20 |" in text
    assert "- kwta0.1, pgd, against ReLU: -15.0 points clean, +10.0 under PGD, -35.0 in the worst case." in text
    assert "3 runs, on EPYC, torch 2; commit 0123456789." in text


def test_a_single_run_is_shown_attack_by_attack(tmp_path: Path) -> None:
    collect("one", [run_folder(tmp_path, "d-m-kwta0.1-natural", 3, 0.9, 0.5, 0.2)], tmp_path)
    (tmp_path / "one.md").write_text("")
    text = page(tmp_path)
    assert "| d-m-kwta0.1-natural, seed 3, linf eps 0.1, n = 100: masked | passes |" in text
    assert "| pgd | 50.0 (40.4 to 59.6) | 3 |" in text  # Wilson's intervals of 50 and 20 of 100
    assert "| **worst case** | **20.0 (13.3 to 28.9)** |  |" in text
    assert "*1 run, on EPYC" in text


def test_runs_of_one_network_are_shown_attack_by_attack(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, f"d-m-relu-{arm}", 0, 0.9, 0.5, 0.2) for arm in ("natural", "pgd")]
    collect("one", zip(("first", "again"), folders, strict=True), tmp_path)
    (tmp_path / "one.md").write_text("")
    found = json.loads((tmp_path / "one.json").read_text())
    for record in found["records"]:
        record["weights_sha256"] = "the same"
    (tmp_path / "one.json").write_text(json.dumps(found))
    assert "| again, seed 0, linf eps 0.1, n = 100: masked | passes | first, seed 0," in page(tmp_path)


def test_two_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for seed, (first, second) in enumerate([(0.90, 0.88), (0.91, 0.90), (0.89, 0.86)]):
        run_folder(tmp_path, "d-m-kwta0.2to0.05-natural", seed, first)
        run_folder(tmp_path, "d-m-kwta0.05-natural", seed, second)
    collect("arms", tmp_path.glob("*/*"), tmp_path)
    (tmp_path / "arms.md").write_text("")
    # Differences 2, 1 and 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303.
    said = "d-m-kwta0.2to0.05-natural minus d-m-kwta0.05-natural, same seed and images: +2.00 points"
    assert f"{said} (95% t interval over 3 seeds: -0.48 to +4.48), no significant difference" in page(tmp_path)


def test_audits_have_no_speed_and_mixed_studies_are_refused(tmp_path: Path) -> None:
    judged = run_folder(tmp_path, "d-m-relu-none", 0, 0.9, 0.5, epochs=0)
    trained = run_folder(tmp_path, "d-m-relu-pgd", 0, 0.9, 0.5)
    collect("x", [judged, trained], tmp_path)
    with pytest.raises(UserError, match=r"x\.json: x\.md is missing beside it"):
        page(tmp_path)
    (tmp_path / "x.md").write_text("")
    assert "| n/a |" in page(tmp_path)
    with pytest.raises(UserError, match="some runs ran attacks and some did not"):
        collect("y", [trained, run_folder(tmp_path, "d-m-lwta2-pgd", 0, 0.9)], tmp_path)


def test_unfinished_and_scaled_down_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished evaluation"):
        collect("x", [tmp_path], tmp_path)
    with pytest.raises(UserError, match="run at scale=tiny; expected scale=full"):
        collect("x", [run_folder(tmp_path, "tiny-d-m-relu-pgd", 0, 0.9, scale="tiny")], tmp_path)
    assert not (tmp_path / "x.json").exists()


def test_the_committed_page_matches_the_records() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == page(ROOT / "docs" / "results")


def test_costs_are_compared_on_images_that_withstand_early_nes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "d-m-kwta0.1-none", 0, 0.9, 0.5, epochs=0)
    queries = {"bpda": [10, 20, 30], "nes": [100, 22041, 1222100]}
    stored.evaluation(
        folder, "x", [True] * 3, {"bpda": [], "nes": []}, verdict="masked", name="d-m-kwta0.1-none",
        columns={name: {"queries": each, "steps": [0, 1, 2]} for name, each in queries.items()},
    )  # fmt: skip
    records = tmp_path / "records"
    collect("first", [("digits, natural", folder)], records)
    (records / "first.md").write_text("## A study")
    (found,) = json.loads((records / "first.json").read_text())["records"]
    assert found["late"] == {"images": 2, "passes": {"bpda": 53, "nes": 1244144}}
    text = page(records)
    assert "- digits, natural: on the 2 images that withstand its first 40 steps" in text
    assert "takes 1,244,144 passes and `bpda` 53, 23,474 times fewer." in text
    assert "| digits, natural, seed 0, linf eps 0.1, n = 3: masked | passes |" in text


def test_the_cost_is_a_bound_where_single_images_were_not_counted(tmp_path: Path) -> None:
    """As in the committed record of digits, natural."""
    collect("first", [run_folder(tmp_path, "d-m-kwta0.1-none", 0, 0.9, 0.5, epochs=0)], tmp_path / "records")
    path = tmp_path / "records" / "first.json"
    content = json.loads(path.read_text())
    passes = {"bpda": 1000, "nes": 22040 * 90 + 5_000_000}
    content["records"][0]["attacks"] = {
        name: {"robust_accuracy": 0.5, "n": 100, "forwards": many, "backwards": 0}
        for name, many in passes.items()
    }
    path.write_text(json.dumps(content))
    path.with_suffix(".md").write_text("")
    assert "at least 5,000,000 passes and `bpda` at most 1,000, 5,000 times fewer" in page(path.parent)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "d-m-relu-pgd", 0, 0.9, 0.5)
    whole = (folder / "metrics.jsonl").read_text()
    for text in (whole.replace("30.0", "31.0"), whole.splitlines(True)[0], "{}\n", "[1]\n", ""):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
            collect("x", [folder], tmp_path)
    (folder / "metrics.jsonl").write_text(whole)
    (folder / "evaluation" / "quick-x" / "pgd.npz").unlink()
    with pytest.raises(UserError, match=r"missing or changed since results\.json was written: pgd\.npz"):
        collect("x", [folder], tmp_path)
    assert not (tmp_path / "x.json").exists()
