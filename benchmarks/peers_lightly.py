"""MAE from the parts that `lightly` offers for it, put together as its documentation does."""

import torch
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.masking import Mask


class LightlyMAE(nn.Module):
    """lightly's encoder and decoder, with the linears between and behind them.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config):
        super().__init__()
        model, objective = config.model, config.objective
        vit = VisionTransformer(
            config.data.image_size,
            model.patch_size,
            config.data.channels,
            num_classes=0,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.heads,
            mlp_ratio=model.mlp_ratio,
        )
        self.patch_size = model.patch_size
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(model.width, objective.decoder_width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=objective.decoder_width,
            depth=objective.decoder_depth,
            num_heads=objective.decoder_heads,
        )
        self.decoder_pred = nn.Linear(objective.decoder_width, model.patch_size**2 * config.data.channels)
        # Of the encoder, which sees no mask token here.
        self.backbone.mask_token.requires_grad_(False)

    def forward(self, pixels: Tensor, idx_keep: Tensor, idx_mask: Tensor) -> Tensor:
        """The loss. pixels float32 [B, C, H, W], token ids int64, of which 0 is the cls token's."""
        encoded = self.decoder_embed(self.backbone.encode(images=pixels, idx_keep=idx_keep))
        shape = len(pixels), self.backbone.sequence_length
        tokens = utils.repeat_token(self.decoder.mask_token, shape)
        tokens = utils.set_at_index(tokens, idx_keep, encoded.type_as(tokens))
        predicted = self.decoder_pred(utils.get_at_index(self.decoder(tokens), idx_mask))
        target = utils.get_at_index(utils.patchify(pixels, self.patch_size), idx_mask - 1)
        return nn.functional.mse_loss(predicted, target)


def token_ids(mask: Mask) -> tuple[Tensor, Tensor]:
    """What lightly calls idx_keep and idx_mask, int64 [B, 1 + K] and [B, M]."""
    cls = torch.zeros_like(mask.ids_keep[:, :1])
    return torch.cat([cls, mask.ids_keep + 1], dim=1), mask.ids_mask + 1


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/mae's names as those of `LightlyMAE`."""
    own = ("decoder_embed.", "decoder_pred.")
    decoder = {"mask_token": "decoder.mask_token"}
    renamed = {}
    for name, tensor in state.items():
        if name in decoder:
            renamed[decoder[name]] = tensor
        elif name.startswith(own):
            renamed[name] = tensor
        elif name.startswith("decoder_"):
            renamed[name.replace("decoder_", "decoder.", 1)] = tensor
        else:
            renamed[f"backbone.vit.{name}"] = tensor
    return renamed
