"""``patch``: Self-Forcing and its near-copies on ``aadkern.attention``, without touching their files.

Their mask builders return plans instead of BlockMasks, and the module's ``flex_attention`` takes them. Signatures are
looked at before anything is replaced; each kind of mask is compared with the model's own, whole, when it is first
built.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from aadkern.checks import shown
from aadkern.compat.block_mask import evaluate
from aadkern.compat.builders import BUILDERS, INTERLEAVED, PADDING, Interleaved
from aadkern.compat.flex import FirstCalls, Original, flex_attention_for
from aadkern.compat.handle import Handle
from aadkern.plans import AttentionPlan

PROJECTS = {
    "self_forcing": "wan.modules.causal_model",
    "causal_forcing": "wan.modules.causal_model",
    "longlive": "wan.modules.causal_model",
    "longlive2": "wan_5b.modules.causal_model",
    "krea": "wan.modules.causal_model",
    "causvid": "causvid.models.wan.causal_model",
    "fastvideo": "fastvideo.models.dits.causal_wanvideo",
}
FLEX_PARAMETERS = ("query", "key", "value", "block_mask")
BUILDER_PARAMETERS = ("device", "num_frames", "frame_seqlen", "num_frame_per_block")
FURTHER_PARAMETERS = {"local_attn_size", "batch_size", "sp_size"}  # a plan serves every batch size
GETTER = "_get_compiled_flex_attention"  # of LongLive 2's module for tokens shared among ranks


def patch(target: ModuleType | str) -> Handle:
    """Put ``aadkern.attention`` under a causal Wan model of Self-Forcing's family.

    ``target`` is the module that defines the model, its dotted name, or one of ``PROJECTS``. Returns a handle: print it
    to see what was replaced and checked; ``undo`` it, or use it as a context manager. A model that has already kept a
    BlockMask works too: it is converted exactly. After undoing, set ``model.block_mask = None``, since it holds a plan.

    Raises ValueError, having replaced nothing, where the module is not of the family, has another signature, or is
    patched already.
    """
    module = _module(target)
    flex = _flex_of(module)
    builders = _builders_of(module)
    sharing = _sharing_of(module, builders)
    handle = Handle(f"aadkern.compat.patch of {module.__name__}")
    first_calls = FirstCalls(handle.notes)
    shim = flex_attention_for(flex, first_calls)
    shim._aadkern_handle = handle  # type: ignore[attr-defined]
    handle.replace(
        module,
        "flex_attention",
        shim,
        f"{module.__name__}.flex_attention: plans and BlockMasks go to aadkern.attention, calls without a mask to the original",
    )
    if sharing is not None:
        get = vars(sharing)[GETTER]
        shared = flex_attention_for(lambda *args, **kwargs: get()(*args, **kwargs), first_calls)
        note = f"{sharing.__name__}.{GETTER}: the same, for tokens shared among ranks"
        handle.replace(sharing, GETTER, lambda: shared, note)
    for cls, name, original in builders:
        build = _building(original, name, first_calls)
        handle.replace(cls, name, staticmethod(build), f"{cls.__name__}.{name}: gives a plan of key ranges, no BlockMask")
    return handle


def _module(target: ModuleType | str) -> ModuleType:
    if isinstance(target, ModuleType):
        return target
    if not isinstance(target, str):
        raise TypeError(f"patch: target must be a module, its name or one of {', '.join(PROJECTS)}, got {type(target).__name__}")
    name = PROJECTS.get(target, target)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"patch: target must be a module that can be imported or one of {', '.join(PROJECTS)}, got {shown(target)}"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the project is there, and lacks something of its own
        known = ", ".join(PROJECTS)
        raise ValueError(
            f"patch: target must be a module that can be imported or one of {known}, got {shown(target)}: no module named "
            f"{shown(error.name)}; run from the project's folder, or put it on sys.path"
        ) from error


def _flex_of(module: ModuleType) -> Callable[..., Any]:
    flex = vars(module).get("flex_attention")
    if flex is None:
        raise ValueError(
            f"patch: target {module.__name__} must have a global flex_attention, and has none; "
            "patch the module that defines the model"
        )
    if hasattr(flex, "_aadkern_handle"):
        raise ValueError(f"patch: target {module.__name__} is patched already; undo that first")
    parameters = _parameters(flex)
    if not set(FLEX_PARAMETERS) <= set(parameters):
        wanted = ", ".join(FLEX_PARAMETERS)
        raise ValueError(f"patch: target {module.__name__}.flex_attention must take {wanted}; it takes ({', '.join(parameters)})")
    return flex


def _builders_of(module: ModuleType) -> list[tuple[type, str, Callable[..., Any]]]:
    """The mask builders of the classes that the module defines, their signatures looked at."""
    builders = []
    defined = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    for cls in dict.fromkeys(defined):  # a class may have two names there
        for name in [name for name in BUILDERS if name in vars(cls)]:
            raw = vars(cls)[name]
            if not isinstance(raw, staticmethod):
                raise ValueError(
                    f"patch: {cls.__name__}.{name} must be a static method, as in Self-Forcing, got {type(raw).__name__}"
                )
            original = raw.__func__
            parameters = _parameters(original)
            if tuple(parameters[:4]) != BUILDER_PARAMETERS or not set(parameters[4:]) <= FURTHER_PARAMETERS:
                wanted = f"({', '.join(BUILDER_PARAMETERS)}[, {', '.join(sorted(FURTHER_PARAMETERS))}])"
                raise ValueError(f"patch: {cls.__name__}.{name} must take {wanted}; it takes ({', '.join(parameters)})")
            if "create_block_mask" not in original.__globals__:
                raise ValueError(f"patch: {cls.__name__}.{name} must call a global create_block_mask, and its module has none")
            builders.append((cls, name, original))
    if not builders:
        raise ValueError(f"patch: a class of target {module.__name__} must have one of {', '.join(BUILDERS)}, and none has")
    return builders


def _sharing_of(module: ModuleType, builders: list[tuple[type, str, Callable[..., Any]]]) -> ModuleType | None:
    """LongLive 2's module of attention over tokens shared among ranks, where a class builds masks for it."""
    if not any(name == INTERLEAVED for _, name, _ in builders):
        return None
    name = f"{module.__name__.rpartition('.modules.')[0]}.distributed.sp_training"
    try:
        sharing = importlib.import_module(name)
    except ModuleNotFoundError:
        sharing = None
    if not callable(getattr(sharing, GETTER, None)):
        raise ValueError(
            f"patch: target {module.__name__} has {INTERLEAVED}, and {name} must be there with its {GETTER}, and is not"
        )
    return sharing


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _building(original: Callable[..., Any], name: str, first_calls: FirstCalls) -> Callable[..., AttentionPlan | Interleaved]:
    """The builder ``name``, giving a plan; each new combination of its arguments is compared with ``original`` first."""
    rule, signature = BUILDERS[name], inspect.signature(original)
    halves = 2 if "teacher_forcing" in name else 1
    checked: dict[tuple[int, ...], bool] = {}

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> AttentionPlan | Interleaved:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        sizes = {key: int(value) for key, value in bound.arguments.items() if key not in ("device", "batch_size")}
        setting = tuple(value for key, value in sizes.items() if key != "frame_seqlen")
        tokens_per_frame, ranks = sizes.pop("frame_seqlen"), sizes.pop("sp_size", 1)
        frames = halves * sizes["num_frames"]
        if setting not in checked:
            # Small frames make the whole mask small. Not a length without padding, which is part of the comparison.
            small = next(n for n in (2, 3) if frames * n % PADDING)
            theirs = recorded(original, {**bound.arguments, "device": "cpu", "frame_seqlen": small})
            plans = [rule(frame_seqlen=small, padding_seen=seen, **sizes) for seen in (False, True)]
            theirs = (_in_order(theirs[0], plans[0], frames * small, ranks, "cpu"), *theirs[1:])
            checked[setting] = _equal_plan(name, plans, theirs, frames * small, small)
            described = ", ".join(f"{key}={value}" for key, value in sizes.items())
            described += f", sp_size={ranks}" if ranks > 1 else ""
            first_calls.notes.append(f"{name}({described}): equals the model's own mask, compared whole at {small} tokens a frame")
            if plans[0] != plans[1] and checked[setting]:
                first_calls.notes.append("  its last, partial block sees zero keys of the padding, as in the original")
        plan, tokens = rule(frame_seqlen=tokens_per_frame, padding_seen=checked[setting], **sizes), frames * tokens_per_frame
        mask_mod = _in_order(recorded(original, bound.arguments)[0], plan, tokens, ranks, bound.arguments["device"])
        first_calls.expect(plan, Original(mask_mod, tokens))
        return plan if ranks == 1 else Interleaved(plan, tokens, ranks)

    return build


