"""Files of weights as they lie on the disk: safetensors, PyTorch's, and transformers' folders."""

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmim.errors import CheckpointError, ConfigError

_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_OF_OTHER_FILES = LookupError, TypeError, AttributeError, AssertionError
"""What PyTorch's unpickler raises of a text, whose letters it takes for instructions."""


@dataclass(frozen=True)
class Found:
    """What a file or folder of another library holds.

    Attributes:
        path: where.
        state: tensors by their names.
        metadata: of an export of ours, else empty.
        settings: of training or of the model, by the file they were in: args, config.json, preprocessor_config.json.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_found(path: Path) -> Found:
    """Read a file, or a folder with config.json beside model.safetensors or pytorch_model.bin.

    Raises:
        CheckpointError: nothing there that can be read without running code.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a file of weights, a run, or a folder of transformers"
        )
    if path.suffix == ".safetensors":
        return Found(path, *read_safetensors(path))
    return _read_pickled(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `CheckpointError` where it is none."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from None


def list_tensors(path: Path) -> list[str]:
    """The names in a safetensors file; `CheckpointError` where it is none."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from None


def _read_folder(path: Path) -> Found:
    weights = next((path / name for name in _FOLDER_WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(entry.name for entry in path.iterdir())[:5]) or 'nothing'}; "
            f"expected config.json and {' or '.join(_FOLDER_WEIGHTS)}"
        )
    found = read_found(weights)
    names = ("config.json", "preprocessor_config.json")
    settings = {name: _read_json(path / name) for name in names if (path / name).is_file()}
    return Found(path, found.state, found.metadata, settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a mapping")
    return values


def _read_pickled(path: Path) -> Found:
    try:
        # facebookresearch/mae saves its arguments too; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, *_OF_OTHER_FILES) as error:
        raise CheckpointError(_why_refused(path, error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    inner = content.get("model", content.get("state_dict", content))
    state = inner if isinstance(inner, dict) else {}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"{path} holds {', '.join(map(str, list(content)[:5])) or 'nothing'}; expected a state dict, or one "
            "under 'model' or 'state_dict'"
        )
    args = content.get("args")
    settings = {"args": vars(args)} if isinstance(args, argparse.Namespace) else {}
    metadata = content.get("fastmim", {})
    return Found(path, state, metadata if isinstance(metadata, dict) else {}, settings)


def _why_refused(path: Path, error: Exception) -> str:
    if not zipfile.is_zipfile(path):
        return f"{path} is neither a safetensors nor a PyTorch file; expected one of them"
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    unsafe = sorted({str(name) for name in names} - {"argparse.Namespace"})
    if not unsafe:
        return f"{path} cannot be read as a PyTorch file: {str(error).splitlines()[0]}"
    return (
        f"{path} needs {', '.join(unsafe[:3])} beside tensors, and unpickling that may run code; expected tensors "
        "alone. If you trust the file, load it yourself and torch.save its state dict"
    )


def check_out(path: Path, suffixes: tuple[str, ...], force: bool) -> None:
    """Refuse an output of another kind (no suffixes: a folder), or one that exists, before any work is done."""
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"OUT {path}: expected a file whose name ends in {' or '.join(suffixes)}")
    if not suffixes and path.suffix in (".safetensors", ".pth"):
        raise ConfigError(f"OUT {path}: expected a folder; transformers wants several files")
    if path.exists() and path.is_dir() == bool(suffixes):
        raise ConfigError(f"OUT {path} is {'a folder' if path.is_dir() else 'a file'}; expected the other")
    if path.exists() and not force and (path.is_file() or any(path.iterdir())):
        raise ConfigError(f"OUT {path} exists; expected another path, or --force to replace it")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` at the end, and is gone after a failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
