"""An exported GGUF file computes what base + adapter do, splits text as their tokenizer does, and has a Modelfile.

Files are read back by transformers' own loader and by ours. 16 bits are compared first, to a thousandth: a wrong order
of query and key rows would hide in the noise of 8 bits.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.export.build import export
from grpo.export.compare import streamed_logits
from grpo.export.gguf import find_quantizer
from grpo.export.gguf_vocab import SPLITS, read_vocabulary
from grpo.export.modelfile import CONVERSATION, KNOWN, QUESTION, Chat, modelfile
from grpo.model.source import open_source
from tests.export.test_build import Made
from tests.helpers.adapters import TOKENS, logits
from tests.helpers.checkpoints import write_gguf as write_llama_gguf
from tests.helpers.tiny import tiny_model
from tests.helpers.vocabularies import CHAT, SIZE, TEXTS, byte_level, save_tokenizer, sentencepiece

LLAMA3, QWEN2, TEKKEN, GPT4O, QWEN35 = SPLITS
GEMMA: dict[str, Any] = {"head_dim": 256, "query_pre_attn_scalar": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": {},
    "lfm2": {},
}
"""Shapes that transformers reads from GGUF files; what it leaves unread is at its default."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made_with_tokenizer(folder: Path, family: str = "llama", **changes: Any) -> Made:
    made = Made(folder, family, vocab_size=SIZE, **changes)
    spaces = family.startswith("gemma") or family == "phi3"
    splits = QWEN35 if family == "qwen3_5_text" else QWEN2
    tokenizer = sentencepiece(space_prefix=family == "phi3") if spaces else byte_level(splits)
    save_tokenizer(tokenizer, made.base, bos=spaces)
    return made


def exported(made: Made, kind: str, *, check: bool = False, **keys: Any) -> Path:
    folder = export(made.adapter, "gguf", made.out, gguf_type=kind, check=check, notice=lambda text: None, **keys)
    (file,) = folder.glob("*.gguf")
    return file


