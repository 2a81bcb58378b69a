"""Pre-training for so many minutes: by this engine's launch.py, and by transformers' ViTMAE in a plain loop."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fastmim import recipes
from fastmim.exchange.inward import import_weights
from fastmim.exchange.outward import export_weights
from fastmim.exchange.weights import Weights
from fastmim.manifest import write_durably
from fastmim.metrics import read_records
from fastmim.objectives import build_objective

ROOT = Path(__file__).resolve().parents[1]
_TRIAL_STEPS = 100


def pretrain(recipe: str, source: str, run: Path, minutes: float, overrides: list[str]) -> dict:
    """Train a recipe by launch.py for so many minutes, its schedule to the end.

    A short trial measures the images of a second; the schedule, its warm-up too, is stretched to what fits then. A
    finished run is kept; one that was stopped begins anew, since its minutes are not known.

    Args:
        recipe: of the run.
        source: `data.source`.
        run: the folder that becomes the run; what is told of it is kept beside it.
        minutes: of the process, from its start to its end.
        overrides: of the recipe; with `train.max_steps` there is no trial.

    Returns:
        images, run_seconds (of the process), and images_per_s, as the run told them.
    """
    told = run.with_suffix(".json")
    if told.exists():
        return json.loads(told.read_text())
    trial = run.with_name("trial")
    for folder in (run, trial):
        shutil.rmtree(folder, ignore_errors=True)
    words = [f"data.source={source}", "log.tensorboard=false", *overrides]
    config = recipes.load(recipe, words)
    batch = config.optim.batch_size
    if config.train.max_steps is None:
        short = [f"output={trial}", f"train.max_steps={_TRIAL_STEPS}", "log.every_steps=20"]
        spent = _launch(recipe, [*words, *short])
        records = read_records(trial / "metrics.jsonl")
        speed = median(record["images_per_s"] for record in records[1:])
        beside = max(0.0, spent - _TRIAL_STEPS * batch / speed)
        # Images of an epoch, from what a record tells of both.
        epoch = _TRIAL_STEPS * batch / records[-1]["epoch"]
        stretch = speed * (60 * minutes - beside) / epoch / config.optim.epochs
        words += [
            f"optim.{key}={stretch * getattr(config.optim, key):.3f}" for key in ("epochs", "warmup_epochs")
        ]
    seconds = _launch(recipe, [*words, f"output={run}"])
    records = read_records(run / "metrics.jsonl")
    speed = median(record["images_per_s"] for record in records)
    found = {"images": records[-1]["step"] * batch, "run_seconds": seconds, "images_per_s": speed}
    write_durably(told, json.dumps(found))
    return found


def _launch(recipe: str, words: list[str]) -> float:
    return run_process([sys.executable, str(ROOT / "launch.py"), "--config", recipe, *words])


def run_process(command: list[str]) -> float:
    """Run a process to its end; returns its seconds."""
    started = time.monotonic()
    # DeepSpeed looks for ninja beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - started


def initial_weights(run: Path, path: Path) -> Path:
    """Write the weights that a run began with, which its configuration's seed decides."""
    config = recipes.load(str(run / "config.yaml"))
    torch.manual_seed(config.train.seed)
    objective = build_objective(config)
    tensors = {name: parameter.detach() for name, parameter in objective.named_parameters()}
    Weights(tensors, config).save(path)
    return path


def pretrain_plain(run: Path, initial: Path, folder: Path, seconds: float, workers: int) -> dict:
    """Train transformers' ViTMAE with a run's settings, from its initial weights, in `plain_vitmae.py`.

    Args:
        run: whose config.yaml is followed.
        initial: its initial weights.
        folder: for the model, and for `weights.safetensors`, its encoder as a file of ours; a finished one is kept.
        seconds: of the process, from its start to its end.
        workers: processes of torch's DataLoader.

    Returns:
        images, steps and run_seconds.
    """
    told, weights = folder / "told.json", folder / "weights.safetensors"
    if weights.exists():
        return json.loads(told.read_text())
    export_weights(str(initial), str(folder / "initial"), "transformers", force=True)
    script = Path(__file__).with_name("plain_vitmae.py")
    words = [str(run / "config.yaml"), str(folder / "initial"), str(folder), f"{seconds}", f"{workers}"]
    # -P: beside the script lies kernels.py, which transformers would take for a package of that name.
    spent = run_process([sys.executable, "-P", str(script), *words])
    data = recipes.load(str(run / "config.yaml")).data
    statistics = [f"data.mean={data.mean}", f"data.std={data.std}"]
    write_durably(told, json.dumps({**json.loads(told.read_text()), "run_seconds": spent}))
    import_weights(str(folder / "model"), str(weights), "transformers", statistics, force=True)
    return json.loads(told.read_text())
