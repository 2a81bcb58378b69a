"""What the tests of exchange share: random weights, and an MAE whose names are those of facebookresearch/mae."""

from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from fastmim.exchange.weights import Weights
from fastmim.masking import mask_from_order
from fastmim.objectives import build_objective


def random_objective(config):
    """An objective in which no two tensors are alike, norms and biases included."""
    torch.manual_seed(0)
    objective = build_objective(config).eval()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + 0.01)
    return objective


def saved(objective, config, path):
    """The objective as a weights file of ours."""
    tensors = {name: parameter.detach() for name, parameter in objective.named_parameters()}
    Weights(tensors, config, {"step": "7"}).save(path)
    return path


def images_of(config, count=2):
    return torch.randint(0, 256, (count, *config.data.image_size, config.data.channels), dtype=torch.uint8)


def pixels_of(images, config):
    """Normalised float images [B, C, H, W], as other libraries want them."""
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def whole_features(objective, images):
    """The encoder's tokens when nothing is removed."""
    patches = objective.patches
    mask = mask_from_order(torch.arange(patches).expand(len(images), -1), patches)
    with torch.no_grad():
        return objective.encoder(images, mask)


_norm = partial(nn.LayerNorm, eps=1e-6)


class PublicMAE(nn.Module):
    """The published model, written down from its description; its attributes have the published names."""

    def __init__(self, config):
        super().__init__()
        model, objective, size = config.model, config.objective, config.model.patch_size
        patches = config.grid[0] * config.grid[1]
        inner = objective.decoder_width
        self.size, self.keep = size, int(patches * (1 - config.mask.ratio))
        self.norm_pix_loss = objective.norm_pix_loss
        self.patch_embed = PatchEmbed(config.data.image_size, size, config.data.channels, model.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, model.width))
        self.blocks = nn.ModuleList(
            Block(model.width, model.heads, model.mlp_ratio, qkv_bias=True, norm_layer=_norm)
            for _ in range(model.depth)
        )
        self.norm = _norm(model.width)
        self.decoder_embed = nn.Linear(model.width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, inner))
        self.decoder_blocks = nn.ModuleList(
            Block(inner, objective.decoder_heads, 4, qkv_bias=True, norm_layer=_norm)
            for _ in range(objective.decoder_depth)
        )
        self.decoder_norm = _norm(inner)
        self.decoder_pred = nn.Linear(inner, size * size * config.data.channels)

    def forward(self, pixels, order):
        """Mean error of the patches beyond the first `keep` of `order`, int64 [B, N]; pixels [B, C, H, W]."""
        keep, restore = order[:, : self.keep], order.argsort(dim=1)
        x = self.patch_embed(pixels) + self.pos_embed[:, 1:]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = self.mask_token.expand(len(x), order.shape[1] - self.keep, -1)
        rest = torch.cat([x[:, 1:], tokens], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], rest], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        batch, channels, height, width = pixels.shape
        target = pixels.reshape(
            batch, channels, height // self.size, self.size, width // self.size, self.size
        )
        target = target.permute(0, 2, 4, 3, 5, 1).reshape(pred.shape)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        removed = restore >= self.keep
        return ((pred - target) ** 2).mean(-1)[removed].mean()


def randomised(model):
    """A peer with random weights; its position tables stay as they are."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def published(config):
    """A public MAE of random weights, with the fixed tables that it was published with."""
    peer, objective = randomised(PublicMAE(config)), build_objective(config)
    peer.pos_embed.data.copy_(objective.encoder.pos_embed)
    peer.decoder_pos_embed.data.copy_(objective.decoder.pos_embed)
    return peer
