"""CAE against its formula, and what its branches can see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim import recipes
from fastmim.objectives import build_objective
from fastmim.targets.tokenizer import load_tokenizer
from tests.launching import TINY_YAML, losses, train, write_images
from tests.objectives.naive_vit import NaiveViT, assert_gradients, randomise

TINY = [
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=8",
    "data.image_size=[32,24]",
    "mask.ratio=0.5",
    "objective.name=cae",
    "objective.regressor_depth=2",
    "objective.decoder_depth=1",
]
PIXELS = "target.kind=pixels"


def build(*overrides):
    torch.manual_seed(0)
    objective = build_objective(recipes.override([*TINY, *overrides]))
    height, width = objective.config.data.image_size
    images = torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8)
    return objective, images, objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))


def write_tokenizer(path, hidden=8, tokens=16):
    """A random encoder in the layout of DALL-E's release, of one block a group."""
    shapes = {"input": (hidden, 3, 7), "output.conv": (tokens, 8 * hidden, 1)}
    inputs = hidden
    for group in range(4):
        outputs, name = hidden * 2**group, f"group_{group + 1}.block_1"
        middle = outputs // 4
        if inputs != outputs:
            shapes[f"{name}.id_path"] = (outputs, inputs, 1)
        sizes = [(middle, inputs, 3), (middle, middle, 3), (middle, middle, 3), (outputs, middle, 1)]
        shapes |= {f"{name}.res_path.conv_{i}": size for i, size in enumerate(sizes, 1)}
        inputs = outputs
    state = {}
    for name, (rows, columns, kernel) in shapes.items():
        state[f"blocks.{name}.w"] = torch.randn(rows, columns, kernel, kernel) / (columns * kernel**2) ** 0.5
        state[f"blocks.{name}.b"] = torch.randn(rows)
    save_file(state, path)
    return str(path)


def naive_losses(naive, images, mask, align_weight, errors_of):
    """(predict, align) summed over samples by the formula; `errors_of(features, image, removed)` is the target's."""
    errors, distances = [], []
    for sample, image in enumerate(images):
        kept, removed = mask.ids_keep[sample].tolist(), mask.ids_mask[sample].tolist()
        regressed = naive.regress(naive.encode(image, kept), kept, removed)
        errors += [errors_of(naive.decode(regressed, removed), sample, removed)]
        target = naive.encode(image, removed)[1:].detach()
        distances += [(regressed - target).square().mean()]
    predict, align = torch.stack(errors).mean(), torch.stack(distances).mean()
    return predict + align_weight * align, predict, align


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_losses_and_gradients_are_those_of_the_formula(tmp_path, kind):
    options = [f"target.kind={kind}", "objective.align_weight=1.5"]
    if kind == "tokens":
        options.append(f"target.tokenizer={write_tokenizer(tmp_path / 'encoder.safetensors')}")
    objective, images, mask = build(*options)
    randomise(objective)
    naive = NaiveViT(objective)

    def pixel_error(features, sample, removed):
        target = naive.patches(images[sample])[removed]
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (naive.linear(features, "head.linear") - target).square().mean()

    def token_error(features, sample, removed):
        tokens = load_tokenizer(objective.config.target.tokenizer)(images, objective.config.grid)
        logits = features @ naive.weights["head.weight"].T + naive.weights["head.bias"]
        return F.cross_entropy(logits, tokens[sample, removed])

    got = objective.losses(images, mask)
    errors_of = pixel_error if kind == "pixels" else token_error
    want, predict, align = naive_losses(naive, images, mask, 1.5, errors_of)
    assert list(got) == ["loss", "predict", "align"]
    for name, value in (("loss", want), ("predict", predict), ("align", align)):
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=0, msg=name)
    got["loss"].backward()
    want.backward()
    assert_gradients(objective, naive)


