"""A codec of tones, as small as one can be: a frame of sound is two tokens, its pitch and its loudness.

It stands for a neural codec whose codebooks are laid one after another in the tokens of a frame, as Orpheus's are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.helpers.small_chat import TOKENS, save_byte_tokenizer
from tests.helpers.tiny import save_tiny

RATE, FRAME = 8000, 80
PITCHES = [400.0 + 200 * step for step in range(8)]
LOUDNESS = [0.25, 0.5, 1.0]
START, END = len(TOKENS), len(TOKENS) + 1
FIRST_PITCH = END + 1
FIRST_LOUDNESS = FIRST_PITCH + len(PITCHES)
NAMES = ["<speech>", "</speech>", *(f"<pitch_{n}>" for n in range(8)), *(f"<loudness_{n}>" for n in range(3))]
SIZE = len(TOKENS) + len(NAMES) + 5
"""Rows of the embedding; the last have no token, as in models whose size is rounded up."""


def waves() -> torch.Tensor:
    """A frame of each pitch; [pitches, FRAME]. Each has whole periods, so that frames join without a click."""
    time = torch.arange(FRAME) / RATE
    return torch.sin(2 * math.pi * torch.tensor(PITCHES)[:, None] * time)


def encode(sound: torch.Tensor) -> list[int]:
    """Sound [samples] as tokens, two a frame."""
    tokens = []
    for frame in sound.split(FRAME):
        strength = waves() @ frame * 2 / FRAME
        pitch = int(strength.argmax())
        loud = int((torch.tensor(LOUDNESS) - strength[pitch]).abs().argmin())
        tokens += [FIRST_PITCH + pitch, FIRST_LOUDNESS + loud]
    return tokens


def decode(tokens: Sequence[int]) -> torch.Tensor:
    """Sound [samples] of whole frames; a pair that is no pitch and loudness is silence."""
    frames = []
    for pitch, loud in zip(tokens[::2], tokens[1::2], strict=False):
        fits = 0 <= pitch - FIRST_PITCH < len(PITCHES) and 0 <= loud - FIRST_LOUDNESS < len(LOUDNESS)
        frames.append(waves()[pitch - FIRST_PITCH] * LOUDNESS[loud - FIRST_LOUDNESS] if fits else torch.zeros(FRAME))
    return torch.cat(frames) if frames else torch.zeros(0)


def save_speech_model(folder: Path) -> Path:
    """A random Llama whose vocabulary has the codec's tokens; its tokenizer has no chat template."""
    save_tiny(folder, "llama", vocab_size=SIZE, tie_word_embeddings=True, eos_token_id=END, pad_token_id=0)
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in NAMES])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder
