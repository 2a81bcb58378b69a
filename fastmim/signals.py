"""SIGTERM, SIGINT or a file as a wish to stop after the step that is going on."""

import contextlib
import logging
import signal
import time
from pathlib import Path

_LOOK_EVERY_S = 5
logger = logging.getLogger("fastmim")


class StopSignals:
    """Catches SIGTERM and SIGINT while it is entered, and looks for a file that asks for the same.

    The first signal is remembered; a second SIGINT interrupts at once, for a person who cannot wait. The file is for
    those that would be killed too soon after a signal.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._file: Path | None = None
        self._look_at = 0.0

    def __enter__(self) -> "StopSignals":
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def watch(self, file: Path) -> None:
        """Look for a file too, every few seconds."""
        self._file = file

    def wanted(self) -> bool:
        """Whether to stop. A file that was found is deleted, and counts as SIGTERM."""
        now = time.monotonic()
        if self.received is None and self._file is not None and now >= self._look_at:
            self._look_at = now + _LOOK_EVERY_S
            with contextlib.suppress(OSError):  # of storage that fails for a moment
                if self._file.exists():
                    logger.info("%s is there: stopping", self._file)
                    self.received = signal.SIGTERM
                    self._file.unlink()
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 when none came."""
        return 0 if self.received is None else 128 + self.received
