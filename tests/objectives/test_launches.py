"""How many kernels one step of an objective launches, inside and outside the transformer blocks."""

from types import SimpleNamespace

import pytest
import torch
from fastmim.kernels import _dispatch

from fastmim.objectives import build_objective

# Launched by transformer blocks and by nothing else.
BLOCK_KERNELS = ("_add_layer_norm_",)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, in order, in Triton's interpreter."""
    names = []
    launch = _dispatch.launch

    def record(function, *args, **kwargs):
        names.append(function.__name__)
        launch(function, *args, **kwargs)

    monkeypatch.setattr(_dispatch, "MODE", "interpret")
    monkeypatch.setattr(_dispatch, "launch", record)
    return names


def test_an_mae_step_stays_within_its_launches(launched, tiny_config):
    objective = build_objective(tiny_config())
    batch = SimpleNamespace(
        images=torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        epochs=torch.zeros(2, dtype=torch.int64),
        positions=torch.arange(2),
    )
    objective(batch)["loss"].backward()
    inside = [name for name in launched if name.startswith(BLOCK_KERNELS)]
    sampling, *outside = (name for name in launched if not name.startswith(BLOCK_KERNELS))
    print(f"\nMAE step, outside the blocks: 1 launch for the masks, {len(outside)} for forward and backward")
    print(" ".join([sampling, *outside]))
    print(f"inside the 3 blocks: {len(inside)}")
    assert sampling == "_sample_random_mask_kernel"
    assert len(outside) <= 8
    # Each way an addition with each norm but the first of encoder and decoder and the decoder's last, before which
    # patches are gathered.
    assert len(inside) == 2 * (2 * 3 - 3)
    assert all(parameter.grad is not None for parameter in objective.parameters())
