"""Labelled images: classes from folders, from shards' `.cls` members, from an .npy of integers, or from a CSV."""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.config_data import DataConfig
from fastmim.data.index import Index, build_index
from fastmim.data.schedule import permute
from fastmim.errors import DataError

_COLUMNS = ["file", "label"]
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Some images of an index, and the class of each.

    Attributes:
        index: where the images are.
        rows: int64 [n], which of its images.
        labels: int64 [n], places in `class_names`.
        class_names: every class has at least one image.
    """

    index: Index
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> "LabelledImages":
        """The images at some places, int64 [m]."""
        return LabelledImages(self.index, self.rows[places], self.labels[places], self.class_names)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The labels of some of the index's images, int64 [m], which are all among these."""
        place = np.full(len(self.index), -1)
        place[self.rows] = self.labels
        return place[rows]

    def fingerprint(self) -> str:
        """SHA-256 of the index's fingerprint, the rows, the labels and the names of the classes."""
        digest = hashlib.sha256(
            "\0".join((self.index.fingerprint, *self.class_names)).encode("utf-8", "replace")
        )
        for column in (self.rows, self.labels):
            digest.update(np.ascontiguousarray(column, "<i8").data)
        return digest.hexdigest()

    def described(self) -> dict[str, Any]:
        """What eval.json tells of them."""
        return {"images": len(self), "classes": len(self.class_names), "sha256": self.fingerprint()}


def read_labelled(source: str, config: DataConfig, labels: str | None, option: str) -> LabelledImages:
    """All images of a source with their classes.

    Args:
        source: like `data.source`.
        config: how the source is read.
        labels: an .npy or a CSV; None takes class folders or `.cls` members.
        option: what the source was given as, for messages.

    Raises:
        DataError: no source, an image that cannot be used or has no class, a class without an image, or fewer than
            two classes.
    """
    index = build_index(source, config, progress=False, option=option)
    what = f"{option} {source}"
    index.require_all(what)
    if labels is None:
        classes, names = _own_classes(index, what)
    elif labels.endswith(".npy"):
        classes, names = _classes_of_array(index, labels, what)
    elif labels.endswith(".csv"):
        classes, names = _classes_of_table(index, labels, what)
    else:
        raise DataError(
            f"labels={labels!r}; expected an .npy of integers or a .csv with the columns file,label"
        )
    without = np.flatnonzero(classes < 0)
    if len(without):
        raise DataError(
            f"{what}: {len(without)} of {len(index)} images have no class, such as {index.name(int(without[0]))}"
        )
    counts = np.bincount(classes, minlength=len(names))
    if not counts.all():
        raise DataError(f"{what}: no image of class {_some([names[i] for i in np.flatnonzero(counts == 0)])}")
    if len(names) == 1:
        raise DataError(f"{what} holds the one class {names[0]!r}; expected two or more")
    return LabelledImages(index, np.arange(len(index)), classes.astype(np.int64), names)


def with_classes_of(test: LabelledImages, train: LabelledImages) -> LabelledImages:
    """`test`, its labels counted as those of `train` are.

    Raises:
        DataError: the two do not have the same classes; names those that one lacks.
    """
    lacking = {
        "--test lacks": [name for name in train.class_names if name not in set(test.class_names)],
        "--data lacks": [name for name in test.class_names if name not in set(train.class_names)],
    }
    told = [f"{who} class {_some(names)}" for who, names in lacking.items() if names]
    if told:
        raise DataError(f"the classes of --data and --test differ: {'; '.join(told)}")
    place = {name: i for i, name in enumerate(train.class_names)}
    order = np.array([place[name] for name in test.class_names])
    return LabelledImages(test.index, test.rows, order[test.labels], train.class_names)


