"""What attention's backward pass makes of scores and of the gradient of probabilities: by C on a CPU."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from ._native import HALF, is_plain, native


def softmax_gradient_reference(scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As `softmax_gradient`, in new tensors: P = softmax(S), P * (dP - sum of P * dP)."""
    probabilities = scores.softmax(-1)
    return probabilities, torch._softmax_backward_data(grad, probabilities, -1, grad.dtype)


def softmax_gradient(scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the last dimension, and the gradient of what it is given.

    On a CPU C computes it for contiguous float32 and bfloat16, in the memory of both arguments, from probabilities in
    float32. Then 4 numbers are moved for a score, and each row is visited once.

    Args:
        scores: [..., N].
        grad: of the probabilities, of the same shape and dtype.

    Returns:
        The probabilities and the gradient of the scores; the arguments are used up.
    """
    assert scores.shape == grad.shape and scores.dtype == grad.dtype
    fits = scores.dtype in HALF and is_plain(scores) and is_plain(grad)
    function = _function() if fits else None
    if function is None:
        return softmax_gradient_reference(scores, grad)
    size = scores.shape[-1]
    rows = scores.numel() // max(size, 1)
    with record_function("fastmim::softmax_gradient"):  # what is no operator has no name in a profile
        failed = function(
            *(scores.data_ptr(), grad.data_ptr(), HALF[scores.dtype], rows, size, torch.get_num_threads())
        )
    if failed:
        raise MemoryError(f"no memory for rows of {size} scores")
    return scores, grad


def _function() -> Callable[..., int] | None:
    library = native("softmax_gradient.c")
    return None if library is None else _typed(library)


@functools.cache
def _typed(library: ctypes.CDLL) -> Callable[..., int]:
    function, integer = library.softmax_gradient, ctypes.c_int64
    function.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int, integer, integer, ctypes.c_int)
    return function
