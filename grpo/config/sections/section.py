"""What every section of the configuration keeps to, and the types that several of them use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from grpo.config.messages import TOO_LARGE, admits_none_as_text
from grpo.config.toml import NONE

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[Path, Field(strict=False)]
LARGEST, LONGEST = 3.4e38, 2**63 - 1
"""What a float32 and an integer of 64 bits hold: torch and vLLM take no more."""


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

    @field_validator("*")
    @classmethod
    def numbers_can_be_computed_with(cls, value: Any, info: ValidationInfo) -> Any:
        """But for those of tables of options, which are a task's or an environment's own."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for number in () if Any in get_args(annotation) else inner:
            if isinstance(number, float) and abs(number) > LARGEST:
                raise PydanticCustomError(TOO_LARGE, "must be a number that 32 bits hold, of at most 3.4e38")
            if isinstance(number, int) and abs(number) > LONGEST:
                raise PydanticCustomError(TOO_LARGE, "must be an integer that 64 bits hold, below 2^63")
        return value
