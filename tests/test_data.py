"""Prompts are tokenised as the model was trained to read them; the stream is fair, seeded and exactly resumable."""

from __future__ import annotations

import collections
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo.config.schema import Config, Task, parse_config
from grpo.data import Prompt, PromptStream, keep_by_pass_rate, load_data
from grpo.errors import UserError
from tests.helpers.paths import ROOT

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think %} think{% endif %}{% endif %}"
)
WORDS = "<s> <unk> <user> </user> <system> </system> <assistant> </assistant> think one two three four be kind".split()


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words as tokens; plain text begins with <s>."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def words(prompt: Prompt) -> str:
    return " ".join(WORDS[token] for token in prompt.token_ids)


def write_task(folder: Path, name: str, train: list[Any], held: list[Any] = (), rewards: list[Any] = ()) -> str:  # type: ignore[assignment]
    """A user's task file with these rows; returns the reference to it."""
    file = folder / f"{name}.py"
    file.write_text(
        "import json\n"
        "from grpo.tasks.common import Task\n"
        "def load():\n"
        f"    train, held, rewards = json.loads({json.dumps([list(train), list(held), list(rewards)])!r})\n"
        f"    check = lambda text, row: text == row['answer']\n"
        f"    return Task({name!r}, train, held, rewards, strict=check, flexible=check)\n"
    )
    return f"{file}:load"


def chat(*contents: str, **columns: Any) -> dict[str, Any]:
    """A row whose turns alternate, the user's first."""
    roles = ("user", "assistant")
    return {"prompt": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)], **columns}


def configuration(*tasks: dict[str, Any], **more: Any) -> Config:
    rewards = more.pop("rewards", [{"function": "correctness"}])
    return parse_config({"model": {"name": "m"}, "task": list(tasks), "rewards": rewards, **more})


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_data(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tokenising


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    rows = [chat("one", answer="1"), chat("one two", answer="2"), chat("one", "two", "three", answer="3")]
    data = load_data(configuration({"name": write_task(tmp_path, "t", rows)}), tokenizer())
    assert [words(prompt) for prompt in data.train] == [
        "<user> one </user> <assistant>",
        "<user> one two </user> <assistant>",
        "<user> one </user> <assistant> two </assistant> <user> three </user> <assistant>",
    ]
    assert [prompt.columns for prompt in data.train] == [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}]
    assert [prompt.row for prompt in data.train] == rows
    assert all(type(token) is int for token in data.train[0].token_ids)


def test_an_opened_answer_is_continued(tmp_path: Path) -> None:
    data = load_data(configuration({"name": write_task(tmp_path, "t", [chat("one", "two")])}), tokenizer())
    assert words(data.train[0]) == "<user> one </user> <assistant> two"


def test_plain_text_gets_the_tokenizers_special_tokens(tmp_path: Path) -> None:
    task = write_task(tmp_path, "t", [{"prompt": "one two"}, chat("one")])
    data = load_data(configuration({"name": task}), tokenizer())
    assert [words(prompt) for prompt in data.train] == ["<s> one two", "<user> one </user> <assistant>"]
    plain = write_task(tmp_path, "plain", [{"prompt": "one two"}])
    assert words(load_data(configuration({"name": plain}), tokenizer(None)).train[0]) == "<s> one two"


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    config = configuration(
        {"name": write_task(tmp_path, "t", [chat("one")])}, rollout={"chat_template_kwargs": {"think": True}}
    )
    assert words(load_data(config, tokenizer()).train[0]).endswith("<assistant> think")


@pytest.mark.parametrize("own", [True, False])
def test_system_prompt_replaces_or_joins_or_removes(tmp_path: Path, own: bool) -> None:
    row = chat("one")
    if own:
        row["prompt"].insert(0, {"role": "system", "content": "four"})
    task = write_task(tmp_path, "t", [row])
    changed = load_data(configuration({"name": task, "system_prompt": "be kind"}), tokenizer())
    assert words(changed.train[0]) == "<system> be kind </system> <user> one </user> <assistant>"
    removed = load_data(configuration({"name": task, "system_prompt": ""}), tokenizer())
    assert words(removed.train[0]) == "<user> one </user> <assistant>"


def test_overlong_prompts_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    rows = [chat("one"), chat("one two"), chat("one two three"), chat("two")]
    task = write_task(tmp_path, "t", rows, rows[1:])
    short = {"max_prompt_length": 5}
    data = load_data(configuration({"name": task}, rollout=short, eval={"every": 1}), tokenizer())
    assert [words(prompt).split()[1:-2] for prompt in data.train] == [["one"], ["one", "two"], ["two"]]
    assert [prompt.index for prompt in data.train] == [0, 1, 3]
    assert (data.dropped, data.eval_dropped) == (1, 1)
    sentence = refusal(configuration({"name": task, "overlong": "error"}, rollout=short), tokenizer())
    assert "row 3" in sentence and "6 tokens" in sentence and "max_prompt_length = 5" in sentence
    sentence = refusal(configuration({"name": task}, rollout={"max_prompt_length": 3}), tokenizer())
    assert "all 4" in sentence and "shortest has 4" in sentence


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    rows = [chat(word) for word in ("one", "two", "three")]
    task = write_task(tmp_path, "t", rows, rows)
    data = load_data(configuration({"name": task, "limit": 2}, eval={"limit": 1, "every": 9}), tokenizer())
    assert [words(prompt).split()[1] for prompt in data.train] == ["one", "two"]
    assert [words(prompt).split()[1] for prompt in data.eval] == ["one"]


