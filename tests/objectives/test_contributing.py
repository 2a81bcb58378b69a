"""The objective that CONTRIBUTING.md shows is one: it computes what it says, and learns."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def mean_color(tiny_config):
    """The example, built from a tiny configuration; its options are those of MAE's decoder."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) <= 60
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    torch.manual_seed(0)
    return names["MeanColor"](tiny_config())


def batch_of(images):
    places = torch.arange(len(images))
    return SimpleNamespace(images=images, epochs=torch.zeros_like(places), positions=places)


def test_its_target_is_the_mean_color(mean_color):
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    ids = torch.tensor([[0, 5], [15, 2]])
    target = mean_color.target(images, ids)
    for sample in range(2):
        for place, patch in enumerate(ids[sample].tolist()):
            rows, columns = patch // 4 * 8, patch % 4 * 8
            colour = images[sample, rows : rows + 8, columns : columns + 8].double().mean((0, 1)) / 255
            wanted = (colour - mean_color.scale.mean) / mean_color.scale.std
            torch.testing.assert_close(target[sample, place].double(), wanted, rtol=1e-5, atol=1e-5)


def test_it_learns_and_counts_its_flops(mean_color):
    images = torch.randint(0, 256, (8, 1, 1, 3), dtype=torch.uint8).expand(-1, 32, 32, -1).contiguous()
    optimizer = torch.optim.AdamW(mean_color.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = mean_color(batch_of(images))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.grad is not None for parameter in mean_color.parameters())
    # The fused CPU attention is unknown to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mean_color(batch_of(images))
    assert mean_color.forward_flops() * 8 == pytest.approx(counter.get_total_flops(), rel=0.01)
