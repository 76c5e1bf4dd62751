"""Typed settings: frozen pydantic models, read from YAML, changed by `key.sub=value`, hashed for checkpoints.

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
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message names the key."""


class Config(pydantic.BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be changed in place."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


C = TypeVar("C", bound=Config)


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """A copy of config with `key.sub=value` settings applied in order and the whole validated again.

    Values are YAML: `steps=400`, `lr=1e-4`, `chunks=[1,4,4,4]`, `ode={steps: 4, lr: 1e-3}`, `window=null`; where text
    is wanted, any value is taken as text (`run=001`). Raises ConfigError.
    """
    values = config.model_dump(mode="json")
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"cannot read {override!r}: expected key=value")
        _put(config, values, key, _parse(key, text))
        texts[key] = text.strip()
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
    """safe_load, but `1e-4` is a number: YAML 1.1 wants `1.0e-4`."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
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
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{key}: cannot read {text!r} as YAML: {problem}") from None


def _sections(kind: type[Config], name: str) -> list[type[Config]]:
    """The Config classes that a field takes: of `Section`, `Section | None`, `Section | Other`."""
    annotation = kind.model_fields[name].annotation
    options = (annotation, *typing.get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, Config)]


def _known_keys(kind: type[Config], config: Config | None, prefix: str = "") -> Iterator[str]:
    """All dotted keys; where a section is one of several classes, those of the class that config has."""
    for name in kind.model_fields:
        yield prefix + name
        current = getattr(config, name, None)
        for section in [type(current)] if isinstance(current, Config) else _sections(kind, name):
            yield from _known_keys(section, current, f"{prefix}{name}.")


def _unknown(root: type[Config], config: Config | None, key: str) -> ConfigError:
    known = [name for name in dict.fromkeys(_known_keys(root, config)) if name != key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = key.rpartition(".")[2]
        endings = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [endings[end] for end in difflib.get_close_matches(last, endings, n=1, cutoff=0.6)]
    if near:
        return ConfigError(f"unknown key {key!r}; did you mean {near[0]!r}?")
    return ConfigError(f"unknown key {key!r}; known keys: {', '.join(known)}")


def _put(config: Config, values: dict[str, Any], key: str, value: Any) -> None:
    """Writes value at the dotted key of the dumped config; a mapping for a section sets only the keys it names."""
    kind: type[Config] | None = type(config)
    place: Any = values
    current: Any = config
    *names, last = key.split(".")
    for name in names:
        if kind is not None and name not in kind.model_fields:
            raise _unknown(type(config), config, key)
        current = getattr(current, name, None)
        sections = _sections(kind, name) if kind is not None else []
        kind = type(current) if isinstance(current, Config) else sections[0] if sections else None
        if kind is None and not isinstance(place.get(name), dict):
            raise _unknown(type(config), config, key)
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
    if kind is not None and last not in kind.model_fields:
        raise _unknown(type(config), config, key)
    if kind is not None and isinstance(value, dict) and _sections(kind, last) and isinstance(place.get(last), dict):
        for name, part in value.items():
            _put(config, values, f"{key}.{name}", part)
    else:
        place[last] = value


def _validated(kind: type[C], config: C | None, values: dict[str, Any], texts: Mapping[str, str]) -> C:
    try:
        return _strict(kind, values)
    except pydantic.ValidationError as error:
        wrong = [entry for entry in error.errors() if entry["type"] != "extra_forbidden"]
        failed = [_place(kind, entry["loc"])[0] + "." for entry in wrong]
        as_text = {key: texts[key] for key in texts if any(place.startswith(f"{key}.") for place in failed)}
        if as_text:
            try:
                return _strict(kind, _with_texts(values, as_text))
            except pydantic.ValidationError:
                pass
        raise ConfigError("; ".join(dict.fromkeys(_explain(kind, config, error)))) from None


def _strict(kind: type[C], values: Mapping[str, Any]) -> C:
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except TypeError as error:
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


def _explain(kind: type[Config], config: Config | None, error: pydantic.ValidationError) -> Iterator[str]:
    entries = [(*_place(kind, entry["loc"]), entry) for entry in error.errors(include_url=False)]
    cost: dict[str, Counter[str]] = {}
    for _, choice, entry in entries:
        if choice:
            cost.setdefault(choice[0], Counter())[choice[1]] += 2 if entry["type"] == "extra_forbidden" else 1
    for key, choice, entry in entries:
        if choice and choice[1] != min(cost[choice[0]], key=cost[choice[0]].__getitem__):
            continue  # of a section's possible classes, only the one that fits best is explained
        if entry["type"] == "extra_forbidden":
            yield str(_unknown(kind, config, key))
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
            sections = _sections(kind, str(part)) if part in kind.model_fields else []
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
