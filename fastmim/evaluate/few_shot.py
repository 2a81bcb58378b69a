"""Few-shot classification: logistic regression on a few images of each class, drawn several times."""

import numpy as np
import torch

from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.job import Job
from fastmim.evaluate.labels import draw_shots
from fastmim.evaluate.linear import convergence
from fastmim.evaluate.logistic import fit_logistic
from fastmim.evaluate.scores import Outcome, accuracy, best_classes


def evaluate_few_shot(job: Job) -> Outcome:
    """Classify all test images once for each draw; accuracies are means over the draws.

    Raises:
        DataError: a class has fewer training images than `shots`.
    """
    config, train, test = job.config, job.train, job.test
    drawn = [draw_shots(train, config.shots, config.seed, draw) for draw in range(config.draws)]
    # Only drawn images are decoded, once each: of a large set they are few.
    used = np.unique(np.concatenate(drawn))
    extractor = FeatureExtractor.of(job)
    features = extractor.centre(train.take(used), "train")
    asked, labels = extractor.centre(test, "test"), torch.from_numpy(test.labels)
    outcomes, rows = [], []
    for places in drawn:
        shots = features[torch.from_numpy(np.searchsorted(used, places)).to(features.device)]
        kinds = torch.from_numpy(train.labels[places]).to(features.device)
        model = fit_logistic(shots, kinds, len(train.class_names), config.l2, config.max_iterations)
        outcomes.append(Outcome(best_classes(model(asked)), labels))
        rows.append({"top1": accuracy(outcomes[-1]), **convergence(model)})
    each = torch.tensor([row["top1"] for row in rows], dtype=torch.float64)
    spread = each.std().item() if len(each) > 1 else None
    return Outcome(
        torch.cat([outcome.best for outcome in outcomes]),
        labels.repeat(len(outcomes)),
        {"top1_std": spread, "draws": rows},
    )
