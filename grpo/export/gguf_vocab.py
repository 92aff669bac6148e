"""A Hugging Face tokenizer as the vocabulary of a GGUF file, for llama.cpp to split text exactly as it does.

llama.cpp has two tokenizers that the supported families use. "gpt2" is byte-level BPE: tokens, merges, and the name of
a splitting rule that llama.cpp knows (`SPLITS`). "llama" is SentencePiece's: tokens with scores, the highest merged
first, made here from the order of the merges. Any other tokenizer is refused, because a file with a wrong splitting
rule loads and only writes worse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<unused\d+>|<pad>|<mask>")
"""Added tokens that llama.cpp's own conversion takes for control tokens, whatever the tokenizer says."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
"""SentencePiece's mark for a space."""

_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_MARKED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    _WORDS + r"|\p{N}{1,3}" + _ENDINGS: "llama-bpe",
    _WORDS + r"|\p{N}" + _ENDINGS: "qwen2",
    _CASED % ("", "") + r"|\p{N}" + _SLASHED: "tekken",
    _CASED % (_SHORT, _SHORT) + r"|\p{N}{1,3}" + _SLASHED: "gpt-4o",
    _MARKED: "qwen35",
}
"""Regular expressions by which tokenizers split text before merging, and llama.cpp's name for each."""


@dataclass
class Vocabulary:
    """What a GGUF file says about its tokenizer. Lists are indexed by token id."""

    model: str
    """"gpt2" or "llama"."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    """"bos", "eos", "unk", "pad" -> id."""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False

    def write(self, writer: Any) -> None:
        """Add everything to gguf's `writer`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of transformers' `tokenizer` for a model of `size` tokens; ids without a token are unused.

    Raises UserError for a tokenizer that llama.cpp has no equal of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{cannot(tokenizer)}: it has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"{cannot(tokenizer)}: its model is {model['type']}, not BPE")
    byte_level = any(part["type"] == "ByteLevel" for part in parts(described.get("pre_tokenizer")))
    if not byte_level and not model.get("byte_fallback"):
        raise UserError(f"{cannot(tokenizer)}: it is neither byte-level nor SentencePiece's")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens, types = token_lists(described, size, byte_level, tokenizer.unk_token)
    vocabulary = Vocabulary("gpt2", "", tokens, types) if byte_level else Vocabulary("llama", "default", tokens, types)
    if byte_level:
        vocabulary.pre = split_name(described, tokenizer)
        vocabulary.merges = [" ".join(merge) for merge in merges]
    else:
        vocabulary.scores = merge_scores(tokens, merges)
        vocabulary.add_space_prefix = has_space_prefix(described)
    add_special(vocabulary, tokenizer, size)
    return vocabulary


def cannot(tokenizer: Any) -> str:
    """How every refusal starts."""
    return (
        f"the tokenizer ({type(tokenizer).__name__}) has no equal in llama.cpp that is known here, export merged-16bit "
        "and convert that with llama.cpp's convert_hf_to_gguf.py"
    )


def parts(described: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    if described is None:
        return
    inside = described.get("pretokenizers") or described.get("normalizers")
    if inside is None:
        yield described
    for step in inside or ():
        yield from parts(step)


def token_lists(
    described: dict[str, Any], size: int, byte_level: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    """Text and type of every token id below `size`; `unknown` stands for what SentencePiece cannot spell."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for text, number in described["model"]["vocab"].items():
        if number < size:
            kind = BYTE if not byte_level and BYTE_TOKEN.fullmatch(text) else NORMAL
            tokens[number], types[number] = text, kind
    for added in described["added_tokens"]:
        number, text = added["id"], added["content"]
        if number >= size:
            continue
        if text == unknown and not byte_level:
            tokens[number], types[number] = text, UNKNOWN
        elif added["special"] or LOOKS_SPECIAL.fullmatch(text):
            tokens[number], types[number] = text, CONTROL
        else:
            # llama.cpp looks for these in the text before it marks spaces.
            tokens[number], types[number] = text.replace(SPACE, " "), USER_DEFINED
    return tokens, types


def split_name(described: dict[str, Any], tokenizer: Any) -> str:
    """llama.cpp's name of the rule by which text is split before merging."""
    steps = list(parts(described["pre_tokenizer"]))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name == "llama-bpe" and not described["model"].get("ignore_merges"):
            name = "dbrx"  # the same splits, but words of the vocabulary are merged like others
        if name is not None:
            return name
    raise UserError(f"{cannot(tokenizer)}: its splitting rule is unknown")


def merge_scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores float [tokens], the higher the earlier a merge makes the token; those that no merge makes come last."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def has_space_prefix(described: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    steps = [*parts(described.get("normalizer")), *parts(described.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def add_special(vocabulary: Vocabulary, tokenizer: Any, size: int) -> None:
    """Ids of the special tokens, and which of them surround a text."""
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and token < size:
            vocabulary.special[kind] = token
    surrounded = tokenizer("a")["input_ids"]
    vocabulary.add_bos = surrounded[0] == tokenizer.bos_token_id
    vocabulary.add_eos = surrounded[-1] == tokenizer.eos_token_id
