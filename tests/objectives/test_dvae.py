"""The discrete autoencoder: its formula in float64, its schedules, its pictures and its runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.config_objective import DVAE_STRIDE
from fastmim.errors import ConfigError
from fastmim.models.dvae import ResidualBlock
from fastmim.objectives import build_objective
from tests.launching import losses, train, write_images

SMALL = [
    "objective.name=dvae",
    "objective.tokens=24",
    "objective.hidden=8",
    "objective.code_width=6",
    "data.image_size=[16,24]",
]


def small_config(*overrides):
    return recipes.override([*SMALL, *overrides])


def batch_of(config, size=3):
    images = torch.randint(0, 256, (size, *config.data.image_size, config.data.channels), dtype=torch.uint8)
    places = torch.arange(size)
    return SimpleNamespace(images=images, epochs=torch.zeros_like(places), positions=places)


def naive_loss(weights, config, images, noise, temperature, kl_weight):
    """The objective from its weights, in float64: convolutions, ReLUs, pools, one softmax with Gumbel noise."""
    objective = config.objective
    gain = 1 / (4 * objective.blocks_per_group) ** 2

    def convolve(x, name):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def network(x, side, resize):
        x = convolve(x, f"{side}.input")
        for group in range(4):
            if group:
                x = resize(x)
            for block in range(objective.blocks_per_group):
                name = f"{side}.groups.{group}.{block}"
                change = x
                for step in range(4):
                    change = convolve(change.clamp_min(0), f"{name}.convolutions.{step}")
                if f"{name}.shortcut.weight" in weights:
                    x = convolve(x, f"{name}.shortcut")
                x = x + gain * change
        return convolve(x.clamp_min(0), f"{side}.output")

    mean, std = torch.tensor(config.data.mean).double(), torch.tensor(config.data.std).double()
    pixels = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    logits = network(pixels, "encoder", lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)))
    tokens = torch.softmax((logits + noise) / temperature, dim=1)
    rebuilt = network(tokens, "decoder", lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    error = rebuilt - pixels
    rebuild = error.abs().mean() if objective.loss == "l1" else error.square().mean()
    share = torch.softmax(logits, dim=1)
    kl = (share * (share * objective.tokens).log()).sum(1).mean()
    return rebuild + kl_weight * kl, rebuild, kl, logits


@pytest.mark.parametrize(
    ("loss", "blocks", "progress", "temperature", "kl_weight"),
    [
        ("mse", 1, 0.0, 1.0, 0.0),
        ("l1", 2, 0.2, 0.6, 0.35),  # half of `anneal`: the middle of both cosines
        ("mse", 1, 0.7, 0.2, 0.7),
    ],
)
def test_loss_and_gradients_are_the_formulas(loss, blocks, progress, temperature, kl_weight):
    config = small_config(
        "objective.hidden=16",
        f"objective.loss={loss}",
        f"objective.blocks_per_group={blocks}",
        "objective.temperature=[1.0,0.2]",
        "objective.anneal=0.4",
        "objective.kl_weight=0.7",
    )
    torch.manual_seed(0)
    objective = build_objective(config)
    for parameter in objective.parameters():
        if parameter.ndim == 1:  # biases that are not 0, and leave no ReLU dead
            parameter.data += torch.rand_like(parameter) * 0.2
    batch = batch_of(config)
    objective.progress = progress
    torch.manual_seed(1)
    got = objective(batch)
    got["loss"].backward()

    torch.manual_seed(1)
    noise = -torch.empty(3, 24, 2, 3).exponential_().log().double()
    weights = {name: value.double().requires_grad_() for name, value in objective.state_dict().items()}
    wanted, rebuild, kl, logits = naive_loss(weights, config, batch.images, noise, temperature, kl_weight)
    wanted.backward()
    for name, value in {"loss": wanted, "rebuild": rebuild, "kl": kl}.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=0)
    assert int(got["tokens_used"]) == len(set(logits.argmax(1).flatten().tolist()))
    for name, parameter in objective.named_parameters():
        error = (parameter.grad - weights[name].grad).norm() / weights[name].grad.norm()
        assert error < 1e-3, f"{name}: relative error {error:.2e}"


def test_in_bf16_the_loss_is_float32_and_close():
    config = small_config("objective.kl_weight=0.1")
    objective, batch = build_objective(config), batch_of(config)
    torch.manual_seed(1)
    wanted = objective(batch)["loss"]
    torch.manual_seed(1)
    got = objective.bfloat16()(batch)
    assert {value.dtype for value in got.values()} == {torch.float32}
    torch.testing.assert_close(got["loss"], wanted, rtol=0.02, atol=0)


def test_checkpointed_blocks_give_the_same_gradients():
    batch = batch_of(small_config())
    gradients = []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        objective = build_objective(small_config(f"train.activation_checkpointing={recompute}"))
        objective(batch)["loss"].backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    assert all(map(torch.equal, *gradients))


def test_pictures_are_decoded_from_the_most_likely_tokens():
    config = small_config()
    objective, batch = build_objective(config), batch_of(config)
    mask = objective.sample_mask(batch.epochs, batch.positions)
    assert not mask.mask.any() and mask.ids_keep.shape == (3, 6)
    before = batch.images.clone()
    rebuilt = objective.reconstruct(batch.images, mask)
    assert torch.equal(batch.images, before) and rebuilt.dtype == torch.uint8
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    pixels = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens = objective.encoder(pixels).argmax(1)
    one_hot = torch.zeros(3, 24, 2, 3).scatter_(1, tokens[:, None], 1.0)
    wanted = objective.decoder(one_hot).permute(0, 2, 3, 1) * std + mean
    assert torch.equal(rebuilt, (wanted * 255).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize(
    "overrides", [(), ("data.channels=1", "objective.blocks_per_group=1", "objective.hidden=12")]
)
def test_analytic_flops_are_the_counted_ones(overrides):
    config = small_config(*overrides)
    objective, batch = build_objective(config), batch_of(config)
    with FlopCounterMode(display=False) as counter:
        objective(batch)["loss"].backward()
    assert objective.step_flops() * 3 == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert objective.encoder.stride == DVAE_STRIDE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=[16,20]"], r"data.image_size=\[16, 20\]; expected multiples of 8"),
        (["objective.hidden=6"], "objective.hidden=6; expected an integer > 0 and a multiple of 4"),
        (
            ["objective.temperature=[0.5,1]"],
            r"objective.temperature=\[0.5, 1.0\]; expected first >= last > 0",
        ),
        (["target.kind=tokens"], "target.kind='tokens' with objective.name='dvae'; expected null"),
        (["target.tokenizer=run"], "target.tokenizer with target.kind=None"),
        (["model.init=run"], "model.init='run' with objective.name='dvae'"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        small_config(*overrides)


RECIPE = """
objective: {name: dvae, tokens: 16, hidden: 8, blocks_per_group: 1, code_width: 8}
data: {image_size: 24, threads: 1}
optim: {batch_size: 8, blr: 1.0e-1, epochs: 10, warmup_epochs: 1}
train: {precision: fp32}
checkpoint: {every_minutes: null}
log: {every_steps: 1, tensorboard: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dvae")
    write_images(folder / "images", 24)
    (folder / "dvae.yaml").write_text(RECIPE)
    return folder / "dvae.yaml"


@pytest.fixture(scope="module")
def whole(recipe):
    return train(
        recipe, "data.source=images", "output=whole", "train.max_steps=12", "log.reconstruct_every_steps=12"
    )


def test_a_run_learns_and_draws_whole_images(recipe, whole):
    assert np.mean(losses(whole)[-3:]) < 0.95 * np.mean(losses(whole)[:3])
    assert all(1 <= record["loss_tokens_used"] <= 16 and record["loss_kl"] >= 0 for record in whole)
    assert (recipe.parent / "whole/reconstructions.png").exists()


def test_it_resumes_bitwise_with_its_noise_and_schedules(recipe, whole):
    arguments = ["data.source=images", "output=parts", "log.reconstruct_every_steps=null"]
    train(recipe, *arguments, "train.max_steps=7")
    assert losses(train(recipe, *arguments, "train.max_steps=12")) == losses(whole)
    checkpoints = [manifests.checkpoint_path(recipe.parent / run, 12) for run in ("parts", "whole")]
    ours, theirs = (load_file(checkpoint / manifests.WEIGHTS) for checkpoint in checkpoints)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_learn_alike_whatever_the_stage(recipe):
    # Each rank draws noise of its own, so that two ranks do not learn what one does.
    found = []
    for stage in ("{stage: 1}", "{stage: 3, stage3_param_persistence_threshold: 0}"):
        words = [f"output=stage{len(found)}", f"deepspeed.zero_optimization={stage}", "train.max_steps=3"]
        found.append(losses(train(recipe, "data.source=images", *words, ranks=2)))
    assert len(found[0]) == 3
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_every_block_is_compiled_however_many_there_are(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    objective = build_objective(recipes.load("dvae_small", ["train.compile=true"]))
    objective.compile_blocks()
    blocks = [module for module in objective.modules() if isinstance(module, ResidualBlock)]
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert torch._dynamo.config.recompile_limit >= 4 * len(blocks)
