"""Linear CKA between layers: of one encoder under masks, and of two encoders.

A score of 1 means that two layers hold the same features of images up to rotation and scale. Features of an image are
the means over its tokens; images are read and compared in batches, so memory does not grow with their number.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastmim.data.index import build_index
from fastmim.errors import ConfigError
from fastmim.evaluate.batches import centre_plan, decode
from fastmim.evaluate.encoder import load_encoder
from fastmim.masking import Mask, mask_from_order, sample_random_mask

MIN_BATCH = 4  # the unbiased estimate divides by n - 3


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the dependence of two sets of features of the same n images, by linear kernels.

    Args:
        x: float64 [n, D].
        y: float64 [n, E].

    Returns:
        float64 scalar.

    Source: Song et al., JMLR 2012, equation 4.
    """
    n = len(x)
    a, b = ((z @ z.T).fill_diagonal_(0) for z in (x, y))
    total = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
    return total / (n * (n - 3))


class MinibatchCKA:
    """Linear CKA of every layer of one side with every layer of another, over batches of images.

    Args:
        rows, columns: layers of the two sides.

    Source: Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, equation 3; linear CKA is
        that of Kornblith et al., ICML 2019.
    """

    def __init__(self, rows: int, columns: int):
        self._cross = torch.zeros(rows, columns, dtype=torch.float64)
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def add(self, left: list[Tensor], right: list[Tensor]) -> None:
        """Count a batch: features of the same images by each layer of both sides, [n, width] each; n at least 4."""
        left, right = ([layer.double() for layer in side] for side in (left, right))
        for i, x in enumerate(left):
            self._rows[i] += hsic(x, x)
            for j, y in enumerate(right):
                self._cross[i, j] += hsic(x, y)
        for j, y in enumerate(right):
            self._columns[j] += hsic(y, y)

    def scores(self) -> Tensor:
        """CKA, float64 [rows, columns]; about 0 for unrelated features, 1 for the same."""
        return self._cross / (self._rows[:, None] * self._columns[None, :]).sqrt()


def compare(
    run: str, other: str | None, images: str, out: str, ratios: list[float], count: int = 512, batch: int = 64
) -> str:
    """Compare layers, and write `out`/cka.csv and `out`/cka.png.

    Args:
        run: a run or checkpoint directory.
        other: another one, whose layers are compared with those of `run` on whole images; None compares each
            layer's features of masked images with those of whole ones.
        images: a source, like `data.source`; each run reads it by its own image size and channels.
        out: folder to write to.
        ratios: of the masks, without `other`.
        count: images.
        batch: images that are compared with each other, at least 4.

    Returns:
        What was found, for a person.

    Raises:
        FastmimError: a run or source that cannot be used, or numbers that make no comparison.
    """
    if batch < MIN_BATCH:
        raise ConfigError(f"--batch {batch}: expected at least {MIN_BATCH}")
    sides = [_Side(path, images, count) for path in (run, other) if path is not None]
    found = sides[0].count
    if found < MIN_BATCH:
        raise ConfigError(f"{found} images of {images} to compare; expected at least {MIN_BATCH}")
    if len({side.index.fingerprint for side in sides}) > 1:
        raise ConfigError(
            f"{images} holds {len(sides[0].index)} images for {run} and {len(sides[1].index)} for {other}; expected "
            "the same ones: their data.channels or limits differ"
        )
    for ratio in ratios if other is None else ():
        sides[0].keep(ratio)
    if other is not None:
        scores = _between_runs(*sides, batch)
        columns = [f"layer {layer + 1}" for layer in range(scores.shape[1])]
    else:
        scores = _under_masks(sides[0], ratios, batch)
        columns = [f"{ratio:.0%} masked" for ratio in ratios]
    found = sides[0].compared(batch)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "cka.csv", scores, columns)
    _draw(
        folder / "cka.png",
        scores,
        columns,
        f"{run} and {other}" if other else f"{run}, whole and masked images",
    )
    return f"{folder}/cka.csv and cka.png: linear CKA of {found} images, {scores.min():.2f} to {scores.max():.2f}"


