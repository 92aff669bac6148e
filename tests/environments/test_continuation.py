"""Chat templates between turns: every one that TRL ships gives the right tokens, or is refused with what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.environments.continuation import CALL, OBSERVED, TOOL, Continuer, Unprovable
from grpo.environments.tool_calls import FORMS, assistant_message, read_calls
from grpo.errors import UserError
from tests.helpers.tiny_run import SMOLLM2

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
FORMS_OF = {
    "hermes": ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"),
    "qwen3_coder": (
        "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra",
        "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
    ),
    "glm45": ("glm4moe",),
    "lfm2": ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"),
    "llama3_json": ("llama3_1", "llama3_2"),
    "gemma4": ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"),
    "openai": ("gptoss",),
}  # fmt: skip
"""Templates that can be used with tools, by the form in which they write calls."""
ONE_CALL = ("llama3_json", "openai")
"""Forms of templates that show only one call of a turn."""
WITH_TOOLS = {name: form for form, names in FORMS_OF.items() for name in names}
DROPS_RESULTS = ("cohere2", "phi3", "phi3_5")
VISION = {"idefics3", "llava_next", "smolvlm"}
USER = {"role": "user", "content": "hello"}
QUICK = ("qwen2_5", "qwen3_6", "glm4moe", "lfm2_v2", "phi3", "llama3_1", "gemma4", "gptoss", "smolvlm")
each_template = pytest.mark.parametrize(
    "template", [name if name in QUICK else pytest.param(name, marks=pytest.mark.wide) for name in TEMPLATES]
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate

    return AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2))))


def plain(template: str) -> str:
    return template.removesuffix("_training")


CONTINUERS: dict[str, Any] = {}
WORDY = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}, "deep": {"type": "object"}}},
    },
}


def proven(tokenizer: Any, template: str, tools: bool) -> Continuer | str:
    """What continues with `template`, or why it is refused."""
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text()
    found = Continuer(tokenizer, [tokenizer.eos_token_id], {})
    try:
        found.prove(tools=tools)
    except UserError as error:
        return str(error)
    return found


@each_template
def test_a_template_is_proven_or_refused(tokenizer: Any, template: str) -> None:
    found = proven(tokenizer, template, tools=False)
    if isinstance(found, str):
        assert plain(template) in VISION and "set model.chat_template" in found
        return
    assert plain(template) not in VISION
    for reply in ("no", "Three\nlines\n", "<think>\nwell\n</think>\n\nno"):
        history, new = [USER, {"role": "assistant", "content": reply}], [{"role": "user", "content": "why?"}]
        ids = found.continuation(history, new, None, last_token=5)
        whole = found.render([*history, *new], None, opens=True)
        assert whole.endswith(tokenizer.decode(ids)) and "why?" in tokenizer.decode(ids)


@each_template
def test_a_template_is_proven_with_tools_or_refused(tokenizer: Any, template: str) -> None:
    found = proven(tokenizer, template, tools=True)
    form = WITH_TOOLS.get(plain(template))
    if isinstance(found, str):
        assert form is None, found
        assert found.startswith("the model's chat template cannot continue") and "set model.chat_template" in found
        assert plain(template) not in DROPS_RESULTS or "it does not show a tool's message" in found
        return
    assert form is not None and found.form is FORMS[form]
    assert (found.most_calls == 1) == (form in ONE_CALL)
    count = found.most_calls or 2
    new = [{"role": "tool", "name": "look", "content": f"{OBSERVED} {number}"} for number in range(count)]
    for content in ("", *([] if form == "gemma4" else ["look"])):  # Gemma's show text after the tool's answer
        history = [USER, {"role": "assistant", "content": content, "tool_calls": [CALL] * count}]
        text = tokenizer.decode(found.continuation(history, new, [TOOL], last_token=5))
        assert found.render([*history, *new], [TOOL], opens=True).endswith(text)
        assert not any(mark in text for mark in ("tool_call>", "tool_call|>", '"name"', "to=functions"))
        places = [text.index(message["content"]) for message in new]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("form", "said", "calls", "content"),
    [
        ("llama3_json", '{"name": "look", "parameters": {"at": 1}}', [{"at": 1}], ""),
        (
            "llama3_json",
            '<|python_tag|>{"name": "look", "parameters": {"at": 1}}; {"name": "look"}',
            [{"at": 1}, {}],
            "",
        ),
        ("llama3_json", 'I say {"name": "look"}', [], 'I say {"name": "look"}'),
        ("llama3_json", '{"answer": 42}', [], '{"answer": 42}'),
        (
            "gemma4",
            'So.<|tool_call>call:look{at:1,word:<|"|>a{b:c}<|"|>}<tool_call|>',
            [{"at": 1, "word": "a{b:c}"}],
            "So.",
        ),
        ("gemma4", "<|tool_call>call:look{at:[1,{b:true}]}<tool_call|>", [{"at": [1, {"b": True}]}], ""),
        (
            "openai",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.look<|channel|>commentary json"
            '<|message|>{"at": 1}',
            [{"at": 1}],
            "",
        ),
        (
            "openai",
            '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": 1}<|call|>',
            [{"at": 1}],
            "",
        ),
        (
            "openai",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
            [],
            "It is 4.",
        ),
        (
            "deepseek_v3",
            "Now.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>\n"
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{"at": 2}\n```'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [{}, {"at": 2}],
            "Now.",
        ),
    ],
)
def test_calls_in_the_forms_of_families(form: str, said: str, calls: list[dict[str, Any]], content: str) -> None:
    message, malformed = assistant_message(said, FORMS[form])
    found = [call["function"] for call in message.get("tool_calls", ())]
    assert found == [{"name": "look", "arguments": arguments} for arguments in calls] and not malformed
    assert message["content"] == content


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("llama3_json", '{"name": "look", "parameters": {"at": '),
        ("gemma4", '<|tool_call>call:look{at:<|"|>1}<tool_call|>'),
        ("gemma4", "<|tool_call>look(at=1)<tool_call|>"),
        ("openai", "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{at}<|call|>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look {}<｜tool▁call▁end｜>"),
    ],
)
def test_a_call_that_cannot_be_read_is_told_of(form: str, said: str) -> None:
    calls, malformed = read_calls(said, FORMS[form])
    assert calls == [] and len(malformed) == 1


def test_what_a_template_refuses_to_show_again_does_not_end_a_conversation(tokenizer: Any) -> None:
    found = proven(tokenizer, "gptoss", tools=False)
    assert isinstance(found, Continuer)
    raw = {"role": "assistant", "content": "<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>yes"}
    history = [USER, raw, {"role": "user", "content": "why?"}, raw]
    text = tokenizer.decode(found.continuation(history, [{"role": "user", "content": "and then?"}], None, 5))
    assert text == "<|end|><|start|>user<|message|>and then?<|end|><|start|>assistant"


def test_a_call_too_many_for_a_template_is_told_of() -> None:
    said = '{"name": "look", "parameters": {"at": 1}}; {"name": "look", "parameters": {"at": 2}}'
    message, malformed = assistant_message(said, FORMS["llama3_json"], most=1)
    assert len(message["tool_calls"]) == 1 and malformed == ["a turn of this model has at most 1 call"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text("ab ä\"'", max_size=6).map(str.strip),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("xy", min_size=1, max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_8", "glm4moe", "lfm2_v2"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(st.text("kl", max_size=8).map(str.strip), VALUES), min_size=1, max_size=3))
def test_calls_are_read_as_the_template_writes_them(tokenizer: Any, template: str, calls: list[Any]) -> None:
    found = CONTINUERS.get(template) or CONTINUERS.setdefault(template, proven(tokenizer, template, tools=True))
    assert isinstance(found, Continuer)
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text()
    wanted = [{"name": "look", "arguments": {"word": word, "deep": {"in": value}}} for word, value in calls]
    message = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"type": "function", "function": c} for c in wanted],
    }
    shown = found.render([USER, message], [WORDY], opens=False).rpartition(USER["content"])[2]
    assert read_calls(shown, found.form, [WORDY]) == (wanted, [])


def test_a_dropped_tool_result_is_refused_also_where_no_tools_were_offered(tokenizer: Any) -> None:
    found = proven(tokenizer, "phi3", tools=False)
    assert isinstance(found, Continuer)
    with pytest.raises(Unprovable, match="it does not show a tool's message"):
        found.continuation([USER, {"role": "assistant", "content": "so"}], [{"role": "tool", "content": "42"}], None, 5)


def test_a_thought_that_the_prompt_began_is_not_called() -> None:
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert read_calls(f"I could {call}</think>no", thinks=True) == ([], [])
    assert len(read_calls(f"well</think>{call}", thinks=True)[0]) == 1
    assert read_calls(f"cut within {call}", thinks=True) == ([], [])


def test_the_names_of_roles_stay_where_they_end_a_turn(tokenizer: Any) -> None:
    """GLM's models end their turn with the name of who speaks next."""
    words = ["<|user|>", "<|observation|>", "<|assistant|>", "<|endoftext|>"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    user, observed, _, end = tokenizer.convert_tokens_to_ids(words)
    tokenizer.chat_template = (FOLDER / "glm4moe.jinja").read_text()
    found = Continuer(tokenizer, [user, observed, end], {})
    found.prove(tools=True)
    history = [USER, {"role": "assistant", "content": "look", "tool_calls": [CALL]}]
    new = [{"role": "tool", "name": "look", "content": OBSERVED}]
    after = {last: found.continuation(history, new, [TOOL], last) for last in (5, observed, user, end)}
    assert after[5][0] == observed, "cut: the name is still to be said"
    assert after[observed] == after[5][1:], "said"
    assert after[user] == after[end] == after[5], "another end token was sampled"


def test_an_end_token_stands_once(tokenizer: Any) -> None:
    tokenizer.chat_template = (FOLDER / "qwen2_5.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = Continuer(tokenizer, [end], {})
    history, new = [USER, {"role": "assistant", "content": "yes"}], [{"role": "user", "content": "why?"}]
    stopped, cut = (found.continuation(history, new, None, last_token=last) for last in (end, 5))
    assert cut == [end, *stopped] and stopped[0] != end
