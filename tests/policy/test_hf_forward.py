"""grpo/policy/hf_forward.py: the training graph, called with batches, gives what transformers' own model gives."""

from __future__ import annotations

import inspect

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.hf_forward import Rows
from grpo.policy.policy import Policy
from tests.helpers.tiny import FAMILIES, save_tiny

torch.manual_seed(0)
IDS = torch.randint(5, 150, (3, 24))
LENGTHS = (24, 17, 5)
RIGHT = torch.tensor([[1] * n + [0] * (24 - n) for n in LENGTHS])
LEFT = RIGHT.flip(1)
PACKED = torch.tensor([[*range(10), *range(14)], [*range(24)], [*range(1), *range(3), *range(20)]])
CALLS = {
    "no mask": {},
    "padded right": {"attention_mask": RIGHT},
    "padded left": {"attention_mask": LEFT},
    "padded left, positions": {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)},
    "packed": {"position_ids": PACKED},
}


def pair(folder, family, *, kernels=False, **lora):
    """transformers' model and the training graph over it, whose adapter does nothing yet."""
    plain = save_tiny(folder, family)
    settings = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.float32)
    policy = Policy(base, Lora(**{"r": 4, **lora}), kernels="torch")
    if kernels:
        install_fused_layers(policy.decoder, base)
    return plain, policy


@pytest.mark.parametrize(
    ("family", "kernels"), [*((family, False) for family in FAMILIES), ("llama", True), ("gemma2", True)]
)
def test_logits_of_batches_padded_and_packed_are_those_of_transformers(family, kernels, tmp_path):
    plain, policy = pair(tmp_path, family, kernels=kernels)
    for name, call in CALLS.items():
        with torch.no_grad():
            expected = plain(IDS, use_cache=False, **call).logits
            result = policy.model(input_ids=IDS, **call).logits
            embedded = policy.model(inputs_embeds=policy.model.get_input_embeddings()(IDS), **call).logits
        seen = call.get("attention_mask", torch.ones_like(IDS)).bool()
        torch.testing.assert_close(
            result[seen], expected[seen], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert torch.equal(result, embedded)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_in_training_is_transformers_loss_without_logits(family, tmp_path):
    plain, policy = pair(tmp_path, family)
    labels = IDS.masked_fill(RIGHT == 0, -100)
    labels[0, :7] = -100
    for extra in ({}, {"num_items_in_batch": 100}):
        inputs = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, **extra}
        expected = plain(**inputs, use_cache=False).loss.detach()
        result = policy.model.train()(**inputs)
        assert result.logits is None and abs(float(result.loss.detach() - expected)) < 1e-5
        evaluated = policy.model.eval()(**inputs)
        assert evaluated.logits.shape == (3, 24, 160) and abs(float(evaluated.loss.detach() - expected)) < 1e-5
        shifted = {**inputs, "shift_labels": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]}
        assert abs(float(policy.model.train()(**shifted).loss.detach() - expected)) < 1e-5
        as_tuple = policy.model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and abs(float(as_tuple[0].detach() - expected)) < 1e-5


@pytest.mark.parametrize(
    ("family", "kernels"), [("llama", False), ("llama", True), ("mistral", False), ("gemma2", True)]
)
def test_pairs_that_begin_alike_are_computed_once_to_the_same_gradients(family, kernels, tmp_path):
    """Rows 0 and 2 share 20 tokens, rows 1 and 3 none; a mistral's window is shorter than the shared part."""
    plain, policy = pair(tmp_path, family, kernels=kernels)
    ids = torch.cat([IDS[:2], IDS[2:], IDS[1:2].flip(1)])
    ids[2, :20] = ids[0, :20]
    mask = torch.tensor([[1] * n + [0] * (24 - n) for n in (24, 17, 22, 19)])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :12] = -100
    rows = Rows(ids, mask, None)
    assert rows.packing.tokens == mask.sum() - 20 and rows.packing.shares_prefixes
    assert rows.unpack(rows.pack(ids)).equal(ids * mask)
    labels_weighted = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    policy.model.train()
    with torch.no_grad():
        expected = plain(**labels_weighted, use_cache=False)
        logits = policy.model.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected.logits[mask.bool()], rtol=2e-4, atol=2e-4)

    def gradients(**inputs):
        policy.model.train()(**inputs).loss.backward()
        found = [parameter.grad.clone() for parameter in policy.parameters()]
        policy.model.zero_grad()
        return found

    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    positions = torch.arange(24).expand(4, 24)  # as given, they are obeyed row by row
    for mine, apart in zip(
        gradients(**labels_weighted), gradients(**labels_weighted, position_ids=positions), strict=True
    ):
        torch.testing.assert_close(mine, apart, rtol=1e-3, atol=1e-5)


