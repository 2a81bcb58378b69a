"""One evaluation from the command line: read, check, measure, write."""

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastmim import recipes
from fastmim.config import Config, DataConfig
from fastmim.errors import ConfigError, DataError
from fastmim.evaluate.config import EvaluationConfig
from fastmim.evaluate.encoder import encoder_of, fingerprint_of
from fastmim.evaluate.identity import PARTS, difference
from fastmim.evaluate.job import Job, Task
from fastmim.evaluate.protocols import PROTOCOLS, load
from fastmim.evaluate.resume import remove_states
from fastmim.exchange.weights import read_weights
from fastmim.manifest import lock, write_durably
from fastmim.provenance import source_commit
from fastmim.ranks import Ranks, cores_per_rank

RESULT = "eval.json"


def evaluate(
    protocol: str,
    weights: str,
    data: str,
    test: str | None,
    out: str,
    overrides: list[str] | None = None,
    recipe: str | None = None,
    ema: bool = False,
    force: bool = False,
) -> str:
    """Measure an encoder, and write `out`/eval.json and pictures; every rank of the launcher calls it.

    A finished evaluation of the same settings, weights and images in `out` is kept; one of others is refused.

    Args:
        protocol: one of `PROTOCOLS`.
        weights: a run, checkpoint directory or weights file.
        data: training images, a source like `data.source`.
        test: test images; None lets the protocol hold some of `data` out.
        out: folder to write to.
        overrides: `key=value` words, fields of the protocol's configuration.
        recipe: what they change: a name of `fastmim.recipes.evaluate` or a YAML file; None takes the defaults.
        ema: use the averaged weights.
        force: replace what is in `out`.

    Returns:
        What was found, for a person.

    Raises:
        FastmimError: settings, weights, images or labels that cannot be used.
    """
    entry = PROTOCOLS[protocol]
    config = recipes.load_evaluation(entry.config, protocol, recipe, overrides or [])
    read = read_weights(weights, ema)
    config = config.resolved(read.config)
    task: Task = load(entry.task)()
    with _joined() as ranks:
        encoder = encoder_of(read, weights)
        images = _with_common_limits(read.config.data)
        found = ranks.run_on_first(lambda: task.read(data, test, images, config), each_node=True)
        # The others read the cached index of their node's first rank.
        train, tested = found or task.read(data, test, images, config)
        identity: dict[str, Any] = {
            "protocol": protocol,
            "settings": _settings(config, test),
            "weights": {"sha256": fingerprint_of(encoder), **read.history, **_places(read.config)},
            "train": train.described(),
            "test": tested.described(),
        }
        _agree(ranks, identity)
        folder = Path(out)
        result = ranks.share(ranks.run_on_first(lambda: None if force else _find(folder, identity)))
        if result is not None:
            return f"{folder / RESULT} is there already (--force measures again): {task.headline(result)}"
        # Held by the rank that writes.
        with ranks.run_on_first(lambda: lock(folder)) or nullcontext():
            if force:
                ranks.run_on_first(lambda: remove_states(folder, but=identity))
            start = time.perf_counter()
            job = Job(encoder, read.config, config, train, tested, folder, ranks, identity)
            outcome = load(entry.runner)(job)
            origin = {"weights": weights, "data": data, "test": test, "recipe": recipe}

            def write() -> dict[str, Any]:
                told = identity | task.write(job, outcome, protocol)
                told |= {
                    "seconds": time.perf_counter() - start,
                    "paths": origin,
                    "versions": _versions(ranks),
                }
                # Last: where it is, the evaluation is whole.
                write_durably(folder / RESULT, json.dumps(told, indent=2) + "\n")
                remove_states(folder)
                return told

            told = ranks.share(ranks.run_on_first(write))
            assert told is not None, "the first rank wrote"
    return f"{folder / RESULT}: {task.headline(told)}"


def _with_common_limits(images: DataConfig) -> DataConfig:
    """Limits that a run set for its own images do not keep others out."""
    fields = DataConfig.model_fields
    limits = {key: max(getattr(images, key), fields[key].default) for key in ("max_pixels", "max_file_bytes")}
    return images.model_copy(update=limits)


def _places(trained: Config) -> dict[str, Any]:
    """What tells encoders of the same tensors and of resized fixed positions apart."""
    if trained.positions_grid == trained.grid:
        return {}
    return {"positions_grid": list(trained.positions_grid), "image_size": list(trained.data.image_size)}


@contextmanager
def _joined() -> Iterator[Ranks]:
    """The ranks that the launcher started, or this process alone."""
    ranks = Ranks()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.world_size > 1:
        dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo")
        ranks.open_host_group()
        if ranks.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores_per_rank())
    try:
        yield ranks
    finally:
        if ranks.world_size > 1:
            dist.destroy_process_group()


def _agree(ranks: Ranks, identity: dict[str, Any]) -> None:
    """See that every rank read the same; DataError on every rank otherwise."""
    for rank, other in enumerate(ranks.gather(identity)):
        if differing := difference(identity, other):
            raise DataError(
                f"rank {rank} has {differing[0]}={differing[2]!r}; expected {differing[1]!r}", True
            )


def _settings(config: EvaluationConfig, test: str | None) -> dict[str, Any]:
    """What can change the result; where labels lie cannot, and what they are is in the images' fingerprint."""
    return config.model_dump(
        mode="json", exclude=config.unused | ({"test_share"} if test is not None else set())
    )


def _versions(ranks: Ranks) -> dict[str, Any]:
    return {
        "fastmim": importlib.metadata.version("fastmim"),
        "torch": torch.__version__,
        "commit": source_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": ranks.world_size,
    }


def _find(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation that is wanted, where a folder holds it; None where it holds none.

    Raises:
        ConfigError: it holds another one; names the first difference.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        identity = {key: found[key] for key in PARTS}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is no result of an evaluation; expected another --out, or --force"
        ) from None
    if differing := difference(identity, wanted):
        key, there, here = differing
        raise ConfigError(
            f"{path} has {key}={there!r}, this evaluation {here!r}; expected another --out, or --force"
        )
    return found