def _in_order(mask_mod: Callable[..., Any], plan: AttentionPlan, tokens: int, ranks: int, device: Any) -> Callable[..., Any]:
    """``mask_mod`` for tokens in the plan's order, where they lie apart on several ranks."""
    if ranks == 1:
        return mask_mod
    places = Interleaved(plan, tokens, ranks).together(torch.arange(plan.q_len, device=device), 0)
    return lambda b, h, q, k: mask_mod(b, h, places[q], places[k])


def recorded(original: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Callable[..., Any], int, int]:
    """The mask_mod, q_len and k_len that ``original`` would make a BlockMask of; none is made."""
    masks: list[tuple[Callable[..., Any], int, int]] = []

    def record(mask_mod: Any, B: Any = None, H: Any = None, Q_LEN: Any = None, KV_LEN: Any = None, **_: Any) -> str:
        masks.append((mask_mod, int(Q_LEN), int(KV_LEN)))
        return "a plan of aadkern"

    names = original.__globals__
    # Krea's builder calls a function that keeps its masks: without that, none is kept from here nor taken from there.
    kept = {name: x.__wrapped__ for name, x in names.items() if isinstance(x, functools._lru_cache_wrapper)}
    replaced = {"create_block_mask": record, **kept}
    before = {name: names[name] for name in replaced}
    names.update(replaced)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they print the mask
            original(**arguments)
    finally:
        names.update(before)
    if len(masks) != 1:
        raise RuntimeError(f"patch: {original.__name__} made {len(masks)} masks, not one; undo the patch")
    return masks[0]


def _equal_plan(
    name: str, plans: list[AttentionPlan], original: tuple[Callable[..., Any], int, int], tokens: int, tokens_per_frame: int
) -> bool:
    """The index of the plan that shows ``tokens`` queries the same keys as the original mask. RuntimeError if none does."""
    mask_mod, q_len, k_len = original
    if (q_len, k_len) != (plans[0].q_len, plans[0].k_len):
        wanted = f"{plans[0].q_len} x {plans[0].k_len}"
        raise RuntimeError(f"patch: {name} makes a mask of {q_len} x {k_len}, not {wanted}; undo the patch")
    theirs = evaluate(mask_mod, torch.arange(tokens), torch.arange(k_len))
    differences = [(theirs != plan.dense()[:tokens]).nonzero() for plan in plans]
    for index, different in enumerate(differences):
        if not len(different):
            return bool(index)
    q, k = differences[0][0].tolist()
    does = "shows" if theirs[q, k] else "hides"
    raise RuntimeError(
        f"patch: {name}: the model's own mask {does} frame {k // tokens_per_frame} to frame {q // tokens_per_frame}, "
        "unlike Self-Forcing's; undo the patch"
    )
