"""Several classifiers side by side: held-out training images choose one, and the test images decide nothing."""

from typing import Any

import torch
from torch import Tensor

from fastmim.errors import ConfigError
from fastmim.evaluate.config import ViewsConfig
from fastmim.evaluate.labels import LabelledImages, hold_out
from fastmim.evaluate.scores import Outcome, best_classes


def with_chooser(train: LabelledImages, config: ViewsConfig) -> tuple[LabelledImages, LabelledImages | None]:
    """The images to train on, and those that choose where there is a choice."""
    if len(getattr(config, config.swept)) == 1:
        return train, None
    return hold_out(train, config.validation, config.seed, "validation")


def steps_in_epoch(train: LabelledImages, config: ViewsConfig, hint: str = "") -> int:
    """Whole batches of an epoch.

    Raises:
        ConfigError: there is none; `hint` says what else to do.
    """
    steps = len(train) // config.batch_size
    if not steps:
        raise ConfigError(
            f"batch_size={config.batch_size}; expected at most the {len(train)} training images{hint}"
        )
    return steps


def accuracy_of(logits: Tensor, images: LabelledImages) -> float:
    """Share of the images whose largest logit, of [n, C], is that of their class."""
    return (logits.argmax(1).cpu() == torch.from_numpy(images.labels)).double().mean().item()


def outcome_of_best(
    rows: list[dict[str, Any]], tried: list[float], logits: list[Tensor], test: LabelledImages
) -> Outcome:
    """The outcome of the candidate that is best on the images that choose, and what eval.json tells of each.

    Args:
        rows: what is told of each candidate; accuracies are added.
        tried: accuracy of each on the images that choose; empty where there is one candidate.
        logits: of each for the test images, [m, C].
        test: the test images.
    """
    chosen = max(range(len(rows)), key=lambda i: tried[i]) if tried else 0
    for i, row in enumerate(rows):
        row |= {"validation_top1": tried[i]} if tried else {}
        row |= {"test_top1": accuracy_of(logits[i], test), "chosen": i == chosen}
    return Outcome(best_classes(logits[chosen]), torch.from_numpy(test.labels), {"sweep": rows})
