"""Whatever is typed: a status, and where it is not 0 one line on stderr; never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.engine.command import status_of
from aadkern_train.engine.config import from_yaml
from aadkern_train.engine.recipe import Recipe
from aadkern_train.planning.counts import counts
from aadkern_train.recipes import RECIPES, digits
from tests.engine.processes import environment
from tests.house.command import answer


@pytest.fixture
def started(monkeypatch):
    """What would have been trained: (recipe, folder, options) of each run."""
    runs = []
    monkeypatch.setattr(trainer, "run_recipe", lambda recipe, folder, **options: runs.append((recipe, folder, options)))
    return runs


@pytest.mark.parametrize("show", range(4))
def test_words_and_options_stand_in_any_order(show, capsys):
    words = ["seed=3", "digits", "ode.steps=7"]
    assert main(["train", *words[:show], "--show", *words[show:]]) == 0
    recipe = from_yaml(Recipe, capsys.readouterr().out)
    assert recipe.seed == 3 and recipe.stages["ode"].steps == 7


def test_of_words_on_both_sides_of_an_option_the_later_counts(capsys, started):
    assert main(["train", "digits", "seed=3", "--show", "seed=4"]) == 0
    assert from_yaml(Recipe, capsys.readouterr().out).seed == 4
    assert main(["train", "seed=5", "digits", "out=here"]) == 0
    options = {"resume": False, "overwrite": False, "counts": counts}
    assert started == [(digits().model_copy(update={"seed": 5}), Path("here"), options)]


@pytest.mark.parametrize(
    "words, says",
    [
        (
            "train",
            f"recipe must be one of {', '.join(RECIPES)}, got none",
        ),
        (
            "train seed=3",
            f"recipe must be one of {', '.join(RECIPES)}, got none",
        ),
        ("train digits clips", "recipe must be one word, settings key=value, got digits clips"),
        ("train digits --sow", "unrecognized arguments: --sow"),
        ("train digits overwrite=maybe", "overwrite must be true or false, got 'maybe'"),
        ("train digits out=", "out must be a folder, got ''"),
        ("train resume=", "resume must be a folder, got ''"),
        ("train resume=a out=b", "leave out out"),
        ("train resume=a overwrite=true", "leave out overwrite"),
        ("train digits seed=2020-13-45", "seed='2020-13-45'"),
        ("train digits seed=2020-12-04", "seed='2020-12-04'"),
        ("train digits ode.optimiser.lr=.nan", "ode.optimiser.lr"),
        ("train digits sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("train digits plugins=5", "plugins must be a list of Python files"),
        ("demo full", "cannot read 'full': expected key=value"),
        ("demo profile=huge", "profile must be one of quick, full, got 'huge'"),
        ("generate", "required: --checkpoint"),
        ("generate --checkpoint nowhere", "found nothing at nowhere"),
        ("generate --checkpoint nowhere more", "unrecognized arguments: more"),
        ("generate --checkpoint nowhere --chunks many", "--chunks: invalid int value: 'many'"),
        ("convert a", "required: --out"),
        ("convert nowhere --out b", "found nothing at nowhere"),
        ("convert a --out b", "a must hold weights"),
        ("convert a --out b.bin", "out must be a folder, or a file that ends in .pt or .safetensors"),
        ("convert a --out b --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("vbench-export --checkpoint a --out b", "required: --info"),
        ("vbench-export --checkpoint a --out b --info c", "info must be a file, found none at c"),
        ("vbench-export --checkpoint a --out b --info c --part 3", "found none at c"),
        ("report nowhere", "nowhere holds no run"),
        ("report .", "holds no run (no config.yaml)"),
        ("report", "required: folder"),
        ("reprot", "invalid choice: 'reprot'"),
        ("", "required"),
    ],
)
def test_each_says_what_is_wrong(words, says, capsys, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    status, line = answer(words.split(" ") if words else [], capsys)
    assert status == 2 and says in line and not started, line
    assert [file.name for file in tmp_path.iterdir()] == ["a"], "nothing is made"


def test_nested_beyond_reason(capsys, started):
    assert answer(["train", "digits", "ode=" + "[" * 3000], capsys)[0] == 2
    assert answer(["train", "digits", "out=" + "a" * 5000], capsys)[0] in (0, 2)
    assert answer(["train", "resume=" + "a" * 5000], capsys)[0] == 2
    assert answer(["generate", "--checkpoint", "a" * 5000], capsys)[0] == 2
    assert answer(["report", "a" * 5000], capsys)[0] == 2


def test_a_reader_that_has_seen_enough_and_a_full_stdout():
    show = f"{sys.executable} -m aadkern_train.cli train digits --show"
    for command, status, says in (
        (f"{show} | true; exit ${{PIPESTATUS[0]}}", 141, ""),
        (f"{show} > /dev/full", 2, "No space left"),
    ):
        done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == status and says in done.stderr and done.stderr.count("\n") == bool(says), done.stderr


KEYS = """out resume overwrite profile plugins recipe seed task data data.path data.kind data.torus chunks window sink levels
first_levels network.heads network models.teacher stages stages.more ode dmd ode.optimiser ode.optimiser.lr dmd.start
adversarial.layers evaluate checkpoint_every . ode. ode..lr"""
VALUES = """0 -1 1 3 1e-4 1e400 .nan -.inf true maybe null ~ [] {} [[1]] [1,4,4] {a:1} &a *b = \' " % @ ` 2020-01-01 2020-13-45 0x1F
1_000 010 12:30:45 --- /dev/null /proc/self/mem .. ~nobody pretrain"""
ODD = ["", "{kind: ode}", "{kind: nothing}", "{1: 2}", "[1, two]", "!!python/object:os.system x", "&a [*a]", "&a {start: *a}"]
ODD += ["a: b: c", "\t", "<<: 1", "9" * 400, "a\nb", "\ud800", "\x00", "\x1b[31m", "é" * 200]
junk = st.one_of(st.sampled_from([*VALUES.split(), *ODD]), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
setting = st.builds("{}={}".format, st.one_of(st.sampled_from(["", *KEYS.split()]), st.text(max_size=8)), junk)
word = st.one_of(setting, setting, setting, st.sampled_from(["digits", "clips", "--show", "-x", "--", "-"]), st.text(max_size=8))
OPTIONS = """--checkpoint --image --out --chunks --seed --fps --index --prompt --then --turn --parts --size --steps --first-steps
--shift --chunk-frames --window --sink --rope --device --dtype --fp8 --compile"""
option = st.one_of(st.builds("{}={}".format, st.sampled_from(OPTIONS.split()), junk), st.sampled_from(OPTIONS.split()), junk)
EXAMPLES = [150, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_junk_words_never_end_in_a_traceback(examples, capsys, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=examples)
    @given(st.sampled_from(["train", "demo"]), st.lists(word, max_size=4))
    def check(command, words):
        assert answer([command, "digits", *words] if command == "train" else [command, *words], capsys)[0] in (0, 2)

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_junk_options_of_the_other_commands_neither(examples, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan" / "transformer").mkdir(parents=True)
    (tmp_path / "wan" / "transformer" / "config.json").write_text("{}")
    (tmp_path / "list.json").write_text('[{"prompt_en": "a"}]')

    @settings(max_examples=examples)
    @given(st.sampled_from(["nowhere", ".", "wan", "/dev/null", ""]), st.lists(option, max_size=4))
    def generate(checkpoint, words):
        assert answer(["generate", *words, "--checkpoint", checkpoint], capsys)[0] in (0, 2)

    @settings(max_examples=examples // 5)
    @given(st.lists(st.one_of(junk, word), max_size=2))
    def report(words):
        assert answer(["report", *words], capsys)[0] in (0, 2)

    @settings(max_examples=examples // 5)
    @given(
        st.lists(st.one_of(junk, option), max_size=3), st.sampled_from(["nowhere", ".", "wan", "/dev/null", "", "a" * 5000]), junk
    )
    def convert(words, source, out):
        assert answer(["convert", source, *words, f"--out={out}"], capsys)[0] in (0, 2)

    @settings(max_examples=examples // 5)
    @given(st.lists(option, max_size=3), st.sampled_from(["nowhere", ".", "list.json", "/dev/null", "", "a" * 5000]), junk, junk)
    def export(words, info, out, part):
        words = [*words, f"--info={info}", f"--out={out}", f"--part={part}", "--checkpoint", "wan"]
        assert answer(["vbench-export", *words], capsys)[0] in (0, 2)

    generate()
    report()
    convert()
    export()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    def work():
        raise error

    assert status_of(work, "train") == 2
    said = capsys.readouterr().err
    assert said.startswith("aad train: out of memory: ") and said.count("\n") == 1 and "accumulate" in said


def test_other_faults_of_ours_are_raised_on():
    def work():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        status_of(work, "train")