def test_held_out_rows_are_read_only_where_they_are_used(tmp_path: Path) -> None:
    task = write_task(tmp_path, "t", [chat("one")], [{"unusable": 1}])
    assert load_data(configuration({"name": task}), tokenizer()).eval == []
    assert "held-out row 1" in refusal(configuration({"name": task}, eval={"every": 1}), tokenizer())


def test_held_out_rows_can_be_had_alone(tmp_path: Path) -> None:
    data = load_data(configuration({"name": write_task(tmp_path, "t", [], [chat("one")])}), tokenizer(), train=False)
    assert not data.train and not data.rewards and len(data.eval) == 1


def test_real_gsm8k_layout_trains_on_the_configuration_file(tmp_path: Path) -> None:
    row = {"question": "one two", "answer": "#### 3"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    from grpo.config.schema import read_config

    path = ROOT / "configs" / "gsm8k.toml"
    config = read_config(path, [f"task.options.path={str(tmp_path)!r}"])
    data = load_data(config, tokenizer())
    assert [reward.column for reward in data.rewards] == [
        "xml_count", "soft_format", "strict_format", "integer", "correctness",
    ]  # fmt: skip
    assert data.train[0].columns == {"answer": "3"} and data.train[0].task == "gsm8k"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "one"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["one"]}, "role"),
        ({"prompt": [{"role": "user"}]}, "content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "1 place for one"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "no text or image but video"),
        ({"prompt": [{"role": "user", "content": 3}]}, "content"),
        ({"prompt": "one", "image": "nowhere.png"}, "its image nowhere.png cannot be read"),
        ("one", "prompt"),
    ],
)
def test_rows_without_a_usable_prompt_are_named(tmp_path: Path, row: Any, expected: str) -> None:
    sentence = refusal(configuration({"name": write_task(tmp_path, "t", [chat("one"), row])}), tokenizer())
    assert "row 2" in sentence and expected in sentence


@pytest.mark.parametrize(("known", "unknown"), [({"prompt": "no"}, {"prompt": "five"}), (chat("no"), chat("five"))])
def test_a_prompt_of_which_the_tokenizer_makes_nothing_is_named(tmp_path: Path, known: Any, unknown: Any) -> None:
    letters = Tokenizer(models.BPE({"n": 0, "o": 1}, []))
    two_letters = PreTrainedTokenizerFast(tokenizer_object=letters, chat_template="{{ messages[0].content }}")
    sentence = refusal(configuration({"name": write_task(tmp_path, "t", [known, unknown])}), two_letters)
    assert "row 2" in sentence and "no tokens" in sentence


def test_bad_data_is_told_in_a_sentence(tmp_path: Path) -> None:
    rows = [chat("one")]
    task = write_task(tmp_path, "t", rows)
    assert "model.chat_template" in refusal(configuration({"name": task}), tokenizer(None))
    assert "No system" in refusal(
        configuration({"name": task, "system_prompt": "four"}),
        tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + TEMPLATE),
    )
    assert "no training rows" in refusal(configuration({"name": write_task(tmp_path, "e", [])}), tokenizer())
    assert "held-out" in refusal(configuration({"name": task}, eval={"every": 5}), tokenizer())
    assert "held-out" in refusal(configuration({"name": task}), tokenizer(), train=False)
    plain = write_task(tmp_path, "p", [{"prompt": "one"}])
    assert "system_prompt" in refusal(configuration({"name": plain, "system_prompt": "four"}), tokenizer())


# Rewards of tasks


def test_rewards_are_the_configurations_or_else_the_tasks(tmp_path: Path) -> None:
    own = [{"function": "integer", "weight": 0.5}]
    one = write_task(tmp_path, "one", [chat("one")], rewards=own)
    two = write_task(tmp_path, "two", [chat("one")], rewards=[{"function": "correctness"}])
    same = write_task(tmp_path, "same", [chat("one")], rewards=own)
    none = write_task(tmp_path, "none", [chat("one")])
    given = load_data(configuration({"name": one}), tokenizer()).rewards
    assert [(reward.column, reward.weight) for reward in given] == [("correctness", 1.0)]
    for tasks in ([one], [one, same]):
        suggested = load_data(configuration(*({"name": t} for t in tasks), rewards=[]), tokenizer()).rewards
        assert [(reward.column, reward.weight) for reward in suggested] == [("integer", 0.5)]
    assert "[[rewards]]" in refusal(configuration({"name": one}, {"name": two}, rewards=[]), tokenizer())
    assert "[[rewards]]" in refusal(configuration({"name": none}, rewards=[]), tokenizer())


