"""What the compilers make of a kernel as an operation launches it, read from machine code, without a GPU."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from fastmim.kernels import _dispatch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}

# Per multiprocessor: shared memory in bytes; all three have 65,536 registers, 64 warps and 32 blocks.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}

_INSPECTED: dict[tuple, dict] = {}
"""What was found about machine code: chunks of one operation, and shapes, often share it."""


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    function: _dispatch.Kernel
    args: tuple
    options: dict
    constants: dict

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.function.__name__


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of fastmim's operations on CPU tensors instead of running them.

    What the operations return is uninitialised memory.
    """
    launches = []

    def record(function, grid, *args, num_warps=4, **settings):
        constants = {name: value for name, value in settings.items() if name in function.arg_names}
        options = {name: value for name, value in settings.items() if name not in function.arg_names}
        launches.append(Launch(function, args, {"num_warps": num_warps, **options}, constants))

    with mock.patch.multiple(_dispatch, MODE="interpret", launch=record):
        yield launches


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes for the compiler.

    As Triton's launcher would: it specialises on 1, on multiples of 16 and on aligned pointers.
    """
    signature = dict.fromkeys(launch.constants, "constexpr")
    constants = dict(launch.constants)
    attributes = {}
    for index, (name, value) in enumerate(zip(launch.function.arg_names, launch.args, strict=False)):
        aligned = False
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # The CPU's allocator aligns to 64 bytes and CUDA's to 512: a slice is as aligned here as there.
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compile for a GPU that need not be here."""
    source = ASTSource(launch.function, *specialise(launch))
    return triton.compile(source, target=target, options=dict(launch.options))


def run_on_cubin(tool: str, compiled: triton.compiler.CompiledKernel, flag: str) -> str:
    """Return what one of the CUDA binary tools that come with Triton prints about a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run([path, flag, cubin], capture_output=True, text=True, check=True).stdout


def compile_to_sass(launch: Launch, capability: int) -> str:
    """Compile for a CUDA compute capability (80, 90, 100) and disassemble."""
    return run_on_cubin("nvdisasm", compile_launch(launch, TARGETS[f"sm_{capability}"]), "-c")


def opcodes(sass: str, name: str) -> list[str]:
    """Return the instructions of one kind, with their suffixes: `LDG` finds `LDG.E.128`."""
    return re.findall(rf"\b{name}[.\w]*", sass)


def inspect_launch(launch: Launch, arch: str) -> dict:
    """Compile and report.

    Args:
        launch: a recorded launch.
        arch: a key of `TARGETS`.

    Returns:
        registers (per thread), spills (instructions that touch local memory; on gfx942 registers spilled to memory),
        shared_bytes (per program), load_bits and store_bits (widest global access of a thread), occupancy
        (theoretical, 0..1: warps that fit a multiprocessor over the most that it holds).
    """
    key = launch.name, arch, repr((specialise(launch), launch.options))
    if key not in _INSPECTED:
        compiled = compile_launch(launch, TARGETS[arch])
        facts = _inspect_amdgcn(compiled) if arch.startswith("gfx") else _inspect_cubin(compiled, arch)
        _INSPECTED[key] = {"kernel": launch.name, **facts}
    return dict(_INSPECTED[key])


def _inspect_cubin(compiled: triton.compiler.CompiledKernel, arch: str) -> dict:
    sass = run_on_cubin("nvdisasm", compiled, "-c")
    usage = run_on_cubin("cuobjdump", compiled, "-res-usage")
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "registers": registers,
        "spills": len(opcodes(sass, "LDL")) + len(opcodes(sass, "STL")),
        "shared_bytes": shared,
        "load_bits": _widest(opcodes(sass, "LDG")),
        "store_bits": _widest(opcodes(sass, "STG")),
        "occupancy": cuda_occupancy(registers, warps, shared, arch),
    }


def _widest(instructions: list[str]) -> int:
    """Bits of the widest access: the suffix names 8, 16, 64, 128 or 256, and 32 goes without saying."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    found = [
        max((widths[suffix] for suffix in instruction.split(".") if suffix in widths), default=32)
        for instruction in instructions
    ]
    return max(found, default=0)


def cuda_occupancy(registers: int, warps: int, shared: int, arch: str) -> float:
    """Theoretical occupancy of a program of `warps` warps on one multiprocessor of `arch`.

    Registers are handed out in units of 256 a warp; each block takes 1 KiB of shared memory besides its own.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65_536 // per_warp // warps
    by_shared = SHARED_MEMORY[arch] // (shared + 1024)
    blocks = min(by_registers, by_shared, 64 // warps, 32)
    return blocks * warps / 64


def _inspect_amdgcn(compiled: triton.compiler.CompiledKernel) -> dict:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def widest(kind: str) -> int:
        names = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}
        names |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
        suffixes = re.findall(rf"\b(?:global|buffer)_{kind}_([a-z]+\d?)", text)
        return max((names[suffix] for suffix in suffixes), default=0)

    registers, warps, shared = count("vgpr_count"), compiled.metadata.num_warps, compiled.metadata.shared
    # Scalar registers are spilled into lanes of vector registers; with an empty private segment nothing reaches memory.
    scalar = count("sgpr_spill_count") if count("private_segment_fixed_size") else 0
    # A compute unit has 4 units of 512 registers a lane, handed out by 8, and at most 8 waves each; a work
    # group's waves are spread over the four. It has 64 KiB of shared memory.
    # Source: LLVM's AMDGPU usage guide and the CDNA3 instruction set manual.
    waves = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    groups = min(waves // warps, 65_536 // shared if shared else 32)
    return {
        "registers": registers,
        "spills": count("vgpr_spill_count") + scalar,
        "shared_bytes": shared,
        "load_bits": widest("load"),
        "store_bits": widest("store"),
        "occupancy": groups * warps / 32,
    }
