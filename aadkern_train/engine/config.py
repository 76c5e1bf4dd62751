"""Typed settings: frozen pydantic models, read from YAML, changed by `key.sub=value`, hashed for checkpoints.

A section may be one of several classes, told apart by its ``kind`` (`Choice`), and a field may hold any number of such
sections by name; who writes a new class registers it, and nothing here or elsewhere is changed.

Values are validated as strict JSON: a whole number is a float, a list is a tuple, but `yes` is not a number and `4.0`
not an integer. Every error is a ConfigError that names the dotted key, what came and what is accepted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import yaml


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message names the key."""


class Config(pydantic.BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be changed in place."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    opened: ClassVar[str | None] = None
    """A field of sections by name whose names may also be written alone: `dmd.steps` for `stages.dmd.steps`."""


class Choice(Config):
    """Base of sections that are one of several classes. A direct subclass is the base of one such family; its members are
    registered under their ``kind``."""

    kind: str
    members: ClassVar[dict[str, type[Choice]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Choice in cls.__bases__:
            cls.members = {}

    @classmethod
    def member(cls, kind: str) -> Any:
        """Registers the class beneath it: ``@Family.member("name") class Section(Family)``. ValueError where another class has the
        name."""

        def add(section: type[Choice]) -> type[Choice]:
            there = cls.members.get(kind, section)
            if (there.__module__, there.__qualname__) != (section.__module__, section.__qualname__):
                raise ValueError(f"kind {kind!r} is {there.__module__}.{there.__qualname__}'s; name another")
            cls.members[kind] = section
            return section

        return add

    @classmethod
    def chosen(cls, kind: Any, key: str = "") -> type[Choice]:
        """The class registered under a kind; ``key`` names the section in the ConfigError for an unknown one."""
        if not isinstance(kind, str) or kind not in cls.members:
            place = f"{key}.kind" if key else "kind"
            raise ConfigError(f"{place}={kind!r}: must be one of {', '.join(cls.members)}")
        return cls.members[kind]


def one_of(base: type[Choice]) -> Any:
    """The annotation of a field that holds a member of a family."""
    return Annotated[pydantic.SerializeAsAny[base], pydantic.BeforeValidator(partial(_pick, base))]  # type: ignore[valid-type]


def _pick(base: type[Choice], value: Any) -> Any:
    return _strict(base.chosen(value.get("kind")), value) if isinstance(value, dict) else value


C = TypeVar("C", bound=Config)


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """A copy of config with `key.sub=value` settings applied in order and the whole validated again.

    Values are YAML: `steps=400`, `lr=1e-4`, `chunks=[1,4,4,4]`, `ode={steps: 4, lr: 1e-3}`, `window=null`; where text
    is wanted, any value is taken as text (`run=001`), and nothing (`run=`) is a text of no letters. Raises ConfigError.
    """
    values = config.model_dump(mode="json")
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"cannot read {override!r}: expected key=value")
        texts[_put(config, values, key, _parse(key, text))] = text.strip()
    return _validated(type(config), config, values, texts)


def to_yaml(config: Config) -> str:
    """The settings as YAML text; `from_yaml` gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def from_yaml(kind: type[C], source: str | Path) -> C:
    """A config of the given class from a file (a Path) or from YAML text (a str). Raises ConfigError."""
    text = source.read_text() if isinstance(source, Path) else source
    values = _parse("file" if isinstance(source, str) else str(source), text)
    if not isinstance(values, dict):
        raise ConfigError(f"expected a mapping of settings, got {values!r}")
    return _validated(kind, None, values, {})


def config_hash(config: Config | Mapping[str, Any]) -> str:
    """32 hexadecimal digits that change with any value of the config."""
    values = config.model_dump(mode="json") if isinstance(config, Config) else config
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two dumped configs: key -> (old, new); absent counts as None."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys((*before, *after))
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


class _Loader(yaml.SafeLoader):
    """safe_load, but `1e-4` is a number: YAML 1.1 wants `1.0e-4`. A date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _parse(key: str, text: str) -> Any:
    if not text.strip():  # YAML reads nothing as null: `data.path=$UNSET` would quietly choose what null stands for
        return ""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value)  # plain values only: no bytes, no sets, nothing that holds itself
        return value
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{key}: cannot read {text[:80]!r} as YAML: {problem}") from None


@dataclass(frozen=True)
class _Many:
    """Stands for a class where a field holds sections of a family by name."""

    base: type[Choice]


def _section_kinds(kind: type[Config], name: str) -> list[type[Config]]:
    """The Config classes that a field takes: of `Section`, `Section | None`, `Section | Other`."""
    annotation = kind.model_fields[name].annotation
    options = (annotation, *typing.get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, Config)]


