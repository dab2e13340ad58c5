"""The exceptions for a user's mistake and for a damaged file, and text made safe to print."""

import logging
import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, bidirectional overrides and lone surrogates."""

_MAX_LINE = 700
_KEPT_CHARACTERS = 300
_KEPT_LINES = 20


class UserError(ValueError):
    """Something the user can fix: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, the value and what was expected. The experiment shows it
    alone, without a traceback. As text it is :func:`printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class BusyError(UserError):
    """Another process holds what this one wants to write."""


class DamagedError(UserError):
    """A file of this project whose content has changed since it was written. The caller may write it again."""


class PrintableFormatter(logging.Formatter):
    """Log lines, tracebacks included, that are :func:`printable`; ``conf/config.yaml`` names it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        return printable(super().format(record))


def printable(text: str) -> str:
    r"""``text`` with characters that control a terminal, or cannot be encoded, escaped as in ``\x1b``.

    File names, URLs and exception messages may come from untrusted sources.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def shortened(message: str) -> str:
    """``message`` without the middle of overlong lines, and without the middle lines if there are too many.

    A message begins with the key and ends with the expected value; both are kept.
    """
    lines = [
        line
        if len(line) <= _MAX_LINE
        else f"{line[:_KEPT_CHARACTERS]}... ({len(line) - 2 * _KEPT_CHARACTERS:,} characters left out)"
        f" ...{line[-_KEPT_CHARACTERS:]}"
        for line in message.split("\n")
    ]
    if len(lines) > 2 * _KEPT_LINES:
        lines[_KEPT_LINES:-_KEPT_LINES] = [f"... ({len(lines) - 2 * _KEPT_LINES:,} lines left out) ..."]
    return "\n".join(lines)
