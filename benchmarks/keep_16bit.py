"""What quantising a base to NF4 costs, and what keeping some layers in 16 bit gives back.

For every form of the base: its size, the error of its logits against the 16-bit model's (relative L2, and the KL
divergence of the next-token distributions), and its evaluation loss on real text (nats a token). The forms are 16 bit,
NF4, NF4 with `keep_16bit = "auto"` (5 % of the layers' weights, chosen on other text by what the output loses), and NF4
with the layers that --keep names. Of every form it says how much of NF4's loss it gives back.

    python -m benchmarks.keep_16bit --model MODEL --data test.jsonl --keep down_proj --out keep_16bit.json

--data: JSON lines with "question" and "answer" (GSM8K) or "text".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.model.sizes import linear_shapes
from grpo.model.source import open_source
from grpo.policy.keep_16bit import load_base
from grpo.policy.policy import Policy
from grpo.run.machine import resolve_device
from grpo.run.versions import hardware, versions
from grpo.session import resolve_dtype


def texts(file: Path, count: int) -> list[str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    return [row.get("text") or f"{row['question']}\n{row['answer']}" for row in rows]


@torch.no_grad()
def logits_of(policy: Policy, ids: list[int]) -> Tensor:
    """float32 [tokens, vocabulary] on the CPU, with the adapter off."""
    with policy.reference():
        output = policy.decoder(input_ids=torch.tensor([ids], device=policy.base.device), use_cache=False)
    return output.logits[0].float().cpu()


def evaluate(policy: Policy, sequences: list[list[int]], exact: list[Tensor] | None) -> tuple[dict, list[Tensor]]:
    """Loss of one form, and its distance from `exact`, the 16-bit model's logits; with its own logits."""
    own = [logits_of(policy, ids) for ids in sequences]
    losses, errors, divergences, agreements = [], [], [], []
    for number, (logits, ids) in enumerate(zip(own, sequences, strict=True)):
        logprobs = logits[:-1].log_softmax(-1)
        losses.append(-logprobs.gather(1, torch.tensor(ids[1:])[:, None]))
        if exact is not None:
            reference = exact[number]
            errors.append((logits - reference).norm(dim=-1) / reference.norm(dim=-1))
            wanted = reference.log_softmax(-1)
            divergences.append((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1))
            agreements.append((logits.argmax(-1) == reference.argmax(-1)).float())
    found = {"loss": round(float(torch.cat(losses).mean()), 4)}
    if exact is not None:
        found |= {
            "logit_error": round(float(torch.cat(errors).mean()), 4),
            "kl_from_16bit": round(float(torch.cat(divergences).mean()), 5),
            "same_first_choice": round(float(torch.cat(agreements).mean()), 4),
        }
    return found, own


def tell_given_back(found: dict[str, dict[str, Any]]) -> None:
    """Add to every form what share of NF4's loss, and of its divergence, it does not have."""
    exact, nf4 = found["16 bit"], found["NF4"]
    for form, figures in list(found.items())[2:]:
        figures["loss_given_back"] = round((nf4["loss"] - figures["loss"]) / (nf4["loss"] - exact["loss"]), 3)
        figures["kl_given_back"] = round(1 - figures["kl_from_16bit"] / nf4["kl_from_16bit"], 3)
        print(
            f"{form:28} {figures['kept_share']:6.1%} of the weights give back {figures['loss_given_back']:.0%} of the "
            f"loss and {figures['kl_given_back']:.0%} of the KL"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--keep", nargs="*", default=["down_proj"], help="names as in model.keep_16bit, one form each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    dtype = resolve_dtype("auto", device)
    forms: dict[str, dict[str, Any]] = {
        "16 bit": {"load_in_4bit": False},
        "NF4": {"load_in_4bit": True},
        'NF4, keep_16bit = "auto"': {"load_in_4bit": True, "keep_16bit": "auto"},
        **{f"NF4, {name} kept": {"load_in_4bit": True, "keep_16bit": [name]} for name in options.keep},
    }
    exact: list[Tensor] | None = None
    found: dict[str, Any] = {}
    for form, settings in forms.items():
        model = Model(name=options.model, **settings)
        source = open_source(model)
        tokenizer = source.tokenizer()
        sequences = [tokenizer(text)["input_ids"][:512] for text in texts(options.data, options.rows)]
        begun = time.perf_counter()
        base = load_base(source, model, tokenizer, device=device, dtype=dtype)
        seconds = round(time.perf_counter() - begun, 1)
        figures, logits = evaluate(Policy(base, Lora(r=1), seed=0), sequences, exact)
        exact = logits if exact is None else exact
        shapes = linear_shapes(base.config)
        weights = {part: rows * columns for part, (rows, columns) in shapes.items()}
        kept = sum(weights[part] for part in base.kept_16bit) / sum(weights.values())
        found[form] = {**figures, "kept_16bit": base.kept_16bit, "kept_share": round(kept, 4), "load_seconds": seconds}
        shown = "  ".join(f"{key} {value}" for key, value in figures.items())
        print(f"{form:28} {shown}  ({len(base.kept_16bit)} layers kept)", flush=True)
    tell_given_back(found)
    result = {
        "benchmark": "keep_16bit",
        "model": Path(options.model).name,
        "data": options.data.name,
        "tokens": sum(len(ids) for ids in sequences),
        "forms": found,
        "hardware": hardware(),
        "versions": versions(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": "keep_16bit", "forms": {form: entry["loss"] for form, entry in found.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
