"""Write the table of checks into ``docs/verdict.md``: ``python -m scripts.verdict``."""

import re
from pathlib import Path

from kwta_exp.evaluation.checks import table
from kwta_exp.storage import write_text

PAGE = Path("docs/verdict.md")


def main() -> None:
    """Replace the table that begins with the heading of :func:`~kwta_exp.evaluation.checks.table`."""
    heading = re.escape(table().splitlines()[0])
    page = re.sub(rf"{heading}\n(\|.*\n)*", lambda _: table() + "\n", PAGE.read_text())
    write_text(PAGE, page)


if __name__ == "__main__":
    main()
