"""What each protocol can be told by `key=value` words. Imports no torch: a check is quick."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fastmim.schema import Fraction, Numbers, Positive, Section


class ProtocolConfig(Section):
    """What every protocol on frozen features is told."""

    labels: str | None = None
    """Labels of --data that its folders or shards do not give: an .npy of integers [n] for an .npy source, or a CSV
    with the columns file,label."""
    test_labels: str | None = None
    """Likewise of --test; `labels` itself unless given, where that is a CSV."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class of --data that is the test set where there is no --test."""
    pool: Literal["cls", "mean"] = "cls"
    """The feature of an image: its cls token, or the mean over its patches; both after the encoder's last norm."""
    center: float = Field(224 / 256, gt=0, le=1)
    """Side of the centre crop over that of the largest one that fits; 224/256 is the custom on ImageNet."""
    images_at_once: int = Field(64, gt=0)
    """Images in a forward pass of the encoder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of every draw."""

    @property
    def unused(self) -> set[str]:
        """Fields that have no part in the result."""
        return {"labels", "test_labels", "images_at_once"}


class KnnConfig(ProtocolConfig):
    """Weighted nearest neighbours (Wu et al., CVPR 2018; the settings are those of DINO, Caron et al., ICCV 2021)."""

    k: int = Field(20, gt=0)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""


class LinearConfig(ProtocolConfig):
    """Linear probing (MAE, appendix A.1 and table 10), or `solver=exact` for small sets."""

    solver: Literal["lars", "exact"] = "lars"
    """lars trains on augmented images; exact solves for centre crops."""
    blr: Numbers = [0.1]
    """Base learning rates per 256 images, each with a head of its own; of several, `validation` chooses."""
    batch_size: int = Field(16384, gt=1)
    """Images per step; the learning rates are blr x batch_size / 256."""
    epochs: Positive = 90
    warmup_epochs: float = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop over the image's area, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    l2: Numbers = [1e-3]
    """Weight of half the squared norm of the coefficients beside the mean loss; of several, `validation` chooses."""
    max_iterations: int = Field(1000, gt=0)
    """Of L-BFGS."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of each training class that chooses among several values of a sweep, and is not trained on then."""

    _OF_SOLVER: ClassVar[dict[str, list[str]]] = {
        "lars": ["blr", "batch_size", "epochs", "warmup_epochs", "momentum", "weight_decay", "scale", "flip"],
        "exact": ["l2", "max_iterations"],
    }

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
        """Also those of the other solver, and `validation` where there is one candidate."""
        others = {key for solver, keys in self._OF_SOLVER.items() if solver != self.solver for key in keys}
        alone = len(self.blr if self.solver == "lars" else self.l2) == 1
        return super().unused | others | ({"validation"} if alone else set())

    @model_validator(mode="after")
    def _chooses_among_several(self):
        key = "blr" if self.solver == "lars" else "l2"
        values = getattr(self, key)
        if "validation" in self.model_fields_set and len(values) == 1:
            raise ValueError(
                f"validation={self.validation:g} with {key}={values}; expected several to choose from"
            )
        return self

    @model_validator(mode="after")
    def _ranges_fit(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g}; expected less than epochs={self.epochs}")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={list(self.scale)}; expected 0 < lowest <= highest <= 1")
        return self


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


PROTOCOLS: dict[str, type[ProtocolConfig]] = {
    "linear": LinearConfig,
    "knn": KnnConfig,
    "few_shot": FewShotConfig,
}
