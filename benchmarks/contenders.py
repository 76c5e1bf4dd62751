"""The contenders: our backends by name, and every rival that can be asked the same question, each with a reason where it cannot.

A contender is made for one case and takes q [B, Lq, H, D], k, v [B, Lk, H, D], as ``aadkern.attention`` does. Rivals get their plan
prepared beforehand: FlexAttention its BlockMask, the loops nothing, since slicing is all they need.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import aadkern
from aadkern import AttentionPlan
from benchmarks.cases import AttentionCase

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Missing(Exception):
    """This contender is not here, or has nothing for such tensors; the message says why."""


@dataclass(frozen=True)
class Contender:
    """``make`` prepares it for a case on a device, or raises ``Missing``. ``trains`` tells whether it has a backward there."""

    name: str
    make: Callable[[AttentionCase, torch.device], Attend]
    ours: bool = False
    trains: Callable[[torch.device], bool] = lambda device: True


def _ours(backend: str, case: AttentionCase, device: torch.device, deterministic: bool = False) -> Attend:
    answer = aadkern.backends(device.type)[backend]
    if answer != "available":
        raise Missing(answer)
    return lambda q, k, v: aadkern.attention(q, k, v, case.plan, backend=backend, deterministic=deterministic)


def _sm90_forward(kernel: str, case: AttentionCase, device: torch.device) -> Attend:
    """One of the Hopper backend's forward kernels by name; the backend itself runs one of them."""
    _ours("sm90", case, device)
    from aadkern.range_attention import sm90

    if kernel not in sm90.FORWARD_KERNELS:
        raise Missing(f"sm90 has the forward kernels {', '.join(sm90.FORWARD_KERNELS)}, not {kernel}")
    return lambda q, k, v: sm90.forward(q, k, v, case.plan, case.scale, kernel=kernel)[0]


def _sm90_rows(rows: int, case: AttentionCase, device: torch.device) -> Attend:
    """The Hopper backend with so many query rows a step of its backward."""
    _ours("sm90", case, device)
    from aadkern.range_attention import sm90, sm90_tables

    accepted = sm90_tables.QUERY_ROWS.get(case.head_dim, ())
    if rows not in accepted:
        raise Missing(f"sm90's backward takes {accepted} query rows at head_dim {case.head_dim}, not {rows}")

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            out, lse = sm90.forward(q, k, v, case.plan, case.scale)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
            return sm90.backward(dout, None, *ctx.saved_tensors, case.plan, case.scale, rows=rows)

    return Attention.apply


