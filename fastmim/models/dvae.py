"""The networks of DALL-E's discrete autoencoder: Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import linear_flops
from fastmim.models.recompute import recompute

GROUPS = 4
"""Groups of blocks, in DALL-E and in what is trained here: three changes of resolution, by 8 in all."""


class DVAEEncoder(nn.Module):
    """Images to logits over a vocabulary, one per square of `stride` pixels.

    A 7x7 convolution, groups of residual blocks of doubling width with 2x2 max-pools between them, and a 1x1
    convolution (appendix A.1).

    Args:
        channels: of the images.
        hidden: channels of the first group, a multiple of 4.
        blocks: residual blocks per group.
        tokens: size of the vocabulary.
        groups: of blocks.
        checkpointing: recompute each block in the backward pass instead of storing it.

    Attributes:
        stride: pixels per token and side.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        blocks: int,
        tokens: int,
        groups: int = GROUPS,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.channels, self.tokens, self.stride = channels, tokens, 2 ** (groups - 1)
        self.checkpointing = checkpointing
        widths = [hidden, *(hidden * 2**group for group in range(groups))]
        self.input = _convolution(channels, hidden, 7)
        self.groups = _groups(widths, blocks, (3, 3, 3, 1))
        self.output = _convolution(widths[-1], tokens, 1)

    @classmethod
    def of(cls, config: Config) -> "DVAEEncoder":
        """That of a run of objective dvae."""
        objective, checkpointing = config.objective, config.train.activation_checkpointing
        sizes = objective.hidden, objective.blocks_per_group, objective.tokens
        return cls(config.data.channels, *sizes, checkpointing=checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], sides multiples of `stride` -> logits [B, tokens, H / stride, W / stride]."""
        x = self.input(x)
        for number, group in enumerate(self.groups):
            x = _run(group, F.max_pool2d(x, 2) if number else x, self.checkpointing)
        return self.output(F.relu(x))

    def flops(self, height: int, width: int) -> int:
        """Of the forward pass of one image."""
        flops = convolution_flops(self.input, height, width)
        for number, group in enumerate(self.groups):
            flops += _group_flops(group, height >> number, width >> number)
        return flops + convolution_flops(self.output, height // self.stride, width // self.stride)


class DVAEDecoder(nn.Module):
    """Distributions over a vocabulary to images: the encoder's mirror, with nearest-neighbour up-sampling.

    Args:
        channels: of the images.
        hidden: channels of the last group, a multiple of 4.
        blocks: residual blocks per group.
        tokens: size of the vocabulary.
        code_width: width of a token's vector.
        checkpointing: recompute each block in the backward pass instead of storing it.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        blocks: int,
        tokens: int,
        code_width: int,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        widths = [code_width, *(hidden * 2**group for group in reversed(range(GROUPS)))]
        self.input = _convolution(tokens, code_width, 1)
        self.groups = _groups(widths, blocks, (1, 3, 3, 3))
        self.output = _convolution(hidden, channels, 1)

    @classmethod
    def of(cls, config: Config) -> "DVAEDecoder":
        """That of a run of objective dvae."""
        objective, checkpointing = config.objective, config.train.activation_checkpointing
        sizes = objective.hidden, objective.blocks_per_group, objective.tokens, objective.code_width
        return cls(config.data.channels, *sizes, checkpointing=checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, tokens, h, w], summing to 1 over the tokens -> images [B, C, 8 h, 8 w]."""
        x = self.input(x)
        for number, group in enumerate(self.groups):
            x = _run(group, F.interpolate(x, scale_factor=2) if number else x, self.checkpointing)
        return self.output(F.relu(x))

    def flops(self, height: int, width: int) -> int:
        """Of the forward pass of one image of h x w tokens."""
        flops = convolution_flops(self.input, height, width)
        for number, group in enumerate(self.groups):
            flops += _group_flops(group, height << number, width << number)
        return flops + convolution_flops(self.output, height << GROUPS - 1, width << GROUPS - 1)


class ResidualBlock(nn.Module):
    """Four convolutions, each after a ReLU, beside a shortcut; their sum is scaled by `gain`.

    Args:
        inputs, outputs: channels.
        kernels: sides of the four kernels.
        gain: of the convolutions against the shortcut; 1 / (number of blocks in the network)**2.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        widths = [inputs, *[outputs // 4] * (len(kernels) - 1), outputs]
        self.gain = gain
        self.shortcut = _convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.convolutions = nn.ModuleList(map(_convolution, widths[:-1], widths[1:], kernels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, h, w] -> [B, outputs, h, w]."""
        change = x
        for convolution in self.convolutions:
            change = convolution(F.relu(change))
        return self.shortcut(x) + self.gain * change


def convolution_flops(convolution: nn.Conv2d, height: int, width: int) -> int:
    """Of a convolution with a result of this size."""
    inputs = math.prod(convolution.kernel_size) * convolution.in_channels
    return linear_flops(height * width, inputs, convolution.out_channels)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(convolution.weight, std=(inputs * kernel**2) ** -0.5)
    nn.init.zeros_(convolution.bias)
    return convolution


def _groups(widths: list[int], blocks: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """One group for each width after the first, whose first block changes the width."""
    gain = (len(widths[1:]) * blocks) ** -2
    return nn.ModuleList(
        nn.ModuleList(
            ResidualBlock(outputs if block else inputs, outputs, kernels, gain) for block in range(blocks)
        )
        for inputs, outputs in pairwise(widths)
    )


def _run(group: nn.ModuleList, x: Tensor, checkpointing: bool) -> Tensor:
    for block in group:
        x = recompute(block, x) if checkpointing else block(x)
    return x


def _group_flops(group: nn.ModuleList, height: int, width: int) -> int:
    convolutions = (module for module in group.modules() if isinstance(module, nn.Conv2d))
    return sum(convolution_flops(convolution, height, width) for convolution in convolutions)
