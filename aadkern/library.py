"""The operators' library, and the one way in which they are differentiated: reverse mode, forward mode and torch.func alike.

``torch.library.register_autograd`` (torch 2.13) drops tangents without a word, and refuses torch.func's reverse mode. So an
operator's kernel at the dispatcher's Autograd key is ours: it runs once at each level of torch.func, as those of torch's own
operators do, and whoever calls the operator, compiled graphs too, gets the derivative or an error that names what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

library = torch.library.Library("aadkern", "DEF")


def dtypes_as_given(device_type: str) -> AbstractContextManager[Any]:
    """Kernels compute in the dtypes they are given, also under the caller's autocast."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def unpack(argument: Any) -> tuple[Any, Tensor | None]:
    """Primal and tangent of an operator's argument; the tangent is None where there is none."""
    return forward_ad.unpack_dual(argument, level=0) if isinstance(argument, Tensor) else (argument, None)


def pack(primal: Tensor, tangent: Tensor) -> Tensor:
    """The dual of the two; forward mode has one level, torch.func's others lie inside the tensors."""
    return forward_ad.make_dual(primal, tangent, level=0)


def _may_carry_tangents(arguments: Sequence[Any]) -> bool:
    """Cheaply, as unpacking costs 5 microseconds a tensor. A graph that is being traced enters forward mode behind Python's back:
    there (tensors are of another type) and under torch.func one must look."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(x, Tensor) and type(x) is not Tensor for x in arguments)


@contextmanager
def _outer_levels_record() -> Iterator[None]:
    """A Function turns recording off inside its forward, also for torch.func's outer levels, which see the call there."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def differentiable(
    name: str,
    *,
    refusal: str,
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
    forward_mode: Callable[..., Any] | None = None,
) -> None:
    """Says how operator ``aadkern::name`` is differentiated; without a rule, differentiating raises RuntimeError(``refusal``).

    ``save(ctx, inputs, output)`` and ``gradients(ctx, *gradients of the outputs)`` are as for ``torch.library.register_autograd``;
    ``forward_mode(*arguments)`` is called where an argument carries a tangent, and returns the outputs with theirs.
    """
    operator = getattr(torch.ops.aadkern, name).default

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, keyset = arguments
        with _outer_levels_record() if torch._C._are_functorch_transforms_active() else nullcontext():
            output = below(keyset, inputs)
        if save is not None:
            save(ctx, tuple(inputs), output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradients is None:
            raise RuntimeError(refusal)
        return (*gradients(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded: Any = type(f"aadkern_{name}", (torch.autograd.Function,), methods)
    # One level of torch.func is what a kernel at the Autograd key serves; Function.apply itself would begin with all of them.
    apply = super(torch.autograd.Function, recorded).apply

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if _may_carry_tangents(arguments) and any(unpack(x)[1] is not None for x in arguments):
            if forward_mode is None:
                raise RuntimeError(refusal)
            return forward_mode(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if not torch._C._are_functorch_transforms_active():
                return apply(*arguments, keyset)
            with enable_single_level_autograd_function():
                return apply(*arguments, keyset)
        return below(keyset, arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def batched_by_folding(name: str, tensors: int) -> None:
    """Says how ``torch.func.vmap`` runs operator ``aadkern::name``: once, over a batch that holds all samples.

    The batch is dimension 0 of its first ``tensors`` arguments, which may be None, and of all its outputs.
    """
    operator = getattr(torch.ops.aadkern, name).default

    def folded(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            samples = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return samples.flatten(0, 1)

        inputs = [fold(x, dim) for x, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)]
        outputs = operator(*inputs, *arguments[tensors:])
        return tuple(y.unflatten(0, (info.batch_size, y.shape[0] // info.batch_size)) for y in outputs), (0,) * len(outputs)

    torch.library.register_vmap(f"aadkern::{name}", folded, lib=library)
