"""A linear probe of the demo photographs: is a solar cell defective, from frozen features."""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
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


@torch.inference_mode()
def encode(encoder: Encoder, images: Tensor, batch: int = 64) -> Tensor:
    """Mean of the patch features of whole images, float32 [n, width]."""
    patches = encoder.pos_embed.shape[1] - 1
    features = []
    for part in images.split(batch):
        x = encoder(part, mask_from_order(torch.arange(patches).expand(len(part), -1), patches))
        features.append(x[:, 1:].float().mean(1))
    return torch.cat(features)


def probe_accuracy(features: Tensor, labels: Tensor, decay: float = 1e-2) -> float:
    """Balanced accuracy of logistic regression on standardised features, cross-validated over five folds.

    Args:
        features: float32 [n, width].
        labels: bool [n].
        decay: weight of half the squared norm of the coefficients.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    predicted = torch.empty_like(labels)
    for fold in order.chunk(FOLDS):
        training = torch.ones(len(labels), dtype=torch.bool)
        training[fold] = False
        x = (features - features[training].mean(0)) / (features[training].std(0) + 1e-6)
        predicted[fold] = _logistic(x[training], labels[training], x[fold], decay) > 0
    return sum((predicted == labels)[labels == kind].float().mean().item() for kind in (True, False)) / 2


def _logistic(x: Tensor, labels: Tensor, x_test: Tensor, decay: float) -> Tensor:
    """Logits of `x_test` by the classifier that fits x best, both classes weighing the same."""
    coefficients = torch.zeros(x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([coefficients], max_iter=200, line_search_fn="strong_wolfe")
    targets = labels.float()
    weights = torch.where(labels, 0.5 / targets.mean(), 0.5 / (1 - targets.mean()))

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ coefficients[:-1] + coefficients[-1]
        value = F.binary_cross_entropy_with_logits(logits, targets, weights)
        value = value + decay / 2 * coefficients[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return (x_test @ coefficients[:-1] + coefficients[-1]).detach()
