import pytest
import torch
import torch.nn.functional as F
from fastmim.kernels import masked_pixel_loss, masked_pixel_loss_reference

from benchmarks.counting import count_traffic
from tests.kernels.kernel_testing import (
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    assert_error_budget,
    assert_same_sums,
    constants,
    exact_patches,
    random_images,
    rounding_factor,
    split_ids,
)

# channels, patch size, rows and columns of the grid
SIZES = [(1, 4, 3, 2), (3, 8, 2, 3), (4, 14, 1, 4), (3, 16, 2, 1), (13, 32, 1, 2), (3, 5, 3, 3)]
LONG = [(1, 4, 7, 7), (3, 4, 14, 14), (1, 4, 1, 197), (1, 4, 33, 31)]


def setup(
    channels,
    patch_size,
    rows,
    columns,
    dtype=torch.float32,
    layout="packed",
    ids_dtype=torch.int64,
    batch=2,
    image_dtype=torch.uint8,
):
    images = random_images(batch, rows * patch_size, columns * patch_size, channels, layout, image_dtype)
    _, ids, _ = split_ids(batch, rows * columns, 1, ids_dtype)
    pred = torch.randn(*ids.shape, patch_size**2 * channels).to(dtype)
    return pred, images, ids, patch_size, *constants(channels)


def exact_loss(pred, images, ids, patch_size, mean, std, norm_pix=False, loss="mse"):
    """MAE's or SimMIM's formula in float64, patch by patch."""
    target = exact_patches(images, ids, patch_size, mean, std)
    losses = []
    for row, wanted in zip(pred.flatten(0, 1), target.flatten(0, 1), strict=True):
        if norm_pix:
            count = wanted.numel()
            centred = wanted - wanted.sum() / count
            wanted = centred / (centred.square().sum() / (count - 1) + 1e-6).sqrt()
        error = row - wanted
        error = error * error.detach().sign() if loss == "l1" else error.square()
        losses.append(error.sum() / wanted.numel())
    per_patch = torch.stack(losses).view(ids.shape)
    return per_patch.sum() / ids.numel(), per_patch


def run(function, arguments, norm_pix, dtype, scale=1.0, loss="mse"):
    pred = arguments[0].detach().to(dtype).requires_grad_()
    mean_error, per_patch = function(pred, *arguments[1:], norm_pix, loss)
    (grad,) = torch.autograd.grad(mean_error * scale, pred)
    return mean_error.detach(), per_patch.detach(), grad


def assert_loss_and_gradient(backend, arguments, dtype, norm_pix, loss):
    # The scale plays the part of fp16 loss scaling and keeps small gradients out of float16's subnormals.
    actual = run(masked_pixel_loss, arguments, norm_pix, dtype, 1000.0, loss)
    native = run(masked_pixel_loss_reference, arguments, norm_pix, dtype, 1000.0, loss)
    exact = run(exact_loss, arguments, norm_pix, torch.float64, 1000.0, loss)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_error_budget(actual[0], native[0], exact[0])
    assert_error_budget(actual[1], native[1], exact[1])
    # pred - target is rounded to the dtype of `pred` on its way to the backward pass: one rounding more.
    eps = torch.finfo(dtype).eps
    assert_error_budget(
        actual[2], native[2], exact[2], rounding_factor(backend, dtype), floor=max(1e-6, eps / 2)
    )


