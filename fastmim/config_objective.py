"""The part of the configuration that says what is learned: objectives, and what they predict."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastmim.schema import Fraction, Section, require_heads

TargetKind = Literal["pixels", "pca", "tokens", "features"]

DVAE_STRIDE = 8
"""Pixels per side of a token of objective dvae: three down-samplings by 2."""


class _WithDecoder(Section):
    """An objective whose decoder has a width of its own."""

    decoder_width: int = Field(512, gt=0)
    """Token dimension of the decoder."""
    decoder_depth: int = Field(8, gt=0)
    """Its number of blocks."""
    decoder_heads: int = Field(16, gt=0)
    """Attention heads of each."""

    @model_validator(mode="after")
    def _heads_divide_width(self):
        require_heads("objective.decoder", self.decoder_width, self.decoder_heads, joiner="_")
        if self.decoder_width % 4:
            raise ValueError(
                f"objective.decoder_width={self.decoder_width}; expected a multiple of 4 (2-d sin-cos positions)"
            )
        return self


class MAEConfig(_WithDecoder):
    """The masked autoencoder (He et al., CVPR 2022) and its ablations."""

    name: Literal["mae"] = "mae"
    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and (unbiased) variance; pixel targets only."""
    mask_token_in_encoder: bool = False
    """The encoder sees all N tokens, removed ones as a learned token (MAE, Table 1c): the costly baseline."""
    decoder: Literal["self", "cross"] = "self"
    """self: MAE's. cross: cross-attention from removed positions to the encoder's layers (CrossMAE, TMLR 2025)."""
    kept_mask_ratio: float | None = Field(None, gt=0, lt=1)
    """Share of all patches that the cross decoder predicts, at most `mask.ratio`; null predicts every removed one."""

    @model_validator(mode="after")
    def _cross_options(self):
        if self.decoder == "cross" and self.mask_token_in_encoder:
            raise ValueError(
                "objective.decoder='cross' with objective.mask_token_in_encoder=True; expected one of the two: "
                "the cross decoder reads visible tokens only"
            )
        if self.decoder == "self" and self.kept_mask_ratio is not None:
            raise ValueError(
                f"objective.kept_mask_ratio={self.kept_mask_ratio:g} with objective.decoder='self'; expected 'cross'"
            )
        return self


class SimMIMConfig(Section):
    """Mask tokens in the encoder, a linear head, L1 on pixels (Xie et al., CVPR 2022)."""

    name: Literal["simmim"] = "simmim"
    norm_pix_loss: bool = False
    """Predict each patch normalised by its own mean and (unbiased) variance."""


class BEiTConfig(Section):
    """Mask tokens in the encoder, a linear head, cross-entropy on visual tokens (Bao et al., ICLR 2022)."""

    name: Literal["beit"] = "beit"


class CAEConfig(Section):
    """The context autoencoder (Chen et al., IJCV 2024): regressor, decoder, alignment."""

    name: Literal["cae"] = "cae"
    regressor_depth: int = Field(4, gt=0)
    """Cross-attention blocks from removed positions to visible tokens, of the encoder's width."""
    decoder_depth: int = Field(4, gt=0)
    """Self-attention blocks over removed positions, of the encoder's width."""
    align_weight: float = Field(2.0, ge=0)
    """Weight of the alignment (lambda); 0 leaves it and the encoder's second pass out."""
    norm_pix_loss: bool = True
    """With target.kind=pixels: predict each patch normalised by its own mean and (unbiased) variance."""


class CAEv2Config(Section):
    """CAE v2 (Zhang et al., TMLR 2023): cosine distance to a frozen teacher on cls, visible and removed positions."""

    name: Literal["cae_v2"] = "cae_v2"
    regressor_depth: int = Field(4, gt=0)
    """Cross-attention blocks from removed positions to visible tokens, of the encoder's width."""
    project_teacher: bool = False
    """Compare with what the teacher's last linear makes of each token: CLIP's projection, 512 values for ViT-B."""


class _Siamese(_WithDecoder):
    """Two encodings of an image by complementary masks (Kong & Zhang, CVPR 2023)."""

    share_decoder: bool = False
    """One decoder for both branches, in place of two. The paper's choice is not known to us."""
    stop_gradient: bool = False
    """The second branch is a constant for the comparison. The paper's choice is not known to us."""


