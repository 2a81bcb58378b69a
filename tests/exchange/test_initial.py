"""`model.init`: what a run starts from."""

import logging

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from fastmim.errors import CheckpointError
from fastmim.exchange.initial import initialise
from fastmim.exchange.outward import export_weights
from fastmim.objectives import build_objective
from fastmim.ranks import Ranks
from tests.exchange.peers import published, random_objective, saved


def started(config, source, ranks=None):
    """A fresh objective and the same after `model.init`."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": str(source)})})
    torch.manual_seed(5)
    objective = build_objective(config)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    initialise(objective, config, ranks or Ranks())
    return before, objective.state_dict()


def test_everything_or_the_encoder_is_taken(tiny_config, tmp_path, caplog):
    config = tiny_config("data.mean=0.5", "data.channels=1")
    objective = random_objective(config)
    wanted = objective.state_dict()
    ours = str(saved(objective, config, tmp_path / "ours.safetensors"))
    _, after = started(config, ours)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)

    # Another layout of the encoder alone, another size of image, another decoder.
    for layout, out in (
        ("timm", "t.safetensors"),
        ("transformers", "h"),
        ("mae", "m.pth"),
        ("fastmim", "e.safetensors"),
    ):
        export_weights(ours, str(tmp_path / out), layout, encoder_only=True)
        other = tiny_config("data.image_size=[16,48]", "objective.decoder_width=8", "data.channels=1")
        with caplog.at_level(logging.INFO, "fastmim"):
            before, after = started(other, tmp_path / out)
        for name, tensor in after.items():
            assert torch.equal(tensor, wanted[name] if name.startswith("encoder.") else before[name]), name
        assert "; afresh: decoder, head" in caplog.text
        assert "data.mean is [0.5]" not in caplog.text


def test_other_statistics_are_told(tiny_config, tmp_path, caplog):
    config = tiny_config()
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    started(tiny_config("data.mean=[0.1,0.2,0.3]"), ours)
    assert f"data.mean is [0.1, 0.2, 0.3]; {ours} was trained with [0.485, 0.456, 0.406]" in caplog.text


def test_positions_of_other_images_are_kept_where_the_recipe_says_so(tiny_config, tmp_path, caplog):
    config = tiny_config()
    ours = saved(random_objective(config), config, tmp_path / "ours.safetensors")
    started(tiny_config("data.image_size=64"), ours)
    told = f"8 x 8 patches; {ours} was trained with those of 4 x 4, which model.positions_grid=[4,4] keeps"
    assert told in caplog.text
    caplog.clear()
    started(tiny_config("data.image_size=64", "model.positions_grid=[4,4]"), ours)
    started(tiny_config(), ours)
    assert not caplog.text


def test_learned_positions_are_resized(tiny_config, tmp_path, caplog):
    config = tiny_config("model.positions=learned")
    objective = random_objective(config)
    ours = saved(objective, config, tmp_path / "ours.safetensors")
    _, after = started(tiny_config("model.positions=learned", "data.image_size=[16,48]"), ours)
    wanted = resample_abs_pos_embed(objective.encoder.pos_embed.detach(), [2, 6], old_size=[4, 4])
    torch.testing.assert_close(after["encoder.pos_embed"], wanted)
    assert "model.positions_grid=[4,4] keeps" in caplog.text  # the decoder's


MISMATCHES = {
    "model.width=64": r"has model.width 32 \(this run has 64\)",
    "model.depth=3": r"has model.depth 2 \(this run has 3\)",
    "model.heads=4": r"has model.heads 2 \(this run has 4\)",
    "model.patch_size=16": r"has model.patch_size 8 \(this run has 16\)",
    "model.mlp_ratio=2": r"has model.mlp_ratio 4.0 \(this run has 2.0\)",
    "data.channels=4": r"has data.channels 3 \(this run has 4\)",
    "objective.decoder_width=32": r"has objective.decoder_width 16 \(this run has 32\)",
    "objective.decoder_depth=2": r"has objective.decoder_depth 1 \(this run has 2\)",
    "objective.decoder_heads=4": r"has objective.decoder_heads 2 \(this run has 4\)",
    "objective.mask_token_in_encoder=true": r"decoder.mask_token is \[1, 1, 16\] there and absent in this run",
}


@pytest.mark.parametrize("layout", ["fastmim", "mae"])
@pytest.mark.parametrize("override", MISMATCHES)
def test_another_architecture_is_refused_naming_both(override, layout, tiny_config, tmp_path):
    small = tiny_config("data.image_size=64")
    ours = str(saved(random_objective(small), small, tmp_path / "ours.safetensors"))
    source = tmp_path / ("x.pth" if layout == "mae" else "x.safetensors")
    export_weights(ours, str(source), layout)
    config = tiny_config("data.image_size=64", override)
    with pytest.raises(CheckpointError, match=f"^model.init={source}.*{MISMATCHES[override]}"):
        started(config, source)


def test_a_file_that_tells_no_heads_is_compared_first(tiny_config, tmp_path):
    torch.save(published(tiny_config()).state_dict(), tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"has model.width 32 \(this run has 48\)$"):
        started(tiny_config("model.width=48", "model.heads=3"), tmp_path / "mae.pth")
    _, after = started(tiny_config(), tmp_path / "mae.pth")
    held = torch.load(tmp_path / "mae.pth", weights_only=True)
    assert torch.equal(after["head.linear.weight"], held["decoder_pred.weight"])


def test_another_objective_takes_the_encoder(tiny_config, tmp_path):
    config = tiny_config()
    objective = random_objective(config)
    ours = str(saved(objective, config, tmp_path / "ours.safetensors"))
    torch.save(published(config).state_dict(), tmp_path / "mae.pth")
    simmim = tiny_config("objective.name=simmim")
    for source in (ours, tmp_path / "mae.pth"):
        before, after = started(simmim, source)
        assert torch.equal(after["head.linear.weight"], before["head.linear.weight"])
        assert not torch.equal(after["encoder.norm.weight"], before["encoder.norm.weight"])


class SecondRankOfTheNode:
    """The first one has found the file good; all others read it too."""

    local_rank = 1

    def run_on_first(self, act, each_node):
        assert each_node


def test_every_rank_gets_the_weights(tiny_config, tmp_path):
    config = tiny_config()
    objective = random_objective(config)
    ours = saved(objective, config, tmp_path / "ours.safetensors")
    _, after = started(config, ours, SecondRankOfTheNode())
    assert all(torch.equal(after[name], tensor) for name, tensor in objective.state_dict().items())


def test_what_does_not_exist_is_refused(tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pth does not exist"):
        started(tiny_config(), tmp_path / "none.pth")
