"""One process or many, by the same path: the process group, FSDP2 sharding, and what ranks agree on.

A process without torchrun is alone with its own process group (an in-process store, no port), so sharding,
checkpoints and clipping have one code path. The gradient is the mean over ranks of each rank's mean.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from aadkern import SequenceGroup
from aadkern_train.engine.peers import Peers, rendezvous

SHARD_BLOCKS_ABOVE = 50_000_000
"""Parameters of a module above which its blocks are sharded one by one, so that only one block is gathered at a time.

Below it the whole is gathered at once (at most 200 MB in fp32), because hooks cost time: at 277 thousand parameters in
4 blocks, on one CPU thread, the root's add 3 ms to a training step, and each block's 0.25 ms to a forward and 1.1 ms to
a forward with backward: 6 % of a 90 ms step, 15 to 20 % of a rollout with chunk replay (torch 2.13).
"""

WHOLE_GRADIENTS_BELOW = 1_000_000_000
"""Parameters of a module from which on gradients are reduced after every backward of several, not after the last alone.

Without reduction FSDP2 keeps whole gradients in fp32 and, so as not to gather again, whole weights: 4 + 2 bytes a parameter, 6 GB
here and 86 GB at 14 billion, where a reduced gradient's share is 57 GB over the number of ranks.
"""

T = TypeVar("T")


class OtherRankError(RuntimeError, ValueError):
    """What ended another rank's part of a common work, told to this one. A ValueError too, since the command line tells those in
    one line, and the other rank has told the rest."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run: rank of size, this rank's device, and two views of all ranks.

    ``mesh`` is over what weights are cut: "shard", with "replicate" before it where several groups hold whole networks. ``clips``
    is ("data", "sequence"): ranks of one sequence share every clip's tokens and compute all else alike, others have clips of their
    own. ``peers`` is what ranks know of one another besides; None for one that is alone, or whose group was there before.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    owns_group: bool
    clips: DeviceMesh | None = None
    peers: Peers | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def sequence_size(self) -> int:
        """Ranks that share each clip's tokens."""
        return 1 if self.clips is None else self.clips["sequence"].size()

    @property
    def data_size(self) -> int:
        """Groups of ranks that have clips of their own."""
        return self.size // self.sequence_size

    @property
    def data_rank(self) -> int:
        """This rank's group among those."""
        return self.rank // self.sequence_size

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one of its sequence that writes what all of it have."""
        return self.rank % self.sequence_size == 0

    def sequence(self, tokens_per_frame: int) -> SequenceGroup | None:
        """The ranks that share each clip's tokens, None where each has clips of its own."""
        return None if self.sequence_size == 1 else SequenceGroup(self.clips["sequence"], tokens_per_frame)  # type: ignore[index]

    def local_slice(self, samples: Sequence[int]) -> Sequence[int]:
        """This rank's samples of a global batch: contiguous, of equal number on all ranks (else ValueError)."""
        share, rest = divmod(len(samples), self.data_size)
        if rest or not share:
            of = f" in groups of {self.sequence_size}" if self.sequence_size > 1 else ""
            raise ValueError(f"a batch of {len(samples)} samples cannot be shared equally by {self.size} processes{of}")
        return samples[self.data_rank * share : (self.data_rank + 1) * share]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank gives the same keys in the same order."""
        if self.size == 1 or not values:
            return {name: float(value) for name, value in values.items()}
        total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All samples' rows [n, ...] after one another, [data_size * n, ...], on every rank; n is equal on all ranks."""
        if self.data_size == 1:
            return rows
        out = rows.new_empty((self.data_size * rows.shape[0], *rows.shape[1:]))
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name of the same (torch 2.13)
        gather(out, rows.contiguous(), group=self.clips["data"].get_group())  # type: ignore[index]
        return out

    def gathered(self, value: T) -> list[T]:
        """Every rank's (picklable) value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on the main rank; every rank gets its (picklable) result, or an OtherRankError for its error.

        What the disk holds is asked here too: two ranks that look for themselves may find different things while one writes, and
        then wait for each other for ever. ``action`` must not make ranks meet (no second ``on_main`` within).
        """
        if self.size == 1:
            return action()
        outcome: list[object] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as caught:
                error = caught
                outcome[1] = f"{type(caught).__name__} on the main process: {caught}"
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise OtherRankError(outcome[1])
        return outcome[0]  # type: ignore[return-value]

    def agreed(self, action: Callable[[], T]) -> T:
        """This rank's own result of ``action``, once all ranks have theirs: where one raises, every rank does."""
        if self.size == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failed = torch.tensor([self.rank if error is not None else self.size], device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MIN)
        if error is not None:
            raise error
        if failed.item() < self.size:
            raise OtherRankError(f"rank {failed.item()} could not read its data, and said why; this rank stops too")
        return result  # type: ignore[return-value]

    def at(self, place: str) -> None:
        """Notes what this rank does, for others that may wait for it in vain."""
        if self.peers is not None:
            self.peers.at(place)

    def during(self, what: str, action: Callable[[], T]) -> T:
        """``action()``, within what this rank is at."""
        if self.peers is None:
            return action()
        place = self.peers.place
        self.peers.at(f"{place}, {what}")
        result = action()
        self.peers.at(place)
        return result

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor([number], device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest.item())

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Ends the process group if `start` made it; safe to call twice."""
        if self.owns_group and dist.is_initialized():
            if self.size > 1:
                # gloo's threads drop their last tensors under the GIL; where the interpreter ends before they got it,
                # they abort the process (seen in 2 of 12 runs with torch 2.13). Sleeping leaves the GIL to them.
                time.sleep(0.1)
            dist.destroy_process_group()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def device_of(name: str | None) -> torch.device:
    """The device of a name, None: the GPU if there is one. Raises ValueError for one that is not there."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or available)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", available):
        raise ValueError(f"device must be cpu: torch finds no {device.type} device here, got {name!r}")
    return device


