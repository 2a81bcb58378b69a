"""What the kernel tests share: the error budget, random ids, and a patchify in float64."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.int64, torch.int32]
# batch, patches, kept, width, dtype: sequences and widths of real models, one kept and all but one
LONG = [
    (1, 49, 48, 1280, torch.bfloat16),
    (2, 196, 1, 768, torch.float16),
    (1, 197, 196, 96, torch.float32),
    (1, 1023, 1022, 1, torch.bfloat16),
    (1, 1023, 1, 96, torch.float32),
]
MEAN, STD = [0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]


def assert_error_budget(actual, native, exact, factor=2.0, floor=1e-6):
    """`actual` may err `factor` times as much as PyTorch in the same dtype (`native`) does from `exact`."""
    assert actual.shape == native.shape == exact.shape
    assert actual.dtype == native.dtype
    error = (actual.double() - exact).abs().max()
    budget = factor * (native.double() - exact).abs().max() + floor * exact.abs().max()
    assert error <= budget, f"error {error:.3e} > budget {budget:.3e}"


def rounding_factor(backend, dtype):
    """Triton's interpreter cuts float32 to bfloat16 where hardware rounds: twice the error of each rounding."""
    return 4.0 if backend == "interpret" and dtype == torch.bfloat16 else 2.0


def assert_same_sums(actual, expected, backend):
    """Equal; but compiled for other strides or alignment, a kernel may add a row's numbers in another order."""
    torch.testing.assert_close(actual, expected, rtol=2e-6 if backend == "cuda" else 0, atol=0)


def split_ids(batch, patches, kept, dtype=torch.int64):
    """Return ids_keep and ids_mask, slices of one permutation as in MAE (not contiguous), and ids_restore."""
    shuffle = torch.rand(batch, patches).argsort(1)
    restore = shuffle.argsort(1).to(dtype)
    shuffle = shuffle.to(dtype)
    return shuffle[:, :kept], shuffle[:, kept:], restore


def random_images(batch, height, width, channels, layout="packed", dtype=torch.uint8):
    """[B, H, W, C] in one of four layouts; floats are in units where white is 1."""
    if dtype != torch.uint8:
        # Of the same strides, as a conversion keeps them; a crop's gaps are closed, and opened again.
        images = (random_images(batch, height, width, channels, layout) / 255).to(dtype)
        return torch.cat([images, images], 2)[:, :, :width] if layout == "crop" else images
    if layout == "planar":
        shape = (batch, channels, height, width)
        return torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 2, 3, 1)
    if layout == "crop":
        shape = (batch, height + 3, width + 5, channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8)[:, 1:-2, 4:-1]
    if layout == "expanded":
        shape = (1, height, width, channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8).expand(batch, -1, -1, -1)
    return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8)


LAYOUTS = ["packed", "planar", "crop", "expanded"]


def constants(channels):
    """Per-channel mean and std, float32 [C]."""
    repeats = channels // 4 + 1
    return torch.tensor((MEAN * repeats)[:channels]), torch.tensor((STD * repeats)[:channels])


def exact_patches(images, ids, patch_size, mean, std):
    """Normalised patches in float64 by the einsum of MAE's patchify."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.permute(0, 3, 1, 2).double()
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x / 255 if images.dtype == torch.uint8 else x
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(batch, rows * columns, patch_size**2, channels)
    x = ((x - mean.double()) / std.double()).flatten(2)
    return torch.stack([x[sample, ids[sample].long()] for sample in range(batch)])


def exact_outputs(kept, removed):
    """What a mask sampler returns for one sample, as lists: ids_keep, ids_mask, ids_restore, mask."""
    ids = sorted(kept) + sorted(removed)
    return [
        sorted(kept),
        sorted(removed),
        [ids.index(n) for n in range(len(ids))],
        [n in removed for n in range(len(ids))],
    ]
