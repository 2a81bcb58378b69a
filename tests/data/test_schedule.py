import math

import numpy as np
import pytest
import torch
from fastmim.kernels.philox import STREAM_CROP, philox_4x32
from torchvision.transforms import RandomResizedCrop

from fastmim.data.schedule import Schedule, center_window, permute


def order(n, seed=0, epoch=0, passes=0):
    place = np.arange(n)
    return permute(place, n, seed, np.full(n, epoch), np.full(n, passes))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 1000, 4097, 70_001])
def test_order_is_a_permutation(n):
    for seed, epoch in ((0, 0), (2**63 - 1, 5)):
        np.testing.assert_array_equal(np.sort(order(n, seed, epoch)), np.arange(n))


def test_order_changes_with_seed_epoch_and_pass():
    base = order(1000)
    for other in (order(1000, seed=1), order(1000, epoch=1), order(1000, passes=1)):
        assert (base == other).mean() < 0.02


@pytest.mark.parametrize("n", [3, 5, 10])
def test_every_image_is_as_likely_at_every_place(n):
    """Chi-square of (place, image) counts over many epochs; (n - 1)^2 degrees of freedom."""
    epochs = 4000
    place, epoch = np.tile(np.arange(n), epochs), np.repeat(np.arange(epochs), n)
    image = permute(place, n, 7, epoch, np.zeros_like(epoch))
    counts = np.bincount(place * n + image, minlength=n * n)
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_every_order_of_three_is_as_likely():
    epochs = 6000
    place, epoch = np.tile(np.arange(3), epochs), np.repeat(np.arange(epochs), 3)
    orders = permute(place, 3, 1, epoch, np.zeros_like(epoch)).reshape(-1, 3) @ [9, 3, 1]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25  # 5 degrees of freedom, p about 1e-4


def test_neighbours_in_the_order_are_not_neighbours_in_the_set():
    n = 10_000
    images = order(n)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05


def test_a_longer_epoch_wraps_with_another_permutation(configure):
    schedule = Schedule(np.full(10, 50), np.full(10, 50), 0, configure(samples_per_epoch=25))
    plan = schedule.plan(np.arange(50))
    np.testing.assert_array_equal(plan.epoch, np.repeat([0, 1], 25))
    np.testing.assert_array_equal(plan.position, np.tile(np.arange(25), 2))
    first, second = plan.sample[:10], plan.sample[10:20]
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert not np.array_equal(first, second)
    assert len(set(plan.sample[20:25])) == 5


def test_a_plan_is_the_same_in_one_piece_and_in_many(configure):
    rng = np.random.default_rng(0)
    config = configure(color_jitter={"hue": 0.1})
    schedule = Schedule(rng.integers(20, 90, 300), rng.integers(20, 90, 300), 3, config)
    start = 2**33 * 300  # an epoch beyond 32 bits
    whole = schedule.plan(start + np.arange(128))
    for name, value in vars(whole).items():
        parts = [getattr(schedule.plan(np.array([start + i])), name) for i in range(128)]
        np.testing.assert_array_equal(np.concatenate(parts), value)


