"""The ranks that share one sequence, and what they say to one another besides attention: slices in, slices out, one agreement.

``enter`` and ``leave`` bound the part of a network that runs on slices. Outside of it every rank computes the same; inside, a
gradient is this rank's part times the number of ranks, so that a mean over ranks, FSDP's, is right for all parameters alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from aadkern.checks import shown, tensor, whole
from aadkern.library import unpack

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Spans = tuple[tuple[int, int], ...]

MESSAGE = 512  # bytes in which a rank says what it came with


@dataclass(frozen=True, init=False)
class SequenceGroup:
    """The ranks of one sequence: each holds the same slice, ``spans[rank]``, of the tokens of every frame.

    ``mesh`` is a DeviceMesh of one dimension, such as ``mesh["sp"]``, a ProcessGroup, or None for one process alone;
    ``tokens_per_frame`` is a frame's number of tokens after patching. Slices differ by at most one token. A plain value: it can be
    hashed, compared, copied and pickled, and holds its process group by name. Of one rank it is a no-op.

    Raises TypeError for another mesh, ValueError for one of several dimensions or with more ranks than a frame has tokens.
    """

    rank: int
    size: int
    tokens_per_frame: int
    name: str
    spans: Spans = field(compare=False, repr=False)
    """Each rank's places [first, end) in a frame."""

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup | None, tokens_per_frame: int) -> None:
        rank, size, name = _place(mesh)
        if whole(tokens_per_frame, "tokens_per_frame", 1) < size:
            raise ValueError(f"tokens_per_frame must be at least the group's {size} ranks, got {tokens_per_frame}")
        values = {"rank": rank, "size": size, "tokens_per_frame": int(tokens_per_frame), "name": name}
        for attribute, value in (values | {"spans": spans_of(int(tokens_per_frame), size)}).items():
            object.__setattr__(self, attribute, value)

    @property
    def span(self) -> tuple[int, int]:
        """This rank's places."""
        return self.spans[self.rank]

    @property
    def tokens(self) -> int:
        """This rank's tokens of a frame."""
        first, end = self.span
        return end - first

    @property
    def process_group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]

    @contextmanager
    def together(self, name: str, statement: Callable[[], str]) -> Iterator[None]:
        """Around what a rank looks at before it talks to the others: then all ``agree`` on what is said, or on the error."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:  # told to the others, which would wait for this rank
            self.agree(f"{type(error).__name__}: {error}", name)
            raise
        self.agree(statement(), name)

    def agree(self, statement: str, name: str) -> None:
        """Raises ValueError on every rank unless all of them say the same: what would else wait for one another without end.

        One small all-gather on the host, and where the group has no backend for the host (NCCL alone) only of what was never said
        before, as the device must be waited for. Graphs that are traced, and fake process groups, agree by themselves.
        """
        if (
            self.size == 1
            or torch.compiler.is_compiling()
            or (statement in _statements.setdefault(self, set()) and not _on_host(self.name))
        ):
            return
        if dist.get_backend(self.process_group) == "fake":
            return
        device = torch.device("cpu") if _on_host(self.name) else torch.device("cuda", torch.cuda.current_device())
        words = statement.encode()
        message = crc32(words).to_bytes(4, "big") + words[: MESSAGE - 4].ljust(MESSAGE - 4)  # of long words the end counts too
        mine = torch.tensor(list(message), dtype=torch.uint8, device=device)
        rows = gathered(mine, self.name, self.size).tolist()
        other = next((rank for rank, row in enumerate(rows) if row != rows[self.rank]), None)
        if other is not None:
            heard = [bytes(row[4:]).decode(errors="replace").rstrip() for row in rows]
            raise ValueError(
                f"{name} must be alike on all {self.size} ranks of a sequence; rank {self.rank} came with {heard[self.rank]}, "
                f"rank {other} with {heard[other]}"
            )
        if len(_statements[self]) > 4096:
            _statements[self].clear()
        _statements[self].add(statement)


_statements: dict[SequenceGroup, set[str]] = {}


def spans_of(tokens: int, ranks: int) -> Spans:
    edges = [rank * tokens // ranks for rank in range(ranks + 1)]
    return tuple(itertools.pairwise(edges))


def _place(mesh: Any) -> tuple[int, int, str]:
    """This process's rank in the mesh, its number of ranks and the name of its process group."""
    if mesh is None:
        return 0, 1, ""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f'mesh must have one dimension, say mesh["sp"], got {mesh.ndim}')
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {shown(mesh)}")
    return mesh.rank(), mesh.size(), str(mesh.group_name)


@lru_cache(maxsize=256)
def _on_host(name: str) -> bool:
    """Whether the process group serves tensors of the CPU."""
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return "cpu" in {device.type for device in group._device_types}


def check_group(group: Any, name: str) -> SequenceGroup:
    if not isinstance(group, SequenceGroup):
        raise TypeError(f"{name} must be an aadkern.SequenceGroup, got {shown(group)}")
    return group


