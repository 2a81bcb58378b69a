"""Accuracies and the confusion matrix, counted by hand."""

import pytest
import torch
from PIL import Image

from fastmim.evaluate.scores import Outcome, best_classes, confusion, draw_confusion, summary


def test_counts_are_those_of_a_hand_made_case():
    scores = torch.full((4, 7), -1.0)
    scores[0, 3], scores[1, [0, 3]], scores[2, 6] = 5, torch.tensor([2.0, 1.0]), 9
    scores[3] = torch.arange(7).flip(0).float()  # the fifth best is class 4
    names = tuple("abcdefg")
    outcome = Outcome(best_classes(scores), torch.tensor([3, 3, 6, 5]))
    assert outcome.best[:, 0].tolist() == [3, 0, 6, 0] and outcome.best[3].tolist() == [0, 1, 2, 3, 4]
    matrix = confusion(outcome, 7)
    assert matrix.nonzero().tolist() == [[3, 0], [3, 3], [5, 0], [6, 6]]
    present = Outcome(outcome.best[:3], torch.tensor([3, 3, 6]))
    told = summary(present, names)
    assert told["top1"] == pytest.approx(2 / 3) and told["top5"] == 1
    assert summary(outcome, names)["top5"] == 0.75
    assert told["per_class"]["d"] == {"images": 2, "top1": 0.5} and told["per_class"]["g"]["top1"] == 1


def test_of_equal_scores_the_first_class_is_taken():
    assert best_classes(torch.zeros(1, 3)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("classes", [2, 60])
def test_few_and_many_classes_are_drawn(tmp_path, classes):
    names = tuple(f"${i}_" for i in range(classes))  # no formula
    draw_confusion(tmp_path / "c.png", torch.eye(classes, dtype=torch.int64), names, "knn")
    with Image.open(tmp_path / "c.png") as drawn:
        assert min(drawn.size) > 200
