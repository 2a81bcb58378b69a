"""The part of the configuration that says how steps are computed, saved and told."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastmim.schema import Positive, Section


class OptimConfig(Section):
    """AdamW with a per-iteration cosine schedule."""

    batch_size: int = Field(4096, gt=0)
    """Images per optimiser step over all ranks and accumulation steps."""
    accumulation: int = Field(1, gt=0)
    """Backward passes per optimiser step."""
    blr: float = Field(1.5e-4, gt=0)
    """Base learning rate per 256 images; lr = blr x batch_size / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    epochs: float = Field(800, gt=0)
    """Length of the run, in passes over the set."""
    warmup_epochs: float = Field(40, ge=0)
    """Of those, the first, in which the learning rate rises from 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """What AdamW adds to the root of the latter."""
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to 1-d parameters and tokens."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm; null does not clip."""

    @property
    def lr(self) -> float:
        """Peak learning rate (MAE, appendix A.1: linear scaling rule)."""
        return self.blr * self.batch_size / 256

    @model_validator(mode="after")
    def _schedule_fits(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.warmup_epochs:g}; expected less than optim.epochs={self.epochs:g}"
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr:g}; expected at most the peak learning rate {self.lr:g}"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"optim.batch_size={self.batch_size}; expected a multiple of "
                f"optim.accumulation={self.accumulation}"
            )
        return self


class TrainConfig(Section):
    """How the steps are computed."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Of initial weights, order, crops, masks and drops: the same seed is the same run."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto is bf16 where the hardware computes it, else fp32."""
    attention: Literal["auto", "xformers", "sdpa", "short", "matmul"] = "auto"
    """auto is PyTorch's fused attention (sdpa); in 16 bits on CUDA a kernel for up to 64 tokens, and sdpa for more
    (short); for bf16 on a CPU the same forwards and plain products backwards (matmul). xformers is memory-efficient
    too."""
    compile: bool = False
    """`torch.compile` each transformer block; ZeRO stages 0-2."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing it."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; null keeps none."""
    max_skipped_in_a_row: int = Field(20, gt=0)
    """Steps with a non-finite gradient that may follow each other before the run aborts."""
    max_steps: Positive | None = None
    """Stop after this many steps of the schedule, which stays as `optim.epochs` says."""
    profile: bool = False
    """Write a torch profiler trace of a few steps."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one device at this precision, for MFU; known GPUs need none."""


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every_steps: Positive | None = None
    """Save when so many steps are done; null goes by the clock alone."""
    every_minutes: float | None = Field(30, gt=0)
    """Save when so much time has passed since the last save; null goes by steps alone. The last step is saved too."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept."""


class LogConfig(Section):
    """What a run tells while it goes on."""

    every_steps: int = Field(20, gt=0)
    """Steps that a record of `metrics.jsonl` is the mean of."""
    tensorboard: bool = True
    """Write records and pictures for TensorBoard too, below the output folder."""
    wandb: bool = False
    """Send records to Weights & Biases too (`pip install wandb`)."""
    reconstruct_every_steps: Positive | None = None
    """Draw reconstructions this often, and at the end; null draws none."""
    images: str | None = None
    """Held-out images to reconstruct, a source like data.source; null uses the first ones of data.source."""
    n_images: int = Field(8, gt=0)
    """How many images are reconstructed."""
