"""grpo/policy/image_rows.py and the positions of images: by place, never by a token's id, whatever shares a row."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText

from grpo.images import Image
from grpo.model.rope import Rotary, image_sections
from grpo.model.text_decoder import text_config
from grpo.model.vision import positions
from grpo.policy.image_rows import ImageRows
from grpo.policy.packing import packed_row, tree_row
from grpo.policy.vision_tower import ImageFeatures
from tests.helpers.seeing import PLACEHOLDER, SEEING, TOKENS

WIDTH, MERGE = 8, 2
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
"""Rows and columns of tokens."""


class Tower:
    """Gives every image embeddings of its own, without a model."""

    def __init__(self) -> None:
        self.vision = SimpleNamespace(image_token_id=PLACEHOLDER, merge=MERGE, width=WIDTH, levels=0)

    def embed(self, images: Sequence[Image]) -> list[ImageFeatures]:
        return [self.features(image) for image in images]

    @staticmethod
    def features(image: Image) -> ImageFeatures:
        generator = torch.Generator().manual_seed(int(image.digest, 16))
        embeddings = torch.randn(image.width * image.height, WIDTH, generator=generator)
        return ImageFeatures(embeddings, (1, MERGE * image.height, MERGE * image.width), image.digest)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[list[int], tuple[Image, ...], list[int]]]:
    """Prompts with images from a few, with equal ids and equal images among them, and completions that may hold the
    placeholder, as text that an environment wrote may."""
    sizes = draw(st.lists(GRIDS, min_size=1, max_size=3))
    images = [
        Image(b"", wide, high, f"{number:x}{twin}") for number, (high, wide) in enumerate(sizes) for twin in (1, 2)
    ]
    made = []
    for _ in range(draw(st.integers(1, 5))):
        ids: list[int] = draw(st.lists(st.integers(3, 6), min_size=1, max_size=4))
        seen = draw(st.lists(st.sampled_from(images), max_size=2))
        for image in seen:
            ids += [PLACEHOLDER] * (image.width * image.height)
            ids += draw(st.lists(st.integers(3, 6), min_size=1, max_size=2))
        completion = draw(st.lists(st.sampled_from([3, 4, PLACEHOLDER]), min_size=1, max_size=4))
        made += [(ids, tuple(seen), completion)] * draw(st.integers(1, 2))
    return made


@settings(deadline=None, max_examples=200)
@given(sequences(), st.booleans())
def test_every_token_of_a_row_has_its_own_embedding_and_position(made: list[Any], tree: bool) -> None:
    tower: Any = Tower()
    prompts, images, completions = ([each[part] for each in made] for part in range(3))
    rows = ImageRows(tower, prompts, completions, images)
    row = (tree_row if tree else packed_row)(rows.prompts, rows.completions)
    table = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5))
    inputs, _, _ = rows.embedded(torch.tensor(row.tokens), lambda tokens: table[tokens])
    found = rows.positions(row.sources, torch.device("cpu"))[:, 0]
    seen_by = {span.start: span for span in row.spans}
    ends = [place for place in row.predicting]
    at = 0
    for prompt, shown, completion in made:
        # The tokens that the last predicting token of this sequence sees, in order, are the sequence.
        last = ends[at + len(completion) - 1]
        at += len(completion)
        span = next(span for span in seen_by.values() if span.start <= last < span.start + span.length)
        places = [place for start, count in span.ranges for place in range(start, start + count)]
        places = places[: places.index(last) + 1]
        whole = [*prompt, *completion[:-1]]
        assert len(places) == len(whole)
        wanted, grids, start = table[torch.tensor(whole)].clone(), [], 0
        for image in shown:
            start = next(i for i in range(start, len(prompt)) if prompt[i] == PLACEHOLDER)
            features = Tower.features(image)
            wanted[start : start + len(features)] = features.embeddings
            grids.append((start, features.grid))
            start += len(features)
        torch.testing.assert_close(inputs[places], wanted)
        assert found[:, places].tolist() == positions(len(whole), grids, MERGE)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 3), GRIDS), min_size=1, max_size=4), st.integers(1, 4))
def test_positions_are_those_of_transformers(shown: list[tuple[int, tuple[int, int]]], tail: int) -> None:
    model = meta_model()
    ids: list[int] = []
    grids: list[tuple[int, tuple[int, int, int]]] = []
    for text, (high, wide) in shown:
        ids += [5] * text
        grids.append((len(ids), (1, MERGE * high, MERGE * wide)))
        ids += [PLACEHOLDER] * (high * wide)
    ids += [7] * tail
    whole = torch.tensor([ids])
    wanted, delta = model.get_rope_index(whole, (whole == PLACEHOLDER).int(), torch.tensor([grid for _, grid in grids]))
    ours = positions(len(ids) + 3, grids, MERGE)
    assert [row[: len(ids)] for row in ours] == wanted[:, 0].tolist()
    assert all(row[len(ids) :] == [int(delta) + len(ids) + i for i in range(3)] for row in ours)


def meta_model() -> Any:
    config = AutoConfig.for_model("qwen2_5_vl", **{**SEEING["qwen2_5_vl"], **TOKENS})
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).model


@pytest.mark.parametrize("family", list(SEEING))
def test_frequencies_turn_by_the_axis_that_transformers_has_them_turn_by(family: str) -> None:
    whole = AutoConfig.for_model(family, **{**SEEING[family], **TOKENS})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(whole)
    theirs = model.model.language_model.rotary_emb
    with torch.device("cpu"):
        theirs = type(theirs)(whole.get_text_config())
    ours = Rotary(text_config(AutoConfig.for_model(family, **{**SEEING[family], **TOKENS}), images=True))
    assert ours.sections is not None
    ids = torch.stack([torch.arange(7), torch.arange(7) * 3, torch.arange(7) * 5])[:, None]
    wanted, found = theirs(torch.empty(0), ids), ours(torch.empty(0), ids)
    for one, other in zip(wanted, found, strict=True):
        if one.ndim == 4:  # Qwen2.5-VL shares them out where they are applied
            half = one.shape[-1] // 2
            axes = torch.cat([ours.sections, ours.sections])
            one = torch.stack([one[axes[i], :, :, i] for i in range(2 * half)], dim=-1)
        torch.testing.assert_close(one, other)


def test_sections_of_qwen3_are_interleaved_and_those_of_qwen2_5_are_not() -> None:
    def sections(interleaved: bool) -> list[int]:
        parameters = {"mrope_section": [3, 2, 1], "mrope_interleaved": interleaved}
        found = image_sections(SimpleNamespace(rope_parameters=parameters))  # type: ignore[arg-type]
        assert found is not None
        return found.tolist()

    assert sections(False) == [0, 0, 0, 1, 1, 2]
    assert sections(True) == [0, 1, 2, 0, 1, 0]
