"""DALL-E's released encoder, read from its file: a pickled module, or a state dict of the same names."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from fastmim.errors import CheckpointError
from fastmim.exchange.files import read_found
from fastmim.models.dvae import DVAEEncoder

# What `map_pixels` of the release does, (1 - 2 * 0.1) x + 0.1, written as (x - mean) / std.
PIXEL_MEAN, PIXEL_STD = -0.125, 1.25

_FIRST = "blocks.input.w"
_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity",
)


class _Pickled:
    """Stands for each class of the release: attributes are read, and none of its code is needed or run."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters by name, as `state_dict` would give them."""
        attributes = vars(self)
        found = {f"{prefix}{name}": tensor.data for name, tensor in attributes["_parameters"].items()}
        for name, module in attributes["_modules"].items():
            found |= module.tensors(f"{prefix}{name}.")
        return found


def read_dalle_encoder(path: Path) -> DVAEEncoder:
    """The encoder in a file of DALL-E's layout, in float32; its sizes follow from the shapes.

    Args:
        path: `encoder.pkl` as it was released, or its state dict as .pth or .safetensors.

    Raises:
        CheckpointError: no such file, another layout, or one that cannot be read without running its code.

    Source: github.com/openai/DALL-E, dall_e/encoder.py.
    """
    state = _read_state(path)
    first = next((name for name in state if name.endswith(_FIRST)), None)
    if first is None:
        names = ", ".join(list(state)[:3])
        raise CheckpointError(f"{path} holds {names}; expected DALL-E's encoder ({_FIRST} and the like)")
    prefix = first.removesuffix(_FIRST)
    state = {name.removeprefix(prefix): tensor.float() for name, tensor in state.items()}
    encoder = _encoder_like(path, state)
    names = {_released_name(name): name for name in encoder.state_dict()}
    wanted = {theirs: encoder.state_dict()[ours].shape for theirs, ours in names.items()}
    got = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            shapes = [list(shapes[name]) if name in shapes else "nothing" for shapes in (got, wanted)]
            raise CheckpointError(f"{path}: {name} is {shapes[0]}; expected {shapes[1]}")
    encoder.load_state_dict({ours: state[theirs] for theirs, ours in names.items()}, assign=True)
    return encoder


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        try:
            with torch.serialization.safe_globals([(_Pickled, name) for name in _CLASSES]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
            raise CheckpointError(
                f"{path} is no file of PyTorch, or cannot be read without running the code in it; expected DALL-E's "
                "encoder. If you trust the file, convert it once where dall_e is installed: "
                "encoder = torch.load(FILE, weights_only=False); torch.save(encoder.state_dict(), 'encoder.pth')"
            ) from None
        if isinstance(content, _Pickled):
            return content.tensors()
    return read_found(path).state


def _encoder_like(path: Path, state: dict[str, Tensor]) -> DVAEEncoder:
    places = [re.match(r"blocks\.group_(\d+)\.block_(\d+)\.", name) for name in state]
    places = [tuple(map(int, place.groups())) for place in places if place]
    last = state.get("blocks.output.conv.w")
    if not places or last is None:
        raise CheckpointError(
            f"{path} holds no blocks.group_1 or no blocks.output; expected DALL-E's encoder"
        )
    hidden, channels = state[_FIRST].shape[:2]
    groups, blocks = map(max, zip(*places, strict=True))
    with torch.device("meta"):  # nothing is drawn from the generator of the run
        return DVAEEncoder(channels, hidden, blocks, tokens=len(last), groups=groups)


def _released_name(name: str) -> str:
    """What the release calls our parameter."""
    stem, _, ending = name.rpartition(".")
    kind = {"weight": "w", "bias": "b"}[ending]
    if ends := {"input": "input", "output": "output.conv"}.get(stem):
        return f"blocks.{ends}.{kind}"
    _, group, block, _, *number = stem.split(".")
    path = f"res_path.conv_{int(number[0]) + 1}" if number else "id_path"
    return f"blocks.group_{int(group) + 1}.block_{int(block) + 1}.{path}.{kind}"
