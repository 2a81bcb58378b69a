"""A teacher whose features are a target: any model of timm, with weights from a local file."""

import difflib
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim.config import Config
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.files import read_found
from fastmim.models.pixels import PixelScale


class Teacher(nn.Module):
    """Gives the features of images by a timm model: its class token, where it has one, and its patches.

    Args:
        model: that gives a sequence of tokens, or a map.
        projection: whether its last linear is applied to each of them.

    Attributes:
        has_cls: whether the first feature is of a class token.
        scale: the pixel statistics that the model was trained with.
    """

    def __init__(self, model: nn.Module, projection: bool = False):
        super().__init__()
        self.model = model
        self.projection = model.get_classifier() if projection else nn.Identity()
        self.has_cls = getattr(model, "cls_token", None) is not None
        self.prefix = getattr(model, "num_prefix_tokens", 0)
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.scale = PixelScale(list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"]))

    def forward(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Features of uint8 images [B, H, W, C].

        Args:
            images: grey ones are shown to the model as grey colours.
            dtype: of matrix products; the weights stay as they are.

        Returns:
            float [B, N, width], or [B, 1 + N, width] with a class token.
        """
        pixels = self.scale.normalize(images).permute(0, 3, 1, 2)
        with torch.autocast(images.device.type, dtype, enabled=dtype.itemsize == 2):
            features = self.model.forward_features(pixels)
            if features.ndim == 4:
                features = features.flatten(1, 2) if self.channels_last else features.flatten(2).mT
            elif self.prefix > self.has_cls:  # registers, and a distillation token
                features = torch.cat([features[:, : self.has_cls], features[:, self.prefix :]], dim=1)
            return self.projection(features)


def load_teacher(config: Config) -> Teacher:
    """The teacher that `target.teacher` names, at the size of the run's images.

    Raises:
        CheckpointError: `target.teacher_weights` cannot be read, or is of another model.
        ConfigError: timm has no such model, or it cannot read the run's images.
    """
    name, weights = config.target.teacher, config.target.teacher_weights
    projection = config.objective.project_teacher
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"target.teacher={name!r} is no model of timm; expected one of timm.list_models()"
            + (f", perhaps {', '.join(close)}" if close else "")
        )
    options = {} if projection else {"num_classes": 0}
    # Whatever the teacher draws, the student and its masks stay what they are; a random one is the same on all ranks.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            if timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
                options["img_size"] = config.data.image_size
            model = timm.create_model(name, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(_unusable(config, error)) from None
    channels = model.pretrained_cfg["input_size"][0]
    if config.data.channels not in (1, channels):
        raise ConfigError(
            f"target.teacher={name!r} reads images of {channels} channels; expected data.channels={channels} or 1"
        )
    if projection and not isinstance(model.get_classifier(), nn.Linear):
        raise ConfigError(
            f"objective.project_teacher=True with target.teacher={name!r}, which ends in no linear; expected False"
        )
    if weights != "random":
        _load_weights(model, config)
    return Teacher(model, projection)


def measure(teacher: Teacher, config: Config) -> tuple[int, int, int]:
    """How many features an image of the run has, their width, and the FLOPs, found out by one image.

    Raises:
        ConfigError: the model cannot read it.
    """
    image = torch.zeros(1, *config.data.image_size, config.data.channels, dtype=torch.uint8)
    teacher.eval()
    try:
        # The counter does not know every fused attention; the plain one is two matrix products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            features = teacher(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(_unusable(config, error)) from None
    return *features.shape[1:], counter.get_total_flops()


def _load_weights(model: nn.Module, config: Config) -> None:
    """Read `target.teacher_weights`, in timm's layout or open_clip's; nothing is resized."""
    path = config.target.teacher_weights
    state = read_found(Path(path)).state
    if "visual.class_embedding" in state:
        # The conversion would resize these.
        sizes = {
            "pos_embed": state["visual.positional_embedding"][None],
            "patch_embed.proj.weight": state["visual.conv1.weight"],
        }
        _check_sizes(sizes, model, config)
        state = checkpoint_filter_fn(state, model)
    wanted = model.state_dict()
    classifier = model.pretrained_cfg["classifier"]
    classifiers = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in state.items() if key in wanted or not key.startswith(classifiers)}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        found = [f"lacks {key}" for key in missing[:1]] + [f"holds {key}" for key in extra[:1]]
        raise CheckpointError(
            f"target.teacher_weights={path!r} {' and '.join(found)}; expected the weights of target.teacher="
            f"{config.target.teacher!r}, by timm's names"
        )
    _check_sizes(state, model, config)
    model.load_state_dict(state)


def _check_sizes(state: dict[str, Tensor], model: nn.Module, config: Config) -> None:
    for name, wanted in model.state_dict().items():
        if name in state and state[name].shape != wanted.shape:
            raise CheckpointError(
                f"target.teacher_weights={config.target.teacher_weights!r} has {name} "
                f"{list(state[name].shape)}; expected {list(wanted.shape)}, that of target.teacher="
                f"{config.target.teacher!r} for images of {list(config.data.image_size)}"
            )


def _unusable(config: Config, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    size = list(config.data.image_size)
    return f"target.teacher={config.target.teacher!r} cannot be used with data.image_size={size}: {reason}"
