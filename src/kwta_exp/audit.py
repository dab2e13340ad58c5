"""Attack any network and report whether its robust accuracy can be believed.

    from kwta_exp.audit import audit
    from kwta_exp.attacks import Threat

    results = audit(model, x_test, y_test, Threat(norm="linf", eps=8 / 255), suite="strong")
    print(results["worst_case"]["robust_accuracy"], results["masking"]["verdict"])

This is ``python run.py training=none`` for a model in memory instead of a checkpoint.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, Threat, Transfer, as_attack
from kwta_exp.config import composed, settings, user_errors
from kwta_exp.data.base import Images
from kwta_exp.data.batches import Split, first_test_images, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation, evaluate
from kwta_exp.parts import built_suite, network_of_run


def audit(
    model: nn.Module,
    x: Tensor | npt.NDArray[Any],
    y: Tensor | npt.NDArray[Any],
    threat: Threat,
    suite: str | Mapping[str, Attack] = "strong",
    *,
    folder: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Attack ``model`` on ``x`` and return its robust accuracy and the verdict.

    The results are those of ``python run.py training=none weights=... suite=SUITE OVERRIDES`` for the same
    weights and test images. With ``evaluation.search=auto`` attacks search on a fast proxy if ``model`` is on a
    GPU, and on ``model`` itself on a CPU; ``model`` itself judges either way.

    Args:
        model: maps images float32 ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``; on any one device. The mode
            of its modules and its parameters' ``requires_grad`` are restored afterwards.
        x: test images ``(N, C, H, W)``: uint8, or floating point in [0, 1].
        y: their labels, integers ``(N,)`` in 0..K-1.
        threat: the perturbations that attacks may use.
        suite: the name of a file in ``conf/suite`` (``"quick"``, ``"strong"``, ...), or attacks by name.
        folder: keeps the record of each image; a second call with the same arguments continues there.
            ``None`` keeps no records.
        overrides: configuration values, as on the command line: ``["evaluation.n=500", "seed=1",
            "attack.pgd.steps=100"]``.

    Returns:
        The content of ``results.json`` (``docs/reference.md``): ``["clean"]``, ``["attacks"]``,
        ``["worst_case"]``, ``["masking"]``.

    Raises:
        UserError: if the images, labels or an override are invalid, or an attack fails.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    chosen = ["suite=none"] if not isinstance(suite, str) else [f"suite={suite}"]
    data = _images(x, y)
    with user_errors():
        cfg, _ = composed([*chosen, f"threat={threat.norm}", *overrides])
        cfg.threat.eps = threat.eps
        options = settings(cfg)
        attacks = built_suite(cfg, threat)
        if not isinstance(suite, str):
            attacks |= {name: as_attack(attack, threat) for name, attack in suite.items()}
        for name, attack in attacks.items():
            if isinstance(attack, Transfer) and attack.source:
                attack.connect(network_of_run(attack.source, f"attack.{name}.source", data, options.trust))
    with ExitStack() as stack:
        stack.enter_context(_restored(model))
        where = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = first_test_images(data, options.evaluation.n, device)
        _check_logits(model.eval(), images)
        evaluation = Evaluation(
            model, images, attacks, threat, where, options.seed,
            **options.evaluation.resolved(device.type).model_dump(exclude={"n", "checks_n"}),
        )  # fmt: skip
        run = {"name": type(model).__name__, "seed": options.seed}
        return evaluate(evaluation, run, options.evaluation.checks_n)


def _images(x: Tensor | npt.NDArray[Any], y: Tensor | npt.NDArray[Any]) -> Images:
    """Check the test images. Floating-point pixels that are multiples of 1/255 become uint8."""
    pixels = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if pixels.ndim != 4 or not len(pixels):
        raise UserError(f"x: has shape {pixels.shape}; expected images (N, C, H, W)")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"y: is {labels.dtype} {labels.shape}; expected integers from 0, of shape ({len(pixels)},)"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f" or not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError(
                f"x: is {pixels.dtype} from {pixels.min()} to {pixels.max()}; expected uint8, or floating point"
                " in [0, 1] (normalisation belongs in the model)"
            )
        pixels = pixels.astype(np.float32)
        as_uint8 = np.rint(pixels * 255).astype(np.uint8)
        if np.array_equal(as_uint8.astype(np.float32) / np.float32(255), pixels):
            pixels = as_uint8
    labels = labels.astype(np.int64)
    return Images(pixels, labels, pixels, labels)


def _check_logits(model: nn.Module, images: Split) -> None:
    with torch.no_grad():
        logits = model(to_float(images.x[torch.arange(min(2, len(images)), device=images.y.device)]))
    if logits.dim() != 2 or int(images.y.max()) >= logits.shape[1]:
        raise UserError(
            f"model: returns {tuple(logits.shape)} for {min(2, len(images))} images, and the largest label is"
            f" {int(images.y.max())}; expected logits (N, K) with a larger K"
        )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore each module's mode and each parameter's ``requires_grad``."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
