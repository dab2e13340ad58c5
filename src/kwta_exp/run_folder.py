"""The folder of one run: its name, its files, and what is already in it."""

import itertools
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kwta_exp import environment
from kwta_exp.errors import PrintableFormatter, UserError
from kwta_exp.storage import PARTIAL, sha256_of_json, write_text

log = logging.getLogger(__name__)

_HASH_DIGITS = 10


@dataclass(frozen=True)
class RunFolder:
    """Paths inside ``outputs/<name>/s<seed>-<hash>/``.

    ``state.pt`` is all there is of an unfinished training. ``last.safetensors`` is written after
    ``best.safetensors`` and nothing else is written between, so its presence means that training is
    over.
    """

    path: Path

    @classmethod
    def of(cls, outputs: Path, name: str, seed: int, identity: Mapping[str, Any]) -> "RunFolder":
        """The folder for ``identity``: everything that decides the trained weights.

        Raises:
            UserError: if there cannot be a folder of this name.
        """
        path = outputs / name / f"s{seed}-{sha256_of_json(identity)[:_HASH_DIGITS]}"
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # whether it can be made is seen when it is
        except (OSError, ValueError) as error:  # too long, links in circles, a NUL in it
            raise UserError(f"paths.outputs={outputs}: no folder can be made there ({error})") from error
        return cls(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "checkpoints" / "state.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def lock(self) -> Path:
        """Beside the folder, so that it stays in place when the folder is set aside."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def evaluation(self, suite: str, identity: Mapping[str, Any]) -> Path:
        """The folder of one evaluation: everything that decides the outcome of each image."""
        return self.path / "evaluation" / f"{suite}-{sha256_of_json(identity)[:_HASH_DIGITS]}"

    def set_aside(self) -> Path | None:
        """Rename an existing folder to ``...-before-<time>``, and say to what."""
        if not self.path.exists():
            return None
        stem = f"{self.path.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        aside = next(path for name in names if not (path := self.path.with_name(name)).exists())
        self.path.rename(aside)
        return aside

    def remove_partial_files(self) -> None:
        """Delete what writers that were killed left behind; call with the lock held."""
        for path in self.path.rglob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)


@contextmanager
def opened(folder: RunFolder, texts: Mapping[str, str], command: str, rerun: bool) -> Iterator[None]:
    """The folder made, described, locked against a second process, and logging to its ``run.log``.

    Args:
        folder: which.
        texts: files to write once, by name; ``environment.json`` last. They tell how the weights came
            about and stay as they are when the run continues or is evaluated anew.
        command: what is being run, for the log.
        rerun: set what is there aside first.

    Raises:
        UserError: if the folder cannot be written, or another process holds it.
    """
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.lock, timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"{folder.path}: another process is running this very experiment") from error
    except OSError as error:
        raise UserError(f"paths.outputs: cannot write {folder.path}: {error.strerror}") from error
    with lock:
        if rerun and (aside := folder.set_aside()):
            log.info("rerun: the earlier results are kept in %s", aside)
        folder.remove_partial_files()
        if folder.environment.exists():
            compare_commits(json.loads(folder.environment.read_text()).get("commit"))
        else:
            for name, text in texts.items():
                write_text(folder.path / name, text)
        with _log_file(folder.log) as file_only:
            file_only.info("%s", command)
            try:
                yield
            except BaseException:
                file_only.exception("stopped")
                raise


@contextmanager
def _log_file(path: Path) -> Iterator[logging.Logger]:
    """Everything logged, and every warning, goes to ``path`` too; the logger given goes nowhere else."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file_only = logging.getLogger(f"{__name__}.file_only")
    file_only.propagate = False
    for logger in (logging.getLogger(), file_only):
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield file_only
    finally:
        logging.captureWarnings(False)
        for logger in (logging.getLogger(), file_only):
            logger.removeHandler(handler)
        handler.close()


def compare_commits(then: str | None) -> None:
    """Say so if what is there was made by another commit than the source is at."""
    now = environment.commit()
    if then != now:
        log.info("(by commit %s; the source is at %s now; rerun=true runs it anew)", then, now)


def read_results(path: Path) -> dict[str, Any] | None:
    """A finished evaluation's results, or ``None`` if there are none."""
    try:
        content = json.loads(path.read_text())
        if not {"run", "clean", "worst_case"} <= content.keys():
            raise ValueError("not a whole results file")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it to have it made again") from error
    return dict(content)


def readable(text: str) -> str:
    """``text`` as a part of a folder's name, of 48 characters at most: file systems take 255 in all."""
    return re.sub(r"[^A-Za-z0-9._+]+", "_", text).strip("_")[:48]
