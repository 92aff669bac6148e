"""Speech models that are token models: supervised on a codec's tokens, then GRPO with a reward on what is heard."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.sound import sound_problem
from grpo.model.source import open_source
from grpo.sft.__main__ import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import read_metrics, run_tables, write_config
from tests.helpers.tone_codec import (
    END,
    FIRST_PITCH,
    LOUDNESS,
    PITCHES,
    START,
    decode,
    encode,
    save_speech_model,
    waves,
)

TASK = """
import json
from pathlib import Path

from grpo import Task


def load():
    rows = [json.loads(line) for line in (Path(__file__).parent / "asked.jsonl").read_text().splitlines()]
    return Task("tones", rows, [], strict=lambda text, row: False, flexible=lambda text, row: False)


def on_pitch(completion_ids, pitch, **kwargs):
    from tests.helpers.tone_codec import FRAME, decode, encode

    scores = []
    for ids, wanted in zip(completion_ids, pitch):
        heard = encode(decode(ids)) if len(ids) > 1 else []
        scores.append(sum(token == wanted for token in heard[::2]) / max(len(heard[::2]), 1))
    return scores
"""


def spoken(pitch: int, frames: int) -> torch.Tensor:
    return (waves()[pitch] * LOUDNESS[pitch % 3]).repeat(frames)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The model, rows that ask for a pitch and say it, and the task and reward of the GRPO run."""
    folder = tmp_path_factory.mktemp("speech")
    tokenizer = AutoTokenizer.from_pretrained(save_speech_model(folder / "model"))
    generator = random.Random(0)
    rows, asked = [], []
    for _ in range(64):
        pitch = generator.randrange(len(PITCHES))
        prompt = [*tokenizer(f"tone {pitch}")["input_ids"], START]
        codes = [*encode(spoken(pitch, generator.randint(1, 3))), END]
        rows.append({"input_ids": [*prompt, *codes], "labels": [-100] * len(prompt) + codes})
        asked.append({"prompt": prompt, "pitch": FIRST_PITCH + pitch})
    for name, entries in (("rows", rows), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "tones.py").write_text(TASK)
    return folder


def test_the_codec_gives_back_what_it_was_given():
    sound = torch.cat([spoken(2, 2), spoken(5, 1)])
    assert decode(encode(sound)).allclose(sound, atol=1e-5) and len(encode(sound)) == 6


@pytest.mark.vllm
def test_a_model_learns_to_speak_by_examples_and_then_by_what_is_heard(home, capsys):
    supervised = {
        "model": {"name": str(home / "model"), "load_in_4bit": False, "dtype": "float32", "device": "cpu"},
        "lora": {"r": 8, "lora_alpha": 16},
        "sft": {"path": str(home / "rows.jsonl"), "max_length": 64, "per_device_train_batch_size": 4},
        "train": {"learning_rate": 2e-2, "max_steps": 60},
        "checkpoint": {"output_dir": str(home / "sft"), "save_steps": 60},
    }
    assert main([str(write_config(home / "sft.toml", supervised))]) == 0
    steps = read_metrics(home / "sft")
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and "end token" not in capsys.readouterr().out

    from grpo.train import main as train

    tables = run_tables(
        home,
        lora={"r": 8, "lora_alpha": 16, "init": str(home / "sft" / "adapter")},
        task={"name": f"{home / 'tones.py'}:load"},
        rewards=[{"function": f"{home / 'tones.py'}:on_pitch"}],
        rollout={"prompts_per_step": 4, "num_generations": 4, "max_prompt_length": 16, "max_completion_length": 8},
        train={"learning_rate": 1e-3, "max_steps": 2},
    )
    tables["checkpoint"]["output_dir"] = str(home / "grpo")
    assert train([str(write_config(home / "grpo.toml", tables))]) == 0, capsys.readouterr().err
    first, last = read_metrics(home / "grpo")
    assert first["rewards/on_pitch"] > 1 / len(PITCHES), "the supervised adapter speaks"
    assert first["clipped_ratio"] < 1 and first["mismatch_kl"] < 1e-3 and last["mismatch_kl"] < 1e-3
    (kept, *_) = sorted((home / "grpo" / "completions").glob("*.jsonl"))
    sample = json.loads(kept.read_text().splitlines()[0])
    assert "<speech>" in json.dumps(sample) and "tone" in json.dumps(sample)


SOUND = [
    ({"model_type": "csm", "num_codebooks": 32}, "predicts 32 codebooks at once"),
    ({"model_type": "new", "decoder_config": {"n_codebooks": 9}}, "predicts 9 codebooks at once"),
    ({"model_type": "qwen2_audio", "audio_config": {"model_type": "x"}}, "a tower for sound \\(audio_config\\)"),
    ({"model_type": "granite_speech", "encoder_config": {"model_type": "granite_speech_encoder"}}, "tower for sound"),
    ({"model_type": "omni", "talker_config": {}}, "a tower for sound \\(talker_config\\)"),
]


@pytest.mark.parametrize(("values", "sentence"), SOUND, ids=[values["model_type"] for values, _ in SOUND])
def test_models_of_sound_that_are_none_of_tokens_are_refused_by_name(values, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence) as error:
        open_source(Model(name=str(tmp_path)))
    assert f"architecture {values['model_type']!r} is not supported" in str(error.value)
    assert "whose sound is tokens of its vocabulary" in str(error.value)


def test_a_decoder_of_text_with_speech_tokens_and_one_beside_pictures_are_not_refused():
    assert sound_problem({"model_type": "llama", "vocab_size": 156940}) is None
    assert sound_problem({"model_type": "gemma3n", "audio_config": {}, "vision_config": {}}) is None
    assert sound_problem({"model_type": "musicgen", "num_codebooks": 1}) is None


PLANNED = ("canopylabs/orpheus-3b-0.1-ft", "HKUSTAudio/Llasa-1B", "HKUSTAudio/Llasa-3B", "SparkAudio/Spark-TTS-0.5B")


@pytest.mark.parametrize("name", PLANNED)
def test_the_plans_on_the_page_are_those_of_now(name):
    """Without the models and without a network, from the table of well-known ones."""
    from grpo.config.schema import parse_config
    from grpo.memory.gpus import gpu_named
    from grpo.memory.summary import memory_plan
    from grpo.sft.config import parse_sft_config
    from grpo.sft.plan import memory_lines

    gpu = gpu_named("3060")
    sft = {"path": "rows.jsonl", "max_length": 2048, "per_device_train_batch_size": 4}
    supervised = "\n".join(memory_lines(parse_sft_config({"model": {"name": name}, "sft": sft}), gpu))
    rollout = {"prompts_per_step": 8, "num_generations": 8, "max_prompt_length": 256, "max_completion_length": 1024}
    whole = {"model": {"name": name}, "task": {"name": "voice.py:load"}, "rollout": rollout}
    plan = "\n".join(memory_plan(parse_config(whole), gpu))
    figure = r" +([\d.]+)  "
    weights, training = (find(figure + what, supervised) for what in ("weights", "at most, while training"))
    cache, micro = find(figure + "KV cache", plan), find(figure + "at most, while training", plan)
    kept = find(r'here "(\w+)"', plan)
    row = f"| {name} | {weights} | {training} | {cache} | {micro} | {kept} |"
    assert row in (ROOT / "docs" / "speech.md").read_text(), row


def find(pattern, text):
    return re.search(pattern, text)[1]
