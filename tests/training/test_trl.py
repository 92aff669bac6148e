"""TRL's and transformers' trainers on `grpo.load(...).model`: the losses that they have on a plain peft model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import grpo
from grpo.config.schema import SEVEN_PROJECTIONS
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.lora_linear import BaseLinear
from tests.helpers.small_chat import save_small_chat_model

STEPS = 10
SHAPE = {"r": 4, "lora_alpha": 8}
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n} + {n * n % 7}?"}],
        "completion": [{"role": "assistant", "content": f"It is {n + n * n % 7}" + "." * (n % 9)}],
    }
    for n in range(40)
]
PAIRS = [
    {"prompt": f"How much is {n} plus {n}? ", "chosen": f"{2 * n}", "rejected": f"maybe {n}{'?' * (n % 5)}"}
    for n in range(20)
]


@pytest.fixture(scope="module", params=["16 bit", "4 bit and kernels"])
def models(request, tmp_path_factory):
    """Two peft models with the same weights and the same adapter, which does something: ours and a plain one."""
    folder = save_small_chat_model(tmp_path_factory.mktemp("model"))
    four_bit = request.param != "16 bit"
    with grpo.load(
        str(folder), load_in_4bit=four_bit, max_seq_length=256, lora=SHAPE, dtype="float32", device="cpu"
    ) as policy:
        if four_bit:
            install_fused_layers(policy.session.policy.decoder, policy.session.base)
        plain = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            LoraConfig(**SHAPE, target_modules=SEVEN_PROJECTIONS, task_type="CAUSAL_LM"),
        )
        dequantised = {
            name.replace(".base_layer", ""): module.dense()
            for name, module in policy.model.get_base_model().named_modules()
            if isinstance(module, BaseLinear)
        }
        with torch.no_grad():
            for name, weight in dequantised.items():
                plain.get_base_model().get_submodule(name).base_layer.weight.copy_(weight)
        torch.manual_seed(3)
        adapter = {
            name: torch.randn_like(tensor) * 0.05 for name, tensor in get_peft_model_state_dict(policy.model).items()
        }
        yield policy, plain, adapter


def settings(kind: type, folder: Any, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )


def losses(models: Any, make: Any) -> tuple[list[float], list[float]]:
    """The ten losses of the trainer that `make` gives, on our model and on the plain one."""
    policy, plain, adapter = models
    found = []
    for model in (policy.model, plain):
        set_peft_model_state_dict(model, adapter)
        set_seed(0)
        trainer = make(model, policy.tokenizer)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
    assert not policy.session.engine_started
    assert len(found[0]) == STEPS and found[0][0] != found[0][-1]
    return found[0], found[1]


def close(pair: tuple[list[float], list[float]]) -> bool:
    """Equal to 3e-5, as a share of those losses that are above 1."""
    return pair[0] == pytest.approx(pair[1], rel=3e-5, abs=3e-5)


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 128}], ids=["padded", "packed"])
def test_sft_trainer_has_the_losses_of_a_plain_peft_model(models, more, tmp_path):
    def make(model: Any, tokenizer: Any) -> Any:
        return SFTTrainer(
            model,
            settings(SFTConfig, tmp_path, **more),
            train_dataset=Dataset.from_list(CHATS),
            processing_class=tokenizer,
        )

    assert close(losses(models, make))


def test_dpo_trainer_has_the_losses_of_a_plain_peft_model(models, tmp_path):
    def make(model: Any, tokenizer: Any) -> Any:
        return DPOTrainer(
            model,
            args=settings(DPOConfig, tmp_path),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )

    mine, theirs = losses(models, make)
    assert close((mine, theirs)) and mine[0] == pytest.approx(0.6931, abs=1e-4)  # the reference is the start


def test_transformers_trainer_has_the_losses_of_a_plain_peft_model(models, tmp_path):
    def make(model: Any, tokenizer: Any) -> Any:
        rows = []
        for chat in CHATS:
            ids = tokenizer(chat["prompt"][0]["content"] + chat["completion"][0]["content"])["input_ids"][:24]
            ids += [0] * (24 - len(ids))
            rows.append(
                {"input_ids": ids, "attention_mask": [int(i > 0) for i in ids], "labels": [i or -100 for i in ids]}
            )
        return Trainer(model, settings(TrainingArguments, tmp_path), train_dataset=Dataset.from_list(rows))

    assert close(losses(models, make))


def test_a_trainers_checkpoint_is_an_adapter_that_peft_reads(tmp_path):
    folder = save_small_chat_model(tmp_path / "model")
    with grpo.load(
        str(folder), load_in_4bit=False, max_seq_length=256, lora=SHAPE, dtype="float32", device="cpu"
    ) as policy:
        args = settings(SFTConfig, tmp_path / "out")
        trainer = SFTTrainer(
            policy.model, args, train_dataset=Dataset.from_list(CHATS), processing_class=policy.tokenizer
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        policy.save_lora(tmp_path / "mine")
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            expected = policy.model.eval()(input_ids=ids).logits
        from peft import PeftModel

        for saved in ("saved", "mine"):
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                read = PeftModel.from_pretrained(plain, tmp_path / saved).eval()
                torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
