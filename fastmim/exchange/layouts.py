"""What each library calls the tensors of a ViT and of MAE's decoder; the one place that knows."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.config_objective import MAEConfig
from fastmim.models.position import sincos_positions

_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.layers\.(\d+)\.(.+)\.(weight|bias)")
PATCH_EMBED = "encoder.patch_embed.weight"
CLS_TOKEN = "encoder.cls_token"
POSITIONS = "encoder.pos_embed"
"""Among the tensors where it was learned."""


@dataclass(frozen=True)
class Layout:
    """How a library names what we have.

    Attributes:
        name: of the library.
        stems: our names outside of the blocks, and theirs; the endings `.weight` and `.bias` are alike.
        blocks: what comes before the number of a block, of the encoder and of the decoder.
        parts: our names within a block, and theirs: several where they split our rows evenly.
        positions: the stored position tables, of the encoder and of the decoder.
        heads: beginnings of what only a classifier has, which pre-training leaves out.
    """

    name: str
    stems: dict[str, str]
    blocks: dict[str, str]
    parts: dict[str, tuple[str, ...]]
    positions: dict[str, str]
    heads: tuple[str, ...] = ()

    def names(self, key: str) -> tuple[str, ...]:
        """Their names of our tensor `key`; several where they split its rows evenly."""
        if match := _BLOCK.fullmatch(key):
            side, number, part, ending = match.groups()
            return tuple(f"{self.blocks[side]}.{number}.{name}.{ending}" for name in self.parts[part])
        if key == POSITIONS:
            return (self.positions["encoder"],)
        if key in self.stems:
            return (self.stems[key],)
        stem, _, ending = key.rpartition(".")
        return (f"{self.stems[stem]}.{ending}",)

    def depth(self, names: Iterable[str], side: str) -> int:
        """Blocks of the encoder or decoder among their names."""
        block = re.compile(rf"{re.escape(self.blocks[side])}\.(\d+)\.")
        return max((int(match[1]) + 1 for match in map(block.match, names) if match), default=0)

    def has_decoder(self, names: Iterable[str]) -> bool:
        """Whether a decoder is among their names."""
        return "decoder" in self.positions and f"{self.stems['decoder.embed']}.weight" in names


MAE = Layout(
    name="mae",
    stems={
        "encoder.patch_embed": "patch_embed.proj",
        "encoder.cls_token": "cls_token",
        "encoder.norm": "norm",
        "decoder.embed": "decoder_embed",
        "decoder.mask_token": "mask_token",
        "decoder.norm": "decoder_norm",
        "head.linear": "decoder_pred",
    },
    blocks={"encoder": "blocks", "decoder": "decoder_blocks"},
    parts={part: (part,) for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")},
    positions={"encoder": "pos_embed", "decoder": "decoder_pos_embed"},
)

# facebookresearch/mae's encoder is a timm ViT.
TIMM = replace(MAE, name="timm", positions={"encoder": "pos_embed"}, heads=("head.",))

# The layout of the hub's files, which version 5 still reads and writes; `vit.` is put in front by the caller.
TRANSFORMERS = Layout(
    name="transformers",
    stems={
        "encoder.patch_embed": "embeddings.patch_embeddings.projection",
        "encoder.cls_token": "embeddings.cls_token",
        "encoder.norm": "layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.norm": "decoder.decoder_norm",
        "head.linear": "decoder.decoder_pred",
    },
    blocks={"encoder": "encoder.layer", "decoder": "decoder.decoder_layers"},
    parts={
        "norm1": ("layernorm_before",),
        "attn.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    },
    positions={"encoder": "embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"},
    heads=("pooler.", "classifier."),
)

LAYOUTS = {layout.name: layout for layout in (TIMM, TRANSFORMERS, MAE)}


@dataclass(frozen=True)
class Architecture:
    """The sizes that decide the shape of every parameter; heads do not.

    Attributes:
        width, depth: of the encoder.
        hidden: width of its MLPs.
        patch_size, channels: of the images' patches.
        positions: rows of the encoder's position table, the cls token's included, where it was learned; 0 where it
            is fixed.
        decoder_width, decoder_depth: of MAE's decoder; 0 where there is none.
    """

    width: int
    depth: int
    hidden: int
    patch_size: int
    channels: int
    positions: int = 0
    decoder_width: int = 0
    decoder_depth: int = 0

    @classmethod
    def of(cls, config: Config, decoder: bool) -> "Architecture":
        """That of a run, with or without the decoder, which only `objective.name=mae` has."""
        model, objective = config.model, config.objective
        hidden = int(model.width * model.mlp_ratio)
        positions = 1 + config.grid[0] * config.grid[1] if model.positions == "learned" else 0
        encoder = cls(model.width, model.depth, hidden, model.patch_size, config.data.channels, positions)
        if not decoder:
            return encoder
        assert isinstance(objective, MAEConfig)
        return replace(encoder, decoder_width=objective.decoder_width, decoder_depth=objective.decoder_depth)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name and shape of every parameter."""
        width, inner, pixels = self.width, self.decoder_width, self.patch_size**2 * self.channels
        shapes: dict[str, tuple[int, ...]] = {CLS_TOKEN: (1, 1, width)}
        shapes |= _linear("encoder.patch_embed", pixels, width) | _norm("encoder.norm", width)
        shapes |= _blocks("encoder", self.depth, width, self.hidden)
        if self.positions:
            shapes[POSITIONS] = (1, self.positions, width)
        if inner:
            shapes |= {"decoder.mask_token": (1, 1, inner)} | _norm("decoder.norm", inner)
            shapes |= _linear("decoder.embed", width, inner) | _linear("head.linear", inner, pixels)
            shapes |= _blocks("decoder", self.decoder_depth, inner, 4 * inner)
        return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(side: str, depth: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(depth):
        block = f"{side}.blocks.layers.{number}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", width, hidden) | _linear(f"{block}.mlp.fc2", hidden, width)
    return shapes


