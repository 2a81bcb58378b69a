"""The analytic count against PyTorch's own counter."""

from types import SimpleNamespace

import pytest
import torch
from fastmim.kernels import info_nce_reference, masked_cross_entropy_reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim import flops as flops_module
from fastmim.flops import measure_peak_flops, peak_flops
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


@pytest.mark.parametrize("variant", ["mae", "mae-mask-token", "mae-cross-part"])
def test_each_module_of_mae_is_counted_at_vit_tiny(tiny_config, variant):
    sizes = ["model.width=192", "model.heads=3", "data.image_size=96", "objective.decoder_width=128"]
    objective = build_objective(tiny_config(*sizes, *VARIANTS[variant]))
    batch = SimpleNamespace(
        images=images_of(objective.config, 1), epochs=torch.zeros(1).long(), positions=torch.zeros(1).long()
    )

    def count(run):
        # All modules: the counter gives a backward pass to the module whose forward pass it saw.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    forward = count(lambda: objective(batch))
    both = count(lambda: objective(batch)["loss"].backward())
    counted = objective.module_flops()
    assert counted.keys() == {"patch_embed", "encoder", "decoder", "head"}
    names = {"patch_embed": "encoder.patch_embed", "encoder": "encoder.blocks"}
    for module, flops in counted.items():
        name = f"MAE.{names.get(module, module)}"
        assert flops.forward == pytest.approx(forward[name], rel=0.01)
        # Where layers are handed from module to module in lists, the counter takes one's backward pass for another's.
        if not objective.crosses:
            assert flops.backward == pytest.approx(both[name] - forward[name], rel=0.01)
    assert objective.step_flops() == pytest.approx(both["Global"], rel=0.01)


def test_a_measured_peak_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setattr(flops_module, "_PEAK_SIDE", {"cpu": 10})
    seconds = iter([0.5, 0.25, *[1.0] * 8])
    monkeypatch.setattr(flops_module, "_seconds_of_product", lambda *_: next(seconds))
    assert measure_peak_flops(torch.device("cpu"), torch.bfloat16) == 2 * 10**3 / 0.25
    monkeypatch.undo()
    monkeypatch.setattr(flops_module, "_PEAK_SIDE", {"cpu": 64})
    assert measure_peak_flops(torch.device("cpu"), torch.bfloat16) > 0


def test_peak_is_known_in_16_bits_or_given():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H200 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    assert peak_flops("cpu", "fp32", 0.3) == 0.3e12
