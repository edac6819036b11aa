"""Ctrl-C and SIGTERM, put off where stopping would leave something half done.

What is long and writes nothing that is not swept away again can be interrupted at any moment;
what makes, renames or removes a file is gone through with, and the signal is heard after it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _DeferredSignals:
    """Stands in for the handlers of the signals, and keeps what has come."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.received: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def begin(self) -> None:
        """Put signals off. Those that no Python handler can be given back to are left alone."""
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:
                self.before[number] = handler
                signal.signal(number, self)

    def end(self) -> None:
        """Let signals through again, first those that have come."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        while self.received:
            signal.raise_signal(self.received.pop())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the block is over, the outermost of such blocks within blocks.

    Only the main thread gets signals; in another, nothing needs to be done.
    """
    if _present() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred = _DeferredSignals()
    deferred.begin()
    try:
        yield
    finally:
        deferred.end()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within `uninterrupted`, a part that signals come through to, however deep it lies."""
    deferred = _present()
    if deferred is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        deferred.end()
        yield
    finally:
        deferred.begin()


def _present() -> _DeferredSignals | None:
    handler = signal.getsignal(signal.SIGINT)
    return handler if isinstance(handler, _DeferredSignals) else None
