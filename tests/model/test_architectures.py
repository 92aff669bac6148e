"""Every supported family: vLLM and the training graph, on one copy, give the same logprobs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from grpo.config.schema import SEVEN_PROJECTIONS, Lora, Model
from grpo.errors import UserError
from grpo.model.architectures import adapter_targets, check_supported
from grpo.model.base_weights import BaseWeights
from grpo.model.config_keys import check_keys
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.families import family_config
from tests.helpers.tiny import COMMON, FAMILIES, save_tiny, tiny_model

PROMPTS = [[5, 9, 33, 7, 21, 64, 90, 11, 2, 3], [12, 140, 77]]
CPU = torch.device("cpu")


def load(folder, *, load_in_4bit=False, lora=None, dtype=torch.float32):
    """Base and policy of the model in `folder`, with an adapter that does something."""
    model = Model(name=str(folder), load_in_4bit=load_in_4bit, dtype=str(dtype).removeprefix("torch."))
    source = open_source(model)
    base = BaseWeights(source, model, device=CPU, dtype=dtype)
    policy = Policy(base, lora or Lora(r=4, lora_alpha=8), seed=1)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return base, policy


@pytest.mark.parametrize("family", FAMILIES)
def test_training_graph_equals_transformers_with_the_adapter_off(family, tmp_path):
    reference = save_tiny(tmp_path, family)
    base, policy = load(tmp_path)
    completion = [8, 15, 99, 4]
    with policy.reference():
        scored = policy.score(PROMPTS, [completion, completion], temperature=0.7, chunk_tokens=3)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.log_softmax(logits / 0.7, -1)[range(4), completion])
    torch.testing.assert_close(scored.logprobs, torch.cat(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_and_trainer_agree_with_a_non_zero_adapter(family, tmp_path):
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    save_tiny(tmp_path, family)
    base, policy = load(tmp_path)
    engine = Engine(base, policy, EngineSettings(max_seq_length=64, max_num_seqs=8))
    try:
        requests = [Request(index, PROMPTS[index % 2], seed=index) for index in range(6)]
        for adapter in (True, False):
            done = {c.request_id: c for c in engine.generate(requests, SamplingSettings(0.9, 24), adapter=adapter)}
            completions = [done[index].token_ids for index in range(6)]
            rollout = torch.tensor([logprob for index in range(6) for logprob in done[index].logprobs])
            prompts = [request.prompt_ids for request in requests]
            if adapter:
                with torch.no_grad():
                    scored = policy.score(prompts, completions, temperature=0.9)
            else:
                with policy.reference():
                    scored = policy.score(prompts, completions, temperature=0.9)
            assert (rollout - scored.logprobs).abs().max() < 1e-4
    finally:
        engine.close()


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=100, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2'"):
        load(tmp_path)


def test_phi3_maps_the_seven_projections_to_its_fused_modules(tmp_path):
    save_tiny(tmp_path, "phi3")
    _, policy = load(tmp_path)
    names = {name.rpartition(".")[2] for name in policy.adapter_layers()}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_tiny_models_have_confident_predictions():
    """Near-uniform logits would hide differences."""
    with torch.no_grad():
        logits = tiny_model("llama")(torch.tensor([PROMPTS[0]])).logits
    assert torch.log_softmax(logits, -1).max(-1).values.mean() > -3.5


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", SEVEN_PROJECTIONS),
        ("nemotron", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_by_default_every_linear_layer_has_an_adapter(family, names):
    config = AutoConfig.for_model(family, **COMMON)
    assert sorted(adapter_targets(config, SEVEN_PROJECTIONS)) == sorted(names)


def test_a_name_that_a_family_lacks_is_refused():
    with pytest.raises(UserError, match="'gate_proj', which is no linear layer of this model; name some of q_proj, "):
        adapter_targets(AutoConfig.for_model("nemotron", **COMMON), ["up_proj", "gate_proj"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5", "it has an encoder beside its decoder"),
        (
            "xlm-roberta",
            "its models are encoders, which fill in masked tokens and predict no next one, unless config.json",
        ),
        ("distilbert", "it is an encoder, as embedding models are, and predicts no next token"),
        ("embedding_gemma2", "transformers has no causal language model of it"),
        ("deepseek_v3", "keys and values in latent form"),
        ("mamba", "has no num_attention_heads"),
    ],
)
def test_what_no_gate_could_pass_is_refused_by_its_kind(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"/m: architecture '{family}' is not supported: .*{reason}.*; use a decoder"):
        check_supported(AutoConfig.for_model(family), "/m")


def test_keys_of_a_decoder_with_an_embedding_for_every_layer() -> None:
    config = family_config("gemma4_text", vocab_size=200)
    check_keys(config, "/m")
    config.vocab_size_per_layer_input = 160
    with pytest.raises(UserError, match="vocab_size_per_layer_input = 160: must be vocab_size, 200, .*; correct it"):
        check_keys(config, "/m")
    config = family_config("gemma4_text", use_bidirectional_attention="all")
    with pytest.raises(UserError, match='use_bidirectional_attention = "all": completions are sampled left to right'):
        check_keys(config, "/m")
