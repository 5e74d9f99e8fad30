"""Ctrl-C, and what ends programs from outside: SLURM and ``timeout`` send SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# SIGHUP comes when a terminal is closed; Windows has none.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """A signal asks to stop.

    Parameters
    ----------
    number : int
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as shells have it


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have stop signals raise :class:`Stopped`, but for those that are ignored (``nohup``)."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    with _handlers(stop):
        yield


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Ignore stop signals: somebody may press Ctrl-C twice, and the first one is being obeyed."""
    with _handlers(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return
    ignored = signal.SIG_IGN
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != ignored]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
