"""Images that cannot be decoded, counted over all ranks: a run that has too many is saved, and ends on all of them."""

from fastmim.data.loader import Loader, too_many_bad
from fastmim.errors import TrainingAborted
from fastmim.ranks import Ranks


class BadImages:
    """Those of a run.

    Args:
        loader: of this rank; made with `ends_with_ranks`.
        ranks: of the run.
        stored: sample -> name, of an earlier part of the run.

    Attributes:
        stored: what belongs into a checkpoint: all that were found, while they are not too many. A run whose storage
            failed goes on when it is repaired.
        count: how many were found.
    """

    def __init__(self, loader: Loader, ranks: Ranks, stored: dict[int, str]):
        self.stored, self.count = stored, len(stored)
        self._loader, self._ranks = loader, ranks
        self._too_many: TrainingAborted | None = None

    @property
    def rank_failed(self) -> bool:
        """Whether this rank has no further batches."""
        return self._loader.failed is not None

    def gather(self) -> None:
        """Count over all ranks; every rank calls it."""
        index, found = self._loader.index, dict(self.stored)
        for bad in self._ranks.gather({sample: index.name(sample) for sample in self._loader.bad}):
            found |= bad
        self.count = len(found)
        if self.count <= self._loader.config.allowed_bad(len(index)):
            self.stored = found
        else:
            self._too_many = too_many_bad(list(found.values()), len(index), self._loader.config)

    def why_end(self, failed: bool) -> TrainingAborted | None:
        """The error that the run ends with, the same on all ranks; None while it goes on. Every rank calls it.

        Args:
            failed: `rank_failed` of any rank.
        """
        if failed:  # who failed tells reasons too
            found = self._ranks.gather(self._loader.failed)
            self._too_many = next(error for error in found if error is not None)
        if self._too_many is not None:
            self._too_many.everywhere = True
        return self._too_many
