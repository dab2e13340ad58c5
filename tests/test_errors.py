"""No name and no exception can send control characters to the terminal."""

import logging
import logging.config
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from kwta_exp.config import ConfigError, user_errors
from kwta_exp.errors import UserError, printable
from kwta_exp.report.terminal import results_table
from kwta_exp.run_folder import RunFolder, opened

SHOWN = [
    ("plain text, 8/255\tand\nlines", "plain text, 8/255\tand\nlines"),
    ("Füße 図 ✓ 🙂", "Füße 図 ✓ 🙂"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("over\rwritten\b\0\x7f", r"over\rwritten\x08\x00\x7f"),
    ("\x9b2J\x85", r"\x9b2J\x85"),
    ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    ("name\udcff", r"name\udcff"),
]


@pytest.mark.parametrize(("text", "shown"), SHOWN, ids=ascii)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert str(UserError(text)) == str(ConfigError(text)) == shown
    shown.encode()


def test_user_error_keeps_the_message_of_a_config_error() -> None:
    with pytest.raises(UserError) as caught, user_errors():
        raise ConfigError("weights=\x1b[2J: no such file")
    assert str(caught.value) == r"weights=\x1b[2J: no such file"


def test_log_lines_and_tracebacks_are_escaped(
    composed: Callable[..., DictConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logging_config: Any = OmegaConf.to_container(composed().hydra.job_logging, resolve=True)
    of_terminal = logging.config.DictConfigurator(logging_config).configure_formatter(  # type: ignore[attr-defined]
        logging_config["formatters"]["terminal"]
    )
    record = logging.LogRecord("a", logging.INFO, "", 0, "fetching %s", ("http://\x1b[31m",), None)
    assert of_terminal.format(record) == r"fetching http://\x1b[31m"

    folder = RunFolder(tmp_path / "run")

    def stops() -> None:
        with opened(folder, {}, {"command": "run \x07", "commit": None}, False):
            logging.getLogger("kwta_exp").warning("of \x1b[31m")
            raise ValueError("stop \x9b2J")

    with pytest.raises(ValueError, match="stop"):
        stops()
    written = folder.log.read_text()
    assert r"run \x07" in written
    assert r"of \x1b[31m" in written
    assert r"ValueError: stop \x9b2J" in written
    assert not {"\x07", "\x1b", "\x9b"} & {*written}


def test_results_table_escapes_control_characters_only() -> None:
    accuracy = {"accuracy": 0.5, "robust_accuracy": 0.5, "n": 2, "ci95": [0.1, 0.9]}
    attack = {**accuracy, "cumulative": 0.5, "forwards": 1, "backwards": 1, "seconds": 1.0}
    shown = results_table({
        "run": {"name": "\x1b[31m[bold]net[/bold] [/]", "seed": 0},
        "threat": {"norm": "linf", "eps": 0.1},
        "clean": accuracy,
        "attacks": {"[/pgd]\x1b[2J": attack},
        "inapplicable": {"\x9b\u202e": "no"},
        "worst_case": accuracy,
        "masking": {"verdict": "suspect", "explanation": "[/] \x1b", "flags": [
            {"check": "[/x]\x1b", "value": 1.0, "threshold": 0.5}
        ]},
    })  # fmt: skip
    for text in (r"\x1b[31m[bold]net[/bold] [/]", r"[/pgd]\x1b[2J", r"\x9b\u202e", r"[/] \x1b", r"[/x]\x1b"):
        assert text in shown
    assert printable(shown) == shown
