"""``aad ablate``: which stages cells share, what is trained once, going on, and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aadkern_train.ablate import cells as module
from aadkern_train.ablate.cells import cells_of, take
from aadkern_train.ablate.table import collected, page
from aadkern_train.cli import main
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes.ablations import GRIDS
from tests.stages.tiny_runs import SMALL_ASD, weights

ASD = GRIDS["asd"]
OTHERS = {"none": (), "long": ("ode.steps=9",), "fresh": ("pretrain.batch=8",)}


def test_cells_share_the_stages_that_they_leave_as_they_are():
    shared, cells = cells_of(ASD, 3, SMALL_ASD)
    assert [stage for stage, own in shared.recipe.stages.items() if own.steps] == ["pretrain", "ode"]
    assert [cell.name for cell in cells] == ["none", "ASD", "FFE", "both"] and {cell.shared for cell in cells} == {2}
    none, asd, ffe, both = (cell.recipe for cell in cells)
    assert {recipe.seed for recipe in (none, asd, ffe, both)} == {3}
    assert (none.stages["asd"].alpha, ffe.stages["asd"].alpha) == (0, 0) and asd.stages["asd"].alpha == both.stages["asd"].alpha > 0
    assert none.first_levels is asd.first_levels is None and ffe.first_levels == both.first_levels == both.levels
    assert len({cell.folder(Path("out")) for cell in (shared, *cells)}) == 5
    _, others = cells_of(replace(ASD, cells=OTHERS), 3, SMALL_ASD)
    assert [cell.shared for cell in others] == [2, 1, 0]
    trunk, others = cells_of(ASD, 3, [*SMALL_ASD, "asd.batch=8"])
    assert trunk.folder(Path("o")) == shared.folder(Path("o")) and others[0].folder(Path("o")) != cells[0].folder(Path("o"))


def test_a_cell_of_other_levels_or_windows_shares_the_stages_before_them():
    """Each cell of AAD-1's grid by the shared stages that it takes finished; none trains stage I twice without need."""
    _, cells = cells_of(GRIDS["aad1"], 0)
    of = {cell.name: cell.shared for cell in cells}
    anew = ("two steps", "four steps, II alone", "window 9, no sink, x 10", "window 5, sink 1, x 10", "window of all, x 10")
    assert of == dict.fromkeys(of, 3) | dict.fromkeys(anew, 1) | {"II five times as long": 2}
    widest = next(cell.recipe for cell in cells if cell.name == "window of all, x 10")
    assert widest.window == 1 + sum(widest.chunks[1:]) * widest.evaluate.long


def test_the_cells_of_feedback_share_all_that_comes_before_it():
    """A broad teacher too: the shared stages learn from web clips alone."""
    shared, cells = cells_of(GRIDS["afd"], 0)
    assert {cell.shared for cell in cells} == {3} and len({cell.folder(Path("out")) for cell in (shared, *cells)}) == len(cells) + 1
    of = {cell.name: cell.recipe for cell in cells}
    assert of["broad teacher, AFD"].data.curated_keep == 0.9 and of["AFD"].data.curated_keep == 1.0
    assert [name for name, recipe in of.items() if recipe.stages["adversarial"].steps] == ["stage III (GAN, real gradients)"]
    assert {recipe.stages["afd"].steps for name, recipe in of.items() if not recipe.stages["adversarial"].steps} == {60}


@pytest.mark.parametrize("word", ["data.blur=0.1", "chunks=[2,2]", "network.layers=3", "seed=8"])
def test_a_cell_that_changes_what_is_shared_is_refused(word):
    says = f"cell odd must leave what shared stages depend on as it is, it sets {word.split('=')[0]}"
    with pytest.raises(ValueError, match=says):
        cells_of(replace(ASD, cells={"odd": (word, "asd.layers=[0]")}), 0, SMALL_ASD)


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "grid must be one of asd, aad1, afd, got none"),
        (["asd2"], "grid must be one of asd, aad1, afd, got asd2"),
        (["asd", "aad1"], "grid must be one of asd, aad1, afd, got asd aad1"),
        (["asd", "seeds=0,x"], "seeds must be different whole numbers, say seeds=0,1,2, got '0,x'"),
        (["asd", "seeds=1,1"], "seeds must be different whole numbers"),
        (["asd", "seeds="], "seeds must be different whole numbers"),
        (["asd", "asd.alpah=3"], "did you mean"),
        (["asd", "levels=[1.0]", "evaluate.steps=[]"], "levels must be two or more levels for asd"),
    ],
)
def test_wrong_words_are_told_in_a_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


