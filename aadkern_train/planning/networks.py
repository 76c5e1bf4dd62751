"""A stage's networks with their shapes, and the bytes that each keeps on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aadkern_train.engine.processes import SHARD_BLOCKS_ABOVE
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.work import Member, Sizes
from aadkern_train.networks.hub import hub_folder
from aadkern_train.networks.networks import PLAIN_TEXT_DIM
from aadkern_train.networks.wan_parts import transformer_config
from aadkern_train.planning.shapes import Judge, Shape
from aadkern_train.recipes.wan import SHAPES


@dataclass(frozen=True)
class Net:
    """A network of a stage. ``judge``: what reads its taps, of a discriminator."""

    member: Member
    shape: Shape
    judge: Judge | None = None

    @property
    def depth(self) -> int | None:
        """Blocks that run; None: all, and the output."""
        return None if self.judge is None else self.judge.depth

    @property
    def blocks(self) -> int:
        """Blocks that run."""
        return self.shape.layers if self.judge is None else self.judge.depth

    @property
    def root(self) -> int:
        """Parameters outside of the blocks, which are gathered together."""
        if self.member.reads and self.judge is not None:
            return self.judge.heads
        return self.shape.root + (0 if self.judge is None else self.judge.heads)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.root + (0 if self.member.reads else self.shape.layers * self.shape.block)

    @property
    def trained(self) -> int:
        """Those that learn: not what is behind the deepest tap, nor what only texts need where there are none."""
        if not self.member.learns:
            return 0
        if self.member.reads:
            return self.parameters
        shape, idle = self.shape, 0 if self.judge is None else self.judge.idle
        return self.parameters - idle - (shape.text_embedder + self.blocks * shape.cross if shape.text is None else 0)

    @property
    def matrices(self) -> int:
        """Of the trained ones, those of the blocks' matrices: what Muon serves."""
        c, f = self.shape.dim, self.shape.ffn
        return self.blocks * ((4 if self.shape.text is None else 8) * c * c + 2 * c * f)

    @property
    def whole(self) -> bool:
        """Whether the network is gathered at once, being small."""
        return self.parameters <= SHARD_BLOCKS_ABOVE

    def state(self, ranks: int) -> dict[str, float]:
        """Bytes on each of ``ranks``: weights, and of a learner its optimiser's state and its average."""
        member = self.member
        if not member.learns:
            return {"weights": 0.0 if member.offloaded else (4 if member.fp32 else 2) * self.parameters / ranks}
        adam = 8 * self.trained - (4 * self.matrices if member.muon else 0)
        return {
            "weights": 4 * self.parameters / ranks,
            "optimiser": adam / ranks,
            "average": 4 * self.trained / ranks if member.ema else 0.0,
        }

    def gathered(self, kept: bool) -> float:
        """Bytes of the bf16 copies that a pass computes from: this block, the next, and what is outside of them; or the whole."""
        if self.member.reads:
            return 2.0 * self.root
        running = self.root + self.blocks * self.shape.block
        return 2.0 * running if kept or self.whole else 2.0 * (2 * self.shape.block + self.root)


def nets(members: tuple[Member, ...], recipe: Recipe, sizes: Sizes, roles: Mapping[str, str]) -> dict[str, Net]:
    """The networks of a stage by role. ``roles``: a size's name or a folder for a role, in place of the recipe's.

    Raises ValueError, naming the role, for a size or folder that there is none of.
    """
    by_role: dict[str, Net] = {}
    for member in members:
        model = roles.get(member.role.replace(" ", "_"), roles.get(member.role.split()[0]))
        shape = shape_of(model, member.role, recipe, sizes) if model else _own(member, recipe, sizes)
        judge = Judge(shape, member.taps, member.queries, max(1, member.reads)) if member.taps else None
        if judge is not None and judge.depth > shape.layers:
            raise ValueError(f"layers must be blocks below {shape.layers}, the {member.role}'s, got {list(member.taps)}")
        by_role[member.role] = Net(member, shape, judge)
    return by_role


def shape_of(model: str, role: str, recipe: Recipe, sizes: Sizes) -> Shape:
    """The shape of a network by the name of a size ("14b"), or of a folder in diffusers' format."""
    known = {name.lower(): size for name, size in SHAPES.items()}
    if model.lower() in known:
        text_dim = PLAIN_TEXT_DIM if sizes.text is None else sizes.text[1]
        own = {"channels": sizes.frame[0], "patch": recipe.network.patch, "text": sizes.text, "text_dim": text_dim}
        return Shape(**known[model.lower()], **own)
    folder = hub_folder(model, role, fetch=False)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{role} must be one of {', '.join(known)} or a folder in diffusers' format, got {model!r}")
    return Shape.of_config(transformer_config(folder), sizes.text)


def _own(member: Member, recipe: Recipe, sizes: Sizes) -> Shape:
    """By the recipe: the folder that its first weights lie in, or where none is named yet, the shape that it states."""
    origin = recipe.origin(member.source)
    origin = recipe.models.generator if origin is None else origin
    if origin:
        return shape_of(origin, member.role, recipe, sizes)
    settings = recipe.network
    text_dim = PLAIN_TEXT_DIM if sizes.text is None else sizes.text[1]
    freq = 256 if recipe.models.generator is not None else 64  # Wan's, and that of a run's own random networks
    shape = (settings.layers, settings.heads, settings.head_dim, settings.ffn)
    return Shape(*shape, sizes.frame[0], settings.patch, sizes.text, text_dim, freq)
