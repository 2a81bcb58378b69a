"""Linear classifier and cross-entropy on rows, chunk by chunk: the logits [R, V] never exist as a whole.

The gradients of the rows, the weight and the bias are computed in the forward pass, while a chunk of logits
exists, as fused linear-cross-entropy losses do. The same operation, with keys in the place of the weight, is
`info_nce`.
"""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import _dispatch
from ._dispatch import kernel
from ._operation import operation
from .scale_gradient import scale_gradient

CACHED_LOGITS = 2**24
"""Most logits of a chunk that is to stay in the L2 cache of an A100 or H100: 32 MiB in bfloat16."""

CHUNK_LOGITS = 2**28
"""Most logits of any chunk of more than 128 rows: 512 MiB in bfloat16."""

CHUNK_ROWS = 1024
"""Most rows of a chunk. A chunk's weight gradient is formed in the dtype of the rows: float16 must hold its sums."""


def masked_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax over V classes. x [R, D], weight [V, D], bias [V] or None, labels [R] -> loss [], per_row [R].

    Logits are in the dtype of `x`; the cross-entropy in float32, or in float64 if `x` is that.
    """
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    per_row = F.cross_entropy(logits, labels.long(), reduction="none")
    return per_row.mean(), per_row.detach()


@kernel
def _softmax_gradient_kernel(
    logits,
    labels,
    per_row,
    logit_scale,
    stride_label,
    classes,
    STORE_GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row. A row that fits one block is read once and overwritten from registers; a longer one is
    # read twice, the first time for its running maximum and sum.
    row = tl.program_id(0)
    logits += row.to(tl.int64) * classes
    label = tl.load(labels + row * stride_label)
    column = tl.arange(0, BLOCK)
    if WHOLE:
        values = tl.load(logits + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        values *= logit_scale
        at_label = tl.sum(tl.where(column == label, values, 0.0), axis=0)
        largest = tl.max(values, axis=0)
        exponentials = tl.exp(values - largest)
        total = tl.sum(exponentials, axis=0)
        if STORE_GRADIENT:
            gradient = exponentials / total - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < classes)
    else:
        # One running value per lane, reduced once after the loop.
        running_largest = tl.full([BLOCK], float("-inf"), tl.float32)
        running_total = tl.full([BLOCK], 0.0, tl.float32)
        running_label = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, classes, BLOCK):
            inside = start + column < classes
            values = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            values *= logit_scale
            running_label += tl.where(start + column == label, values, 0.0)
            before = running_largest
            running_largest = tl.maximum(running_largest, values)
            running_total = running_total * tl.exp(before - running_largest) + tl.exp(
                values - running_largest
            )
        at_label = tl.sum(running_label, axis=0)
        largest = tl.max(running_largest, axis=0)
        total = tl.sum(running_total * tl.exp(running_largest - largest), axis=0)
        if STORE_GRADIENT:
            for start in range(0, classes, BLOCK):
                inside = start + column < classes
                values = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(values * logit_scale - largest) / total
                gradient -= tl.where(start + column == label, 1.0, 0.0)
                tl.store(logits + start + column, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(per_row + row, tl.log(total) + largest - at_label)


def _softmax_gradient_triton(
    logits: Tensor, labels: Tensor, per_row: Tensor, logit_scale: float, needs_grad: bool
) -> None:
    rows, classes = logits.shape
    block = min(8192, _dispatch.next_power_of_2(classes))
    _dispatch.launch(
        _softmax_gradient_kernel,
        (rows,),
        logits,
        labels,
        per_row,
        logit_scale,
        labels.stride(0),
        classes,
        num_warps=_dispatch.warps_for(block, 8),
        STORE_GRADIENT=needs_grad,
        WHOLE=classes <= block,
        BLOCK=block,
    )


def _softmax_gradient_torch(
    logits: Tensor, labels: Tensor, per_row: Tensor, logit_scale: float, needs_grad: bool
) -> None:
    values = logits.to(per_row.dtype) * logit_scale
    labels = labels.long()[:, None]
    log_total = values.logsumexp(1)
    torch.sub(log_total, values.gather(1, labels)[:, 0], out=per_row)
    if needs_grad:
        values.sub_(log_total[:, None]).exp_()
        values.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=values.dtype))
        logits.copy_(values)


def chunk_rows(rows: int, classes: int, columns: int) -> int:
    """Rows whose logits exist at a time, within 128..CHUNK_ROWS.

    A chunk moves 10 bytes a logit unless they are cached, and 16 bytes a class and column for the weight's side: chunks
    of fewer than about 2 `columns` rows, which keep logits in the cache, move more than that saves.
    """
    cached, most = (limit // classes // 128 * 128 for limit in (CACHED_LOGITS, CHUNK_LOGITS))
    chosen = cached if cached >= min(CHUNK_ROWS, 2 * columns) else most
    return min(rows, CHUNK_ROWS, max(128, chosen))


def weight_gradient_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the weight's gradient is kept in until the backward pass.

    bfloat16 where rows and weight are that, since its range is float32's. float16 cannot hold sums over many rows
    before they are divided by R; a float32 weight, as under autocast, wants its gradient in float32.
    """
    if x.dtype == weight.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    softmax_gradient = _softmax_gradient_torch
    if _dispatch.use_triton(x):
        _dispatch.check_kernel_dtype("x", x)
        softmax_gradient = _softmax_gradient_triton
    compute = torch.promote_types(x.dtype, torch.float32)
    rows, classes = x.shape[0], weight.shape[0]
    product_weight = weight.to(x.dtype)
    product_bias = None if bias is None else bias.to(x.dtype)
    per_row = x.new_empty(rows, dtype=compute)
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    kept = weight_gradient_dtype(x, weight)
    grad_weight = x.new_empty(0, dtype=kept)
    grad_bias = x.new_zeros(classes if needs[2] else 0, dtype=compute)
    step = chunk_rows(rows, classes, x.shape[1])
    buffer = x.new_empty(step, classes)
    for start in range(0, rows, step):
        chunk = x[start : start + step]
        logits = buffer[: chunk.shape[0]]
        if product_bias is None:
            torch.mm(chunk, product_weight.T, out=logits)
        else:
            torch.addmm(product_bias, chunk, product_weight.T, out=logits)
        at = slice(start, start + step)
        softmax_gradient(logits, labels[at], per_row[at], logit_scale, any(needs))
        if needs[0]:
            torch.mm(logits, product_weight, out=grad_x[at])
        if needs[1]:
            product = logits.T @ chunk
            # Sums over chunks are in float32: rounded to bfloat16 after each chunk, small contributions would be
            # lost. The last addition writes what is kept: rounding it takes no pass of its own.
            is_last = start + step >= rows
            if start == 0:
                grad_weight = product.to(kept if is_last else compute)
            elif is_last and kept != compute:
                grad_weight = torch.add(grad_weight, product, out=product)
            else:
                grad_weight += product
        if needs[2]:
            grad_bias += logits.sum(0, dtype=compute)
    return per_row.mean(), per_row, grad_x, grad_weight, grad_bias


