"""The protocols of `fastmim evaluate`. Imports no torch: what a protocol runs is loaded when it runs."""

import importlib
from dataclasses import dataclass
from typing import Any

from fastmim.evaluate.config import AttentiveConfig, EvaluationConfig, FewShotConfig, KnnConfig, LinearConfig
from fastmim.evaluate.config_finetune import FinetuneConfig
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.segment.config import SegmentConfig


@dataclass(frozen=True)
class Protocol:
    """What a protocol is made of; `module:name` where that needs torch.

    Attributes:
        config: what it can be told.
        runner: the function that measures, `Job` -> what `task` tells of; every rank calls it.
        task: the `Task` that reads its images and tells its outcome.
    """

    config: type[EvaluationConfig]
    runner: str
    task: str = "fastmim.evaluate.classification:Classification"


PROTOCOLS = {
    "linear": Protocol(LinearConfig, "fastmim.evaluate.linear:evaluate_linear"),
    "attentive": Protocol(AttentiveConfig, "fastmim.evaluate.attentive:evaluate_attentive"),
    "knn": Protocol(KnnConfig, "fastmim.evaluate.knn:evaluate_knn"),
    "finetune": Protocol(FinetuneConfig, "fastmim.evaluate.finetune:evaluate_finetune"),
    "few_shot": Protocol(FewShotConfig, "fastmim.evaluate.few_shot:evaluate_few_shot"),
    "segment": Protocol(
        SegmentConfig,
        "fastmim.evaluate.segment.run:evaluate_segment",
        "fastmim.evaluate.segment.run:SemanticSegmentation",
    ),
    "detect": Protocol(
        DetectConfig,
        "fastmim.evaluate.detect.run:evaluate_detect",
        "fastmim.evaluate.detect.run:Detection",
    ),
}


def load(place: str) -> Any:
    """What `module:name` names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)