class _Side:
    """A trained encoder and the images as it sees them."""

    def __init__(self, path: str, images: str, count: int):
        self.encoder, config = load_encoder(path)
        self.depth, self.patches, self._data = (
            config.model.depth,
            config.grid[0] * config.grid[1],
            config.data,
        )
        self.index = build_index(images, config.data, progress=False, option="--images")
        self.count = min(count, len(self.index))

    def compared(self, batch: int) -> int:
        """How many images are compared in batches of this size."""
        rest = self.count % batch
        return self.count - (rest if rest < MIN_BATCH else 0)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The first images, uint8 [size, H, W, C]; a last batch that is too small to compare is left out."""
        plan = centre_plan(self.index, np.arange(self.count), self._data, side=1.0)
        device = self.encoder.cls_token.device
        for images in decode(self.index, self._data, plan, size, device):
            if len(images) >= MIN_BATCH:
                yield images

    def whole(self, images: Tensor) -> list[Tensor]:
        """Features of whole images by each layer."""
        everything = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        return self._features(images, mask_from_order(everything, self.patches))

    def masked(self, images: Tensor, first: int, ratio: float) -> list[Tensor]:
        """Features of the same images under random masks; `first` is the place of the first image."""
        places = torch.arange(first, first + len(images), device=images.device)
        keep = self.keep(ratio)
        return self._features(
            images, sample_random_mask(0, torch.zeros_like(places), places, self.patches, keep)
        )

    def keep(self, ratio: float) -> int:
        """Patches that a ratio leaves; ConfigError where that is none or all."""
        keep = int(self.patches * (1 - ratio))
        if not 0 < keep < self.patches:
            raise ConfigError(
                f"--ratios {ratio:g}: keeps {keep} of {self.patches} patches; expected at least 1 kept and 1 removed"
            )
        return keep

    @torch.no_grad()
    def _features(self, images: Tensor, mask: Mask) -> list[Tensor]:
        layers = self.encoder(images, mask, every_layer=True)
        return [layer[:, 1:].float().mean(1).cpu() for layer in layers[1:]]


def _between_runs(left: _Side, right: _Side, batch: int) -> Tensor:
    cka = MinibatchCKA(left.depth, right.depth)
    for ours, theirs in zip(left.batches(batch), right.batches(batch), strict=True):
        cka.add(left.whole(ours), right.whole(theirs))
    return cka.scores()


def _under_masks(side: _Side, ratios: list[float], batch: int) -> Tensor:
    pairs = [[MinibatchCKA(1, 1) for _ in ratios] for _ in range(side.depth)]
    first = 0
    for images in side.batches(batch):
        whole = side.whole(images)
        for column, ratio in enumerate(ratios):
            for layer, features in enumerate(side.masked(images, first, ratio)):
                pairs[layer][column].add([features], [whole[layer]])
        first += len(images)
    return torch.stack([torch.cat([pair.scores().flatten() for pair in row]) for row in pairs])


def _write(path: Path, scores: Tensor, columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", *columns])
        for layer, row in enumerate(scores.tolist()):
            writer.writerow([layer + 1, *(f"{score:.6f}" for score in row)])


def _draw(path: Path, scores: Tensor, columns: list[str], title: str) -> None:
    rows = len(scores)
    figure = Figure(figsize=(1.8 + 0.7 * len(columns), 1.6 + 0.35 * rows), layout="tight")
    axis = figure.subplots()
    image = axis.imshow(scores.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(rows), [f"layer {layer + 1}" for layer in range(rows)], fontsize=8)
    axis.set_title(title, fontsize=8)
    for (row, column), score in ((place, scores[place].item()) for place in _places(scores)):
        colour = "white" if score < 0.6 else "black"
        axis.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="linear CKA")
    figure.savefig(path, dpi=110)


def _places(scores: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(scores.shape[0]) for column in range(scores.shape[1])]
