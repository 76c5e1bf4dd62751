"""What a run says of its stages: their order, titles, where each started, and the colour that the page draws them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REFERENCES = {
    "real": "Real video",
    "teacher": "Teacher, many steps",
    "static": "Frozen first frame",
    "web": "Pretraining clips",
}
OTHER_CONDITIONS = ("web",)  # references whose clips are not those that the stages stream under: no caption fits them
REFERENCE_COLOURS = {"real": "ink", "teacher": "rose", "static": "grey", "web": "sand"}
PALETTE = ("slate", "violet", "blue", "amber", "green", "teal", "olive", "plum")  # the stages' colours, in order


@dataclass(frozen=True)
class StageFacts:
    """``start`` is the stage or folder whose weights it really took, ``versus`` the stage that it is set beside."""

    name: str
    title: str
    colour: str
    start: str | None = None
    versus: str | None = None

    @property
    def short(self) -> str:
        """What stands before a colon in the title, for places where the whole does not fit."""
        return self.title.partition(":")[0].strip() or self.title


def stages_of(config: Mapping[str, Any], titles: Mapping[str, Any], seen: Iterable[str]) -> dict[str, StageFacts]:
    """The stages that a run has or will have, in the config's order, then those ``seen`` in its other files.

    A stage of 0 steps that left nothing is none; what starts from it starts where it would have.
    """
    settings = {str(name): values if isinstance(values, dict) else {} for name, values in config.items()}
    seen = list(dict.fromkeys(seen))
    names = [name for name, values in settings.items() if name in seen or values.get("steps") != 0]
    names += [name for name in seen if name not in settings]
    called = {name: _title(name, titles, settings.get(name, {})) for name in names}
    facts = {}
    for i, name in enumerate(names):
        title = called[name]
        if list(called.values()).count(title) > 1:
            title = f"{title} ({name})"
        versus = settings.get(name, {}).get("versus")
        facts[name] = StageFacts(
            name=name,
            title=title,
            colour=PALETTE[i % len(PALETTE)],
            start=_start(name, settings, names),
            versus=versus if versus in names and versus != name else None,
        )
    return facts


def _title(name: str, titles: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    words = (title.strip() for title in (titles.get(name), settings.get("title")) if isinstance(title, str))
    return next((title for title in words if title), name.replace("_", " "))


def _start(name: str, settings: Mapping[str, Mapping[str, Any]], names: list[str]) -> str | None:
    passed = {name}
    start = settings.get(name, {}).get("start")
    while isinstance(start, str) and start in settings and start not in names and start not in passed:
        passed.add(start)
        start = settings[start].get("start")
    return start if isinstance(start, str) and start not in passed else None