def torchvision_window(seed, position, epoch, height, width, scale, ratio):
    """RandomResizedCrop.get_params as torchvision writes it, one sample, from the documented counters."""

    def uniform(word, low, high):
        return low + (high - low) * (word + 0.5) / 2**32

    for attempt in range(10):
        counter = (attempt, position & 0xFFFFFFFF, epoch, STREAM_CROP | (position >> 32) << 8)
        words = [int(w[0]) for w in philox_4x32(seed, *(np.array([c]) for c in counter))]
        target_area = height * width * uniform(words[0], *scale)
        aspect_ratio = math.exp(uniform(words[1], math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return words[2] * (height - h + 1) >> 32, words[3] * (width - w + 1) >> 32, h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_crops_are_torchvisions(scale, configure):
    sizes = [(50, 60), (400, 30), (20, 500), (7, 7), (300, 300), (1, 40), (33, 44)]
    heights, widths = np.array(sizes * 40).T
    schedule = Schedule(heights, widths, 11, configure(scale=scale))
    plan = schedule.plan(np.arange(2 * len(heights)))
    for i in range(len(plan)):
        height, width = heights[plan.sample[i]], widths[plan.sample[i]]
        expected = torchvision_window(
            11, int(plan.position[i]), int(plan.epoch[i]), int(height), int(width), scale, (3 / 4, 4 / 3)
        )
        assert (plan.top[i], plan.left[i], plan.height[i], plan.width[i]) == expected


def test_high_positions_use_the_high_counter_word(configure):
    heights = np.full(3, 64)
    schedule = Schedule(heights, heights, 5, configure(samples_per_epoch=2**40))
    position = 2**35 + 12345
    plan = schedule.plan(np.array([position]))
    expected = torchvision_window(5, position, 0, 64, 64, (0.2, 1.0), (3 / 4, 4 / 3))
    assert (plan.top[0], plan.left[0], plan.height[0], plan.width[0]) == expected


def test_crops_are_distributed_as_torchvisions(configure):
    n, height, width = 4000, 90, 160
    plan = Schedule(np.full(n, height), np.full(n, width), 2, configure()).plan(np.arange(n))
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = np.stack([plan.top, plan.left, plan.height, plan.width], axis=1)
    for values in (
        lambda w: w[:, 2] * w[:, 3] / (height * width),
        lambda w: np.log(w[:, 3] / w[:, 2]),
        lambda w: w[:, 0] / (height - w[:, 2] + 1),
        lambda w: w[:, 1] / (width - w[:, 3] + 1),
    ):
        a, b = np.sort(values(ours)), np.sort(values(theirs))
        grid = np.linspace(min(a[0], b[0]), max(a[-1], b[-1]), 200)
        distance = np.abs(np.searchsorted(a, grid) - np.searchsorted(b, grid)).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, p about 1e-3


def test_windows_lie_inside_every_image(configure):
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 12, (2, 500))
    for crop in ("random_resized_crop", "center_crop"):
        config = configure(crop=crop, scale=(0.01, 1.0), aspect=(0.1, 10))
        plan = Schedule(heights, widths, 0, config).plan(np.arange(2000))
        assert (plan.height >= 1).all() and (plan.width >= 1).all()
        assert (plan.top >= 0).all() and (plan.top + plan.height <= heights[plan.sample]).all()
        assert (plan.left >= 0).all() and (plan.left + plan.width <= widths[plan.sample]).all()


@pytest.mark.parametrize(
    "size, target, expected",
    [
        ((100, 200), (32, 32), (0, 50, 100, 100)),
        ((200, 100), (32, 32), (50, 0, 100, 100)),
        ((100, 200), (32, 64), (0, 0, 100, 200)),
        ((90, 90), (16, 48), (30, 0, 30, 90)),
        ((1, 9), (64, 16), (0, 4, 1, 1)),
    ],
)
def test_center_window(size, target, expected):
    window = center_window(*(np.array([side]) for side in size), target)
    assert tuple(int(part[0]) for part in window) == expected


def test_flip_and_color_ranges(configure):
    n = 4000
    config = configure(
        flip=0.25, color_jitter={"brightness": 0.4, "contrast": 2.0, "hue": 0.1, "saturation": 0}
    )
    plan = Schedule(np.full(n, 9), np.full(n, 9), 0, config).plan(np.arange(n))
    assert abs(plan.flip.mean() - 0.25) < 0.03
    low, high = plan.color.min(0), plan.color.max(0)
    np.testing.assert_allclose(low, [0.6, 0.0, 1.0, -0.1], atol=0.01)
    np.testing.assert_allclose(high, [1.4, 3.0, 1.0, 0.1], atol=0.01)
    for flip in (0.0, 1.0):
        plan = Schedule(np.full(n, 9), np.full(n, 9), 0, configure(flip=flip)).plan(np.arange(n))
        assert (plan.flip == bool(flip)).all() and plan.color is None


def test_substitutes_are_spread_and_differ_by_attempt(configure):
    schedule = Schedule(np.full(50, 9), np.full(50, 9), 0, configure())
    epoch, position = np.zeros(2000, np.int64), np.arange(2000)
    first, second = (schedule.substitute(epoch, position, attempt) for attempt in (0, 1))
    assert np.bincount(first, minlength=50).min() > 10 and first.max() < 50
    assert (first == second).mean() < 0.05
