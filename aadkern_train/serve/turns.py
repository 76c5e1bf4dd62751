"""Who makes the next chunk: one thread, one model, and sessions in fair turns, each at its own pace."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aadkern_train.serve.models import Player
from aadkern_train.serve.protocol import Direction, Header, Pace, Pause, Prompt, chunk_bytes

Toward = Callable[[str, int, int], str]
LEAD = 1.5  # a chunk is begun this many times the seconds that the last ones took before it is due
IDLE = 1.0  # seconds after which a thread without work looks again


@dataclass(frozen=True)
class Start:
    """How a stream begins; ``picture`` is what ``Model.picture`` made."""

    seed: int
    prompt: str | None = None
    picture: Any = None


class Session:
    """One stream, its commands and its pace. ``Turns`` alone changes it, under its lock."""

    def __init__(self, name: int, player: Player, start: Start, fps: float) -> None:
        self.name, self.player = name, player
        self.begun = 0  # chunks begun; their numbers go on when the stream begins anew
        self.wanted = False  # whether anyone looks
        self.first = start  # of a new person's stream
        self.first_fps = fps
        self.take_over()

    def take_over(self) -> None:
        """A new person's: as at the start, but for the chunks' numbers."""
        self.start, self.fps, self.paused = self.first, self.first_fps, False
        self.pending: list[tuple[int, Any]] = [(-1, self.first)]  # at most one command of each kind
        self.due = 0.0  # when the next chunk should be there
        self.seconds = 0.0  # that a chunk takes
        self.last = 0  # of all turns, the one that was this session's
        self.posted: float | None = None  # when the last chunk was

    def note(self, number: int, command: Any) -> int:
        """Takes a command for the next chunk, and returns that chunk's number. What it overrules is forgotten."""
        if isinstance(command, Pause):
            self.paused = command.paused
        elif isinstance(command, Pace):
            self.fps = command.fps
            self.due = min(self.due, time.monotonic() + 1 / command.fps)
        else:
            overruled = OVERRULES[type(command)]
            self.pending = [(n, c) for n, c in self.pending if not isinstance(c, overruled)] + [(number, command)]
            self.paused = self.paused and not isinstance(command, Start)
        return self.begun + 1


OVERRULES: dict[type, tuple[type, ...]] = {
    Start: (Start, Prompt, Direction),
    Prompt: (Prompt, Direction),
    Direction: (Direction,),
}
"""Which waiting commands a newer one makes void."""


class Turns:
    """Runs sessions in a thread of its own. ``post(session, message)`` is given each chunk's bytes, ``fail(session, number,
    words)`` what went wrong, of command ``number`` (-1: none); both are called in that thread and must not wait."""

    def __init__(
        self,
        sessions: Iterable[Session],
        toward: Toward,
        post: Callable[[Session, bytes], None],
        fail: Callable[[Session, int, str], None],
    ) -> None:
        self.sessions, self._toward, self._post, self._fail = list(sessions), toward, post, fail
        self._lock = threading.Condition()
        self._count = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="aad serve", daemon=True)

    def __enter__(self) -> Turns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join()

    def command(self, session: Session, number: int, command: Any) -> int:
        """Gives a session a command; returns the number of the first chunk that is made under it."""
        with self._lock:
            self._lock.notify_all()
            return session.note(number, command)

    def want(self, session: Session, wanted: bool) -> None:
        """Whether anyone looks at a session: without, it rests."""
        with self._lock:
            session.wanted = wanted
            self._lock.notify_all()

    def take_over(self, session: Session) -> None:
        """A session begins anew, for another person."""
        with self._lock:
            session.take_over()
            self._lock.notify_all()

    def _run(self) -> None:
        while (turn := self._wait()) is not None:
            session, number, pending = turn
            began = time.monotonic()
            try:
                for at, command in pending:
                    self._obey(session, at, command)
                frames = session.player.next()
                self._made(session, number, frames, began)
            except Exception as error:  # one stream's trouble is not the others'
                print(f"aad serve: session {session.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                with self._lock:
                    session.paused = True
                    session.pending = [(-1, session.start), *session.pending]
                self._fail(session, -1, "the stream broke and rests; reset begins another")

    def _wait(self) -> tuple[Session, int, list[tuple[int, Any]]] | None:
        """The session whose turn it is, its chunk's number and its commands; None at the end."""
        with self._lock:
            while not self._stopped:
                now = time.monotonic()
                awake = [session for session in self.sessions if session.wanted and not session.paused]
                due = [session for session in awake if session.due - LEAD * session.seconds <= now]
                if due:
                    session = min(due, key=lambda session: session.last)  # who has waited longest
                    self._count += 1
                    session.last = self._count
                    session.begun += 1
                    pending, session.pending = session.pending, []
                    return session, session.begun, pending
                soonest = min((session.due - LEAD * session.seconds - now for session in awake), default=IDLE)
                self._lock.wait(min(soonest, IDLE))
        return None

    def _obey(self, session: Session, number: int, command: Any) -> None:
        player = session.player
        try:
            if isinstance(command, Start):
                session.start = command
                player.begin(command.seed, command.prompt, command.picture)
            elif isinstance(command, Prompt):
                player.turn(command.text)
            elif isinstance(command, Direction):
                player.turn(self._toward(player.prompt, command.x, command.y))
        except ValueError as error:
            if isinstance(command, Start):  # there is no stream without it
                raise
            self._fail(session, number, str(error))

    def _made(self, session: Session, number: int, frames: Any, began: float) -> None:
        now = time.monotonic()
        with self._lock:
            took = now - began
            session.seconds = took if session.seconds == 0 else 0.7 * session.seconds + 0.3 * took
            length = len(frames) / session.fps
            session.due = (now if now > session.due + length else max(session.due, now)) + length
            since = took if session.posted is None else now - session.posted
            session.posted = now
            fps, seed = session.fps, session.start.seed
        rate = len(frames) / since
        header = Header(number, session.player.prompt, seed, fps, rate, took, session.player.place)
        self._post(session, chunk_bytes(header, frames))
