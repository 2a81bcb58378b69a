"""How right predicted masks are: intersection over union, and the picture of some."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from fastmim.evaluate.segment.masks import UNLABELLED

_MOST_NAMED = 20


@dataclass(frozen=True)
class Sample:
    """One test image as it is drawn.

    Attributes:
        image: uint8 [H, W, C].
        classes, predicted: int64 [H, W]; `UNLABELLED` where no class is told.
    """

    image: np.ndarray
    classes: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Segmentation:
    """What was predicted of the test images.

    Attributes:
        matrix: int64 [K, K], labelled pixels by right class (row) and predicted class (column).
        samples: some of the images.
        details: what else is told, for eval.json.
    """

    matrix: Tensor
    samples: list[Sample]
    details: dict[str, Any]


def count_pixels(classes: Tensor, predicted: Tensor, kinds: int) -> Tensor:
    """int64 [K, K], pixels by right and predicted class; int64 [H, W] each. Unlabelled ones do not count."""
    labelled = classes != UNLABELLED
    pairs = classes[labelled] * kinds + predicted[labelled]
    return torch.bincount(pairs, minlength=kinds**2).view(kinds, kinds)


def summary(outcome: Segmentation, class_names: tuple[str, ...]) -> dict[str, Any]:
    """miou, pixel_accuracy, mean_class_accuracy and each class's pixels, iou and accuracy.

    A class that is neither in the masks nor predicted has no IoU, one that is not in the masks no accuracy: null,
    and left out of the means.
    """
    matrix = outcome.matrix.double()
    right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = right / (labelled + predicted - right), right / labelled
    per_class = {
        name: {"pixels": int(pixels), "iou": _known(overlap), "accuracy": _known(share)}
        for name, pixels, overlap, share in zip(
            class_names, labelled.tolist(), iou.tolist(), accuracy.tolist(), strict=True
        )
    }
    return {
        "miou": iou.nanmean().item(),
        "pixel_accuracy": (right.sum() / labelled.sum()).item(),
        "mean_class_accuracy": accuracy.nanmean().item(),
        "per_class": per_class,
        **outcome.details,
    }


def draw_samples(path: Path, samples: list[Sample], class_names: tuple[str, ...], title: str) -> None:
    """Draw a row an image: itself, its mask, the prediction; black where no class is told."""
    kinds = len(class_names)
    colours = _colours(kinds)
    figure = Figure(figsize=(6.6, 2.1 * len(samples) + 0.9), layout="constrained")
    axes = figure.subplots(len(samples), 3, squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        image = sample.image[..., 0] if sample.image.shape[-1] != 3 else sample.image
        row[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        for axis, classes in zip(row[1:], (sample.classes, sample.predicted), strict=True):
            axis.imshow(colours[classes], interpolation="nearest")
        for axis in row:
            axis.set_axis_off()
    for axis, name in zip(axes[0], ("image", "mask", "predicted"), strict=True):
        axis.set_title(name, fontsize=9)
    present = {
        int(kind)
        for sample in samples
        for each in (sample.classes, sample.predicted)
        for kind in np.unique(each)
    }
    shown = sorted(present - {UNLABELLED})[:_MOST_NAMED]
    names = [class_names[kind].encode("utf-8", "replace").decode().replace("$", r"\$") for kind in shown]
    patches = [Patch(color=colours[kind], label=name) for kind, name in zip(shown, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(5, len(patches)), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _colours(kinds: int) -> np.ndarray:
    """A colour a class, the first grey as backgrounds are; and, for `UNLABELLED`, black; float64 [K + 1, 3]."""
    if kinds <= 10:
        found = matplotlib.colormaps["tab10"](np.arange(10))[:, :3]
        found[0] = 0.8
        found = found[:kinds]
    else:
        found = matplotlib.colormaps["nipy_spectral"](np.linspace(0.05, 0.95, kinds))[:, :3]
    return np.concatenate([found, np.zeros((1, 3))])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
