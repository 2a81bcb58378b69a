"""What a protocol is given, and what it owes: the ends between which every evaluation runs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmim.config import Config
from fastmim.config_data import DataConfig
from fastmim.models import Encoder
from fastmim.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Job:
    """One evaluation, checked and read, before it is measured.

    Attributes:
        encoder: float32, frozen, in evaluation mode.
        trained: the configuration that it was trained with; what its images are.
        config: of the protocol.
        train, test: what the protocol's task read.
        folder: where it writes, on rank 0.
        ranks: this process among all.
        identity: what makes the evaluation the same one, for files to take it up again from.
    """

    encoder: Encoder
    trained: Config
    config: Any
    train: Any
    test: Any
    folder: Path
    ranks: Ranks
    identity: dict[str, Any]


class Task(ABC):
    """How a kind of protocol reads its images and tells its outcome."""

    @abstractmethod
    def read(self, data: str, test: str | None, images: DataConfig, config: Any) -> tuple[Any, Any]:
        """The training and the test images, each with a `described()` that eval.json holds.

        Args:
            data: of `--data`.
            test: of `--test`; None where it was not given.
            images: how the encoder's images are read.
            config: of the protocol.

        Raises:
            DataError: no such images or labels.
        """

    @abstractmethod
    def write(self, job: Job, outcome: Any, title: str) -> dict[str, Any]:
        """Draw an outcome into `job.folder`, and return what eval.json tells of it; rank 0 calls it."""

    @abstractmethod
    def headline(self, told: dict[str, Any]) -> str:
        """What eval.json tells, in one line."""
