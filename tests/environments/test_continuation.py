"""Chat templates between turns: every one that TRL ships gives the right tokens, or is refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from grpo.environments.continuation import CALL, OBSERVED, TOOL, Continuer
from grpo.errors import UserError
from tests.helpers.tiny_run import SMOLLM2

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
WITH_TOOLS = {"qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"}
VISION = {"idefics3", "llava_next", "smolvlm"}
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate

    return AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2))))


def proven(tokenizer: Any, template: str, tools: bool) -> Continuer | str:
    """What continues with `template`, or why it is refused."""
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text()
    found = Continuer(tokenizer, [tokenizer.eos_token_id], {})
    try:
        found.prove(tools=tools)
    except UserError as error:
        return str(error)
    return found


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_proven_or_refused(tokenizer: Any, template: str) -> None:
    found = proven(tokenizer, template, tools=False)
    if isinstance(found, str):
        assert template in VISION and "set model.chat_template" in found
        return
    for reply in ("no", "Three\nlines\n", "<think>\nwell\n</think>\n\nno"):
        history, new = [USER, {"role": "assistant", "content": reply}], [{"role": "user", "content": "why?"}]
        ids = found.continuation(history, new, None, last_token=5)
        whole = found.render([*history, *new], None, opens=True)
        assert whole.endswith(tokenizer.decode(ids)) and "why?" in tokenizer.decode(ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_proven_with_tools_or_refused(tokenizer: Any, template: str) -> None:
    found = proven(tokenizer, template, tools=True)
    assert isinstance(found, Continuer) == (template in WITH_TOOLS), found
    if isinstance(found, str):
        assert found.startswith("the model's chat template cannot continue") and "set model.chat_template" in found
        return
    history = [USER, {"role": "assistant", "content": "look", "tool_calls": [CALL, CALL]}]
    new = [{"role": "tool", "name": "look", "content": f"{OBSERVED} {number}"} for number in (1, 2)]
    text = tokenizer.decode(found.continuation(history, new, [TOOL], last_token=5))
    assert found.render([*history, *new], [TOOL], opens=True).endswith(text)
    assert "tool_call>" not in text and text.index(f"{OBSERVED} 1") < text.index(f"{OBSERVED} 2")


def test_an_end_token_stands_once(tokenizer: Any) -> None:
    tokenizer.chat_template = (FOLDER / "qwen2_5.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = Continuer(tokenizer, [end], {})
    history, new = [USER, {"role": "assistant", "content": "yes"}], [{"role": "user", "content": "why?"}]
    stopped, cut = (found.continuation(history, new, None, last_token=last) for last in (end, 5))
    assert cut == [end, *stopped] and stopped[0] != end
