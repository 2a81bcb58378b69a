"""An encoder with a linear head, of which all or the last blocks are trained, and the groups of its optimiser."""

from typing import Any

from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.evaluate.features import everything
from fastmim.exchange.layouts import TIMM, Architecture, to_layout
from fastmim.models import Encoder
from fastmim.models.attention import choose_attention
from fastmim.models.blocks import LayerNorm
from fastmim.models.position import resize_positions
from fastmim.optim import TOKENS

_HEAD_STD = 2e-5


class Classifier(nn.Module):
    """Logits of whole images.

    Args:
        encoder: is changed: its last norm becomes the classifier's.
        patches: in an image.
        classes: C.
        pool: mean puts a norm of its own over the mean of the patches; cls takes the encoder's norm over the cls token.
        blocks: what is trained: 0 the head (a norm of its own included), 0.5 also the last norm and the MLP of the last
            block, n also the last n blocks; all of them, or None, everything.

    Source: MAE, appendix A.1 and figure 9.
    """

    def __init__(self, encoder: Encoder, patches: int, classes: int, pool: str, blocks: float | None = None):
        super().__init__()
        width = encoder.norm.normalized_shape[0]
        self.pool, self._patches = pool, patches
        self.encoder, self.norm = encoder, LayerNorm(width) if pool == "mean" else encoder.norm
        self.encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self._trained = self._choose(blocks)
        self.requires_grad_(False)
        for module in self._trained:
            module.requires_grad_(True)

    def _choose(self, blocks: float | None) -> list[nn.Module]:
        layers = self.encoder.blocks.layers
        if blocks is None or blocks == len(layers):
            return [self.encoder, self.norm, self.head]
        if blocks == 0:
            return [self.norm, self.head] if self.pool == "mean" else [self.head]
        if blocks == 0.5:
            last: Any = layers[-1]
            return [last.norm2, last.mlp, last.drop_path2, self.norm, self.head]
        return [*layers[len(layers) - int(blocks) :], self.norm, self.head]

    def train(self, mode: bool = True) -> "Classifier":
        """What is frozen stays in evaluation mode: no path of it is dropped."""
        super().train(False)
        self.training = mode
        for module in self._trained:
            module.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, H, W, C], uint8 or float where white is 1.

        Nothing is stored for the backward pass below the first block that is trained: no input of it needs gradients.
        """
        tokens = self.encoder(images, everything(len(images), self._patches, images.device))
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(1)
        return self.head(self.norm(pooled))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The layers of learning rates, for timm: the embedding, each block, and the rest."""
        return {
            "stem": r"encoder\.(?:patch_embed|cls_token|pos_embed)",
            "blocks": r"encoder\.blocks\.layers\.(\d+)",
        }


def finetuned_config(trained: Config, image_size: tuple[int, int], drop_path: float) -> Config:
    """The configuration of an encoder, for images of another size and another stochastic depth.

    Fixed positions stay those of the grid that it was trained with, resized.
    """
    changes: dict[str, dict[str, Any]] = {
        "data": {"image_size": image_size},
        "model": {"drop_path": drop_path, "positions_grid": trained.positions_grid},
        "train": {"activation_checkpointing": False},
    }
    return trained.model_copy(
        update={name: getattr(trained, name).model_copy(update=change) for name, change in changes.items()}
    )


def copy_encoder(encoder: Encoder, old: tuple[int, int], config: Config, precision: str) -> Encoder:
    """An encoder that starts from the weights of another, which stay as they are.

    Args:
        encoder: trained.
        old: its patches per column and row.
        config: of the copy, from `finetuned_config`; positions are resized to its grid.
        precision: that it will be computed in; attention is chosen by it.
    """
    tensors = {name: value for name, value in encoder.state_dict().items() if name != "mask_token"}
    if "pos_embed" in tensors:
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], old, config.grid)
    device = encoder.cls_token.device
    copy = Encoder(config, encoder.scale, choose_attention("auto", device.type, precision)).to(device)
    copy.load_state_dict(tensors)
    return copy


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """What is trained, for AdamW; each group's `lr_scale` is `layer_decay` to the number of layers above it.

    Args:
        model: with timm's `group_matcher`.
        weight_decay: of matrices.
        layer_decay: from a layer to the one below it.

    Source: BEiT, in the form that MAE fine-tunes with: the embedding is layer 0, block i layer i + 1, the last norm
        and the head are the layer above all blocks; 1-d parameters, tokens and positions do not decay.
    """
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=[f"*{name}" for name in TOKENS], layer_decay=layer_decay
    )


def timm_tensors(model: Classifier, config: Config) -> dict[str, Tensor]:
    """A classifier's weights by timm's names, as `timm.create_model` loads them.

    Args:
        model: a classifier.
        config: of its encoder.
    """
    tensors = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    tensors |= {f"encoder.norm.{name}": value for name, value in model.norm.state_dict().items()}
    state = to_layout(tensors, TIMM, Architecture.of(config, decoder=False), config)
    if model.pool == "mean":
        state = {
            name.replace("norm.", "fc_norm.", 1) if name.startswith("norm.") else name: value
            for name, value in state.items()
        }
    state |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