def refuse_tangents(name: str, *tensors: Any) -> None:
    """Raises RuntimeError where one of the tensors has a tangent."""
    if any(isinstance(x, Tensor) and unpack(x)[1] is not None for x in tensors):
        raise RuntimeError(f"{name} is differentiable in reverse mode only: a tangent does not travel between ranks")


def enter(x: Tensor, group: SequenceGroup) -> Tensor:
    """This rank's slice of every frame, of x [B, F, n, ...] that all ranks have: [B, F, n_r, ...].

    Backward: the slices' gradients gathered, divided by the number of ranks. Raises ValueError for another number of tokens.
    """
    check_group(group, "enter: group")
    if tensor(x, "enter: x").dim() < 3 or x.shape[2] != group.tokens_per_frame:
        raise ValueError(f"enter: x must be [B, F, {group.tokens_per_frame}, ...], got {list(x.shape)}")
    if group.size == 1:
        return x
    refuse_tangents("enter", x)
    return _Enter.apply(x, group.name, group.rank, group.spans)  # type: ignore[no-any-return]


def leave(y: Tensor, group: SequenceGroup) -> Tensor:
    """All ranks' slices [B, F, n_r, ...] put together, [B, F, n, ...], the same bytes on every rank.

    Backward: this rank's slice of the gradient, which all ranks have, times the number of ranks; no traffic. Raises ValueError
    for another number of tokens than this rank's slice has.
    """
    check_group(group, "leave: group")
    if tensor(y, "leave: y").dim() < 3 or y.shape[2] != group.tokens:
        raise ValueError(f"leave: y must be [B, F, {group.tokens}, ...] on rank {group.rank}, got {list(y.shape)}")
    if group.size == 1:
        return y
    refuse_tangents("leave", y)
    return _Leave.apply(y, group.name, group.rank, group.spans)  # type: ignore[no-any-return]


def merge_pooled(o: Tensor, lse: Tensor, group: SequenceGroup) -> Tensor:
    """What one ``attention_pool`` over all tokens would give, from each rank's over its own: o [B, segments, M, C], and
    lse [B, segments, M, H] of its softmax. Exact, as weights sum to 1; the same bytes on every rank.

    Backward: each rank's own part, times the number of ranks; no traffic. Raises ValueError for shapes that do not fit.
    """
    check_group(group, "merge_pooled: group")
    if tensor(o, "merge_pooled: o").dim() != 4 or tensor(lse, "merge_pooled: lse").dim() != 4 or o.shape[:3] != lse.shape[:3]:
        wanted = "o [B, segments, M, C] and lse [B, segments, M, H]"
        raise ValueError(f"merge_pooled: o and lse must be {wanted}, got {list(o.shape)} and {list(lse.shape)}")
    if not lse.shape[3] or o.shape[3] % lse.shape[3]:
        raise ValueError(f"merge_pooled: lse must have heads that divide o's {o.shape[3]} channels, got {lse.shape[3]}")
    if group.size == 1:
        return o
    refuse_tangents("merge_pooled", o, lse)
    wide = torch.promote_types(o.dtype, lse.dtype)
    both = torch.cat((o.to(wide), lse.to(wide)), dim=-1)
    parts, logs = _Parts.apply(both, group.name, group.rank, group.size).split([o.shape[3], lse.shape[3]], dim=-1)
    weights = torch.softmax(logs, dim=0)
    return (parts.unflatten(-1, (lse.shape[3], -1)) * weights[..., None]).sum(0).flatten(-2).to(o.dtype)


def gathered(x: Tensor, name: str, size: int) -> Tensor:
    """All ranks' x, of one shape, [size, ...]."""
    collectives = torch.ops._c10d_functional
    flat = collectives.all_gather_into_tensor(x.contiguous().flatten(), size, name)
    return collectives.wait_tensor(flat).view(size, *x.shape)


def _slices(y: Tensor, name: str, spans: Spans) -> Tensor:
    """All ranks' slices [B, F, n_r, ...] as [B, F, n, ...]. The shorter ones travel with a token of padding."""
    most = max(end - first for first, end in spans)
    padded = y if y.shape[2] == most else torch.cat((y, torch.zeros_like(y[:, :, :1])), dim=2)
    parts = gathered(padded, name, len(spans))
    return torch.cat([part[:, :, : end - first] for part, (first, end) in zip(parts.unbind(0), spans, strict=True)], dim=2)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, rank: int, spans: Spans) -> Tensor:
        ctx.name, ctx.spans = name, spans
        return x[:, :, slice(*spans[rank])].clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _slices(dout, ctx.name, ctx.spans) / len(ctx.spans), None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, name: str, rank: int, spans: Spans) -> Tensor:
        ctx.rank, ctx.spans = rank, spans
        return _slices(y, name, spans)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return dout[:, :, slice(*ctx.spans[ctx.rank])] * len(ctx.spans), None, None, None


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return gathered(x, name, size)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return dout[ctx.rank] * ctx.size, None, None, None
