"""FP8 (e4m3) linear layers for a CausalWan that only generates: ``quantise(model)``, which reports their error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from aadkern.checks import boolean, shown
from aadkern.fp8 import Fp8Linear
from aadkern.fp8.api import DTYPES, MULTIPLE
from aadkern.wan.model import CausalWan

# Of a block; the text's keys and values (attn2.to_k, attn2.to_v) are made once a prompt, and stay.
SELF_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
LAYERS = (*SELF_ATTENTION, "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
LEAST_CAPABILITY = (8, 9)
MEASURED_ROWS = 64  # of each layer's input; the norm over rows x outputs is then good to a per cent of itself


@dataclass(frozen=True)
class LayerError:
    """One layer's output against fp64: |y - y64| / |y64| over all measured rows; ``before`` is that of the layer it replaced."""

    name: str
    in_features: int
    out_features: int
    error: float
    before: float


@dataclass(frozen=True)
class Fp8Report:
    """What ``quantise`` did, and what it costs; ``print`` it.

    ``flow_error`` is |flow - flow before| / |flow before| of the sample, None without one; then the layers' inputs were
    standard normal.
    """

    layers: tuple[LayerError, ...]
    bytes_before: int
    bytes_after: int
    flow_error: float | None

    def __str__(self) -> str:
        inputs = "standard normal rows" if self.flow_error is None else "the sample's own activations"
        lines = [
            f"{len(self.layers)} linear layers in FP8 (e4m3): {self.bytes_before / 1e6:.4g} MB -> {self.bytes_after / 1e6:.4g} MB",
            f"relative error of a layer's output against fp64, on {inputs}:",
            f"{'layer':15} {'in':>6} {'out':>6} {'median':>8} {'worst':>8} {'in block':>9} {'before':>8}",
        ]
        for kind in LAYERS:
            same = sorted((x for x in self.layers if x.name.endswith(f".{kind}")), key=lambda x: x.error)
            middle, worst = same[len(same) // 2], same[-1]
            block, before = worst.name.split(".")[1], max(x.before for x in same)
            sizes = f"{kind:15} {worst.in_features:6} {worst.out_features:6}"
            lines.append(f"{sizes} {middle.error:8.2%} {worst.error:8.2%} {block:>9} {before:8.2%}")
        if self.flow_error is not None:
            lines.append(f"flow of the sample: {self.flow_error:.2%} from what it was before")
        return "\n".join(lines)


@torch.no_grad()
def quantise(model: CausalWan, sample: Mapping[str, Any] | None = None, *, fast_accum: bool = True) -> Fp8Report:
    """Replace the large linear layers of ``model``'s blocks by ``Fp8Linear``, in place, and say what error that makes.

    Replaced are ``LAYERS``: self-attention's four, cross-attention's query and output, the feed-forward's two. ``sample``: the
    keyword arguments of one call of the model, without a cache (``hidden_states``, ``timestep``, ``encoder_hidden_states``, ...),
    best a real latent at its noise level. It is run before and after, and 64 rows of each layer's true input are kept
    for the report; without it the rows are standard normal, which have no outliers. ``fast_accum``: see
    ``aadkern.fp8.scaled_product``.

    Raises TypeError for another model, layer or dtype, ValueError for a model quantised already, widths that are no multiples
    of 16, weights that are not finite, a GPU without FP8 or a sample with a cache; all before anything is replaced.
    """
    if not isinstance(model, CausalWan):
        raise TypeError(f"model must be a CausalWan, got {type(model).__name__}")
    if sample is not None and not isinstance(sample, Mapping):
        raise TypeError(f"sample must be a dictionary of the model's arguments, got {type(sample).__name__}")
    accepted = inspect.signature(CausalWan.forward).parameters
    unknown = [name for name in sample or () if name == "self" or name not in accepted]
    if unknown:
        wanted = ", ".join(name for name in accepted if name != "self")
        raise ValueError(f"sample must hold arguments of the model, {wanted}, got {shown(unknown[0])}")
    for name in ("hidden_states", "timestep"):
        if sample is not None and name not in sample:
            raise ValueError(f"sample must hold {name}, got {', '.join(sample) or 'nothing'}")
    boolean(fast_accum, "fast_accum")
    if sample is not None and sample.get("cache") is not None:
        raise ValueError("sample must be without a cache, which a call changes: give a plan or nothing in its place")
    linears = dict(_linears(model))
    for name, linear in linears.items():
        _check(name, linear)
    rows, flow = (dict[str, Tensor](), None) if sample is None else _observe(model, linears, sample)
    layers, before, after = [], 0, 0
    for name in list(linears):
        linear = linears.pop(name)  # and freed, once replaced: 14B's layers are 24 GB in bf16
        replacement = Fp8Linear(linear, fast_accum).train(linear.training)
        layers.append(_measure(name, linear, replacement, rows.get(name)))
        before += linear.weight.nbytes
        after += replacement.weight_e4m3.nbytes + replacement.weight_scale.nbytes
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    flow_error = None if flow is None or sample is None else _relative(model(**sample), flow.double())
    return Fp8Report(tuple(layers), before, after, flow_error)


def _linears(model: CausalWan) -> Iterator[tuple[str, nn.Linear]]:
    for block in range(len(model.blocks)):
        for kind in LAYERS:
            name = f"blocks.{block}.{kind}"
            linear = model.get_submodule(name)
            if isinstance(linear, Fp8Linear):
                raise ValueError(f"model must not be quantised yet, and {name} is")
            if type(linear) is not nn.Linear:
                raise TypeError(f"model must have plain linear layers (merge adapters first), {name} is a {type(linear).__name__}")
            yield name, linear


def _check(name: str, linear: nn.Linear) -> None:
    weight = linear.weight
    if weight.dtype not in DTYPES:
        raise TypeError(f"model must be in float32, float16 or bfloat16, {name} is in {weight.dtype}")
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        raise ValueError(f"model must have widths that are multiples of {MULTIPLE}, {name} is {list(weight.shape)}")
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(weight.device)
        raise ValueError(f"model must be on a GPU of compute capability 8.9 or later, which have FP8, this has {major}.{minor}")
    if weight.is_cuda and weight.dtype == torch.float32 and torch.cuda.get_device_capability(weight.device) != (9, 0):
        raise TypeError(
            f"model must be in bfloat16 or float16 on this GPU, whose FP8 products give no float32, {name} is in float32"
        )
    if not weight.isfinite().all():
        raise ValueError(f"model must have finite weights, {name} has not")


def _observe(model: CausalWan, linears: dict[str, nn.Linear], sample: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Some rows of each layer's input, and the flow."""
    rows: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            rows[name] = x[:: max(1, len(x) // MEASURED_ROWS)][:MEASURED_ROWS].clone()

        return hook

    handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    try:
        flow = model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(flow, Tensor):
        raise TypeError(f"sample must make the model return its flow alone, got {type(flow).__name__}")
    return rows, flow


def _measure(name: str, linear: nn.Linear, replacement: Fp8Linear, rows: Tensor | None) -> LayerError:
    """Both layers against fp64 on ``rows``: a layer that a sample does not reach (no text) is measured on normal ones."""
    weight = linear.weight
    if rows is None:
        generator = torch.Generator(weight.device).manual_seed(0)
        shape = (MEASURED_ROWS, linear.in_features)
        rows = torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
    exact = nn.functional.linear(rows.double(), weight.double(), None if linear.bias is None else linear.bias.double())
    errors = [_relative(layer(rows), exact) for layer in (replacement, linear)]
    return LayerError(name, linear.in_features, linear.out_features, *errors)


def _relative(actual: Tensor, exact: Tensor) -> float:
    return cast(float, ((actual.double() - exact).norm() / exact.norm()).item())