def test_several_tasks_have_names_and_columns_of_their_own(tmp_path: Path) -> None:
    one = write_task(tmp_path, "one", [chat("one", answer="1")], [chat("two", answer="2")])
    two = write_task(tmp_path, "two", [chat("one", target=3)])
    data = load_data(configuration({"name": one}, {"name": two}, {"name": one, "weight": 2.0}), tokenizer())
    assert [prompt.task for prompt in data.train] == ["one", "two", "one-2"]
    assert [prompt.index for prompt in data.train] == [0, 1, 2]
    assert data.train[1].columns == {"answer": None, "target": 3}
    assert data.settings["one-2"].weight == 2.0 and list(data.tasks) == ["one", "two", "one-2"]


# The stream


def prompts(**counts: int) -> list[Prompt]:
    made = [Prompt(0, task, f"{task} {n}", {}, [n]) for task, count in counts.items() for n in range(count)]
    return [Prompt(index, p.task, p.prompt, {}, p.token_ids) for index, p in enumerate(made)]


def settings(**weights: float) -> dict[str, Task]:
    return {name: Task(name=name, weight=weight) for name, weight in weights.items()}


@given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_every_epoch_has_every_prompt_once_however_it_is_taken(count: int, seed: int, takes: list[int]) -> None:
    stream = PromptStream(prompts(a=count), settings(a=1.0), seed)
    taken = [prompt.index for size in takes for prompt in stream.take(size)]
    assert stream.epoch == sum(takes) / count
    for start in range(0, len(taken), count):
        epoch = taken[start : start + count]
        assert len(set(epoch)) == len(epoch)
    assert taken == [p.index for p in PromptStream(prompts(a=count), settings(a=1.0), seed).take(sum(takes))]


def test_order_depends_on_seed_and_epoch_and_on_no_global_state() -> None:
    def order(seed: int) -> list[int]:
        return [prompt.index for prompt in PromptStream(prompts(a=50), settings(a=1.0), seed).take(100)]

    random.seed(1), numpy.random.seed(1)
    before = random.getstate()
    first = order(0)
    assert random.getstate() == before
    random.seed(2), numpy.random.seed(2)
    assert order(0) == first != order(1)
    assert first[:50] != first[50:] and first[:50] != sorted(first[:50])


def test_unshuffled_tasks_keep_their_order() -> None:
    stream = PromptStream(prompts(a=3), {"a": Task(name="a", shuffle=False)}, 0)
    assert [prompt.index for prompt in stream.take(7)] == [0, 1, 2, 0, 1, 2, 0]


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 3.0, 7.25]), min_size=1, max_size=4), st.integers(1, 400))
def test_tasks_are_mixed_in_proportion_all_along(weights: list[float], count: int) -> None:
    names = [f"t{number}" for number in range(len(weights))]
    stream = PromptStream(prompts(**dict.fromkeys(names, 5)), settings(**dict(zip(names, weights, strict=True))), 0)
    taken = collections.Counter(prompt.task for prompt in stream.take(count))
    for name, weight in zip(names, weights, strict=True):
        share = Fraction(weight) / sum(map(Fraction, weights)) * count
        assert abs(taken[name] - share) < len(weights)


@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_a_resumed_stream_goes_on_exactly(before: int, after: int, seed: int) -> None:
    def stream() -> PromptStream:
        return PromptStream(prompts(a=7, b=4), settings(a=2.0, b=1.0), seed)

    whole = stream()
    whole.take(before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    assert resumed.epoch == whole.epoch
    assert resumed.take(after) == whole.take(after)


def test_resuming_on_other_prompts_is_refused() -> None:
    state = PromptStream(prompts(a=5), settings(a=1.0), 0).state_dict()
    changed = [*prompts(a=4), Prompt(4, "a", "a 4", {}, [5])]
    for other in (prompts(a=4), changed, prompts(b=5)):
        with pytest.raises(UserError, match="training prompts are not those"):
            PromptStream(other, settings(a=1.0, b=1.0), 0).load_state_dict(state)
    with pytest.raises(UserError, match="seed"):
        PromptStream(prompts(a=5), settings(a=1.0), 1).load_state_dict(state)


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no training prompts"):
        PromptStream([], {}, 0)


# Difficulty


def test_pass_rate_window_includes_its_ends_and_keeps_order() -> None:
    rates = [0.0, 0.125, 0.5, 0.875, 1.0]
    kept = keep_by_pass_rate(prompts(a=5), rates, (0.125, 0.875))
    assert [prompt.index for prompt in kept] == [1, 2, 3]
    assert keep_by_pass_rate(prompts(a=5), rates, (0, 1)) == prompts(a=5)
    with pytest.raises(UserError, match=r"\[0.6, 0.8\].*from 0.00 to 1.00"):
        keep_by_pass_rate(prompts(a=5), rates, (0.6, 0.8))
    with pytest.raises(ValueError):
        keep_by_pass_rate(prompts(a=5), rates[:4], (0, 1))
