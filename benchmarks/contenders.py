"""One optimiser step of the same MAE, by this engine and by the public implementations, each as its users run it.

Peers compute bf16 under autocast, with float32 parameters and PyTorch's fused AdamW. They are given normalised float
images that were made before, and masks that they need not draw. This engine starts from bytes, as its loader gives
them, draws its masks, and steps through DeepSpeed, as `fastmim.trainer` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.exchange.layouts import MAE, Architecture, to_layout
from fastmim.exchange.outward import export_weights
from fastmim.exchange.weights import Weights, read_weights
from fastmim.masking import Mask, MaskSampler
from fastmim.models.attention import choose_attention
from fastmim.objectives import build_objective
from fastmim.optim import parameter_groups
from fastmim.precision import choose_precision
from fastmim.ranks import Ranks

OURS = "ours.safetensors"
TRANSFORMERS = "transformers"

Step = Callable[[], Tensor]
"""Makes one optimiser step and returns the loss before it, a scalar."""


@dataclass(frozen=True)
class Problem:
    """What every contender is given.

    Attributes:
        config: of the run; `optim.lr` is the learning rate of every step.
        precision: bf16 or fp32.
        batch: images in a step.
        weights: a folder that `write_weights` filled; without one this engine starts from random weights.
        mae_path: a clone of facebookresearch/mae, or None.
    """

    config: Config
    precision: str
    batch: int
    weights: Path | None = None
    mae_path: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where a single rank computes."""
        return Ranks().device

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Epochs and positions of the images, int64 [B] each."""
        positions = torch.arange(self.batch, device=self.device)
        return torch.zeros_like(positions), positions

    def mask(self) -> Mask:
        """The masks that the engine draws for these images."""
        return MaskSampler(self.config)(*self.places)

    def images(self) -> Tensor:
        """Random bytes [B, H, W, C]."""
        generator = torch.Generator().manual_seed(self.config.train.seed)
        shape = (self.batch, *self.config.data.image_size, self.config.data.channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)

    def pixels(self) -> Tensor:
        """The images as a peer's loader gives them: normalised float32 [B, C, H, W]."""
        data, device = self.config.data, self.device
        mean, std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
        return ((self.images() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def state(self) -> dict[str, Tensor]:
        """The initial weights in the layout of facebookresearch/mae."""
        tensors = read_weights(str(self.weights / OURS)).tensors
        return to_layout(tensors, MAE, Architecture.of(self.config, decoder=True), self.config)


def write_weights(config: Config, folder: Path) -> None:
    """Write initial weights, in our layout and as a folder of transformers."""
    torch.manual_seed(config.train.seed)
    parameters = build_objective(config).named_parameters()
    Weights({name: parameter.detach() for name, parameter in parameters}, config).save(folder / OURS)
    export_weights(str(folder / OURS), str(folder / TRANSFORMERS), TRANSFORMERS)


def fastmim(problem: Problem) -> Step:
    """This engine: what `Trainer._train_step` does to a batch."""
    from fastmim.engine import build_engine, start_distributed  # DeepSpeed is heavy, and the peers do without

    config, ranks = problem.config, Ranks()
    start_distributed(ranks)
    precision = choose_precision(problem.precision, ranks.device)
    attention = choose_attention(config.train.attention, ranks.device.type, precision)
    objective = build_objective(config, attention)
    if problem.weights is not None:
        objective.load_state_dict(read_weights(str(problem.weights / OURS)).tensors, strict=False)
    objective.compile_blocks()
    engine = build_engine(config, objective, precision, problem.batch)
    epochs, positions = problem.places
    batch = SimpleNamespace(images=problem.images(), epochs=epochs, positions=positions)

    def step() -> Tensor:
        loss = engine(batch)["loss"]
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def transformers(problem: Problem) -> Step:
    """`ViTMAEForPreTraining`, from the folder that our export wrote."""
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained(problem.weights / TRANSFORMERS)
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings", "pos_embed")):
            parameter.requires_grad_(False)  # fixed where a model is made, but not where it is loaded
    pixels, noise = problem.pixels(), problem.mask().ids_restore.float()
    return _plain_step(problem, model, lambda compiled: compiled(pixels, noise=noise).loss)


def lightly(problem: Problem) -> Step:
    """`lightly`'s parts, put together as in its documentation."""
    from benchmarks.peers_lightly import LightlyMAE, from_published, token_ids

    model = LightlyMAE(problem.config)
    model.load_state_dict(from_published(problem.state()), strict=False)
    pixels, ids = problem.pixels(), token_ids(problem.mask())
    return _plain_step(problem, model, lambda compiled: compiled(pixels, *ids))


def published(problem: Problem) -> Step:
    """facebookresearch/mae, from a clone."""
    from benchmarks.peers_published import build_published, given_noise

    assert problem.mae_path is not None
    model = build_published(problem.mae_path, problem.config)
    model.load_state_dict(problem.state())
    pixels, noise = problem.pixels(), problem.mask().ids_restore.float()

    def loss(compiled: Callable) -> Tensor:
        with given_noise(noise):
            return compiled(pixels, problem.config.mask.ratio)[0]

    return _plain_step(problem, model, loss)


def _plain_step(problem: Problem, model: nn.Module, loss: Callable[[Callable], Tensor]) -> Step:
    """A step of a plain PyTorch loop: autocast for bf16, fused AdamW, the groups and settings of the engine."""
    optim, device = problem.config.optim, problem.device
    model.train().to(device)
    compiled = torch.compile(model)
    groups = parameter_groups(model, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=problem.precision == "bf16"):
            value = loss(compiled)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


CONTENDERS: dict[str, Callable[[Problem], Step]] = {
    "fastmim": fastmim,
    "transformers": transformers,
    "lightly": lightly,
    "facebookresearch/mae": published,
}
IMPORTS = {
    fastmim: ("fastmim.engine", "torch.utils.cpp_extension"),  # DeepSpeed asks it for a compiler
    transformers: ("transformers.models.vit_mae.modeling_vit_mae",),
    lightly: ("benchmarks.peers_lightly",),
    published: ("benchmarks.peers_published",),
}
"""What each imports when it is built: a worker does it before, so that it does not count as memory."""
