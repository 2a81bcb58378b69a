"""The family through launch.py: each trains, draws and exports; ranks under ZeRO give the losses of one."""

import numpy as np
import pytest
import timm
from safetensors.torch import load_file

from fastmim.errors import CheckpointError
from fastmim.exchange.outward import export_weights
from fastmim.reconstruct import reconstruct_images
from tests.launching import TINY_YAML, losses, records, train, write_images
from tests.objectives.test_cae import write_tokenizer

DECODER = ["objective.decoder_width=16", "objective.decoder_depth=1", "objective.decoder_heads=2"]
RUNS = {
    "mask_token": ["objective.mask_token_in_encoder=true"],
    "cross": ["objective.decoder=cross", "objective.decoder_depth=2", "objective.kept_mask_ratio=0.25"],
    "learned_positions": ["model.positions=learned", *DECODER],
    "simmim": ["objective.name=simmim", "mask.unit=2", "mask.ratio=0.5"],
    "beit": [
        "objective.name=beit",
        "target.tokenizer=encoder.safetensors",
        "mask.strategy=block",
        "mask.min_block=4",
    ],
    "r_mae": ["objective.name=r_mae", *DECODER, "objective.share_decoder=true"],
    "c_mae": ["objective.name=c_mae", *DECODER],
}
DRAWN = {"mask_token", "learned_positions", "cross", "simmim", "r_mae"}
PARTS = {"r_mae": {"loss_agree", "loss_rebuild"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_images(folder / "images", 16)
    write_tokenizer(folder / "encoder.safetensors")
    (folder / "tiny.yaml").write_text(TINY_YAML)
    return folder / "tiny.yaml"


def run(recipe, name, output, *arguments, ranks=1):
    return train(
        recipe,
        "data.source=images",
        f"output={output}",
        "train.max_steps=4",
        *RUNS[name],
        *arguments,
        ranks=ranks,
    )


@pytest.fixture(scope="module")
def alone(recipe):
    """A function from a run's name to its losses on one rank, without ZeRO."""
    found = {}

    def losses_of(name):
        if name not in found:
            drawing = ["log.reconstruct_every_steps=4"] if name in DRAWN else []
            found[name] = losses(run(recipe, name, name, *drawing))
        return found[name]

    return losses_of


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_draws_and_exports(recipe, alone, name):
    assert len(alone(name)) == 4 and np.isfinite(alone(name)).all()
    folder = recipe.parent / name
    parts = {key for key in records(folder)[-1] if key.startswith("loss_")}
    assert parts == PARTS.get(name, set())
    export_weights(str(folder), str(folder / "encoder.safetensors"), "timm")
    encoder = timm.create_model(
        *["vit_tiny_patch16_224"],
        **{"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0},
    )
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    picture = recipe.parent / f"{name}.png"
    arguments = (str(folder), str(recipe.parent / "images"), str(picture), 2)
    if name not in DRAWN:
        with pytest.raises(CheckpointError, match="which predicts no pixels"):
            reconstruct_images(*arguments)
        return
    assert (folder / "reconstructions.png").exists()
    assert "2 of 16 images" in reconstruct_images(*arguments)
    assert picture.exists()


# R-MAE calls its encoder and its decoder twice, CrossMAE hands a list of tensors from module to module and leaves
# a norm unused, C-MAE gathers in its loss.
@pytest.mark.parametrize(("name", "stage"), [("cross", 3), ("r_mae", 3), ("c_mae", 2)])
def test_two_ranks_give_the_losses_of_one(recipe, alone, name, stage):
    zero = f"deepspeed.zero_optimization.stage={stage}"
    got = run(recipe, name, f"{name}_zero{stage}", zero, ranks=2)
    np.testing.assert_allclose(losses(got), alone(name), rtol=1e-4)
