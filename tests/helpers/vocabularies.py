"""Small real tokenizers of both kinds that llama.cpp has, learnt from a few sentences, as model folders have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused; 12 times 345 is 4140.",
    "What is 21 + 14? It is 35. What is 27 + 48? It is 75. Think step by step before you answer the question.",
    "def mean(values):\n    return sum(values) / len(values)\n\n\nprint(mean([1, 2, 3]))\n",
    "<reasoning>\nThere are 12 eggs and 5 are used, so 7 remain.\n</reasoning>\n<answer>\n7\n</answer>\n",
    "Äpfel und Birnen kosten 3 Euro. Où est la bibliothèque? 東京は日本の首都です。 🦙🦙",
]
TEXTS = [
    *CORPUS,
    "",
    " leading  and   inner spaces",
    "tabs\tand\n\nlines",
    "unseen: ĸ ʬ 龘",
    "1234567890",
    "I'LL don't",
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 480
"""Tokens of a model that has one of these; some ids have no token."""


def byte_level(split: str | None = None, *, digits: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE; `split`: the regular expression before merging, else GPT-2's, with single `digits` SmolLM's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    first += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 20, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(*, space_prefix: bool) -> Tokenizer:
    """BPE over characters with a mark for spaces and single bytes for the unknown, as Llama 2's and Gemma's."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=180, special_tokens=SPECIAL, show_progress=False)
    learner.train_from_iterator(CORPUS[:3], trainer)
    import json

    learnt = json.loads(learner.to_str())["model"]
    pieces = [piece for piece in learnt["vocab"] if piece not in SPECIAL]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, bos: bool, template: str | None = CHAT) -> Any:
    """Write `tokenizer` to `folder` with special and chat tokens; `bos`: texts start with one."""
    chat_tokens = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in chat_tokens])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return wrapped
