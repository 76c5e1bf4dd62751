"""The operator of noised views: schema, fake kernel, derivatives. Kernel files are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from aadkern.library import differentiable, dtypes_as_given, library, pack, unpack
from aadkern.runtime import choose_fused_backend
from aadkern.spans import span

library.define(
    "noised_views(Tensor x0, Tensor sigma, Tensor delta_std, Tensor seed, int first_sample, str backend) "
    "-> (Tensor x_sigma, Tensor x_perturbed)"
)


@torch.library.impl(library, "noised_views", "CompositeExplicitAutograd")
def _noised_views(
    x0: Tensor, sigma: Tensor, delta_std: Tensor, seed: Tensor, first_sample: int, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = choose_fused_backend("noised_views", backend, x0.device.type, str(x0.dtype).removeprefix("torch."))
    file = "triton_views" if chosen == "triton" else "reference"
    kernel = importlib.import_module(f"aadkern.noise.{file}").forward
    with span("noised_views"), dtypes_as_given(x0.device.type):
        return kernel(x0, sigma, delta_std, seed, first_sample)


@torch.library.register_fake("aadkern::noised_views", lib=library)
def _noised_views_fake(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0)


def _save_sigma(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _noised_views_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Both views hold (1 - sigma) x0; the noise is not drawn again."""
    (sigma,) = ctx.saved_tensors
    total = sum(g.to(sigma.dtype) for g in gradients if g is not None)
    dx0 = (1.0 - sigma)[:, :, None, None, None] * total if isinstance(total, Tensor) else None
    return (None if dx0 is None else dx0.to(ctx.dtype), None, None, None, None, None)


def _views_of_duals(x0: Tensor, sigma: Tensor, delta_std: Tensor, seed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (x0, tangent), *others = map(unpack, (x0, sigma, delta_std, seed))
    if tangent is None or any(of_other is not None for _, of_other in others):
        raise RuntimeError("aadkern.noised_views is differentiable in x0 alone: sigma and delta_std may not carry a tangent")
    gradient = ((1.0 - sigma)[:, :, None, None, None] * tangent.to(sigma.dtype)).to(x0.dtype)
    x_sigma, x_perturbed = noised_views(x0, sigma, delta_std, seed, *rest)
    return pack(x_sigma, gradient), pack(x_perturbed, gradient)


differentiable(
    "noised_views",
    save=_save_sigma,
    gradients=_noised_views_gradient,
    forward_mode=_views_of_duals,
    refusal="aadkern.noised_views is differentiable in x0 alone",
)

noised_views = torch.ops.aadkern.noised_views.default
