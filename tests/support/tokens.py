"""Tiny BPE tokenizers for the random models, of the kinds that there are: no files, no network."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PIECES = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<x>",
    "Ġthe",
    "Ġcat",
    "ĠDr",
    "Ġsat",
    "at",
    "ca",
    "the",
    ".",
    "Ġ",
    "Ċ",
    "<",
    "b",
    ">",
]


def make(vocabulary: int = 101) -> Any:
    """A tokenizer whose ids fit the random models: single characters, and a few words with the space before them."""
    letters = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?,&;'\"/" if c not in PIECES]
    pieces = (PIECES + letters)[:vocabulary]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("c", "a"), ("Ġ", "ca"), ("Ġca", "t"), ("a", "t"), ("t", "he")]
    made = {piece: index for index, piece in enumerate(pieces)}
    for left, right in merges:
        made.setdefault(left + right, len(made))
    tokenizer = Tokenizer(models.BPE(made, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}<bos>{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}<bos>"
    return fast


def byte_level(prefix_space: bool = False, bos: bool = True) -> Any:
    """As GPT-2's and Llama 3's: every byte is a token, so every text is one; without BOS, or with a space put before it."""
    pieces = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(_merged(pieces, "Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, bos)


def byte_fallback() -> Any:
    """As Llama 2's: a space before the first word, BOS before all, and bytes for what the vocabulary lacks."""
    pieces = [
        "<pad>",
        "<bos>",
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.",
    ]
    tokenizer = Tokenizer(_merged(pieces, "▁", unk_token="<pad>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return _fast(tokenizer, bos=True)


def _merged(pieces: list[str], space: str, **options: Any) -> Any:
    """A model of pieces and of the words ``the`` and ``cat`` with the space before them."""
    merges = [(space, "t"), ("h", "e"), (f"{space}t", "he"), (space, "c"), ("a", "t"), (f"{space}c", "at")]
    made = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    return models.BPE(made, merges, **options)


def _fast(tokenizer: Any, bos: bool) -> Any:
    named = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False, **named
    )
