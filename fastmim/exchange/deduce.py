"""What configuration the weights of another library are of: from shapes, settings files and metadata."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.config import MODEL_SIZES
from fastmim.errors import CheckpointError
from fastmim.exchange.files import Found
from fastmim.exchange.layouts import (
    CLS_TOKEN,
    LAYOUTS,
    MAE,
    POSITIONS,
    TIMM,
    TRANSFORMERS,
    Architecture,
    Layout,
    from_layout,
)
from fastmim.exchange.weights import POSITIONS_GRID, config_in
from fastmim.models.position import sincos_positions

Facts = dict[str, dict[str, Any]]
"""Known parts of a configuration, by section."""


def recognise(found: Found, wanted: str) -> tuple[Layout, Found]:
    """The layout of what was found, and the same with names as `Layout` has them.

    Args:
        found: from `read_found`.
        wanted: auto, timm, transformers or mae.

    Raises:
        CheckpointError: another layout than wanted, or none that is known; names what was found and expected.
    """
    state = {_plain(name): tensor for name, tensor in found.state.items()}
    # MAE's encoder alone has timm's names; mae's layout knows the decoder too, timm's a classifier's head.
    either = MAE if MAE.has_decoder(state) else TIMM
    candidates = (either, TRANSFORMERS) if wanted == "auto" else (LAYOUTS[wanted],)
    for layout in candidates:
        marks = (f"{layout.stems['encoder.patch_embed']}.weight", layout.stems["encoder.cls_token"])
        if all(mark in state for mark in marks) and state[marks[0]].ndim == 4:
            return layout, replace(found, state=state)
    expected = "; or ".join(
        f"{layout.stems['encoder.patch_embed']}.weight [D, C, P, P] and {layout.stems['encoder.cls_token']} "
        f"({layout.name})"
        for layout in candidates
    )
    raise CheckpointError(f"{found.path} holds {some(found.state)}; expected {expected}")


def _plain(name: str) -> str:
    # Version 5 of transformers writes `decoder_encoder.layer` where the hub's files have `decoder_layers`.
    return re.sub(r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.", name.removeprefix("vit."))


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def find_architecture(found: Found, layout: Layout) -> Architecture:
    """The sizes that the shapes of the tensors tell.

    Raises:
        CheckpointError: patches that are not square, or no blocks.
    """
    state = found.state
    width, channels, size, columns = state[f"{layout.stems['encoder.patch_embed']}.weight"].shape
    if size != columns:
        raise CheckpointError(f"{found.path} has patches of {size} x {columns} pixels; expected square ones")
    first = layout.names("encoder.blocks.layers.0.mlp.fc1.bias")[0]
    if first not in state:
        raise CheckpointError(f"{found.path} lacks {first}; it holds {some(state)} ({layout.name})")
    encoder = Architecture(width, layout.depth(state, "encoder"), state[first].shape[0], size, channels)
    table = state.get(layout.positions["encoder"])
    if table is not None and table.ndim == 3 and find_grid(found, table) is None:
        encoder = replace(encoder, positions=table.shape[1])
    if not layout.has_decoder(state):
        return encoder
    inner = state[f"{layout.stems['decoder.embed']}.weight"].shape[0]
    return replace(encoder, decoder_width=inner, decoder_depth=layout.depth(state, "decoder"))


def convert(found: Found, layout: Layout, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors in our layout; in a fixed position table the cls token's row becomes a part of the token.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape.
    """
    shapes = architecture.shapes()
    names = {name for key in shapes for name in layout.names(key)} | set(
        position_tables(layout, architecture)
    )
    missing = sorted(names - found.state.keys())
    unknown = sorted(name for name in found.state.keys() - names if not name.startswith(layout.heads))
    if missing or unknown:
        lacks = f"lacks {some(missing)}" if missing else ""
        holds = f"holds {some(unknown)}, which fastmim's ViT has not" if unknown else ""
        raise CheckpointError(f"{found.path} {' and '.join(filter(None, (lacks, holds)))} ({layout.name})")
    tensors = from_layout(found.state, layout, shapes)
    for key, shape in shapes.items():
        if key != POSITIONS and tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{found.path}: {', '.join(layout.names(key))} makes {list(tensors[key].shape)}; expected {list(shape)}"
            )
    counts = set()
    for name, width in position_tables(layout, architecture).items():
        shape = list(found.state[name].shape)
        if len(shape) != 3 or shape[::2] != [1, width] or shape[1] < 2:
            raise CheckpointError(f"{found.path}: {name} is {shape}; expected [1, 1 + patches, {width}]")
        counts.add(shape[1] - 1)
    if len(counts) > 1:
        raise CheckpointError(
            f"{found.path}: position tables of {' and '.join(map(str, sorted(counts)))} patches; expected one number"
        )
    if not architecture.positions:
        table = found.state[layout.positions["encoder"]]
        tensors[CLS_TOKEN] = tensors[CLS_TOKEN] + table[:, :1].float()
    return tensors


def position_tables(layout: Layout, architecture: Architecture) -> dict[str, int]:
    """Name and width of each stored position table, the encoder's first."""
    tables = {layout.positions["encoder"]: architecture.width}
    if architecture.decoder_width:
        tables[layout.positions["decoder"]] = architecture.decoder_width
    return tables


