"""Settings: overrides, YAML, strict types, errors that name the key and the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from aadkern_train.engine.config import Config, ConfigError, apply_overrides, config_hash, differences, from_yaml, to_yaml


class Ode(Config):
    steps: Annotated[int, pydantic.Field(ge=1)] = 100
    lr: float = 1e-3
    loss: Literal["x0", "flow"] = "x0"
    betas: tuple[float, float] = (0.9, 0.99)
    level: float | None = None


class Digits(Config):
    torus: int = 16
    keep: float = 0.75


class Clips(Config):
    path: Path | None = None
    height: int = 32


class Settings(Config):
    seed: int = 0
    name: str = "demo"
    chunks: tuple[int, ...] = (1, 4, 4)
    ode: Ode = Ode()
    control: Ode | None = None
    data: Digits | Clips = Digits()
    extra: dict[str, float] = pydantic.Field(default_factory=dict)
    flag: bool = False
    limit: float = 9.5
    mode: Literal["off", "on"] | int = "on"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.chunks and self.chunks[0] != 1:
            raise ValueError(f"chunks must start with 1, got {list(self.chunks)}")
        return self


def test_overrides_take_yaml_values_in_order():
    changed = apply_overrides(
        Settings(),
        [
            "ode.steps=400",
            "chunks=[1,4,4,4]",
            "ode.lr=1e-4",
            "ode={level: 1, betas: [0, 0.99]}",
            "control.steps=3",
            "extra.z=2",
            "flag=true",
            "limit=1e3",
            "seed=1",
            "seed=2",
        ],
    )
    ode = Ode(steps=400, lr=1e-4, level=1.0, betas=(0.0, 0.99))
    expected = Settings(seed=2, chunks=(1, 4, 4, 4), ode=ode, control=Ode(steps=3), extra={"z": 2.0}, flag=True, limit=1e3)
    assert changed == expected
    assert apply_overrides(changed, ["control=null"]).control is None
    assert Settings() == apply_overrides(Settings(), [])


@pytest.mark.parametrize("text", ["001", "off", "3", "1e-4", "null", "a=b", "[x"])
def test_text_is_text_where_text_is_wanted(text):
    if text == "[x":  # not YAML, so never a value
        with pytest.raises(ConfigError, match="name: cannot read"):
            apply_overrides(Settings(), [f"name={text}"])
    else:
        assert apply_overrides(Settings(), [f"name={text}"]).name == text


def test_literals_that_yaml_reads_as_something_else():
    assert apply_overrides(Settings(), ["mode=off"]).mode == "off"
    assert apply_overrides(Settings(), ["mode=5"]).mode == 5


def test_a_section_of_several_classes_follows_the_config_at_hand():
    clips = Settings(data=Clips())
    changed = apply_overrides(clips, ["data.path=2024", "data.height=64"])
    assert changed.data == Clips(path=Path("2024"), height=64)
    with pytest.raises(ConfigError, match=r"unknown key 'data.heigth'; did you mean 'data.height'"):
        apply_overrides(clips, ["data.heigth=3"])
    with pytest.raises(ConfigError, match=r"^data.height='x': should be a valid integer$"):
        apply_overrides(clips, ["data.height=x"])
    with pytest.raises(ConfigError, match=r"unknown key 'data\.torus'"):
        apply_overrides(clips, ["data.torus=3"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("ode.stpes=3", "unknown key 'ode.stpes'; did you mean 'ode.steps'?"),
        ("steps=3", "unknown key 'steps'; did you mean 'ode.steps'?"),
        ("ode={stpes: 3}", "unknown key 'ode.stpes'; did you mean 'ode.steps'?"),
        ("ode.steps.x=3", "unknown key 'ode.steps.x'; did you mean 'ode.steps'?"),
        ("qqqq=1", "unknown key 'qqqq'; known keys: seed, name, chunks, ode, ode.steps"),
        ("ode.steps=4.0", "ode.steps=4.0: should be a valid integer"),
        ("ode.steps=many", "ode.steps='many': should be a valid integer"),
        ("ode.steps=yes", "ode.steps=True: should be a valid integer"),
        ("ode.steps=0", "ode.steps=0: should be greater than or equal to 1"),
        ("ode.loss=v", "ode.loss='v': should be 'x0' or 'flow'"),
        ("ode.lr=fast", "ode.lr='fast': should be a valid number"),
        ("ode.betas=[0.5]", "ode.betas.1 is missing"),
        ("chunks=[1,a]", "chunks.1='a': should be a valid integer"),
        ("chunks=[4]", "chunks must start with 1, got [4]"),
        ("flag=1", "flag=1: should be a valid boolean"),
        ("ode=3", "ode=3: should be an object"),
        ("extra.z=b", "extra.z='b': should be a valid number"),
        ("seed=", "seed='': should be a valid integer"),
        ("control=", "control='': should be"),
        ("seed", "cannot read 'seed': expected key=value"),
        ("chunks=[1,", "chunks: cannot read '[1,' as YAML"),
    ],
)
def test_errors_name_the_key_and_what_is_accepted(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Settings(), [override])
    assert str(caught.value).startswith(message)
    assert "pydantic" not in str(caught.value) and "http" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_yaml_round_trip_is_exact():
    lr = 0.1 + 0.2
    settings = Settings(ode=Ode(lr=lr, level=1e-17), data=Clips(path=Path("x")), control=Ode(), name="off", mode="off")
    assert from_yaml(Settings, to_yaml(settings)) == settings
    assert from_yaml(Settings, to_yaml(settings)).ode.lr == lr


def test_yaml_from_a_file_and_its_errors(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 3\node: {steps: 5}\n")
    assert from_yaml(Settings, file) == Settings(seed=3, ode=Ode(steps=5))
    for text, message in [
        ("- 1", "expected a mapping"),
        ("sed: 3", "unknown key 'sed'; did you mean 'seed'"),
        ("data: {path: a, hieght: 3}", "unknown key 'data.hieght'; did you mean 'data.height'"),
        ("data: {torus: 3.5}", "data.torus=3.5: should be a valid integer"),
        ("a: [", "cannot read"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace("(", r"\(")):
            from_yaml(Settings, text)


def test_configs_are_frozen_and_refuse_unknown_fields():
    with pytest.raises(pydantic.ValidationError):
        Settings().seed = 3
    with pytest.raises(pydantic.ValidationError):
        Settings(sed=3)


def test_hash_and_differences():
    one, other = Settings(), apply_overrides(Settings(), ["ode.steps=5", "control.steps=2"])
    assert config_hash(one) == config_hash(Settings()) == config_hash(from_yaml(Settings, to_yaml(one)))
    assert config_hash(one) != config_hash(other) and len(config_hash(one)) == 32
    changed = differences(one.model_dump(mode="json"), other.model_dump(mode="json"))
    assert changed["ode.steps"] == (100, 5) and changed["control.steps"] == (None, 2) and "control" not in changed
    assert not differences(one.model_dump(mode="json"), Settings().model_dump(mode="json"))
