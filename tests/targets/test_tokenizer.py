"""Tokenizers from DALL-E's released layout and from runs, against a naive forward pass."""

import pickle
import sys
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastmim.errors import CheckpointError
from fastmim.targets.tokenizer import load_tokenizer

HIDDEN, BLOCKS, TOKENS = 8, 2, 40


@pytest.fixture
def release(monkeypatch):
    """Builds a module that pickles as the release's does: `dall_e.encoder.Encoder` of `dall_e.utils.Conv2d`s."""
    modules = {name: ModuleType(name) for name in ("dall_e", "dall_e.encoder", "dall_e.utils")}

    def pickled_as(name):
        def rename(cls):
            cls.__module__, cls.__qualname__ = name, cls.__name__
            setattr(modules[name], cls.__name__, cls)
            return cls

        return rename

    @pickled_as("dall_e.utils")
    class Conv2d(nn.Module):
        def __init__(self, inputs, outputs, kernel):
            super().__init__()
            self.n_in, self.n_out, self.kw, self.device = inputs, outputs, kernel, torch.device("cpu")
            self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5)
            self.b = nn.Parameter(torch.randn(outputs) / 20)

    @pickled_as("dall_e.encoder")
    class EncoderBlock(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            middle = outputs // 4
            self.id_path = nn.Identity() if inputs == outputs else Conv2d(inputs, outputs, 1)
            self.res_path = nn.Sequential()
            shapes = [(inputs, middle, 3), (middle, middle, 3), (middle, middle, 3), (middle, outputs, 1)]
            for i, shape in enumerate(shapes, 1):
                self.res_path.add_module(f"relu_{i}", nn.ReLU())
                self.res_path.add_module(f"conv_{i}", Conv2d(*shape))

    @pickled_as("dall_e.encoder")
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_hid = HIDDEN
            self.blocks = nn.Sequential()
            self.blocks.add_module("input", Conv2d(3, HIDDEN, 7))
            width = HIDDEN
            for group in range(4):
                members = nn.Sequential()
                for block in range(BLOCKS):
                    members.add_module(f"block_{block + 1}", EncoderBlock(width, HIDDEN * 2**group))
                    width = HIDDEN * 2**group
                if group < 3:
                    members.add_module("pool", nn.MaxPool2d(kernel_size=2))
                self.blocks.add_module(f"group_{group + 1}", members)
            output = nn.Sequential()
            output.add_module("relu", nn.ReLU())
            output.add_module("conv", Conv2d(width, TOKENS, 1))
            self.blocks.add_module("output", output)

    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    return Encoder()


def forget_the_release(monkeypatch):
    """As on a machine without the release's package: the file has to do."""
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name)


def naive_tokens(state, images):
    """The release's forward pass from its own names, in float64, without a resize."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def convolve(x, name):
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = images.double().permute(0, 3, 1, 2) / 255
    x = convolve((1 - 2 * 0.1) * x + 0.1, "input")
    for group in range(1, 5):
        for block in range(1, BLOCKS + 1):
            name = f"group_{group}.block_{block}"
            change = x
            for step in range(1, 5):
                change = convolve(F.relu(change), f"{name}.res_path.conv_{step}")
            x = convolve(x, f"{name}.id_path") if f"blocks.{name}.id_path.w" in state else x
            x = x + change / (4 * BLOCKS) ** 2
        x = F.max_pool2d(x, 2) if group < 4 else x
    return convolve(F.relu(x), "output.conv").argmax(1).flatten(1)


def squares(n, rows, columns):
    """Images of squares of 8 pixels, each of its own colour, so that their tokens differ."""
    colours = torch.randint(0, 256, (n, rows, columns, 3), dtype=torch.uint8)
    return colours.repeat_interleave(8, 1).repeat_interleave(8, 2)


def save(encoder, path):
    if path.suffix == ".safetensors":
        save_file(encoder.state_dict(), path)
    elif path.name == "wrapped.pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in encoder.state_dict().items()}}, path)
    elif path.suffix == ".pth":
        torch.save(encoder.state_dict(), path)
    else:
        torch.save(encoder, path)


@pytest.mark.parametrize("name", ["encoder.pkl", "encoder.pth", "wrapped.pth", "encoder.safetensors"])
def test_every_form_of_the_release_gives_its_tokens(release, tmp_path, monkeypatch, name):
    save(release, tmp_path / name)
    forget_the_release(monkeypatch)
    tokenizer = load_tokenizer(str(tmp_path / name))
    assert (tokenizer.tokens, tokenizer.channels, tokenizer.encoder.stride) == (TOKENS, 3, 8)
    images = squares(5, 3, 5)
    tokens = tokenizer(images, (3, 5))
    assert torch.equal(tokens, naive_tokens(release.state_dict(), images)) and len(tokens.unique()) > 1


def test_images_are_resized_so_that_a_patch_is_a_token(release, tmp_path, monkeypatch):
    save(release, tmp_path / "encoder.pth")
    forget_the_release(monkeypatch)
    tokenizer = load_tokenizer(str(tmp_path / "encoder.pth"))
    images = squares(2, 6, 10)  # 3 x 5 patches of 16
    small = F.interpolate(images.permute(0, 3, 1, 2).float(), (24, 40), mode="bicubic", antialias=True)
    wanted = naive_tokens(release.state_dict(), small.clamp(0, 255).permute(0, 2, 3, 1))
    assert torch.equal(tokenizer(images, (3, 5)), wanted) and len(wanted.unique()) > 1


def test_large_batches_are_taken_in_parts(release, tmp_path, monkeypatch):
    save(release, tmp_path / "encoder.pth")
    forget_the_release(monkeypatch)
    tokenizer = load_tokenizer(str(tmp_path / "encoder.pth"))
    images = squares(70, 2, 2)
    apart = torch.cat([tokenizer(image[None], (2, 2)) for image in images])
    assert torch.equal(tokenizer(images, (2, 2)), apart)


class Harmful:
    def __reduce__(self):
        return print, ("code of a file was run",)


def test_what_is_not_the_release_is_refused(release, tmp_path, monkeypatch, capsys):
    state = release.state_dict()
    torch.save(
        {**state, "blocks.group_1.block_1.res_path.conv_1.w": torch.zeros(2, 9, 3, 3)}, tmp_path / "shape.pth"
    )
    torch.save(
        {k: v for k, v in state.items() if k != "blocks.group_3.block_1.id_path.b"}, tmp_path / "lacks.pth"
    )
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "harmful.pkl").write_bytes(pickle.dumps(Harmful(), protocol=2))
    torch.save(Harmful(), tmp_path / "harmful.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this form looks for the source code of the classes
        torch.save(release, tmp_path / "legacy.pkl", _use_new_zipfile_serialization=False)
    forget_the_release(monkeypatch)
    messages = {
        "shape.pth": r"conv_1.w is \[2, 9, 3, 3\]; expected \[2, 8, 3, 3\]",
        "lacks.pth": r"blocks.group_3.block_1.id_path.b is nothing; expected \[32\]",
        "other.pth": r"holds fc.weight; expected DALL-E's encoder",
        "harmful.pkl": "cannot be read without running the code in it",
        "harmful.pth": "cannot be read without running the code in it",
        "legacy.pkl": r"encoder = torch.load\(FILE, weights_only=False\); torch.save\(encoder.state_dict\(\)",
        "nowhere": "does not exist; expected a run of objective dvae",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(str(tmp_path / name))
    assert "was run" not in capsys.readouterr().out
