"""The optimiser, which parameters decay, and the learning rate of every step."""

import math

import torch
from torch import Tensor, nn

from fastmim.config_training import OptimConfig
from fastmim.kernels._native import is_plain
from fastmim.kernels.adamw_halves import NativeAdamW

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
        options: of `torch.optim.AdamW`, but for `amsgrad` and `fused`.

    Attributes:
        grad_norm: float32 scalar, the 2-norm of the last step's gradient before it was clipped.
        found_inf: float32 scalar, 1 where the last step was skipped; the fused kernel reads it.
    """

    grad_norm: Tensor
    found_inf: Tensor

    def __init__(self, params, clip_grad: float | None = None, **options):
        assert not options.get("amsgrad"), "the state of amsgrad is not made here"
        super().__init__(params, fused=True, **options)
        self.clip_grad = clip_grad
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # One call for all gradients, where PyTorch makes some for each.
        self._native = NativeAdamW.load() if all(map(_is_in_float32, parameters)) else None
        # Made now: a first step would put them between what it is about to free, and a CPU's heap has to grow then.
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters, unless a gradient is infinite or not a number; gradients are there before."""
        assert closure is None, "what a closure computes would be looked at before it is computed"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = self._norm([p.grad for p in parameters])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, self.grad_norm)
        self.found_inf = (~self.grad_norm.isfinite()).float()
        super().step()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if self._native is None or not all(map(_is_in_float32, gradients)):
            return nn.utils.get_total_norm(gradients)
        norm = self._native.norm([gradient.view(-1) for gradient in gradients])
        return torch.tensor(norm, dtype=torch.float32, device="cpu")


def _is_in_float32(tensor: Tensor) -> bool:
    """Whether C takes the tensor."""
    return tensor.dtype == torch.float32 and is_plain(tensor)
