"""Runs a suite of attacks over the test images, chunk by chunk, and trusts none of them."""

import io
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, NotApplicableError, Threat
from kwta_exp.attacks.losses import margin
from kwta_exp.data.batches import Split, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.counting import Counted
from kwta_exp.evaluation.judge import Judge, errs, predicted
from kwta_exp.evaluation.records import Column, Record
from kwta_exp.progress import Progress
from kwta_exp.randomness import fold, isolated, key
from kwta_exp.storage import image_digests, write_bytes

log = logging.getLogger(__name__)

CLEAN = "clean"


def evaluate(
    network: nn.Module,
    images: Split,
    suite: Mapping[str, Attack],
    threat: Threat,
    seed: int,
    batch_size: int,
    folder: Path,
    diagnostic_n: int | None = None,
    save_images: bool = False,
) -> tuple[Record, dict[str, Record], dict[str, str]]:
    """Judge ``network`` clean and under each attack, on the images it classifies correctly clean.

    Chunks of ``batch_size`` are fixed by the images and the clean outcome alone, random streams by
    (seed, attack, image), and each chunk's rows are on disk before the next begins: an evaluation
    that was killed continues to the same rows.

    Every attack runs on the correct ones among the first ``diagnostic_n`` images, so that attacks can be
    compared there; of the rest each sees only what those before it left standing.

    Each returned image is cast to float32, NaN and infinite pixels are put back, and it is projected into the
    threat and [0, 1] before ``network`` judges it in float32, and an error must be confirmed
    (:class:`~kwta_exp.evaluation.judge.Judge`). So an attack of another norm or radius counts only as far as
    it stays inside.

    Args:
        network: float32, images in [0, 1] to logits; it is put into eval mode and frozen.
        images: the test images to judge.
        suite: attacks by name, cheap to dear.
        threat: what a change may be.
        seed: of the attacks' random streams.
        batch_size: images of a chunk.
        folder: where the records live.
        diagnostic_n: how many images every attack is run on; ``None`` for all.
        save_images: keep the adversarial images too, float32, in ``<folder>/images/<attack>-<chunk>.npz``.

    Returns:
        The clean record, one record for each attack that applies to this network, and the reason for
        each that does not.

    Raises:
        UserError: if an attack fails or returns something other than images, naming the attack.
    """
    judge = Judge(network.eval().requires_grad_(False))

    with Progress("evaluating", len(images), "image") as progress:
        clean = Record.open(folder / f"{CLEAN}.npz", expected=images.index)
        everything = torch.arange(len(images), device=images.y.device)
        for chunk in _pending(everything, batch_size, clean, progress):
            progress.show(attack=CLEAN)
            started = time.monotonic()
            logits = judge.logits(to_float(images.x[chunk]))
            clean.append(_rows(images, chunk, logits), len(chunk), 0, time.monotonic() - started)
            clean.save()
            progress.advance(len(chunk))

        right = clean.columns["prediction"] == clean.columns["label"]
        survivors = right.copy()
        compared = np.arange(len(images)) < (len(images) if diagnostic_n is None else diagnostic_n)
        progress.extend(len(suite) * int(right.sum()))

        records: dict[str, Record] = {}
        inapplicable: dict[str, str] = {}
        for name, attack in suite.items():
            targets = np.flatnonzero(right & (compared | survivors))
            progress.advance(int(right.sum()) - len(targets))
            places = torch.from_numpy(targets).to(images.y.device)
            record = Record.open(folder / f"{name}.npz", expected=images.index[places])
            for chunk in _pending(places, batch_size, record, progress):
                progress.show(attack=name, worst_case=f"{survivors.mean():.1%}")
                try:
                    x_adv = _attack_chunk(judge, images, chunk, name, attack, threat, seed, record)
                except NotApplicableError as reason:
                    inapplicable[name] = str(reason)
                    break
                if save_images:
                    _save_images(folder / "images" / f"{name}-{int(chunk[0])}.npz", images.index[chunk], x_adv)
                record.save()  # after the images: a row is there only when its image is
                progress.advance(len(chunk))
            if name in inapplicable:
                log.info("%s is not applicable: %s", name, inapplicable[name])
                continue
            records[name] = record
            survivors[targets[record.columns["fooled"]] if len(record) else []] = False
            log.debug("%s done, %.1f%% stand", name, 100 * survivors.mean())

    return clean, records, inapplicable


def _pending(positions: Tensor, batch_size: int, record: Record, progress: Progress) -> Iterator[Tensor]:
    """The chunks that ``record`` lacks. It only ever holds whole ones."""
    done = len(record)
    progress.advance(done)
    for chunk in positions.split(batch_size) if len(positions) else ():
        if done >= len(chunk):
            done -= len(chunk)
        else:
            yield chunk


def _save_images(path: Path, index: Tensor, x_adv: Tensor) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, index=index.cpu().numpy(), x_adv=x_adv.cpu().numpy())
    write_bytes(path, buffer.getvalue())


def _attack_chunk(
    judge: Judge,
    images: Split,
    chunk: Tensor,
    name: str,
    attack: Attack,
    threat: Threat,
    seed: int,
    record: Record,
) -> Tensor:
    """Add the rows of one chunk to ``record`` and return its adversarial images."""
    x, y = to_float(images.x[chunk]), images.y[chunk]
    keys = fold(key(seed, "attack", name), images.index[chunk])
    counted = Counted(judge.network, x, y, threat)
    started = time.monotonic()
    try:
        with isolated(int(keys.sum())):  # whatever draws from global generators does so reproducibly
            returned = attack(counted, x.clone(), y, keys)
        if not isinstance(returned, Tensor) or returned.shape != x.shape:
            raise ValueError(
                f"returned {getattr(returned, 'shape', type(returned).__name__)};"
                f" expected images {tuple(x.shape)}"
            )
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(f"attack.{name}: {type(error).__name__}: {error}") from error

    with torch.no_grad():
        x_adv = returned.detach().to(x)
        x_adv = threat.project(torch.where(x_adv.isfinite(), x_adv, x), x)
        logits = judge.logits(x_adv)
        rows = _rows(images, chunk, logits)
        erred = errs(logits, y)
        fooled = erred.clone()
        fooled[erred] = judge.errs_again(x_adv[erred], y[erred])
        rows["fooled"] = fooled.cpu().numpy()
        rows["unconfirmed"] = (erred & ~fooled).cpu().numpy()
        rows["distance"] = threat.distance(x_adv, x).cpu().numpy()
        rows["queries"] = counted.queries.cpu().numpy()
        rows["steps"] = counted.steps.cpu().numpy()
        rows["key"] = keys.cpu().numpy()
    record.append(rows, counted.forwards, counted.backwards, time.monotonic() - started)
    return x_adv


def _rows(images: Split, chunk: Tensor, logits: Tensor) -> dict[str, Column]:
    labels = images.y[chunk]
    prediction = predicted(logits)
    return {
        "index": images.index[chunk].cpu().numpy(),
        "digest": image_digests(images.x[chunk].cpu().numpy()),
        "label": labels.cpu().numpy(),
        "prediction": prediction.cpu().numpy(),
        "margin": -margin(logits, labels).cpu().numpy(),
    }
