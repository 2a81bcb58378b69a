"""AdamW on float32 numbers that are stored as two halves, bfloat16 and int16: in one launch, or by C on a CPU."""

import ctypes
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _dispatch
from ._dispatch import kernel
from ._native import integers, native, pointers

_BLOCK = 1024


@kernel
def _adamw_halves_kernel(
    low, rest, exp_avg, exp_avg_sq, gradient, factors, rate1, rate2, eps, decay, count, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A step that must not happen reads and writes nothing.
    valid = at < tl.where(tl.load(factors + 3) != 0, count, 0)
    bits = tl.load(low + at, mask=valid, other=0).to(tl.int32) << 16
    bits += tl.load(rest + at, mask=valid, other=0).to(tl.int32)
    slope = tl.load(gradient + at, mask=valid, other=0.0).to(tl.float32) * tl.load(factors + 2)
    mean = tl.load(exp_avg + at, mask=valid, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=valid, other=0.0)
    mean += (slope - mean) * rate1
    square += (slope * slope - square) * rate2
    tl.store(exp_avg + at, mean, mask=valid)
    tl.store(exp_avg_sq + at, square, mask=valid)
    direction = mean / (tl.sqrt(square) * tl.load(factors + 1) + eps)
    value = bits.to(tl.float32, bitcast=True)
    value -= value * decay + direction * tl.load(factors)
    bits = value.to(tl.int32, bitcast=True)
    tl.store(rest + at, bits.to(tl.int16), mask=valid)
    tl.store(low + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=valid)


def adamw_halves(
    low: Tensor,
    rest: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    factors: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """Change numbers and their moments in place, by Triton alone. All are contiguous, [N], on one device.

    26 bytes are moved for a number with a bfloat16 gradient, 28 with a float32 one, which is as few as can be: halves
    and moments are read and written, the gradient is read. `fastmim.split_adamw` computes the same in plain PyTorch.

    Args:
        low: int16, the bits of the bfloat16 half.
        rest: int16, the lower bits: a number is `low` * 65536 + `rest`, as the bits of a float32.
        exp_avg, exp_avg_sq: float32.
        gradient: bfloat16 or float32.
        factors: float32 [4], from `adamw_factors`, on the device, so that nothing waits for them.
        betas, eps: of AdamW.
        decay: share that a number loses: lr * weight_decay.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    tensors = (low, rest, exp_avg, exp_avg_sq, gradient)
    assert all(tensor.is_contiguous() and tensor.shape == low.shape for tensor in tensors)
    assert low.dtype == rest.dtype == torch.int16 and exp_avg.dtype == exp_avg_sq.dtype == torch.float32
    grid = (_dispatch.cdiv(low.numel(), _BLOCK),)
    _dispatch.launch(
        _adamw_halves_kernel, grid, *tensors, factors, *_rates(betas), eps, decay, low.numel(), BLOCK=_BLOCK
    )


def _rates(betas: tuple[float, float]) -> list[float]:
    """What is left of 1 after a beta, formed in float64: as the difference of float32 numbers it has few digits."""
    return [1 - beta for beta in betas]


class NativeAdamW:
    """`adamw_halves` on a CPU, by C: as many bytes a number, of several tensors in one call, on PyTorch's threads.

    What it computes does not depend on their number.

    Args:
        library: from `load`.
    """

    def __init__(self, library: ctypes.CDLL):
        count, address, flag, threads = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int
        counts, addresses = ctypes.POINTER(count), ctypes.POINTER(address)
        self._norm, self._update = library.norm, library.adamw_halves
        self._norm.restype = ctypes.c_double
        self._norm.argtypes = (count, counts, addresses, flag, threads)
        self._update.restype = None
        self._update.argtypes = (
            *(count, counts, counts, addresses),
            *(addresses, flag),
            *(address, address, address),
            *(ctypes.POINTER(ctypes.c_float), threads),
        )

    @classmethod
    def load(cls) -> "NativeAdamW | None":
        """None where `FASTMIM_KERNELS` asks for something else, or there is no C compiler, which is logged."""
        library = native("adamw_halves.c")
        return None if library is None else cls(library)

    def norm(self, gradients: Sequence[Tensor]) -> float:
        """The 2-norm of all numbers of tensors [N] of one dtype, bfloat16 or float32."""
        if not gradients:
            return 0.0
        found = self._norm(*_sizes(gradients), *_gradients(gradients), torch.get_num_threads())
        if found < 0:
            raise MemoryError(f"no memory for the norm of {len(gradients)} gradients")
        return found

    def update(
        self,
        lows: Sequence[Tensor],
        gradients: Sequence[Tensor],
        begins: Sequence[int],
        rest: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        factors: Tensor,
        betas: tuple[float, float],
        eps: float,
        decay: float,
    ) -> None:
        """Change numbers and their moments in place.

        Args:
            lows: of each tensor, [N].
            gradients: of each tensor, [N], all of one dtype.
            begins: where each tensor's part of `rest` and the moments begins.
            rest, exp_avg, exp_avg_sq: [sum of N].
            factors, betas, eps, decay: as of `adamw_halves`.
        """
        kept = (rest, exp_avg, exp_avg_sq)
        assert all(x.is_contiguous() and x.is_cpu for x in (*lows, *gradients, *kept))
        assert rest.dtype == torch.int16 and exp_avg.dtype == exp_avg_sq.dtype == torch.float32
        assert all(low.dtype == torch.int16 for low in lows)
        assert all(
            low.numel() == gradient.numel() and begin + low.numel() <= rest.numel()
            for low, gradient, begin in zip(lows, gradients, begins, strict=True)
        )
        self._update(
            *(*_sizes(lows), integers(begins), pointers(lows)),
            *(*_gradients(gradients), *(x.data_ptr() for x in kept)),
            (ctypes.c_float * 8)(*factors.tolist(), *_rates(betas), eps, decay),
            torch.get_num_threads(),
        )
        increment_version([*lows, *kept])  # for whoever kept a graph of them


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ctypes.Array]:
    return len(tensors), integers([tensor.numel() for tensor in tensors])


def _gradients(tensors: Sequence[Tensor]) -> tuple[ctypes.Array, int]:
    """Their pointers, and whether they are bfloat16."""
    (dtype,) = {tensor.dtype for tensor in tensors}
    assert dtype in (torch.bfloat16, torch.float32) and all(tensor.is_contiguous() for tensor in tensors)
    return pointers(tensors), int(dtype == torch.bfloat16)


def adamw_factors(step: Tensor, allowed: Tensor, scale: Tensor | float, lr: float, betas: tuple) -> Tensor:
    """The factors of `adamw_halves`.

    Args:
        step: float scalar, which step this is, from 1; 0 before the first that happens.
        allowed: float scalar, 0 where it must not happen.
        scale: of the gradient.
        lr, betas: of AdamW.

    Returns:
        float32 [4], on the device of `step`: the learning rate over the first moment's bias correction, one over the
        root of the second's, `scale`, `allowed`.
    """
    # In float64: 1 - 0.999 ** step has few digits left in float32. Before the first step there is nothing to divide by.
    size, root = (1 - beta ** step.double().clamp(min=1) for beta in betas)
    return torch.stack([lr / size, root.rsqrt(), torch.ones_like(size) * scale, allowed.double()]).float()
