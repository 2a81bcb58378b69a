"""Every kernel is compiled for three GPU generations, as an operation launches it, on a machine without a GPU."""

import re
import subprocess

import pytest
import torch
import triton
from fastmim.kernels import _dispatch, gather_patches, gather_tokens, masked_pixel_loss, unshuffle
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.kernel_testing import constants, random_images, split_ids

POINTERS = {torch.uint8: "*u8", torch.int64: "*i64", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def record_launches(monkeypatch, side, patch_size, width, decoder_width, channels=3):
    """Return the launches of one training step in bfloat16, without running them."""
    launches = {}

    def record(function, grid, *args, num_warps=4, **settings):
        launches[function.__name__] = (function, args, num_warps, settings)

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    patches = (side // patch_size) ** 2
    kept = patches // 4
    ids_keep, ids_mask, ids_restore = split_ids(2, patches, kept)
    images = random_images(2, side, side, channels)
    mean, std = constants(channels)

    def floats(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    gather_patches(images, ids_keep, patch_size, mean, std, torch.bfloat16)
    tokens = gather_tokens(floats(2, 1 + patches, width), ids_keep, offset=1)
    tokens.backward(torch.zeros_like(tokens))
    assembled = unshuffle(
        floats(2, 1 + kept, decoder_width),
        floats(1, 1, decoder_width),
        floats(1, 1 + patches, decoder_width),
        ids_restore,
    )
    assembled.backward(torch.zeros_like(assembled))
    pred = floats(2, patches - kept, patch_size**2 * channels)
    masked_pixel_loss(pred, images, ids_mask, patch_size, mean, std, norm_pix=True)[0].backward()
    return launches


def compile_to_sass(tmp_path, launch, capability):
    """Compile as Triton's launcher would: it specialises on 1, on multiples of 16 and on aligned pointers."""
    function, args, num_warps, settings = launch
    signature = dict.fromkeys(settings, "constexpr")
    settings = dict(settings)
    attributes = {}
    for index, (name, value) in enumerate(zip(function.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], settings[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        # PyTorch's CUDA memory is aligned to 512 bytes.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, signature, settings, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    disassembler = triton.knobs.nvidia.nvdisasm.path
    return subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout


def opcodes(sass, name):
    return re.findall(rf"\b{name}[.\w]*", sass)


KERNELS = [
    "_gather_patches_forward_kernel",
    "_gather_tokens_forward_kernel",
    "_gather_tokens_backward_kernel",
    "_unshuffle_forward_kernel",
    "_unshuffle_backward_kernel",
    "_masked_pixel_loss_forward_kernel",
    "_masked_pixel_loss_backward_kernel",
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_vit_base_kernels_do_not_spill_and_use_128_bit_access(monkeypatch, tmp_path, name, capability):
    launches = record_launches(monkeypatch, side=224, patch_size=16, width=768, decoder_width=512)
    assert sorted(launches) == sorted(KERNELS)
    sass = compile_to_sass(tmp_path, launches[name], capability)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
    assert any(opcode.endswith(".128") for opcode in opcodes(sass, "LDG"))
    stores = opcodes(sass, "STG")
    assert any(opcode.endswith(".128") for opcode in stores)
    # What is not stored 128 bits at a time is one value per patch or one row of sums per program.
    assert sum(not opcode.endswith(".128") for opcode in stores) <= 1


@pytest.mark.parametrize(
    ("side", "patch_size", "channels"),
    [(224, 14, 3), (64, 32, 13), (32, 4, 1)],
    ids=["P14", "P32 C13", "P4 C1"],
)
@pytest.mark.parametrize("name", KERNELS)
def test_other_sizes_do_not_spill(monkeypatch, tmp_path, name, side, patch_size, channels):
    launches = record_launches(monkeypatch, side, patch_size, 1280, 512, channels)
    sass = compile_to_sass(tmp_path, launches[name], 90)
    assert not opcodes(sass, "STL") and not opcodes(sass, "LDL")
