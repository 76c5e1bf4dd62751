"""Random pooling problems, the layer that ``attention_pool`` replaces in the inputs' own dtype, and the comparison against fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import aadkern
from aadkern import testing
from aadkern.pooling import reference

DEFAULTS = {"eps": 1e-6} | dict.fromkeys(("b_k", "b_v", "norm_weight", "norm_bias", "k_norm_weight"))


def make(
    *, batch=2, length=12, channels=16, queries=2, heads=4, norm="rms", keys=None, biases=True, segments=1, dtype=torch.float64
):
    """(tensors, settings): what ``attention_pool`` takes. Scores spread over several units, tokens have a mean of their own.

    ``keys``: None, "head" or "full", what k_norm_weight covers.
    """

    def normal(*shape, size=1.0):
        return size * torch.randn(shape, dtype=torch.float64)

    tensors = {
        "x": normal(batch, length, channels, size=2) + normal(batch, 1, channels),
        "query": normal(queries, channels, size=1.5),
        "w_k": normal(channels, channels, size=channels**-0.5),
        "w_v": normal(channels, channels, size=channels**-0.5),
    }
    if biases:
        tensors |= {"b_k": normal(channels), "b_v": normal(channels)}
    if norm is not None:
        tensors["norm_weight"] = 1 + normal(channels, size=0.3)
    if norm == "layer":
        tensors["norm_bias"] = normal(channels, size=0.3)
    if keys is not None:
        tensors["k_norm_weight"] = 1 + normal(channels if keys == "full" else channels // heads, size=0.3)
    return {name: x.to(dtype) for name, x in tensors.items()}, {"heads": heads, "norm": norm, "segments": segments}


def run(f, tensors, gradient, **settings):
    """f's output and the gradients of all tensors, by name; settings that are tensors give way to ``tensors``."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = f(**settings | leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype), allow_unused=True)
    named = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), **named}


def naive(x, query, w_k, w_v, *, heads, norm, segments, eps=1e-6, **weights):
    """Norm, two Linears and attention as a discriminator's head would be written, each step rounded to the inputs' dtype."""
    tokens = x.reshape(x.shape[0] * segments, -1, x.shape[-1])
    if norm == "rms":
        tokens = F.rms_norm(tokens, tokens.shape[-1:], weights.get("norm_weight"), eps)
    elif norm == "layer":
        tokens = F.layer_norm(tokens, tokens.shape[-1:], weights.get("norm_weight"), weights.get("norm_bias"), eps)
    k, v = F.linear(tokens, w_k, weights.get("b_k")), F.linear(tokens, w_v, weights.get("b_v"))
    k_norm = weights.get("k_norm_weight")
    if k_norm is not None:
        k = F.rms_norm(k.unflatten(-1, (-1, len(k_norm))), k_norm.shape, k_norm, eps).flatten(-2)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(-3, -2) for y in (query, k, v))
    p = torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, -1)
    return (p @ v).transpose(1, 2).flatten(-2).unflatten(0, (x.shape[0], segments))


def gradient_for(tensors, settings):
    batch, _, channels = tensors["x"].shape
    return torch.randn(batch, settings["segments"], tensors["query"].shape[0], channels, dtype=torch.float64)


def results(backend, tensors, settings, gradient=None):
    """By name (ours, fp64's, plain torch's in the same dtype)."""
    gradient = gradient_for(tensors, settings) if gradient is None else gradient
    gradient = gradient.to(tensors["x"].dtype)
    actual = run(aadkern.attention_pool, tensors, gradient, backend=backend, **settings)
    double = {name: x.double() for name, x in tensors.items()}
    truth = run(reference.attention_pool, double, gradient, **DEFAULTS | settings)
    plain = run(naive, tensors, gradient, **settings)
    return {name: (actual[name], truth[name], plain[name]) for name in actual}


def check(backend, *problems):
    """Outputs and all gradients of some (tensors, settings), together: within the budget that plain torch's errors set."""
    every = [results(backend, *problem) for problem in problems]
    for name in every[0]:
        ours, truth, plain = (torch.cat([one[name][i].flatten() for one in every]) for i in range(3))
        testing.assert_close_to_reference(ours, truth, plain, name)
    return every[0]


def with_lse(backend, tensors, settings, of_pooled=True):
    """Pooled tokens, lse, and the gradients of all tensors through both (or through lse alone), by name; and the reference's."""
    generator = torch.Generator().manual_seed(1)

    def one(function, given, **more):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        outs = function(**leaves, **settings, **more, return_lse=True)
        losses = [
            (out * torch.randn(out.shape, generator=generator.manual_seed(i)).to(out.dtype)).sum() for i, out in enumerate(outs)
        ]
        grads = torch.autograd.grad(sum(losses[0 if of_pooled else 1 :]), list(leaves.values()), allow_unused=True)
        zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
        found = {name: zeros[name] if g is None else g for name, g in zip(leaves, grads, strict=True)}
        return {"pooled": outs[0].detach(), "lse": outs[1].detach(), **found}

    double = {name: x.double() for name, x in tensors.items()}
    missing = {name: None for name in DEFAULTS if name not in tensors and name != "eps"}
    return one(aadkern.attention_pool, tensors, backend=backend), one(reference.attention_pool, double, eps=1e-6, **missing)


def check_kernels(backend, *problems, gradient=None):
    """``check`` with room for what scores and an lse of this size cost in float32; the gradient of out is the same for all.

    exp(s - lse) rounds s in base 2, lse and lse log2(e) by 2^-24 of itself, where plain torch rounds the score once.
    """
    every = [results(backend, *problem, gradient) for problem in problems]
    u_scores = [(tensors["query"].double() @ tensors["w_k"].double()) / settings["heads"] ** 0.5 for tensors, settings in problems]
    size = 1 + max(scores.norm(dim=-1).max().item() for scores in u_scores)
    for name in every[0]:
        ours, truth, plain = (torch.cat([one[name][i].flatten() for one in every]) for i in range(3))
        slack = 3 * 2.0**-24 * size * max(1.0, truth.abs().max().item())
        testing.assert_close_to_reference(ours, truth, plain, name, slack)
    return {name: one[0] for name, one in every[0].items()}
