"""The optimiser, which parameters decay, and the learning rate of every step."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastmim.config import OptimConfig

TOKENS = ("cls_token", "mask_token", "pos_embed")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; 1-d parameters (biases, norms), tokens and positions do not (MAE, appendix A.1)."""
    decayed, kept = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(TOKENS)
            (kept if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimConfig, epoch: float) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr` (MAE, appendix A.1), at a fractional epoch."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    progress = min((epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs), 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that changes nothing in a step whose gradient is not finite, decided on the device.

    DeepSpeed's own optimisers skip such steps; its plain float32 path without ZeRO does not.

    Args:
        params: parameter groups.
        clip_grad: largest gradient norm; None does not clip.
        options: of `torch.optim.AdamW`.

    Attributes:
        grad_norm: float32 scalar, the 2-norm of the last step's gradient before it was clipped.
        found_inf: float32 scalar, 1 where the last step was skipped; the fused kernel reads it.
    """

    grad_norm: Tensor
    found_inf: Tensor

    def __init__(self, params, clip_grad: float | None = None, **options):
        super().__init__(params, fused=True, **options)
        self.clip_grad = clip_grad

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters, unless a gradient is infinite or not a number."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, self.grad_norm)
        self.found_inf = (~self.grad_norm.isfinite()).float()
        return super().step(closure)


class MasterAdamW(GuardedAdamW):
    """`GuardedAdamW` on float32 copies of 16-bit parameters, which follow them.

    A rank that is alone has nothing to shard: this makes ZeRO's step in a few passes over all tensors, where ZeRO
    copies every gradient through its buckets.

    Args:
        params: parameter groups, of 16-bit parameters.
        clip_grad: largest gradient norm; None does not clip.
        sum_in_float32: gradients move to the copies as each is ready, so that those of several backward passes are
            summed there. Not where something else must find them on the parameters.
        options: of `torch.optim.AdamW`.

    Attributes:
        fp16_groups: the parameters of each group.
        fp32_groups: their copies, which `param_groups` holds.
    """

    def __init__(
        self, params: list[dict], clip_grad: float | None = None, sum_in_float32: bool = False, **options
    ):
        self.fp16_groups = [list(group["params"]) for group in params]
        self.fp32_groups = [[p.detach().float() for p in group] for group in self.fp16_groups]
        groups = [
            {**group, "params": masters} for group, masters in zip(params, self.fp32_groups, strict=True)
        ]
        super().__init__(groups, clip_grad, **options)
        if sum_in_float32:
            for low, high in self._pairs():
                low.register_post_accumulate_grad_hook(functools.partial(_move_gradient, high))

    @torch.no_grad()
    def step(self, closure=None):
        """Update copies and parameters, unless a gradient is infinite or not a number; gradients are used up."""
        for low, high in self._pairs():
            if low.grad is not None:
                _move_gradient(high, low)
        super().step(closure)
        pairs = [(low, high) for low, high in self._pairs() if high.grad is not None]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        for _, high in pairs:
            high.grad = None

    def state_dict(self) -> dict:
        """As torch's, with the copies: the parameters have lost their last bits."""
        return {**super().state_dict(), "masters": self.fp32_groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, with the copies."""
        masters = state_dict["masters"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "masters"})
        with torch.no_grad():
            for group, stored in zip(self.fp32_groups, masters, strict=True):
                for master, value in zip(group, stored, strict=True):
                    master.copy_(value)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in zip(self.fp16_groups, self.fp32_groups, strict=True):
            yield from zip(*group, strict=True)


def _move_gradient(high: Tensor, low: Tensor) -> None:
    """Add a parameter's gradient to its copy's."""
    if high.grad is None:
        high.grad = low.grad.float()
    else:
        high.grad += low.grad
    low.grad = None
