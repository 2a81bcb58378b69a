"""The task of telling which class an image is of."""

from typing import Any

from fastmim.config_data import DataConfig
from fastmim.errors import ConfigError
from fastmim.evaluate.config import ProtocolConfig
from fastmim.evaluate.job import Job, Task
from fastmim.evaluate.labels import LabelledImages, hold_out, read_labelled, with_classes_of
from fastmim.evaluate.scores import Outcome, confusion, draw_confusion, summary

PICTURE = "confusion.png"


class Classification(Task):
    """Images of classes; an outcome is `scores.Outcome`."""

    def read(
        self, data: str, test: str | None, images: DataConfig, config: ProtocolConfig
    ) -> tuple[LabelledImages, LabelledImages]:
        """The training and the test images; a share of each class is held out where there is no `test`."""
        if test is None and config.test_labels is not None:
            raise ConfigError(f"test_labels={config.test_labels!r} without --test; expected both or neither")
        train = read_labelled(data, images, config.labels, "--data")
        if test is None:
            return hold_out(train, config.test_share, config.seed, "test_share")
        if "test_share" in config.model_fields_set:
            raise ConfigError(f"test_share={config.test_share:g} with --test {test}; expected one of them")
        shared = config.labels if config.labels and config.labels.endswith(".csv") else None
        tested = read_labelled(test, images, config.test_labels or shared, "--test")
        if (tested.index.kind, tested.index.root) == (train.index.kind, train.index.root) and (
            tested.index.fingerprint == train.index.fingerprint
        ):
            raise ConfigError(
                f"--test {test} is --data; expected other images, or no --test: test_share are held out"
            )
        return train, with_classes_of(tested, train)

    def write(self, job: Job, outcome: Outcome, title: str) -> dict[str, Any]:
        """The accuracies, and confusion.png."""
        names = job.train.class_names
        told = summary(outcome, names)
        line = self.headline(told | {"test": job.test.described()})
        draw_confusion(job.folder / PICTURE, confusion(outcome, len(names)), names, f"{title}: {line}")
        return told

    def headline(self, told: dict[str, Any]) -> str:
        """Top-1, its spread over draws, top-5 and the mean over classes."""
        parts = [f"top-1 {told['top1']:.2%}"]
        if told.get("top1_std") is not None:
            parts[0] += f" ± {told['top1_std']:.2%} over {len(told['draws'])} draws"
        if "top5" in told:
            parts.append(f"top-5 {told['top5']:.2%}")
        parts.append(f"mean of {told['test']['classes']} classes {told['mean_class_top1']:.2%}")
        return f"{', '.join(parts)}, {told['test']['images']:,} test images"