def parts_of(names: Iterable[str]) -> str:
    """Our tensors, told by the part that they belong to; the encoder's by their own names."""
    return ", ".join(sorted({name if name.startswith("encoder.") else name.split(".")[0] for name in names}))


def to_layout(
    tensors: dict[str, Tensor], layout: Layout, architecture: Architecture, config: Config
) -> dict[str, Tensor]:
    """Our tensors under their names and in their shapes, the fixed position tables of a run's images included.

    The patch embedding, a linear over (row, column, channel) values here, is a convolution [D, C, P, P] there. The
    pixels of a prediction have the order (row, column, channel) in all of them.
    """
    state = {}
    for key in architecture.shapes():
        tensor = tensors[key]
        if key == PATCH_EMBED:
            size = architecture.patch_size
            tensor = tensor.view(-1, size, size, architecture.channels).permute(0, 3, 1, 2)
        names = layout.names(key)
        for name, piece in zip(names, tensor.chunk(len(names)), strict=True):
            state[name] = piece.clone(memory_format=torch.contiguous_format)
    grids = config.grid, config.positions_grid
    if not architecture.positions:
        state[layout.positions["encoder"]] = sincos_positions(architecture.width, *grids)
    if architecture.decoder_width:
        state[layout.positions["decoder"]] = sincos_positions(architecture.decoder_width, *grids)
    return state


def from_layout(state: dict[str, Tensor], layout: Layout, keys: Iterable[str]) -> dict[str, Tensor]:
    """Our tensors `keys`, float32, from theirs; the inverse of `to_layout`, but for fixed position tables."""
    tensors = {}
    for key in keys:
        tensor = torch.cat([state[name].float() for name in layout.names(key)])
        tensors[key] = tensor.permute(0, 2, 3, 1).flatten(1) if key == PATCH_EMBED else tensor
    return tensors
