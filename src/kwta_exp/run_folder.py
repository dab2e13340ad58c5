"""The folder of one run: its name, its files, and which of them are intact."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kwta_exp import environment
from kwta_exp.attempts import attempt, lock_of
from kwta_exp.attempts import read as read_attempts
from kwta_exp.errors import BusyError, DamagedError, PrintableFormatter, UserError
from kwta_exp.results_file import changed_files, read_results
from kwta_exp.sealed import read_metadata
from kwta_exp.storage import (
    PARTIAL,
    check_guard,
    damaged,
    guarded,
    read_json,
    read_lines,
    read_text_bytes,
    set_aside,
    sha256_of_json,
    write_json,
    write_text,
)

log = logging.getLogger(__name__)

_HASH_DIGITS = 10

_PATIENCE = 1.0
"""Seconds to wait for a lock: a process that was killed has released it by then."""

CONFIG_FILES = ("config.yaml", "overrides.yaml")
"""The files that record how the weights were made; ``environment.json`` holds their checksums."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside ``outputs/<name>/s<seed>-<hash>/``.

    ``state.pt`` is all there is of an unfinished training. Once ``best.safetensors`` and, after it,
    ``last.safetensors`` are there, training is over.
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
            pass  # it may be possible to make it
        except (OSError, ValueError) as error:  # too long, a loop of links, a NUL in it
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
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def report_is_current(self) -> bool:
        """Whether the report is of the latest results."""
        try:
            return self.report.stat().st_mtime_ns >= self.results.stat().st_mtime_ns
        except OSError:
            return False

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
        return lock_of(self.path)

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def evaluation(self, suite: str, identity: Mapping[str, Any]) -> Path:
        """The folder of one evaluation: everything that decides the outcome of each image."""
        return self.path / "evaluation" / f"{suite}-{sha256_of_json(identity)[:_HASH_DIGITS]}"

    @property
    def trained(self) -> bool:
        """Whether training is over and both checkpoints are intact."""
        return all(path.exists() and _is_whole(path) for path in (self.best, self.last))

    @property
    def metrics_damaged(self) -> bool:
        """Whether ``metrics.jsonl`` exists and is not as it was written."""
        try:
            if os.path.lexists(self.metrics):
                read_lines(self.metrics)
        except DamagedError as error:
            log.warning("%s", error)
            return True
        return False

    def set_aside(self) -> Path | None:
        """Rename an existing folder to ``...-before-<time>``; returns the new path."""
        return set_aside(self.path, "-before") if self.path.exists() else None

    def set_damaged_aside(self) -> None:
        """Rename damaged checkpoints and metrics; call with the lock held."""
        for path in (self.best, self.last):
            if path.exists() and not _is_whole(path):
                _set_aside(path)
        if self.metrics_damaged:
            _set_aside(self.metrics)

    def remove_partial_files(self) -> None:
        """Delete the temporary files of writers that were killed; call with the lock held."""
        for path in self.path.rglob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)


@contextmanager
def opened(
    folder: RunFolder, texts: Mapping[str, str], described: Mapping[str, Any], rerun: bool
) -> Iterator[None]:
    """Make the run's folder, lock it against other processes, write its configuration, and log to ``run.log``.

    Args:
        folder: the run's folder.
        texts: the content of :data:`CONFIG_FILES`, by name. They are written once, and stay as they are when
            the run continues or is evaluated again.
        described: the content of ``environment.json`` beside their checksums; its ``command`` goes to the log.
        rerun: rename an existing folder first.

    Raises:
        UserError: if the folder cannot be written, or another process holds it.
    """
    for path in (folder.path.parent, folder.path, folder.lock):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, which is not followed for writing; remove it")
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.lock, timeout=_PATIENCE).acquire()
    except Timeout as error:
        raise BusyError(
            f"{folder.path}: another process is running this experiment{_holder(folder.path)}"
        ) from error
    except OSError as error:
        raise UserError(f"paths.outputs: cannot write {folder.path}: {error.strerror}") from error
    with lock:
        if rerun and (kept := folder.set_aside()):
            log.info("rerun: the earlier results are kept in %s", kept)
        with guarded(folder.path):
            folder.remove_partial_files()
            _write_config(folder, texts, described)
            with _log_file(folder.log) as file_only:
                file_only.info("%s", described["command"])
                try:
                    with attempt(folder.path, described["command"]):
                        yield
                except BaseException:
                    file_only.exception("stopped")
                    raise


