"""grpo/sft/encoding.py: which tokens are trained on, token by token beside TRL's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.gguf_source import metadata_folder
from grpo.model.source import locate
from grpo.sft.config import Sft
from grpo.sft.data import Example, load_examples
from tests.helpers.tiny_run import SMOLLM2

FOLDER = Path(trl.__file__).parent / "chat_templates"
ENDS = {
    "cohere2": "<|END_OF_TURN_TOKEN|>", "deepseekv3": "<｜end▁of▁sentence｜>", "gemma3": "<end_of_turn>",
    "glm4moe": "<|user|>", "gptoss": "<|return|>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "nemotron_3_nano": "<|im_end|>", "phi3": "<|end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip
"""TRL's templates, and the token that ends an answer of each."""
OTHERS = ["<|end|>", "<|start|>", "<|user|>", "<|assistant|>", "<|message|>", "<|channel|>", "<|endoftext|>"]
"""Further special tokens of these templates."""
REWRITES, OPENS = ("gptoss", "qwen3"), ("deepseekv3", "nemotron_3_nano")
"""Templates that render earlier answers otherwise; those that open an answer with a thought which it does not have."""
QUICK = ("gptoss", "llama3", "phi3", "qwen2_5")
SAYS = [("What is 2+3?", "It is 5."), ("And then?\nTell me.", "Two lines:\nyes"), ("ok", "bye")]
CHAT = [
    {"role": role, "content": text} for pair in SAYS for role, text in zip(("user", "assistant"), pair, strict=True)
]


def each(names: Any) -> Any:
    return pytest.mark.parametrize(
        "template", [name if name in QUICK else pytest.param(name, marks=pytest.mark.wide) for name in names]
    )


@pytest.fixture(scope="module")
def make_tokenizer() -> Any:
    def make(template: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2))))
        special = [token for token in (ENDS[template], *OTHERS) if token not in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.eos_token, tokenizer.bos_token = ENDS[template], "<|endoftext|>"
        tokenizer.chat_template = text_of(template)
        return tokenizer

    return make


def text_of(template: str) -> str:
    return (FOLDER / f"{template}.jinja").read_text()


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49200, **sizes))


def of_trl(model: Any, tokenizer: Any, folder: Path) -> Example:
    """The conversation as TRL's trainer would train on it."""
    settings = SFTConfig(str(folder), assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False)
    data = Dataset.from_dict({"messages": [CHAT]})
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    return Example(list(trainer.train_dataset[0]["input_ids"]), list(trainer.train_dataset[0]["labels"]))


def ours(tokenizer: Any, messages: Any = CHAT, **settings: Any) -> list[Example]:
    data = load_examples(Sft(path="x", **settings), [{"messages": messages}], tokenizer, [tokenizer.eos_token_id], 0)
    return data.examples


def trained(example: Example) -> list[bool]:
    return [label != -100 for label in example.labels]


@each(ENDS)
def test_a_template_with_markers_is_masked_as_by_trl(template, make_tokenizer, model, tmp_path):
    tokenizer = make_tokenizer(template)
    expected = of_trl(model, tokenizer, tmp_path)
    tokenizer.chat_template = text_of(f"{template}_training")
    assert ours(tokenizer) == [expected] and 0 < sum(trained(expected)) < len(expected.labels)


@each([name for name in ENDS if name not in (*REWRITES, *OPENS)])
def test_without_markers_the_mask_is_trls_but_for_what_generation_never_samples(
    template, make_tokenizer, model, tmp_path
):
    """Left out are the opening that generation is given, and what the template writes after the end of an answer."""
    tokenizer = make_tokenizer(template)
    expected = of_trl(model, tokenizer, tmp_path)
    (found,) = ours(tokenizer)
    assert found.input_ids == expected.input_ids
    assert all(theirs or not mine for mine, theirs in zip(trained(found), trained(expected), strict=True))
    end, sampled, after_end = tokenizer.eos_token_id, [], False
    opening = opening_of(tokenizer)
    for index, theirs in enumerate(trained(expected)):
        after_end = theirs and (after_end or (index > 0 and found.input_ids[index - 1] == end))
        opens = index < len(found.input_ids) and tokenizer.decode(found.input_ids[: index + 1]).endswith(opening)
        sampled.append(theirs and not after_end and not opens)
    assert trained(found) == sampled and sum(sampled) >= len(SAYS) * 2


def opening_of(tokenizer: Any) -> str:
    """What the template writes to open an answer."""
    alone, opened = (
        tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=opens) for opens in (False, True)
    )
    return opened[len(alone) :] if opened.startswith(alone) else opened[-20:]


@pytest.mark.parametrize("template", REWRITES)
def test_each_answer_that_is_rewritten_later_has_a_sequence_that_shows_it_as_generation_does(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    found = ours(tokenizer)
    assert len(found) == 3
    for number, example in enumerate(found, 1):
        shown = CHAT[: 2 * number]
        opened = tokenizer.apply_chat_template(shown[:-1], add_generation_prompt=True, return_dict=False)
        assert example.input_ids[: len(opened)] == opened
        assert example.labels[: len(opened)] == [-100] * len(opened)
        answer = [label for label in example.labels if label != -100]
        assert tokenizer.decode(answer).endswith(SAYS[number - 1][1] + tokenizer.eos_token)
    (last,) = ours(tokenizer, train_on="last")
    assert last == found[-1]


@pytest.mark.parametrize("template", OPENS)
def test_an_opening_that_no_answer_has_is_refused_with_what_to_set(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    with pytest.raises(UserError, match="opens an answer for generation with .*, where the conversation has") as error:
        ours(tokenizer)
    if "enable_thinking = false" in str(error.value):
        assert ours(tokenizer, chat_template_kwargs={"enable_thinking": False})
    else:
        assert "set model.chat_template" in str(error.value)


@pytest.mark.parametrize("template", ["llama3", "qwen2_5_training", "phi3"])
def test_the_last_answer_alone_and_answers_by_weight(template, make_tokenizer):
    tokenizer = make_tokenizer(template.removesuffix("_training"))
    tokenizer.chat_template = text_of(template)
    (whole,), (last,) = ours(tokenizer), ours(tokenizer, train_on="last")
    weighed = [
        turn | ({"weight": int(turn["content"] == "bye")} if turn["role"] == "assistant" else {}) for turn in CHAT
    ]
    assert last.input_ids == whole.input_ids and ours(tokenizer, weighed) == [last]
    assert "bye" in tokenizer.decode([label for label in last.labels if label != -100])
    assert 0 < sum(trained(last)) < sum(trained(whole))
    assert all(label in (-100, full) for label, full in zip(last.labels, whole.labels, strict=True))
