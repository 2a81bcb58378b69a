"""What a run does before its first step, and a resumed one does not."""

from fastmim.checkpoint import fitted_buffers
from fastmim.config import Config
from fastmim.data.index import Index
from fastmim.data.loader import load_images
from fastmim.exchange.initial import initialise
from fastmim.objectives import Trainable
from fastmim.ranks import Ranks


def begin(objective: Trainable, config: Config, ranks: Ranks, index: Index) -> None:
    """Fit what an objective fits to the training images, then load `model.init`; all ranks call it.

    Args:
        objective: freshly initialised, not yet DeepSpeed's.
        config: of the run.
        ranks: of the run.
        index: of the training images.

    Raises:
        CheckpointError: `model.init` cannot be read, or is of another architecture.
    """
    if wanted := objective.images_to_prepare():
        # On rank 0, for all: another machine's arithmetic may differ in the last digit.
        ranks.run_on_first(
            lambda: objective.prepare(load_images(index, config.data, wanted, spread=True, skip_bad=True))
        )
        for buffer in fitted_buffers(objective).values():
            buffer.copy_(ranks.share(buffer))
    if config.model.init is not None:
        initialise(objective, config, ranks)
