"""Recompute a run's worst case from weights and images alone.

    python -m kwta_exp.verify RUN_FOLDER

For evaluations made with ``evaluation.save_images=true``: reads the adversarial images, checks that each lies
inside the threat around the test image it claims to come from, and judges it again. No attack is run and no
record is believed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kwta_exp.attacks import Threat
from kwta_exp.config import build, check_trust
from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images, to_float
from kwta_exp.errors import UserError, printable
from kwta_exp.evaluation.judge import Judge, errs
from kwta_exp.parts import network_of_run
from kwta_exp.plan import source_run
from kwta_exp.run_folder import read_results

_ROUNDING = 1e-6
"""How far float32 may carry an image over the edge of its ball."""


def verify(folder: Path) -> list[str]:
    """What was found of each evaluation with images in a run folder, one line each.

    Raises:
        UserError: if there is none, an image is not what it claims, or a number cannot be had again.
    """
    _, cfg = source_run(str(folder), "RUN_FOLDER")
    check_trust(cfg, "dataset", folder)
    data = build(cfg, "dataset").load()
    network = network_of_run(str(folder), "RUN_FOLDER", data).eval().requires_grad_(False)

    evaluations = sorted(path.parent for path in folder.glob("evaluation/*/images"))
    if not evaluations:
        raise UserError(f"{folder}: no images were kept; expected a run with evaluation.save_images=true")
    return [_verify_one(evaluation, network, data) for evaluation in evaluations]


def _verify_one(evaluation: Path, network: nn.Module, data: Images) -> str:
    results = read_results(evaluation / "results.json")
    if results is None or results["worst_case"] is None:
        raise UserError(f"{evaluation}: not finished; the command that made it continues")
    threat = Threat(**results["threat"])
    identity = json.loads((evaluation / "evaluation.json").read_text())["identity"]
    judge = Judge(network, batch_size=identity["batch_size"])
    images = first_test_images(data, results["clean"]["n"], torch.device("cpu"))
    position = {index: place for place, index in enumerate(images.index.tolist())}

    clean = torch.cat(
        [
            ~errs(judge.logits(to_float(images.x[at])), images.y[at])
            for at in torch.arange(len(images)).split(judge.batch_size)
        ]
    )
    standing = clean.clone()
    for path in sorted((evaluation / "images").glob("*.npz")):
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            index, x_adv = file["index"], torch.from_numpy(file["x_adv"])
        at = torch.tensor([position[i] for i in index.tolist()])
        x, y = to_float(images.x[at]), images.y[at]
        outside = (threat.distance(x_adv, x) > threat.eps + _ROUNDING).any()
        if outside or x_adv.dtype != torch.float32 or not (0 <= x_adv.min() <= x_adv.max() <= 1):
            raise UserError(f"{path}: holds images outside {threat.norm} eps {threat.eps:g} or [0, 1]")
        fooled = errs(judge.logits(x_adv), y)
        fooled[fooled.clone()] = judge.errs_again(x_adv[fooled], y[fooled])
        standing[at[fooled]] = False

    found = {"clean": clean.double().mean().item(), "worst case": standing.double().mean().item()}
    claimed = {
        "clean": results["clean"]["accuracy"],
        "worst case": results["worst_case"]["robust_accuracy"],
    }
    said = ", ".join(f"{name} {100 * share:.2f}%" for name, share in found.items())
    if found != claimed:
        raise UserError(f"{evaluation}: found {said}, but results.json says {claimed}")
    return f"{evaluation}: {said} (n = {len(images)}), as results.json says"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    try:
        print(printable("\n".join(verify(parser.parse_args().folder))))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
