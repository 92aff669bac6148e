"""grpo/model/config_keys.py and rope.py: of any configuration, vLLM and the training graph compute the same, or a
sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig

from grpo.config.schema import Lora, Model, parse_config
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.checks import check_head_size
from grpo.model.config_keys import complaints, normalize_config, own_keys, served_values
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.families import family_config
from tests.helpers.model_configs import LONGEST, VALUES, configurations, save_model
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny import COMMON, FAMILIES, VOCABULARY
from tests.helpers.tiny_run import run_tables, save_rewards

PROMPTS = [[5, 9, 33, 7, 21, 64, 90, 11, 2, 3], [12, 140, 77]]
CPU = torch.device("cpu")


def load(folder: Path) -> tuple[BaseWeights, Policy]:
    """Base and policy of the model in `folder`, with an adapter that does something."""
    model = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    source = open_source(model)
    check_head_size(source.config, source.path, on_cpu=True)
    base = BaseWeights(source, model, device=CPU, dtype=torch.float32)
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    policy.set_longest(LONGEST)
    return base, policy


@torch.no_grad()
def scored(policy: Policy, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    return policy.score(prompts, completions, temperature=1.0).logprobs


def check_equal(folder: Path, reference: object) -> None:
    """vLLM's and the training graph's logprobs are the same, whoever shares a row, and the base's transformers'."""
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    base, policy = load(folder)
    engine = Engine(base, policy, EngineSettings(max_seq_length=LONGEST, max_num_seqs=4))
    try:
        requests = [Request(index, PROMPTS[index % 2], seed=index) for index in range(3)]
        done = {c.request_id: c for c in engine.generate(requests, SamplingSettings(1.0, LONGEST - 12))}
    finally:
        engine.close()
    prompts = [request.prompt_ids for request in requests]
    completions = [done[index].token_ids for index in range(3)]
    sampled = torch.tensor([logprob for index in range(3) for logprob in done[index].logprobs])
    assert sampled.isfinite().all()
    together = scored(policy, prompts, completions)
    assert (sampled - together).abs().max() < 5e-4
    alone = torch.cat([scored(policy, [p], [c]) for p, c in zip(prompts, completions, strict=True)])
    assert (together - alone).abs().max() < 5e-5
    with policy.model.disable_adapter():
        mine = scored(policy, prompts[:1], completions[:1])
    with torch.no_grad():
        whole = prompts[0] + completions[0]
        answer = reference(torch.tensor([whole]), return_dict=True).logits[0]  # type: ignore[operator]
    theirs = torch.log_softmax(answer.float(), -1)[len(prompts[0]) - 1 : -1][range(len(completions[0])), completions[0]]
    # Of "longrope" transformers takes the factors that this one sequence asks for.
    if not needs_longer(base, len(whole)):
        assert (mine - theirs).abs().max() < 5e-4


def needs_longer(base: BaseWeights, length: int) -> bool:
    from grpo.model.rope import rotary_parameters

    return any(
        length <= values.get("original_max_position_embeddings", LONGEST) < LONGEST
        for _, values in rotary_parameters(base.config)
        if values["rope_type"] == "longrope"
    )


def check_configuration(family: str, values: dict) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = save_model(folder, family, values)
        try:
            check_equal(folder, reference)
        except UserError as error:
            sentence = str(error)
            assert sentence.startswith(str(folder)) and "\n" not in sentence and len(sentence) < 600, sentence
            event("a sentence")
        else:
            assert reference is not None
            event("equal logprobs")


MANY = {
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],  # each example starts vLLM; the first that fails says enough
    "print_blob": True,
    "database": None,
}


@pytest.mark.vllm
@pytest.mark.slow
@settings(max_examples=6, derandomize=True, **MANY)
@given(configurations())
def test_a_configuration_is_served_exactly_or_refused_in_a_sentence(drawn):
    check_configuration(*drawn)


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(1500)
@settings(max_examples=300, **MANY)
@given(configurations())
def test_many_configurations_are_served_exactly_or_refused_in_a_sentence(drawn):
    check_configuration(*drawn)


def save_longrope(folder: Path, original: int = 24, vocab_size: int = VOCABULARY, **more: object) -> object:
    """A Phi-3 with rotary factors for at most `original` tokens and others for more."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [float(2 + number % 5) for number in range(16)]}
    values = {"model_type": "phi3", **COMMON, **FAMILIES["phi3"], "vocab_size": vocab_size}
    values["original_max_position_embeddings"] = original
    return save_model(folder, "phi3", {**values, "rope_parameters": {"rope_type": "longrope", **factors, **more}})


