"""Whole GRPO steps on prompts with images: a model of Qwen2.5-VL-3B's shape with random weights, on one GPU.

The base is NF4, the tower 16-bit; prompts are questions of the task "shapes" about a drawing each. Reported are the
phases of a step, how often an image went through the tower (once a group, however many completions it has), the
mismatch of sampled and trained logprobs, and the peak of memory beside the plan's.

    python -m benchmarks.images --systems trl,ours --out benchmarks/results/images.json
    python -m benchmarks.images --tiny --device cpu --shape tiny-deepstack

TRL's GRPOTrainer, beside it on the same folder and the same work: unquantised, as it trains models that take images,
the tower run with every completion of a micro-batch. Its completions come from transformers' generate, so that of the
two it is training and memory that compare. It needs torchvision, and is left out without.

The first step compiles and does not count. Prints a line a step; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.processes import wait_or_end, write_result

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)
QUESTIONS: dict[str, Any] = {"kinds": ["count"], "rows": 64, "held_out": 0}
"""Options of the task: questions of one length."""
ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
TEXT: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 2, "bos_token_id": 1, "head_dim": 64,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16,
    "num_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 8192,
            "eos_token_id": 151645, "bos_token_id": 151643, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": True,
    },
    "tiny-deepstack": {
        "model_type": "qwen3_vl",
        "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [12, 10, 10]}},
        "vision_config": {**TOWER, "deepstack_visual_indexes": [0, 1]},
        "tie_word_embeddings": True,
    },
    "tiny-hybrid": {
        "model_type": "qwen3_5",
        "text_config": {
            **TEXT, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
        },
        "vision_config": TOWER,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Qwen2.5-VL-3B, but for the positions. Those whose names begin with `tiny` are of the same family, of Qwen3-VL's and
of Qwen 3.5's: to try the script, and each family, in seconds."""


def make_model(shape: str, folder: Path, device: str) -> None:
    """A whole folder: random weights ~ N(0, 0.02), norms 1, a word for every token, an image processor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = SHAPES[shape]
    size = values["text_config"]["vocab_size"]
    ids = {key: size - 10 + place for place, key in enumerate(KEYS)}
    text = {**values["text_config"], "tie_word_embeddings": values["tie_word_embeddings"]}
    whole = {key: value for key, value in values.items() if key != "model_type"}
    config = AutoConfig.for_model(values["model_type"], **{**whole, "text_config": text, **ids, "dtype": "bfloat16"})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith("weight") and len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        weight = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
        return weight.mul_(0.02).cpu()

    tensors = {name: drawn(name, each.shape) for name, each in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, size, text["eos_token_id"], ids)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2,
        "patch_size": values["vision_config"]["patch_size"], "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        # vLLM's own processor takes what is not in the file as nothing to be done.
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_tokenizer(folder: Path, size: int, end: int, ids: dict[str, int]) -> None:
    """A word for every id of the model, "w0", "w1", ..., split at spaces; those of images have their names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {"</s>": end, **dict(zip(MARKS, ids.values(), strict=True))}
    words = {f"w{number}": number for number in range(size) if number not in named.values()} | named
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="w0")
    fast.add_special_tokens({"additional_special_tokens": list(MARKS)})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with variance that costs nothing."""
    return [sum(ids) % 1000 / 1000 for ids in completion_ids]


def settings(options: argparse.Namespace, folder: Path, run: Path) -> dict[str, Any]:
    return {
        "model": {
            "name": str(folder), "images": True, "device": options.device, "offload_tower": options.offload_tower,
        },
        "lora": {"r": 16, "lora_alpha": 32},
        "task": {"name": "grpo.tasks.shapes:load", "options": {**QUESTIONS, "side": options.side}},
        "rewards": [{"function": f"{Path(__file__).resolve()}:spread"}],
        "rollout": {
            "prompts_per_step": options.prompts, "num_generations": options.generations,
            "max_prompt_length": options.prompt, "max_completion_length": options.completion,
        },
        "train": {
            "learning_rate": 1e-5, "max_steps": options.steps, "tokens_per_micro_batch": options.tokens,
            "gradient_checkpointing": options.checkpointing,
        },
        "log": {"samples_every": 1000},
        "checkpoint": {"output_dir": str(run), "save_steps": 1000},
    }  # fmt: skip


def planned(config: Any) -> dict[str, Any]:
    """What the plan says of this GPU before anything is loaded."""
    import torch

    from grpo.memory.fit import best_fit, usable_bytes
    from grpo.memory.gpus import as_found
    from grpo.memory.plan import plan_memory
    from grpo.memory.shapes import model_shape, model_tower

    shape, tower = model_shape(config.model), model_tower(config.model)
    gpu = torch.cuda.is_available() and config.model.device != "cpu"
    plan = plan_memory(config, shape, 2, on_gpu=gpu, tower=tower)
    names = ("weights", "adapter", "vllm", "tower", "images", "sampling", "peaks")
    found = {name: getattr(plan, name) for name in names}
    if not gpu:
        return found
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    card = as_found(torch.cuda.get_device_name(), 10 * major + minor, total)
    fit = best_fit(config, shape, 2, plan, usable_bytes(free, total), card)
    assert fit is not None
    return found | {"mode": fit.mode, "kv_cache": fit.kv_cache, "peak": plan.peak(fit.kv_cache, fit.mode)}


def train_trl(options: argparse.Namespace, folder: Path) -> None:
    """Steps with TRL in this process; one line of JSON a step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.common.grpo_peers import step_clock
    from grpo.tasks.shapes import load

    gpu, size = torch.cuda.is_available(), json.loads((folder / "preprocessor_config.json").read_text())["size"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessor(size=size)
    processor = Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=tokenizer.chat_template
    )
    # transformers does not take a completion with a placeholder in it; and all are to be equally long.
    never = tokenizer.convert_tokens_to_ids([*MARKS, "</s>"])
    rows = load(**QUESTIONS, side=options.side).train
    micro_batch = options.generations
    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=spread,
        args=GRPOConfig(
            output_dir=str(options.scratch / "images-trl"), per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=options.prompts * options.generations // micro_batch,
            num_generations=options.generations, max_completion_length=options.completion, temperature=1.0, beta=0.0,
            model_init_kwargs={"dtype": "bfloat16"}, bf16=gpu, use_cpu=not gpu, learning_rate=1e-5,
            lr_scheduler_type="constant", max_steps=options.trl_steps, logging_steps=1, disable_tqdm=True,
            save_strategy="no", report_to="none", seed=0, generation_kwargs={"suppress_tokens": never},
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": row["prompt"][0]["content"][-1]["text"]}],
                 "image": row["image"].pil()}
                for row in rows
            ]
        ),
        processing_class=processor,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, task_type="CAUSAL_LM",
            target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        ),
    )  # fmt: skip
    trainer.add_callback(step_clock(trainer, lambda step: False))
    trainer.train()


