"""Reward functions get a prompt's images as PIL images, in their own process and in every convention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from grpo.images import read_image
from grpo.rewards.runtime.contract import RewardBatch, RewardSpec
from grpo.rewards.runtime.conventions import RewardFunction
from tests.helpers.pictures import noise
from tests.helpers.reward_pools import Pools

WIDE, TALL = (read_image(noise(*size), "row 1") for size in ((60, 20), (20, 40)))
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


@pytest.fixture
def pools() -> Iterator[Pools]:
    with Pools() as made:
        yield made


def shown() -> RewardBatch:
    columns = {"images": [(WIDE, TALL), (WIDE,), ()], "image": [None, WIDE, None], "answer": ["a", "b", "c"]}
    return RewardBatch([ASKED] * 3, ["a", "b", "x"], [[0]] * 3, columns)


def test_the_images_reach_the_functions_process(pools: Pools) -> None:
    expected = noise(60, 20).tobytes()

    def named(completions: list[Any], images: list[Any], image: list[Any]) -> list[float]:
        same = images[0][0].tobytes() == expected and image[1].tobytes() == expected
        return [float(same and all(each.mode == "RGB" for each in seen)) * len(seen) for seen in images]

    def anything(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(sum(each.width for each in seen)) for seen in kwargs["images"]]

    def blind(completions: list[Any], answer: list[str]) -> list[float]:
        import sys

        return [float("PIL" in sys.modules)] * len(completions)

    example = {name: values[1] for name, values in shown().columns.items()}
    result = pools(named, anything, blind, example=example).submit(shown()).result(timeout=60)
    assert result.scores == {"named": [2.0, 1.0, 0.0], "anything": [80.0, 60.0, 0.0], "blind": [0.0] * 3}


def test_every_convention_sees_them() -> None:
    def verl(solution_str: str, extra_info: dict[str, Any]) -> float:
        return float(sum(each.height for each in extra_info["images"]))

    def verifiers(completion: Any, images: list[Any]) -> float:
        return float(len(images))

    def openrlhf(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
        return {"rewards": [float(query == f"what?{text}") for query, text in zip(queries, "abx", strict=True)]}

    def score(function: Any) -> list[float | None]:
        return RewardFunction(function, "r", {}).score(shown()).values

    assert score(verl) == [60.0, 20.0, 0.0] and score(verifiers) == [2.0, 1.0, 0.0] and score(openrlhf) == [1.0] * 3


def test_a_function_that_asks_for_images_is_told_where_there_are_none(pools: Pools) -> None:
    def sees(completions: list[Any], images: list[Any]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(Exception, match="reward 'sees' asks for 'images', which is neither a column of the data"):
        pools(RewardSpec(sees), example={"answer": "1"})


def test_an_images_pixels_are_sent_once_for_a_group() -> None:
    from grpo.rewards.runtime.pool import pickle_batch

    def sent(count: int) -> int:
        return len(
            pickle_batch(RewardBatch([ASKED] * count, ["a"] * count, [[0]] * count, {"images": [(WIDE,)] * count}))
        )

    assert sent(64) - sent(1) < len(WIDE.data)
