"""When a prompt is not worth another worker: the condition of conditional disaggregation."""

from typing import Literal

from pydantic import ValidationError

from kvrouter_grpc.config.section import Section, setting

_EXAMPLE = '{"eff_isl_threshold": 2048, "eff_isl_ratio_threshold": 0.3}'

_RATIOS = {"isl_or_ratio": 0.3, "isl_bounding": 0.7}
"""Largest uncached part of a prompt by policy: where the part alone decides, little may be left to compute."""


class LocalPrefill(Section):
    """Which prompts the decoding worker computes itself: short ones, and those it has mostly cached.

    What counts is the part of the prompt that the decoding worker does not have cached. Names are Dynamo's, and its
    rule is the policy isl_bounding, under which a short prompt that is not cached at all still travels.
    """

    policy: Literal["isl_bounding", "isl_or_ratio"] = setting(
        "isl_or_ratio", "One of the two limits is enough (isl_or_ratio), or both must hold (isl_bounding, Dynamo's)."
    )
    eff_isl_threshold: int = setting(2048, "Fewer uncached tokens than this.", ge=0)
    eff_isl_ratio_threshold: float | None = setting(
        None,
        "A smaller part of the prompt than this is uncached. None: 0.3 with isl_or_ratio, 0.7 with isl_bounding.",
        ge=0,
        le=1,
    )

    def holds(self, uncached_tokens: int, prompt_tokens: int) -> bool:
        """Whether a prompt is computed where it is decoded."""
        short = uncached_tokens < self.eff_isl_threshold
        ratio = self.eff_isl_ratio_threshold
        cached = uncached_tokens < (_RATIOS[self.policy] if ratio is None else ratio) * prompt_tokens
        return (short and cached) if self.policy == "isl_bounding" else (short or cached)


def read_local_prefill(text: str) -> LocalPrefill:
    """Read the condition from its JSON object.

    Raises:
        ValueError: It is not one; the message says which key.
    """
    try:
        return LocalPrefill.model_validate_json(text)
    except ValidationError as error:
        wrong = sorted({str(each["loc"][0]) for each in error.errors(include_url=False) if each["loc"]})
        what = f"the value of {', '.join(wrong)}" if wrong else "a JSON object"
        raise ValueError(f"{what} is wrong; an example is {_EXAMPLE}") from None


def checked_local_prefill(text: str) -> str:
    """The text itself, if it can be read. Raises ValueError."""
    read_local_prefill(text)
    return text