def test_the_decoder_sees_nothing_of_visible_patches():
    objective, images, mask = build(PIXELS)
    fixed = torch.randn(3, 6, 32, requires_grad=True)
    rows, outputs = [], []
    objective.regressor.register_forward_hook(lambda *_: fixed)
    objective.decoder.blocks.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    objective.decoder.register_forward_hook(lambda _, args, out: outputs.append(out))
    other = torch.randint_like(images, 256)
    predict = objective.losses(images, mask)["predict"]
    objective.losses(other, mask)
    # With Z_m held, other images change no feature, and no gradient of the prediction reaches the encoder.
    assert rows == [6, 6]
    assert torch.equal(*outputs)
    predict.backward()
    learned = {name.split(".")[0] for name, p in objective.named_parameters() if p.grad is not None}
    assert learned == {"decoder", "head"} and fixed.grad.any()


def test_the_target_is_the_encoder_on_removed_patches_alone():
    objective, images, mask = build(PIXELS, "model.drop_path=0.5")
    objective.train()
    target = objective.align_target(images, mask)
    assert target.shape == (3, 6, 32) and not target.requires_grad
    assert objective.encoder.training and objective.encoder.blocks.layers[1].drop_path1.training
    painted = images.clone()
    painted.view(3, 4, 8, 3, 8, 3).transpose(2, 3)[~mask.mask.view(3, 4, 3)] = 7
    assert not torch.equal(painted, images)
    # Equal although the encoder is in training: a second draw of stochastic depth would differ.
    assert torch.equal(objective.align_target(painted, mask), target)
    assert not torch.equal(objective.encoder(images, mask), objective.encoder(images, mask))
    objective.eval()
    assert torch.equal(objective.encoder(images, mask.swapped())[:, 1:], target)
    assert not objective.encoder.training


def test_without_alignment_the_encoder_runs_once():
    objective, images, mask = build(PIXELS, "objective.align_weight=0")
    calls = []
    objective.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert list(objective.losses(images, mask)) == ["loss"]
    assert len(calls) == 1


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_fills_removed_patches_and_does_not_read_them(norm_pix):
    objective, images, mask = build(PIXELS, f"objective.norm_pix_loss={norm_pix}")
    rebuilt = objective.reconstruct(images, mask)
    changed = (rebuilt != images).view(3, 4, 8, 3, 8, 3).transpose(2, 3).flatten(3).any(-1)
    assert torch.equal(changed, mask.mask.view(3, 4, 3))
    painted = images.clone()
    painted.view(3, 4, 8, 3, 8, 3).transpose(2, 3)[mask.mask.view(3, 4, 3)] = 0
    assert torch.equal(objective.reconstruct(painted, mask), rebuilt)
    assert bool(objective.note_on_pictures()) == norm_pix


@pytest.mark.parametrize("align_weight", [2, 0])
def test_analytic_flops_are_the_counted_ones(align_weight):
    objective, images, mask = build(PIXELS, f"objective.align_weight={align_weight}", "mask.ratio=0.7")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = objective.losses(images, mask)["loss"]
    assert objective.forward_flops() * 3 == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = counter.get_total_flops() + backward.get_total_flops()
    assert objective.step_flops() * 3 == pytest.approx(counted, rel=0.01)


def test_two_sharded_ranks_train_as_one_whole(tmp_path):
    write_images(tmp_path / "images", 16)
    text = TINY_YAML.splitlines()
    text[2] = "objective: {name: cae, regressor_depth: 2, decoder_depth: 1, norm_pix_loss: false}"
    (tmp_path / "tiny.yaml").write_text("\n".join([*text, "target: {kind: pixels}", "mask: {ratio: 0.5}"]))
    arguments = ["data.source=images", "train.max_steps=4", "log.reconstruct_every_steps=2"]
    whole = train(tmp_path / "tiny.yaml", *arguments, "output=whole")
    # The default threshold would keep every parameter of this size on all ranks.
    sharded = "deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"
    shared = train(tmp_path / "tiny.yaml", *arguments, "output=shared", sharded, ranks=2)
    np.testing.assert_allclose(losses(shared), losses(whole), rtol=1e-4)
    for name in ("loss_predict", "loss_align"):
        np.testing.assert_allclose(*([record[name] for record in run] for run in (shared, whole)), rtol=1e-4)
    assert whole[-1]["loss"] == pytest.approx(
        whole[-1]["loss_predict"] + 2 * whole[-1]["loss_align"], rel=1e-6
    )
