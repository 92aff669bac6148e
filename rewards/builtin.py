"""The rewards that a configuration names by a bare word, and where each is. None is imported before it is asked for."""

from __future__ import annotations

from typing import Any

from grpo.references import resolve

BUILTIN = {
    "correctness": "grpo.rewards.correctness:correctness",
    "integer": "grpo.rewards.integer:integer",
    "strict_format": "grpo.rewards.format:strict_format",
    "soft_format": "grpo.rewards.format:soft_format",
    "xml_count": "grpo.rewards.xml_count:xml_count",
    "tag_count": "grpo.rewards.tag_count:tag_count",
    "numeric_answer": "grpo.rewards.numeric_answer:numeric_answer",
    "math_verify": "grpo.rewards.math_verify:math_verify",
    "length_penalty": "grpo.rewards.length_penalty:LengthPenalty",
    "repetition_penalty": "grpo.rewards.repetition_penalty:RepetitionPenalty",
    "regular_expression": "grpo.rewards.regular_expression:RegularExpression",
}

ALIASES = {
    "correctness_reward_func": "correctness",
    "int_reward_func": "integer",
    "strict_format_reward_func": "strict_format",
    "soft_format_reward_func": "soft_format",
    "xmlcount_reward_func": "xml_count",
}
"""The names these functions have in the GSM8K notebooks."""


def resolve_reward(reference: str) -> Any:
    """The reward that `reference` names: one of these, or the user's own. Raises UserError as `resolve` does."""
    return resolve(reference, "reward", BUILTIN | ALIASES)