def find_grid(found: Found, *tables: Tensor) -> tuple[int, int] | None:
    """The patch grid (rows, columns) whose sin-cos tables these are; None where one was learned.

    Resized tables are known by the grid that our own metadata tell.
    """
    trained = _trained_grid(found)
    patches = tables[0].shape[1] - 1
    for rows in (side for side in range(1, patches + 1) if patches % side == 0):
        grid = rows, patches // rows
        if all(_is_sincos(table, grid, trained) for table in tables):
            return grid
    return None


def _trained_grid(found: Found) -> tuple[int, int] | None:
    told = found.metadata.get(POSITIONS_GRID)
    return tuple(json.loads(told)) if told else None


def _is_sincos(table: Tensor, grid: tuple[int, int], trained: tuple[int, int] | None) -> bool:
    """Whether all rows are, but for the cls token's, which may hold anything."""
    if table.shape[2] % 4:
        return False
    error = (table.float() - sincos_positions(table.shape[2], grid, trained))[:, 1:].abs().max()
    return bool(error <= max(1e-5, torch.finfo(table.dtype).eps))


def shape_facts(architecture: Architecture) -> Facts:
    """What the architecture says of `model`, `data` and, where there is a decoder, `objective`."""
    width, hidden = architecture.width, architecture.hidden
    ratio = hidden / width
    if int(width * ratio) != hidden:  # the quotient was rounded down
        ratio = (hidden + 0.5) / width
    model = {
        "width": width,
        "depth": architecture.depth,
        "mlp_ratio": ratio,
        "patch_size": architecture.patch_size,
        "positions": "learned" if architecture.positions else "sincos",
    }
    facts: Facts = {"model": model, "data": {"channels": architecture.channels}}
    if architecture.decoder_width:
        facts["objective"] = {
            "decoder_width": architecture.decoder_width,
            "decoder_depth": architecture.decoder_depth,
        }
    return facts


def settings_facts(found: Found) -> Facts:
    """What metadata and settings files say, the surest last."""
    facts: Facts = config_in(found.metadata, found.path) or {}
    if trained := _trained_grid(found):
        facts = merge(facts, {"model": {"positions_grid": list(trained)}})
    readers: dict[str, Callable[[dict[str, Any], Path], Facts]] = {
        "args": _from_mae_arguments,
        "config.json": _from_config,
        "preprocessor_config.json": _from_preprocessor,
    }
    for name, read in readers.items():
        if name in found.settings:
            facts = merge(facts, read(found.settings[name], found.path))
    return facts


def _from_mae_arguments(args: dict[str, Any], _: Path) -> Facts:
    facts: Facts = {"data": _known(args, image_size="input_size"), "mask": _known(args, ratio="mask_ratio")}
    return {**facts, "objective": _known(args, norm_pix_loss="norm_pix_loss")}


def _from_config(config: dict[str, Any], path: Path) -> Facts:
    if "pretrained_cfg" in config:  # timm's
        facts = _known(config["pretrained_cfg"], mean="mean", std="std", image_size="input_size")
        if "image_size" in facts:
            facts["image_size"] = facts["image_size"][1:]
        return {"data": facts}
    kind, activation = config.get("model_type"), config.get("hidden_act")
    if kind not in ("vit", "vit_mae"):
        raise CheckpointError(f"{path}/config.json: model_type is {kind!r}; expected 'vit' or 'vit_mae'")
    if activation != "gelu":
        raise CheckpointError(f"{path}/config.json: hidden_act is {activation!r}; expected 'gelu'")
    facts: Facts = {"model": _known(config, heads="num_attention_heads"), "data": {}}
    facts["data"] = _known(config, image_size="image_size")
    if kind == "vit_mae":
        facts["mask"] = _known(config, ratio="mask_ratio")
        facts["objective"] = _known(
            config, norm_pix_loss="norm_pix_loss", decoder_heads="decoder_num_attention_heads"
        )
    return facts


def _from_preprocessor(config: dict[str, Any], _: Path) -> Facts:
    return {"data": _known(config, mean="image_mean", std="image_std")}


def _known(values: dict[str, Any], **names: str) -> dict[str, Any]:
    return {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}


def standard_heads(facts: Facts) -> Facts:
    """Heads of the sizes that everyone agrees on; MAE's decoder of width 512 has 16."""
    guesses: Facts = {}
    for width, depth, heads in MODEL_SIZES.values():
        if (facts["model"]["width"], facts["model"]["depth"]) == (width, depth):
            guesses["model"] = {"heads": heads}
    if facts.get("objective", {}).get("decoder_width") == 512:
        guesses["objective"] = {"decoder_heads": 16}
    return guesses


def merge(*layers: Facts) -> Facts:
    """Later sections over earlier ones, key by key."""
    merged: Facts = {}
    for layer in layers:
        for section, values in layer.items():
            held = merged.get(section)
            merged[section] = (
                {**held, **values} if isinstance(held, dict) and isinstance(values, dict) else values
            )
    return merged
