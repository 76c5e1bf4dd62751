"""Stops of a run before its end: SIGTERM and SIGUSR1, which schedulers send before they take a machine away, let it save first. And
what is raised when a rank is lost."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(number for name in ("SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None)


class SignalStop(Exception):
    """The run was saved and ends, as a signal asked. ``number`` is the signal's."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"saved at {where}, as {signal.Signals(number).name} asked")
        self.number = number


class LostRankError(RuntimeError):
    """Another rank of the run has ended or does not come, so this one ends; the message says which."""


class StopRequest:
    """``with StopRequest() as stop_request:`` signals are noted in ``stop_request.number`` (0: none) instead of ending the process;
    a second one ends it at once. Signals reach the main thread alone, so elsewhere nothing is changed."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        print(
            f"\n{signal.Signals(number).name}: saves after this step and leaves; once more leaves at once",
            file=sys.stderr,
            flush=True,
        )
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
