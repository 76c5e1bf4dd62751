"""What the ranks of a run know of one another beside their collectives: that they came with the same words, and who was lost.

Backends tell of a connection that broke or of a time that is over, not of whom. So each rank says in the store by which they found
one another who it is and what it does, and a rank that waited in vain looks there, and at the processes of its own machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aadkern_train.engine.config import differences
from aadkern_train.engine.lock import beginning, this_process
from aadkern_train.engine.stops import LostRankError

PATIENCE = 10.0  # seconds that a rank looks for who was lost: a process that ends closes its connections before it is gone


def rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store in which the processes of torchrun's environment find one another, this one's rank, and how many they are. Raises
    LostRankError where not all come in time."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        minutes = f"within {timeout.total_seconds() / 60:g} minutes (parallel.timeout_minutes)"
        raise LostRankError(
            f"not all {os.environ['WORLD_SIZE']} ranks came {minutes}: {str(error).partition(chr(10))[0]}"
        ) from error
    store.set_timeout(timeout)
    return store, rank, size


class Peers:
    """The ranks of one process group, seen from ``rank``. ``members`` says of each the machine and process that it is."""

    def __init__(self, store: dist.Store, rank: int, members: list[dict[str, Any]], timeout_minutes: float) -> None:
        self.store, self.rank, self.members, self.minutes = store, rank, members, timeout_minutes
        self.place = "the start"

    @classmethod
    def meet(cls, store: dist.Store, rank: int, size: int, timeout_minutes: float, alike: Mapping[str, Any]) -> Peers:
        """Waits until all ranks are here. Raises ValueError on each of them, naming the key and both values, where they did not
        come with ``alike`` alike."""
        words = json.dumps(alike, sort_keys=True, default=str)
        store.set(f"words {rank}", words)
        store.set(f"member {rank}", json.dumps({**this_process(), "words": hashlib.sha256(words.encode()).hexdigest()}))
        members = [json.loads(text) for text in store.multi_get([f"member {other}" for other in range(size)])]
        peers = cls(store, rank, members, timeout_minutes)
        others = [other for other in range(size) if members[other]["words"] != members[0]["words"]]
        if others:
            first, other = (json.loads(store.get(f"words {one}")) for one in (0, others[0]))
            pairs = differences(first, other).items()
            changed = [f"{key} ({was!r} on rank 0, {now!r} on rank {others[0]})" for key, (was, now) in pairs]
            peers._linger(range(size))
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(f"all ranks must come with the same settings and code, got other {', '.join(changed[:3])}{more}")
        return peers

    def at(self, place: str) -> None:
        """Notes what this rank does, for others that may wait for it in vain: 2 microseconds, as no answer is waited for."""
        self.place = place
        self.store.set(f"place {self.rank}", place)

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """An error of the block that another rank's end or silence caused becomes a LostRankError that names it; of any other the
        others can learn what it was."""
        try:
            yield
        except BaseException as error:
            if not _of_a_peer(error):
                with contextlib.suppress(RuntimeError):
                    self.store.set(f"ended {self.rank}", f"{type(error).__name__}: {error}".partition("\n")[0])
                raise
            lost = LostRankError(f"rank {self.rank} stops at {self.place}: {self._who('timed out' in str(error).lower())}")
            self._linger(other for other in range(len(self.members)) if not self._gone(other))
            raise lost from error

    def _who(self, late: bool) -> str:
        """Who was lost, in words. A rank of this machine whose process is gone; or, where the time was over, those that do not wait
        too."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"lost {self.rank}", "")
        end = time.monotonic() + (3 if late else 1) * PATIENCE  # they may have come, and begun to wait, later than this one
        others = [other for other in range(len(self.members)) if other != self.rank]
        while True:
            silent = [other for other in others if not self._entry("lost", other)]
            gone = [other for other in silent if self._gone(other) or self._entry("ended", other) is not None]
            if gone or not silent or time.monotonic() > end:
                break
            time.sleep(0.1)
        if gone:
            return f"{_ranks(gone)} gone ({'; '.join(map(self._last, gone))})"
        if silent and late:
            silent = [other for other in silent if self._entry("place", other) != self.place] or silent
            last = "; ".join(map(self._last, silent))
            return f"{_ranks(silent)} not here after {self.minutes:g} minutes (parallel.timeout_minutes; {last})"
        elsewhere = [other for other in silent if self.members[other]["machine"] != this_process()["machine"]]
        hosts = ", ".join(sorted({self.members[other]["host"] for other in elsewhere}))
        return f"its connection to another rank broke{f', perhaps to one on {hosts}' if hosts else ''}"

    def _gone(self, rank: int) -> bool:
        """Whether a rank of this machine is no more; of those elsewhere nothing is known."""
        member, mine = self.members[rank], this_process()
        return bool(mine["machine"]) and member["machine"] == mine["machine"] and beginning(member["pid"]) != member["began"]

    def _last(self, rank: int) -> str:
        ended, place = self._entry("ended", rank), self._entry("place", rank)
        return ended or (f"last seen at {place}" if place else "last seen at the start")

    def _entry(self, what: str, rank: int) -> str | None:
        """What a rank has said; None: nothing, or the store ended with its rank."""
        try:
            key = f"{what} {rank}"
            return self.store.get(key).decode(errors="replace") if self.store.check([key]) else None
        except RuntimeError:
            return None

    def _linger(self, ranks: Iterable[int]) -> None:
        """The store may end with this rank: it waits until the others, for some seconds, have read what they want."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"read {self.rank}", "")
            end, keys = time.monotonic() + PATIENCE / 2, [f"read {other}" for other in ranks]
            while self.rank == 0 and time.monotonic() < end and not self.store.check(keys):
                time.sleep(0.05)


def code(plugins: Iterable[str] = ()) -> str:
    """A digest of this package's sources, of plugins and of torch's version: what all ranks must run alike."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).resolve().parents[2]
    for file in [*sorted(root.glob("aadkern*/**/*.py")), *map(Path, plugins)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _of_a_peer(error: BaseException | None) -> bool:
    """Whether a backend or the store raised it."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, (RuntimeError, OSError)) and "gloo/" in text):
            return True
        error = error.__cause__
    return False


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def together(peers: Peers | None) -> contextlib.AbstractContextManager[None]:
    """``peers.naming_the_lost()``; nothing for a process that is alone."""
    return contextlib.nullcontext() if peers is None else peers.naming_the_lost()
