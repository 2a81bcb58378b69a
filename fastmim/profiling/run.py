"""`fastmim profile`: a few steps of a recipe by the trainer itself, measured."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastmim.config import Config
from fastmim.deepspeed_fragment import stage_in_effect
from fastmim.errors import ConfigError, FastmimError
from fastmim.flops import measure_peak_flops
from fastmim.manifest import write_durably
from fastmim.metrics import set_up_logging
from fastmim.precision import choose_precision
from fastmim.profiling.advice import advise
from fastmim.profiling.figures import Figures, memory_limit
from fastmim.profiling.instruments import instrumented
from fastmim.profiling.memory import held_bytes, traced_peak
from fastmim.profiling.report import describe
from fastmim.profiling.timeline import OTHER, Timeline
from fastmim.ranks import Ranks, cores_per_rank
from fastmim.signals import StopSignals
from fastmim.trainer import Trainer
from fastmim.window import peak_memory_bytes

TRACED_STEPS = 3
_FIRST_PHASES = ("data", "gather", "encoder", "regressor", "decoder")
_LAST_PHASES = ("loss", "backward", "optimiser", "communication", OTHER)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def profile(
    recipe: str, config: Config, out: str, json_path: str | None, steps: int, warmup: int
) -> str | None:
    """Run warm-up steps, measured steps and traced ones, and write `out`/trace.json; all ranks call it.

    Nothing of it is kept, and `config.output` is not touched: the run lives in a temporary folder.

    Args:
        recipe: what to call it.
        config: of the run.
        out: folder of the Chrome trace.
        json_path: where to write the figures too.
        steps: how many are measured.
        warmup: how many come before.

    Returns:
        A report, on rank 0; None elsewhere.

    Raises:
        FastmimError: what stops a run of this configuration too, or `out` that is a run's folder.
    """
    config.require_source()
    trace = Path(out) / "trace.json"
    if (Path(out) / "metrics.jsonl").exists():
        raise ConfigError(f"--out {out} is the folder of a run; expected another one")
    for path in (trace, Path(json_path or trace)):
        path.parent.mkdir(parents=True, exist_ok=True)
    ranks = Ranks()
    set_up_logging(False)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
        trainer = _ProfiledTrainer(_short(config, folder, warmup + steps + TRACED_STEPS + 1), ranks, "none")
        try:
            measurement = _Measurement(trainer, trace, warmup, steps)
            with instrumented(trainer, measurement.timeline, measurement.start_step):
                trainer.run(signals)
            if trainer.step < trainer.last_step:
                raise FastmimError(f"stopped by a signal after {trainer.step} of {trainer.last_step} steps")
            figures = measurement.figures(recipe)
        finally:
            trainer.close()
    if not ranks.first:
        return None
    advice = advise(figures)
    if json_path is not None:
        write_durably(Path(json_path), json.dumps({**figures.as_json(), "advice": advice}, indent=1))
    return f"{describe(figures, advice)}\n\n{trace} shows {TRACED_STEPS} steps in Perfetto (ui.perfetto.dev)"


class _ProfiledTrainer(Trainer):
    """A run of which nothing is kept."""

    def _save(self) -> None:
        pass


def _short(config: Config, folder: str, steps: int) -> Config:
    """The same steps, so many of them, without what happens between steps."""
    # Without an image more than a step in an epoch there are still enough steps.
    epochs = max(config.optim.epochs, steps * config.optim.batch_size)
    changes: dict[str, dict[str, Any]] = {
        "optim": {"epochs": epochs},
        "train": {"max_steps": steps, "profile": False},
        "checkpoint": {"every_steps": None, "every_minutes": None},
        "log": {"every_steps": steps, "tensorboard": False, "wandb": False, "reconstruct_every_steps": None},
    }
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update={"output": folder, **sections})


def _activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]


class _Measurement:
    """Counts steps: warm-up, measured ones, traced ones, and a last one in which memory is looked at.

    Args:
        trainer: that is measured.
        trace: where the first rank writes its trace.
        warmup, steps: how many.
    """

    def __init__(self, trainer: Trainer, trace: Path, warmup: int, steps: int):
        self.trainer = trainer
        self.device = trainer.ranks.device
        self.timeline = Timeline(self.device)
        self._trace, self._warmup, self._steps = trace, warmup, steps
        self._started = 0
        self._profiler = torch.profiler.profile(
            activities=_activities(self.device), record_shapes=True, profile_memory=True
        )
        self._between: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._peak = 0

    def start_step(self) -> None:
        """Called before each step."""
        ended, self._started = self._started, self._started + 1
        tracing_from = self._warmup + self._steps
        tracing_to = tracing_from + TRACED_STEPS
        if ended == self._warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if ended == tracing_to:
            self.timeline.trace(False)
            self._profiler.stop()
            self._look_at_memory()
        self.timeline.start_step()
        if ended == tracing_from:
            self._peak = peak_memory_bytes(self.device)
            self._profiler.start()
            self.timeline.trace(True)

    def figures(self, recipe: str) -> Figures:
        """What was measured; every rank calls it, since the peak is that of ranks that all compute."""
        trainer, config = self.trainer, self.trainer.config
        each = self.timeline.seconds(self._warmup, self._warmup + self._steps)
        totals = [sum(step.values()) for step in each]
        found = {phase for step in each for phase in step}
        inner = sorted(found - set(_FIRST_PHASES) - set(_LAST_PHASES))
        order = [*_FIRST_PHASES, *inner, *_LAST_PHASES]
        activations = self._activations() if trainer.ranks.first else 0
        trainer.ranks.barrier()
        return Figures(
            recipe=recipe,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            on_cuda=self.device.type == "cuda",
            precision=trainer.precision,
            best_precision=choose_precision("auto", self.device),
            ranks=trainer.ranks.world_size,
            ranks_here=trainer.ranks.local_world_size,
            cores=len(os.sched_getaffinity(0)),
            micro_batch=config.micro_batch(trainer.ranks.world_size),
            accumulation=config.optim.accumulation,
            steps=self._steps,
            source=trainer.index.kind,
            threads=config.data.threads or cores_per_rank(),
            zero_stage=stage_in_effect(config.deepspeed, trainer.precision, trainer.ranks.world_size),
            parameters=sum(getattr(p, "ds_numel", p.numel()) for p in trainer.objective.parameters()),
            checkpointing=config.train.activation_checkpointing,
            compiled=config.train.compile,
            seconds={
                phase: sum(step.get(phase, 0.0) for step in each) / len(each)
                for phase in order
                if phase in found
            },
            fastest=min(totals),
            slowest=max(totals),
            flops=trainer.objective.module_flops(),
            peak_flops=measure_peak_flops(self.device, _DTYPES[trainer.precision]),
            memory={**self._held, "activations": activations},
            peak_memory=self._peak,
            memory_limit=memory_limit(self.device, trainer.ranks.local_world_size),
        )

    def _look_at_memory(self) -> None:
        """Between two steps, and in the one that begins, at its end of the backward pass."""
        engine = self.trainer.engine
        self._between = held_bytes(engine, self.device)

        def look(_: torch.Tensor) -> None:
            self._held = held_bytes(engine, self.device)

        # Of all parameters the first one gets its gradient last; until then ZeRO keeps its buckets.
        first = next(
            parameter for parameter in self.trainer.objective.parameters() if parameter.requires_grad
        )
        first.register_post_accumulate_grad_hook(look)

    def _activations(self) -> int:
        """Bytes of the measured peak that are of no other kind; the first rank writes the trace here."""
        self._profiler.export_chrome_trace(str(self._trace))
        if self.device.type == "cuda":
            peak = self._peak
        else:
            events = json.loads(self._trace.read_text())["traceEvents"]
            peak = sum(self._between.values()) + traced_peak(events)
        return max(peak - sum(self._held.values()), 0)