def run_trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What TRL's steps took, in a process of its own; why there are none, where there are none."""
    if importlib.util.find_spec("torchvision") is None:
        return {"failed": "torchvision is not installed"}
    log = options.scratch / "images-trl.log"
    command = [sys.executable, "-m", "benchmarks.images", *sys.argv[1:], "--train-trl", str(folder)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        said = wait_or_end(process, options.trl_seconds)
    text = log.read_text(errors="replace")
    steps = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("STEP ")]
    found: dict[str, Any] = {"steps": steps, **({"failed": said, "log": text[-1500:]} if said else {})}
    if len(steps) > 1:
        found["median"] = {
            name: round(statistics.median(step[name] for step in steps[1:]), 3)
            for name in ("step_seconds", "rollout_seconds", "train_seconds", "peak_memory_gib")
            if steps[1][name] is not None
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="qwen2.5-vl-3b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--side", type=int, default=448, help="pixels of an image's side: 448 are 256 tokens")
    parser.add_argument("--prompt", type=int, default=288, help="tokens at most; those of 448 pixels have 269")
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument(
        "--tokens", type=int, help="train.tokens_per_micro_batch; left out: what half of the groups fill"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpointing", default="layer", help="the mode that is planned and measured")
    parser.add_argument("--offload-tower", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little work: tries the script")
    parser.add_argument("--systems", default="ours", type=lambda text: text.split(","), help="ours, trl, or both")
    parser.add_argument("--trl-steps", type=int, default=3)
    parser.add_argument("--trl-seconds", type=float, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train-trl", type=Path, help="train TRL's in this process")
    options = parser.parse_args()
    if options.tiny:
        options.shape = options.shape if options.shape.startswith("tiny") else "tiny"
        options.side, options.prompt, options.completion, options.steps = 224, 128, 16, 2
        options.prompts, options.generations = 4, 4
    if options.tokens is None:  # micro-batches are even, so that others than these would leave the budget unfilled
        options.tokens = -(-options.prompts // 2) * (options.prompt + options.generations * options.completion)
    if options.train_trl:
        train_trl(options, options.train_trl)
        return 0
    begun = time.monotonic()
    folder, run = options.scratch / f"images-{options.shape}", options.scratch / "images-run"
    shutil.rmtree(run, ignore_errors=True)
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_model(options.shape, folder, options.device)
        (folder / "complete").touch()
    made = time.monotonic() - begun
    print(f"model made in {made:.1f} s", flush=True)
    result: dict[str, Any] = {"benchmark": "images", "model_seconds": round(made, 1)}
    if "trl" in options.systems:
        result["trl bf16"] = run_trl(options, folder)
        print("TRL:", {key: value for key, value in result["trl bf16"].items() if key != "steps"}, flush=True)
        write_result(options.out, result)
    if "ours" in options.systems:
        result |= measured(options, folder, run)
    write_result(options.out, result)
    print(json.dumps(result))
    return 0


def measured(options: argparse.Namespace, folder: Path, run: Path) -> dict[str, Any]:
    """The run's figures, beside the plan's."""
    from grpo.config.schema import parse_config
    from grpo.run.records import read_entries
    from grpo.training.run import launch

    config = parse_config(settings(options, folder, run))
    plan = planned(config)
    print("planned:", plan, flush=True)
    launch(config)
    entries = read_entries(run / "metrics.jsonl")
    names = ("step_seconds", "rollout_seconds", "train_seconds", "tower_seconds", "images_encoded", "mismatch_kl")
    names = (*names, "tokens", "peak_memory_gib")
    steps = [{name: entry.get(name) for name in names} for entry in entries]
    for step in steps:
        print(step, flush=True)
    median = {name: statistics.median(step[name] for step in steps[1:]) for name in names}
    asked = {key: getattr(options, key) for key in ("shape", "prompts", "generations", "side", "completion", "tokens")}
    found = {**asked, "offload_tower": options.offload_tower, "plan": plan, "steps": steps, "median": median}
    if "peak" in plan:
        peak, kv = max(step["peak_memory_gib"] for step in steps) * 2**30, plan["kv_cache"]
        found["plan_over_measured"] = round(plan["peak"] / peak - 1, 4)
        found["the_same_without_kv_cache"] = round((plan["peak"] - kv) / (peak - kv) - 1, 4)
    return found


if __name__ == "__main__":
    sys.exit(main())
