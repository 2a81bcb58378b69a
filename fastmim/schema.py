"""What the sections of a configuration are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """One number as a list of it; for fields that take one or several."""
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Positive = Annotated[int, Field(gt=0)]
HeightWidth = Annotated[tuple[Positive, Positive], BeforeValidator(_as_pair)]
PerChannel = Annotated[list[float], BeforeValidator(as_list)]
Numbers = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), BeforeValidator(as_list)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def require_heads(prefix: str, width: int, heads: int, joiner: str = ".") -> None:
    """Refuse heads that do not divide the width; ValueError names both keys."""
    if width % heads:
        raise ValueError(
            f"{prefix}{joiner}heads={heads}; expected a divisor of {prefix}{joiner}width={width}"
        )


def fill(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`values`, and of `defaults` those that are not given, or given as null."""
    return defaults | {
        key: value for key, value in values.items() if value is not None or key not in defaults
    }


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
