"""The analytic count against PyTorch's own counter."""

from types import SimpleNamespace

import pytest
import torch
from fastmim.kernels import info_nce_reference, masked_cross_entropy_reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim.flops import peak_flops
from fastmim.objectives import build_objective
from fastmim.objectives import c_mae as c_mae_module
from fastmim.targets import tokens as tokens_module
from tests.objectives.naive_mae import StubTokenizer, images_of

DECODER = ["objective.decoder_width=16", "objective.decoder_depth=1", "objective.decoder_heads=2"]
VARIANTS = {
    "mae": [],
    "mae-wide": ["model.width=96", "data.image_size=[64,32]", "objective.decoder_depth=2", "mask.ratio=0.5"],
    "mae-mask-token": ["objective.mask_token_in_encoder=true"],
    "mae-cross": ["objective.decoder=cross"],
    "mae-cross-part": [
        "objective.decoder=cross",
        "objective.decoder_depth=3",
        "objective.kept_mask_ratio=0.25",
    ],
    "simmim": ["objective.name=simmim", "mask.ratio=0.6", "mask.unit=2"],
    "beit": ["objective.name=beit", "target.tokenizer=stub", "mask.ratio=0.4"],
    "r_mae": ["objective.name=r_mae", *DECODER],
    "r_mae-shared": ["objective.name=r_mae", *DECODER, "objective.share_decoder=true"],
    "c_mae": ["objective.name=c_mae", *DECODER, "objective.projection=24", "optim.batch_size=2"],
    "c_mae-stopped": [
        *["objective.name=c_mae", *DECODER, "objective.projection=24", "optim.batch_size=2"],
        *["objective.share_decoder=true", "objective.stop_gradient=true"],
    ],
}


@pytest.fixture
def countable(monkeypatch):
    """Products inside our operations are hidden from the counter; their plain references show them."""
    monkeypatch.setattr(c_mae_module, "info_nce", info_nce_reference)
    monkeypatch.setattr(tokens_module, "masked_cross_entropy", masked_cross_entropy_reference)
    monkeypatch.setattr(tokens_module, "load_tokenizer", lambda source: StubTokenizer())


@pytest.mark.parametrize("variant", VARIANTS)
def test_analytic_flops_are_the_counted_ones(tiny_config, countable, variant):
    objective = build_objective(tiny_config(*VARIANTS[variant]))
    places = torch.arange(2)
    batch = SimpleNamespace(
        images=images_of(objective.config, 2), epochs=torch.zeros_like(places), positions=places
    )
    # The fused CPU attention is unknown to the counter; the plain one is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = objective(batch)["loss"]
    assert objective.forward_flops() * 2 == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = (objective.step_flops() - objective.forward_flops()) * 2
    assert backward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peak_is_known_in_16_bits_or_given():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    assert peak_flops("cpu", "fp32", 0.3) == 0.3e12
