"""The house's own rules: who may import whom, what is public, what is read from the environment, how long a file is."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aadkern
from aadkern import ops
from tests.house.import_graph import ROOT, SOURCES, arrows, circle, imports, module_name, room

AADKERN = [path for path in SOURCES if path.is_relative_to(ROOT / "aadkern")]
MAX_LINES = 500

PUBLIC = {
    "AttentionPlan",
    "SequenceGroup",
    "StreamingCache",
    "StreamingGenerator",
    "VideoLayout",
    "Window",
    "__version__",
    "attention",
    "attention_pool",
    "backends",
    "blocks",
    "fp8",
    "noised_views",
    "plans",
    "ulysses",
    "ulysses_attention",
}

# Beside the standard library; the first match counts. `import aadkern` needs torch alone: the others are imported late.
MAY_IMPORT = {
    "aadkern/weights/tensor_files.py": {"torch", "safetensors"},
    "aadkern/wan/text.py": {"torch", "tokenizers", "transformers", "ftfy"},
    "aadkern/wan/tiny_vae.py": {"torch", "safetensors"},
    "aadkern/wan/": {"torch", "diffusers"},
    "aadkern/testing.py": {"torch", "hypothesis"},
    "aadkern/spans.py": {"torch", "nvtx"},
    "aadkern/": {"torch", "triton"},
}

# Who stands on whom in aadkern: a room, or a file beside the rooms, imports its own files and those of rooms before it.
ROOMS = (
    "checks",
    "runs",
    "plans",
    "spans",
    "_build",
    "flash_libraries",
    "runtime",
    "library",
    "layer_attention",
    "rotary",
    "weights",
)
ROOMS += ("fp8", "range_attention", "noise", "pooling", "blocks", "ulysses", "ops", "testing", "streaming", "wan", "compat")

# Every variable read: our one switch, Triton's own, what torchrun tells the processes that it launches, and what builders of CUDA
# extensions go by (benchmarks/fa3.py).
ENVIRONMENT = {
    "AADKERN_NVTX",
    "TRITON_INTERPRET",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_HOME",
    "MAX_JOBS",
    "PATH",
}


def room_and_file(name: str) -> tuple[str, str]:
    """aadkern.range_attention.sdpa.forward -> ("range_attention", "sdpa"); ("", "") outside the rooms."""
    parts = name.split(".")
    inside = parts[0] == "aadkern" and len(parts) >= 3 and (ROOT / "aadkern" / parts[1]).is_dir()
    return (parts[1], parts[2]) if inside else ("", "")


def is_kernel(file: str) -> bool:
    return file.startswith(("triton", "sdpa", "sm90", "flash", "torch_"))


def test_aadkern_imports_only_what_it_may():
    wrong = []
    for path in AADKERN:
        place = path.relative_to(ROOT).as_posix()
        allowed = next(names for prefix, names in MAY_IMPORT.items() if place.startswith(prefix))
        roots = {name.partition(".")[0] for name in imports(path)}
        wrong += [f"{place} imports {name}" for name in roots - set(sys.stdlib_module_names) - {"aadkern"} - allowed]
    assert wrong == []


def test_the_training_layer_stands_below_benchmarks_and_tests():
    below = [path for path in SOURCES if not path.is_relative_to(ROOT / "benchmarks")]
    assert [path for path in below if {name.partition(".")[0] for name in imports(path)} & {"benchmarks", "tests"}] == []


def test_there_is_no_circle_of_files():
    assert circle({module_name(path): arrows(path) for path in SOURCES}) is None


def test_a_circle_is_found_and_nothing_else():
    assert circle({"a": ("b", "c"), "b": ("d",), "c": ("d", "b"), "d": ()}) is None
    assert circle({"a": ("b",), "b": ("c",), "c": ("d", "b")}) == "b -> c -> b"


def test_imports_of_aadkern_lead_down_from_room_to_room():
    assert {room(module_name(path)) for path in AADKERN} - {""} == set(ROOMS)
    place = {name: i for i, name in enumerate(ROOMS)}
    below = [path for path in AADKERN if room(module_name(path))]
    up = [
        f"{module_name(path)} -> {name}"
        for path in below
        for name in arrows(path)
        if not room(name) or place[room(name)] > place[room(module_name(path))]
    ]
    assert up == []


def test_kernels_are_imported_by_their_own_room_only():
    wrong = []
    for path in AADKERN:
        me = module_name(path)
        for name in imports(path):
            room, file = room_and_file(name)
            if is_kernel(file) and room != room_and_file(me)[0]:
                wrong.append(f"{me} imports {name}")
    assert wrong == []


def test_no_kernel_leans_on_a_reference():
    wrong = []
    for path in AADKERN:
        me = module_name(path)
        if is_kernel(room_and_file(me)[1]):
            wrong += [f"{me} imports {name}" for name in imports(path) if room_and_file(name)[1] == "reference"]
    assert wrong == []


def python(code: str) -> str:
    """What a fresh process prints, run at the top of the repository."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_operator_is_opchecked():
    """But sm90_*, the launches of range_attention's "sm90": they have no implementation without a CUDA build."""
    schemas = torch._C._jit_get_all_schemas()
    ours = {schema.name.removeprefix("aadkern::") for schema in schemas if schema.name.startswith("aadkern::")}
    ours = {name for name in ours if not name.endswith("_for_a_test")}  # which another test of this process defined
    checked = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("opcheck"):
                checked.add(ast.unparse(node.args[0]).removesuffix(".default").rpartition(".")[2])
    assert {name for name in ops.__all__ if not hasattr(torch.ops.aadkern, name)} == set()  # and that importing it registers them
    assert len(ours) > 10 and [name for name in ours - checked if not name.startswith("sm90_")] == []