def test_a_sequences_logprobs_do_not_depend_on_its_neighbours(tmp_path):
    """One of them longer than the model's first training, by whose length transformers would choose for the row."""
    save_longrope(tmp_path)
    _, policy = load(tmp_path)
    prompts, completions = PROMPTS, [[7, 8, 9], [(7 * number) % 160 for number in range(40)]]
    for longest, changes in ((24, True), (20, False), (48, True), (256, False), (24, True)):
        assert policy.set_longest(longest) == changes
        together = scored(policy, prompts, completions)
        alone = [scored(policy, [p], [c]) for p, c in zip(prompts, completions, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


@pytest.mark.parametrize("longest", [24, 48])
def test_the_rotation_is_transformers_for_a_sequence_that_is_as_long_as_the_run_allows(longest, tmp_path):
    reference = save_longrope(tmp_path, attention_factor=1.3)
    _, policy = load(tmp_path)
    policy.set_longest(longest)
    prompt, completion = PROMPTS[0], [(11 * number) % 160 for number in range(longest - 10)]
    with policy.model.disable_adapter(), torch.no_grad():
        mine = policy.score([prompt], [completion], temperature=1.0).logprobs
        logits = reference(torch.tensor([prompt + completion])).logits[0]
    theirs = torch.log_softmax(logits, -1)[9:-1][range(len(completion)), completion]
    assert (mine - theirs).abs().max() < 1e-4


@pytest.mark.vllm
@pytest.mark.parametrize("longest", [24, LONGEST])
def test_vllm_rotates_as_the_training_graph_on_both_sides_of_the_original_length(longest, tmp_path):
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    save_longrope(tmp_path, attention_factor=1.3)
    base, policy = load(tmp_path)
    engine = Engine(base, policy, EngineSettings(max_seq_length=longest, max_num_seqs=2))
    try:
        (done,) = engine.generate([Request(0, PROMPTS[1], seed=0)], SamplingSettings(1.0, longest - 4))
        held = engine.vllm_model().model.layers[1].self_attn.rotary_emb.cos_sin_cache
        assert torch.equal(held, policy.decoder.model.rotary_emb.table(len(held)))
    finally:
        engine.close()
    # With a short neighbour before it, and one of the full length after it.
    beside = [[1, 2], PROMPTS[1], PROMPTS[0]]
    logprobs = scored(policy, beside, [[5], done.token_ids, [6] * (longest - 10)])[1 : 1 + len(done.token_ids)]
    assert (torch.tensor(done.logprobs) - logprobs).abs().max() < 1e-4


def test_every_key_that_transformers_documents_is_varied():
    """A key that a later transformers adds has to be looked at: here, in model_keys.py and in vLLM."""
    known = set(VALUES) | {"initializer_range"}
    for family in FAMILIES:
        keys = own_keys(AutoConfig.for_model(family))
        assert keys <= known, f"{family}: {sorted(keys - known)}"


def test_what_has_no_part_in_the_computation_is_told(tmp_path):
    config = AutoConfig.for_model("phi3", **COMMON, resid_pdrop=0.1, attention_dropout=0.2, invented=1, logit_scale=2.0)
    notices = normalize_config(config)
    assert config.resid_pdrop == config.attention_dropout == 0 and normalize_config(config) == notices[-1:]
    assert [sentence.split(" = ")[0] for sentence in notices[:2]] == [
        "the model's attention_dropout",
        "the model's resid_pdrop",
    ]
    assert notices[2].endswith("Phi3Config does not have are not used: invented, logit_scale") and len(notices) == 3
    assert not {"invented", "logit_scale"} & set(served_values(config))


def test_rotary_entries_that_text_does_not_need_are_told():
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}
    config = AutoConfig.for_model("qwen2", **COMMON, rope_parameters=parameters)
    (notices,) = normalize_config(config)
    assert notices.endswith("are not used: mrope_section")


def test_code_beside_a_family_that_transformers_has_is_not_run(tmp_path):
    save_longrope(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "mine.Phi3Config", "AutoModelForCausalLM": "mine.Phi3ForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text("raise SystemExit('this ran')")
    for trusted in (False, True):
        config = open_source(Model(name=str(tmp_path), trust_remote_code=trusted)).config
        assert type(config).__module__.startswith("transformers.")
        assert "not used: auto_map" in normalize_config(config)[0]


def test_a_session_whose_sequences_get_longer_rotates_for_their_length_and_starts_vllm_again(tmp_path):
    from grpo.session import open_session

    save_small_chat_model(tmp_path / "model")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "model" / file).unlink()
    save_longrope(tmp_path / "model", original=64, vocab_size=259)
    save_rewards(tmp_path)
    short, longer = (
        parse_config(run_tables(tmp_path, rollout={"max_prompt_length": 20, "max_completion_length": length}))
        for length in (44, 45)
    )
    with open_session(short, start_engine=False) as session:
        stopped = []
        session._stop_engine = lambda: stopped.append(session.config.max_seq_length)
        before = scored(session.policy, [[5, 6]], [[7, 8, 9]])
        session.configure(longer)
        assert stopped == [65] and (scored(session.policy, [[5, 6]], [[7, 8, 9]]) - before).abs().max() > 1e-3
        session.configure(short)
        assert stopped == [65, 64] and torch.equal(scored(session.policy, [[5, 6]], [[7, 8, 9]]), before)
        session.configure(short)
        assert stopped == [65, 64]
        del session._stop_engine
    with pytest.raises(RuntimeError, match="session is closed"):
        session.policy.eval()


def test_dropout_of_any_name_is_not_applied() -> None:
    config = AutoConfig.for_model("seed_oss", **COMMON, residual_dropout=0.1, attention_dropout=0.2)
    notices = normalize_config(config)
    assert config.residual_dropout == config.attention_dropout == 0
    assert [notice.split(" is not applied")[0] for notice in notices] == [
        "the model's attention_dropout = 0.2",
        "the model's residual_dropout = 0.1",
    ]


def test_what_a_family_reads_of_its_rotary_entries_is_not_called_unused() -> None:
    config = family_config("ministral3")
    assert "llama_4_scaling_beta" in config.rope_parameters and normalize_config(config) == []
    config = AutoConfig.for_model("llama", **COMMON, rope_parameters=dict(config.rope_parameters))
    assert "llama_4_scaling_beta" in " ".join(normalize_config(config))


def test_a_family_whose_graph_masks_a_window_anyway_needs_one() -> None:
    for kind in (Gemma2Config, Gemma3TextConfig):
        config = kind(sliding_window=None, layer_types=["full_attention"] * 2, num_hidden_layers=2)
        (complaint,) = complaints(config)
        assert complaint.key == "sliding_window" and "set one" in complaint.reason
        assert not list(complaints(kind(num_hidden_layers=2)))
