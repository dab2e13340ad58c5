"""The one exception a user's mistake is reported with."""

_LONGEST = 700
_KEPT = 300
_MOST_LINES = 20


class UserError(ValueError):
    """Something the user can put right: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, gives the value, and says what was expected. The
    experiment shows it alone, without a traceback.
    """


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
