"""An exported adapter of a model that takes images, behind `vllm serve` with its own tower and processor, beside ours.

    python -m benchmarks.served_with_images --work /tmp/served-images --torchvision /tmp/torchvision

A tiny random model of Qwen2.5-VL's kind and an adapter of random values. What the adapter does to the logprobs of
answers about images, in float32 here, is compared with what it does in float32 and in bfloat16: here, and behind `vllm
serve --enable-lora`, which gets the same pictures as OpenAI's clients send them and makes tokens and embeddings of its
own.

    survival = <effect, effect in float32 here> / <effect in float32 here, itself>

vLLM's processor wants torchvision, whose wheel for GPUs a CPU's torch does not load: `--torchvision` is a folder into
which it was installed with `pip install --no-deps --target`, and its two operators are declared without a body.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common.processes import write_result
from benchmarks.common.vllm_server import vllm_serve
from benchmarks.images import make_model

ANSWER, SIDES = 12, (84, 112, 140, 168)
"""Tokens of an answer; sides of pictures, each a whole number of the tower's patches."""
DECLARED = """
import importlib.abc, sys
class Declares(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            torch.torchvision_operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                torch.torchvision_operators.define(name + "(Tensor dets, Tensor scores, float threshold) -> Tensor")
sys.meta_path.insert(0, Declares())
"""


def questions(count: int) -> list[tuple[Any, str, str]]:
    """(a picture, what is asked, an answer) each, in words of the made-up tokenizer."""
    import io

    import PIL.Image

    from grpo.images import read_image

    generator, made = random.Random(0), []
    for number in range(count):
        wide, high = generator.choice(SIDES), generator.choice(SIDES)
        file = io.BytesIO()
        PIL.Image.frombytes("RGB", (wide, high), generator.randbytes(3 * wide * high)).save(file, "PNG")
        words = [f"w{generator.randrange(5, 900)}" for _ in range(6 + ANSWER)]
        picture = read_image(file.getvalue(), f"question {number}")
        made.append((picture, " ".join(words[:6]), " ".join(words[6:])))
    return made


def ours(options: argparse.Namespace, dtype: str, asked: Sequence[Any]) -> dict[str, Any]:
    """This project's logprobs of the answers in `dtype`, with each adapter, which is written at first, and without."""
    import torch

    import grpo

    model = {"load_in_4bit": False, "dtype": dtype, "device": "cpu", "images": True}
    with grpo.load(options.work / "base", max_seq_length=256, **model) as policy:
        graph, tokenizer, tokens = policy.session.policy, policy.tokenizer, policy.session.image_tokens
        heads, tails, seen = [], [], []
        for picture, question, answer in asked:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            heads.append(tokens.encode(text, [picture], tokenizer))
            tails.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
            seen.append([picture])
        found: dict[str, Any] = {"prompt_tokens": [len(head) for head in heads]}
        with torch.no_grad():
            with graph.model.disable_adapter():
                found["without"] = graph.score(heads, tails, temperature=1.0, images=seen).logprobs.tolist()
            for size in options.sizes:
                move(graph, size)
                found[size] = graph.score(heads, tails, temperature=1.0, images=seen).logprobs.tolist()
                exported(options.work, size, graph, model)
    return found


