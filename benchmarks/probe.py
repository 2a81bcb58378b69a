"""A linear probe of the demo photographs: is a solar cell defective, from frozen features."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.data.demo import cell_labels
from fastmim.data.index import build_index
from fastmim.evaluate.config import KnnConfig
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.labels import LabelledImages
from fastmim.evaluate.logistic import fit_logistic
from fastmim.models import Encoder

FOLDS = 5


def labelled_cells(config: Config, folders: list[Path]) -> list[LabelledImages]:
    """The photographs of the demo set's folders, and whether an expert called each cell defective.

    A probability of a defect above one half is a defect.
    """
    names, label_of = ("whole", "defective"), cell_labels()
    parts = []
    for folder in folders:
        index = build_index(str(folder), config.data, progress=False)
        labels = [names.index(label_of[Path(index.name(i)).name]) for i in range(len(index))]
        parts.append(LabelledImages(index, np.arange(len(index)), np.array(labels, np.int64), names))
    return parts


def encode(encoder: Encoder, config: Config, parts: list[LabelledImages]) -> Tensor:
    """Mean of the patch features of whole images, float32 [n, width]."""
    extractor = FeatureExtractor(encoder, config, KnnConfig(pool="mean", center=1.0))
    return torch.cat([extractor.centre(part) for part in parts])


def probe(encoder: Encoder, config: Config, parts: list[LabelledImages]) -> float:
    """`probe_accuracy` of an encoder on all photographs together."""
    labels = np.concatenate([part.labels for part in parts])
    return probe_accuracy(encode(encoder, config, parts), torch.from_numpy(labels).bool())


def probe_accuracy(features: Tensor, labels: Tensor, l2: float = 1e-2) -> float:
    """Mean accuracy of the two classes by logistic regression, cross-validated over five folds.

    Args:
        features: float32 [n, width].
        labels: bool [n].
        l2: weight of half the squared norm of the coefficients.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    predicted = torch.empty_like(labels)
    for fold in order.chunk(FOLDS):
        training = torch.ones(len(labels), dtype=torch.bool)
        training[fold] = False
        classifier = fit_logistic(features[training], labels[training].long(), 2, l2, max_iterations=500)
        predicted[fold] = classifier(features[fold]).argmax(1).bool()
    return sum((predicted == labels)[labels == kind].float().mean().item() for kind in (True, False)) / 2
