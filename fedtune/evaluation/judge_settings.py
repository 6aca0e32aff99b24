"""Who marks answers; see judge.py."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from fedtune.core.settings import Settings
from fedtune.errors import InputError
from fedtune.evaluation.endpoint import check_judge


class JudgeSettings(Settings):
    """A language model that marks answers (mt-bench), behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(hide_input_in_errors=True)  # someone may have put the key itself here

    url: str  # base of the endpoint, as http://localhost:8000/v1
    model: str  # the judge's name there
    key_variable: str | None = None  # environment variable with the key, which is never written anywhere
    timeout_s: float = Field(60.0, gt=0)  # of one request
    retries: int = Field(2, ge=0)  # after a failed request; then the question counts as unjudged

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        try:
            check_judge(self.url, self.key_variable)
        except InputError as error:
            raise ValueError(str(error)) from None
        return self
