"""The networks: a ViT encoder of visible patches, decoders, attention and positions."""

from fastmim.models.cross_decoder import CrossDecoder
from fastmim.models.decoder import MAEDecoder
from fastmim.models.encoder import Encoder
from fastmim.models.latent_decoder import LatentDecoder
from fastmim.models.regressor import Regressor

__all__ = ["CrossDecoder", "Encoder", "LatentDecoder", "MAEDecoder", "Regressor"]
