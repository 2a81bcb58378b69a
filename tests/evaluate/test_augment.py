"""The augmentation of fine-tuning: the same images by (seed, epoch, position), and timm's where it can be checked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastmim.config_data import DataConfig
from fastmim.evaluate.augment import Regularisation, draws, folded_positions
from fastmim.evaluate.config_finetune import FinetuneConfig
from fastmim.evaluate.rand_augment import RandAugment, _posterize
from fastmim.models.pixels import PixelScale

POLICY = "rand-m9-mstd0.5-inc1"
SCALE = PixelScale([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def pictures(count, channels=3):
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, 16, 24, channels), dtype=np.uint8))


def rand_augment(images, words, sizes, workers=0, channels=3):
    policy = RandAugment(POLICY, DataConfig(image_size=(16, 24), channels=channels), workers)
    try:
        return torch.cat(
            list(policy(iter(images.split(sizes)), iter(np.split(words, np.cumsum(sizes)[:-1]))))
        )
    finally:
        policy.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_a_function_of_the_draws(channels):
    images, words = pictures(60, channels), draws(3, 5, np.arange(60))
    told = rand_augment(images, words, [60], channels=channels)
    assert told.dtype == torch.uint8 and told.shape == images.shape
    changed = (told != images).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 1  # each of two operations is applied with probability one half
    assert torch.equal(rand_augment(images, words, [7, 50, 3], channels=channels), told)
    order = np.random.default_rng(0).permutation(60)
    assert torch.equal(rand_augment(images[order], words[order], [60], channels=channels), told[order])
    other = rand_augment(images, draws(3, 6, np.arange(60)), [60], channels=channels)
    assert (other != told).flatten(1).any(1).float().mean() > 0.5


def test_the_strongest_posterisation_leaves_black():

    picture = Image.fromarray(pictures(1)[0].numpy())
    assert not np.asarray(_posterize(picture, 0)).any()
    assert np.array_equal(np.asarray(_posterize(picture, 1)), np.asarray(picture) & 128)


def regularised(config, images, labels, words, step=0):
    return Regularisation(config, 3, SCALE)(images, labels, words, step)


def test_without_mixing_and_erasing_images_and_labels_stay():
    images, labels = pictures(4), torch.tensor([0, 1, 2, 0])
    config = FinetuneConfig(mixup=0, cutmix=0, erasing=0)
    x, targets = regularised(config, images, labels, draws(0, 0, np.arange(4)))
    assert x is images and targets is labels


def test_erasing_puts_noise_of_the_normalised_scale_into_a_rectangle():
    images, labels = torch.full((200, 16, 24, 3), 100, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64)
    config = FinetuneConfig(mixup=0, cutmix=0, erasing=0.25, seed=2)
    words = draws(2, 0, np.arange(200))
    x, _ = regularised(config, images, labels, words)
    erased = ((x - 100 / 255).abs() > 1e-4).all(-1)
    share = erased.flatten(1).any(1).float().mean().item()
    assert 0.15 < share < 0.35
    for picture in erased[erased.flatten(1).any(1)]:
        rows, columns = picture.any(1).nonzero(), picture.any(0).nonzero()
        inside = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert inside.float().mean() > 0.97
    noise = (x[erased] - SCALE.mean) / SCALE.std
    assert noise.mean(0).abs().max() < 0.15 and (noise.std(0) - 1).abs().max() < 0.1
    again, _ = regularised(config, images[50:60], labels[50:60], words[50:60], step=9)
    assert torch.equal(again, x[50:60])


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_pairs_mirrored_images_and_their_smoothed_labels(mixup, cutmix):
    images, labels = pictures(6), torch.tensor([0, 1, 2, 2, 1, 1])
    config = FinetuneConfig(mixup=mixup, cutmix=cutmix, erasing=0, smoothing=0.3)
    x, targets = regularised(config, images, labels, draws(0, 0, np.arange(6)), step=4)
    smooth = 0.7 * F.one_hot(labels, 3) + 0.1
    shares = [
        (t - b)[(a - b).abs() > 0] / (a - b)[(a - b).abs() > 0]
        for t, a, b in zip(targets, smooth, smooth.flip(0), strict=True)
    ]
    share = torch.cat(shares)[0].item()
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.flip(0), rtol=1e-5, atol=1e-6)
    whole = images / 255
    if mixup:
        torch.testing.assert_close(x, share * whole + (1 - share) * whole.flip(0), rtol=1e-4, atol=1e-5)
    else:
        kept = ((x - whole).abs() < 1e-4).all(-1)
        cut = ((x - whole.flip(0)).abs() < 1e-4).all(-1)
        assert (kept | cut).all() and kept[0].float().mean().item() == pytest.approx(share, abs=0.01)
    other, _ = regularised(config, images, labels, draws(0, 0, np.arange(6)), step=5)
    assert not torch.equal(other, x)


@pytest.mark.parametrize("size, parts", [(12, 1), (12, 2), (12, 3), (12, 6), (9, 3), (9, 1)])
def test_parts_of_a_step_hold_whole_pairs_in_mirrored_places(size, parts):
    positions = [folded_positions(2, size, parts, part) for part in range(parts)]
    for step in range(2):
        rows = [part[step] - step * size for part in positions]
        assert sorted(np.concatenate(rows)) == list(range(size))
        if size // parts % 2 == 0:
            assert all((row + row[::-1] == size - 1).all() for row in rows)
