"""What a run tells: JSON lines, TensorBoard, Weights & Biases, a progress bar or plain lines."""

import hashlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.manifest import checkpoint_path, write_durably

logger = logging.getLogger("fastmim")


def set_up_logging(first: bool) -> None:
    """Rank 0 tells everything on stdout; the others warnings only, so that no line is printed twice."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if first else logging.WARNING)


class Metrics:
    """The records of a run, on rank 0.

    Args:
        config: of the run.
        start_step: steps done before; later records of an interrupted run are dropped.
        total_steps: where the run ends.
    """

    def __init__(self, config: Config, start_step: int, total_steps: int):
        run = Path(config.output)
        self.path = run / "metrics.jsonl"
        if start_step < total_steps:
            drop_records_after(self.path, start_step)
        self._file = self.path.open("a")
        self._tensorboard = _open_tensorboard(run, start_step) if config.log.tensorboard else None
        self._wandb = _open_wandb(config) if config.log.wandb else None
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not on_terminal)
        self._total = total_steps

    def write(self, record: dict[str, Any]) -> None:
        """Tell one record; it holds "step" and numbers."""
        step = record["step"]
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if self._tensorboard is not None and isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(record, step=step)
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        norm = "not finite" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
        if self._bar.disable:
            logger.info(
                f"step {step}/{self._total} epoch {record['epoch']:.2f} loss {loss} lr {record['lr']:.2e} "
                f"grad norm {norm} {record['images_per_s']:.0f} images/s data wait {record['data_wait']:.0%}"
            )
        else:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=loss, images_per_s=f"{record['images_per_s']:.0f}")

    def add_image(self, name: str, path: Path, step: int) -> None:
        """Show a PNG in TensorBoard."""
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and end all sinks."""
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def describe_end(run: Path, step: int, images: str | None) -> str:
    """What a finished run left, and what to try next on `images`; None where nothing can be drawn."""
    records = read_records(run / "metrics.jsonl")
    lines = [f"finished {step} steps in {run}/"]
    if records:
        rates = sorted(record["images_per_s"] for record in records)
        lines.append(f"  images/s      {rates[len(rates) // 2]:.0f} (median of {len(rates)} records)")
        lines.append(f"  peak memory   {records[-1]['peak_memory_bytes'] / 2**30:.1f} GiB on the first rank")
    kept = {
        "checkpoint": checkpoint_path(run, step),
        "metrics": run / "metrics.jsonl",
        "tensorboard": run / "tensorboard",
        "pictures": run / "reconstructions.png",
        "loss curve": run / "loss.png",
        "config": run / "config.yaml",
    }
    lines += [f"  {name:<13} {path}" for name, path in kept.items() if path.exists()]
    if images is not None:
        lines.append(
            f"next: {_command()} reconstruct --checkpoint {run} --images {images} --out pictures.png"
        )
    return "\n".join(lines)


def _command() -> str:
    """`fastmim`, or its path where this environment is not activated and the shell would not find it."""
    script = Path(sys.executable).with_name("fastmim")
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix or not script.exists():
        return "fastmim"
    here = Path.cwd()
    return str(script.relative_to(here) if script.is_relative_to(here) else script)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropping an unfinished line", path)
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Forget the records of steps that will be done again."""
    records = [record for record in read_records(path) if record["step"] <= step]
    write_durably(path, "".join(json.dumps(record) + "\n" for record in records))


def _open_tensorboard(run: Path, start_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)


def check_sinks(config: Config) -> None:
    """Refuse a sink that is not installed.

    Raises:
        ConfigError: what to install.
    """
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.wandb=true: wandb is not installed; pip install wandb, or log.wandb=false")


def _open_wandb(config: Config):
    import wandb

    run = Path(config.output).resolve()
    # The folder is the run: the same one goes on, another of the same name does not join it.
    identity = hashlib.sha256(str(run).encode()).hexdigest()[:12]
    values = config.model_dump(mode="json")
    return wandb.init(dir=run, name=run.name, config=values, resume="allow", id=f"{run.name}-{identity}")
