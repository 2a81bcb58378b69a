"""AdamW for bfloat16 parameters, which are one half of float32 numbers; the optimiser keeps the other (`halves.py`)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmim.errors import CheckpointError
from fastmim.halves import Master
from fastmim.kernels import _dispatch
from fastmim.kernels.adamw_halves import adamw_factors, adamw_halves

CHUNKS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Numbers that are updated at once: what a CPU's cache holds, what keeps a GPU busy."""


@dataclass(frozen=True)
class Flat:
    """What is kept of a group's numbers, parameter behind parameter."""

    rest: Tensor  # int16
    exp_avg: Tensor  # float32
    exp_avg_sq: Tensor  # float32


@dataclass(frozen=True)
class _Piece:
    """Numbers of one parameter."""

    index: int  # of the parameter in its group
    start: int
    stop: int
    whole: bool

    def of(self, tensors: list[Tensor]) -> Tensor:
        """These numbers in flat tensors, one for each parameter."""
        flat = tensors[self.index]
        return flat if self.whole else flat[self.start : self.stop]


@dataclass(frozen=True)
class _Chunk:
    """Numbers of a group that are updated at once: pieces that lie one behind the other."""

    begin: int
    pieces: list[_Piece]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Numbers of each piece."""
        return [piece.stop - piece.start for piece in self.pieces]

    def fill(self, room: Tensor, tensors: list[Tensor]) -> Tensor:
        """Copy these numbers of flat tensors, one for each parameter, into a flat tensor; returns what they fill."""
        part = room[: sum(self.sizes)]
        torch._foreach_copy_(part.split(self.sizes), [piece.of(tensors) for piece in self.pieces])
        return part

    def empty(self, part: Tensor, tensors: list[Tensor]) -> None:
        """Copy what `fill` gave back into the tensors that it came from."""
        torch._foreach_copy_([piece.of(tensors) for piece in self.pieces], part.split(self.sizes))


@dataclass(frozen=True)
class _Tensors:
    """What a step reads and writes of a group, flat."""

    lows: list[Tensor]  # int16, the bits of each parameter
    gradients: list[Any]  # each a Tensor, or None for a parameter without one, of which no chunk has a piece
    chunks: list[_Chunk]


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 parameters, computed in float32; a gradient that is not finite changes nothing.

    The arithmetic is that of `torch.optim.AdamW` on float32 copies, decided on the device. Kept are 12 bytes a number,
    its parameter included. A step goes through the numbers in chunks, whose halves are joined in memory, or by a kernel
    in registers. Steps are counted for all parameters at once; those without a gradient are left as they are.

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
        work = [self._gather(group, flat) for group, flat in zip(self.param_groups, self.flats, strict=True)]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(self._norms(work)))
        self.found_inf = (~self.grad_norm.isfinite()).float()
        self._step += 1 - self.found_inf
        scale = 1.0
        if self.clip_grad is not None:
            scale = (self.clip_grad / (self.grad_norm + 1e-6)).clamp(max=1)
        update = self._launch if _dispatch.use_triton(self._step) else self._update
        update(list(zip(self.param_groups, self.flats, work, strict=True)), scale)
        for parameter in self.masters:
            parameter.grad = None

    def _gather(self, group: dict, flat: Flat) -> _Tensors:
        parameters = group["params"]
        found = [self._gradient_sums.pop(parameter, parameter.grad) for parameter in parameters]
        sizes = tuple(0 if gradient is None else gradient.numel() for gradient in found)
        return _Tensors(
            lows=[parameter.view(torch.int16).view(-1) for parameter in parameters],
            gradients=[None if gradient is None else gradient.reshape(-1) for gradient in found],
            chunks=_chunks(sizes, tuple(parameter.numel() for parameter in parameters), self._chunk),
        )

    def _norms(self, work: list[_Tensors]) -> list[Tensor]:
        """Of parts of the gradient, float32: in bfloat16 the norm itself would be rounded."""
        if self._step.is_cuda:
            found = [gradient for tensors in work for gradient in tensors.gradients if gradient is not None]
            return list(torch._foreach_norm(found, dtype=torch.float32))
        # Converted part by part, in the cache.
        room = torch.empty(self._chunk)
        return [
            torch.linalg.vector_norm(chunk.fill(room, tensors.gradients))
            for tensors in work
            for chunk in tensors.chunks
        ]

    def _launch(self, groups: list[tuple[dict, Flat, _Tensors]], scale: Tensor | float) -> None:
        """All chunks: copies that lie one behind the other, of the parameters' bits too, and a kernel for the rest."""
        room, lows = (
            torch.empty(self._chunk, dtype=dtype, device=self._step.device)
            for dtype in (self._gradients, torch.int16)
        )
        factors = functools.cache(functools.partial(adamw_factors, self._step, 1 - self.found_inf, scale))
        for group, flat, tensors in groups:
            lr, betas = group["lr"], tuple(group["betas"])
            for chunk in tensors.chunks:
                low = chunk.fill(lows, tensors.lows)
                kept = slice(chunk.begin, chunk.begin + len(low))
                adamw_halves(
                    *(low, flat.rest[kept], flat.exp_avg[kept], flat.exp_avg_sq[kept]),
                    chunk.fill(room, tensors.gradients),
                    factors(lr, betas),
                    betas,
                    group["eps"],
                    lr * group["weight_decay"],
                )
                chunk.empty(low, tensors.lows)

    def _update(self, groups: list[tuple[dict, Flat, _Tensors]], scale: Tensor | float) -> None:
        """All chunks by plain PyTorch."""
        room = torch.empty(2, self._chunk, device=self._step.device)
        for group, flat, tensors in groups:
            for chunk in tensors.chunks:
                self._update_chunk(group, flat, tensors, chunk, room, scale)

    def _update_chunk(
        self,
        group: dict,
        flat: Flat,
        tensors: _Tensors,
        chunk: _Chunk,
        room: Tensor,
        scale: Tensor | float,
    ) -> None:
        """Join, AdamW, split."""
        bits = chunk.fill(room[0].view(torch.int32), tensors.lows)
        kept = slice(chunk.begin, chunk.begin + len(bits))
        scratch = room[1, : len(bits)].view(torch.int32)
        torch.add(scratch.copy_(flat.rest[kept]), bits, alpha=1 << 16, out=bits)
        gradient = chunk.fill(room[1], tensors.gradients)
        if self.clip_grad is not None:
            gradient *= scale
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [bits.view(torch.float32)],
            [gradient],
            [flat.exp_avg[kept]],
            [flat.exp_avg_sq[kept]],
            [],
            [self._step],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf,
        )
        flat.rest[kept].copy_(bits)
        bits.add_(1 << 15).bitwise_right_shift_(16)
        chunk.empty(bits, tensors.lows)

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


@functools.lru_cache
def _chunks(sizes: tuple[int, ...], lengths: tuple[int, ...], most: int) -> list[_Chunk]:
    """Chunks of a group, of at most so many numbers.

    Args:
        sizes: of each parameter's gradient, 0 without one.
        lengths: of each parameter.
        most: numbers of a chunk.
    """
    chunks: list[_Chunk] = []
    left = begin = 0
    for index, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        if not size:
            left = 0
        done = 0
        while done < size:
            if not left:
                chunks.append(_Chunk(begin + done, []))
                left = most
            stop = min(size, done + left)
            chunks[-1].pieces.append(_Piece(index, done, stop, whole=stop - done == size))
            left -= stop - done
            done = stop
        begin += length
    return chunks
