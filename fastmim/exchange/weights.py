"""Weights of our own: of a run, of a checkpoint, or in one file that carries its configuration."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.config import Config
from fastmim.config_objective import MAEConfig
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.files import aside, list_tensors, read_safetensors
from fastmim.exchange.layouts import PATCH_EMBED, POSITIONS, Architecture
from fastmim.models.position import resize_positions

_PREFIX = "fastmim."
POSITIONS_GRID = "fastmim.positions_grid"
"""Among metadata: of which grid the fixed position tables are, resized or not; JSON."""
_HISTORY = ("step", "epoch", "commit", "averaged", "imported_from")


@dataclass(frozen=True)
class Weights:
    """A network in our own layout.

    Attributes:
        tensors: float32, by parameter name of the objective.
        config: of the run that trained it, or deduced from a foreign file.
        history: step, epoch, commit, averaged, imported_from; what is known of them.
    """

    tensors: dict[str, Tensor]
    config: Config
    history: dict[str, str] = field(default_factory=dict)

    def architecture(self) -> Architecture:
        """The sizes, with those of MAE's decoder of pixels where it is what stands beside the encoder.

        Raises:
            CheckpointError: the encoder is not the ViT that its configuration says.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        encoder = Architecture.of(self.config, decoder=False)
        differing = [name for name, shape in encoder.shapes().items() if shapes.get(name) != shape]
        if differing:
            raise CheckpointError(
                f"{differing[0]} is {shapes.get(differing[0], 'missing')}; expected {encoder.shapes()[differing[0]]}"
            )
        if not isinstance(self.config.objective, MAEConfig):
            return encoder
        whole = Architecture.of(self.config, decoder=True)
        return whole if whole.shapes() == shapes else encoder

    def at_size(self, image_size: tuple[int, int]) -> "Weights":
        """The same weights for images of another height and width; `ConfigError` where patches do not fit.

        Position tables are resized, fixed ones too: `model.positions_grid` then says of which grid they are.
        """
        values = self.config.model_dump(mode="json")
        values["data"]["image_size"] = list(image_size)
        values["model"]["positions_grid"] = list(self.config.positions_grid)
        config = recipes.build(values)
        tensors = dict(self.tensors)
        if POSITIONS in tensors:
            tensors[POSITIONS] = resize_positions(tensors[POSITIONS], self.config.grid, config.grid)
        return replace(self, tensors=tensors, config=config)

    def encoder_only(self) -> "Weights":
        """Without what is not the encoder's."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name.startswith("encoder.")}
        return replace(self, tensors=kept)

    def metadata(self) -> dict[str, str]:
        """What a file of these weights tells beside them; `config` is a recipe without this machine's folders."""
        config = self.config
        told = {
            "version": importlib.metadata.version("fastmim"),
            "config": recipes.dump(_without_paths(config)),
            "mean": json.dumps(config.data.mean),
            "std": json.dumps(config.data.std),
            "positions_grid": json.dumps(config.positions_grid),
        }
        objective = config.objective.model_dump()
        if "norm_pix_loss" in objective:
            told["norm_pix_loss"] = json.dumps(objective["norm_pix_loss"])
        return {"format": "pt"} | {f"{_PREFIX}{key}": text for key, text in {**told, **self.history}.items()}

    def save(self, path: Path) -> None:
        """Write one safetensors file, which `fastmim export`, `reconstruct` and `model.init` take."""
        with aside(path) as written:
            save_file(self.tensors, written, metadata=self.metadata())


def _without_paths(config: Config) -> Config:
    values = config.model_dump(mode="json", exclude={"output": True, "data": {"source"}, "log": {"images"}})
    values["model"].pop("init", None)
    return recipes.build(values)


def config_in(metadata: dict[str, str], path: Path) -> dict[str, Any] | None:
    """The configuration that an export of ours carries, as a mapping; None where there is none.

    Raises:
        CheckpointError: it is not a configuration of this version.
    """
    text = metadata.get(f"{_PREFIX}config")
    if text is None:
        return None
    try:
        return recipes.build(yaml.safe_load(text)).model_dump(mode="json")
    except (yaml.YAMLError, ConfigError) as error:
        raise CheckpointError(f"{path}: {_PREFIX}config of its metadata was refused: {error}") from None


def history_in(metadata: dict[str, str]) -> dict[str, str]:
    """Step, epoch and the like from a file's metadata."""
    return {key: metadata[_PREFIX + key] for key in _HISTORY if _PREFIX + key in metadata}


def _not_ours(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is no weights file of fastmim; expected a run, a checkpoint directory, or a file that "
        "fastmim export or import wrote (fastmim import reads other layouts)"
    )


def is_ours(path: Path) -> bool:
    """Whether a path is a run, a checkpoint directory or a weights file of ours."""
    if path.is_dir():
        return (path / manifests.MANIFEST).exists() or (path / "checkpoints").is_dir()
    return path.is_file() and path.suffix == ".safetensors" and PATCH_EMBED in list_tensors(path)


def read_weights(source: str, ema: bool = False) -> Weights:
    """The weights of a run, a checkpoint directory, or a file that `Weights.save` wrote.

    The shards of ZeRO do not matter: a checkpoint holds the whole weights beside them.

    Args:
        source: path.
        ema: the averaged weights of a run.

    Raises:
        CheckpointError: none of these, damaged, or without averaged weights where they are asked for.
    """
    path = Path(source)
    if path.is_file():
        tensors, metadata = read_safetensors(path) if path.suffix == ".safetensors" else ({}, {})
        values = config_in(metadata, path)
        if values is None:
            raise _not_ours(path)
        if ema:
            raise CheckpointError(f"--ema: {path} is a single file; expected a run or a checkpoint directory")
        return Weights(tensors, recipes.build(values), history_in(metadata))
    if (path / "config.json").is_file() and not is_ours(path):
        raise _not_ours(path)
    folder, manifest = manifests.resolve(path)
    weights = folder / (manifests.EMA_WEIGHTS if ema else manifests.WEIGHTS)
    if not weights.exists():
        raise CheckpointError(f"{folder} holds no {weights.name}; it was trained without train.ema_decay")
    tensors, _ = read_safetensors(weights)
    known: dict[str, Callable[[], Any]] = {
        "step": lambda: manifest["step"],
        "epoch": lambda: manifest["state"]["epoch"],
        "commit": lambda: manifest["versions"]["commit"],
    }
    history = {}
    for key, read in known.items():
        try:
            value = read()
        except KeyError:  # written before it was recorded
            continue
        if value is not None:
            history[key] = str(value)
    if ema:
        history["averaged"] = "true"
    return Weights(tensors, recipes.build(manifest["config"]), history)
