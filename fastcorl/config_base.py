"""The base of every section of a configuration, and the kinds of numbers they share."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Switch = Literal["auto", "on", "off"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation == Switch:  # as YAML reads on and off
            return "on" if value else "off"
        if isinstance(value, bool) and not _takes_bool(annotation):
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or bool in get_args(annotation)
