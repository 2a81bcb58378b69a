"""One evaluation from the command line: read, check, measure, write."""

import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmim import recipes
from fastmim.config_data import DataConfig
from fastmim.errors import ConfigError
from fastmim.evaluate.config import PROTOCOLS, ProtocolConfig
from fastmim.evaluate.encoder import encoder_of, fingerprint_of
from fastmim.evaluate.features import FeatureExtractor
from fastmim.evaluate.few_shot import evaluate_few_shot
from fastmim.evaluate.knn import evaluate_knn
from fastmim.evaluate.labels import LabelledImages, hold_out, read_labelled, with_classes_of
from fastmim.evaluate.linear import evaluate_linear
from fastmim.evaluate.scores import Outcome, confusion, draw_confusion, summary
from fastmim.exchange.weights import read_weights
from fastmim.manifest import write_durably
from fastmim.provenance import source_commit

RUNNERS: dict[str, Callable[..., Outcome]] = {
    "linear": evaluate_linear,
    "knn": evaluate_knn,
    "few_shot": evaluate_few_shot,
}
RESULT, PICTURE = "eval.json", "confusion.png"
# What makes an evaluation the same one.
_IDENTITY = ("protocol", "settings", "weights", "train", "test")


def evaluate(
    protocol: str,
    weights: str,
    data: str,
    test: str | None,
    out: str,
    overrides: list[str] | None = None,
    ema: bool = False,
    force: bool = False,
) -> str:
    """Measure a frozen encoder, and write `out`/eval.json and confusion.png.

    A finished evaluation of the same settings, weights and images in `out` is kept; one of others is refused.

    Args:
        protocol: one of `PROTOCOLS`.
        weights: a run, checkpoint directory or weights file.
        data: labelled training images, a source like `data.source`.
        test: labelled test images; None holds out a share of each class of `data`.
        out: folder to write to.
        overrides: `key=value` words, fields of the protocol's configuration.
        ema: use the averaged weights.
        force: replace what is in `out`.

    Returns:
        What was found, for a person.

    Raises:
        FastmimError: settings, weights, images or labels that cannot be used.
    """
    config = recipes.build_as(PROTOCOLS[protocol], recipes.parse_overrides(overrides or []))
    read = read_weights(weights, ema)
    encoder = encoder_of(read, weights)
    train, tested = _labelled(data, test, read.config.data, config)
    told: dict[str, Any] = {
        "protocol": protocol,
        "settings": _settings(config, test),
        "weights": {"sha256": fingerprint_of(encoder), **read.history},
        "train": _described(train),
        "test": _described(tested),
    }
    folder = Path(out)
    if not force and _is_there(folder, told):
        result = json.loads((folder / RESULT).read_text())
        return f"{folder / RESULT} is there already (--force measures again): {_headline(result)}"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    outcome = RUNNERS[protocol](FeatureExtractor(encoder, read.config, config), train, tested, config)
    told |= summary(outcome, train.class_names)
    told["seconds"] = time.perf_counter() - start
    told["paths"] = {"weights": weights, "data": data, "test": test}
    told["versions"] = {
        "fastmim": importlib.metadata.version("fastmim"),
        "torch": torch.__version__,
        "commit": source_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    matrix = confusion(outcome, len(train.class_names))
    draw_confusion(folder / PICTURE, matrix, train.class_names, f"{protocol}: {_headline(told)}")
    # Last: where it is, the evaluation is whole.
    write_durably(folder / RESULT, json.dumps(told, indent=2) + "\n")
    return f"{folder / RESULT} and {PICTURE}: {_headline(told)}"


def _labelled(
    data: str, test: str | None, images: DataConfig, config: ProtocolConfig
) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test images."""
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


def _settings(config: ProtocolConfig, test: str | None) -> dict[str, Any]:
    """What can change the result; where labels lie cannot, and what they are is in the images' fingerprint."""
    return config.model_dump(
        mode="json", exclude=config.unused | ({"test_share"} if test is not None else set())
    )


def _described(images: LabelledImages) -> dict[str, Any]:
    return {"images": len(images), "classes": len(images.class_names), "sha256": images.fingerprint()}


def _is_there(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds the evaluation that is wanted.

    Raises:
        ConfigError: it holds another one; names the first difference.
    """
    path = folder / RESULT
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
        found = {key: found[key] for key in _IDENTITY}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is no result of an evaluation; expected another --out, or --force"
        ) from None
    there, here = _flat(found), _flat(wanted)
    # Another protocol has other settings, which would tell less.
    for key in ["protocol", *sorted(there.keys() | here.keys())]:
        if there.get(key) != here.get(key):
            raise ConfigError(
                f"{path} has {key}={there.get(key)!r}, this evaluation {here.get(key)!r}; expected another --out, or "
                "--force"
            )
    return True


def _flat(told: dict[str, Any]) -> dict[str, Any]:
    flat = {"protocol": told["protocol"], **told["settings"]}
    for part in _IDENTITY[2:]:
        flat |= {f"{part}.{key}": value for key, value in told[part].items()}
    return flat


def _headline(told: dict[str, Any]) -> str:
    parts = [f"top-1 {told['top1']:.2%}"]
    if told.get("top1_std") is not None:
        parts[0] += f" ± {told['top1_std']:.2%} over {len(told['draws'])} draws"
    if "top5" in told:
        parts.append(f"top-5 {told['top5']:.2%}")
    parts.append(f"mean of {told['test']['classes']} classes {told['mean_class_top1']:.2%}")
    return f"{', '.join(parts)}, {told['test']['images']:,} test images"
