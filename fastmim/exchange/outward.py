"""`fastmim export`: weights of a run in the layout of timm, transformers or facebookresearch/mae, or in one file."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fastmim.config import MODEL_SIZES, Config
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.files import aside, check_out
from fastmim.exchange.layouts import LAYOUTS, MAE, TIMM, TRANSFORMERS, Architecture, parts_of, to_layout
from fastmim.exchange.transformers_files import write_settings
from fastmim.exchange.weights import Weights, read_weights

OURS = "fastmim"
_SUFFIXES = {
    TIMM.name: (".safetensors",),
    TRANSFORMERS.name: (),
    MAE.name: (".pth", ".safetensors"),
    OURS: (".safetensors",),
}


def export_weights(
    source: str,
    out: str,
    layout: str,
    encoder_only: bool = False,
    ema: bool = False,
    image_size: tuple[int, int] | None = None,
    force: bool = False,
) -> str:
    """Write the weights of a run for another library, or as one file of our own.

    Args:
        source: a run, a checkpoint directory, or a file of `fastmim import` or `export --to fastmim`.
        out: .safetensors for timm and fastmim, .pth or .safetensors for mae, a folder for transformers.
        layout: timm, transformers, mae or fastmim.
        encoder_only: leave the decoder out; timm has none anyway.
        ema: the averaged weights of a run.
        image_size: height and width in pixels that the position tables are resized to; the run's unless given.
        force: replace `out`.

    Returns:
        What was written and how it is loaded, for a person.

    Raises:
        FastmimError: weights that are not there, or that the layout cannot hold.
    """
    path = Path(out)
    check_out(path, _SUFFIXES[layout], force)
    weights = read_weights(source, ema)
    if image_size is not None:
        weights = weights.at_size(image_size)
    if encoder_only:
        weights = weights.encoder_only()
    if layout != OURS or encoder_only:
        _require_encoder(source, weights, layout)
    if layout == OURS:
        weights.save(path)
        return f"{path}: {len(weights.tensors)} tensors{_when(weights)}"
    architecture = weights.architecture()
    if layout == TIMM.name:
        architecture = Architecture.of(weights.config, decoder=False)
    elif not (encoder_only or architecture.decoder_width):
        raise CheckpointError(
            f"{source} holds no pixel decoder of MAE (objective.name={weights.config.objective.name!r}); expected one "
            f"for --to {layout}, or --encoder-only"
        )
    _write(path, layout, weights, architecture)
    return _describe(path, layout, weights, architecture)


def _require_encoder(source: str, weights: Weights, layout: str) -> None:
    try:
        weights.architecture()
    except CheckpointError as error:
        raise CheckpointError(f"{source} has no ViT encoder that --to {layout} can hold: {error}") from None


def _write(path: Path, layout: str, weights: Weights, architecture: Architecture) -> None:
    config, target = weights.config, path
    state = to_layout(weights.tensors, LAYOUTS[layout], architecture, config)
    if layout == TRANSFORMERS.name:
        target = path / "model.safetensors"
        if architecture.decoder_width:
            _refuse_oblong(config)
            state = {name if name.startswith("decoder.") else f"vit.{name}": t for name, t in state.items()}
        write_settings(path, config, architecture)
    with aside(target) as written:
        if target.suffix == ".pth":
            torch.save({"model": state, "fastmim": weights.metadata()}, written)
        else:
            save_file(state, written, metadata=weights.metadata())


def _refuse_oblong(config: Config) -> None:
    height, width = config.data.image_size
    if height != width:
        raise ConfigError(
            f"images of {height} x {width} pixels: transformers' ViTMAE computes its loss on square ones only; "
            "expected --encoder-only, or --image-size with two equal numbers"
        )


def _when(weights: Weights) -> str:
    return f", step {weights.history['step']}" if "step" in weights.history else ""


def _describe(path: Path, layout: str, weights: Weights, architecture: Architecture) -> str:
    what = "encoder and decoder" if architecture.decoder_width else "encoder"
    rows, columns = weights.config.grid
    told = " x ".join(map(str, weights.config.positions_grid))
    fixed = not architecture.positions and weights.config.positions_grid != weights.config.grid
    resized = f", resized from {told}" if fixed else ""
    left_out = parts_of(weights.tensors.keys() - architecture.shapes().keys())
    lines = [
        f"{path}: {what} in the layout of {layout}{_when(weights)}",
        f"positions: the {'learned' if architecture.positions else 'sin-cos'} table, for {rows} x {columns} patches"
        + resized,
    ]
    if left_out:
        lines.append(f"left out: {left_out}")
    return "\n".join([*lines, f"to load it: {_how_to_load(path, layout, weights.config, architecture)}"])


def _how_to_load(path: Path, layout: str, config: Config, architecture: Architecture) -> str:
    if layout == TIMM.name:
        return timm_call(path, config)
    if layout == TRANSFORMERS.name:
        options = "" if architecture.decoder_width else ", add_pooling_layer=False"
        name = "ViTMAEForPreTraining" if architecture.decoder_width else "ViTModel"
        return f"{name}.from_pretrained({str(path)!r}{options})"
    read = f"torch.load({str(path)!r})['model']" if path.suffix == ".pth" else f"load_file({str(path)!r})"
    return f"model.load_state_dict({read}{'' if architecture.decoder_width else ', strict=False'})"


def timm_call(path: Path, config: Config, classes: int = 0, pool: str | None = None) -> str:
    """The call of `timm.create_model` that builds this encoder and loads the file strictly.

    Args:
        path: of the file.
        config: of the encoder.
        classes: of the head over it; 0 has none.
        pool: timm's `global_pool`; None leaves timm's.
    """
    model, data = config.model, config.data
    sizes = {shape: name for name, shape in MODEL_SIZES.items()}
    size = sizes.get((model.width, model.depth, model.heads))
    patch = 14 if size == "huge" else 16
    options: dict[str, object] = {"num_classes": classes}
    if pool is not None:
        options["global_pool"] = pool
    if size is None:
        options |= {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads}
    if model.patch_size != patch:
        options["patch_size"] = model.patch_size
    if data.image_size != (224, 224):
        options["img_size"] = data.image_size
    if data.channels != 3:
        options["in_chans"] = data.channels
    if model.mlp_ratio != 4:
        options["mlp_ratio"] = model.mlp_ratio
    # What timm's transforms are made of; its own are another model's.
    options["pretrained_cfg_overlay"] = {
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "input_size": (data.channels, *data.image_size),
    }
    options["checkpoint_path"] = str(path)
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"timm.create_model('vit_{size or 'base'}_patch{patch}_224', {arguments})"
