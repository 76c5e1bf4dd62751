"""What a drop-in replaced: printable, and taken back by ``undo`` or at the end of a ``with`` block."""

from __future__ import annotations

from typing import Any

NOTHING = object()  # stood there: the attribute is the class's


class Handle:
    """Attributes replaced on foreign objects, in order, with a line on each."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.active = True
        self.notes: list[str] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, what stood there, what was put there

    def replace(self, owner: Any, attribute: str, new: Any, note: str) -> None:
        """Put ``new`` in ``owner``'s own dictionary under ``attribute``, and remember what stood there, if anything."""
        self._replaced.append((owner, attribute, vars(owner).get(attribute, NOTHING), new))
        setattr(owner, attribute, new)
        self.notes.append(note)

    def undo(self) -> None:
        """Put everything back; a second call does nothing.

        Raises RuntimeError, and puts nothing back, where something else has replaced an attribute since.
        """
        if not self.active:
            return
        for owner, attribute, _, new in self._replaced:
            if vars(owner).get(attribute) is not new:
                where = getattr(owner, "__name__", type(owner).__name__)
                raise RuntimeError(f"undo: {where}.{attribute} has been replaced by something else since; undo that first")
        for owner, attribute, old, _ in reversed(self._replaced):
            if old is NOTHING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, old)
        self.active = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join([f"{self.title} ({'active' if self.active else 'undone'})", *(f"  {note}" for note in self.notes)])

    __repr__ = __str__