def hold_out(
    images: LabelledImages, share: float, seed: int, key: str
) -> tuple[LabelledImages, LabelledImages]:
    """What stays, and a share of each class that is held out, rounded, at least one image.

    Args:
        images: what to divide.
        share: of each class.
        seed: of the draw.
        key: the option that asked for it, for messages.

    Raises:
        DataError: a class of one image.
    """
    held = []
    for label, places in enumerate(_shuffled_classes(images, seed, 0)):
        count = max(1, round(share * len(places)))
        if count == len(places):
            raise DataError(
                f"{key}={share:g} leaves none of the {len(places)} images of class {images.class_names[label]!r} to "
                "train on"
            )
        held.append(places[:count])
    out = np.zeros(len(images), bool)
    out[np.concatenate(held)] = True
    return images.take(np.flatnonzero(~out)), images.take(np.flatnonzero(out))


def draw_shots(images: LabelledImages, shots: int, seed: int, draw: int) -> np.ndarray:
    """Places of `shots` images of each class, ascending, int64 [classes x shots]; each draw is another one.

    Raises:
        DataError: a class has fewer images.
    """
    counts = np.bincount(images.labels)
    if counts.min() < shots:
        name = images.class_names[int(counts.argmin())]
        raise DataError(
            f"shots={shots}; expected at most the {counts.min()} training images of class {name!r}"
        )
    return np.sort(np.concatenate([places[:shots] for places in _shuffled_classes(images, seed, draw)]))


def _shuffled_classes(images: LabelledImages, seed: int, draw: int) -> list[np.ndarray]:
    """The places of each class's images, in an order that (seed, draw, class) alone decides."""
    shuffled = []
    for label in range(len(images.class_names)):
        places = np.flatnonzero(images.labels == label)
        n = len(places)
        shuffled.append(places[permute(np.arange(n), n, seed, np.full(n, draw), np.full(n, label))])
    return shuffled


def _own_classes(index: Index, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if not index.class_names:
        raise DataError(f"{what}: no labels; expected class folders, .cls members in shards, or labels=PATH")
    if index.kind == "folder":
        folders = sorted(e.name for e in os.scandir(index.root) if e.is_dir() and not e.name.startswith("."))
        empty = [name for name in folders if name not in set(index.class_names)]
        if empty:
            raise DataError(f"{what}: no usable image in class folder {_some(empty)}")
    return index.classes, index.class_names


def _classes_of_array(index: Index, labels: str, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if index.kind != "npy":
        raise DataError(f"labels={labels!r} with {what}; expected a .csv for files, whose order is not told")
    try:
        classes = np.load(labels, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"labels={labels!r} cannot be read as an .npy array ({error})") from error
    if classes.dtype.kind not in "iu" or classes.shape != (len(index),):
        raise DataError(
            f"labels={labels!r} holds {classes.dtype} {list(classes.shape)}; expected integers [{len(index)}], one an "
            f"image of {what}"
        )
    if classes.min() < 0:
        raise DataError(f"labels={labels!r} holds {classes.min()}; expected classes from 0")
    if classes.max() >= len(classes):
        raise DataError(f"labels={labels!r} holds class {classes.max()}; expected fewer classes than images")
    return classes, tuple(map(str, range(int(classes.max()) + 1)))


def _classes_of_table(index: Index, labels: str, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if index.kind == "npy":
        raise DataError(
            f"labels={labels!r} with {what}, whose images have no names; expected an .npy of integers"
        )
    table = _read_table(labels)
    given = [table.get(name.decode("utf-8", "surrogateescape")) for name in index.names]
    # Classes that are numbers stand in their order.
    names = sorted({label for label in given if label is not None}, key=lambda x: (len(x) * x.isdigit(), x))
    place: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([place.get(label, -1) for label in given]), tuple(names)


def _read_table(path: str) -> dict[str, str]:
    """Label by file name."""
    table: dict[str, str] = {}
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1:
                if row != _COLUMNS:
                    raise DataError(f"labels={path!r} begins with {','.join(row)!r}; expected 'file,label'")
            elif len(row) != 2 or not row[1]:
                raise DataError(
                    f"labels={path!r}, line {number}: {','.join(row)!r}; expected a file and its label"
                )
            elif table.setdefault(row[0], row[1]) != row[1]:
                raise DataError(
                    f"labels={path!r}, line {number}: {row[0]} is {table[row[0]]!r} and {row[1]!r}"
                )
    return table


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + rest
