"""A chat model as small as one can be, with a byte-level tokenizer made here: loading it takes no time."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import save_tiny

SPECIAL = ["<pad>", "<eos>", "<bos>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_small_chat_model(folder: Path) -> Path:
    """A random Llama of 2 layers in `folder`, its tokenizer's tokens being bytes."""
    save_tiny(folder, "llama", vocab_size=len(TOKENS), tie_word_embeddings=True, max_position_embeddings=2048)
    return save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of len(TOKENS) tokens in `folder`, with a chat template."""
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder
