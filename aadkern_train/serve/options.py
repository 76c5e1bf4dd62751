"""``aad serve``'s options. Imports nothing heavy: every `aad` builds its options here."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aadkern_train.generate.options import add_wan_settings

MOST_SESSIONS = 64
MOST_SEED = 2**53 - 1  # what JavaScript can count
FASTEST = 60.0  # frames a second that a page may ask for
LONGEST_PROMPT = 2000  # letters; a text encoder reads 512 tokens of them


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, and how its sessions begin. ``prompt`` None: a run's own caption; ``fps`` None: the model's;
    ``turn`` None: what obeys soonest. ``allow``: names under which browsers call this machine, beside its own.

    Raises ValueError, naming the setting.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    sessions: int = 1
    seed: int = 0
    prompt: str | None = None
    fps: float | None = None
    turn: str | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ValueError(f"host must be an address of this machine, say 127.0.0.1, got {self.host!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], 0 for any that is free, got {self.port}")
        if not 1 <= self.sessions <= MOST_SESSIONS:
            raise ValueError(f"sessions must be in [1, {MOST_SESSIONS}], got {self.sessions}")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed must be in [0, {MOST_SEED}], got {self.seed}")
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= FASTEST):
            raise ValueError(f"fps must lie in (0, {FASTEST:g}], got {self.fps}")
        if self.prompt is not None and len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"prompt must have at most {LONGEST_PROMPT} letters, got {len(self.prompt)}")


def add_serve(commands: Any) -> argparse.ArgumentParser:
    """``aad serve``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="play and steer a stream in the browser",
        description="Serve a page that plays a stream as it is made and steers it. Ctrl-C ends it.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        help="what aad generate takes: a Wan folder, a .pt, a .safetensors, a RUN or RUN/weights/STAGE",
    )
    add("--host", help="address to listen on (127.0.0.1: this machine alone)")
    add("--port", type=int, help="0: any that is free (8765)")
    add("--allow", action="append", metavar="NAME", help="another name that browsers call this machine by; may be given again")
    add("--sessions", type=int, help="people who steer a stream of their own, in fair turns; others watch (1)")
    add("--show", action="store_true", help="tell the memory that sessions need, and stop")
    add("--seed", type=int, help="seed of the noise at the start (0)")
    add("--fps", type=float, help="frames per second that are played (RUN 10, Wan 16)")
    add("--prompt", help="what the stream shows at the start (RUN: the first frame's own caption)")
    add(
        "--turn",
        choices=("kept", "recached", "restarted"),
        help="at a new prompt, what is in view stays, is made anew under it, or gives its last frame to a new video (RUN restarted,\
 Wan recached)",
    )
    wan = parser.add_argument_group("Wan models", "As for aad generate.")
    wan.add_argument("--parts", type=Path, help="a Wan folder to take vae, text_encoder and tokenizer from (default: --checkpoint)")
    add_wan_settings(wan.add_argument)
    return parser