def _family(kind: type[Config], name: str) -> type[Choice] | _Many | None:
    """The family that a field's section, or each of its sections, is chosen from."""
    annotation = kind.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return annotation
    if typing.get_origin(annotation) is dict:
        base = typing.get_args(typing.get_args(annotation)[1] if typing.get_args(annotation) else None)
        if base and isinstance(base[0], type) and issubclass(base[0], Choice):
            return _Many(base[0])
    return None


Kind = type[Config] | _Many | None


def _within(kind: type[Config] | _Many, current: Any, values: Any, name: str) -> tuple[Kind, Any]:
    """What the part ``name`` of a section is: its class (None for a plain value), and its present value."""
    if isinstance(kind, _Many):
        own = values.get(name) if isinstance(values, dict) else None
        chosen = kind.base.members.get(own.get("kind", name)) if isinstance(own, dict) else None
        return chosen or kind.base.members.get(name, kind.base), (current or {}).get(name)
    child = getattr(current, name, None)
    family = _family(kind, name)
    if isinstance(family, _Many):
        return family, child
    sections = _section_kinds(kind, name)
    return (type(child) if isinstance(child, Config) else sections[0] if sections else None), child


def _known_keys(kind: type[Config] | _Many, current: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys; where a section is one of several classes, those of the class that it has now."""
    for name in (current or {}) if isinstance(kind, _Many) else kind.model_fields:
        inside, child = _within(kind, current, current, name)
        if not (isinstance(kind, type) and name == kind.opened):
            yield prefix + name
            opened = f"{prefix}{name}."
        else:
            opened = prefix
        several = [] if isinstance(kind, _Many) or child is not None else _section_kinds(kind, name)
        for section in several or ([] if inside is None else [inside]):
            yield from _known_keys(section, child, opened)


def _unknown(root: type[Config], config: Config | None, key: str, prefix: str = "") -> ConfigError:
    known = [name for name in dict.fromkeys(_known_keys(root, config, prefix)) if name != key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = key.rpartition(".")[2]
        endings = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [endings[end] for end in difflib.get_close_matches(last, endings, n=1, cutoff=0.6)]
    if near:
        return ConfigError(f"unknown key {key!r}; did you mean {near[0]!r}?")
    return ConfigError(f"unknown key {key!r}; known keys: {', '.join(known)}")


def _put(config: Config, values: dict[str, Any], key: str, value: Any) -> str:
    """Writes value at the dotted key of the dumped config; a mapping for a section sets only the keys it names.

    Returns the key in full.
    """
    kind: Kind = type(config)
    written, first = key, key.partition(".")[0]
    opened = values.get(config.opened or "")
    if isinstance(opened, dict) and first not in type(config).model_fields and first in opened:
        key = f"{config.opened}.{key}"
    place: Any = values
    current: Any = config
    *names, last = key.split(".")
    for name in names:
        if isinstance(kind, type) and name not in kind.model_fields:
            raise _unknown(type(config), config, written)
        if kind is not None:
            kind, current = _within(kind, current, place, name)
        if kind is None and not isinstance(place.get(name), dict):
            raise _unknown(type(config), config, written)
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise ConfigError(f"{written}: {name} must be a section, an earlier setting made it {place!r}")
    if isinstance(kind, type) and last not in kind.model_fields:
        raise _unknown(type(config), config, written)
    merges = kind is not None and _within(kind, current, place, last)[0] is not None
    if isinstance(value, dict) and merges and isinstance(place.get(last), dict):
        for name, part in value.items():
            _put(config, values, f"{key}.{name}", part)
    else:
        place[last] = value
    return key


def _validated(kind: type[C], config: C | None, values: dict[str, Any], texts: Mapping[str, str], prefix: str = "") -> C:
    values = {name: _chosen_section(kind, config, values, name, texts, prefix) for name in values}
    try:
        return _strict(kind, values)
    except pydantic.ValidationError as error:
        wrong = [entry for entry in error.errors() if entry["type"] != "extra_forbidden"]
        failed = [prefix + _place(kind, entry["loc"])[0] + "." for entry in wrong]
        own = [key for key in texts if key.startswith(prefix) and any(place.startswith(f"{key}.") for place in failed)]
        as_text = {key: texts[key] for key in own if not any(other.startswith(f"{key}.") for other in own)}
        if as_text:
            try:
                return _strict(kind, _with_texts(values, {key.removeprefix(prefix): text for key, text in as_text.items()}))
            except pydantic.ValidationError:
                pass
        raise ConfigError("; ".join(dict.fromkeys(_explain(kind, config, error, prefix)))) from None


def _chosen_section(
    kind: type[Config], config: Config | None, values: Mapping[str, Any], name: str, texts: Mapping[str, str], prefix: str
) -> Any:
    """The value of a field, its sections that are chosen by ``kind`` validated by their own classes and dumped again."""
    value = values[name]
    family = _family(kind, name) if name in kind.model_fields else None
    if family is None or not isinstance(value, dict):
        return value
    current = getattr(config, name, None)
    if isinstance(family, _Many):
        return {
            part: _member(family.base, (current or {}).get(part), {"kind": part, **own}, texts, f"{prefix}{name}.{part}")
            if isinstance(own, dict)
            else own
            for part, own in value.items()
        }
    return _member(family, current, value, texts, prefix + name)


def _member(base: type[Choice], current: Any, values: dict[str, Any], texts: Mapping[str, str], key: str) -> dict[str, Any]:
    chosen = base.chosen(values.get("kind"), key)
    present = current if isinstance(current, chosen) else None
    return _validated(chosen, present, values, texts, f"{key}.").model_dump(mode="json")


def _strict(kind: type[C], values: Mapping[str, Any]) -> C:
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"settings must be plain values: {error}") from None


def _with_texts(values: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    for key, text in texts.items():
        *sections, last = key.split(".")
        place = copy
        for name in sections:
            place = place[name]
        place[last] = text
    return copy


def _explain(kind: type[Config], config: Config | None, error: pydantic.ValidationError, prefix: str) -> Iterator[str]:
    entries = [(*_place(kind, entry["loc"]), entry) for entry in error.errors(include_url=False)]
    cost: dict[str, Counter[str]] = {}
    for _, choice, entry in entries:
        if choice:
            cost.setdefault(choice[0], Counter())[choice[1]] += 2 if entry["type"] == "extra_forbidden" else 1
    for key, choice, entry in entries:
        if choice and choice[1] != min(cost[choice[0]], key=cost[choice[0]].__getitem__):
            continue  # of a section's possible classes, only the one that fits best is explained
        key = prefix + key if key else prefix.removesuffix(".")
        if entry["type"] == "extra_forbidden":
            yield str(_unknown(kind, config, key, prefix))
        elif entry["type"] == "missing":
            yield f"{key} is missing"
        else:
            text = entry["msg"].removeprefix("Value error, ").removeprefix("Input ")
            came = "" if isinstance(entry["input"], dict) else f"={entry['input']!r}"
            yield f"{key}{came}: {text}" if key else text


def _place(root: type[Config], location: Sequence[str | int]) -> tuple[str, tuple[str, str] | None]:
    """The dotted key of a pydantic error, and (field, class) when it arose in one of several classes of a section."""
    kind: type[Config] | None = root
    classes: dict[str, type[Config]] = {}
    keys: list[str] = []
    choice = None
    for part in location:
        if kind is not None:
            keys.append(str(part))
            sections = _section_kinds(kind, str(part)) if part in kind.model_fields else []
            classes = {section.__name__: section for section in sections}
            kind = sections[0] if len(sections) == 1 else None
        elif part in classes:
            choice, kind = (".".join(keys), str(part)), classes[str(part)]
        elif isinstance(part, int) or (part.isidentifier() and part not in _UNION_MEMBERS):
            keys.append(str(part))
    return ".".join(keys), choice


_UNION_MEMBERS = {"int", "float", "bool", "str", "none", "path", "date", "datetime"}
"""What pydantic puts into an error's place for a member of a union of plain types; no part of the key."""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
