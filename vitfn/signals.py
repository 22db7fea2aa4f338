"""SIGTERM and SIGINT as a wish to stop soon, with everything saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """Raised where a signal arrives inside `Stop.at_once`."""


class Stop:
    """While it is open, the first SIGTERM or SIGINT is noted in `signal`; a second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False

    def __enter__(self) -> "Stop":
        signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._at_once:
            self._at_once = False  # else a second signal would tear what the first unwinds
            raise Stopped

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes nothing and that a signal may leave in the middle, by raising Stopped."""
        if self.signal:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
