"""InfoNCE of query tokens against all key tokens of a batch, without the similarity matrix [R, S].

Keys play the part of the classifier's weight in `masked_cross_entropy`, whose operation this is: similarities of
a chunk of queries by a matrix product, then softmax and its gradient in place by one kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from .masked_cross_entropy import check_labels, check_rows, linear_cross_entropy


def info_nce_reference(
    queries: Tensor, keys: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Contrast of queries and keys. queries [R, D], keys [S, D], labels [R] -> loss [], per_row [R].

    Similarities are in the dtype of `queries`; their division by the temperature and the cross-entropy in
    float32, or in float64 if `queries` is that.
    """
    similarities = F.linear(queries, keys.to(queries.dtype))
    logits = similarities.to(torch.promote_types(queries.dtype, torch.float32)) / temperature
    per_row = F.cross_entropy(logits, labels.long(), reduction="none")
    return per_row.mean(), per_row.detach()


def info_nce(queries: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean of -log(exp(q·k+ / t) / sum over keys of exp(q·k / t)), with k+ the key that a query's label names.

    Rows are compared as they are: normalise both sides first for a cosine similarity. Both sides receive
    gradients, computed in the forward pass where required; detach the side that should have none. Memory and
    precision are those of `masked_cross_entropy`, with S keys in the place of V classes.

    Args:
        queries: [R, D] float, any strides.
        keys: [S, D] float, any strides: the positives and, for each query, S - 1 negatives.
        labels: [R] int64 or int32, any stride: each query's positive, 0..S-1.
        temperature: t, positive.

    Returns:
        loss: float32 scalar.
        per_row: [R] float32, loss of each query, without gradient.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes or devices that do not fit; no rows; labels out of range (see `_dispatch`);
            a temperature that is not positive.

    Source: CPC (van den Oord et al., 2018, equation 4); C-MAE (Kong & Zhang, CVPR 2023) over masked positions.
    """
    check_rows("queries", queries, "[R, D]")
    check_rows("keys", keys, "[S, D]")
    _dispatch.check_tensor("keys", keys, "[S, D]", _dispatch.FLOAT_DTYPES, queries.device)
    _dispatch.check_shape("keys", keys, "[S, D]", (None, queries.shape[1]))
    check_labels(labels, queries)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; wanted a positive number")
    return linear_cross_entropy(queries, keys, None, labels, 1 / temperature)