class RMAEConfig(_Siamese):
    """R-MAE ("RelaxMIM"): two predictions of the removed patches agree, and the second rebuilds them."""

    name: Literal["r_mae"] = "r_mae"
    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and (unbiased) variance."""
    rebuild_weight: float = Field(1.0, gt=0)
    """Weight of the second branch's reconstruction (lambda), without which both would agree on a constant. The
    paper's value is not known to us."""


class CMAEConfig(_Siamese):
    """C-MAE: InfoNCE between the two branches' outputs at removed positions."""

    name: Literal["c_mae"] = "c_mae"
    temperature: float = Field(0.1, gt=0)
    """Of the similarities. The paper's value is not known to us."""
    projection: int = Field(256, gt=0)
    """Width of what is compared. The paper's value is not known to us."""

    @model_validator(mode="after")
    def _every_network_learns(self):
        if self.stop_gradient and not self.share_decoder:
            raise ValueError(
                "objective.stop_gradient=True with objective.share_decoder=False; expected share_decoder=True: "
                "nothing would train the second decoder"
            )
        return self


class DVAEConfig(Section):
    """A discrete variational autoencoder (Ramesh et al., ICML 2021): the tokenizer of `target.kind=tokens`.

    It masks nothing and has no ViT: of `model` and `mask` nothing is read.
    """

    name: Literal["dvae"] = "dvae"
    tokens: int = Field(8192, gt=1)
    """Size of the vocabulary."""
    hidden: int = Field(256, gt=0, multiple_of=4)
    """Channels of the first group; each of the three down-samplings by 2 doubles them."""
    blocks_per_group: int = Field(2, gt=0)
    """Residual blocks of each of the four groups of the encoder, and of the decoder."""
    code_width: int = Field(128, gt=0)
    """Width of a code word in the decoder."""
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Of the Gumbel softmax, at the start and after `anneal`."""
    anneal: Fraction = 0.5
    """Share of the run over which the temperature falls and the KL weight rises, as a cosine."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight, after `anneal`, of the KL divergence to uniform tokens: nats per token against error per value."""
    loss: Literal["mse", "l1"] = "mse"
    """Reconstruction error of normalised pixels."""

    @model_validator(mode="after")
    def _temperatures_fall(self):
        first, last = self.temperature
        if not first >= last > 0:
            raise ValueError(f"objective.temperature={list(self.temperature)}; expected first >= last > 0")
        return self


OBJECTIVES = {
    section.model_fields["name"].default: section
    for section in (
        MAEConfig,
        SimMIMConfig,
        BEiTConfig,
        CAEConfig,
        CAEv2Config,
        RMAEConfig,
        CMAEConfig,
        DVAEConfig,
    )
}


def _name_or_mae(values: Any) -> Any:
    return {"name": "mae", **values} if isinstance(values, dict) else values


if TYPE_CHECKING:
    ObjectiveConfig = Any  # a module reads the keys of its own objective, which a union would refuse
else:
    ObjectiveConfig = Annotated[
        MAEConfig
        | SimMIMConfig
        | BEiTConfig
        | CAEConfig
        | CAEv2Config
        | RMAEConfig
        | CMAEConfig
        | DVAEConfig,
        Field(discriminator="name"),
        BeforeValidator(_name_or_mae),
    ]

# What each objective can predict, its own first.
TARGETS: dict[str, tuple[TargetKind, ...]] = {
    "mae": ("pixels", "pca", "tokens"),
    "simmim": ("pixels",),
    "beit": ("tokens",),
    "cae": ("tokens", "pixels"),
    "cae_v2": ("features",),
    "r_mae": ("pixels",),
    "c_mae": (),
    "dvae": (),
}

# Those that rebuild images, where their target is made of pixels.
REBUILDING = ("mae", "simmim", "cae", "r_mae", "dvae")


class TargetConfig(Section):
    """What is predicted."""

    kind: TargetKind | None = None
    """pixels, pca (coefficients of a patch), tokens (of a discrete VAE), features (of a teacher); null is the
    objective's own."""
    components: int = Field(96, gt=0)
    """pca: coefficients per patch, at most its values."""
    fit_images: int = Field(1024, gt=0)
    """pca: images whose patches the basis is fitted on."""
    tokenizer: str | None = None
    """tokens: a run or checkpoint of objective dvae, or the file of DALL-E's released encoder."""
    teacher: str | None = None
    """features: the name of a timm model, or, without `teacher_weights`, a run or weights file of this engine."""
    teacher_weights: str | None = None
    """features: of the timm model, a .safetensors or .pth file; `random` initialises it at random, for tests."""