def read_by_transformers(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def apart(expected: Tensor, found: Tensor) -> float:
    """Relative distance of two sets of logits."""
    return float((expected - found).norm() / expected.norm())


# Weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_the_logits_of_base_and_adapter(family: str, tmp_path: Path) -> None:
    made = made_with_tokenizer(tmp_path, family, **FAMILIES[family])
    file = exported(made, "f16", check=family == "llama")
    expected = logits(made.peft)
    assert apart(expected, logits(read_by_transformers(file))) < 2e-3
    assert apart(expected, streamed_logits(open_source(Model(name=str(file))), TOKENS)) < 2e-3
    assert apart(expected, logits(made.peft.unload())) > 0.05


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
def test_each_type_is_as_close_as_its_bits_allow(kind: str, most: float, tmp_path: Path) -> None:
    """Weights, compared in transformers' order; the model is one whose heads a wrong order would mix."""
    made = made_with_tokenizer(tmp_path, num_key_value_heads=2)
    source = open_source(Model(name=str(exported(made, kind))))
    worst = 0.0
    for name, weight in made.peft.merge_and_unload().state_dict().items():
        found = source.read(name)
        worst = max(worst, float((found - weight).norm() / weight.norm()))
        assert name.endswith("norm.weight") <= bool(found.equal(weight)), f"{name} is kept in float32"
    assert most / 30 < worst < most


def test_gemma_is_written_though_transformers_does_not_read_it(tmp_path: Path) -> None:
    """Its norms are stored plus one, its embedding serves as head."""
    made = made_with_tokenizer(tmp_path, "gemma")
    file = exported(made, "f16")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    base = load_file(made.base / "model.safetensors")
    stored = torch.tensor(tensors["blk.1.attn_norm.weight"].data.tolist())
    torch.testing.assert_close(stored, base["model.layers.1.input_layernorm.weight"] + 1)
    assert "output.weight" not in tensors and len(tensors) == len(base)


def test_biases_of_query_and_key_are_turned_too(tmp_path: Path) -> None:
    made = made_with_tokenizer(tmp_path, attention_bias=True)
    source = open_source(Model(name=str(exported(made, "f16"))))
    base = load_file(made.base / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias"):
        assert source.read(name).equal(base[name])


def test_gated_delta_net_is_written_and_read(tmp_path: Path) -> None:
    """By our reader. Rounding to 16 bits alone moves the logits by 3.5e-3, so weights are compared too."""
    made = made_with_tokenizer(tmp_path, "qwen3_5_text")
    source = open_source(Model(name=str(exported(made, "f16"))))
    assert source.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert apart(logits(made.peft), streamed_logits(source, TOKENS)) < 5e-3
    for name, weight in made.peft.merge_and_unload().state_dict().items():
        assert apart(weight, source.read(name)) < 3e-4, name
    before = AutoTokenizer.from_pretrained(made.base)
    for text in TEXTS:
        assert source.tokenizer()(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.parametrize("changes", [{}, {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}])
def test_gemma_4_is_written_and_read_with_what_differs_by_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    """By our reader: transformers reads no file with numbers of each layer."""
    made = made_with_tokenizer(tmp_path, "gemma4_text", **changes)
    source = open_source(Model(name=str(exported(made, "f16"))))
    before = made.peft.base_model.model.config
    kept = {"layer_types", "head_dim", "global_head_dim", "intermediate_size", "use_double_wide_mlp", "sliding_window",
            "num_kv_shared_layers", "attention_k_eq_v", "num_global_key_value_heads", "final_logit_softcapping",
            "hidden_size_per_layer_input", "max_position_embeddings", "rope_parameters"}  # fmt: skip
    found, said = source.config.to_dict(), before.to_dict()
    assert {key: found.get(key) for key in kept} == {key: said.get(key) for key in kept}
    assert apart(logits(made.peft), streamed_logits(source, TOKENS)) < 5e-3
    for name, weight in made.peft.merge_and_unload().state_dict().items():
        if name != "lm_head.weight":
            assert apart(weight, source.read(name)) < 3e-4, name


# Metadata


ROTARY: dict[str, dict[str, Any]] = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scaling_is_written_and_read(kind: str, tmp_path: Path) -> None:
    """By our reader: transformers leaves it out of what it reads."""
    scaling = {**ROTARY[kind], "rope_theta": 5e5}
    longest = 16384 if kind == "llama3" else 256
    made = made_with_tokenizer(tmp_path, rope_parameters=scaling, max_position_embeddings=longest)
    source = open_source(Model(name=str(exported(made, "f16"))))
    assert {key: source.config.rope_parameters[key] for key in scaling} == scaling
    assert apart(logits(made.peft), streamed_logits(source, TOKENS)) < 2e-3


def test_phi3s_lists_of_factors_are_written_and_read(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + number / 50 for number in range(16)], "long_factor": [2.0] * 16}
    scaling = {"rope_type": "longrope", **factors, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    made = made_with_tokenizer(
        tmp_path, "phi3", rope_parameters=scaling, max_position_embeddings=256, original_max_position_embeddings=64
    )
    source = open_source(Model(name=str(exported(made, "f16"))))
    assert source.config.rope_parameters["long_factor"] == [2.0] * 16
    assert apart(logits(made.peft), streamed_logits(source, TOKENS)) < 2e-3


def test_frequencies_scaled_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    scaling = {**ROTARY["llama3"], "high_freq_factor": 9.0, "rope_theta": 5e5}
    made = made_with_tokenizer(tmp_path, rope_parameters=scaling, max_position_embeddings=16384)
    file = exported(made, "f16")
    with pytest.raises(UserError, match="rope_freqs.weight.*not Llama 3's"):
        open_source(Model(name=str(file)))


def test_sizes_and_names_are_llama_cpps(tmp_path: Path) -> None:
    made = made_with_tokenizer(tmp_path, "gemma2", **FAMILIES["gemma2"])
    reader = GGUFReader(exported(made, "q8_0"))
    expected = {
        "general.architecture": "gemma2", "general.name": "adapter", "general.file_type": 7, "gemma2.block_count": 2,
        "gemma2.context_length": 256, "gemma2.embedding_length": 128, "gemma2.feed_forward_length": 192,
        "gemma2.attention.head_count": 4, "gemma2.attention.head_count_kv": 2, "gemma2.attention.key_length": 256,
        "gemma2.attention.sliding_window": 16, "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0, "tokenizer.ggml.model": "llama", "tokenizer.chat_template": CHAT,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    assert {key: field.contents() if (field := reader.get_field(key)) else None for key in expected} == expected
    forms = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert forms["token_embd.weight"] == "Q8_0" and forms["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"query_pre_attn_scalar": 100}), ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
     ("qwen3_5_text", {"linear_value_head_dim": 64}),
     ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"] * 2,
                                             "num_hidden_layers": 4}),
     ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made = made_with_tokenizer(tmp_path, family, **changes)
    with pytest.raises(UserError, match="llama.cpp has no .*; export merged-16bit instead"):
        exported(made, "f16")
    assert not made.out.exists()


def test_a_window_that_llama_cpp_lacks_is_said(tmp_path: Path) -> None:
    made, notices = made_with_tokenizer(tmp_path, "mistral"), []
    export(made.adapter, "gguf", made.out, check=False, notice=notices.append)
    assert any("trained to see its last 16 tokens" in text for text in notices)


def test_a_gguf_base_keeps_its_own_metadata(tmp_path: Path) -> None:
    made = Made(tmp_path)
    (tmp_path / "gguf").mkdir()
    base = tmp_path / "gguf" / "tiny.gguf"
    write_llama_gguf(base, tiny_model("llama"))
    file = exported(made, "f16", base=base)
    ours, theirs = GGUFReader(file), GGUFReader(base)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "llama.rope.freq_base", "llama.context_length"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()
    assert ours.get_field("general.name").contents() == "adapter"
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    assert apart(logits(made.peft), logits(read_by_transformers(file))) < 2e-3


# Tokenizers


KINDS: dict[str, tuple[Any, str]] = {
    "llama-bpe": (lambda: byte_level(LLAMA3, ignore_merges=True), "gpt2"),
    "dbrx": (lambda: byte_level(LLAMA3), "gpt2"),
    "qwen2": (lambda: byte_level(QWEN2), "gpt2"),
    "tekken": (lambda: byte_level(TEKKEN), "gpt2"),
    "gpt-4o": (lambda: byte_level(GPT4O), "gpt2"),
    "qwen35": (lambda: byte_level(QWEN35), "gpt2"),
    "gpt-2": (byte_level, "gpt2"),
    "smollm": (lambda: byte_level(digits=True), "gpt2"),
    "default": (lambda: sentencepiece(space_prefix=True), "llama"),
}


@pytest.mark.parametrize("pre", KINDS)
def test_the_splitting_rule_is_named_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    build, model = KINDS[pre]
    tokenizer = save_tokenizer(build(), tmp_path, bos=False)
    vocabulary = read_vocabulary(tokenizer, SIZE)
    assert (vocabulary.model, vocabulary.pre) == (model, pre)
    assert len(vocabulary.tokens) == len(vocabulary.types) == SIZE
    by_text = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (by_text["<|im_end|>"], by_text["<tool>"], by_text[f"[PAD{SIZE - 1}]"]) == (3, 4, 5)
    assert tokenizer.convert_tokens_to_ids("<tool>") == vocabulary.tokens.index("<tool>")


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_text_is_split_as_before(family: str, tmp_path: Path) -> None:
    """Byte-level, SentencePiece without and with a space before the text; transformers rebuilds it from the file."""
    made = made_with_tokenizer(tmp_path, family, **FAMILIES[family])
    file = exported(made, "f16")
    before = AutoTokenizer.from_pretrained(made.base)
    after = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", "a<tool>b"):
        assert before(text, add_special_tokens=False)["input_ids"] == after(text, add_special_tokens=False)["input_ids"]
    assert (after.bos_token, after.eos_token, after.chat_template) == ("<bos>", "<eos>", CHAT)


def test_a_tokenizer_that_llama_cpp_has_no_equal_of_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(byte_level(r"\p{L}+|\d+|\s+|."), tmp_path, bos=False)
    with pytest.raises(UserError, match="its splitting rule is unknown"):
        read_vocabulary(tokenizer, SIZE)


# q4_k_m


FAKE = """#!/bin/sh
[ "$3" = Q4_K_M ] || exit 3
{action}
"""


def program(folder: Path, action: str) -> Path:
    file = folder / "llama-quantize"
    file.write_text(FAKE.format(action=action))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_llama_cpps_quantiser_makes_q4_k_m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that copies; the real program is found in the same three ways."""
    made = made_with_tokenizer(tmp_path)
    quantizer = program(tmp_path, 'cp "$1" "$2"')
    file = exported(made, "q4_k_m", llama_quantize=quantizer)
    assert file.name == "adapter-q4_k_m.gguf" and sorted(path.name for path in made.out.iterdir()) == [
        "Modelfile", file.name,
    ]  # fmt: skip
    assert apart(logits(made.peft), logits(read_by_transformers(file))) < 2e-3
    monkeypatch.setenv("LLAMA_QUANTIZE", str(quantizer))
    assert find_quantizer(None) == [str(quantizer)]
    monkeypatch.delenv("LLAMA_QUANTIZE")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_quantizer(None) == [str(quantizer)]


def test_the_quantiser_of_a_package_makes_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one. Only rows of whole blocks of 256 become Q4_K and Q6_K."""
    pytest.importorskip("cyllama")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_QUANTIZE", raising=False)
    made = made_with_tokenizer(tmp_path, hidden_size=256, intermediate_size=512)
    file = exported(made, "q4_k_m")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_up.weight"] == "Q4_K"
    assert kinds["output.weight"] == "Q6_K" and kinds["output_norm.weight"] == "F32"
    wanted = made.peft.merge_and_unload().state_dict()
    for name, weight in read_by_transformers(file).state_dict().items():
        most = 0.1 if weight.ndim == 2 else 1e-6
        assert apart(wanted[name].float(), weight.float()) < most, f"{name}: 4 bits of the right weights"
    assert sorted(path.name for path in made.out.iterdir()) == ["Modelfile", file.name]


def test_without_the_quantiser_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_QUANTIZE", raising=False)
    monkeypatch.setitem(sys.modules, "cyllama", None)
    made = made_with_tokenizer(tmp_path)
    with pytest.raises(UserError, match="q4_k_m needs llama.cpp's quantiser: pip install .*--llama-quantize"):
        exported(made, "q4_k_m")
    with pytest.raises(UserError, match="/nowhere: no such program"):
        exported(made, "q4_k_m", llama_quantize="/nowhere")
    failing = program(tmp_path, "echo main: failed to quantize >&2; exit 1")
    with pytest.raises(UserError, match=r"failed \(main: failed to quantize\)"):
        exported(made, "q4_k_m", llama_quantize=failing)
    assert not made.out.exists()


# Ollama


JINJA = {
    "ChatML": CHAT,
    "Llama 3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
    "{{ '\n\n' }}{% endif %}",
    "Gemma": "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content + '\n\n' %}{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ ns.s }}{{ m.content }}<end_of_turn>\n{% set ns.s = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "Phi-3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>{{ '\n' }}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
}
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHAT


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(byte_level(), tmp_path_factory.mktemp("tokenizer"), bos=False)


def entry(text: str, name: str) -> str:
    """The value of a Modelfile's instruction in triple quotes."""
    return text.split(f'{name} """')[1].split('"""')[0]


def as_ollama(template: str, messages: list[dict[str, str]], system: str | None) -> str:
    """A conversation as Ollama makes it of a template: once for every question with its answer, the last cut short."""
    turns = [(messages[number], messages[number + 1 : number + 2]) for number in range(0, len(messages), 2)]
    text = ""
    for number, (question, answer) in enumerate(turns):
        values = {"System": system if number == 0 else "", "Prompt": question["content"]}
        out = template if answer else template.split("{{ .Response }}")[0]
        for name, value in values.items():
            start = "{{ if ." + name + " }}"
            while start in out:
                before, rest = out.split(start, 1)
                inside, after = rest.split("{{ end }}", 1) if name == "System" else rest.rsplit("{{ end }}", 1)
                out = before + (inside if value else "") + after
            out = out.replace("{{ ." + name + " }}", value or "")
        text += out.replace("{{ .Response }}", answer[0]["content"]) if answer else out
    return text


@pytest.mark.parametrize(
    ("family", "system"),
    [(family, system) for family in JINJA for system in (None, "Be brief.") if not (system and family == "Mistral")],
)
def test_ollama_writes_what_the_chat_template_does(family: str, system: str | None, tokenizer: Any) -> None:
    notices: list[str] = []
    text = modelfile("m.gguf", Chat("m", tokenizer, JINJA[family], system, starts_with_bos=True), notices.append)
    assert not notices and "FROM ./m.gguf\n" in text and 'PARAMETER stop "<eos>"' in text
    template = entry(text, "TEMPLATE")
    assert ("SYSTEM" in text) == (system is not None)
    for messages in (QUESTION, CONVERSATION):
        start = [{"role": "system", "content": system}] if system else []
        expected = tokenizer.apply_chat_template(
            start + messages, chat_template=JINJA[family], tokenize=False, add_generation_prompt=True
        ).removeprefix("<bos>")
        answered = [{**m, "content": " " + m["content"]} if m["role"] == "assistant" else m for m in messages]
        assert as_ollama(template, answered if family == "Mistral" else messages, system) == expected


def test_a_default_system_prompt_is_carried_over(tokenizer: Any) -> None:
    notices: list[str] = []
    assert entry(modelfile("m", Chat("m", tokenizer, QWEN), notices.append), "SYSTEM") == "You are Qwen."
    assert entry(modelfile("m", Chat("m", tokenizer, QWEN, "Mine."), notices.append), "SYSTEM") == "Mine."
    assert not notices


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }};{% endfor %}", "{{ raise('x') }}"])
def test_an_unknown_template_is_left_out_and_that_is_said(template: str | None, tokenizer: Any) -> None:
    notices: list[str] = []
    text = modelfile("m.gguf", Chat("m", tokenizer, template, 'say """'), notices.append)
    assert "TEMPLATE" not in text and "SYSTEM" not in text and "FROM" in text
    assert any("TEMPLATE" in sentence for sentence in notices) and any(
        "SYSTEM left out" in sentence for sentence in notices
    )
    assert all("\n" not in sentence for sentence in notices)


def test_families_are_told_apart() -> None:
    written = [turns.render(CONVERSATION, "S") for turns in KNOWN]
    assert len(set(written)) == len(written)


def test_the_config_of_a_family_is_the_one_that_transformers_builds() -> None:
    """The families exported here are among those that can be trained."""
    from grpo.export.gguf_metadata import ARCHITECTURE
    from grpo.model.families.table import listed

    assert set(ARCHITECTURE) <= set(listed())
    assert all(AutoConfig.for_model(family).model_type == family for family in ARCHITECTURE)