def test_rows_that_cannot_be_shared_are_packed_as_they_are():
    same = IDS[:1].expand(2, 24)
    assert Rows(same, None, None).packing.tokens == 25, "each keeps a token of its own"
    assert Rows(same, LEFT[1:2].expand(2, 24), None).packing.tokens == 34, "padding on the left"
    assert Rows(IDS[:1].expand(3, 24), None, None).packing.tokens == 72, "no pairs"
    assert Rows(same[:, :16], None, None).packing.tokens == 32, "too short to be worth it"


def test_each_row_and_each_packed_sequence_sees_itself_alone(tmp_path):
    _, policy = pair(tmp_path, "llama")
    changed = IDS.clone()
    changed[0, :10] = 7  # the first of two sequences in the first row
    with torch.no_grad():
        before, after = (policy.model(input_ids=ids, position_ids=PACKED).logits for ids in (IDS, changed))
    assert torch.equal(before[0, 10:], after[0, 10:]) and torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :10], after[0, :10])


def test_greedy_generation_by_transformers_is_that_of_the_plain_model(tmp_path):
    plain, policy = pair(tmp_path, "llama")
    asked = {"input_ids": IDS[:2, :8], "attention_mask": LEFT[:2, -8:], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(policy.model.generate(**asked), plain.generate(**asked))


def test_what_the_graph_has_not_is_refused_in_a_sentence(tmp_path):
    _, policy = pair(tmp_path, "llama")
    for call, message in (
        ({"past_key_values": object()}, "use_cache=False"),
        ({"cache": object()}, "use_cache=False"),
        ({"output_attentions": True}, "leave it out"),
        ({"output_hidden_states": True}, "leave it out"),
        ({"attention_mask": torch.ones(3, 1, 24, 24)}, r"\[batch, length\]"),
    ):
        with pytest.raises(UserError, match=message):
            policy.model(input_ids=IDS, **call)


def test_the_graph_looks_like_the_model_it_is(tmp_path):
    plain, policy = pair(tmp_path, "llama")
    assert type(policy.decoder) is type(plain)
    for mine, theirs in ((policy.decoder, plain), (policy.decoder.model, plain.model)):
        assert inspect.signature(mine.forward) == inspect.signature(theirs.forward)
    assert not getattr(policy.model, "is_quantized", False) and policy.model.dtype == torch.float32
    assert not hasattr(policy.model.config, "quantization_config")


@pytest.mark.parametrize("kernels", [False, True])
def test_autocast_does_not_change_the_dtype_that_the_model_computes_in(kernels, tmp_path):
    _, policy = pair(tmp_path, "llama", kernels=kernels)
    policy.model.train()
    expected = policy.model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy.model(input_ids=IDS, labels=IDS).loss, expected)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_as_trainers_switch_it_on_changes_no_gradient(kernels, reentrant, tmp_path):
    _, policy = pair(tmp_path, "llama", kernels=kernels, init_lora_weights="gaussian")
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    policy.model.train()

    def gradients():
        policy.model(input_ids=IDS, attention_mask=RIGHT, labels=IDS).loss.backward()
        found = [parameter.grad.clone() for parameter in policy.parameters()]
        policy.model.zero_grad()
        return found

    expected = gradients()
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    policy.model.enable_input_require_grads()
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
