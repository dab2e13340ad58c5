"""Attack any network and say whether its robust accuracy can be believed.

    from kwta_exp.audit import audit
    from kwta_exp.attacks import Threat

    results = audit(model, x_test, y_test, Threat(norm="linf", eps=8 / 255), suite="strong")
    print(results["worst_case"]["robust_accuracy"], results["masking"]["verdict"])

The same as ``python run.py training=none`` does with a checkpoint, for a model that is already in memory.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, Threat, Transfer, adapted
from kwta_exp.config import composed, settings, user_errors
from kwta_exp.data.base import Images
from kwta_exp.data.batches import Split, first_test_images, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Diagnosis, Roles, diagnose, evaluate, summarise
from kwta_exp.parts import built_suite, network_of_run
from kwta_exp.settings import EvaluationSettings


@dataclass(frozen=True)
class Evaluation:
    """A network, its test images, and what they are attacked with.

    Args:
        network: float32, images in [0, 1] to logits; it is put into eval mode and frozen.
        images: the test images.
        suite: attacks by name, cheap to dear.
        threat: what a change may be.
        settings: how many at a time, which checks, and so on.
        seed: of every random stream.
        folder: where the records are kept; what is there already is not done again.
    """

    network: nn.Module
    images: Split
    suite: Mapping[str, Attack]
    threat: Threat
    settings: EvaluationSettings
    seed: int
    folder: Path

    def results(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Attack, check, and summarise: the content of ``results.json``, with ``run`` saying whose it is.

        Raises:
            UserError: if an attack fails, naming it.
        """
        asked, roles = self.settings, Roles.of(self.suite, self.threat)
        clean, attacks, inapplicable = evaluate(
            self.network, self.images, self.suite, self.threat, self.seed, asked.batch_size, self.folder,
            asked.diagnostic_n, asked.save_images, asked.processes, asked.budget, asked.search == "fast",
        )  # fmt: skip
        diagnosis = Diagnosis()
        if asked.checks_n and attacks:
            diagnosis = diagnose(
                self.network, self.images, self.suite, clean, attacks, roles, self.threat, self.seed,
                asked.batch_size, self.folder, asked.checks_n, asked.diagnostic_n, asked.processes,
            )  # fmt: skip
        details = {
            name: attack.details(self.network)
            for name, attack in self.suite.items()
            if hasattr(attack, "details")
        }
        return summarise(
            run, self.threat, clean, attacks, inapplicable, details, roles, diagnosis, asked.diagnostic_n
        )


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
    """Attack ``model`` on ``x`` and say what is left and whether to believe it.

    The numbers are those that ``python run.py training=none weights=... suite=SUITE OVERRIDES`` gives for the
    same weights and test images.

    Args:
        model: images float32 ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, on any one device. Its mode and
            the flags of its parameters are as before when this returns.
        x: test images ``(N, C, H, W)``: uint8, or floating point in [0, 1].
        y: their labels, integers ``(N,)`` in 0..K-1.
        threat: what a change may be.
        suite: the name of a file in ``conf/suite`` (``"quick"``, ``"strong"``, ...), or attacks by name.
        folder: where to keep the records of every image; a second call with the same arguments continues
            there. ``None``: nowhere.
        overrides: values of the configuration, as on the command line: ``["evaluation.n=500", "seed=1",
            "attack.pgd.steps=100"]``.

    Returns:
        The content of ``results.json`` (docs: ``README.md``): ``["clean"]``, ``["attacks"]``,
        ``["worst_case"]``, ``["masking"]``.

    Raises:
        UserError: for images, labels or a value that do not fit, or an attack that fails.
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
            attacks |= {name: adapted(attack, threat) for name, attack in suite.items()}
        for name, attack in attacks.items():
            if isinstance(attack, Transfer) and attack.source:
                attack.connect(network_of_run(attack.source, f"attack.{name}.source", data, options.trust))
    with ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        where = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = first_test_images(data, options.evaluation.n, device)
        _try_out(model.eval(), images)
        evaluation = Evaluation(model, images, attacks, threat, options.evaluation, options.seed, where)
        return evaluation.results({"name": type(model).__name__, "seed": options.seed})


def _images(x: Tensor | npt.NDArray[Any], y: Tensor | npt.NDArray[Any]) -> Images:
    """Checked test images; floating-point multiples of 1/255 become the uint8 pixels they came from."""
    pixels = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if pixels.ndim != 4 or not len(pixels):
        raise UserError(f"x: has shape {pixels.shape}; expected images (N, C, H, W)")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"y: is {labels.dtype} {labels.shape}; expected integers of shape ({len(pixels)},), counted from 0"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f" or not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError(
                f"x: is {pixels.dtype} from {pixels.min()} to {pixels.max()}; expected uint8, or floating point"
                " in [0, 1] (normalisation belongs into the model)"
            )
        pixels = pixels.astype(np.float32)
        bytes_of = np.rint(pixels * 255).astype(np.uint8)
        if np.array_equal(bytes_of.astype(np.float32) / np.float32(255), pixels):
            pixels = bytes_of
    labels = labels.astype(np.int64)
    return Images(pixels, labels, pixels, labels)


def _try_out(model: nn.Module, images: Split) -> None:
    with torch.no_grad():
        logits = model(to_float(images.x[torch.arange(min(2, len(images)), device=images.y.device)]))
    if logits.dim() != 2 or int(images.y.max()) >= logits.shape[1]:
        raise UserError(
            f"model: returns {tuple(logits.shape)} for {min(2, len(images))} images, and the largest label is"
            f" {int(images.y.max())}; expected logits (N, K) with K above it"
        )


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back each module's mode and whether each parameter wants a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
