"""One process at a time trains into a run's folder: RUN/lock, a file that says who, and whose time of change says that it lives.

It is made with O_EXCL, touched every 20 s by a thread, and removed at the end. Who finds one takes it over where its process is
gone, which can be seen on the same machine alone, or where it has not been touched for 5 minutes. Taking over is a rename, which
one of several wins. Times of change are compared with one that the same file system gives, so clocks of hosts may differ. Nothing
here needs fcntl, which network file systems do not all have.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "lock"
REFRESHED, STALE = 20.0, 300.0  # seconds: several refreshes may fail on a slow network before another host believes it


class HeldError(ValueError):
    """Another process has the run; the message says which and since when."""


class Lock:
    """``lock = Lock.take(folder)`` ... ``lock.release()``."""

    def __init__(self, folder: Path, mine: dict[str, Any]) -> None:
        self.file, self.mine, self.lost = folder / NAME, mine, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path, note: Callable[[str], None] = lambda text: None) -> Lock:
        """The lock of a folder; ``note`` is told whose was taken over. Raises HeldError where another process has it."""
        mine = {**this_process(), "since": datetime.now().astimezone().isoformat(" ", "seconds"), "token": uuid.uuid4().hex}
        file = folder / NAME
        for _ in range(10):  # each time another one came and went
            if _create(file, mine):
                return cls(folder, mine)
            holder = _read(file)
            if holder is None:
                continue
            age = _age(file)
            why = _gone(holder, age)
            if why is None:
                raise HeldError(f"{folder} is in use by {_who(holder)}, last seen {age:.0f} s ago; {_what_to_do(holder, file)}")
            if _set_aside(file, holder):
                note(f"taken over from {_who(holder)}, {why}")
        raise HeldError(f"{folder} is in use: {file} changes hands again and again; try again")

    def check(self) -> None:
        """Raises HeldError where another process has taken the lock over, as after a sleep of more than 5 minutes."""
        if self.lost:
            raise HeldError(f"{self.file.parent} was {self.lost}; this process stops, and the run is the other's")

    def release(self, folder: Path | None = None) -> None:
        """Gives the lock back; ``folder`` is where the run's folder lies now, if it was moved."""
        self._end.set()
        self._thread.join()
        file = self.file if folder is None else folder / NAME
        with contextlib.suppress(OSError):
            if (_read(file) or {}).get("token") == self.mine["token"]:
                file.unlink()

    def _refresh(self) -> None:
        while not self._end.wait(REFRESHED):
            with contextlib.suppress(OSError):  # a network that is away for a while
                holder = _read(self.file)
                if holder is None or holder.get("token", self.mine["token"]) != self.mine["token"]:
                    self.lost = f"taken over by {_who(holder)}" if holder else "moved away, or its lock was removed"
                    return
                os.utime(self.file)


def _create(file: Path, mine: dict[str, Any]) -> bool:
    """Makes the file, if there is none."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "w") as out:
            out.write(json.dumps(mine) + "\n")
    except OSError as error:  # a full disk: an empty lock would stand in the way
        file.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error
    return True


def _set_aside(file: Path, holder: dict[str, Any]) -> bool:
    """Removes a lock whose holder is gone. False where another process was faster."""
    aside = file.with_name(f"{NAME}.{uuid.uuid4().hex}.tmp")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return False
    other = _read(aside)
    if other != holder:  # between reading and renaming another one took it over: it gets it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)
    return other == holder


def _read(file: Path) -> dict[str, Any] | None:
    """What a lock says; nothing of one that is just being written, None where there is none."""
    try:
        holder = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _age(file: Path) -> float:
    """Seconds since a file was touched, by the clock of its own file system."""
    probe = file.with_name(f"{NAME}.{uuid.uuid4().hex}.tmp")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - file.stat().st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _gone(holder: dict[str, Any], age: float) -> str | None:
    """Why a holder is believed to be gone; None: it is not."""
    me = this_process()
    if me["machine"] and holder.get("machine") == me["machine"]:
        began = beginning(holder.get("pid"))
        if began is None:
            return "which is gone"
        return None if began == holder.get("began") else "which is gone, its process id another's"
    return f"not seen for {age / 60:.0f} minutes" if age > STALE else None


def this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": platform.node(), "machine": _machine(), "pid": pid, "began": beginning(pid)}


def _machine() -> str:
    """Within what process ids mean the same: a boot of a kernel, and a container on it. Empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only the lock's age speaks
        return ""


def beginning(pid: Any) -> str | None:
    """When a process began, in ticks since boot; None where there is none."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not yet said which"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _what_to_do(holder: dict[str, Any], file: Path) -> str:
    if holder.get("machine") == _machine() != "":
        return "wait for it or stop it, or name another folder"
    return f"wait for it or stop it; where it is gone, wait until it was not seen for {STALE / 60:.0f} minutes, or remove {file}"
