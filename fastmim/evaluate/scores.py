"""How right a protocol was: accuracies, and the confusion matrix with its picture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

_RANKS = 5
_NAMED, _NUMBERED = 40, 12


@dataclass(frozen=True)
class Outcome:
    """What a protocol said of the test images.

    Attributes:
        best: int64 [m, min(5, C)], the likeliest classes, best first.
        labels: int64 [m], the right ones.
        details: what else the protocol tells, for eval.json.
    """

    best: Tensor
    labels: Tensor
    details: dict[str, Any] = field(default_factory=dict)


def best_classes(scores: Tensor) -> Tensor:
    """The likeliest classes of scores [m, C], int64 [m, min(5, C)] on the CPU; of equal ones the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :_RANKS].cpu()


def accuracy(outcome: Outcome) -> float:
    """Share of the test images whose likeliest class is right."""
    return (outcome.best[:, 0] == outcome.labels).double().mean().item()


def confusion(outcome: Outcome, classes: int) -> Tensor:
    """int64 [C, C], images by right class (row) and likeliest class (column)."""
    pairs = outcome.labels * classes + outcome.best[:, 0]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def summary(outcome: Outcome, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Shares of right answers: top1, top5 from five classes on, the mean over classes, and each class's."""
    matrix = confusion(outcome, len(class_names))
    counts = matrix.sum(1)
    each = (matrix.diagonal().double() / counts).tolist()
    told: dict[str, Any] = {"top1": accuracy(outcome)}
    if len(class_names) >= _RANKS:
        told["top5"] = (outcome.best == outcome.labels[:, None]).any(1).double().mean().item()
    told["mean_class_top1"] = sum(each) / len(each)
    told["per_class"] = {
        name: {"images": count, "top1": share}
        for name, count, share in zip(class_names, counts.tolist(), each, strict=True)
    }
    return told | outcome.details


def draw_confusion(path: Path, matrix: Tensor, class_names: tuple[str, ...], title: str) -> None:
    """Draw a confusion matrix, each row as shares of its class; names and numbers while they can be read."""
    shares = (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    n = len(class_names)
    side = 2.5 + min(0.32 * max(n, 4), 10)
    figure = Figure(figsize=(side + 1, side), layout="tight")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axis.set(xlabel="predicted", ylabel="right")
    axis.set_title(title, fontsize=8)
    if n <= _NAMED:
        names = [name.encode("utf-8", "replace").decode().replace("$", r"\$") for name in class_names]
        axis.set_xticks(range(n), names, rotation=90, fontsize=7)
        axis.set_yticks(range(n), names, fontsize=7)
    if n <= _NUMBERED:
        for row in range(n):
            for column in range(n):
                share = shares[row, column]
                colour = "white" if share < 0.6 else "black"
                axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, label="share of the class")
    figure.savefig(path, dpi=110)
