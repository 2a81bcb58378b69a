"""The settings files that transformers wants beside its weights."""

import json
from pathlib import Path
from typing import Any

from fastmim.config import Config
from fastmim.config_objective import MAEConfig
from fastmim.exchange.files import aside
from fastmim.exchange.layouts import Architecture

_BICUBIC = 3  # PIL's number


def write_settings(folder: Path, config: Config, architecture: Architecture) -> None:
    """Write config.json, of ViTMAEForPreTraining with a decoder and of ViTModel without, and the preprocessor's."""
    height, width = config.data.image_size
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.data.mean,
        "image_std": config.data.std,
    }
    files = {"config.json": _model(config, architecture), "preprocessor_config.json": preprocessor}
    for name, values in files.items():
        with aside(folder / name) as written:
            written.write_text(json.dumps(values, indent=2) + "\n")


def _model(config: Config, architecture: Architecture) -> dict[str, Any]:
    height, width = config.data.image_size
    values: dict[str, Any] = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": config.model.heads,
        "intermediate_size": architecture.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": architecture.patch_size,
        "num_channels": architecture.channels,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if architecture.decoder_width:
        objective = config.objective
        assert isinstance(objective, MAEConfig)
        values |= {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": architecture.decoder_width,
            "decoder_num_hidden_layers": architecture.decoder_depth,
            "decoder_num_attention_heads": objective.decoder_heads,
            "decoder_intermediate_size": 4 * architecture.decoder_width,
            "mask_ratio": config.mask.ratio,
            "norm_pix_loss": objective.norm_pix_loss,
        }
    return values
