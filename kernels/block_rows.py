"""What stands between the products of a transformer block, on rows that a CPU has in its cache: by C.

Its backward passes compute GELU and LayerNorm again, beside their gradients and the sums over rows that biases, gains
and shifts are given: one visit of memory where PyTorch makes four to six. PyTorch computes what C does not take.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.profiler import record_function

from ._native import HALF, is_plain, native


def gelu_rows(hidden: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """The exact GELU of hidden + bias, which is rounded once. 2 numbers are moved for one of `hidden`.

    Args:
        hidden: [R, D] float, a linear's result without its bias.
        bias: [D], of its dtype.
        out: takes the result; as `hidden`.

    Returns:
        `out`.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, the form with the error function.
    """
    library = _library_for([hidden, out], [bias])
    if library is None:
        return torch.ops.aten.gelu.out(hidden + bias, out=out)
    with record_function("fastmim::gelu_rows"):  # what is no operator has no name in a profile
        library.gelu_rows(*_addresses(hidden, bias, out), *_size(hidden))
    return out


def gelu_rows_gradient(hidden: Tensor, bias: Tensor, grad: Tensor, of_bias: Tensor) -> None:
    """The gradient of `gelu_rows`, and its result again. 4 numbers are moved for one of `hidden`.

    Args:
        hidden, bias: of `gelu_rows`; `hidden` becomes its result.
        grad: as `hidden`, of the result; becomes the gradient of `hidden`.
        of_bias: float32 [D] (float64 for such rows), to which the gradient of `bias` is added.

    Raises:
        MemoryError: no memory for sums of some rows each.
    """
    library = _library_for([hidden, grad], [bias], of_bias)
    if library is None:
        values = hidden + bias
        torch.ops.aten.gelu.out(values, out=hidden)
        torch.ops.aten.gelu_backward.grad_input(grad, values, grad_input=grad)
        of_bias += grad.sum(0)
        return
    with record_function("fastmim::gelu_rows_gradient"):
        failed = library.gelu_rows_gradient(*_addresses(hidden, bias, grad, of_bias), *_size(hidden))
    _require_memory(failed, hidden)


def norm_rows(x: Tensor, gain: Tensor, shift: Tensor, eps: float, out: Tensor) -> Tensor:
    """A LayerNorm. 2 numbers are moved for one of `x`.

    Args:
        x: [R, D] float.
        gain, shift: [D], the norm's parameters, of the dtype of `x`.
        eps: of the norm.
        out: takes the result; as `x`.

    Returns:
        `out`.

    Source: Ba et al., "Layer Normalization", 2016.
    """
    library = _library_for([x, out], [gain, shift])
    if library is None:
        return out.copy_(torch.nn.functional.layer_norm(x, gain.shape, gain, shift, eps))
    with record_function("fastmim::norm_rows"):
        library.norm_rows(*_addresses(x, gain, shift), eps, *_addresses(out), *_size(x))
    return out


def norm_rows_gradient(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    grad: Tensor,
    added: Tensor | None,
    of_x: Tensor,
    sums: Tensor,
) -> None:
    """The gradient of `norm_rows`, and its result again. 4 numbers are moved for one of `x`, 5 with `added`.

    Args:
        x, gain, shift, eps: of `norm_rows`.
        grad: as `x`, of the norm's result; becomes that result.
        added: as `x`, what the gradient of `x` is given besides; or None.
        of_x: as `x`; takes its gradient.
        sums: float32 [3, D] (float64 for such rows), to which the gradients of `gain` and `shift` are added, and the
            sum of `added`.

    Raises:
        MemoryError: no memory for sums of some rows each.
    """
    assert sums.ndim == 2 and len(sums) == 3
    beside = [] if added is None else [added]
    library = _library_for([x, grad, of_x, *beside], [gain, shift], sums)
    if library is None:
        _norm_rows_gradient_torch(x, gain, shift, eps, grad, added, of_x, sums)
        return
    rows, parameters = _addresses(grad, added, of_x, sums), _addresses(x, gain, shift)
    with record_function("fastmim::norm_rows_gradient"):
        failed = library.norm_rows_gradient(*parameters, eps, *rows, *_size(x))
    _require_memory(failed, x)


def _norm_rows_gradient_torch(x, gain, shift, eps, grad, added, of_x, sums) -> None:
    normed, *statistics = torch.native_layer_norm(x, gain.shape, gain, shift, eps)
    of_rows, *of_parameters = torch.ops.aten.native_layer_norm_backward(
        grad, x, gain.shape, *statistics, gain, shift, [True] * 3
    )
    sums[:2] += torch.stack(of_parameters)
    if added is None:
        of_x.copy_(of_rows)
    else:
        sums[2] += added.sum(0)
        torch.add(of_rows, added, out=of_x)
    grad.copy_(normed)


def _library_for(rows: list[Tensor], vectors: list[Tensor], sums: Tensor | None = None) -> ctypes.CDLL | None:
    """The C for tensors of a dtype and layout that it takes; all are checked here, since C looks at none.

    Args:
        rows: [R, D] each.
        vectors: [D] each.
        sums: [D], or some of them.
    """
    first = rows[0]
    assert first.ndim == 2 and all(tensor.shape == first.shape for tensor in rows)
    assert all(tensor.shape == first.shape[1:] for tensor in vectors)
    assert all(tensor.dtype == first.dtype for tensor in (*rows, *vectors))
    tensors = [*rows, *vectors] if sums is None else [*rows, *vectors, sums]
    if first.dtype not in HALF or not all(map(is_plain, tensors)):
        return None
    assert sums is None or (sums.dtype == torch.float32 and sums.shape[-1:] == first.shape[1:])
    library = native("block_rows.c")
    return None if library is None else _typed(library)


@functools.cache
def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    address, integer, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sizes = size, integer, integer, size
    library.gelu_rows.argtypes = (*[address] * 3, *sizes)
    library.gelu_rows_gradient.argtypes = (*[address] * 4, *sizes)
    norm = *[address] * 3, ctypes.c_float
    library.norm_rows.argtypes = (*norm, address, *sizes)
    library.norm_rows_gradient.argtypes = (*norm, *[address] * 4, *sizes)
    return library


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _size(rows: Tensor) -> tuple[int, int, int, int]:
    return HALF[rows.dtype], *rows.shape, torch.get_num_threads()


def _require_memory(failed: int, rows: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for sums over rows of {rows.shape[1]} numbers")
