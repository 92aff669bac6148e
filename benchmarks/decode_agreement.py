"""Whether rollouts by our decoding kernels agree with training as those by FlashAttention do, and repeat their bits.

Real weights, NF4, an adapter that moves everything. An engine for each backend, one after another in one process:
`flash_attn`; `grpo`, decoding steps by our kernels; `grpo-apart`, the same with no kernel launched before the one in
front of it has ended. Completions of many lengths, so that the batch shrinks and sequences have one chunk and several.
Each rollout's logprobs are compared with the training graph's for the same tokens, and each is drawn twice.

    python -m benchmarks.decode_agreement --model SmolLM2-135M-Instruct.Q4_1.gguf --out decode_agreement.json

`identical`: both rollouts have the same tokens and logprobs, bit for bit. `as_apart`: so have grpo and grpo-apart.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import shared_model as shared
from benchmarks.common.decoding import BACKENDS, FewGraphs, choose
from benchmarks.common.processes import write_result
from benchmarks.one_copy_mismatch import questions
from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.rollout.decoding_attention import DecodingImpl
from grpo.rollout.engine import Completion, Engine, EngineSettings, Request, SamplingSettings
from grpo.run.versions import hardware, versions

SCORED_AT_ONCE = 16


def start(backend: str, base: BaseWeights, policy: Policy, options: argparse.Namespace) -> Engine:
    settings = EngineSettings(
        max_seq_length=options.longest, max_num_seqs=options.sequences, attention_backend=choose(backend)
    )
    return FewGraphs(base, policy, settings, captured=(32, 64, options.sequences))


def rollout(engine: Engine, prompts: list[list[int]], options: argparse.Namespace) -> list[Completion]:
    engine.sync_adapter()  # forgets cached prompts: with them, a second rollout would compute others than the first
    draw = random.Random(1)
    most = options.longest - max(map(len, prompts))
    lengths = [draw.randint(most // 8, most) for _ in prompts]
    requests = [
        Request(number, prompt, 5_000 + number, max_tokens=length)
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return sorted(engine.generate(requests, SamplingSettings(1.0, most)), key=lambda done: done.request_id)


def alike(some: list[Completion], others: list[Completion]) -> bool:
    """Whether all tokens and logprobs are the same, bit for bit."""
    return all(
        list(one.token_ids) == list(other.token_ids) and list(one.logprobs) == list(other.logprobs)
        for one, other in zip(some, others, strict=True)
    )


@torch.no_grad()
def against_training(policy: Policy, prompts: list[list[int]], completions: list[Completion]) -> dict[str, Any]:
    differences = []
    for first in range(0, len(completions), SCORED_AT_ONCE):
        part = completions[first : first + SCORED_AT_ONCE]
        scored = policy.score([prompts[one.request_id] for one in part], [one.token_ids for one in part],
                              temperature=1.0)  # fmt: skip
        of_each = scored.logprobs.double().cpu().split([len(one.token_ids) for one in part])
        for own, one in zip(of_each, part, strict=True):
            differences.append(own - torch.tensor(one.logprobs, dtype=torch.float64))
    return shared.mismatch(differences, max(len(own) for own in differences))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--longest", type=int, default=896, help="tokens of a sequence, its prompt included")
    parser.add_argument("--backends", default=",".join(BACKENDS), type=lambda text: text.split(","))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = Model(name=options.model, load_in_4bit=True, dtype=options.dtype, device=options.device)
    source = open_source(model)
    base = BaseWeights(source, model, device=device, dtype=dtype)
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    shared.randomize_adapter(policy)
    prompts = questions(source.tokenizer())[: options.sequences]
    found: dict[str, Any] = {"benchmark": "decode_agreement", "dtype": options.dtype, "backends": {}}
    found |= {"hardware": hardware(), "versions": versions()}
    drawn: dict[str, list[Completion]] = {}
    for backend in options.backends:
        began = time.perf_counter()
        engine = start(backend, base, policy, options)
        ours = sum(type(getattr(each, "impl", None)) is DecodingImpl for each in engine.vllm_model().modules())
        entry: dict[str, Any] = {"our_layers": ours, "started_s": round(time.perf_counter() - began, 1)}
        began = time.perf_counter()
        drawn[backend] = rollout(engine, prompts, options)
        entry["rollout_s"] = round(time.perf_counter() - began, 2)
        entry["identical"] = alike(drawn[backend], rollout(engine, prompts, options))
        if "grpo" in drawn and backend == "grpo-apart":
            entry["as_apart"] = alike(drawn["grpo"], drawn["grpo-apart"])
        entry |= against_training(policy, prompts, drawn[backend])
        found["backends"][backend] = entry
        print(backend, json.dumps(entry), flush=True)
        write_result(options.out, found)
        engine.close()
        del engine
    kl = {backend: entry["mismatch_kl"] for backend, entry in found["backends"].items()}
    print(json.dumps({"benchmark": "decode_agreement", "dtype": options.dtype, "mismatch_kl": kl}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
