"""Tokenizers whose vocabulary is beside the point."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def toy_tokenizer(words: int, **special) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words - 2)} | {"[U]": words - 2, "[E]": words - 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[U]", **special)