def _holder(folder: Path) -> str:
    """Who runs the experiment, as far as it is recorded."""
    last = (read_attempts(folder) or [{}])[-1]
    return f" (process {last.get('pid')} on {last.get('host')})" if "ended" not in last and last else ""


def _write_config(folder: RunFolder, texts: Mapping[str, str], described: Mapping[str, Any]) -> None:
    """Write :data:`CONFIG_FILES` and ``environment.json``, unless they are there, intact."""
    if config_is_intact(folder.path):
        compare_commits(read_json(folder.environment).get("commit"))
        return
    there = [path for path in (folder.environment, *(folder.path / name for name in texts)) if path.exists()]
    if folder.environment in there:
        for path in there:
            _set_aside(path)
    for name, text in texts.items():
        write_text(folder.path / name, text)
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    write_json(folder.environment, {**described, "files": digests})


def config_is_intact(run: Path) -> bool:
    """Whether a run folder has :data:`CONFIG_FILES` as they were written."""
    try:
        for name in CONFIG_FILES:
            read_config_file(run, name)
    except UserError as error:
        if (run / "environment.json").exists():
            log.warning("%s", error)
        return False
    return True


def read_config_file(run: Path, name: str) -> str:
    """The text of one of :data:`CONFIG_FILES`, checked against its checksum in ``environment.json``.

    Raises:
        UserError: if either file is missing.
        DamagedError: if either is not as it was written.
    """
    digests = read_json(run / "environment.json").get("files")
    content = read_text_bytes(run / name)
    if not isinstance(digests, dict) or digests.get(name) != hashlib.sha256(content).hexdigest():
        raise damaged(run / name, "its checksum is not the one in environment.json")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise damaged(run / name, error) from error


class _FileHandler(logging.FileHandler):
    """Appends to a file, never through a symbolic link."""

    def _open(self) -> TextIOWrapper:
        def without_links(path: str, flags: int) -> int:
            return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

        opened_file = open(self.baseFilename, self.mode, encoding=self.encoding, opener=without_links)  # noqa: SIM115
        assert isinstance(opened_file, TextIOWrapper)
        return opened_file


@contextmanager
def _log_file(path: Path) -> Iterator[logging.Logger]:
    """Send all log messages and warnings to ``path`` as well; yields a logger that writes to ``path`` alone."""
    check_guard(path)
    try:
        handler = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
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
    """Log it if results were made by another commit than that of the source."""
    now = environment.commit()
    if then != now:
        log.info("(by commit %s; the source is at %s now; rerun=true runs it again)", then, now)


def finished_evaluation(folder: Path) -> dict[str, Any] | None:
    """The results of an evaluation, if it is finished and its files are intact."""
    try:
        results = read_results(folder / "results.json")
    except UserError as error:
        log.warning("%s", error)
        return None
    lost = list(changed_files(folder, results)) if results else []
    if lost:
        log.warning("%s: missing or damaged: %s; will be made again", folder, ", ".join(lost))
    return None if lost else results


def set_changed_aside(folder: Path) -> None:
    """Rename an evaluation's files that are not as its results list them; call with the lock held."""
    try:
        results = read_results(folder / "results.json")
    except DamagedError:
        _set_aside(folder / "results.json")
        return
    for name in changed_files(folder, results) if results else ():
        if (folder / name).exists():
            _set_aside(folder / name)


def _is_whole(path: Path) -> bool:
    try:
        read_metadata(path)
    except DamagedError as error:
        log.warning("%s", error)
        return False
    return True


def _set_aside(path: Path) -> None:
    log.warning("%s is damaged; kept as %s", path, set_aside(path, ".damaged").name)


def is_evaluation(folder: Path) -> bool:
    """Whether this is an evaluation's folder, and not a run's."""
    return (folder / "evaluation.json").exists() or folder.absolute().parent.name == "evaluation"


def run_of(folder: Path) -> Path:
    """The run's folder: ``folder`` itself, or the one that an evaluation's folder lies in."""
    return folder.absolute().parent.parent if is_evaluation(folder) else folder


def readable(text: str) -> str:
    """``text`` as a part of a folder's name, of 48 characters at most: file systems take 255 in all."""
    return re.sub(r"[^A-Za-z0-9._+]+", "_", text).strip("_")[:48]
