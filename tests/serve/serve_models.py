"""Models for the tests of the server: a dot that moves as it is told, and a server of it that runs in this process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from starlette.testclient import TestClient

from aadkern_train.serve.app import Server
from aadkern_train.serve.command import config_of, listen
from aadkern_train.serve.models import About
from aadkern_train.serve.options import ServeSettings
from aadkern_train.serve.protocol import RingPlace

BASE = "http://testserver"  # what Starlette's client calls WebSockets by
FRAMES = 4


class DotModel:
    """Words are ``x y``: columns and rows that a dot moves each frame; "broken" breaks the stream. ``side`` is the picture's."""

    def __init__(self, side: int = 16, fps: float = 60.0, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.about = About("a dot", "numpy", side, side, FRAMES, fps, directions=True, prompts=True, pictures=False)

    def check(self, prompt: str | None) -> None:
        if prompt == "nonsense":
            raise ValueError("prompt must be two numbers, got 'nonsense'")

    def toward(self, prompt: str, x: int, y: int) -> str:
        return f"{x} {y}"

    def picture(self, file: bytes) -> Any:
        raise ValueError("picture must be left out: a dot starts from none")

    def player(self) -> DotPlayer:
        return DotPlayer(self)


class DotPlayer:
    """The dot is white, on a grey noise that the seed and the frame's number say."""

    def __init__(self, model: DotModel) -> None:
        self.model, self.prompt = model, "1 0"
        self.made: list[str] = []  # the prompts of the chunks

    def begin(self, seed: int, prompt: str | None, picture: Any) -> None:
        self.prompt, self.seed, self.frame = prompt or "1 0", seed, 0
        self.x = self.y = 0

    def turn(self, prompt: str) -> None:
        self.prompt = prompt

    def next(self) -> np.ndarray:
        if self.prompt == "broken":
            raise RuntimeError("a broken stream")
        time.sleep(self.model.seconds)
        self.made.append(self.prompt)
        dx, dy = map(int, self.prompt.split())
        frames = []
        for _ in range(FRAMES):
            self.x, self.y = (self.x + dx) % self.model.about.width, (self.y + dy) % self.model.about.height
            frames.append(dot_frame(self.seed, self.frame, self.x, self.y, self.model.about.width))
            self.frame += 1
        return np.stack(frames)

    @property
    def place(self) -> RingPlace:
        return RingPlace(self.frame, 1 + self.frame % 16, 17, 1)


def dot_frame(seed: int, frame: int, x: int, y: int, side: int) -> np.ndarray:
    picture = np.random.default_rng([seed, frame]).integers(0, 200, (side, side, 1), dtype=np.uint8).repeat(3, 2)
    picture[y, x] = 255
    return picture


def dot_at(picture: np.ndarray) -> tuple[int, int]:
    """(x, y) of the dot in a picture [H, W, 3 or more]."""
    ((y, x),) = np.argwhere(picture[..., 0] == 255).tolist()
    return x, y


def dot_server(sessions: int = 1, **model: Any) -> Server:
    dots = DotModel(**model)
    return Server(dots, [dots.player() for _ in range(sessions)], ServeSettings(sessions=sessions, fps=60.0, allow=("testserver",)))


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app, base_url=BASE) as client:
        yield client


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """The server behind a real socket; yields its address."""
    with listen(ServeSettings(port=0)) as listening:
        serving = uvicorn.Server(config_of(server))
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            serving.should_exit = True
            thread.join()


class Page:
    """A page's side of a WebSocket of Starlette's client."""

    def __init__(self, socket: Any, token: str | None = None, join: bool = True) -> None:
        self.socket, self.number = socket, 0
        self.chunks: dict[int, tuple[dict, np.ndarray]] = {}
        self.heard: list[dict] = []
        if join:
            self.send("join", token=token)

    def send(self, kind: str, **fields: Any) -> int:
        self.number += 1
        self.socket.send_text(json.dumps({"kind": kind, "id": self.number, **fields}))
        return self.number

    def receive(self) -> dict:
        """The next message; a chunk's frames go to ``chunks``."""
        got = self.socket.receive()
        if got["type"] == "websocket.close":
            return {"kind": "closed", **got}
        if got.get("bytes") is None:
            told = json.loads(got["text"])
        else:
            told, frames = parsed(got["bytes"])
            self.chunks[told["chunk"]] = told, frames
        self.heard.append(told)
        return told

    def until(self, kind: str, **fields: Any) -> dict:
        """Receives up to a message like this."""
        while True:
            told = self.receive()
            if told["kind"] == kind and all(told[name] == value for name, value in fields.items()):
                return told
            assert told["kind"] != "closed", told

    def ask(self, kind: str, **fields: Any) -> dict:
        """Sends a command and receives its answer."""
        number = self.send(kind, **fields)
        while True:
            told = self.receive()
            if told["kind"] in ("ack", "error", "closed") and told.get("id", number) == number:
                return told

    def chunk(self, least: int) -> tuple[dict, np.ndarray]:
        """The first chunk of at least this number."""
        while not any(number >= least for number in self.chunks):
            self.until("chunk")
        return self.chunks[min(number for number in self.chunks if number >= least)]


def parsed(message: bytes) -> tuple[dict, np.ndarray]:
    """A chunk's header and its frames, of those in RGB."""
    length = int.from_bytes(message[:4], "little")
    head = json.loads(message[4 : 4 + length])
    assert head["format"] == "rgb" and sum(head["sizes"]) == len(message) - 4 - length
    frames = np.frombuffer(message, np.uint8, offset=4 + length)
    return head, frames.reshape(head["frames"], head["height"], head["width"], 3)
