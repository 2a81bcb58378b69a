"""Every kernel that is benchmarked, in one place: its inputs, its call, the naive formulation, its floor.

To add one: import it, write a function from `Inputs` to `Problem`, decorate it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastmim.kernels import (
    add_layer_norm,
    bias_gelu,
    cosine_align,
    embed_tokens,
    gather_patches,
    gather_tokens,
    info_nce,
    masked_cross_entropy,
    masked_pixel_loss,
    mse_align,
    sample_block_mask,
    sample_grid_mask,
    sample_random_mask,
    scatter_tokens,
    short_attention,
    unshuffle,
)

from benchmarks import naive
from benchmarks.problems import Inputs, Problem


@dataclass(frozen=True)
class Case:
    """How to build a kernel's problem, and how it is counted.

    `counted_batch` is the batch that is interpreted: small, since the interpreter is slow, but enough samples
    for whatever one program shares between samples. `scales`: bytes grow with the batch, so that the count is
    scaled to a shape's own batch; otherwise the row reports the counted batch. `integer`: no float dtype.
    """

    build: Callable[[Inputs], Problem]
    counted_batch: int
    scales: bool = True
    integer: bool = False


CASES: dict[str, Case] = {}


def case(name: str, **settings) -> Callable:
    """Register a problem's builder under a name, with the settings of `Case`."""

    def register(build: Callable[[Inputs], Problem]) -> Callable[[Inputs], Problem]:
        CASES[name] = Case(build, **settings)
        return build

    return register


def build_sampler(
    inputs: Inputs, fused: Callable, options: tuple, plain: Callable, plain_args: tuple
) -> Problem:
    """Masks of the samples of a batch; the naive ones have no key."""
    batch = inputs.batch
    epochs, positions = (torch.arange(batch, device=inputs.device) for _ in range(2))
    floor = {"forward": batch * (16 + 17 * inputs.shape.patches)}
    return Problem(fused, (0, epochs, positions, *options), plain, plain_args, floor)


@case("sample_mask", counted_batch=1, integer=True)
def build_sample_mask(inputs: Inputs) -> Problem:
    """Random masks."""
    shape = inputs.shape
    sizes = (shape.patches, shape.kept)
    plain = (inputs.batch, *sizes, inputs.device)
    return build_sampler(inputs, sample_random_mask, sizes, naive.random_masking, plain)


@case("sample_block_mask", counted_batch=1, integer=True)
def build_sample_block_mask(inputs: Inputs) -> Problem:
    """Masks of rectangles; the naive one is given those that a loader drew on the CPU, and orders the patches."""
    shape = inputs.shape
    mask = torch.zeros(inputs.batch, shape.patches, dtype=torch.bool, device=inputs.device)
    mask.scatter_(1, inputs.ids()[1], True)
    return build_sampler(
        inputs, sample_block_mask, (shape.grid, shape.kept), naive.order_by_mask, (mask, shape.kept)
    )


@case("sample_grid_mask", counted_batch=1, integer=True)
def build_sample_grid_mask(inputs: Inputs) -> Problem:
    """One patch of each 2 x 2, at a random phase."""
    shape = inputs.shape
    plain = (inputs.batch, *shape.grid, inputs.device)
    return build_sampler(inputs, sample_grid_mask, (shape.grid, True), naive.grid_masking, plain)


@case("gather_patches", counted_batch=1)
def build_gather_patches(inputs: Inputs) -> Problem:
    """Bytes to visible patches."""
    shape = inputs.shape
    arguments = (inputs.images(), inputs.ids()[0], shape.patch_size, *inputs.mean_and_std(), inputs.dtype)
    floor = {"forward": inputs.batch * shape.kept * (shape.length * (1 + inputs.item) + 8)}
    return Problem(gather_patches, arguments, naive.normalise_patchify_gather, arguments, floor)


@case("gather_tokens", counted_batch=1)
def build_gather_tokens(inputs: Inputs) -> Problem:
    """Tokens of the encoder to visible tokens."""
    shape, row = inputs.shape, inputs.shape.width * inputs.item
    arguments = (inputs.floats(inputs.batch, shape.patches, shape.width, grad=True), inputs.ids()[0])
    floor = {
        "forward": inputs.batch * shape.kept * (2 * row + 8),
        "backward": inputs.batch * ((shape.kept + shape.patches) * row + 8 * shape.kept),
    }
    return Problem(gather_tokens, arguments, naive.gather, arguments, floor)


