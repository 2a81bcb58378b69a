"""The networks: a ViT encoder of visible patches, decoders, attention and positions."""

from fastmim.models.decoder import MAEDecoder
from fastmim.models.encoder import Encoder

__all__ = ["Encoder", "MAEDecoder"]
