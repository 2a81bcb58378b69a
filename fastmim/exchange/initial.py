"""`model.init`: a run that starts from weights that are there already."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from fastmim.config import Config
from fastmim.errors import CheckpointError
from fastmim.exchange.deduce import Facts
from fastmim.exchange.inward import Foreign
from fastmim.exchange.layouts import POSITIONS, Architecture, parts_of
from fastmim.exchange.weights import Weights, is_ours, read_weights
from fastmim.models.position import resize_positions
from fastmim.ranks import Ranks

logger = logging.getLogger("fastmim")

_DECODER = ("decoder_width", "decoder_depth", "decoder_heads", "regressor_depth")


def initialise(objective: nn.Module, config: Config, ranks: Ranks) -> None:
    """Load `model.init` into an objective that is not yet DeepSpeed's; all ranks call it.

    The encoder is always loaded. What stands beside it is loaded where the file is of the same objective, and starts
    afresh otherwise; the log tells which.

    Raises:
        CheckpointError: the file cannot be read, or is of another architecture; names both.
    """
    # The first rank of each node finds out whether the file is good; the others then read what is known to be.
    ranks.run_on_first(lambda: _load(objective, config), each_node=True)
    if ranks.local_rank:
        _load(objective, config)


def _load(objective: nn.Module, config: Config) -> None:
    source = str(config.model.init)
    weights = _read(source, config)
    same = weights.config.objective.name == config.objective.name
    tensors = weights.tensors if same else weights.encoder_only().tensors
    encoder_only = all(name.startswith("encoder.") for name in tensors)
    _compare(source, _sizes(weights.config, encoder_only), _sizes(config, encoder_only))
    if config.model.positions == "sincos" or not encoder_only:
        _warn_of_other_places(source, weights.config, config)
    if POSITIONS in tensors:
        tensors = {
            **tensors,
            POSITIONS: resize_positions(tensors[POSITIONS], weights.config.grid, config.grid),
        }
    wanted = {name: list(tensor.shape) for name, tensor in objective.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(given.keys() | wanted.keys()):
        # A part that the file lacks altogether starts afresh; half a decoder would be another one.
        compared = name in given or not (encoder_only or name.startswith("encoder."))
        if compared and given.get(name) != wanted.get(name):
            raise CheckpointError(
                f"model.init={source}: {name} is {given.get(name, 'absent')} there and {wanted.get(name, 'absent')} "
                "in this run; expected the same, or the encoder alone (fastmim export --to fastmim --encoder-only)"
            )
    objective.load_state_dict(tensors, strict=False)
    afresh = parts_of(wanted.keys() - tensors.keys())
    rest = f"; afresh: {afresh}" if afresh else ""
    logger.info("starting from %s: %d of %d tensors%s", source, len(tensors), len(wanted), rest)
    for key in ("mean", "std"):
        there, here = getattr(weights.config.data, key), getattr(config.data, key)
        if there != here:
            logger.warning("data.%s is %s; %s was trained with %s", key, here, source, there)


def _warn_of_other_places(source: str, there: Config, here: Config) -> None:
    """Fixed positions are the run's, as its recipe says, and so are they when it resumes."""
    if there.positions_grid != here.positions_grid:
        (rows, columns), (our_rows, our_columns) = there.positions_grid, here.positions_grid
        logger.warning(
            "fixed positions are computed for %d x %d patches; %s was trained with those of %d x %d, which "
            "model.positions_grid=[%d,%d] keeps",
            *(our_rows, our_columns, source, rows, columns, rows, columns),
        )


def _read(source: str, config: Config) -> Weights:
    if is_ours(Path(source)):
        return read_weights(source)
    foreign = Foreign.read(Path(source))
    if config.objective.name != "mae":
        foreign = foreign.encoder_only()
    # Before a configuration is built of the file's sizes and this run's heads, which need not fit together.
    sizes = {key: value for key, value in _sizes(config, encoder_only=True).items() if key != "model.heads"}
    _compare(source, _sizes_of(foreign.architecture), sizes)
    # What the file does not tell is taken to be as in this run.
    run: Facts = {
        "model": {"heads": config.model.heads},
        "mask": {"ratio": config.mask.ratio},
        "data": {"image_size": config.data.image_size, "mean": config.data.mean, "std": config.data.std},
        "objective": config.objective.model_dump(include={"decoder_heads", "norm_pix_loss"}),
    }
    return foreign.complete({}, assumed=run)[0]


def _compare(source: str, held: dict[str, Any], ours: dict[str, Any]) -> None:
    pairs = [f"{key} {held[key]} (this run has {ours[key]})" for key in ours if held[key] != ours[key]]
    if pairs:
        raise CheckpointError(f"model.init={source} has {', '.join(pairs)}")


def _sizes(config: Config, encoder_only: bool) -> dict[str, Any]:
    sizes = _sizes_of(Architecture.of(config, decoder=False)) | {"model.heads": config.model.heads}
    values = {} if encoder_only else config.objective.model_dump()
    return sizes | {f"objective.{key}": values[key] for key in _DECODER if key in values}


def _sizes_of(encoder: Architecture) -> dict[str, Any]:
    return {
        "model.width": encoder.width,
        "model.depth": encoder.depth,
        "model.patch_size": encoder.patch_size,
        "model.mlp_ratio": encoder.hidden / encoder.width,
        "model.positions": "learned" if encoder.positions else "sincos",
        "data.channels": encoder.channels,
    }