class Trained:
    """Stands for ``run_recipe``: leaves what a run would, and counts what it was asked to train. ``fails``: of a cell, once."""

    def __init__(self, fails: str = "") -> None:
        self.said: list[str] = []
        self.fails = fails

    def __call__(self, recipe, folder, *, resume):
        waiting = [name for name, own in recipe.stages.items() if own.steps and not (folder / "weights" / name).is_dir()]
        self.said.append(f"{folder.name.rpartition('-')[0]}: {' '.join(waiting)}")
        if self.fails and self.fails in folder.name:
            self.fails = ""
            raise KeyboardInterrupt
        for name in waiting:
            for weights_of in (f"{name}.fake", name):
                (folder / "weights" / weights_of).mkdir(parents=True)
                (folder / "weights" / weights_of / "made.txt").write_text(f"{folder.name} {weights_of}")
        value = 90.0 + recipe.seed + (3 if "asd" in recipe.stages and recipe.stages["asd"].alpha else 0)
        row = {"quality": value, "obey": 50.0, "keep": 0.5, "drift": 1.0, "dynamic": 100.0, "long": {"quality": value - 10}}
        titles = {"asd": "ASD", "asd.1": "ASD, 1 step a chunk"}
        stages = {name: row for name in ("asd", "asd.1")} if "asd" in recipe.stages else {}
        (folder / "metrics.json").write_text(json.dumps({"stages": stages, "titles": titles, "machine": {"device": "a toy"}}))
        (folder / "report.html").write_text("done")


def test_what_is_shared_is_trained_once_and_a_stopped_grid_goes_on(tmp_path, monkeypatch):
    trained, out = Trained(fails="FFE"), tmp_path / "out"
    monkeypatch.setattr(module, "run_recipe", trained)
    command = ["ablate", "asd", f"out={out}", "seeds=0,4", *SMALL_ASD]
    assert main(command) == 130
    assert trained.said == ["shared: pretrain ode", "none: asd", "ASD: asd", "FFE: asd"]
    assert main(command) == 0
    assert trained.said[4:] == ["FFE: asd", "both: asd", "shared: pretrain ode", "none: asd", "ASD: asd", "FFE: asd", "both: asd"]
    assert main(command) == 0 and len(trained.said) == 11, "all is done"
    both = next((out / "seed-4").glob("both-*"))
    assert (both / "weights" / "ode.fake" / "made.txt").read_text().startswith("shared-")
    assert (both / "weights" / "asd" / "made.txt").read_text().startswith("both-")
    told = json.loads((out / "asd.json").read_text())
    assert told["measured"]["both"]["asd.1"]["quality"] == {"0": 93.0, "4": 97.0}
    assert told["long"]["none"]["asd"]["quality"] == {"0": 80.0, "4": 84.0} and told["expected"] == ASD.expected
    shown = (out / "asd.md").read_text()
    assert "## ASD, 1 step a chunk" in shown and "95.0 [93, 97] / 85.0 [83, 87]" in shown and ASD.expected in shown
    assert "trained length / longest clips" in shown
    assert page(told, ASD) == shown and "| none (`first_levels=null asd.alpha=0`) | 2 | 92.0 [90, 94]" in shown


