"""How much memory a run of MAE takes on each rank, by arithmetic: nothing is run.

Model states follow ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
SC 2020, section 3) as DeepSpeed implements it; activations are the tensors that a transformer block keeps for its
backward pass (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2023, section 4).
"""

from dataclasses import dataclass

import torch

from fastmim.config import Config
from fastmim.deepspeed_fragment import (
    bucket_settings,
    offloads_optimizer,
    stage_in_effect,
    sum_dtype,
)
from fastmim.errors import ConfigError
from fastmim.objectives import build_objective
from fastmim.split_adamw import CHUNKS

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number."""

# DeepSpeed's defaults, in numbers, not bytes.
_LIVE_PARAMETERS = 10**9
"""stage3_max_live_parameters and stage3_max_reuse_distance: below it what is gathered stays."""
_PERSISTENT = 10**5
"""stage3_param_persistence_threshold: smaller parameters are whole on every rank."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the moment of a step when that kind is largest."""

    parameters: int
    """In the precision of the products; of ZeRO-3 its shard, and small ones whole."""
    gathered: int
    """What ZeRO-3 collects of the other ranks' shards in the forward pass."""
    gradients: int
    """What the optimiser is given."""
    buckets: int
    """Where gradients are put together to be summed over the ranks."""
    optimiser: int
    """Float32 copies of the parameters, or what bfloat16 lacks of them, AdamW's two moments, and the average of weights
    (`train.ema_decay`)."""
    update: int
    """Float32 gradients, and values that are not kept, while the optimiser runs."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    recomputed: int
    """Of one block, while it is computed again under activation checkpointing."""

    @property
    def states(self) -> int:
        """What does not depend on the batch, between steps."""
        return self.parameters + self.optimiser

    @property
    def peak(self) -> int:
        """Most at once: in the backward pass, or while the optimiser runs."""
        backward = self.gathered + self.activations + self.recomputed
        return self.states + self.gradients + self.buckets + max(backward, self.update)


def parameter_sizes(config: Config) -> list[int]:
    """How many numbers each trained parameter of a run holds; its objective is built without memory."""
    with torch.device("meta"):
        objective = build_objective(config)
    return [parameter.numel() for parameter in objective.parameters() if parameter.requires_grad]


def predict_memory(
    config: Config,
    precision: str,
    world_size: int,
    *,
    fused_loss: bool = True,
    on_cpu: bool = False,
    sizes: list[int] | None = None,
) -> Memory:
    """Bytes by kind, with DeepSpeed's defaults for what the recipe's fragment does not say.

    Args:
        config: of the run; its ZeRO stage, offload, micro-batch and checkpointing are read.
        precision: bf16, fp16 or fp32, as it was resolved.
        world_size: ranks that share the states.
        fused_loss: the loss keeps one gradient, in place of eager PyTorch's chain.
        on_cpu: the ranks compute there: what is offloaded stays in the same memory, blocks keep less but under ZeRO-3
            (`models/by_rows.py`), and buckets count as far as gradients fill them, since a CPU's memory is taken when
            it is written.
        sizes: `parameter_sizes` of the run, where they are known.

    Raises:
        ConfigError: another objective than mae with its own decoder.
    """
    if config.objective.name != "mae" or config.objective.decoder != "self":
        raise ConfigError(
            f"objective.name={config.objective.name!r}: memory is predicted of 'mae' with objective.decoder='self'"
        )
    sizes = parameter_sizes(config) if sizes is None else sizes
    item, stage = ITEM[precision], stage_in_effect(config.deepspeed, precision, world_size)
    count, shards = sum(sizes), world_size if stage else 1
    whole = sum(size for size in sizes if size <= _PERSISTENT)
    split = stage == 0 and precision == "bf16"
    # Parameters in float32 are their own copies, unless ZeRO shards the copies; bfloat16 is one half of them.
    copies = 2 if split else 4 if precision != "fp32" or stage else 0
    offloads = not on_cpu and offloads_optimizer(config.deepspeed)
    # One rank sums the gradients of several backward passes in float32.
    summed = split and world_size == 1 and config.optim.accumulation > 1
    summed = summed and sum_dtype(config.deepspeed) != "bf16"
    if split:
        # On CUDA, a gradient and the 16 bits of a parameter; on a CPU C updates what is there.
        update = 0 if on_cpu else (6 if summed else 4) * min(count, CHUNKS["cuda"])
    else:
        update = 0 if offloads or precision == "fp32" else 4 * count // shards
    average = 4 * count // shards if config.train.ema_decay and not offloads else 0
    activations, recomputed = _activations(
        config, item, world_size, fused_loss, by_rows=on_cpu and stage != 3
    )
    return Memory(
        parameters=(count // world_size + whole if stage == 3 else count) * item,
        gathered=min(count - whole, _LIVE_PARAMETERS) * item if stage == 3 else 0,
        gradients=count // shards * (4 if summed else item),
        buckets=_buckets(config, sizes, world_size, stage, on_cpu) * item,
        optimiser=(0 if offloads else (8 + copies) * count // shards) + average,
        update=update,
        activations=activations,
        recomputed=recomputed,
    )


def _buckets(config: Config, sizes: list[int], world_size: int, stage: int, on_cpu: bool) -> int:
    """Numbers in the buffers that gradients are summed in."""
    count = sum(sizes)
    zero = bucket_settings(stage, sizes, world_size, on_cpu) | config.deepspeed.get("zero_optimization", {})
    size = int(zero["reduce_bucket_size"])
    if stage == 0:
        # A bucket is full with the gradient that makes it so.
        return min(size + max(sizes), count) if world_size > 1 else 0
    # One is filled while another is summed.
    size *= 2 if stage < 3 and zero.get("overlap_comm") else 1
    return min(size, count) if on_cpu else size


def block_bytes(
    images: int, tokens: int, width: int, mlp_ratio: float, item: int, by_rows: bool, asked: int | None = None
) -> int:
    """What a pre-norm block keeps of a micro-batch: the inputs of its norms, GELU and attention.

    Unless it runs `by_rows` also the statistics of its norms and the inputs of its linears, which norms and GELU made.
    Its MLP runs on the tokens that are `asked` for, all unless given.
    """
    asked = tokens if asked is None else asked
    row = images * width * item
    # The sum before attention; queries, keys, values and what it makes of them. The sum before the MLP; before GELU.
    kept = row * (tokens * (1 + 4) + asked * (1 + mlp_ratio))
    if not by_rows:
        kept += row * (tokens + asked * (1 + mlp_ratio)) + images * (tokens + asked) * 2 * 4
    return int(kept)


def _activations(
    config: Config, item: int, world_size: int, fused_loss: bool, by_rows: bool
) -> tuple[int, int]:
    """Bytes kept by the forward pass, and by one block that is computed again."""
    model, objective, images = config.model, config.objective, config.micro_batch(world_size)
    patches = config.grid[0] * config.grid[1]
    kept = config.mask.len_keep(config.grid)
    removed, length = patches - kept, model.patch_size**2 * config.data.channels
    seen = 1 + (patches if objective.mask_token_in_encoder else kept)
    encoder = images, seen, model.width, model.mlp_ratio, item
    decoder = images, 1 + patches, objective.decoder_width, 4.0, item
    # The decoder's last MLP runs on the removed patches.
    blocks = [(encoder, model.depth, None), (decoder, 1, removed)]
    if objective.decoder_depth > 1:
        blocks.append((decoder, objective.decoder_depth - 1, None))
    total = images * kept * length * item  # gathered patches, the input of their embedding
    recomputed = 0
    for shape, depth, asked in blocks:
        if config.train.activation_checkpointing:
            total += depth * shape[0] * shape[1] * shape[2] * item
            recomputed = max(recomputed, block_bytes(*shape, by_rows, asked))
        else:
            total += depth * block_bytes(*shape, by_rows, asked)
    # The last norms: the encoder's input and output, which the decoder's embedding reads; the decoder's, of the
    # removed patches only, with their indices.
    total += 2 * images * seen * model.width * item
    total += 2 * images * removed * objective.decoder_width * item
    total += images * removed * length * _loss_bytes(item, fused_loss)
    return int(total), int(recomputed)


def _loss_bytes(item: int, fused: bool) -> int:
    """Bytes that the loss keeps of each predicted value: a gradient; eagerly, a float32 difference."""
    return item if fused else 4
