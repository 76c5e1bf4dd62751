"""What arguments may be: the checks that several rooms share. An error is one line: the argument, what is accepted, what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOST = 2**31 - 1  # of any count: the tables that kernels read are int32
LONGEST = 80  # characters of a value in an error


def shown(value: Any) -> str:
    """``value`` on one short line; of tensors and arrays the type alone, as what they hold may lie on a GPU."""
    if hasattr(type(value), "untyped_storage") or hasattr(type(value), "__array_interface__"):
        return type(value).__name__
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr may do anything
        return type(value).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def whole(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """``value`` as an int in [least, most]; TypeError for what is no whole number, ValueError beyond the bounds."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except Exception:  # no whole number, or a tensor or array of several
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, got {shown(number)}")
    return int(number)


def real(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """``value`` as a finite float in [least, most]; no tensor, which may lie on a GPU."""
    number = None
    if not isinstance(value, (bool, str, bytes)) and not hasattr(type(value), "untyped_storage"):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except Exception:
            number = None
    if number is None:
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(number) or number < least:
        wanted = "finite" if least == -math.inf else "finite and not negative" if least == 0 else f"finite and at least {least:g}"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most:g}, got {shown(value)}")
    return number


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(value: Any, name: str, accepted: Iterable[str], none: bool = False) -> Any:
    """``value``, one of the ``accepted`` names, or None with ``none``; ValueError for anything else."""
    if (value is None and none) or (isinstance(value, str) and value in accepted):
        return value
    raise ValueError(f"{name} must be one of {', '.join(accepted)}{', or None' if none else ''}, got {shown(value)}")


def three(value: Any, name: str, wanted: str) -> None:
    """Raise TypeError for what is no tuple or list, ValueError for one of another length than 3."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    if len(value) != 3:
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")


def tensor(value: Any, name: str) -> torch.Tensor:
    """``value``, a dense tensor: TypeError for anything else, sparse and nested tensors too."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    return value


def device(value: Any, name: str) -> torch.device:
    """``value`` as a torch.device that is here: a device, its name, or the number of a GPU."""
    import torch

    if not isinstance(value, (torch.device, str, int)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a torch.device or its name, got {shown(value)}")
    try:
        result = torch.device(value)
    except Exception as error:  # RuntimeError for a name; for a number whatever the accelerator's absence raises
        raise ValueError(f"{name} must be a torch.device or its name, such as 'cpu' or 'cuda:0', got {shown(value)}") from error
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} must be one that is here, got '{result}': torch sees {torch.cuda.device_count()} CUDA devices")
    if result.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(0, device=result)
        except Exception as error:  # of many kinds, by what is missing
            raise ValueError(f"{name} must be one that is here, got '{result}'") from error
    return result


def dtype(value: Any, name: str, accepted: Iterable[torch.dtype]) -> torch.dtype:
    """``value``, one of the ``accepted`` dtypes."""
    import torch

    if not isinstance(value, torch.dtype) or value not in accepted:
        error = ValueError if isinstance(value, torch.dtype) else TypeError
        raise error(f"{name} must be one of {', '.join(str(x).removeprefix('torch.') for x in accepted)}, got {shown(value)}")
    return value


def finite_weights(model: torch.nn.Module, name: str, where: Any) -> None:
    """Raises ValueError where a model that came from ``where`` holds a weight that is NaN or infinite in its dtype."""
    for parameter, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must hold finite weights, {parameter} in {where} does not as {tensor.dtype}")


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements may lie in one place: every stride must pass what the smaller ones span."""
    return _overlapping(list(zip(x.shape, x.stride(), strict=True)))


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may share memory: told exactly where their spans are apart or their strides equal, else yes."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not a.numel() or not b.numel():
        return False
    apart = int(b.storage_offset() - a.storage_offset())
    spans = [1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in (a, b)]
    if apart >= spans[0] or -apart >= spans[1]:
        return False
    if a.shape != b.shape or a.stride() != b.stride():
        return True
    return _overlapping([*zip(a.shape, a.stride(), strict=True), (2, abs(apart))])


def _overlapping(dims: list[tuple[int, int]]) -> bool:
    span = 1
    for size, stride in sorted(((n, stride) for n, stride in dims if n > 1), key=lambda dim: dim[1]):
        if stride < span:
            return True
        span += (size - 1) * stride
    return False
