"""What vLLM builds a model of is a class that this process has imported."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"]))
def test_vllm_asks_no_other_process_about_a_class(architecture):
    from vllm import ModelRegistry

    from grpo.rollout.vllm_backend import prepare_class

    prepare_class(architecture)
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *arguments, **options: started.append(arguments))
        info = ModelRegistry.models[architecture].inspect_model_cls()
    assert not started
    assert info.is_text_generation_model


def test_a_family_without_a_class_of_its_own_is_served_without_one_too():
    from vllm import ModelRegistry

    from grpo.rollout.vllm_backend import by_transformers, prepare_class

    prepare_class("AFamilyThatVllmDoesNotKnow")
    assert "TransformersForCausalLM" in ModelRegistry.models
    assert not any(by_transformers(model) for model in ModelRegistry.models.values())
