import pytest
import torch
from fastmim.kernels import gather_patches, gather_patches_reference
from fastmim.kernels.gather_patches import load_normalised_patches_torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import count_traffic
from tests.kernels.kernel_testing import (
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    assert_error_budget,
    constants,
    exact_patches,
    random_images,
    rounding_factor,
    split_ids,
)

# channels, patch size, rows and columns of the grid
SIZES = [
    (1, 4, 3, 2),
    (3, 8, 2, 3),
    (4, 14, 1, 4),
    (3, 16, 2, 1),
    (13, 16, 2, 2),
    (13, 32, 1, 2),
    (3, 5, 3, 3),
    (4, 4, 1, 1),
]
LONG = [(1, 4, 7, 7), (3, 4, 14, 14), (1, 4, 1, 197), (1, 4, 33, 31)]


def setup(
    channels,
    patch_size,
    rows,
    columns,
    layout="packed",
    ids_dtype=torch.int64,
    batch=2,
    image_dtype=torch.uint8,
):
    images = random_images(batch, rows * patch_size, columns * patch_size, channels, layout, image_dtype)
    patches = rows * columns
    ids, _, _ = split_ids(batch, patches, max(1, patches - 1), ids_dtype)
    return images, ids, patch_size, *constants(channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_patches_match_mae_patchify(backend, unwritten_shows, size, dtype):
    arguments = setup(*size)
    actual = gather_patches(*arguments, dtype)
    native = gather_patches_reference(*arguments, dtype)
    assert_error_budget(actual, native, exact_patches(*arguments), rounding_factor(backend, dtype))


@pytest.mark.parametrize("ids_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_ids(backend, unwritten_shows, layout, ids_dtype):
    arguments = setup(3, 8, 3, 4, layout, ids_dtype, batch=3)
    actual = gather_patches(*arguments, torch.float32)
    native = gather_patches_reference(*arguments, torch.float32)
    assert_error_budget(actual, native, exact_patches(*arguments))


@pytest.mark.parametrize("size", LONG)
def test_long_sequences(backend, unwritten_shows, size):
    images, ids, *rest = setup(*size, batch=1)
    for some in (ids, ids[:, :1]):
        actual = gather_patches(images, some, *rest, torch.float32)
        native = gather_patches_reference(images, some, *rest, torch.float32)
        assert_error_budget(actual, native, exact_patches(images, some, *rest))


FLOATS = [
    (torch.float32, "planar", torch.bfloat16),
    (torch.float32, "crop", torch.float32),
    (torch.bfloat16, "packed", torch.bfloat16),
    (torch.bfloat16, "planar", torch.float32),
    (torch.float16, "expanded", torch.float16),
]


@pytest.mark.parametrize(("image_dtype", "layout", "dtype"), FLOATS)
def test_float_images_are_not_divided_by_255(backend, unwritten_shows, image_dtype, layout, dtype):
    arguments = setup(3, 8, 3, 4, layout, image_dtype=image_dtype)
    before = arguments[0].clone()
    assert before.max() > 0.9
    actual = gather_patches(*arguments, dtype)
    native = gather_patches_reference(*arguments, dtype)
    assert_error_budget(actual, native, exact_patches(*arguments), rounding_factor(backend, dtype))
    assert torch.equal(arguments[0], before)


def test_bytes_and_their_floats_agree(backend):
    images, *rest = setup(3, 8, 2, 3)
    floats = gather_patches(images / 255, *rest, torch.float32)
    torch.testing.assert_close(gather_patches(images, *rest, torch.float32), floats, rtol=0, atol=2e-6)


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_reads_what_it_keeps_and_no_more(layout, image_dtype):
    images, ids, *rest = setup(3, 16, 3, 4, layout, image_dtype=image_dtype)
    with count_traffic() as traffic:
        gather_patches(images, ids, *rest, torch.bfloat16)
    floor = ids.numel() * (16 * 16 * 3 * (images.element_size() + 2) + 8)
    assert floor <= traffic.bytes <= 1.05 * floor
    assert traffic.launches == 1


class LargestResult(TorchDispatchMode):
    """Notes the most bytes that an ATen call writes to new memory."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_pytorch_copies_kept_pixels_only(layout, image_dtype):
    images, ids, *rest = setup(3, 8, 10, 12, layout, image_dtype=image_dtype)
    kept = ids[:, :3]
    with LargestResult() as largest:
        patches = load_normalised_patches_torch(images, kept, *rest, torch.float32)
    assert torch.equal(patches, load_normalised_patches_torch(images, ids, *rest, torch.float32)[:, :3])
    assert patches.nbytes <= largest.bytes <= 1.1 * patches.nbytes


def test_ids_of_any_strides(backend, unwritten_shows):
    images, ids, *rest = setup(3, 8, 3, 4)
    expected = gather_patches(images, ids.contiguous(), *rest, torch.float32)
    for strided in (ids.T.contiguous().T, ids.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(gather_patches(images, strided, *rest, torch.float32), expected)


def test_every_byte_value_and_its_place(backend):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    ids = torch.tensor([[3, 0]])
    zero, one = torch.zeros(1), torch.ones(1)
    patches = gather_patches(images, ids, 8, zero, one, torch.float32) * 255
    assert torch.equal(patches.round()[0, 0].view(8, 8), images[0, 8:, 8:, 0].float())
    assert torch.equal(patches.round()[0, 1].view(8, 8), images[0, :8, :8, 0].float())


def test_pixels_of_other_patches_do_not_matter(backend):
    images, ids, *rest = setup(3, 8, 2, 2)
    other = images.clone()
    removed = next(place for place in range(4) if place not in ids[0].tolist())
    row, column = divmod(removed, 2)
    other[0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    assert not torch.equal(images, other)
    first = gather_patches(images, ids, *rest, torch.float32)
    assert torch.equal(first, gather_patches(other, ids, *rest, torch.float32))


def test_offsets_past_31_bits(backend):
    # Samples 2^30 bytes apart in memory that is reserved, and touched only where a sample lies.
    storage = torch.empty(2**31 + 64, dtype=torch.uint8, device=torch.get_default_device())
    images = storage.as_strided((3, 8, 8, 1), (2**30, 8, 1, 1))
    images.copy_(torch.arange(3 * 64).view(3, 8, 8, 1))
    arguments = images, torch.tensor([[0], [3], [2]]), 4, torch.zeros(1), torch.ones(1)
    actual = gather_patches(*arguments, torch.float32)
    torch.testing.assert_close(actual.double(), exact_patches(*arguments), rtol=1e-6, atol=0)


def test_reference_is_exact_in_float64():
    arguments = setup(4, 8, 2, 3)
    exact = exact_patches(*arguments)
    torch.testing.assert_close(gather_patches_reference(*arguments, torch.float64), exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(gather_patches(*arguments, torch.float64), exact, rtol=1e-12, atol=1e-12)


def test_opcheck(backend):
    arguments = setup(3, 4, 2, 3)
    torch.library.opcheck(torch.ops.fastmim.gather_patches.default, (*arguments, torch.bfloat16))


def test_compiles_without_graph_breaks(backend, compiler):
    images, ids, patch_size, mean, std = setup(3, 4, 2, 3)

    def step(images, ids):
        return gather_patches(images, ids, patch_size, mean, std, torch.float32) + 1

    expected = step(images, ids)
    torch.testing.assert_close(compiler(step)(images, ids), expected)


IMAGES = torch.zeros(2, 8, 12, 3, dtype=torch.uint8)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES.int()}, TypeError, r"images has dtype int32; wanted uint8 or float32 or bfloat16"),
        (
            {"images": IMAGES.float().requires_grad_()},
            ValueError,
            r"images requires a gradient; wanted images.detach",
        ),
        ({"images": IMAGES[0]}, ValueError, r"images has shape \[8, 12, 3\]; wanted \[B, H, W, C\]"),
        (
            {"images": IMAGES[:, :6]},
            ValueError,
            r"images has H = 6; wanted a positive multiple of patch_size 4",
        ),
        ({"images": IMAGES[:, :, :6]}, ValueError, r"images has W = 6; wanted a positive multiple"),
        ({"images": IMAGES[:, :0]}, ValueError, r"images has H = 0; wanted a positive multiple"),
        ({"patch_size": 0}, ValueError, r"patch_size is 0; wanted 1 or more"),
        ({"mean": torch.zeros(4)}, ValueError, r"mean has shape \[4\]; wanted \[C\] = \[3\]"),
        ({"std": torch.ones(3).double()}, TypeError, r"std has dtype float64; wanted float32"),
        ({"std": torch.ones(3, device="meta")}, ValueError, r"std is on meta; wanted cpu"),
        ({"ids": IDS.short()}, TypeError, r"ids has dtype int16; wanted int64 or int32"),
        ({"ids": IDS[:1]}, ValueError, r"ids has batch 1; wanted 2, the batch of images"),
        ({"ids": IDS[:, :0]}, ValueError, r"ids has shape \[2, 0\]; wanted at least one id"),
        ({"ids": IDS + 6}, ValueError, r"ids has values 6\.\.6; wanted 0\.\.5"),
        ({"ids": IDS - 1}, ValueError, r"ids has values -1\.\.-1; wanted 0\.\.5"),
        ({"dtype": torch.int32}, TypeError, r"dtype is torch.int32; wanted float32"),
    ],
)
def test_errors_name_argument_got_and_wanted(change, error, message):
    arguments = {
        "images": IMAGES,
        "ids": IDS,
        "patch_size": 4,
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "dtype": torch.float32,
    }
    with pytest.raises(error, match=message):
        gather_patches(**(arguments | change))