@operation("linear_cross_entropy")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _dispatch.check_range("labels", labels, 0, weight.shape[0])
    # The dtype of the products is that of `x`: autocast must not change it halfway.
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, weight, bias, labels, logit_scale, needs)


@_linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    per_row = x.new_empty(x.shape[0], dtype=compute)
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    grad_weight = x.new_empty(weight.shape if needs[1] else 0, dtype=weight_gradient_dtype(x, weight))
    grad_bias = x.new_empty(weight.shape[0] if needs[2] else 0, dtype=compute)
    return per_row.new_empty(()), per_row, grad_x, grad_weight, grad_bias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.logit_scale, ctx.needs = inputs
    ctx.rows = x.shape[0]
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[2:])
    # Otherwise zeros are made for every output that enters no loss: V*D of them for the weight's gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, *unused):
    if grad is None:
        return (None,) * 6
    grads = [
        scale_gradient(grad, values, ctx.rows, ctx.logit_scale, dtype) if needed else None
        for values, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *grads, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logit_scale * (x @ weight.T + bias); the arguments have been checked."""
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (x, weight, bias)
    ]
    loss, per_row, *_ = _linear_cross_entropy(x, weight, bias, labels, logit_scale, needs)
    return loss, per_row.detach()


def check_rows(name: str, x: Tensor, wanted: str) -> None:
    """Check a float tensor [R, D] that has at least one element; TypeError or ValueError."""
    _dispatch.check_tensor(name, x, wanted, _dispatch.FLOAT_DTYPES)
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}; wanted at least one row and one column")


def check_labels(labels: Tensor, like: Tensor) -> None:
    """Check class labels: one per row of `like`; TypeError or ValueError."""
    _dispatch.check_tensor("labels", labels, "[R]", _dispatch.INDEX_DTYPES, like.device)
    _dispatch.check_shape("labels", labels, "[R]", (like.shape[0],))


def masked_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a linear classifier on rows, as for the visual tokens of removed patches.

    Products are in the dtype of `x`, as under autocast; softmax, loss and the sums of the weight's gradient over
    chunks are in float32 (float64 for a float64 `x`, in plain PyTorch only). The forward pass keeps, until the
    backward pass, the gradients that are required: R*D values in the dtype of `x`, V*D and V in float32; V*D of
    them, once summed, in bfloat16 if `x` and `weight` are that.

    Args:
        x: [R, D] float, any strides.
        weight: [V, D] float.
        bias: [V] float, or None.
        labels: [R] int64 or int32, any stride: classes 0..V-1.

    Returns:
        loss: float32 scalar.
        per_row: [R] float32, cross-entropy of each row, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows; labels out of range (see `_dispatch`).

    Source: CAE (Chen et al., IJCV 2024), V = 8192 tokens of a discrete VAE; MAE (He et al., CVPR 2022), Table 1d.
    """
    check_rows("x", x, "[R, D]")
    _dispatch.check_tensor("weight", weight, "[V, D]", _dispatch.FLOAT_DTYPES, x.device)
    _dispatch.check_shape("weight", weight, "[V, D]", (None, x.shape[1]))
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; wanted at least one class")
    if bias is not None:
        _dispatch.check_tensor("bias", bias, "[V]", _dispatch.FLOAT_DTYPES, x.device)
        _dispatch.check_shape("bias", bias, "[V]", (weight.shape[0],))
    check_labels(labels, x)
    return linear_cross_entropy(x, weight, bias, labels, 1.0)
