"""Runs a suite of attacks over the test images, chunk by chunk, and trusts none of them."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, NotApplicableError, Threat
from kwta_exp.attacks.together import refills
from kwta_exp.data.batches import Split, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.chunks import Bench, Task, Workers, rows_of
from kwta_exp.evaluation.forecast import announce, within_budget
from kwta_exp.evaluation.records import ATTACK_COLUMNS, CLEAN_COLUMNS, Record, due
from kwta_exp.naming import safe_names
from kwta_exp.progress import Progress
from kwta_exp.randomness import isolated, key
from kwta_exp.sealed import read_arrays, write_arrays

log = logging.getLogger(__name__)

CLEAN = "clean"

BATCHES_OF_A_CHUNK, MOST_OF_A_CHUNK = 4, 1024
"""For an attack that refills its batches: the longer the queue, the less often the last ones go half full, and
the more a kill costs.
"""


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
    processes: int = 1,
    budget: int | None = None,
    fast_search: bool = False,
) -> tuple[Record, dict[str, Record], dict[str, str]]:
    """Judge ``network`` clean and under each attack, on the images it classifies correctly clean.

    Chunks (of ``batch_size``, or of several for an attack that refills its batches) are fixed by the images and
    the clean outcome alone, random streams by (seed, attack, image), and each chunk's rows are on disk before
    the next begins: an evaluation that was killed continues to the same rows.

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
        batch_size: images that the network is shown at once.
        folder: where the records live.
        diagnostic_n: how many images every attack is run on; ``None`` for all.
        save_images: keep the adversarial images too, float32, in ``<folder>/images/<attack>-<chunk>.npz``.
        processes: chunks attacked at once, each in a process of its own. It decides no outcome.
        budget: passes, forward and backward, that the suite may cost by forecast; attacks that do not fit in
            are left out and named. ``None``: no limit.
        fast_search: attacks see a proxy (:class:`~kwta_exp.models.proxy.Proxy`); what they
            return is judged by ``network`` all the same.

    Returns:
        The clean record, one record for each attack that applies to this network, and the reason for
        each that does not.

    Raises:
        UserError: if an attack fails or returns something other than images, naming the attack, or has a name
            that cannot be a file's (:func:`~kwta_exp.naming.safe_name`).
    """
    safe_names(suite)
    network.eval().requires_grad_(False)
    task = Task(network, images, suite, threat, seed, batch_size, fast_search)
    bench = Bench.of(task)
    judge = bench.judge

    with Workers(task, bench, processes) as workers, Progress("evaluating", len(images), "image") as progress:
        clean = Record.resumed(folder / f"{CLEAN}.npz", CLEAN_COLUMNS, images.index)
        everything = torch.arange(len(images), device=images.y.device)
        for chunk in _pending(everything, batch_size, clean, progress):
            progress.show(attack=CLEAN)
            started = time.monotonic()
            with isolated(key(seed, CLEAN, int(chunk[0]))):  # some networks draw random numbers
                logits = judge.logits(to_float(images.x[chunk]))
            clean.append(rows_of(images, chunk, logits), len(chunk), 0, time.monotonic() - started)
            clean.save()
            progress.advance(len(chunk))

        right = clean.columns["prediction"] == clean.columns["label"]
        survivors = right.copy()
        progress.extend(len(suite) * int(right.sum()))
        sample = to_float(images.x[everything[: min(batch_size, 4)]])
        with torch.no_grad():
            classes = bench.searched(sample[:1]).shape[1]
        inapplicable = within_budget(suite, int(right.sum()), classes, budget)
        announce(suite, inapplicable, bench.searched, sample, int(right.sum()), classes)

        records: dict[str, Record] = {}
        for name in suite:
            targets = due(right, survivors, diagnostic_n)
            progress.advance(int(right.sum()) - len(targets))
            if name in inapplicable:
                progress.advance(len(targets))
                continue
            places = torch.from_numpy(targets).to(images.y.device)
            size = _chunk_size(suite[name], batch_size)
            record = Record.resumed(folder / f"{name}.npz", ATTACK_COLUMNS, images.index[places])
            if save_images and (lost := _lost_images(folder, name, places[: len(record)].split(size))):
                record = Record.anew(record.path, lost)
            chunks = _pending(places, size, record, progress)
            left = survivors.copy()
            left[targets[: len(record)][record.columns["fooled"]] if len(record) else []] = False
            progress.show(attack=name, worst_case=f"{left.mean():.1%}")
            try:
                for chunk, outcome in zip(chunks, workers.outcomes(name, chunks), strict=True):
                    if save_images:
                        kept = {"index": images.index[chunk], "x_adv": outcome.x_adv}
                        path = _images_path(folder, name, chunk)
                        write_arrays(path, {part: tensor.cpu().numpy() for part, tensor in kept.items()})
                    record.append(outcome.rows, outcome.forwards, outcome.backwards, outcome.seconds)
                    record.save()  # after the images: a row is there only when its image is
                    left[chunk.cpu().numpy()[outcome.rows["fooled"]]] = False
                    progress.advance(len(chunk))
                    progress.show(attack=name, worst_case=f"{left.mean():.1%}")
            except NotApplicableError as reason:  # whatever it found in chunks before counts for nothing
                inapplicable[name] = str(reason)
                log.info("%s is not applicable: %s", name, reason)
                for path in (record.path, *_images_of(name, folder)):
                    path.unlink(missing_ok=True)
                continue
            records[name] = record
            survivors = left
            log.debug("%s done, %.1f%% stand", name, 100 * survivors.mean())

    return clean, records, inapplicable


def _pending(positions: Tensor, batch_size: int, record: Record, progress: Progress) -> Sequence[Tensor]:
    """The chunks that ``record`` lacks. It only ever holds whole ones."""
    done = len(record)
    progress.advance(done)
    return positions[done:].split(batch_size) if done < len(positions) else ()


def _chunk_size(attack: Attack, batch_size: int) -> int:
    """How many images ``attack`` is given: more than a batch, where it gives their room to others when done."""
    most = min(BATCHES_OF_A_CHUNK * batch_size, MOST_OF_A_CHUNK)
    return max(batch_size, most) if refills(attack) else batch_size


def _images_of(name: str, folder: Path) -> list[Path]:
    """The files of an attack's images; those of ``pgd-2`` are none of ``pgd``'s."""
    return [path for path in (folder / "images").glob("*.npz") if path.stem.rpartition("-")[0] == name]


def _images_path(folder: Path, name: str, chunk: Tensor) -> Path:
    return folder / "images" / f"{name}-{int(chunk[0])}.npz"


def _lost_images(folder: Path, name: str, chunks: Sequence[Tensor]) -> UserError | None:
    """What is wrong with the kept images of chunks that were judged already, if anything is."""
    try:
        for chunk in chunks:
            if len(chunk):
                read_arrays(_images_path(folder, name, chunk))
    except UserError as error:
        return error
    return None