def test_lengths_between_stand_between(tmp_path, monkeypatch):
    """Cells that measure their clips at two and three times too say so in each figure; a cell that does not has two."""
    longer = replace(ASD, cells={"none": (), "more": ("evaluate.long=4", "evaluate.lengths=[3,2]")})
    _, cells = cells_of(longer, 0, SMALL_ASD)
    row = {"quality": 9.0, "2 times": {"quality": 8.0}, "3 times": {"quality": 7.0}, "long": {"quality": 6.0}}
    for cell in cells:
        own = row if cell.name == "more" else {"quality": 5.0, "long": {"quality": 4.0}}
        cell.folder(tmp_path).mkdir(parents=True)
        (cell.folder(tmp_path) / "metrics.json").write_text(json.dumps({"stages": {"asd": own}, "titles": {}, "machine": {}}))
    found = collected("asd", longer, cells, tmp_path, [])
    assert found["2 times"]["more"]["asd"] == {"quality": {"0": 8.0}} and found["2 times"]["none"]["asd"] == {}
    shown = page(found, longer)
    assert "length / 2 times it, where it was measured / 3 times it, where it was measured / longest clips." in shown
    rows = [line for line in shown.splitlines() if line.startswith(("| none", "| more"))]
    none, more = (line.split("|")[3].strip() for line in rows)  # each once, under the one row that it has
    assert (none, more) == ("5.0 / 4.0", "9.0 / 8.0 / 7.0 / 6.0")


def test_a_row_is_there_for_the_cells_that_have_it_and_by_its_title(tmp_path):
    """A first cell without a stage neither names that stage's row nor stands in it; a row that no cell has is left out."""
    grid = replace(ASD, cells={"none": (), "more": ("asd.alpha=0",)}, rows=("dmd", "asd", "adversarial"))
    _, cells = cells_of(grid, 0, SMALL_ASD)
    for cell, row, title in zip(cells, ("dmd", "asd"), ("II: warm-up", "II: with itself"), strict=True):
        cell.folder(tmp_path).mkdir(parents=True)
        written = {"stages": {row: {"quality": 9.0}}, "titles": {row: title}, "machine": {}}
        (cell.folder(tmp_path) / "metrics.json").write_text(json.dumps(written))
    shown = page(collected("asd", grid, cells, tmp_path, []), grid).splitlines()
    assert [line for line in shown if line.startswith("## ")] == ["## II: warm-up", "## II: with itself"]
    assert [line.split()[1] for line in shown if line.startswith(("| none", "| more"))] == ["none", "more"]


def test_a_stage_is_taken_whole_or_not_at_all(tmp_path, monkeypatch):
    source, folder = tmp_path / "a", tmp_path / "b"
    for name in ("ode", "ode.fake", "ode_more"):
        (source / "weights" / name).mkdir(parents=True)
        (source / "weights" / name / "w").write_text(name)
    order, real = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, goal: order.append(goal.name) or real(self, goal))
    (folder / "weights" / "ode.tmp").mkdir(parents=True)  # of one that was killed
    take("ode", source, folder)
    assert order == ["ode.fake", "ode"] and sorted(p.name for p in (folder / "weights").iterdir()) == ["ode", "ode.fake"]


@pytest.mark.slow
def test_the_grid_itself(tmp_path):
    assert main(["ablate", "asd", f"out={tmp_path}", *SMALL_ASD]) == 0
    (shared,) = (tmp_path / "seed-0").glob("shared-*")
    found = [next((tmp_path / "seed-0").glob(f"{name}-*")) for name in ASD.cells]
    start = {name: tensor for name, tensor in weights(shared).items() if name.startswith("ode/")}
    for folder in found:
        own = weights(folder)
        assert len(start) > 20 and all((own[name] == tensor).all() for name, tensor in start.items())
        assert RunFolder(folder).read_log() and not [line for line in RunFolder(folder).read_log() if line["stage"] == "ode"]
    told = json.loads((tmp_path / "asd.json").read_text())
    assert all(told["measured"][cell][row]["quality"]["0"] > 0 for cell in ASD.cells for row in ASD.rows)
    four = {told["measured"][cell]["asd"]["quality"]["0"] for cell in ASD.cells}
    assert len(four) == 4
