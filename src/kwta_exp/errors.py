"""The exceptions for a user's mistake and for a damaged file, and text made fit to be shown."""

import logging
import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, what turns the direction of writing, and halves of characters."""


def printable(text: str) -> str:
    r"""``text`` with everything that could command a terminal, or fail to be encoded, escaped as in ``\x1b``.

    Names of files, URLs and exceptions come from anybody, and a terminal obeys what it is shown.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


_LONGEST = 700
_KEPT = 300
_MOST_LINES = 20


class UserError(ValueError):
    """Something the user can put right: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, gives the value, and says what was expected. The
    experiment shows it alone, without a traceback. As text it is :func:`printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DamagedError(UserError):
    """A file of this project that is not as it was written; whoever can make it again may do so."""


class PrintableFormatter(logging.Formatter):
    """Log lines, tracebacks included, that are :func:`printable`; ``conf/config.yaml`` names it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        return printable(super().format(record))


def shortened(message: str) -> str:
    """``message`` without the middle of lines that are too long to read, and of too many lines.

    A message begins with the key and ends with what was expected; both stay.
    """
    lines = [
        line
        if len(line) <= _LONGEST
        else f"{line[:_KEPT]}... ({len(line) - 2 * _KEPT:,} characters left out) ...{line[-_KEPT:]}"
        for line in message.split("\n")
    ]
    if len(lines) > 2 * _MOST_LINES:
        left_out = len(lines) - 2 * _MOST_LINES
        lines[_MOST_LINES:-_MOST_LINES] = [f"... ({left_out:,} lines left out) ..."]
    return "\n".join(lines)
