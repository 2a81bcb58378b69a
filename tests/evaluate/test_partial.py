"""Partial fine-tuning: what is trained, that the rest stays bit for bit, and the sweep."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.cli import main
from fastmim.evaluate.classifier import Classifier, copy_encoder, finetuned_config, layer_decay_groups
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.features import everything

LAST = "encoder.blocks.layers.1."
MLP = [f"{LAST}{part}" for part in ("norm2.", "mlp.")]
HEAD, NORM = ["head."], ["norm."]


@pytest.fixture
def build(weights):
    encoder, config = load_encoder(str(weights))

    def make(blocks, pool="mean", drop_path=0.5):
        torch.manual_seed(1)
        copy = copy_encoder(encoder, config.grid, finetuned_config(config, (32, 32), drop_path), "fp32")
        return Classifier(copy, 16, 3, pool, blocks)

    return make


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    "blocks, pool, trained",
    [
        (0, "mean", HEAD + NORM),
        (0, "cls", HEAD),
        (0.5, "mean", HEAD + NORM + MLP),
        (0.5, "cls", HEAD + NORM + MLP),
        (1, "cls", [*HEAD, *NORM, LAST]),
        (2, "mean", [""]),
        (None, "cls", [""]),
    ],
)
def test_what_is_frozen_stays_bit_for_bit_and_what_is_not_moves(build, images, blocks, pool, trained):
    model = build(blocks, pool).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 0.05, 0.65), lr=1e-2)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(images), torch.arange(6) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(tuple(trained)), name


def test_no_path_of_the_frozen_part_is_dropped(build, images):
    def block_outputs(model):
        return model.encoder(images, everything(6, 16, images.device), every_layer=True)

    # The rates are 0 and one half: the last block alone can drop.
    model = build(None).train()
    torch.manual_seed(0)
    some, others = (block_outputs(model)[-1] for _ in range(2))
    assert not torch.equal(some, others)
    model = build(0).train()
    some, others = (block_outputs(model)[-1] for _ in range(2))
    assert torch.equal(some, others) and not some.requires_grad
    # Of the last block's two branches the MLP's is trained, and dropped; that of the attention is neither.
    last = build(0.5).train().encoder.blocks.layers[-1]
    assert last.drop_path2.training and not last.drop_path1.training and not last.attn.training
    assert not build(0.5).train(False).encoder.blocks.layers[-1].drop_path2.training


def test_learning_rates_fall_with_the_depth(build):
    model = build(None)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {}
    for group in layer_decay_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            seen[names[parameter]] = group["lr_scale"], group["weight_decay"]
    assert len(seen) == len(names)
    for name, (scale, decay) in seen.items():
        if name.startswith("encoder.blocks.layers."):
            below = 1 + int(name.split(".")[3])
        else:
            below = 3 if name.startswith(("norm.", "head.")) else 0
        assert scale == 0.5 ** (3 - below), name
        assert decay == (0.05 if name.endswith("weight") and "norm" not in name else 0), name


def test_pooling_and_another_image_size(weights, build, images):
    encoder, config = load_encoder(str(weights))
    tokens = encoder(images, everything(6, 16, images.device), every_layer=True)[-1]
    model = build(None, "mean").eval()
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T, rtol=1e-4, atol=1e-7)
    model = build(None, "cls").eval()
    normed = torch.nn.functional.layer_norm(
        tokens[:, 0], (32,), encoder.norm.weight, encoder.norm.bias, eps=1e-6
    )
    torch.testing.assert_close(model(images), normed @ model.head.weight.T, rtol=1e-4, atol=1e-7)
    wide = finetuned_config(config, (16, 40), 0.0)
    copy = copy_encoder(encoder, config.grid, wide, "fp32")
    table = encoder.pos_embed[0, 1:].T.view(1, 32, 4, 4)
    wanted = torch.nn.functional.interpolate(table, (2, 5), mode="bicubic", antialias=True)
    torch.testing.assert_close(copy.pos_embed[0, 1:].T.reshape(1, 32, 2, 5), wanted)
    assert Classifier(copy, 10, 3, "mean")(images[:, :16, :].repeat(1, 1, 2, 1)[:, :, :40]).shape == (6, 3)


def test_learned_positions_are_resized(tiny_config):
    from fastmim.models import Encoder
    from fastmim.models.pixels import PixelScale

    config = tiny_config("model.positions=learned")
    encoder = Encoder(config, PixelScale(config.data.mean, config.data.std))
    wide = finetuned_config(config, (64, 64), 0.0)
    copy = copy_encoder(encoder, config.grid, wide, "fp32")
    table = encoder.pos_embed[0, 1:].T.view(1, 32, 4, 4)
    wanted = torch.nn.functional.interpolate(table, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(copy.pos_embed[0, 1:].T.reshape(1, 32, 8, 8), wanted)
    assert copy.pos_embed.requires_grad


def test_a_sweep_tells_and_draws_every_value(weights, train_folder, test_folder, tmp_path):
    words = ["batch_size=12", "epochs=2", "warmup_epochs=1", "workers=0", "blr=0.02", "test_every=9"]
    options = ["--weights", weights, "--data", train_folder, "--test", test_folder, "--out", tmp_path / "out"]
    given = [str(word) for word in options]
    assert (
        main(["evaluate", "finetune", *given, *words, "--recipe", "partial_small", "trainable_blocks=[1,0]"])
        == 0
    )
    told = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [row["trainable_blocks"] for row in told["sweep"]] == [1, 0]
    counts = [row["trained_parameters"] for row in told["sweep"]]
    block = 12 * 32 * 32 + 13 * 32  # weights and biases of attention, MLP and two norms
    assert counts == [block + 2 * 32 + 33 * 3, 2 * 32 + 33 * 3]
    assert told["top1"] == told["sweep"][-1]["test_top1"]
    with Image.open(tmp_path / "out" / "partial.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[1] > 400 and (pixels != 255).any(2).mean() > 0.01
