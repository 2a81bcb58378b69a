import functools
import sys

import pytest
import torch


@pytest.fixture
def unwritten_shows(monkeypatch):
    """Fill new memory with NaN, or 0xFF bytes, so that an element that a kernel does not write is seen."""

    def filled(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(255 if tensor.dtype == torch.uint8 else -1)

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture
def small_chunks(monkeypatch):
    """Let the losses over logits take 128 rows at a time, so that few rows are several chunks."""
    module = sys.modules["fastmim.kernels.masked_cross_entropy"]  # its name in the package is the function's
    monkeypatch.setattr(module, "CHUNK_ROWS", 128)


@pytest.fixture
def compiler(request, monkeypatch, tmp_path):
    """`torch.compile` without graph breaks and with an empty cache: a full one outlives an operation's code."""
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    interpreted = "backend" in request.fixturenames and request.getfixturevalue("backend") == "interpret"
    # An operation is opaque to Inductor: generating code once per test, around the reference, is enough.
    return functools.partial(
        torch.compile, fullgraph=True, backend="aot_eager" if interpreted else "inductor"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
