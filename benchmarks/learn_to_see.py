"""Does a model learn to see by GRPO? A tiny one, whose tower and decoder are random, counts drawn shapes on a CPU.

    python -m benchmarks.learn_to_see --out results/learn_to_see

Nobody ships a small model that sees in a package, so one is made: a Qwen2.5-VL of 0.7 million random weights and a
vocabulary of a few words. Only LoRA adapters are trained, so the tower's features stay random. Supervised training on
answers stops early (`--supervised` steps), when the model knows what an answer is and is often wrong; GRPO goes on from
its adapter with the reward for the right count. Held-out images are of no training row. The most frequent answer's
share is what guessing would reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo.run.records import read_entries
from grpo.run.versions import hardware, versions
from grpo.tasks import shapes

MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
KEYS = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
SPECIAL = ("<pad>", "<|im_end|>", "<unk>", "<user>", "<assistant>", *MARKS)
WORDS = "How many shapes are there ? Answer with the number alone . red blue green yellow Are more or equal ,".split()
NUMBERS = [str(number) for number in range(17)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASK: dict[str, Any] = {"kinds": ["count"], "grid": 2, "side": 32, "largest": 2, "colours": 2, "held_out": 300}
LORA = {"r": 64, "lora_alpha": 64}


def save_model(folder: Path) -> Path:
    """A random model that sees, with its tokenizer and its processor's file."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

    words = [*SPECIAL, *NUMBERS, *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    names = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    special = [token for token in SPECIAL if token not in names.values()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {"vocab_size": len(words), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
    }
    text |= {
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 4, "window_size": 16}
    tower |= {"spatial_merge_size": 2, "out_hidden_size": 128, "fullatt_block_indexes": [1]}
    ids = {key: words.index(mark) for key, mark in zip(KEYS, MARKS, strict=True)}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=tower, tie_word_embeddings=False, **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # of unit gain, where transformers' 0.02 would let nothing of an image through
            torch.nn.init.normal_(weight, std=1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
    processor |= {"temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 16384}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_answers(file: Path, rows: int) -> Path:
    """Rows of the task with their answers, for supervised training."""
    import pyarrow
    from pyarrow import parquet

    made = [
        {
            "prompt": row["prompt"][0]["content"][1]["text"],
            "completion": row["answer"],
            "image": {"bytes": row["image"].data, "path": None},
        }
        for row in shapes.load(**TASK, rows=rows).train
    ]
    parquet.write_table(pyarrow.Table.from_pylist(made), file)
    return file


def run(module: str, file: Path, tables: dict[str, Any]) -> None:
    """A run of `module` on `tables`."""
    from grpo.config.toml import write_toml

    file.write_text(write_toml(tables))
    subprocess.run([sys.executable, "-m", module, str(file)], check=True)


def experiment(folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Make the model, train it both ways, and return what came of it."""
    folder.mkdir(parents=True)
    model = {"name": str(save_model(folder / "model")), "images": True, "load_in_4bit": False}
    model["dtype"] = options.dtype
    data = save_answers(folder / "answers.parquet", options.rows)
    steady = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "seed": seed}
    supervised = {
        "model": model,
        "lora": LORA,
        "sft": {"path": str(data), "max_length": 96, "packing": False, "per_device_train_batch_size": 32},
        "train": {**steady, "learning_rate": 2e-3, "max_steps": options.supervised},
        "checkpoint": {"output_dir": str(folder / "sft"), "save_steps": options.supervised},
    }
    run("grpo.sft", folder / "sft.toml", supervised)
    reinforced = {
        "model": model,
        "lora": {**LORA, "init": str(folder / "sft" / "adapter")},
        "task": {"name": "shapes", "options": {**TASK, "rows": options.rows}},
        "rewards": [{"function": "grpo.tasks.shapes:right"}],
        "rollout": {
            "prompts_per_step": 32,
            "num_generations": 8,
            "max_prompt_length": 80,
            "max_completion_length": 4,
        },
        "train": {**steady, "learning_rate": 5e-4, "max_steps": options.steps},
        "eval": {"every": max(1, options.steps // 4), "num_generations": 1, "limit": TASK["held_out"], "pass_at": [1]},
        "log": {"samples_every": max(1, options.steps // 4)},
        "checkpoint": {"output_dir": str(folder / "grpo"), "save_steps": options.steps},
    }
    run("grpo.train", folder / "grpo.toml", reinforced)
    return {"seed": seed, **result(folder)}


def result(folder: Path) -> dict[str, Any]:
    """Rewards, held-out accuracy by step, and the share of the most frequent held-out answer."""
    steps = list(read_entries(folder / "grpo" / "metrics.jsonl"))
    rewards = [entry["reward"] for entry in steps]
    ends = min(10, len(rewards))
    answers = [row["answer"] for row in shapes.load(**TASK, rows=1).eval]
    return {
        "reward_first_10": sum(rewards[:ends]) / ends,
        "reward_last_10": sum(rewards[-ends:]) / ends,
        "held_out": [
            {key: entry[key] for key in ("step", *(f"eval/strict_accuracy{end}" for end in ("", "/low", "/high")))}
            for entry in read_entries(folder / "grpo" / "eval.jsonl")
        ],
        "most_frequent_answer": max(map(answers.count, answers)) / len(answers),
        "rewards": [round(reward, 4) for reward in rewards],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs, which is made")
    parser.add_argument("--supervised", type=int, default=65, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    runs = [experiment(options.out / f"seed-{seed}", options, seed) for seed in options.seeds]
    table = Table("seed", "step", "held-out accuracy", "95 %")
    for each in runs:
        for entry in each["held_out"]:
            mean, low, high = (entry[f"eval/strict_accuracy{end}"] for end in ("", "/low", "/high"))
            table.add_row(str(each["seed"]), str(entry["step"]), f"{mean:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    settings = {name: getattr(options, name) for name in ("supervised", "steps", "rows", "dtype")}
    found = {"benchmark": "learn_to_see", "hardware": hardware(), "versions": versions()}
    print(json.dumps({**found, "task": TASK, **settings, "runs": runs}))


if __name__ == "__main__":
    main()
