"""What each protocol can be told by `key=value` words. Imports no torch: a check is quick."""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.schema import Fraction, Numbers, Positive, Section


class EvaluationConfig(Section):
    """What every protocol is told, whatever its images and labels are."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Of every draw."""

    @property
    def unused(self) -> set[str]:
        """Fields that have no part in the result."""
        return set()

    def resolved(self, trained: Config) -> Self:
        """With what follows from the encoder filled in; this is what eval.json tells.

        Args:
            trained: the configuration that the encoder was trained with.

        Raises:
            ConfigError: a value that the encoder does not allow.
        """
        return self


class ProtocolConfig(EvaluationConfig):
    """What every classification is told."""

    labels: str | None = None
    """Labels of --data that its folders or shards do not give: an .npy of integers [n] for an .npy source, or a CSV
    with the columns file,label."""
    test_labels: str | None = None
    """Likewise of --test; `labels` itself unless given, where that is a CSV."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class of --data that is the test set where there is no --test."""
    pool: Literal["cls", "mean", "quadrants"] = "cls"
    """The feature of an image, after the encoder's last norm: its cls token, the mean over its patches, or the means
    over those of its four quarters, one after the other."""
    center: float = Field(224 / 256, gt=0, le=1)
    """Side of the centre crop over that of the largest one that fits; 224/256 is the custom on ImageNet."""
    images_at_once: int = Field(64, gt=0)
    """Images in a forward pass of the encoder."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Of a frozen encoder, whose features are float32 in any case; auto is bf16 where the hardware computes it."""

    @property
    def unused(self) -> set[str]:
        """Where labels lie, and how many images are computed at once."""
        return super().unused | {"labels", "test_labels", "images_at_once"}

    def resolved(self, trained: Config) -> Self:
        """With the number format of this machine."""
        from fastmim.precision import choose_precision  # loads torch
        from fastmim.ranks import Ranks

        return self.model_copy(update={"precision": choose_precision(self.precision, Ranks().device)})


class KnnConfig(ProtocolConfig):
    """Weighted nearest neighbours (Wu et al., CVPR 2018; the settings are those of DINO, Caron et al., ICCV 2021)."""

    k: int = Field(20, gt=0)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""


class ViewsConfig(ProtocolConfig):
    """Classifiers that are trained on random views of the images, several side by side."""

    batch_size: int = Field(gt=1)
    """Images per step."""
    epochs: Positive | None = 90
    warmup_epochs: float = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop over the image's area, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of each training class that chooses among several values of a sweep, and is not trained on then."""

    @property
    @abstractmethod
    def swept(self) -> str:
        """The field whose values are tried side by side."""

    @property
    def unused(self) -> set[str]:
        """Also `validation` where there is one candidate."""
        return super().unused | ({"validation"} if len(getattr(self, self.swept)) == 1 else set())

    @model_validator(mode="after")
    def _chooses_among_several(self):
        values = getattr(self, self.swept)
        if "validation" in self.model_fields_set and len(values) == 1:
            raise ValueError(
                f"validation={self.validation:g} with {self.swept}={values}; expected several to choose from"
            )
        return self

    @model_validator(mode="after")
    def _ranges_fit(self):
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g}; expected less than epochs={self.epochs}")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={list(self.scale)}; expected 0 < lowest <= highest <= 1")
        return self


class LinearConfig(ViewsConfig):
    """Linear probing (MAE, appendix A.1 and table 10), or `solver=exact` for small sets."""

    solver: Literal["lars", "exact"] = "lars"
    """lars trains on augmented images; exact solves for centre crops."""
    epochs: Positive | None = None
    """The paper's unless given: 50 from 24 blocks on (ViT-L and H), else 90."""
    blr: Numbers = [0.1]
    """Base learning rates per 256 images, each with a head of its own; of several, `validation` chooses."""
    batch_size: int = Field(16384, gt=1)
    """Images per step; the learning rates are blr x batch_size / 256."""
    l2: Numbers = [1e-3]
    """Weight of half the squared norm of the coefficients beside the mean loss; of several, `validation` chooses."""
    max_iterations: int = Field(1000, gt=0)
    """Of L-BFGS."""

    _OF_SOLVER: ClassVar[dict[str, list[str]]] = {
        "lars": ["blr", "batch_size", "epochs", "warmup_epochs", "momentum", "weight_decay", "scale", "flip"],
        "exact": ["l2", "max_iterations"],
    }

    @property
    def swept(self) -> str:
        """That of the solver."""
        return "blr" if self.solver == "lars" else "l2"

    def resolved(self, trained: Config) -> Self:
        """Also with the paper's epochs for the encoder's depth."""
        told = super().resolved(trained)
        if self.epochs is not None or self.solver != "lars":
            return told
        epochs = 50 if trained.model.depth >= 24 else 90
        if self.warmup_epochs >= epochs:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs:g}; expected less than the {epochs} epochs of an encoder of "
                f"{trained.model.depth} blocks, or epochs=..."
            )
        return told.model_copy(update={"epochs": epochs})

    @model_validator(mode="after")
    def _belongs_to_solver(self):
        for solver, keys in self._OF_SOLVER.items():
            given = [key for key in keys if key in self.model_fields_set]
            if solver != self.solver and given:
                value = getattr(self, given[0])
                raise ValueError(
                    f"{given[0]}={value!r} with solver={self.solver!r}; expected solver={solver!r}"
                )
        return self

    @property
    def unused(self) -> set[str]:
        """Also those of the other solver."""
        others = {key for solver, keys in self._OF_SOLVER.items() if solver != self.solver for key in keys}
        return super().unused | others


class AttentiveConfig(ViewsConfig):
    """Attentive probing (CAE, section 4.1): a learned query looks over the patches before the linear layer."""

    pool: Literal["patches"] = "patches"
    """What the query looks over; the cls token is left out."""
    epochs: Positive = 90
    heads: Positive | None = None
    """Of the cross-attention; the encoder's unless given."""
    lr: Numbers = [0.4]
    """Learning rates of a step of `batch_size` images, each with a query and a head of its own; of several,
    `validation` chooses."""
    batch_size: int = Field(8192, gt=1)
    """Images per step, whose patches are held in memory together."""

    @property
    def swept(self) -> str:
        """The learning rates."""
        return "lr"

    def resolved(self, trained: Config) -> Self:
        """Also with the encoder's number of heads; `ConfigError` where they do not divide its width."""
        heads = self.heads or trained.model.heads
        if trained.model.width % heads:
            raise ConfigError(
                f"heads={heads}; expected a divisor of the encoder's width {trained.model.width}"
            )
        return super().resolved(trained).model_copy(update={"heads": heads})


class FewShotConfig(ProtocolConfig):
    """Logistic regression on a few images of each class, drawn several times."""

    shots: int = Field(5, gt=0)
    """Images per class."""
    draws: int = Field(10, gt=0)
    """How often they are drawn anew."""
    l2: float = Field(1e-3, gt=0)
    """Weight of half the squared norm of the coefficients beside the mean loss."""
    max_iterations: int = Field(1000, gt=0)
    """Of L-BFGS."""
