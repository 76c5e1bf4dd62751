"""What a page and the server say to each other: messages in JSON, checked one by one, and chunks of frames as bytes.

A page sends ``Join`` first and then commands, each with a number of its own. The server answers each with ``ack``, the number of
the chunk that will show it, or with ``error``. A chunk is four bytes (little endian) that tell the length of a JSON header, the
header, and the frames: RGB, row by row, or JPEG files one after another, of the header's ``sizes``.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Base64Bytes, BaseModel, ConfigDict, Discriminator, Field, TypeAdapter, ValidationError, model_validator

from aadkern_train.serve.options import FASTEST, LONGEST_PROMPT, MOST_SEED

LONGEST_COMMAND = 12 << 20  # bytes; a picture is most of it
LARGEST_PICTURE = 8 << 20  # bytes of its file
SMALL = 128 * 128  # pixels of a frame up to which it is sent as it is
JPEG_QUALITY = 88

Prompt_ = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Step = Literal[-1, 0, 1]


class Message(BaseModel):
    """Base of what a page may send."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    id: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]


class Join(Message):
    """The first message: with the token of an earlier connection its stream goes on."""

    kind: Literal["join"]
    token: Annotated[str, Field(max_length=64)] | None = None


class Direction(Message):
    """Where to move from now on, in columns and rows."""

    kind: Literal["direction"]
    x: Step
    y: Step

    @model_validator(mode="after")
    def _somewhere(self) -> Direction:
        if self.x == self.y == 0:
            raise ValueError("x and y must not both be 0")
        return self


class Prompt(Message):
    """What to show from now on."""

    kind: Literal["prompt"]
    text: Prompt_


class Reset(Message):
    """A new stream: its seed, its prompt (None: as at the start) and the file of the picture it starts from."""

    kind: Literal["reset"]
    seed: Annotated[int, Field(ge=0, le=MOST_SEED, strict=True)]
    prompt: Prompt_ | None = None
    picture: Annotated[Base64Bytes, Field(max_length=LARGEST_PICTURE)] | None = None


class Pause(Message):
    """Stop making chunks, or go on."""

    kind: Literal["pause"]
    paused: Annotated[bool, Field(strict=True)]


class Pace(Message):
    """How many frames a second are played at most."""

    kind: Literal["pace"]
    fps: Annotated[float, Field(ge=1, le=FASTEST)]


Command = Direction | Prompt | Reset | Pause | Pace
_MESSAGES: TypeAdapter[Any] = TypeAdapter(Annotated[Join | Command, Discriminator("kind")])


class BadMessage(ValueError):
    """What a page sent is no message; ``id`` is its number where that could be read."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.id = number


def read_message(text: str) -> Join | Command:
    """A message from its JSON. Raises BadMessage in one line that names the field."""
    if len(text) > LONGEST_COMMAND:
        raise BadMessage(f"message must have at most {LONGEST_COMMAND} letters, got {len(text)}")
    try:
        return _MESSAGES.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise BadMessage(f"{where}: {first['msg']}"[:300], _number(text)) from None


def _number(text: str) -> int | None:
    try:
        number = json.loads(text)["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31 else None


@dataclass(frozen=True)
class RingPlace:
    """Where the newest chunk lies in the cache: its first frame's index and slot, among ``slots`` of which ``sink`` stay."""

    frame: int
    slot: int
    slots: int
    sink: int


@dataclass(frozen=True)
class Header:
    """What is told with a chunk's frames. ``fps`` is the pace asked for, ``rate`` the frames a second that came of it, ``seconds``
    what making the chunk took."""

    chunk: int
    prompt: str
    seed: int
    fps: float
    rate: float
    seconds: float
    place: RingPlace


def chunk_bytes(header: Header, frames: np.ndarray) -> bytes:
    """A chunk as it is sent; frames uint8 [f, H, W, 3]."""
    count, height, width, _ = frames.shape
    small = height * width <= SMALL
    parts = [np.ascontiguousarray(frames).tobytes()] if small else [_jpeg(frame) for frame in frames]
    header_fields: dict[str, Any] = {"kind": "chunk", **asdict(header), "frames": count, "height": height, "width": width}
    header_fields |= {"format": "rgb" if small else "jpeg", "sizes": [len(part) for part in parts]}
    head = json.dumps(header_fields).encode()
    return b"".join((len(head).to_bytes(4, "little"), head, *parts))


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
