"""Discrete visual tokens: BEiT (Bao et al., ICLR 2022), CAE (Chen et al., IJCV 2024), MAE's Table 1d."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.flops import linear_flops
from fastmim.kernels import masked_cross_entropy
from fastmim.models.pixels import PixelScale
from fastmim.targets.frozen import Frozen
from fastmim.targets.head import Head, Prediction
from fastmim.targets.tokenizer import load_tokenizer


class TokenHead(Head):
    """A linear classifier over a tokenizer's vocabulary, compared with each patch's token by cross-entropy.

    The head owns its weights itself: beside a loss, logits exist only inside the fused operation, and
    `Prediction.pred` is None.

    Args:
        config: of the run.
        width: of the features.
        scale: pixel statistics; the tokenizer has its own.

    Attributes:
        tokenizer: gives the labels; frozen, in float32, no part of this module's parameters.

    Raises:
        CheckpointError: no tokenizer at `target.tokenizer`.
        ConfigError: it reads images of other channels.
    """

    def __init__(self, config: Config, width: int, scale: PixelScale):
        super().__init__()
        source = config.target.tokenizer
        assert source is not None, "the configuration was checked"
        tokenizer = load_tokenizer(source)
        if tokenizer.channels != config.data.channels:
            raise ConfigError(
                f"target.tokenizer={source!r} reads images of {tokenizer.channels} channels; expected "
                f"data.channels={config.data.channels}"
            )
        self.grid, self.width, self.outputs = config.grid, width, tokenizer.tokens
        self.tokenizer = Frozen(tokenizer)
        self.weight = nn.Parameter(torch.empty(self.outputs, width))
        self.bias = nn.Parameter(torch.zeros(self.outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, images: Tensor | None, ids: Tensor) -> Prediction:
        """Compare with the tokens of the images' patches `ids`; without images, give the logits."""
        if images is None:
            return Prediction(None, None, F.linear(x, self.weight, self.bias))
        labels = self.tokenizer(images, self.grid).gather(1, ids)
        loss, per_row = masked_cross_entropy(x.flatten(0, 1), self.weight, self.bias, labels.flatten())
        return Prediction(loss, per_row.view(ids.shape), None)

    def frozen(self) -> dict[str, Frozen]:
        """The tokenizer."""
        return {"target.tokenizer": self.tokenizer}

    def flops(self, patches: int) -> int:
        """Of the classifier over this many patches; the tokenizer, which is not trained, is not counted."""
        return linear_flops(patches, self.width, self.outputs)