# None in sys.modules is how Python itself marks a module that cannot be imported.
WITH_TORCH_ALONE = """
import sys, time
sys.modules.update(dict.fromkeys(
    ["triton", "diffusers", "einops", "numpy", "pydantic", "yaml", "sklearn", "av", "rich", "aadkern_train"]))
import torch
start = time.process_time()
import aadkern
seconds = time.process_time() - start
layout = aadkern.VideoLayout(chunks=(1, 2), tokens_per_frame=4)
plan = aadkern.plans.block_causal(layout, aadkern.Window(frames=3, sink=1))
q = torch.randn(1, 12, 2, 8, requires_grad=True)
aadkern.attention(q, q, q, plan).sum().backward()
assert q.grad.isfinite().all()
assert "available" in aadkern.backends().values()
assert aadkern.backends()["triton"] == "triton is not installed"
import aadkern.compat
assert aadkern.compat.plan_of_block_mask(plan.block_mask()) == plan
print(seconds)
"""


def test_aadkern_works_with_torch_alone_and_imports_in_a_second():
    assert float(python(WITH_TORCH_ALONE)) < 1.0  # of processor time, beyond torch's own import


def test_importing_aadkern_imports_nothing_heavy():
    loaded = python("import torch, sys; before = set(sys.modules); import aadkern; print(*set(sys.modules) - before)")
    assert "aadkern.range_attention.api" in loaded.split()
    assert [name for name in loaded.split() if is_kernel(room_and_file(name)[1])] == []
    assert {name.partition(".")[0] for name in loaded.split()} & {  # torch's FLOP counter, where ours register, brings Triton
        "diffusers",
        "einops",
        "aadkern_train",
    } == set()


def test_aad_info_works_without_the_train_extra():
    told = python("""
import sys
sys.modules.update(dict.fromkeys(
    ["diffusers", "einops", "numpy", "pydantic", "yaml", "sklearn", "av", "PIL", "rich", "safetensors"]))
from aadkern_train.cli import main
sys.exit(main(["info"]))
""")
    assert aadkern.__version__ in told
    assert [name for name in aadkern.backends() if name not in told] == []


def test_public_names():
    assert set(aadkern.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(aadkern, name)] == []
    of_the_module = {path.stem for path in (ROOT / "aadkern").iterdir()} | {"annotations", "Any", "TYPE_CHECKING"}
    assert {name for name in vars(aadkern) if not name.startswith("_")} - PUBLIC - of_the_module == set()


