"""A ViT, CAE's regressor and its decoder, one image at a time in float64, from a state dict by its names."""

import math

import torch
from torch import Tensor

from fastmim.models.position import sincos_positions


class NaiveViT:
    """The networks of an objective, transcribed from the formulas.

    Attributes:
        weights: float64 leaves, by the objective's parameter names.
    """

    def __init__(self, objective):
        self.config = objective.config
        self.weights = {n: p.detach().double().requires_grad_() for n, p in objective.named_parameters()}
        self.heads = self.config.model.heads
        self.positions = sincos_positions(self.config.model.width, self.config.grid)[0, 1:].double()

    def patches(self, image: Tensor) -> Tensor:
        """uint8 [H, W, C] -> normalised [N, P * P * C]."""
        size, (rows, columns) = self.config.model.patch_size, self.config.grid
        mean, std = torch.tensor(self.config.data.mean), torch.tensor(self.config.data.std)
        pixels = ((image / 255 - mean) / std).double()
        windows = [
            pixels[r * size : (r + 1) * size, c * size : (c + 1) * size].flatten()
            for r in range(rows)
            for c in range(columns)
        ]
        return torch.stack(windows)

    def encode(self, image: Tensor, kept: list[int]) -> Tensor:
        """cls and the kept patches, [1 + K, D]."""
        x = self.linear(self.patches(image)[kept], "encoder.patch_embed") + self.positions[kept]
        x = torch.cat([self.weights["encoder.cls_token"][0], x])
        return self.norm(self.blocks(x, "encoder.blocks", self.config.model.depth), "encoder.norm")

    def regress(self, latent: Tensor, kept: list[int], removed: list[int]) -> Tensor:
        """[1 + K, D] of the encoder -> [M, D]."""
        visible, places = latent[1:], self.positions[kept + removed]
        x = self.weights["regressor.mask_token"][0].expand(len(removed), -1)
        for layer in range(self.config.objective.regressor_depth):
            name = f"regressor.layers.{layer}"
            context = torch.cat([visible, x])
            q = self.linear(self.norm(x + self.positions[removed], f"{name}.norm_q"), f"{name}.attn.q")
            k = self.linear(self.norm(context + places, f"{name}.norm_k"), f"{name}.attn.k")
            v = self.linear(self.norm(context, f"{name}.norm_v"), f"{name}.attn.v")
            x = x + self.linear(self.attend(q, k, v), f"{name}.attn.proj")
            x = x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")
        return self.norm(x, "regressor.norm")

    def decode(self, latents: Tensor, removed: list[int]) -> Tensor:
        """[M, D] of the regressor -> [M, D]."""
        x = latents + self.positions[removed]
        return self.norm(
            self.blocks(x, "decoder.blocks", self.config.objective.decoder_depth), "decoder.norm"
        )

    def blocks(self, x: Tensor, name: str, depth: int) -> Tensor:
        for layer in range(depth):
            inner = f"{name}.layers.{layer}"
            q, k, v = self.linear(self.norm(x, f"{inner}.norm1"), f"{inner}.attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(q, k, v), f"{inner}.attn.proj")
            x = x + self.mlp(self.norm(x, f"{inner}.norm2"), f"{inner}.mlp")
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for a, b, c in zip(*(x.chunk(self.heads, -1) for x in (q, k, v)), strict=True):
            scores = (a @ b.T / math.sqrt(a.shape[-1])).exp()
            outputs.append(scores / scores.sum(-1, keepdim=True) @ c)
        return torch.cat(outputs, -1)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        x = self.linear(x, f"{name}.fc1")
        return self.linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, f"{name}.fc2")

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


def randomise(objective) -> None:
    """Random weights everywhere: norms of 1 and biases of 0 would hide an exchange."""
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def assert_gradients(objective, naive: NaiveViT) -> None:
    """Both have made their backward pass; every gradient agrees."""
    total = sum(weight.grad.square().sum() for weight in naive.weights.values()).sqrt()
    for name, parameter in objective.named_parameters():
        want = naive.weights[name].grad
        error = (parameter.grad - want).norm()
        # The gradient of a key's bias is 0, and rounding noise here.
        assert error <= 1e-4 * want.norm() + 1e-6 * total, f"{name}: {error:.2e} of {want.norm():.2e}"
