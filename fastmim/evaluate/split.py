"""Images to test on: told by a person, or held out where classes do not have to keep their shares."""

from typing import Any

import numpy as np

from fastmim.data.schedule import permute
from fastmim.errors import ConfigError, DataError


def check_test_told(test: str | None, key: str, config: Any) -> None:
    """Refuse half of what there is to tell of test images.

    Args:
        test: of `--test`; None where it was not given.
        key: of the configuration, what else belongs to `--test`.
        config: with `test_share`, of the images that are held out without `--test`.

    Raises:
        ConfigError: one of `--test` and `key` alone, or `test_share` beside them.
    """
    given = getattr(config, key)
    if (test is None) != (given is None):
        without = f"--test {test} without {key}" if test else f"{key}={given!r} without --test"
        raise ConfigError(f"{without}; expected both or neither")
    if test is not None and "test_share" in config.model_fields_set:
        raise ConfigError(f"test_share={config.test_share:g} with --test {test}; expected one of them")


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