def move(graph: Any, size: float) -> None:
    """Give the adapter of `graph` a second factor ~ N(0, size)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for layer in graph.adapter_layers().values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * size)


def exported(work: Path, size: float, graph: Any, model: dict[str, Any]) -> None:
    """Write the adapter of `graph` as `python -m grpo.export RUN --to adapter` does, where it is not there yet."""
    from grpo.config.toml import write_toml
    from grpo.export.build import export

    run, out = work / f"run-{size}", work / f"adapter-{size}"
    if not out.exists():
        graph.save_adapter(run / "adapter")
        whole = {"name": str(work / "base"), **model}
        (run / "config.toml").write_text(write_toml({"model": whole, "task": {"name": "arithmetic"}}))
        export(run, "adapter", out, notice=print)


@contextlib.contextmanager
def torchvision_from(folder: Path | None, work: Path) -> Iterator[None]:
    """Inside, new processes find torchvision in `folder`."""
    with patch.dict(os.environ):
        if folder is not None:
            (work / "site").mkdir(exist_ok=True)
            (work / "site" / "sitecustomize.py").write_text(DECLARED)
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(folder), str(work / "site"), os.environ.get("PYTHONPATH")))
            )
        yield


def served(client: Any, model: str, asked: Sequence[Any]) -> tuple[list[float], list[int]]:
    """A server's logprobs of the answers, and how many tokens it made of each conversation."""
    logprobs, counts = [], []
    for picture, question, answer in asked:
        uri = "data:image/png;base64," + base64.b64encode(picture.data).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
        found = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True},
        )
        places = found.model_extra["prompt_logprobs"]
        counts.append(len(places))
        logprobs += [next(iter(place.values()))["logprob"] for place in places[-ANSWER:]]
    return logprobs, counts


def main() -> int:
    options = parser().parse_args()
    if not (options.work / "base" / "complete").exists():
        shutil.rmtree(options.work, ignore_errors=True)
        (options.work / "base").mkdir(parents=True)
        make_model("tiny", options.work / "base", "cpu")
        (options.work / "base" / "complete").touch()
    asked = questions(options.questions)
    truth, here = ours(options, "float32", asked), ours(options, "bfloat16", asked)
    rows: dict[str, Any] = {}

    def compare(name: str, size: float, adapted: Sequence[float], plain: Sequence[float]) -> None:
        wanted = [a - b for a, b in zip(truth[size], truth["without"], strict=True)]
        effect = [a - b for a, b in zip(adapted, plain, strict=True)]
        total = sum(b * b for b in wanted)
        inner = sum(a * b for a, b in zip(effect, wanted, strict=True))
        off = sum((a - b) ** 2 for a, b in zip(effect, wanted, strict=True))
        rows.setdefault(name, {})[str(size)] = {"survival": inner / total, "error": (off / total) ** 0.5}

    for size in options.sizes:
        compare("this project, bfloat16", size, here[size], here["without"])
    adapters = [f"adapter-{size}={options.work / f'adapter-{size}'}" for size in options.sizes]
    for dtype in ("float32", "bfloat16"):
        words = [str(options.work / "base"), "--enable-lora", "--max-lora-rank", "16", "--enforce-eager"]
        words += ["--lora-modules", *adapters, "--dtype", dtype, "--max-model-len", "256", "--max-num-seqs", "4"]
        words += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
        with (
            torchvision_from(options.torchvision, options.work),
            vllm_serve(words, options.work / f"{dtype}.log", seconds=options.seconds) as client,
        ):
            plain, counts = served(client, str(options.work / "base"), asked)
            for size in options.sizes:
                compare(f"vllm serve, {dtype}", size, served(client, f"adapter-{size}", asked)[0], plain)
        assert counts == [count + ANSWER for count in truth["prompt_tokens"]], "both make as many tokens of a picture"
    result = {"benchmark": "served_with_images", "questions": len(asked), "tokens": len(plain), "rows": rows}
    write_result(options.out, result)
    for name, row in rows.items():
        for size, each in row.items():
            print(f"{name:24} {size:>8}  survival {each['survival']:.3f}  error {each['error']:.4f}")
    print(json.dumps(result))
    return 0


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    result = argparse.ArgumentParser(prog="python -m benchmarks.served_with_images", description=__doc__)
    result.add_argument("--work", type=Path, required=True)
    result.add_argument("--questions", type=int, default=24)
    result.add_argument(
        "--sizes",
        type=lambda text: [float(each) for each in text.split(",")],
        default=[0.02, 0.001],
        help="of adapters: the standard deviation of their second factor; the smaller one is that of a first step",
    )
    result.add_argument("--torchvision", type=Path, help="a folder that has it, where it is not installed")
    result.add_argument("--seconds", type=float, default=300, help="that a server may take to answer")
    result.add_argument("--out", type=Path)
    return result


if __name__ == "__main__":
    sys.exit(main())
