"""An adapter behind `vllm serve`, beside this project's own policy: how often answers agree, and how much survives.

    python -m benchmarks.served_adapter --run RUN --work /tmp/served --out benchmarks/results/served_adapter.json

The base is written as a bfloat16 folder, which all load. What the adapter does to the logprobs of answers in float32
(this project's policy) is compared with what it does in bfloat16: here, behind `vllm serve --enable-lora`, and merged
into the base behind `vllm serve`.

    survival = <effect in bfloat16, effect in float32> / <effect in float32, effect in float32>
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.processes import write_result
from benchmarks.common.vllm_server import prompt_logprobs, vllm_serve

TOKENS = 24


def ours(options: argparse.Namespace, base: Path, dtype: str) -> dict[str, Any]:
    """Answers of this project in `dtype`, and its logprobs of the float32 answers with and without the adapter."""
    import grpo

    settings = {"load_in_4bit": False, "dtype": dtype, "max_seq_length": 256, "device": options.device}
    with grpo.load(options.run / "adapter", base=base, **settings) as policy:
        answers = policy.generate(options.prompts, max_tokens=TOKENS)
        if not options.sequences:
            template = policy.tokenizer.apply_chat_template
            for messages, answer in zip(options.prompts, answers, strict=True):
                prompt = template(messages, add_generation_prompt=True)["input_ids"]
                options.sequences.append((prompt, policy.tokenizer(answer, add_special_tokens=False)["input_ids"]))
        heads, tails = (list(part) for part in zip(*options.sequences, strict=True))
        graph = policy.session.policy
        adapted = graph.score(heads, tails, temperature=1.0).logprobs.tolist()
        with graph.model.disable_adapter():
            plain = graph.score(heads, tails, temperature=1.0).logprobs.tolist()
        if not (options.work / "merged").exists():
            policy.save_merged(options.work / "merged", base=base)
    return {"answers": answers, "with": adapted, "without": plain}


def served(options: argparse.Namespace, client: Any, model: str) -> dict[str, Any]:
    """The same of a model of a server."""
    answers = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, temperature=0)
        .choices[0].message.content
        for messages in options.prompts
    ]  # fmt: skip
    logprobs = [
        value
        for prompt, completion in options.sequences
        for value in prompt_logprobs(client, model, [*prompt, *completion])[len(prompt) - 1 :]
    ]
    return {"answers": answers, "logprobs": logprobs}


def compare(answers: Sequence[str], effect: Sequence[float], truth: dict[str, Any]) -> dict[str, float]:
    """Of one way to serve the adapter, beside float32."""
    wanted = [a - b for a, b in zip(truth["with"], truth["without"], strict=True)]
    inner = sum(a * b for a, b in zip(effect, wanted, strict=True))
    same = sum(a == b for a, b in zip(answers, truth["answers"], strict=True))
    return {"same_answers": same / len(answers), "survival": inner / sum(b * b for b in wanted)}


def difference(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def main() -> int:
    options = parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    base = options.work / "base"
    if not base.exists():
        from benchmarks.common.cpu_workload import export_model

        base.mkdir()
        export_model(base)
    from grpo.tasks.common import load_task

    options.prompts, options.sequences = (
        [row["prompt"] for row in load_task("arithmetic").eval[: options.questions]],
        [],
    )
    truth = ours(options, base, "float32")
    here = ours(options, base, "bfloat16")
    rows = {"this project": compare(here["answers"], difference(here["with"], here["without"]), truth)}
    words = ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "8"]
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"adapter={options.run / 'adapter'}"]
    with vllm_serve([str(base), *lora, *words], options.work / "lora.log", seconds=900) as client:
        plain = served(options, client, str(base))
        found = served(options, client, "adapter")
    rows["vllm serve --enable-lora"] = compare(
        found["answers"], difference(found["logprobs"], plain["logprobs"]), truth
    )
    with vllm_serve([str(options.work / "merged"), *words], options.work / "merged.log", seconds=900) as client:
        found = served(options, client, str(options.work / "merged"))
    rows["merged-16bit in vllm serve"] = compare(
        found["answers"], difference(found["logprobs"], plain["logprobs"]), truth
    )
    tokens = len(truth["with"])
    result = {"benchmark": "served_adapter", "questions": options.questions, "tokens": tokens, "rows": rows}
    write_result(options.out, result)
    for name, row in rows.items():
        print(f"{name:32} same answers {row['same_answers']:.2f}  survival {row['survival']:.3f}")
    print(json.dumps(result))
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.served_adapter", description=__doc__)
    result.add_argument("--run", type=Path, required=True, help="a run on configs/quickstart.toml")
    result.add_argument("--work", type=Path, required=True)
    result.add_argument("--questions", type=int, default=24)
    result.add_argument("--device", default="cpu")
    result.add_argument("--out", type=Path)
    return result


if __name__ == "__main__":
    sys.exit(main())
