"""SimMIM and BEiT against their formulas: absolute errors of pixels, cross-entropy of tokens."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.objectives import build_objective
from fastmim.targets import tokens as tokens_module
from tests.objectives.naive_mae import NaiveMAE, StubTokenizer, ids_of, images_of
from tests.objectives.naive_vit import assert_gradients, randomise


def build(config):
    torch.manual_seed(0)
    objective = build_objective(config)
    randomise(objective)
    images = images_of(config)
    return objective, images, objective.sample_mask(torch.zeros(3, dtype=torch.int64), torch.arange(3))


def assert_is_the_formula(objective, images, mask, error_of):
    """`error_of(naive, features, sample, removed)` gives the errors of a sample, which are averaged."""
    naive, errors = NaiveMAE(objective), []
    for sample, image in enumerate(images):
        kept, removed = ids_of(mask, sample)
        latent = naive.encode_with_mask_tokens(image, kept)
        assert latent.shape == (1 + len(kept) + len(removed), objective.config.model.width)
        errors += [error_of(naive, latent[1:][removed], sample, removed)]
    want = torch.stack(errors).mean()
    loss, per_patch = objective.loss(images, mask)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(per_patch.mean(), loss, rtol=1e-5, atol=0)
    loss.backward()
    want.backward()
    assert_gradients(objective, naive)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_simmim_compares_pixels_by_their_absolute_error(tiny_config, norm_pix):
    options = ["mask.unit=2", "mask.ratio=0.6", f"objective.norm_pix_loss={norm_pix}"]
    objective, images, mask = build(tiny_config("objective.name=simmim", "data.image_size=[32,48]", *options))
    # Units of 2 x 2 patches go as a whole: int(6 * 0.4) of 6 stay.
    squares = mask.mask.view(3, 2, 2, 3, 2).transpose(2, 3).flatten(3)
    assert torch.equal(squares.all(-1), squares.any(-1)) and mask.ids_keep.shape == (3, 8)

    def error_of(naive, features, sample, removed):
        target = naive.target(images[sample], removed, norm_pix)
        return (naive.linear(features, "head.linear") - target).abs()

    assert_is_the_formula(objective, images, mask, error_of)


def test_beit_classifies_the_tokens_of_removed_patches(tiny_config, monkeypatch):
    monkeypatch.setattr(tokens_module, "load_tokenizer", lambda source: StubTokenizer())
    options = ["target.tokenizer=stub", "mask.strategy=block", "mask.min_block=4", "mask.ratio=0.4"]
    objective, images, mask = build(tiny_config("objective.name=beit", *options))

    def error_of(naive, features, sample, removed):
        logits = features @ naive.weights["head.weight"].T + naive.weights["head.bias"]
        labels = [int(images[sample, 8 * (patch // 4), 8 * (patch % 4), 0]) % 16 for patch in removed]
        return F.cross_entropy(logits, torch.tensor(labels), reduction="none")

    assert_is_the_formula(objective, images, mask, error_of)
    assert not objective.config.draws_pictures


def test_simmim_draws_what_it_predicts(tiny_config):
    objective, images, mask = build(tiny_config("objective.name=simmim"))
    rebuilt = objective.reconstruct(images, mask)
    pred = objective.predict(images, mask).detach()
    mean, std = (torch.tensor(values) for values in (objective.config.data.mean, objective.config.data.std))
    for sample in range(3):
        for patch in range(16):
            row, column = 8 * (patch // 4), 8 * (patch % 4)
            window = (sample, slice(row, row + 8), slice(column, column + 8))
            want = images[window]
            if patch in (removed := ids_of(mask, sample)[1]):
                values = pred[sample, removed.index(patch)].view(8, 8, 3) * std + mean
                want = (values * 255).round().clamp(0, 255).to(torch.uint8)
            assert torch.equal(rebuilt[window], want)
    assert objective.note_on_pictures() == ""


def test_nothing_of_a_removed_patch_enters_the_encoder(tiny_config):
    objective, images, mask = build(tiny_config("objective.name=simmim"))
    painted = images.clone()
    painted.view(3, 4, 8, 4, 8, 3).transpose(2, 3)[mask.mask.view(3, 4, 4)] = 0
    assert not torch.equal(painted, images)
    assert torch.equal(objective.encoder(painted, mask), objective.encoder(images, mask))
