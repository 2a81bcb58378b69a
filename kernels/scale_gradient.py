"""What a loss stored in its forward pass, times the incoming gradient: the backward pass of the fused losses."""

import torch
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation


@kernel
def _scale_gradient_kernel(grad, values, out, scale, size, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad) * scale
    scaled = tl.load(values + element, mask=element < size, other=0.0).to(tl.float32) * factor
    tl.store(out + element, scaled.to(out.dtype.element_ty), mask=element < size)


def _scale_triton(grad: Tensor, values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    out = values.new_empty(values.shape, dtype=dtype)
    block = 2048
    programs = _dispatch.cdiv(values.numel(), block)
    _dispatch.launch(
        _scale_gradient_kernel, (programs,), grad, values, out, scale, values.numel(), BLOCK=block
    )
    return out


@operation("scale_gradient")
def scale_gradient(grad: Tensor, values: Tensor, count: int, factor: float, dtype: torch.dtype) -> Tensor:
    """grad * factor / count * values, in `dtype`.

    The product is formed in float32, on the device: a factor over a count is near 1e-8 at training sizes, and
    applied in the forward pass it would push small gradients below what float16 can hold. The count is an argument
    and not the quotient: under dynamic shapes Inductor would pass the float of the first shape it saw.

    Args:
        grad: float scalar tensor.
        values: contiguous, float.
        count: what the loss was a mean over.
        factor: a constant of the loss.
        dtype: of the result.
    """
    scale = factor / count
    if _dispatch.use_triton(values):
        return _scale_triton(grad, values, scale, dtype)
    compute = torch.promote_types(values.dtype, torch.float32)
    return values.to(compute).mul(grad.to(compute) * scale).to(dtype)


@scale_gradient.register_fake
def _(grad: Tensor, values: Tensor, count: int, factor: float, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)
