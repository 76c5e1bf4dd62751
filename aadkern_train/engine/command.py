"""How a command line ends: a status, and where something went wrong one line on stderr, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from aadkern_train.engine.stops import LostRankError, SignalStop

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or name another place"),
    errno.EIO: "see whether the disk is full or broken, or name another place",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable, or name another place"),
}


TOO_LARGE = ("out of memory", "can't allocate memory", "storage size calculation overflowed", "numel: integer multiplication")
"""What torch says, as RuntimeErrors, of tensors that no machine or none here can hold."""


def status_of(action: Callable[[], int], name: str, goes_on: str = "") -> int:
    """The exit status of ``action``, the command ``name``: 2 for what a user or a disk did wrong, 1 for losses that left the
    numbers and for a lost rank, 130 for Ctrl-C, 128 + its number for a signal that asked the run to save and leave. ``goes_on`` is
    how what was interrupted goes on. What else is raised is this package's fault, and raised on.
    """
    saved = f"; {goes_on}" if goes_on else ""
    try:
        status = action()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _tell(name, f"interrupted; what was saved stays{saved.replace(';', ', and', 1)}", 130)
    except SignalStop as error:
        return _tell(name, f"{error}{saved}", 128 + error.number)
    except BrokenPipeError:  # `| head` has seen enough
        _drop_stdout()
        return 141
    except OSError as error:
        _drop_stdout()
        advice = ADVICE.get(error.errno or 0)
        where = f"{error.filename}: " if error.filename else ""
        what = f"{where}{error.strerror or error or type(error).__name__}"
        return _tell(name, what if advice is None else f"{what}; {advice}{saved}", 2)
    except FloatingPointError as error:
        return _tell(name, str(error), 1)
    except LostRankError as error:
        return _tell(name, f"{error}{saved}", 1)
    except ValueError as error:
        return _tell(name, str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in TOO_LARGE):
            raise
        reason = str(error).partition("\n")[0] or "no more is there"
        return _tell(name, f"out of memory: {reason}; smaller sizes need less, or a batch in parts (STAGE.accumulate=N){saved}", 2)


def _tell(name: str, text: str, status: int) -> int:
    print(f"aad {name}: {_one_line(text)}", file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    """Words one space apart; what a terminal would obey, and what is no Unicode, as Python writes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def _drop_stdout() -> None:
    """Where stdout cannot be written, Python would try again at its end, and say so at length."""
    with contextlib.suppress(ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def two_numbers(text: str, between: str, wanted: str) -> tuple[int, int]:
    """ "2/8" as (2, 8). Raises ValueError, which says what is ``wanted``."""
    first, separator, second = text.lower().partition(between)
    if not (separator and first.isdecimal() and second.isdecimal()):
        raise ValueError(f"{wanted}, got {text!r}")
    return int(first), int(second)


def rows_and_columns(size: str) -> tuple[int, int]:
    """ "480x832" as (480, 832)."""
    return two_numbers(size, "x", "size must be rows x columns of pixels, say 480x832")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)} ({self.prog} --help tells more)\n")
