"""Runs a suite of attacks on test images, chunk by chunk, and judges every image that an attack returns."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, NotApplicableError, Threat
from kwta_exp.data.batches import Split, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.chunks import ChunkResult, Networks, rows_of
from kwta_exp.evaluation.forecast import announce, within_budget
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.evaluation.ranks import Ranks
from kwta_exp.evaluation.records import ATTACK_COLUMNS, CLEAN_COLUMNS, Record
from kwta_exp.evaluation.roles import Roles
from kwta_exp.evaluation.workers import Workers
from kwta_exp.interruption import saving
from kwta_exp.naming import safe_names
from kwta_exp.progress import Progress
from kwta_exp.randomness import isolated, key
from kwta_exp.sealed import read_arrays, write_arrays

log = logging.getLogger(__name__)

CLEAN = "clean"

BATCHES_IN_A_CHUNK, MAX_CHUNK = 4, 1024
"""The size of a chunk for attacks on independent images: the longer it is, the fuller are the micro-batches
while fooled images drop out, and the more work a kill costs.
"""


@dataclass(frozen=True)
class Evaluation:
    """A network, its test images, and the attacks on it.

    Each returned image is cast to float32, NaN and infinite pixels are replaced by the clean ones, and it is
    projected into the threat and [0, 1] before ``network`` judges it in float32; an error must be confirmed
    (:class:`~kwta_exp.evaluation.judge.Judge`). So an attack of another norm or radius counts only as far as
    it stays inside.

    Args:
        network: float32, images in [0, 1] to logits; it is put into eval mode and frozen.
        images: the test images.
        suite: attacks by name, cheap to expensive.
        threat: the allowed changes of an image.
        folder: for the records; an evaluation that was killed continues from them to the same rows.
        seed: of the attacks' random streams.
        batch_size: the most images in one call of the network.
        diagnostic_n: how many images every attack runs on, so that attacks can be compared there; of the rest
            each sees only those that no earlier attack fooled. ``None`` for all.
        save_images: keep the adversarial images too, float32, in ``<folder>/images/<attack>-<chunk>.npz``.
        processes: chunks attacked at once, each in a process of its own. It does not change outcomes.
        budget: forward and backward passes that the suite may cost by forecast; attacks beyond it are left out
            and named. ``None`` for no limit.
        search: ``"fast"`` lets attacks see a proxy of the network (:class:`~kwta_exp.models.proxy.Proxy`); what
            they return is judged by ``network`` all the same.
        draws: answers to each image that a network is judged by if it answers at random: an image is
            misclassified if most draws err. Attacks see the mean of a few answers, and of as many as the judge
            where that was too few to fool it.
    """

    network: nn.Module
    images: Split
    suite: Mapping[str, Attack]
    threat: Threat
    folder: Path
    seed: int = 0
    batch_size: int = 250
    diagnostic_n: int | None = None
    save_images: bool = False
    processes: int = 1
    budget: int | None = None
    search: Literal["exact", "fast"] = "exact"
    draws: int = 20

    @property
    def roles(self) -> Roles:
        """Which attacks of the suite are the baseline and which take a single step."""
        return Roles.of(self.suite, self.threat)

    def run(self, ranks: Ranks | None = None) -> Outcome:
        """Judge the network clean, and under each attack on the images it classifies correctly.

        Chunks are fixed by the images and the clean outcome, random streams by (seed, attack, image), and each
        chunk's rows are on disk before the next begins.

        Args:
            ranks: the processes of the run, if there are several; this is the first of them.

        Raises:
            UserError: if an attack fails or returns something other than images, naming it, or has a name that
                cannot be a file's (:func:`~kwta_exp.naming.safe_name`).
        """
        safe_names(self.suite)
        self.network.eval().requires_grad_(False)
        networks = Networks.of(self)
        with (
            Workers(self, networks, ranks) as workers,
            Progress("evaluating", len(self.images), "image") as progress,
            saving() as leave_if_asked,
        ):
            if networks.judge.draws > 1:
                log.info(
                    "the network answers at random: judged by %d draws for each image", networks.judge.draws
                )
            outcome = Outcome(self._clean_record(networks, progress))
            n = int(outcome.clean_correct.sum())
            progress.extend(len(self.suite) * n)
            self._forecast(outcome, networks)
            for name in self.suite:
                due = torch.from_numpy(outcome.due(self.diagnostic_n)).to(self.images.y.device)
                progress.advance(n - len(due))
                if name in outcome.inapplicable:
                    progress.advance(len(due))
                else:
                    self._attack(name, due, outcome, workers, progress, leave_if_asked)
        return outcome

    def _clean_record(self, networks: Networks, progress: Progress) -> Record:
        """The network's answers to the images themselves."""
        record = Record.resumed(self.folder / f"{CLEAN}.npz", CLEAN_COLUMNS, self.images.index)
        positions = torch.arange(len(self.images), device=self.images.y.device)
        progress.advance(len(record))
        for chunk in _split(positions[len(record) :], self.batch_size):
            progress.show(attack=CLEAN)
            started = time.monotonic()
            with isolated(key(self.seed, CLEAN, int(chunk[0]))):  # some networks draw random numbers
                answers = networks.judge.answers(to_float(self.images.x[chunk]), self.images.y[chunk])
            rows = rows_of(self.images, chunk, answers, networks.judge.draws)
            record.append(rows, len(chunk) * networks.judge.draws, 0, time.monotonic() - started)
            record.save()
            progress.advance(len(chunk))
        return record

    def _forecast(self, outcome: Outcome, networks: Networks) -> None:
        """Leave out what exceeds the budget, and say what the rest may cost."""
        n = int(outcome.clean_correct.sum())
        device = self.images.y.device
        sample = to_float(self.images.x[torch.arange(min(len(self.images), self.batch_size, 4), device=device)])
        with torch.no_grad():
            classes = networks.searched(sample[:1]).shape[1]
        outcome.inapplicable |= within_budget(self.suite, n, classes, self.budget)
        announce(self.suite, outcome.inapplicable, networks.searched, sample, n, classes)

    def _attack(
        self, name: str, due: Tensor, outcome: Outcome, workers: Workers, progress: Progress,
        leave_if_asked: Callable[[], None],
    ) -> None:  # fmt: skip
        """Run one attack on the images at positions ``due``, and add its record to ``outcome``."""
        size = _chunk_size(self.suite[name], workers.batch_size)
        record = Record.resumed(self.folder / f"{name}.npz", ATTACK_COLUMNS, self.images.index[due])
        if self.save_images and (lost := self._lost_images(name, _split(due[: len(record)], size))):
            record = Record.anew(record.path, lost)
        done = len(record)
        robust = outcome.robust
        if done:
            robust[due[:done].cpu().numpy()[record.columns["fooled"]]] = False
        progress.advance(done)
        progress.show(attack=name, worst_case=f"{robust.mean():.1%}")
        chunks = _split(due[done:], size)
        try:
            for chunk, result in zip(chunks, workers.results(name, chunks), strict=True):
                self._keep(name, chunk, result, record)
                robust[chunk.cpu().numpy()[result.rows["fooled"]]] = False
                progress.advance(len(chunk))
                progress.show(attack=name, worst_case=f"{robust.mean():.1%}")
                leave_if_asked()
        except NotApplicableError as reason:  # what it found in earlier chunks does not count
            outcome.inapplicable[name] = str(reason)
            log.info("%s does not apply: %s", name, reason)
            for path in (record.path, *self._image_files(name)):
                path.unlink(missing_ok=True)
            return
        outcome.records[name] = record
        log.debug("%s done, %.1f%% robust", name, 100 * np.mean(robust))

    def _keep(self, name: str, chunk: Tensor, result: ChunkResult, record: Record) -> None:
        if self.save_images:
            kept = {"index": self.images.index[chunk], "x_adv": result.x_adv}
            arrays = {part: tensor.cpu().numpy() for part, tensor in kept.items()}
            write_arrays(self._image_file(name, chunk), arrays)
        record.append(result.rows, result.forwards, result.backwards, result.seconds)
        record.save()  # after the images: a row is there only when its image is

    def _image_file(self, name: str, chunk: Tensor) -> Path:
        return self.folder / "images" / f"{name}-{int(chunk[0])}.npz"

    def _image_files(self, name: str) -> Iterator[Path]:
        """The files of an attack's images; ``pgd-2`` is another attack than ``pgd``."""
        found = (self.folder / "images").glob("*.npz")
        return (path for path in found if path.stem.rpartition("-")[0] == name)

    def _lost_images(self, name: str, chunks: Sequence[Tensor]) -> UserError | None:
        """What is wrong with the kept images of chunks that were judged already, if anything is."""
        try:
            for chunk in chunks:
                read_arrays(self._image_file(name, chunk))
        except UserError as error:
            return error
        return None


def _split(positions: Tensor, size: int) -> Sequence[Tensor]:
    return positions.split(size) if len(positions) else ()


def _chunk_size(attack: Attack, batch_size: int) -> int:
    most = min(BATCHES_IN_A_CHUNK * batch_size, MAX_CHUNK)
    return max(batch_size, most) if attack.independent else batch_size
