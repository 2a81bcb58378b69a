"""SIGTERM and SIGINT as a wish to stop after the step that is going on."""

import signal


class StopSignals:
    """Catches SIGTERM and SIGINT while it is entered.

    The first one is remembered; a second SIGINT interrupts at once, for a person who cannot wait.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None

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

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 when none came."""
        return 0 if self.received is None else 128 + self.received
