"""The analytic count against PyTorch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim.flops import mae_forward_flops, mae_step_flops, peak_flops
from fastmim.objectives import build_objective

SHAPES = [(), ("model.width=96", "data.image_size=[64,32]", "objective.decoder_depth=2", "mask.ratio=0.5")]


@pytest.mark.parametrize("overrides", SHAPES)
def test_analytic_flops_are_the_counted_ones(tiny_config, overrides):
    config = tiny_config(*overrides)
    objective = build_objective(config)
    images = torch.randint(0, 256, (2, *config.data.image_size, 3), dtype=torch.uint8)
    mask = objective.sample_mask(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    # The fused CPU attention is unknown to the counter; the plain one is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = objective.loss(images, mask)
    assert mae_forward_flops(config) * 2 == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = (mae_step_flops(config) - mae_forward_flops(config)) * 2
    assert backward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peak_is_known_in_16_bits_or_given():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    assert peak_flops("cpu", "fp32", 0.3) == 0.3e12
