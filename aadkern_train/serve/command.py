"""What ``aad serve`` does: it takes the port, tells the memory, loads the model, and serves until Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import socket
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from aadkern_train.generate.from_run import find_weights, trained_weights
from aadkern_train.generate.options import RUN_STEPS, WAN_ONLY, refuse_options, wan_settings
from aadkern_train.networks.folders import facts
from aadkern_train.networks.hub import hub_checkpoint
from aadkern_train.networks.wan_parts import is_wan, trained_parts
from aadkern_train.serve.options import ServeSettings

NEEDED = ("starlette", "uvicorn", "websockets")


def serve(checkpoint: Path, given: Mapping[str, Any], *, show: bool = False) -> None:
    """Serve ``checkpoint`` by the options ``given`` (those of ``ServeSettings``, and ``aad generate``'s for Wan models).

    Raises ValueError or FileNotFoundError, before anything is loaded, for options that do not fit, and for a port that is taken.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'aadkern[serve]'")
    settings = ServeSettings(**{field.name: given[field.name] for field in fields(ServeSettings) if field.name in given})
    weights = trained_weights(hub_checkpoint(checkpoint, given.get("parts")))
    wan = is_wan(weights)
    if not wan:
        find_weights(checkpoint)
        refuse_options(given, (*WAN_ONLY, *RUN_STEPS), f"{checkpoint} is a run, not a Wan model")
    with contextlib.ExitStack() as stack:
        listening = None if show else stack.enter_context(listen(settings))
        model, lines = _wan(weights, given, settings) if wan else _run(weights, settings)
        print("\n".join(lines), file=sys.stdout if show else sys.stderr, flush=True)
        if listening is not None:
            serve_model(model(), settings, listening)


def _run(weights: Path, settings: ServeSettings) -> tuple[Any, list[str]]:
    from aadkern_train.serve.memory import of_run
    from aadkern_train.serve.models import RunModel

    def model() -> RunModel:
        run_model = RunModel(weights, settings.turn, settings.fps)
        run_model.check(settings.prompt)
        return run_model

    return model, of_run(weights, settings.sessions).lines()


def _wan(weights: Path, given: Mapping[str, Any], settings: ServeSettings) -> tuple[Any, list[str]]:
    from aadkern_train.generate.wan_model import fitting_parts
    from aadkern_train.serve.memory import of_wan
    from aadkern_train.serve.wan import WanModel

    run_facts = facts(weights)
    model_settings = wan_settings({name: value for name, value in given.items() if name != "turn"}, run_facts)
    parts = fitting_parts(weights, given.get("parts") or trained_parts(run_facts), model_settings)
    return lambda: WanModel(parts, model_settings, settings.turn), of_wan(parts, model_settings, settings.sessions).lines()


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the address, taken before a model is loaded. Raises ValueError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"host must be an address of this machine, got {settings.host!r}: {error.strerror}") from None
    taken = socket.socket(family, kind)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(128)
    except OSError as error:
        taken.close()
        other = "--port names another, 0 any that is free"
        raise ValueError(f"port must be free, {settings.port} on {settings.host} is not: {error.strerror}; {other}") from None
    return taken


def config_of(server: Any) -> Any:
    """uvicorn's settings for a ``Server``."""
    import uvicorn

    from aadkern_train.serve.protocol import LONGEST_COMMAND

    return uvicorn.Config(
        server.app,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=LONGEST_COMMAND,
        ws_max_queue=8,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        ws_per_message_deflate=False,  # pictures are small or compressed
        timeout_graceful_shutdown=2,
    )


def serve_model(model: Any, settings: ServeSettings, listening: socket.socket) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from aadkern_train.serve.app import Server

    server = Server(model, [model.player() for _ in range(settings.sessions)], settings)
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    print(f"{model.about.name}, {model.about.backend}: http://{name}:{port}  (Ctrl-C ends it)", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
        print(f"aad serve: whoever reaches {name} can steer, without a password", file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config_of(server)).run(sockets=[listening])
    print("stopped", file=sys.stderr)