@pytest.mark.parametrize(("norm_pix", "loss"), [(False, "mse"), (True, "mse"), (False, "l1")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradient(backend, unwritten_shows, size, dtype, norm_pix, loss):
    assert_loss_and_gradient(backend, setup(*size, dtype), dtype, norm_pix, loss)


@pytest.mark.parametrize("size", LONG)
def test_long_sequences(backend, unwritten_shows, size):
    pred, images, ids, *rest = setup(*size, batch=1)
    for some in (slice(None), slice(0, 1)):
        arguments = (pred[:, some], images, ids[:, some], *rest)
        assert_loss_and_gradient(backend, arguments, torch.float32, True, "l1")


FLOATS = [
    (torch.float32, "planar", torch.bfloat16, "mse"),
    (torch.bfloat16, "packed", torch.float32, "l1"),
    (torch.float16, "crop", torch.float16, "mse"),
]


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("image_dtype", "layout", "dtype", "loss"), FLOATS)
def test_float_images(backend, unwritten_shows, image_dtype, layout, dtype, loss, norm_pix):
    arguments = setup(3, 8, 2, 3, dtype, layout, image_dtype=image_dtype)
    assert_loss_and_gradient(backend, arguments, dtype, norm_pix, loss)


@pytest.mark.parametrize(
    ("image_dtype", "layout"),
    [(torch.uint8, "planar"), (torch.uint8, "crop"), (torch.float32, "planar"), (torch.bfloat16, "packed")],
)
@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_the_kernel_reads_each_pixel_once(image_dtype, layout, loss):
    pred, images, ids, *rest = setup(3, 16, 3, 4, torch.bfloat16, layout, image_dtype=image_dtype)
    with count_traffic() as traffic:
        masked_pixel_loss(pred.requires_grad_(), images, ids, *rest, loss=loss)
    floor = pred.numel() * (images.element_size() + 4) + 12 * ids.numel()
    assert floor <= traffic.bytes <= 1.05 * floor


def test_l1_has_no_gradient_where_the_prediction_is_right(backend):
    images = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 2, 2, 1)
    pred = torch.tensor([[[0.0, 0.5, 0.5, 0.5]]]).requires_grad_()
    statistics = torch.zeros(1), torch.ones(1)
    loss, per_patch = masked_pixel_loss(pred, images, torch.tensor([[0]]), 2, *statistics, loss="l1")
    wanted = F.l1_loss(pred, images.view(1, 1, 4))
    assert torch.equal(loss, wanted) and per_patch.item() == loss.item() == 0.1875
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.equal(grad, torch.autograd.grad(wanted, pred)[0])
    assert grad.flatten().tolist() == [0.0, 0.25, 0.0, -0.25]


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_ids(backend, unwritten_shows, layout, ids_dtype):
    arguments = setup(3, 8, 2, 3, torch.float32, layout, ids_dtype)
    assert_loss_and_gradient(backend, arguments, torch.float32, True, "mse")


def test_strided_predictions(backend, unwritten_shows):
    pred, *rest = setup(3, 4, 2, 3)
    expected = masked_pixel_loss(pred, *rest)
    with_cls = torch.cat([pred[:, :1], pred], 1).repeat_interleave(2, -1)
    for strided in (
        with_cls[:, 1:, ::2],
        pred.mT.contiguous().mT,
        pred.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        strided = strided.detach().requires_grad_()
        loss, per_patch = masked_pixel_loss(strided, *rest)
        assert_same_sums(per_patch, expected[1], backend)
        loss.backward()
        torch.testing.assert_close(
            strided.grad, run(masked_pixel_loss, (pred, *rest), False, torch.float32)[2]
        )


def test_a_flat_patch_is_finite(backend):
    pred, images, *rest = setup(1, 5, 2, 2)
    images.fill_(77)
    loss, per_patch = masked_pixel_loss(pred, images, *rest, norm_pix=True)
    assert per_patch.isfinite().all()
    torch.testing.assert_close(loss, pred.square().mean(), rtol=1e-3, atol=0)


def test_perfect_prediction_has_no_loss_and_no_gradient(backend):
    pred, *rest = setup(3, 8, 2, 2)
    target = exact_patches(rest[0], rest[1], rest[2], rest[3], rest[4]).float()
    loss, per_patch, grad = run(masked_pixel_loss, (target, *rest), False, torch.float32)
    assert loss < 1e-12
    assert per_patch.shape == pred.shape[:2]
    assert grad.abs().max() < 1e-8


def test_float16_gradient_survives_at_training_size(backend):
    # 2 / (B M L) is 2e-8 for 1024 images of 147 patches of 768 values: nothing in float16, until loss scaling.
    pred, *rest = setup(1, 4, 2, 2, torch.float16)
    pred.requires_grad_()
    loss, _ = masked_pixel_loss(pred, *rest)
    (plain,) = torch.autograd.grad(loss * 2.0**-30, pred, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2.0**-30 * 2.0**30, pred)
    assert plain.count_nonzero() == 0
    exact = run(exact_loss, (pred, *rest), False, torch.float64)[2]
    torch.testing.assert_close(scaled.double(), exact, rtol=2**-9, atol=2**-16)


def test_backward_twice_gives_the_same(backend):
    pred, *rest = setup(3, 4, 2, 2)
    pred.requires_grad_()
    loss, _ = masked_pixel_loss(pred, *rest)
    first = torch.autograd.grad(loss, pred, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, pred)[0])


def test_per_patch_has_no_gradient(backend):
    pred, *rest = setup(3, 4, 2, 2)
    pred.requires_grad_()
    loss, per_patch = masked_pixel_loss(pred, *rest)
    assert loss.requires_grad
    assert not per_patch.requires_grad
    torch.testing.assert_close(per_patch.mean(), loss.detach())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_gradient_buffer_only_where_needed(backend, needs_grad):
    pred, *rest = setup(3, 4, 2, 2)
    outputs = torch.ops.fastmim.masked_pixel_loss(pred, *rest, False, "mse", needs_grad)
    assert outputs[2].numel() == (pred.numel() if needs_grad else 0)
    with torch.no_grad():
        assert not masked_pixel_loss(pred.requires_grad_(), *rest)[0].requires_grad


