"""Every kernel is compiled for three GPU generations, as an operation launches it, on a machine without a GPU."""

import pytest
import torch
from fastmim.kernels import (
    _dispatch,
    add_layer_norm,
    bias_gelu,
    embed_tokens,
    gather_patches,
    gather_tokens,
    masked_pixel_loss,
    sample_block_mask,
    sample_grid_mask,
    sample_random_mask,
    short_attention,
    unshuffle,
)
from fastmim.kernels.align import cosine_align, mse_align
from fastmim.kernels.masked_cross_entropy import masked_cross_entropy

from benchmarks import compiled
from benchmarks.compiled import Launch, compile_to_sass, opcodes
from tests.kernels.kernel_testing import constants, random_images, split_ids


def record_launches(monkeypatch, side, patch_size, width, decoder_width, channels=3):
    """Return the launches of one training step in bfloat16, without running them."""
    launches = {}

    def record(function, grid, *args, num_warps=4, **settings):
        launches[function.__name__] = Launch(function, args, {"num_warps": num_warps}, settings)

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    patches = (side // patch_size) ** 2
    kept = patches // 4
    ids_keep, ids_mask, _ = split_ids(2, patches, kept)
    images = random_images(2, side, side, channels)
    mean, std = constants(channels)

    def floats(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    gather_patches(images, ids_keep, patch_size, mean, std, torch.bfloat16)
    # As many samples as a program shares positions between.
    many = split_ids(64, patches, kept)[2]
    embedded = embed_tokens(floats(64, kept, width), floats(1, 1, width), floats(1, 1 + patches, width), many)
    embedded.backward(torch.zeros_like(embedded))
    tokens = gather_tokens(floats(2, 1 + patches, width), ids_keep, offset=1)
    tokens.backward(torch.zeros_like(tokens))
    assembled = unshuffle(
        floats(64, 1 + kept, decoder_width),
        floats(1, 1, decoder_width),
        floats(1, 1 + patches, decoder_width),
        many,
    )
    assembled.backward(torch.zeros_like(assembled))
    pred = floats(2, patches - kept, patch_size**2 * channels)
    masked_pixel_loss(pred, images, ids_mask, patch_size, mean, std, norm_pix=True)[0].backward()
    return launches


KERNELS = [
    "_embed_tokens_forward_kernel",
    "_embed_tokens_position_kernel",
    "_gather_patches_forward_kernel",
    "_gather_tokens_forward_kernel",
    "_scatter_tokens_forward_kernel",
    "_unshuffle_forward_kernel",
    "_unshuffle_backward_kernel",
    "_masked_pixel_loss_forward_kernel",
    "_scale_gradient_kernel",
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_vit_base_kernels_do_not_spill_and_use_128_bit_access(monkeypatch, name, capability):
    launches = record_launches(monkeypatch, side=224, patch_size=16, width=768, decoder_width=512)
    assert sorted(launches) == sorted(KERNELS)
    sass = compile_to_sass(launches[name], capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    assert any(opcode.endswith(".128") for opcode in opcodes(sass, "LDG"))
    stores = opcodes(sass, "STG")
    assert any(opcode.endswith(".128") for opcode in stores) == (name != "_embed_tokens_position_kernel")
    # What is not stored 128 bits at a time is one value per patch, or a row of sums: two in one kernel.
    few = 2 if name == "_unshuffle_backward_kernel" else 1
    assert sum(not opcode.endswith(".128") for opcode in stores) <= few


@pytest.mark.parametrize(
    ("side", "patch_size", "channels"),
    [(224, 14, 3), (64, 32, 13), (32, 4, 1)],
    ids=["P14", "P32 C13", "P4 C1"],
)
@pytest.mark.parametrize("name", KERNELS)
def test_other_sizes_do_not_spill(monkeypatch, name, side, patch_size, channels):
    launches = record_launches(monkeypatch, side, patch_size, 1280, 512, channels)
    sass = compile_to_sass(launches[name], 90)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")


@pytest.mark.parametrize("name", [name for name in KERNELS if "embed" in name or "unshuffle" in name])
def test_rows_that_do_not_start_on_16_bytes_do_not_spill(monkeypatch, name):
    launches = record_launches(monkeypatch, side=32, patch_size=4, width=100, decoder_width=100, channels=1)
    sass = compile_to_sass(launches[name], 90)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")


@pytest.mark.parametrize(
    ("side", "capability"), [(14, 80), (14, 90), (14, 100), (16, 90), (64, 80), (64, 90), (64, 100)]
)
@pytest.mark.parametrize("sampler", ["random", "units", "block", "grid"])
def test_mask_sampling_stays_in_registers(monkeypatch, side, sampler, capability):
    launches = []

    def record(function, grid, *args, num_warps=4, **settings):
        launches.append(Launch(function, args, {"num_warps": num_warps}, settings))

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    where, patches = (3, torch.arange(2), torch.arange(2)), side * side
    call = {
        "random": lambda: sample_random_mask(*where, patches, patches // 4),
        "units": lambda: sample_random_mask(*where, patches, patches // 8 * 4, 2, (side, side)),
        "block": lambda: sample_block_mask(*where, (side, side), patches // 4),
        "grid": lambda: sample_grid_mask(*where, (side, side), random_phase=True),
    }
    call[sampler]()
    (launch,) = launches
    sass = compile_to_sass(launch, capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    # The id lists are compacted, one id a store; rows of ids_restore start on 16 bytes, as N is even.
    assert any(opcode.endswith(".128") for opcode in opcodes(sass, "STG"))
    if patches < 256:  # one warp: counting waits for no other
        assert not opcodes(sass, "BAR")


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_planar_images_do_not_spill(monkeypatch, loss, image_dtype):
    launches = {}

    def record(function, grid, *args, num_warps=4, **settings):
        launches[function.__name__] = Launch(function, args, {"num_warps": num_warps}, settings)

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    images = random_images(2, 224, 224, 3, "planar", image_dtype)
    ids_keep, ids_mask, _ = split_ids(2, 196, 49)
    gather_patches(images, ids_keep, 16, *constants(3), torch.bfloat16)
    pred = torch.zeros(2, 147, 768, dtype=torch.bfloat16, requires_grad=True)
    masked_pixel_loss(pred, images, ids_mask, 16, *constants(3), norm_pix=True, loss=loss)
    assert len(launches) == 2
    for launch in launches.values():
        sass = compile_to_sass(launch, 90)
        assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
        assert any(opcode.endswith(".128") for opcode in opcodes(sass, "STG"))


def record_loss_launches(monkeypatch, width, classes):
    """Return the launches of the losses on rows, forward and backward in bfloat16, without running them."""
    launches = {}

    def record(function, grid, *args, num_warps=4, **settings):
        name = " ".join([function.__name__, *(str(settings[key]) for key in ("COMPARE",) if key in settings)])
        launches[name] = Launch(function, args, {"num_warps": num_warps}, settings)

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    x = torch.zeros(2, 98, width, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros_like(x)
    for loss, _ in (mse_align(x, target), mse_align(x, target, normalise=False), cosine_align(x, target)):
        loss.backward()
    weight = torch.zeros(classes, 16, dtype=torch.bfloat16, requires_grad=True)
    masked_cross_entropy(x[0, :, :16], weight, None, torch.arange(98))[0].backward()
    return launches


LOSS_KERNELS = [
    *(
        f"_align_{direction}_kernel {compare}"
        for direction in ("forward", "backward")
        for compare in range(3)
    ),
    "_softmax_gradient_kernel",
    "_scale_gradient_kernel",
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", LOSS_KERNELS)
def test_vit_base_loss_kernels_do_not_spill_and_use_128_bit_access(monkeypatch, name, capability):
    launches = record_loss_launches(monkeypatch, width=768, classes=8192)
    assert sorted(launches) == sorted(LOSS_KERNELS)
    sass = compile_to_sass(launches[name], capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    assert any(opcode.endswith(".128") for opcode in opcodes(sass, "LDG"))
    stores = opcodes(sass, "STG")
    assert any(opcode.endswith(".128") for opcode in stores) == ("align_forward" not in name)
    # What is not stored 128 bits at a time is one loss per row.
    assert sum(not opcode.endswith(".128") for opcode in stores) <= 1


@pytest.mark.parametrize(("width", "classes"), [(96, 1000), (1280, 25088), (2048, 16383)])
@pytest.mark.parametrize("name", LOSS_KERNELS)
def test_other_loss_sizes_do_not_spill(monkeypatch, name, width, classes):
    sass = compile_to_sass(record_loss_launches(monkeypatch, width, classes)[name], 90)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")


def record_block_launches(width, dtype=torch.bfloat16):
    """Return the launches of a transformer block, forward and backward, without running them."""
    x, branch = (torch.zeros(2, 98, width, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.zeros(width, dtype=dtype, requires_grad=True) for _ in range(2))
    with compiled.record_launches() as launches:
        torch.autograd.backward(add_layer_norm(x, branch, weight, bias), [x.detach()] * 2)
        bias_gelu(x, bias).backward(x.detach())
    return {launch.name: launch for launch in launches}


BLOCK_KERNELS = [
    f"_{operation}_{direction}_kernel"
    for operation in ("add_layer_norm", "bias_gelu")
    for direction in ("forward", "backward")
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", BLOCK_KERNELS)
def test_vit_base_block_kernels_do_not_spill_and_use_128_bit_access(name, capability):
    launches = record_block_launches(768)
    assert sorted(launches) == sorted(BLOCK_KERNELS)
    sass = compile_to_sass(launches[name], capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    for kind in ("LDG", "STG"):
        assert any(opcode.endswith(".128") for opcode in opcodes(sass, kind))
    # What is not stored 128 bits at a time is a program's sums for weight and bias.
    partial = sum(not opcode.endswith(".128") for opcode in opcodes(sass, "STG"))
    assert partial <= (2 if "backward" in name else 0), opcodes(sass, "STG")


@pytest.mark.parametrize(("width", "dtype"), [(1001, "bfloat16"), (4095, "float32")])
@pytest.mark.parametrize("name", BLOCK_KERNELS)
def test_other_block_widths_do_not_spill(name, width, dtype):
    sass = compile_to_sass(record_block_launches(width, getattr(torch, dtype))[name], 90)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("tokens", "head"), [(50, 64), (64, 64), (37, 32), (17, 20)])
def test_attention_of_few_tokens_does_not_spill(tokens, head, capability):
    qkv = torch.zeros(2, tokens, 3, 12, head, dtype=torch.bfloat16, requires_grad=True)
    with compiled.record_launches() as launches:
        short_attention(qkv).backward(qkv.detach()[:, :, 0])
    assert len(launches) == 2
    for launch in launches:
        sass = compile_to_sass(launch, capability)
        assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
        for kind in ("LDG", "STG") if head % 8 == 0 else ():
            assert all(opcode.endswith(".128") for opcode in opcodes(sass, kind)), opcodes(sass, kind)
