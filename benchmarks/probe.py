"""A linear probe of the demo photographs: is a solar cell defective, from frozen features."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
from fastmim.evaluate.logistic import fit_logistic
from fastmim.masking import mask_from_order
from fastmim.models import Encoder

FOLDS = 5


def labelled_cells(config: Config, source: Path) -> tuple[Tensor, Tensor]:
    """The photographs of a folder of the demo set, and whether an expert called each cell defective.

    Returns:
        uint8 [n, H, W, C] and bool [n]; a probability of a defect above one half is a defect.
    """
    labels = Path(find_spec("elpv_dataset").origin).parent / "data" / "labels.csv"
    with labels.open() as file:
        rows = [line.split() for line in file]
    defective = {Path(name).name: float(probability) > 0.5 for name, probability, _ in rows}
    index = build_index(str(source), config.data, progress=False)
    names = [Path(index.name(i)).name for i in range(len(index))]
    return load_images(index, config.data, len(index)), torch.tensor([defective[name] for name in names])


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor, batch: int = 64) -> Tensor:
    """Mean of the patch features of whole images, float32 [n, width]."""
    patches = encoder.pos_embed.shape[1] - 1
    features = []
    for part in images.split(batch):
        x = encoder(part, mask_from_order(torch.arange(patches).expand(len(part), -1), patches))
        features.append(x[:, 1:].float().mean(1))
    return torch.cat(features)


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
