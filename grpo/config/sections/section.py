"""What every section of the configuration keeps to, and the types that several of them use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo.config.messages import admits_none_as_text
from grpo.config.toml import NONE

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """Common rules: unknown keys are errors, values keep their type, field docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, strict=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def none_is_written_in_quotes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        absent = {key for key, field in cls.model_fields.items() if admits_none_as_text(field)}
        return {key: None if key in absent and value == NONE else value for key, value in values.items()}
