"""MAE's networks and its kin's, one image at a time in float64, from a state dict by its names."""

import torch
from torch import Tensor, nn

from fastmim.models.position import sincos_positions
from tests.objectives.naive_vit import NaiveViT


class NaiveMAE(NaiveViT):
    """Mask tokens in the encoder, MAE's decoder, CrossMAE's, and the losses of pixels."""

    def decoder_positions(self) -> Tensor:
        return sincos_positions(self.config.objective.decoder_width, self.config.grid)[0, 1:].double()

    def fill(self, rows: Tensor, kept: list[int], name: str) -> Tensor:
        """cls and kept rows [1 + K, D] -> [1 + N, D], a mask token at every other position."""
        places = {patch: rows[1 + k] for k, patch in enumerate(kept)}
        token, patches = self.weights[f"{name}.mask_token"][0, 0], self.config.grid[0] * self.config.grid[1]
        return torch.stack([rows[0], *(places.get(patch, token) for patch in range(patches))])

    def encode_with_mask_tokens(self, image: Tensor, kept: list[int]) -> Tensor:
        """[1 + N, D], in the order of the image."""
        x = self.linear(self.patches(image)[kept], "encoder.patch_embed")
        x = self.fill(torch.cat([self.weights["encoder.cls_token"][0], x]), kept, "encoder")
        x = torch.cat([x[:1], x[1:] + self.positions])
        return self.norm(self.blocks(x, "encoder.blocks", self.config.model.depth), "encoder.norm")

    def encoder_layers(self, image: Tensor, kept: list[int]) -> list[Tensor]:
        """What enters the first block and what leaves each, [1 + K, D]."""
        x = self.linear(self.patches(image)[kept], "encoder.patch_embed") + self.positions[kept]
        x = torch.cat([self.weights["encoder.cls_token"][0], x])
        layers = [x]
        for depth in range(self.config.model.depth):
            layers.append(self.block(layers[-1], f"encoder.blocks.layers.{depth}"))
        return layers

    def block(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        x = x + self.linear(self.attend(q, k, v), f"{name}.attn.proj")
        return x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")

    def decode_mae(self, latent: Tensor, kept: list[int] | None, wanted: list[int], name="decoder") -> Tensor:
        """[1 + K, D], or [1 + N, D] where `kept` is None -> features of `wanted`."""
        x = self.linear(latent, f"{name}.embed")
        x = x if kept is None else self.fill(x, kept, name)
        x = torch.cat([x[:1], x[1:] + self.decoder_positions()])
        x = self.blocks(x, f"{name}.blocks", self.config.objective.decoder_depth)
        return self.norm(x[1:][wanted], f"{name}.norm")

    def decode_cross(self, layers: list[Tensor], wanted: list[int]) -> Tensor:
        """The encoder's layers -> features of `wanted`, which do not see each other."""
        x = self.weights["decoder.mask_token"][0] + self.decoder_positions()[wanted]
        for depth in range(self.config.objective.decoder_depth):
            name = f"decoder.layers.{depth}"
            shares = self.weights["decoder.mix.weight"][depth]
            context = sum(share * layer for share, layer in zip(shares, layers, strict=True))
            context = self.norm(context, f"{name}.norm_context")
            q = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.q")
            k, v = (self.linear(context, f"{name}.attn.{part}") for part in "kv")
            x = x + self.linear(self.attend(q, k, v), f"{name}.attn.proj")
            x = x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")
        return self.norm(x, "decoder.norm")

    def target(self, image: Tensor, ids: list[int], norm_pix: bool) -> Tensor:
        """Pixels of patches [M, P * P * C]."""
        values = self.patches(image)[ids]
        if not norm_pix:
            return values
        return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()


def images_of(config, batch: int = 3) -> Tensor:
    """Random uint8 images of a configuration's shape."""
    return torch.randint(0, 256, (batch, *config.data.image_size, config.data.channels), dtype=torch.uint8)


def ids_of(mask, sample: int) -> tuple[list[int], list[int]]:
    """The kept and removed patches of a sample."""
    return mask.ids_keep[sample].tolist(), mask.ids_mask[sample].tolist()


class StubTokenizer(nn.Module):
    """Tells a patch's token from the first byte of its first pixel."""

    tokens, channels = 16, 3

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = images.shape[1] // grid[0], images.shape[2] // grid[1]
        return images[:, ::height, ::width, 0].flatten(1).long() % self.tokens
