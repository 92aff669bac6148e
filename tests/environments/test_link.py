"""grpo/environments/link.py: a turn's numbers are the same on the other side."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from grpo.environments.link import HEADER, as_text, packed, with_numbers

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
LOGPROBS = st.lists(st.floats(max_value=0.0), max_size=50)


@given(IDS, IDS, LOGPROBS, st.text(max_size=20))
def test_numbers_keep_every_bit(prompt: list[int], said: list[int], logprobs: list[float], text: str) -> None:
    turn = {"text": text, "prompt_ids": prompt, "completion_ids": said, "logprobs": logprobs}
    sent = {name: value if name == "text" else as_text(name, value) for name, value in turn.items()}
    came = with_numbers(json.loads(packed({"said": sent})[HEADER:])["said"])
    assert repr(came) == repr(turn)
    assert with_numbers(turn) == turn, "lists stay as they are"