def start(
    device: str | None = None,
    timeout_minutes: float = 30.0,
    *,
    replicate: int = 1,
    sequence: int = 1,
    alike: Mapping[str, Any] | None = None,
) -> Processes:
    """Joins the processes that torchrun started, or is alone: `with start() as processes:`.

    A process group that exists already is used, and left open.
    device: "cpu" or "cuda", by default cuda where there is one. gloo serves the CPU, NCCL (with gloo) CUDA.
    ``timeout_minutes``: how long a rank waits for the others. ``alike``: what all ranks must have come with alike, else ValueError.
    ``sequence`` neighbouring ranks share each clip's tokens, and whole networks lie in each of ``replicate`` groups; both must
    divide the number of processes (else ValueError).
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device; use device='cpu'")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    owns_group, peers = not dist.is_initialized(), None
    if owns_group:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            store, rank, size = rendezvous(timeout)
            if size > 1:
                words = {"parallel": {"replicate": replicate, "sequence": sequence}, **(alike or {})}
                peers = Peers.meet(dist.PrefixStore("aadkern", store), rank, size, timeout_minutes, words)
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    size = dist.get_world_size()
    here = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    if size % (replicate * sequence):
        if owns_group:
            dist.destroy_process_group()
        parts = f"replicate {replicate} and sequence {sequence}"
        raise ValueError(f"parallel must have parts whose product divides the {size} processes, got {parts}")
    # Ranks in rows: replicate, shard, sequence. Two meshes and no flattened one, as torch has no public call for that (2.13).
    weights = (size,) if replicate == 1 else (replicate, size // replicate)
    mesh = init_device_mesh(kind, weights, mesh_dim_names=("replicate", "shard")[-len(weights) :])
    clips = init_device_mesh(kind, (size // sequence, sequence), mesh_dim_names=("data", "sequence"))
    if owns_group:
        for group in {*mesh.get_all_groups(), *clips.get_all_groups()}:
            _set_pg_timeout(timeout, group)  # a mesh's own groups get torch's 30 minutes, and no other way is public (2.13)
    return Processes(dist.get_rank(), size, here, mesh, owns_group, clips, peers)


def shard(
    module: nn.Module,
    processes: Processes,
    blocks: Iterable[nn.Module] = (),
    *,
    bf16: bool | None = None,
    storage: torch.dtype | None = None,
    offload: bool = False,
    shard_blocks_above: int | None = None,
) -> nn.Module:
    """Applies FSDP2 to the module in place, and returns it: parameters become DTensors sharded over the ranks.

    What is on the meta device gets memory for this rank's part alone, of any content: fill it before use. The blocks are sharded
    one by one only when the module has more than shard_blocks_above (SHARD_BLOCKS_ABOVE) parameters. ``storage`` is the dtype that
    parameters are kept in (None: as they are); bf16 (default: on CUDA) computes in bf16 from them and reduces gradients in fp32.
    Inputs are not cast (a sigma in bf16 would be off by half a percent), so in bf16 the module casts what it multiplies.
    ``offload`` keeps the shards in host memory and copies each block over for its pass: CUDA only, and for a frozen module. Freeze
    before; build optimisers and Ema afterwards.
    """
    use_bf16 = processes.device.type == "cuda" if bf16 is None else bf16
    if offload and processes.device.type != "cuda":
        raise ValueError(f"offload must be False for a module on {processes.device.type}, whose memory is the host's, got True")
    home = torch.device("cpu") if offload else processes.device

    def placed(t: Tensor) -> Tensor:
        return t.to("meta" if t.is_meta else home, storage if storage is not None and t.is_floating_point() else t.dtype)

    module._apply(placed)  # Module.to, but it takes what is on meta too
    options: dict[str, Any] = {
        "mesh": processes.mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if use_bf16 else None, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    limit = SHARD_BLOCKS_ABOVE if shard_blocks_above is None else shard_blocks_above
    if sum(p.numel() for p in module.parameters()) > limit:
        for block in blocks:
            fully_shard(block, **options)
    fully_shard(module, **options)
    module.computes_in = torch.bfloat16 if use_bf16 else None  # type: ignore[assignment]
    # Module.to_empty, but for what is on meta alone: a discriminator's heads are real already.
    return module._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds any part of the module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a sharded module computes in, where its weights are kept in another; None: in theirs."""
    return getattr(module, "computes_in", None)