@case("scatter_tokens", counted_batch=1)
def build_scatter_tokens(inputs: Inputs) -> Problem:
    """Visible tokens to their places among zeros."""
    shape, row = inputs.shape, inputs.shape.width * inputs.item
    x = inputs.floats(inputs.batch, shape.kept, shape.width, grad=True)
    arguments = (x, inputs.ids()[0], shape.patches)
    floor = {
        "forward": inputs.batch * ((shape.kept + shape.patches) * row + 8 * shape.kept),
        "backward": inputs.batch * shape.kept * (2 * row + 8),
    }
    return Problem(scatter_tokens, arguments, naive.scatter, arguments, floor)


@case("embed_tokens", counted_batch=64)
def build_embed_tokens(inputs: Inputs) -> Problem:
    """Visible patches to encoder input; the naive one adds positions to all patches, then selects."""
    shape, batch, width = inputs.shape, inputs.batch, inputs.shape.width
    ids_keep, _, ids_restore = inputs.ids()
    cls_token, pos_embed = inputs.floats(1, 1, width, grad=True), inputs.floats(1, 1 + shape.patches, width)
    fused = (inputs.floats(batch, shape.kept, width, grad=True), cls_token, pos_embed, ids_restore)
    plain = (inputs.floats(batch, shape.patches, width, grad=True), cls_token, pos_embed, ids_keep)
    row, positions = width * inputs.item, 1 + ids_keep.unique().numel()
    floor = {
        "forward": (batch * (1 + 2 * shape.kept) + 1 + positions) * row + 8 * batch * shape.patches,
        # The gradient of the patches is a view: what is left is the cls token's sum.
        "backward": (batch + 1) * row,
    }
    return Problem(embed_tokens, fused, naive.embed_all_then_select, plain, floor)


@case("unshuffle", counted_batch=64)
def build_unshuffle(inputs: Inputs) -> Problem:
    """Encoder output to decoder input; the positions are fixed, as in MAE."""
    shape, batch, width = inputs.shape, inputs.batch, inputs.shape.decoder_width
    arguments = (
        inputs.floats(batch, 1 + shape.kept, width, grad=True),
        inputs.floats(1, 1, width, grad=True),
        inputs.floats(1, 1 + shape.patches, width),
        inputs.ids()[2],
    )
    row, rows = width * inputs.item, batch * (2 + shape.kept + shape.patches)
    floor = {
        "forward": (rows + 2 + shape.patches) * row + 8 * batch * shape.patches,
        "backward": (rows + 1) * row + 8 * batch * shape.patches,
    }
    return Problem(unshuffle, arguments, naive.assemble_decoder_input, arguments, floor)


@case("masked_pixel_loss", counted_batch=1)
def build_masked_pixel_loss(inputs: Inputs) -> Problem:
    """Loss with per-patch normalised targets; the naive one is given normalised images and predicts all."""
    shape, batch = inputs.shape, inputs.batch
    ids_mask = inputs.ids()[1]
    pred = inputs.floats(batch, shape.removed, shape.length, grad=True)
    fused = (pred, inputs.images(), ids_mask, shape.patch_size, *inputs.mean_and_std(), True)
    mask = torch.zeros(batch, shape.patches, device=inputs.device).scatter_(1, ids_mask, 1.0)
    plain = (
        inputs.floats(batch, shape.patches, shape.length, grad=True),
        inputs.floats(batch, shape.channels, shape.side, shape.side, dtype=torch.float32),
        mask,
        shape.patch_size,
    )
    values = batch * shape.removed * shape.length
    floor = {
        "forward": values * (1 + 2 * inputs.item) + 12 * batch * shape.removed,
        "backward": 2 * values * inputs.item + 4,
    }
    return Problem(masked_pixel_loss, fused, naive.loss_over_all_patches, plain, floor)


