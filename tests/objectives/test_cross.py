"""CrossMAE against its formula: the mix of layers, the part that is predicted, what is recomputed and compiled."""

import functools
from types import SimpleNamespace

import pytest
import torch

from benchmarks.memory import kept_by
from fastmim.objectives import build_objective
from tests.objectives.naive_mae import NaiveMAE, ids_of, images_of
from tests.objectives.naive_vit import assert_gradients, randomise

CROSS = ["objective.decoder=cross", "objective.decoder_depth=3"]


def cross_objective(tiny_config, *overrides):
    torch.manual_seed(0)
    objective = build_objective(tiny_config(*CROSS, *overrides))
    randomise(objective)
    return objective


def batch_of(images, positions=None, epoch=0):
    places = torch.arange(len(images)) if positions is None else positions
    return SimpleNamespace(images=images, epochs=torch.full_like(places, epoch), positions=places)


def loss_of(objective, batch):
    return objective(batch)["loss"]


@pytest.fixture
def asked(monkeypatch):
    """Records which patches every head is asked for."""
    ids = []

    def watch(objective):
        objective.head.register_forward_pre_hook(lambda _, args: ids.append(args[2]))
        return objective

    watch.ids = ids
    return watch


@pytest.mark.parametrize("share", ["null", "0.25"])
def test_loss_and_gradients_are_those_of_the_formula(tiny_config, asked, share):
    objective = asked(
        cross_objective(tiny_config, "data.image_size=[32,24]", f"objective.kept_mask_ratio={share}")
    )
    images = images_of(objective.config)
    batch = batch_of(images)
    got = objective(batch)["loss"]
    mask, (asked_for,) = objective.sample_mask(batch.epochs, batch.positions), asked.ids
    naive, errors = NaiveMAE(objective), []
    for sample, image in enumerate(images):
        kept, removed = ids_of(mask, sample)
        wanted = asked_for[sample].tolist()
        assert wanted == removed if share == "null" else len(wanted) == 3 and set(wanted) < set(removed)
        features = naive.decode_cross(naive.encoder_layers(image, kept), wanted)
        errors += [naive.linear(features, "head.linear") - naive.target(image, wanted, norm_pix=True)]
    want = torch.stack(errors).square().mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    got.backward()
    want.backward()
    # The decoder reads the layers themselves: the encoder's last norm stays as it began.
    for part in ("weight", "bias"):
        parameter = getattr(objective.encoder.norm, part)
        assert parameter.grad is None
        parameter.grad = torch.zeros_like(parameter)
        naive.weights[f"encoder.norm.{part}"].grad = torch.zeros_like(parameter).double()
    assert_gradients(objective, naive)


@pytest.mark.parametrize(
    ("ratio", "share", "size", "predicted"),
    [(0.75, 0.25, 32, 4), (0.75, 0.75, 32, 12), (0.5, 0.01, 32, 1), (0.6, 0.3, 40, 8)],
)
def test_as_many_patches_are_predicted_as_the_authors_do(tiny_config, ratio, share, size, predicted):
    objective = cross_objective(
        tiny_config, f"mask.ratio={ratio}", f"objective.kept_mask_ratio={share}", f"data.image_size={size}"
    )
    assert objective.predicted == predicted


def test_the_predicted_part_is_a_function_of_seed_epoch_and_position(tiny_config, asked):
    def parts(positions, epoch=0, seed=0):
        objective = cross_objective(tiny_config, "objective.kept_mask_ratio=0.25", f"train.seed={seed}")
        asked(objective)
        positions = torch.tensor(positions)
        images = images_of(objective.config, len(positions))
        objective(batch_of(images, positions, epoch))
        removed = objective.sample_mask(torch.full_like(positions, epoch), positions).ids_mask
        # Ranks among the removed patches: what is left when the masks themselves differ.
        return (removed[:, :, None] == asked.ids.pop()[:, None]).nonzero()[:, 1].view(len(positions), -1)

    whole = parts(range(64))
    assert torch.equal(whole[[40, 7]], parts([40, 7]))
    for other in (parts(range(64), epoch=1), parts(range(64), seed=1)):
        assert (other != whole).any(1).float().mean() > 0.9
    # Each of the 12 removed patches is predicted about as often: 64 * 4 / 12 = 21 times.
    often = whole.flatten().bincount(minlength=12)
    assert often.min() >= 8 and often.max() <= 40


def test_pictures_hold_predictions_of_all_removed_patches(tiny_config):
    objective = cross_objective(tiny_config, "objective.kept_mask_ratio=0.25")
    images = images_of(objective.config)
    mask = objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert objective.predict(images, mask).shape == (3, 12, 192)
    changed = (objective.reconstruct(images, mask) != images).view(3, 4, 8, 4, 8, 3).any(-1).any(4).any(2)
    assert torch.equal(changed.view(3, 16), mask.mask)


def test_recomputed_layers_give_the_same_gradients(tiny_config):
    gradients, stored = [], []
    for recompute in (False, True):
        objective = cross_objective(tiny_config, f"train.activation_checkpointing={recompute}")
        torch.manual_seed(1)
        images = images_of(objective.config)
        kept, loss = kept_by(functools.partial(loss_of, objective, batch_of(images)), torch.device("cpu"))
        loss.backward()
        stored.append(kept)
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    # Of all bytes: the mix of layers keeps what every layer made in any case.
    assert stored[1] < 0.6 * stored[0]


def test_every_block_is_compiled(tiny_config, monkeypatch):
    objective = cross_objective(tiny_config)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    objective.compile_blocks()
    assert compiled == [*objective.encoder.blocks.layers, *objective.decoder.layers]
