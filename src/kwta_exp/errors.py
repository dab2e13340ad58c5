"""The one exception a user's mistake is reported with, and text made fit to be shown."""

import logging
import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, what turns the direction of writing, and halves of characters."""


def printable(text: str) -> str:
    r"""``text`` with everything that could command a terminal, or fail to be encoded, escaped as in ``\x1b``.

    Names of files, URLs and exceptions come from anybody, and a terminal obeys what it is shown.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class UserError(ValueError):
    """Something the user can put right: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, gives the value, and says what was expected. The
    experiment shows it alone, without a traceback. As text it is :func:`printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class PrintableFormatter(logging.Formatter):
    """Log lines, tracebacks included, that are :func:`printable`; ``conf/config.yaml`` names it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        return printable(super().format(record))
