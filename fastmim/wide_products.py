"""Products of bf16 matrices on a CPU that has none: in float32, by kernels given to PyTorch's operators.

Without AVX-512 PyTorch computes them in a plain loop, which takes many times as long as float32's products
(pytorch/pytorch#146508). Numbers of bf16 are numbers of float32 too, and hardware that multiplies bf16 sums in float32:
results are the same but for the order of a sum. What is widened is a part at a time, in memory that calls share, and
still in the cache when it is multiplied.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

from fastmim.room import Room, equal_parts

PART_BYTES = 8 * 2**20
"""Of a factor and a result at a time, in float32."""

_room = Room()


@functools.cache
def widen_products() -> Library:
    """Have this process multiply matrices of bf16 on the CPU in float32, whoever asks for it.

    `torch.library.get_kernel` is meant for this: an operator's kernel that calls the one it stands in for. Convolutions
    and PyTorch's fused attention are left as they are.

    Returns:
        What keeps the kernels in their place.
    """
    library = Library("aten", "IMPL")
    for name, kernel in _KERNELS.items():
        given = get_kernel(f"aten::{name}", "CPU")
        library.impl(name, functools.partial(_call, kernel, given), "CPU", with_keyset=True)
    return library


def _call(
    kernel: Callable[..., Tensor],
    given: Any,
    keys: torch._C.DispatchKeySet,
    *tensors: Tensor,
    out: Tensor | None = None,
    **scales: float,
) -> Tensor:
    """Our kernel for bf16, and for anything else the one that PyTorch had."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return kernel(*tensors, out=out, **scales)
    into = {} if out is None else {"out": out}
    return given.call_boxed(keys, *tensors, **scales, **into)


def _mm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _addmm(None, a, b, out)


def _addmm(
    base: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta base + alpha a b, of [rows, inner] and [inner, columns]."""
    (rows, inner), columns = a.shape, b.shape[1]
    out = _result(a, out, rows, columns)
    base = None if base is None or beta == 0 else base.expand(rows, columns)
    if a.stride(0) == 1 and inner > rows:
        _write(_summed(a, b), base, beta, alpha, out)
        return out
    wide = _widened("b", b)
    for part in _parts(rows, inner + columns):
        factor = _widened("a", a[part])
        product = torch.mm(factor, wide, out=_room.take("product", len(factor), columns, torch.float32))
        _write(product, None if base is None else base[part], beta, alpha, out[part])
    return out


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, a few columns of a and rows of b at a time: a gradient of weights, summed over tokens."""
    total = _room.take("product", len(a), b.shape[1], torch.float32)
    for part in _parts(len(b), len(a) + b.shape[1]):
        factors = _widened("a", a[:, part]), _widened("b", b[part])
        torch.addmm(total, *factors, beta=int(part.start > 0), out=total)
    return total


def _bmm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _baddbmm(None, a, b, out)


def _baddbmm(
    base: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta base + alpha a b, of [matrices, rows, inner] and [matrices, inner, columns]."""
    (matrices, rows, inner), columns = a.shape, b.shape[2]
    out = _result(a, out, matrices, rows, columns)
    base = None if base is None or beta == 0 else base.expand(out.shape)
    for part in _parts(matrices, (rows + columns) * inner + rows * columns):
        product = torch.bmm(a[part].float(), b[part].float())
        _write(product, None if base is None else base[part], beta, alpha, out[part])
    return out


_KERNELS = {
    **dict.fromkeys(("mm", "mm.out"), _mm),
    **dict.fromkeys(("addmm", "addmm.out"), _addmm),
    **dict.fromkeys(("bmm", "bmm.out"), _bmm),
    **dict.fromkeys(("baddbmm", "baddbmm.out"), _baddbmm),
}


def _result(like: Tensor, out: Tensor | None, *shape: int) -> Tensor:
    return like.new_empty(shape) if out is None else out.resize_(shape)


def _widened(name: str, x: Tensor) -> Tensor:
    """A matrix in float32, rows or columns contiguous as they are."""
    if x.stride(0) == 1 and x.stride(1) != 1:
        return _widened(name, x.t()).t()
    return _room.take(name, *x.shape, torch.float32).copy_(x)


def _write(product: Tensor, base: Tensor | None, beta: float, alpha: float, out: Tensor) -> None:
    """out = beta base + alpha product, rounded once."""
    if alpha != 1:
        product *= alpha
    if base is not None:
        product.add_(base, alpha=beta)
    out.copy_(product)


def _parts(rows: int, width: int) -> list[slice]:
    """Of rows of `width` numbers, those of a factor and those of a result."""
    return equal_parts(rows, 4 * width, PART_BYTES)
