"""The server: three files of the page, and a WebSocket. It reads no file of the host after its start, and writes none."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from aadkern_train.serve.models import Model, Player
from aadkern_train.serve.options import ServeSettings
from aadkern_train.serve.people import People, Person
from aadkern_train.serve.protocol import BadMessage, Direction, Join, Prompt, Reset, read_message
from aadkern_train.serve.turns import Session, Start, Turns

PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' blob: data:; media-src blob:;"
    " frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MESSAGES_A_SECOND, MOST_MESSAGES = 20.0, 200.0  # of one connection, on average and at once; 64 KB of a message count as one more
JOINING = 10.0  # seconds in which the first message must come
SENDING = 30.0  # seconds after which a client that takes nothing is given up


class Allowance:
    """How many messages a connection may still send."""

    def __init__(self) -> None:
        self.left, self.at = MOST_MESSAGES, time.monotonic()

    def take(self, size: int) -> bool:
        """Whether a message of ``size`` letters is within it."""
        now = time.monotonic()
        self.left = min(MOST_MESSAGES, self.left + (now - self.at) * MESSAGES_A_SECOND) - 1 - size / 65536
        self.at = now
        return self.left >= 0


class Server:
    """A model, its sessions and the people at them, as a Starlette application: ``Server(...).app``."""

    def __init__(self, model: Model, players: Iterable[Player], settings: ServeSettings) -> None:
        self.model, self.names = model, {"localhost", settings.host, *settings.allow, *machine_names()}
        self.about = model.about
        start = Start(settings.seed, settings.prompt)
        self.sessions = [Session(i, player, start, self.about.fps) for i, player in enumerate(players)]
        self.turns = Turns(self.sessions, model.toward, self._post, self._fail)
        self.people = People(self.sessions, self.turns)
        self._mail: dict[int, bytes] = {}  # of each session the chunk that the event loop has not taken yet
        self._pictures = asyncio.Lock()
        folder = files("aadkern_train.serve") / "page"
        self._page = {at: ((folder / name).read_bytes(), kind) for at, (name, kind) in PAGE.items()}
        routes = [*(Route(at, self.page) for at in PAGE), WebSocketRoute("/stream", self.stream)]
        self.app = Starlette(routes=routes, lifespan=self._life)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        tending = asyncio.create_task(self._tend())
        try:
            with self.turns:
                yield
        finally:
            tending.cancel()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.people.tend()

    def _post(self, session: Session, chunk: bytes) -> None:
        """In the model's thread: one chunk of a session waits for the event loop at most."""
        waiting = session.name in self._mail
        self._mail[session.name] = chunk
        if not waiting:
            self._loop.call_soon_threadsafe(self._spread, session)

    def _spread(self, session: Session) -> None:
        self.people.spread(session, self._mail.pop(session.name))

    def _fail(self, session: Session, number: int, words: str) -> None:
        message = {"kind": "error", "id": None if number < 0 else number, "message": words}
        self._loop.call_soon_threadsafe(lambda: self.people.tell(session, **message))

    async def page(self, request: Request) -> Response:
        if not self.called_right(request.headers):
            return PlainTextResponse(f"Host must be one of {', '.join(sorted(self.names))} or an address\n", 400)
        content, kind = self._page[request.url.path]
        return Response(content, media_type=kind, headers=HEADERS)

    def called_right(self, headers: Headers) -> bool:
        """Whether a request is for this machine by one of its names, and if a page sends it, one of this server's: a foreign page
        cannot leave out its origin, and cannot have a name of ours."""
        host = headers.get("host", "")
        if name_of(host) not in self.names and not is_address(name_of(host)):
            return False
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc.lower() == host.lower()

    async def stream(self, socket: WebSocket) -> None:
        """One connection."""
        if not self.called_right(socket.headers):
            await socket.close(1008)  # not accepted: 403
            return
        await socket.accept()
        if self.people.full:
            await socket.close(1013, "too many people are here")
            return
        person = Person()
        sends = asyncio.create_task(self._send(socket, person))
        hears = asyncio.create_task(self._hear(socket, person))
        try:
            await asyncio.wait({sends, hears}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.people.leave(person)
            if not sends.done():  # what it was told last, and why it is sent away
                person.outbox.close(1000, "")
                await asyncio.wait({sends}, timeout=1)
            for task in (sends, hears):
                task.cancel()
            await asyncio.gather(sends, hears, return_exceptions=True)

    async def _send(self, socket: WebSocket, person: Person) -> None:
        outbox = person.outbox
        with contextlib.suppress(Exception):  # servers have several for a connection that is gone
            while (what := await outbox.next()) is not None:
                send = socket.send_text(what) if isinstance(what, str) else socket.send_bytes(what)
                await asyncio.wait_for(send, SENDING)
            code, reason = outbox.closed or (1000, "")
            await asyncio.wait_for(socket.close(code, reason), SENDING)

    async def _hear(self, socket: WebSocket, person: Person) -> None:
        allowance, outbox = Allowance(), person.outbox
        joined = False
        while outbox.closed is None:
            try:
                got = await asyncio.wait_for(socket.receive(), None if joined else JOINING)
            except asyncio.TimeoutError:
                outbox.close(1008, f"join within {JOINING:.0f} s")
                return
            if got["type"] != "websocket.receive":
                return
            text, blob = got.get("text"), got.get("bytes")
            if not allowance.take(len(text or blob or "")):
                outbox.close(1008, "too many messages")
                return
            try:
                if text is None:
                    raise BadMessage("message must be JSON, got bytes")
                message = await asyncio.to_thread(read_message, text) if len(text) > 65536 else read_message(text)
                if joined == isinstance(message, Join):
                    raise BadMessage("join must come first, and once", message.id)
                if isinstance(message, Join):
                    self._join(person, message)
                    joined = True
                else:
                    await self._obey(person, message)
            except BadMessage as error:
                outbox.say(kind="error", id=error.id, message=str(error))

    def _join(self, person: Person, message: Join) -> None:
        person.outbox.say(kind="hello", id=message.id, **asdict(self.about), sessions=len(self.sessions), seed=self._seed)
        self.people.join(person, message.token)

    @property
    def _seed(self) -> int:
        return self.sessions[0].first.seed

    async def _obey(self, person: Person, message: Any) -> None:
        seat = person.seat
        if seat is None:
            raise BadMessage("command must come from who has a seat; you watch until one is free", message.id)
        command = message
        try:
            if isinstance(message, Direction) and not self.about.directions:
                raise ValueError("direction must be left out: this model's words know none")
            if isinstance(message, Prompt):
                await asyncio.to_thread(self.model.check, message.text)
            if isinstance(message, Reset):
                command = await self._start(message, seat.session.first.prompt)
        except ValueError as error:
            raise BadMessage(str(error), message.id) from None
        if person.seat is seat:
            person.outbox.say(kind="ack", id=message.id, chunk=self.turns.command(seat.session, message.id, command))

    async def _start(self, message: Reset, prompt: str | None) -> Start:
        prompt = prompt if message.prompt is None else message.prompt
        await asyncio.to_thread(self.model.check, prompt)
        if message.picture is None:
            return Start(message.seed, prompt)
        async with self._pictures:  # one at a time: pictures are large
            return Start(message.seed, prompt, await asyncio.to_thread(self.model.picture, message.picture))


def machine_names() -> set[str]:
    """What this machine is called in its network."""
    name = socket.gethostname().lower()
    return {name, f"{name}.local"} if name else set()


def name_of(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
