"""The commands that read a run folder, called in this process: their output, or their error message."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kwta_exp import cli
from kwta_exp.config import ConfigError
from kwta_exp.storage import read_json
from tests.launched import launch

SUITE = ["suite=none", "+attack@attack.fgsm=fgsm"]


@dataclass(frozen=True)
class Answer:
    """The outcome of a command.

    Attributes:
        numbers: its output without the folder's name; ``None`` if it failed.
        message: its error message and warnings.
    """

    numbers: Any
    message: str


@dataclass(frozen=True)
class Readers:
    """The commands that read a run folder.

    Args:
        untouched: a run folder to compare with.
        work: a folder for the files that they write.
    """

    untouched: Path
    work: Path
    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture

    def answers(self, run: Path, names: list[str]) -> dict[str, Answer]:
        return {name: getattr(self, name)(run) for name in names}

    def verify(self, run: Path) -> Answer:
        return self._command(run, "verify", run)

    def compare(self, run: Path) -> Answer:
        return self._command(run, "compare", run, self.untouched)

    def curve(self, run: Path) -> Answer:
        return self._command(run, "curve", run)

    def transfer(self, run: Path) -> Answer:
        return self._command(run, "transfer", run, self.untouched, "--n", 8, "--work", self.work / "transfer",
                             "--with", "runtime=cpu", "runtime.threads=1")  # fmt: skip

    def judge(self, run: Path) -> Answer:
        outputs = self.work / "judged"
        self.caplog.clear()
        try:
            launch(outputs, "training=none", f"weights={run}", *SUITE, "evaluation.n=8",
                   "runtime=cpu", "runtime.threads=1")  # fmt: skip
        except ConfigError as error:
            return Answer(None, str(error) + self._warnings())
        (latest,) = outputs.glob("*/s0-*/results.json")
        results = read_json(latest)
        numbers = [results[part] for part in ("threat", "clean", "worst_case")]
        return Answer(numbers, self._warnings())

    def _command(self, run: Path, *words: object) -> Answer:
        self.caplog.clear()
        self.capsys.readouterr()
        status: object = 0
        try:
            cli.main(list(map(str, words)))
        except SystemExit as error:
            status = error.code
        assert status in (0, 1)
        failed, output = status == 1, self.capsys.readouterr()
        assert failed == bool(output.err.strip()), output
        text = re.sub(r"[\w.+-]*-s0-[0-9a-f]{10}", "RUN", output.out.replace(str(run), "RUN"))
        return Answer(None if failed else text, output.err + self._warnings())

    def _warnings(self) -> str:
        return "\n".join(
            record.getMessage() for record in self.caplog.records if record.levelno >= logging.WARNING
        )


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what commands change in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(logging, "raiseExceptions", True)