def heads_first(dense: Callable[..., Tensor]) -> Attend:
    """A function of [B, H, L, D] as one of [B, L, H, D]."""
    return lambda q, k, v: dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def dense_loop(plan: AttentionPlan, dense: Attend) -> Attend:
    """One dense call per run of queries; where a run sees several ranges, their keys and values are concatenated first."""

    def seen(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        slices = [x[:, a:b] for a, b in ranges]
        return slices[0] if len(slices) == 1 else torch.cat(slices, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for (q0, q1), ranges in plan.runs:
            run = q[:, q0:q1]
            outs.append(dense(run, seen(k, ranges), seen(v, ranges)) if ranges else torch.zeros_like(run))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    return attend


def _sdpa_loop(backend: SDPBackend | None, case: AttentionCase, device: torch.device) -> Attend:
    if backend is None:
        return dense_loop(case.plan, heads_first(scaled_dot_product_attention))
    if device.type != "cuda":
        raise Missing(f"SDPA's {backend.name} runs on CUDA")
    loop = dense_loop(case.plan, heads_first(scaled_dot_product_attention))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return loop(q, k, v)

    return attend


def _dense_mask(case: AttentionCase, device: torch.device) -> Attend:
    if case.plan.q_len * case.plan.k_len > 2**28:
        raise Missing(f"a mask of {case.plan.q_len} x {case.plan.k_len} is beyond what anyone would pass")
    return heads_first(functools.partial(scaled_dot_product_attention, attn_mask=case.plan.dense(device)))


def _flex(backend: str | None, case: AttentionCase, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    options = {}
    if backend is not None:
        if device.type != "cuda":
            raise Missing("FlexAttention's FLASH backend runs on CUDA")
        imported("flash_attn.cute")
        options["kernel_options"] = {"BACKEND": backend}
    # fullgraph: where torch.compile gives up (after 8 shapes, say; measure resets it), it must say so and not run eagerly.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return heads_first(functools.partial(compiled, block_mask=case.plan.block_mask(device), **options))


def imported(module: str) -> object:
    """The module, or ``Missing`` with the reason that Python gives."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library built for another torch can raise anything
        raise Missing(f"{module}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _library_loop(modules: tuple[str, ...], function: str, case: AttentionCase, device: torch.device) -> Attend:
    """A loop over a library's function of [B, L, H, D], which gives its output alone or first of several."""
    if device.type != "cuda":
        raise Missing(f"{modules[0]} runs on CUDA")
    reasons = []
    for module in modules:
        try:
            call = getattr(imported(module), function)
        except Missing as error:
            reasons.append(str(error))
            continue

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = call(q, k, v)  # noqa: B023
            return out if isinstance(out, Tensor) else out[0]

        return dense_loop(case.plan, dense)
    raise Missing("; ".join(reasons))


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _fa3_trains(device: torch.device) -> bool:
    """The fa3-fwd package on PyPI has FlashAttention 3's forward alone; flash_attn_interface is the whole."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def _never(device: torch.device) -> bool:
    return False


def _contender(name: str, make: Callable[..., Attend], *fixed: object, **options: object) -> Contender:
    return Contender(name, functools.partial(make, *fixed), **options)  # type: ignore[arg-type]


SM90_FORWARDS = ("specialised", "pingpong", "wide", "persistent")  # forwards alone, to choose among
FLASH3 = ("flash_attn_interface", "fa3_fwd_interface")
CONTENDERS = {
    contender.name: contender
    for contender in (
        _contender("aadkern sm90", _ours, "sm90", ours=True),
        _contender("aadkern triton", _ours, "triton", ours=True),
        _contender("aadkern sdpa", _ours, "sdpa", ours=True),
        _contender("aadkern flash", _ours, "flash"),  # our loop, their kernels: a rival
        Contender("aadkern sm90 deterministic", functools.partial(_ours, "sm90", deterministic=True), ours=True),
        *(_contender(f"sm90 {kernel}", _sm90_forward, kernel, ours=True, trains=_never) for kernel in SM90_FORWARDS),
        _contender("sm90 80 rows", _sm90_rows, 80, ours=True),
        _contender("loop, cuDNN", _sdpa_loop, SDPBackend.CUDNN_ATTENTION),
        _contender("loop, torch flash", _sdpa_loop, SDPBackend.FLASH_ATTENTION),
        _contender("loop, torch", _sdpa_loop, None),
        _contender("flex", _flex, None, trains=_on_cuda),  # no backward on the CPU up to torch 2.13
        _contender("flex FLASH", _flex, "FLASH"),
        _contender("loop, FA2", _library_loop, ("flash_attn",), "flash_attn_func"),
        _contender("loop, FA3", _library_loop, FLASH3, "flash_attn_func", trains=_fa3_trains),
        _contender("loop, FA4", _library_loop, ("flash_attn.cute",), "flash_attn_func"),
        _contender("loop, xformers", _library_loop, ("xformers.ops",), "memory_efficient_attention"),
        _contender("dense mask", _dense_mask),
    )
}
ON_CUDA = [name for name in CONTENDERS if name not in ("loop, torch", "dense mask")]
ON_CPU = ["aadkern sdpa", "loop, torch", "flex", "dense mask"]


def chosen(names: list[str] | None, device: torch.device) -> list[str]:
    """The names asked for, or all that make sense on the device. Raises ValueError for one that is none."""
    for name in names or []:
        if name not in CONTENDERS:
            raise ValueError(f"contender must be one of {'; '.join(CONTENDERS)}, got {name!r}")
    return names or (ON_CUDA if device.type == "cuda" else ON_CPU)
