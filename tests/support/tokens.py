"""A tiny byte-level BPE tokenizer for the random models: no files, no network."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
