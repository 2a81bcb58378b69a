"""The average against its recurrence, and steps that were skipped."""

import pytest
import torch

from fastmim.ema import EMA


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_average_follows_the_recurrence_and_ignores_skipped_steps(kind):
    torch.manual_seed(0)
    masters = [torch.randn(3, 4), torch.randn(5)]
    ema = EMA(masters, decay=0.9)
    expected = [master.double() for master in masters]
    for skipped in (0.0, 1.0, 0.0, 1.0):
        for master in masters:
            master.add_(torch.randn_like(master))
        ema.update(kind(skipped))
        if not skipped:
            expected = [0.9 * a + 0.1 * m.double() for a, m in zip(expected, masters, strict=True)]
    for average, wanted in zip(ema.averages, expected, strict=True):
        torch.testing.assert_close(average.double(), wanted, rtol=1e-6, atol=1e-6)


def test_swapping_shows_the_averages_and_puts_the_masters_back():
    masters = [torch.ones(2)]
    ema = EMA(masters, decay=0.5)
    masters[0].fill_(3.0)
    ema.update(0.0)
    with ema.swapped():
        assert masters[0].tolist() == [2.0, 2.0]
    assert masters[0].tolist() == [3.0, 3.0] and ema.averages[0].tolist() == [2.0, 2.0]
