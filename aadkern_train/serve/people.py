"""Who is connected: people with a seat steer a session, the others watch one and wait for a seat. All of it on the event loop."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from typing import Any

from aadkern_train.serve.turns import Session, Turns

MOST_PEOPLE = 64
GRACE = 60.0  # seconds that a seat is kept for a person whose connection broke
WAITING_CHUNKS = 2  # for a slow client, the newest ones
WAITING_WORDS = 64  # answers; who takes none of so many is disconnected


class Outbox:
    """What waits to be sent to one person: a few chunks, of which older ones give way, and answers."""

    def __init__(self) -> None:
        self._words: deque[str] = deque()
        self._chunks: deque[bytes] = deque(maxlen=WAITING_CHUNKS)
        self._event = asyncio.Event()
        self.skipped = 0
        self.closed: tuple[int, str] | None = None

    def say(self, **message: Any) -> None:
        """An answer; who does not take them is sent away."""
        if len(self._words) >= WAITING_WORDS:
            self.close(1008, "answers are not read")
            return
        self._words.append(json.dumps(message))
        self._event.set()

    def show(self, chunk: bytes) -> None:
        """A chunk, in the place of the oldest waiting one where there is no room."""
        self.skipped += len(self._chunks) == WAITING_CHUNKS
        self._chunks.append(chunk)
        self._event.set()

    def close(self, code: int, reason: str) -> None:
        """The connection is to end, and nothing more to be sent."""
        self.closed = self.closed or (code, reason)
        self._words.clear()
        self._chunks.clear()
        self._event.set()

    async def next(self) -> str | bytes | None:
        """The next thing to send, answers first; None: close."""
        while self.closed is None:
            if self._words:
                return self._words.popleft()
            if self._chunks:
                return self._chunks.popleft()
            self._event.clear()
            await self._event.wait()
        return None


class Seat:
    """A session, and the person who steers it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.token = ""
        self.person: Person | None = None
        self.left = 0.0  # when the person's connection ended

    def free(self, now: float) -> bool:
        """Whether another person can have it."""
        return self.person is None and (not self.token or now - self.left > GRACE)


def _same(token: str, other: str) -> bool:
    return bool(token) and secrets.compare_digest(token.encode(), other.encode(errors="replace"))


class Person:
    """One connection."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.seat: Seat | None = None  # None: watches
        self.session: Session | None = None  # what is shown


class People:
    """Gives seats to who comes, in order, and chunks to all who look at a session."""

    def __init__(self, sessions: list[Session], turns: Turns) -> None:
        self.turns = turns
        self.seats = [Seat(session) for session in sessions]
        self.there: list[Person] = []  # in the order in which they came
        self._latest: dict[int, bytes] = {}

    @property
    def full(self) -> bool:
        return len(self.there) >= MOST_PEOPLE

    def join(self, person: Person, token: str | None) -> None:
        """A person comes, or comes back with the token of an earlier connection."""
        self.there.append(person)
        seat = next((seat for seat in self.seats if token and _same(seat.token, token)), None)
        if seat is not None:
            if seat.person is not None:  # the same page twice, or a connection that is not known to be dead
                old, seat.person = seat.person, None
                old.seat = None
                old.outbox.close(4001, "this stream goes on in another connection")
            self._sit(person, seat)
        else:
            self.tend()
            if person.seat is None:
                self._watch(person)
        self._tell_places()

    def leave(self, person: Person) -> None:
        """A connection ended, joined or not; its seat is kept for a while."""
        if person not in self.there:
            return
        self.there.remove(person)
        if person.seat is not None:
            person.seat.person, person.seat.left = None, time.monotonic()
        self._want()
        self._tell_places()

    def tend(self) -> None:
        """Free seats go to those who wait."""
        now, changed = time.monotonic(), False
        for seat in self.seats:
            waiting = next((person for person in self.there if person.seat is None), None)
            if waiting is not None and seat.free(now):
                seat.token = secrets.token_urlsafe(16)
                self.turns.take_over(seat.session)
                self._latest.pop(seat.session.name, None)
                self._sit(waiting, seat)
                changed = True
        if changed:
            self._tell_places()

    def spread(self, session: Session, chunk: bytes) -> None:
        """Sends a chunk to all who look at its session."""
        self._latest[session.name] = chunk
        for person in self.there:
            if person.session is session:
                person.outbox.show(chunk)

    def tell(self, session: Session, **message: Any) -> None:
        """Says something to the person who steers a session."""
        for seat in self.seats:
            if seat.session is session and seat.person is not None:
                seat.person.outbox.say(**message)

    def _sit(self, person: Person, seat: Seat) -> None:
        seat.person, person.seat = person, seat
        self._look(person, seat.session)
        person.outbox.say(kind="seat", token=seat.token, session=seat.session.name, paused=seat.session.paused)

    def _watch(self, person: Person) -> None:
        watchers = [sum(other.session is seat.session for other in self.there) for seat in self.seats]
        self._look(person, self.seats[watchers.index(min(watchers))].session)
        person.outbox.say(kind="watch")

    def _look(self, person: Person, session: Session) -> None:
        if person.session is not session:
            person.session = session
            if session.name in self._latest:
                person.outbox.show(self._latest[session.name])
        self._want()

    def _want(self) -> None:
        for seat in self.seats:
            self.turns.want(seat.session, any(person.session is seat.session for person in self.there))

    def _tell_places(self) -> None:
        """To those who wait, how many are before them; to all, how many there are."""
        waiting = [person for person in self.there if person.seat is None]
        for person in self.there:
            before = waiting.index(person) if person.seat is None else None
            person.outbox.say(kind="people", there=len(self.there), before=before)
