"""AdamW for bfloat16 parameters, which are one half of float32 numbers; the optimiser keeps the other (`halves.py`)."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmim.chunks import Flat, GroupStep, chunks_of
from fastmim.errors import CheckpointError
from fastmim.halves import Master
from fastmim.kernels import _dispatch
from fastmim.kernels.adamw_halves import NativeAdamW, adamw_factors, adamw_halves
from fastmim.plain_adamw import PlainUpdate

CHUNKS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Numbers that are updated at once: what a CPU's cache holds, what keeps a GPU busy."""


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 parameters, computed in float32; a gradient that is not finite changes nothing.

    The arithmetic is that of `torch.optim.AdamW` on float32 copies, decided on the device. Kept are 12 bytes a number,
    its parameter included. Halves are joined in registers, by a kernel or, on a CPU, by C; where that cannot be
    compiled, by PyTorch in memory, a chunk of numbers at a time. Steps are counted for all parameters at once; those
    without a gradient are left as they are.

    Args:
        params: parameter groups, of contiguous bfloat16 parameters on one device.
        clip_grad: largest gradient norm; None does not clip.
        sum_in_float32: gradients move into float32 sums as each is ready, for several backward passes. Not where
            something else must find them on the parameters.
        options: lr, betas, eps and weight_decay, as AdamW's; a group may have its own.

    Attributes:
        masters: of each parameter.
        flats: what is kept of each group.
        grad_norm: float32 scalar, the 2-norm of the last step's gradient before it was clipped.
        found_inf: float32 scalar, 1 where the last step was skipped.

    Raises:
        ValueError: a parameter that is not contiguous bfloat16.
    """

    grad_norm: Tensor
    found_inf: Tensor

    def __init__(
        self, params: list[dict], clip_grad: float | None = None, sum_in_float32: bool = False, **options: Any
    ):
        super().__init__(params, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **options})
        self.clip_grad = clip_grad
        self._gradients = torch.float32 if sum_in_float32 else torch.bfloat16
        self.masters: dict[Tensor, Master] = {}
        self._gradient_sums: dict[Tensor, Tensor] = {}
        self.flats = [self._lay_out(group["params"]) for group in self.param_groups]
        device = self.param_groups[0]["params"][0].device
        self._step = torch.zeros((), device=device)
        largest = max(flat.rest.numel() for flat in self.flats)
        self._chunk = min(largest, CHUNKS["cpu" if device.type == "cpu" else "cuda"])
        self._native = NativeAdamW.load() if device.type == "cpu" else None
        if sum_in_float32:
            for parameter in self.masters:
                parameter.register_post_accumulate_grad_hook(self._sum_gradient)

    def _lay_out(self, parameters: list[Tensor]) -> Flat:
        for parameter in parameters:
            if parameter.dtype != torch.bfloat16 or not parameter.is_contiguous():
                raise ValueError(
                    f"a parameter {list(parameter.shape)} of {parameter.dtype} and strides {parameter.stride()}; "
                    "expected contiguous torch.bfloat16"
                )
        count, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
        zeros = functools.partial(torch.zeros, count, device=device)
        flat = Flat(zeros(dtype=torch.int16), zeros(dtype=torch.float32), zeros(dtype=torch.float32))
        rests = flat.rest.split([parameter.numel() for parameter in parameters])
        for parameter, rest in zip(parameters, rests, strict=True):
            self.masters[parameter] = Master(parameter, rest.view_as(parameter))
        return flat

    def _sum_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in self._gradient_sums:
            self._gradient_sums[parameter] += parameter.grad
        else:
            self._gradient_sums[parameter] = parameter.grad.float()
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters, unless a gradient is infinite or not a number; gradients are used up."""
        groups = [
            self._gather(group, flat) for group, flat in zip(self.param_groups, self.flats, strict=True)
        ]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(self._norms(groups)))
        self.found_inf = (~self.grad_norm.isfinite()).float()
        self._step += 1 - self.found_inf
        scale = None
        if self.clip_grad is not None:
            scale = (self.clip_grad / (self.grad_norm + 1e-6)).clamp(max=1)
        if _dispatch.use_triton(self._step):
            self._launch(groups, scale)
        elif self._native is not None:
            self._call(self._native, groups, scale)
        else:
            for group in groups:
                self._plain.update(group, self._step, scale, self.found_inf)
        for parameter in self.masters:
            parameter.grad = None

    def _gather(self, group: dict, flat: Flat) -> GroupStep:
        parameters = group["params"]
        found = [self._gradient_sums.pop(parameter, parameter.grad) for parameter in parameters]
        sizes = tuple(0 if gradient is None else gradient.numel() for gradient in found)
        return GroupStep(
            options=group,
            kept=flat,
            lows=[parameter.view(torch.int16).view(-1) for parameter in parameters],
            gradients=[None if gradient is None else self._flat(gradient) for gradient in found],
            chunks=chunks_of(sizes, tuple(parameter.numel() for parameter in parameters), self._chunk),
        )

    def _flat(self, gradient: Tensor) -> Tensor:
        return gradient.to(self._gradients).reshape(-1).contiguous()

    @functools.cached_property
    def _plain(self) -> PlainUpdate:
        return PlainUpdate(self._chunk, self._step.device)

    def _norms(self, groups: list[GroupStep]) -> list[Tensor]:
        """2-norms of parts of the gradient, float32 scalars."""
        found = [gradient for group in groups for gradient in group.gradients if gradient is not None]
        if self._native is not None:
            return [torch.tensor(self._native.norm(found), dtype=torch.float32)]
        if self._step.is_cuda:
            return list(torch._foreach_norm(found, dtype=torch.float32))  # bfloat16's would be rounded
        return [norm for group in groups for norm in self._plain.norms(group)]

    def _launch(self, groups: list[GroupStep], scale: Tensor | None) -> None:
        """All chunks: copies that lie one behind the other, of the parameters' bits too, and a kernel for the rest."""
        room, lows = (
            torch.empty(self._chunk, dtype=dtype, device=self._step.device)
            for dtype in (self._gradients, torch.int16)
        )
        numbers = self._numbers(scale)
        for group in groups:
            for chunk in group.chunks:
                low, kept = chunk.fill(lows, group.lows), group.kept.of(chunk)
                adamw_halves(
                    *(low, kept.rest, kept.exp_avg, kept.exp_avg_sq),
                    chunk.fill(room, group.gradients),
                    **numbers(group.options),
                )
                chunk.empty(low, group.lows)

    def _call(self, native: NativeAdamW, groups: list[GroupStep], scale: Tensor | None) -> None:
        """All parameters that have a gradient, where they lie."""
        numbers = self._numbers(scale)
        for group in groups:
            sizes = [low.numel() for low in group.lows]
            begins = itertools.accumulate(sizes, initial=0)
            found = [of for of in zip(group.lows, group.gradients, begins, strict=False) if of[1] is not None]
            if found:
                native.update(*zip(*found, strict=True), **vars(group.kept), **numbers(group.options))

    def _numbers(self, scale: Tensor | None) -> Callable[[dict], dict]:
        """What a step of a group with some options is given besides tensors."""
        factors = functools.cache(
            functools.partial(adamw_factors, self._step, 1 - self.found_inf, 1.0 if scale is None else scale)
        )

        def of(options: dict) -> dict:
            lr, betas = options["lr"], tuple(options["betas"])
            decay = lr * options["weight_decay"]
            return {"factors": factors(lr, betas), "betas": betas, "eps": options["eps"], "decay": decay}

        return of

    def state_dict(self) -> dict:
        """What is kept beside the parameters, which are the other half of their masters."""
        flats = [vars(flat) for flat in self.flats]
        groups = [{key: group[key] for key in group if key != "params"} for group in self.param_groups]
        return {"step": self._step, "flats": flats, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take what `state_dict` gave; the parameters, the other half, have to be those of the same moment.

        Raises:
            CheckpointError: the state of another optimiser, as earlier versions had.
        """
        if wanted := {"step", "flats", "param_groups"} - state_dict.keys():
            raise CheckpointError(
                f"the checkpoint's optimiser has {', '.join(sorted(state_dict))}; expected also "
                f"{', '.join(sorted(wanted))}: it was written by another version"
            )
        self._step.copy_(state_dict["step"])
        for flat, stored in zip(self.flats, state_dict["flats"], strict=True):
            for name, tensor in vars(flat).items():
                tensor.copy_(stored[name])
        for group, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(stored)
