"""Test images with the boxes that are there, and those that were found."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

SHOWN_SCORE = 0.5
_MOST_NAMED = 20
_WIDTH, _LINE = 2.8, 80


@dataclass(frozen=True, eq=False)
class Sample:
    """One test image as it is drawn.

    Attributes:
        image: uint8 [H, W, C].
        boxes, found: float64 [n, 4] x0, y0, x1, y1, as the annotations have them and as predicted, of any score.
        categories, found_categories: int64 [n], identifiers.
        scores: float64 [n], of what was found.
    """

    image: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    found: np.ndarray
    found_categories: np.ndarray
    scores: np.ndarray


def draw_samples(path: Path, samples: list[Sample], categories: dict[int, str], title: str) -> None:
    """Draw a row an image: its annotated boxes, and the predicted ones from a score of one half on."""
    heights = [_WIDTH * each.image.shape[0] / each.image.shape[1] for each in samples]
    figure = Figure(figsize=(2 * _WIDTH, sum(heights) + 1.0), layout="constrained")
    axes = figure.subplots(len(samples), 2, squeeze=False, height_ratios=heights)
    colour = _colours(categories)
    for row, each in zip(axes, samples, strict=True):
        image = each.image[..., 0] if each.image.shape[-1] != 3 else each.image
        for axis in row:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
        _draw_boxes(row[0], each.boxes, [colour[kind] for kind in each.categories.tolist()])
        sure = each.scores >= SHOWN_SCORE
        colours = [colour[kind] for kind in each.found_categories[sure].tolist()]
        _draw_boxes(row[1], each.found[sure], colours, each.scores[sure])
    axes[0, 0].set_title("annotated", fontsize=9)
    axes[0, 1].set_title(f"predicted, scores from {SHOWN_SCORE:g}", fontsize=9)
    named = list(categories.items())[:_MOST_NAMED]
    patches = [Patch(color=colour[kind], label=_plain(name)) for kind, name in named]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(5, len(patches)), fontsize=8)
    figure.suptitle(_plain(textwrap.fill(title, _LINE)), fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_boxes(axis: Axes, boxes: np.ndarray, colours: list, scores: np.ndarray | None = None) -> None:
    for place, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        # A pixel's centre is at its number: the box of pixel 0 is from -0.5 to 0.5.
        corner, colour = (x0 - 0.5, y0 - 0.5), colours[place]
        axis.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.5))
        if scores is not None:
            shown = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axis.text(*corner, f"{scores[place]:.2f}", fontsize=6, color="white", va="bottom", bbox=shown)


def _colours(categories: dict[int, str]) -> dict[int, tuple]:
    count, maps = len(categories), matplotlib.colormaps
    found = maps["tab10"](range(10)) if count <= 10 else maps["hsv"](np.linspace(0, 0.95, count))
    return dict(zip(categories, map(tuple, found), strict=False))


def _plain(text: str) -> str:
    """Text as it is: `$` begins no formula."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")