@case("add_layer_norm", counted_batch=2)
def build_add_layer_norm(inputs: Inputs) -> Problem:
    """A branch added to the tokens of an encoder that sees all patches, and the norm; both are used."""
    shape, width = inputs.shape, inputs.shape.width
    sizes = (inputs.batch, shape.patches, width)
    tokens = [inputs.floats(*sizes, grad=True) for _ in range(2)]
    arguments = (*tokens, *(inputs.floats(width, grad=True) for _ in range(2)), 1e-6)
    values = inputs.batch * shape.patches * width
    floor = {
        "forward": (4 * values + 2 * width) * inputs.item,
        "backward": (4 * values + 3 * width) * inputs.item,
    }
    return Problem(add_layer_norm, arguments, naive.add_then_norm, arguments, floor)


@case("bias_gelu", counted_batch=2)
def build_bias_gelu(inputs: Inputs) -> Problem:
    """The hidden layer of an MLP; the naive one is given a product that has the bias already."""
    shape, hidden = inputs.shape, 4 * inputs.shape.width
    x = inputs.floats(inputs.batch, shape.patches, hidden, grad=True)
    bias = inputs.floats(hidden, grad=True)
    values = inputs.batch * shape.patches * hidden
    floor = {
        "forward": (2 * values + hidden) * inputs.item,
        "backward": (3 * values + 2 * hidden) * inputs.item,
    }
    return Problem(bias_gelu, (x, bias), naive.gelu_after_biased_product, (x, bias), floor)


@case("short_attention", counted_batch=1)
def build_short_attention(inputs: Inputs) -> Problem:
    """The kept patches of an image, in heads of 64; the naive one is PyTorch's fused attention, as in timm's blocks."""
    shape, head = inputs.shape, 64
    qkv = inputs.floats(inputs.batch, shape.kept, 3, shape.width // head, head, grad=True)
    values = inputs.batch * shape.kept * shape.width * inputs.item
    floor = {"forward": 4 * values, "backward": 7 * values}
    return Problem(short_attention, (qkv,), naive.attend_to_unbound, (qkv,), floor)


def build_align(inputs: Inputs, fused: Callable, plain: Callable) -> Problem:
    """Features of removed patches against a teacher's."""
    shape = inputs.shape
    rows, row = inputs.batch * shape.removed, shape.width * inputs.item
    sizes = (inputs.batch, shape.removed, shape.width)
    arguments = (inputs.floats(*sizes, grad=True), inputs.floats(*sizes))
    floor = {"forward": rows * (2 * row + 4) + 4, "backward": 3 * rows * row + 4}
    return Problem(fused, arguments, plain, arguments, floor)


@case("mse_align", counted_batch=1)
def build_mse_align(inputs: Inputs) -> Problem:
    """CAE's alignment."""
    return build_align(inputs, mse_align, naive.normalised_squared_error)


@case("cosine_align", counted_batch=1)
def build_cosine_align(inputs: Inputs) -> Problem:
    """CAE v2's alignment."""
    return build_align(inputs, cosine_align, naive.cosine_distance)


def classifier_floor(inputs: Inputs, rows: int, columns: int, classes: int) -> dict[str, int]:
    """Both sides and the labels are read, a loss a row and both gradients are written; no logits."""
    ours, weight = rows * columns, classes * columns
    return {
        "forward": 2 * (ours + weight) * inputs.item + 12 * rows,
        "backward": 2 * (ours + weight) * inputs.item + 4,
    }


@case("masked_cross_entropy", counted_batch=16, scales=False)
def build_masked_cross_entropy(inputs: Inputs) -> Problem:
    """A linear classifier of removed patches."""
    rows, width, classes = inputs.batch * inputs.shape.removed, inputs.shape.width, inputs.shape.classes
    labels = torch.arange(rows, device=inputs.device) % classes
    weight = inputs.floats(classes, width, grad=True)
    arguments = (inputs.floats(rows, width, grad=True), weight, None, labels)
    floor = classifier_floor(inputs, rows, width, classes)
    return Problem(masked_cross_entropy, arguments, naive.linear_cross_entropy, arguments, floor)


@case("info_nce", counted_batch=16, scales=False)
def build_info_nce(inputs: Inputs) -> Problem:
    """Each removed patch against those of the whole batch."""
    rows, width = inputs.batch * inputs.shape.removed, inputs.shape.decoder_width
    queries, keys = (inputs.floats(rows, width, grad=True) for _ in range(2))
    arguments = (queries, keys, torch.arange(rows, device=inputs.device), 0.07)
    floor = classifier_floor(inputs, rows, width, rows)
    return Problem(info_nce, arguments, naive.contrast, arguments, floor)
