"""A progress bar, shown on terminals only."""

import sys
import time
from contextlib import ExitStack
from multiprocessing import current_process
from types import TracebackType
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Progress:
    """A tqdm bar on stderr with a description, a count, an ETA and a few figures.

    Disabled when stderr is not a terminal, and in the workers of a launcher, which share one. Figures are drawn
    at most ten times a second: check :attr:`due` before computing expensive ones.
    """

    def __init__(self, description: str, total: int, unit: str, start: int = 0) -> None:
        self.enabled = sys.stderr.isatty() and current_process().name == "MainProcess"
        self._bar = tqdm(
            desc=description,
            total=total,
            initial=start,
            unit=unit,
            disable=not self.enabled,
            dynamic_ncols=True,
            leave=False,
        )
        self._next_draw = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.enabled:
            self._stack.enter_context(logging_redirect_tqdm())
        self._stack.callback(self._bar.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def extend(self, amount: int) -> None:
        """Add ``amount`` to the total."""
        self._bar.total += amount

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` more as done."""
        self._bar.update(amount)

    @property
    def due(self) -> bool:
        """Whether figures shown now would be drawn."""
        return self.enabled and time.monotonic() >= self._next_draw

    def show(self, **figures: str) -> None:
        """Show figures to the right of the bar."""
        self._next_draw = time.monotonic() + 0.1
        self._bar.set_postfix(figures, refresh=False)