def test_public_functions_explain_every_argument_and_their_errors():
    functions = [aadkern.attention, aadkern.attention_pool, aadkern.noised_views, aadkern.ulysses_attention]
    functions += [getattr(aadkern.blocks, name) for name in aadkern.blocks.__all__ if name.islower()]
    for function in functions:
        told, arguments = function.__doc__ or "", inspect.signature(function).parameters
        assert [name for name in arguments if not re.search(rf"``{name}\b", told)] == [], function
        assert "ValueError" in told or "errors as for" in told, function
    public = [getattr(aadkern, name) for name in PUBLIC - {"__version__"}]
    public += [getattr(aadkern.blocks, name) for name in aadkern.blocks.__all__]
    assert [thing for thing in public if not inspect.getdoc(thing)] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        aadkern.no_such_name  # noqa: B018


def environment_reads(path: Path) -> set[str]:
    """Names read through os.environ or os.getenv; a computed name counts as its source text."""
    keys: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=key, ctx=ast.Load()):
                keys.append(key)
            case ast.Call(func=ast.Attribute(attr="get" | "pop" | "setdefault", value=ast.Attribute(attr="environ"))):
                keys.append(node.args[0])
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[key, *_]):
                keys.append(key)
            case ast.Compare(left=key, comparators=[ast.Attribute(attr="environ")]):
                keys.append(key)
    return {key.value if isinstance(key, ast.Constant) else ast.unparse(key) for key in keys}


def test_no_hidden_switches_in_the_environment():
    assert {path: names for path in SOURCES if (names := environment_reads(path) - ENVIRONMENT)} == {}


def test_the_search_for_environment_reads_finds_every_way(tmp_path):
    reads = "os.environ['A']; os.environ.get('B', ''); os.getenv('C'); 'D' in os.environ; os.environ[e]"
    (tmp_path / "reads.py").write_text(reads + "; os.environ['written'] = ''")
    assert environment_reads(tmp_path / "reads.py") == {"A", "B", "C", "D", "e"}


def test_every_file_is_read_in_one_sitting():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    files += [path for folder in ("csrc", "aadkern_train/serve/page") for path in (ROOT / folder).rglob("*") if path.is_file()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_folder_of_sources_is_a_package_that_says_what_it_is():
    undescribed = [path for path in SOURCES if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert undescribed == []
    assert {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()} == set()


def test_tests_lie_in_a_folder_of_the_room_that_they_test():
    """Or of what is no package: attention as users call it, the kernels of csrc, the whole house, the interpreter's process."""
    packages = {path.parent.name for path in SOURCES if path.name == "__init__.py"} | {"attention", "sm90", "house", "interpreter"}
    tests = ROOT / "tests"
    assert [path.name for path in tests.glob("test_*.py")] == []
    assert {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("*.py"))} - packages == set()


def test_no_test_file_is_imported():
    """Under any name: what several share lies in modules of its own, beside them."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        named = {name for name in imports(path) if name.startswith("tests.") and ".test_" in name}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(named)]
    assert wrong == []


def test_reading_memory_before_it_is_written_shows():
    """The poison of conftest.py: floating memory that the packages' own code allocates is NaN."""
    names = {"__name__": "aadkern.room.kernel"}
    allocations = "torch.empty(99), like.new_empty(99), torch.empty_like(like), torch.empty_strided((9, 3), (3, 1))"
    exec(f"import torch; like = torch.zeros(99, dtype=torch.bfloat16); floating = [{allocations}]", names)
    exec("whole = torch.empty(99, dtype=torch.int64); leaf = torch.empty(99, requires_grad=True)", names)
    assert all(bool(tensor.isnan().all()) for tensor in names["floating"])
    assert names["leaf"].is_leaf and bool(names["leaf"].isnan().all())
    assert names["whole"].dtype == torch.int64


def test_one_version_of_ruff():
    files = (ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml")
    assert len({version for file in files for version in re.findall(r"ruff==([\d.]+)", file.read_text())}) == 1
