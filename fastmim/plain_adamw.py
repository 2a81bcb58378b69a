"""What `SplitAdamW` does to chunks of numbers by PyTorch's operators, in a CPU's cache, where C cannot be compiled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmim.chunks import Chunk, Flat, GroupStep


@dataclass(frozen=True)
class _Views:
    """Of a chunk, what stays from step to step; the bits and the scratch are memory that chunks share."""

    chunk: Chunk
    bits: Tensor  # int32
    scratch: Tensor  # float32
    lows: list[tuple[Tensor, Tensor]]  # a part of the bits, and a parameter's 16 bits that belong there
    gradients: list[Tensor]  # parts of the scratch
    kept: Flat

    def fill(self, gradients: list[Tensor]) -> Tensor:
        """The chunk's gradient, in float32 in the scratch, of flat gradients of each parameter."""
        for part, gradient in zip(self.gradients, self.chunk.of(gradients), strict=True):
            part.copy_(gradient)
        return self.scratch

    def join(self) -> None:
        """The numbers' bits, of both halves."""
        for part, low in self.lows:
            part.copy_(low)
        rest = self.scratch.view(torch.int32).copy_(self.kept.rest)
        torch.add(rest, self.bits, alpha=1 << 16, out=self.bits)

    def split(self) -> None:
        """Both halves, of the numbers' bits, which are used up."""
        self.kept.rest.copy_(self.bits)
        self.bits.add_(1 << 15).bitwise_right_shift_(16)
        for part, low in self.lows:
            low.copy_(part)


class PlainUpdate:
    """AdamW on the chunks of some groups, whose views are made once, not in every step.

    Args:
        numbers: of a chunk, at most.
        device: of all tensors.
    """

    def __init__(self, numbers: int, device: torch.device):
        self._room = torch.empty(2, numbers, device=device)
        self._made: dict[int, tuple[tuple, list[_Views]]] = {}

    def _views(self, group: GroupStep) -> list[_Views]:
        # A parameter may have got other memory, and another one no gradient.
        pointers = [low.data_ptr() for low in group.lows]
        of = pointers, [gradient is None for gradient in group.gradients]
        key = group.kept.rest.data_ptr()
        if key not in self._made or self._made[key][0] != of:
            self._made[key] = of, [self._view(chunk, group) for chunk in group.chunks]
        return self._made[key][1]

    def _view(self, chunk: Chunk, group: GroupStep) -> _Views:
        bits, scratch = self._room[:, : sum(chunk.sizes)]
        bits = bits.view(torch.int32)
        return _Views(
            chunk=chunk,
            bits=bits,
            scratch=scratch,
            lows=list(zip(bits.split(chunk.sizes), chunk.of(group.lows), strict=True)),
            gradients=list(scratch.split(chunk.sizes)),
            kept=group.kept.of(chunk),
        )

    def norms(self, group: GroupStep) -> list[Tensor]:
        """2-norms of the gradients of chunks, float32 scalars: in bfloat16 the norm itself would be rounded."""
        filled = (views.fill(group.gradients) for views in self._views(group))
        return [torch.dot(gradient, gradient).sqrt() for gradient in filled]

    def update(self, group: GroupStep, step: Tensor, scale: Tensor | None, found_inf: Tensor) -> None:
        """Join, AdamW, split.

        Args:
            group: what is updated, all of it.
            step: float32 scalar, this step's number.
            scale: float32 scalar, of gradients; or None, of what is not clipped.
            found_inf: float32 scalar, 1 where nothing is to change.
        """
        beta1, beta2 = group.options["betas"]
        lr, eps, weight_decay = (group.options[key] for key in ("lr", "eps", "weight_decay"))
        for views in self._views(group):
            views.join()
            gradient = views.fill(group.gradients)
            if scale is not None:
                gradient *= scale
            torch._fused_adamw_(
                [views.bits.view(torch.float32)],
                [gradient],
                [views.kept.exp_avg],
                [views.kept.exp_avg_sq],
                [],
                [step],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
            views.split()