def reshard(module: nn.Module) -> None:
    """Drops gathered copies, so that `module.parameters()` are the shards and the next forward sees changes to them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _roots(module: nn.Module) -> list[FSDPModule]:
    """The parts that FSDP2 was applied to last: what else it holds lies within them."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _roots(child)]


@contextlib.contextmanager
def kept_gathered(module: nn.Module, active: bool = True) -> Iterator[None]:
    """Within, each part of a sharded module is gathered once and then stays so, through any number of passes: the traffic of one
    gathering for the memory of the whole in the dtype that it computes in. Its weights must not change within."""
    roots = _roots(module) if active else []
    try:
        for root in roots:
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(False)
        yield
    finally:
        for root in roots:  # fully_shard's own way: blocks are dropped after their forward, what the root holds is not
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)
            root.set_reshard_after_backward(True)
            reshard(root)


@contextlib.contextmanager
def accumulating(*modules: nn.Module, last: bool) -> Iterator[None]:
    """Around each backward of several: gradients add up, and are whole and reduced over ranks after the last.

    for c in chunks: with accumulating(generator, last=c == chunks[-1]): torch.autograd.backward(forward(c), grad[c])

    They add up on the rank, and are reduced in the last backward alone; of a module of WHOLE_GRADIENTS_BELOW parameters or more
    each backward reduces its own, and this rank's part of the sum is all that is kept.
    """
    parts = [part for module in modules if not _is_large(module) for part in module.modules() if isinstance(part, FSDPModule)]
    # A part that nothing trains may never be gathered, as what lies behind a last tap: FSDP2 (2.13) would raise for its gradients.
    sharded = [part for part in parts if any(p.requires_grad for p in part.parameters())]  # type: ignore[attr-defined]
    try:
        for part in sharded:
            part.set_requires_gradient_sync(last, recurse=False)
            part.set_reshard_after_backward(last, recurse=False)
        yield
    finally:
        for part in sharded:
            part.set_requires_gradient_sync(True, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)


def _is_large(module: nn.Module) -> bool:
    # By parts: an adapted network's own parameters are its adapters, and its base is gathered with them.
    return sum(p.numel() for part in module.modules() for p in part.parameters(recurse=False)) >= WHOLE_GRADIENTS_BELOW


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scales the gradients to a total 2-norm of at most max_norm; returns the norm before, equal on all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory; the tensor itself when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered on every rank; the tensor itself when it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part, as like is sharded, of a whole tensor that every rank has."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor are this rank's part of it: FSDP shards the first dimension."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    (part,) = tensor.__create_chunk_list__()  # what torch's own checkpoints ask a DTensor
    return slice(part.offsets[0], part.offsets[0] + part.sizes[0])
