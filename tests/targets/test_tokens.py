"""Token targets: the loss in float64, and the sequence "train a dVAE on images, then predict its tokens"."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.errors import CheckpointError, ConfigError
from fastmim.models.pixels import PixelScale
from fastmim.targets import build_head
from fastmim.targets.tokenizer import load_tokenizer
from tests.launching import launch, losses, train, write_images

DVAE = """
objective: {name: dvae, tokens: 16, hidden: 8, blocks_per_group: 1, code_width: 8}
data: {image_size: 24, mean: 0.4, std: 0.3, channels: 1, threads: 1}
optim: {batch_size: 8, blr: 1.0e-1, epochs: 10, warmup_epochs: 0}
train: {precision: fp32, ema_decay: 0.5}
checkpoint: {every_minutes: null}
log: {every_steps: 1, tensorboard: false}
"""

# Patches of 16 in images of 48 x 32: the tokenizer sees 24 x 16.
TOKENS = """
model: {size: null, width: 32, depth: 1, heads: 2, patch_size: 16}
mask: {ratio: 0.5}
objective: {name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
target: {kind: tokens, tokenizer: dvae}
data: {image_size: [48, 32], channels: 1, threads: 1}
optim: {batch_size: 8, blr: 1.0e-2, epochs: 10, warmup_epochs: 1}
train: {precision: fp32}
checkpoint: {every_minutes: null}
log: {every_steps: 1, tensorboard: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, two recipes, and a trained dVAE."""
    folder = tmp_path_factory.mktemp("tokens")
    write_images(folder / "images", 24)
    (folder / "dvae.yaml").write_text(DVAE)
    (folder / "tokens.yaml").write_text(TOKENS)
    train(folder / "dvae.yaml", "data.source=images", "output=dvae", "train.max_steps=4")
    return folder


def config_of(folder, *overrides):
    return recipes.load(str(folder / "tokens.yaml"), [f"target.tokenizer={folder}/dvae", *overrides])


def head_of(config, width=20):
    return build_head(config, width, PixelScale(config.data.mean, config.data.std))


def test_the_tokenizer_of_a_run_is_its_averaged_encoder(folder):
    tokenizer = load_tokenizer(str(folder / "dvae"))
    checkpoint = manifests.checkpoint_path(folder / "dvae", 4)
    averages, weights = (load_file(checkpoint / name) for name in (manifests.EMA_WEIGHTS, manifests.WEIGHTS))
    assert not torch.equal(averages["encoder.input.weight"], weights["encoder.input.weight"])
    for name, tensor in tokenizer.encoder.state_dict().items():
        assert torch.equal(tensor, averages[f"encoder.{name}"])
    images = torch.randint(0, 256, (2, 16, 24, 1), dtype=torch.uint8)
    pixels = ((images / 255 - 0.4) / 0.3).permute(0, 3, 1, 2)
    assert torch.equal(tokenizer(images, (2, 3)), tokenizer.encoder(pixels).argmax(1).flatten(1))
    assert torch.equal(load_tokenizer(str(checkpoint))(images, (2, 3)), tokenizer(images, (2, 3)))


def test_loss_and_gradients_are_the_formulas(folder):
    config = config_of(folder)
    torch.manual_seed(0)
    head = head_of(config)
    torch.nn.init.normal_(head.bias)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "weight": (16, 20),
        "bias": (16,),
    }
    assert set(head.state_dict()) == {"weight", "bias"}
    images = torch.randint(0, 256, (3, 48, 32, 1), dtype=torch.uint8)
    ids = torch.tensor([[0, 2, 5], [1, 3, 4], [0, 1, 2]])
    x = torch.randn(3, 3, 20, requires_grad=True)
    loss, per_patch, pred = head(x, images, ids)
    loss.backward()

    tokens = load_tokenizer(config.target.tokenizer)(images, (3, 2))
    exact, weight, bias = (
        tensor.detach().double().requires_grad_() for tensor in (x, head.weight, head.bias)
    )
    wanted = [
        torch.logsumexp(weight @ exact[b, m] + bias, 0) - (weight @ exact[b, m] + bias)[tokens[b, ids[b, m]]]
        for b in range(3)
        for m in range(3)
    ]
    torch.stack(wanted).mean().backward()
    assert pred is None and not per_patch.requires_grad
    torch.testing.assert_close(per_patch.double(), torch.stack(wanted).view(3, 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), torch.stack(wanted).mean(), rtol=1e-5, atol=0)
    for got, want in ((x, exact), (head.weight, weight), (head.bias, bias)):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-7)
    logits = head(x, None, ids).pred
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, ids).flatten()), loss)


def test_in_bf16_the_labels_stay_those_of_float32(folder):
    config = config_of(folder)
    head = head_of(config)
    images = torch.randint(0, 256, (3, 48, 32, 1), dtype=torch.uint8)
    ids = torch.arange(6).expand(3, -1)
    x = torch.randn(3, 6, 20)
    wanted, labels = head(x, images, ids).loss, head.tokenizer(images, (3, 2))
    head.bfloat16()
    got = head(x.bfloat16(), images, ids).loss
    assert torch.equal(head.tokenizer(images, (3, 2)), labels) and got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0)


@pytest.fixture(scope="module")
def one_rank(folder):
    return losses(train(folder / "tokens.yaml", "data.source=images", "output=one", "train.max_steps=5"))


def test_an_objective_learns_the_tokens_of_a_dvae(one_rank):
    assert len(one_rank) == 5 and one_rank[-1] < one_rank[0]
    assert one_rank[0] < 2 * np.log(16)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_with_labels_of_their_own_give_the_losses_of_one(folder, one_rank, stage):
    arguments = [f"output=zero{stage}", "train.max_steps=5", f"deepspeed.zero_optimization.stage={stage}"]
    got = train(folder / "tokens.yaml", "data.source=images", *arguments, ranks=2)
    np.testing.assert_allclose(losses(got), one_rank, rtol=1e-4)


def test_what_does_not_fit_is_refused_at_the_start(folder, one_rank):
    with pytest.raises(ConfigError, match=r"dvae' reads images of 1 channels; expected data.channels=3"):
        head_of(config_of(folder, "data.channels=3"))
    with pytest.raises(CheckpointError, match=r"objective.name='mae'; expected 'dvae'"):
        load_tokenizer(str(folder / "one"))
    with pytest.raises(CheckpointError, match="images holds no whole checkpoint"):
        load_tokenizer(str(folder / "images"))
    done = launch(folder / "tokens.yaml", "data.source=images", "output=bad", "target.tokenizer=nowhere")
    told = [line for line in done.stdout.splitlines() if line.startswith("launch.py: ")]
    assert len(told) == 1 and "target.tokenizer='nowhere' does not exist; expected a run" in told[0]
    assert done.returncode == 2 and "Traceback" not in done.stdout


def test_a_run_goes_on_with_the_tokenizer_it_began_with_wherever_that_lies(folder, one_rank):
    train(folder / "dvae.yaml", "data.source=images", "output=dvae", "train.max_steps=5")
    arguments = ["data.source=images", "output=one", "train.max_steps=6"]
    done = launch(folder / "tokens.yaml", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "cannot continue one: target.tokenizer holds other weights (fingerprint " in done.stdout
    checkpoint = "target.tokenizer=dvae/checkpoints/step-000000004"
    assert losses(train(folder / "tokens.yaml", *arguments, checkpoint))[:5] == one_rank
