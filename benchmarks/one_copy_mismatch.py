"""How far vLLM's logprobs are from the training graph's after real optimiser steps, and how far stock vLLM is from
stock transformers on the same model.

    python -m benchmarks.one_copy_mismatch export --model MODEL.gguf --folder /tmp/m16     # 16-bit safetensors
    python -m benchmarks.one_copy_mismatch export --model MODEL.gguf --folder /tmp/m4 --four-bit   # rounded to NF4
    python -m benchmarks.one_copy_mismatch ours --model /tmp/m16 --dtype bfloat16 --four-bit
    python -m benchmarks.one_copy_mismatch stock --model /tmp/m16 --dtype bfloat16

`ours` trains an adapter for some steps on two-digit sums through `grpo.training.trainer`, then samples long answers to
general questions from the same engine. `stock` samples the same questions with vLLM as installed (its own weights, 16
bit, no adapter; CUDA graphs, no Inductor, as in ours) and scores them with transformers, one sequence at a time, no
padding. How far two ways of rounding come apart depends on the weights, so ours on an NF4 base is compared with stock
on the values of that base, which `export --four-bit` writes in 16 bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import shared_model
from grpo.config.schema import Config, Model, parse_config
from grpo.data import load_data
from grpo.kernels import nf4
from grpo.model.layout import fused_linears
from grpo.model.source import open_source
from grpo.model.weight_source import NF4Tensor
from grpo.monitor.run_log import RunLog
from grpo.run.versions import hardware, versions
from grpo.session import open_session
from grpo.tokenizing import tokenize

SUBJECTS = (
    "how bread is baked", "the water cycle", "a day in the life of a lighthouse keeper", "why the sky is blue",
    "the history of the bicycle", "how a compiler works", "planning a garden", "the rules of chess",
    "a journey by train across a continent", "how vaccines work", "the life of bees", "writing a good letter",
    "how bridges are built", "the phases of the moon", "cooking for many guests", "learning an instrument",
)  # fmt: skip
NEW_TOKENS = 128
SAMPLES_EACH = 8


def training_config(options: argparse.Namespace, folder: Path) -> Config:
    """Two-digit sums, as in configs/quickstart.toml, with room for the long answers that are measured."""
    return parse_config(
        {
            "model": {
                "name": options.model,
                "load_in_4bit": options.four_bit,
                "dtype": options.dtype,
                "device": options.device,
                "max_seq_length": 384,
            },
            "lora": {"r": 16, "lora_alpha": 32},
            "task": {"name": "arithmetic"},
            "rollout": {
                "prompts_per_step": options.prompts_per_step,
                "num_generations": 8,
                "max_prompt_length": 96,
                "max_completion_length": 16,
                "max_num_seqs": 128,
            },
            "train": {"learning_rate": 3e-4, "max_steps": options.steps},
            "checkpoint": {"output_dir": folder, "save_steps": options.steps},
        }
    )


def questions(tokenizer: Any) -> list[list[int]]:
    """Token ids of the general questions, each `SAMPLES_EACH` times."""
    texts = [[{"role": "user", "content": f"Write a long and detailed essay about {subject}."}] for subject in SUBJECTS]
    return [ids for ids in tokenize(texts, tokenizer, {}, "questions") for _ in range(SAMPLES_EACH)]


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Train, then compare the engine that was trained against with the graph that was trained."""
    from grpo.run.checkpoint import open_run
    from grpo.training.run import train_session

    scratch = Path(tempfile.mkdtemp(prefix="grpo-mismatch-"))
    config = training_config(options, scratch / "run")
    with open_run(config) as run:
        log = RunLog(run.path, config, max_steps=options.steps, verbose=False)
        with log, open_session(config, status=log.status) as session:
            data = load_data(config, session.tokenizer)
            prompts = questions(session.tokenizer)[: options.completions]
            fresh = shared_model.agreement(
                session.engine, session.policy, prompts, NEW_TOKENS, stop_token_ids=session.stop_token_ids
            )
            train_session(session, data, run.path, log)
            trained = shared_model.agreement(
                session.engine, session.policy, prompts, NEW_TOKENS, stop_token_ids=session.stop_token_ids
            )
        steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(scratch)
    keys = ("step", "reward", "grad_norm", "mismatch_kl", "sync_seconds")
    return {
        "optimiser_steps": options.steps,
        "before_training": fresh,
        "after_training": trained,
        "steps": [{key: step[key] for key in keys if key in step} for step in steps],
    }


def stock(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM and transformers as installed."""
    from grpo.rollout.vllm_environment import set_environment

    set_environment()
    import vllm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = questions(AutoTokenizer.from_pretrained(options.model))[: options.completions]
    on_gpu = options.device == "cuda"
    arguments: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    if on_gpu:
        arguments = {
            "gpu_memory_utilization": 0.05,
            "kv_cache_memory_bytes": 4 << 30,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        }
    llm = vllm.LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=384,
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        **arguments,
    )
    sampling = [vllm.SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, seed=5_000 + n, logprobs=0)
                for n in range(len(prompts))]  # fmt: skip
    outputs = [
        out.outputs[0] for out in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    ]
    completions = [list(output.token_ids) for output in outputs]
    rollout = [
        [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        for output in outputs
    ]
    del llm
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
    differences = []
    for prompt, completion, sampled in zip(prompts, completions, rollout, strict=True):
        scored = transformers_logprobs(model, prompt, completion)
        differences.append(scored - torch.tensor(sampled, dtype=torch.float64))
    return {
        "transformers_attention": model.config._attn_implementation,
        **shared_model.mismatch(differences, NEW_TOKENS),
    }


@torch.no_grad()
def transformers_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """float64 [completion] on the CPU."""
    ids = torch.tensor([prompt + completion[:-1]], device=model.device)
    logits = model(ids, logits_to_keep=len(completion)).logits[0].float()
    chosen = torch.tensor(completion, device=model.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].double().cpu()


def export(options: argparse.Namespace) -> dict[str, Any]:
    """The model in 16-bit safetensors with its tokenizer, whatever form it has now; `--four-bit`: NF4's values."""
    from transformers import AutoModelForCausalLM

    source = open_source(Model(name=options.model))
    config = source.config.__class__.from_dict(
        {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    )
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linears = {f"{part}.weight" for parts in fused_linears(source.config).values() for part in parts}
    state = {}
    for name in source.names:
        tensor = source.read(name)
        if isinstance(tensor, NF4Tensor):
            raise SystemExit(f"{options.model}: already 4-bit; pass a 16-bit or GGUF model")
        if options.four_bit and name in linears:
            tensor = nf4.dequantize_bitsandbytes(*nf4.quantize(tensor), tuple(tensor.shape), dtype)
        state[name] = tensor.to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.save_pretrained(options.folder)
    source.tokenizer().save_pretrained(options.folder)
    return {"folder": str(options.folder), "tensors": len(state)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mode", choices=("export", "ours", "stock"))
    parser.add_argument("--model", required=True, help="a model folder or .gguf file; `stock` needs a folder")
    parser.add_argument("--folder", type=Path, help="where `export` writes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--four-bit", action="store_true", help="an NF4 base, or its values")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--completions", type=int, default=len(SUBJECTS) * SAMPLES_EACH)
    options = parser.parse_args()
    if options.mode == "export" and options.folder is None:
        parser.error("export needs --folder")
    found = {"export": export, "ours": ours, "stock": stock}[options.mode](options)
    result = {"mode": options.mode, "dtype": options.dtype, "four_bit": options.four_bit, **found}
    result |= {"hardware": hardware(), "versions": versions()}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