def test_same_result_under_autocast(backend):
    arguments = setup(3, 8, 2, 2)
    expected = masked_pixel_loss(*arguments, norm_pix=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = masked_pixel_loss(*arguments, norm_pix=True)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(("norm_pix", "loss"), [(False, "mse"), (True, "mse"), (True, "l1")])
def test_reference_is_exact_and_differentiable(norm_pix, loss):
    pred, *rest = setup(2, 4, 2, 2)
    pred, rest = pred.double(), (*rest, norm_pix, loss)
    exact = exact_loss(pred, *rest)
    pred.requires_grad_()
    for function in (masked_pixel_loss_reference, masked_pixel_loss):
        torch.testing.assert_close(function(pred, *rest), exact, rtol=1e-12, atol=0)
        assert torch.autograd.gradcheck(lambda pred, f=function: f(pred, *rest)[0], pred)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize(("norm_pix", "loss"), [(False, "l1"), (True, "mse")])
def test_opcheck(backend, norm_pix, loss):
    pred, *rest = setup(3, 4, 2, 2)
    pred.requires_grad_()
    torch.library.opcheck(torch.ops.fastmim.masked_pixel_loss.default, (pred, *rest, norm_pix, loss, True))


@pytest.mark.parametrize("compared_by", ["mse", "l1"])
def test_compiles_without_graph_breaks(backend, compiler, compared_by):
    pred, images, ids, *rest = setup(3, 4, 2, 2)
    pred.requires_grad_()

    def step(pred, images, ids):
        loss, per_patch = masked_pixel_loss(pred * 2, images, ids, *rest, norm_pix=True, loss=compared_by)
        return loss * 3, per_patch

    loss, per_patch = step(pred, images, ids)
    (expected,) = torch.autograd.grad(loss, pred)
    compiled_loss, compiled_per_patch = compiler(step)(pred, images, ids)
    (actual,) = torch.autograd.grad(compiled_loss, pred)
    torch.testing.assert_close((actual, compiled_loss, compiled_per_patch), (expected, loss, per_patch))
    with torch.no_grad():
        torch.testing.assert_close(compiler(step)(pred, images, ids)[1], per_patch)


ONE_VALUE = {
    "pred": torch.zeros(2, 3, 1),
    "images": torch.zeros(2, 8, 12, 1, dtype=torch.uint8),
    "patch_size": 1,
    "mean": torch.zeros(1),
    "std": torch.ones(1),
    "norm_pix": True,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.zeros(2, 3, 48).int()}, TypeError, r"pred has dtype int32; wanted float32"),
        ({"pred": torch.zeros(2, 3, 47)}, ValueError, r"pred has shape \[2, 3, 47\]; .* = \[2, 3, 48\]"),
        ({"pred": torch.zeros(2, 4, 48)}, ValueError, r"pred has shape \[2, 4, 48\]; .* = \[2, 3, 48\]"),
        ({"pred": torch.zeros(2, 3, 48, device="meta")}, ValueError, r"pred is on meta; wanted cpu"),
        ({"images": torch.zeros(2, 8, 12, 3).int()}, TypeError, r"images has dtype int32; wanted uint8 or"),
        ({"loss": "l2"}, ValueError, r"loss is 'l2'; wanted one of mse, l1"),
        ({"patch_size": 5}, ValueError, r"images has H = 8; wanted a positive multiple of patch_size 5"),
        ({"ids_mask": torch.zeros(1, 3).long()}, ValueError, r"ids_mask has batch 1; wanted 2"),
        ({"ids_mask": torch.zeros(2, 0).long()}, ValueError, r"ids_mask .* wanted at least one id"),
        ({"ids_mask": torch.zeros(2, 3)}, TypeError, r"ids_mask has dtype float32; wanted int64 or int32"),
        ({"ids_mask": torch.full((2, 3), 6)}, ValueError, r"ids_mask has values 6\.\.6; wanted 0\.\.5"),
        ({"mean": torch.zeros(1)}, ValueError, r"mean has shape \[1\]; wanted \[C\] = \[3\]"),
        (ONE_VALUE, ValueError, r"norm_pix with 1 value per patch; wanted 2 or more"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    arguments = {
        "pred": torch.zeros(2, 3, 48),
        "images": torch.zeros(2, 8, 12, 3, dtype=torch.uint8),
        "ids_mask": torch.zeros(2, 3, dtype=torch.int64),
        "patch_size": 4,
        "mean": torch.zeros(3),
        "std": torch.ones(3),
    }
    with pytest.raises(error, match=message):
        masked_pixel_loss(**(arguments | change))
