"""Images that are held out to test on, where classes do not have to keep their shares."""

import numpy as np

from fastmim.data.schedule import permute
from fastmim.errors import DataError


def split_places(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of n images that stay, and of a random share that is held out, rounded, at least one; ascending, int64.

    Raises:
        DataError: none would stay.
    """
    held = max(1, round(share * n))
    if held >= n:
        raise DataError(f"test_share={share:g} leaves none of the {n} images of --data to train on")
    zeros = np.zeros(n, np.int64)
    order = permute(np.arange(n), n, seed, zeros, zeros)
    return np.sort(order[held:]), np.sort(order[:held])
