"""A tokenizer belongs to an encoder by its words, not by their number."""

import pytest
from helpers.tiny import HIDDEN, VOCAB, WORDS, FixedTokenEncoder, make_data, make_pretrained, make_task, make_trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ldlm.nn.token_encoders import PretrainedTokenEncoder, ShallowTokenEncoder
from ldlm.training.checks import check_encoder


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    model = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder of weights with their tokenizer beside them."""
    folder = tmp_path_factory.mktemp("encoder")
    make_pretrained("bert", folder)
    tokenizer_of(WORDS).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("kind", [PretrainedTokenEncoder, ShallowTokenEncoder])
def test_a_tokenizer_of_the_same_size_with_other_words_is_refused(encoder, kind):
    other = tokenizer_of([f"other{i}" for i in range(VOCAB - 3)])
    assert len(other) == len(tokenizer_of(WORDS)) == VOCAB
    with pytest.raises(ValueError, match=r"gives other ids than the one of the token encoder, .*: use the tokenizer"):
        check_encoder(kind(encoder), other)


def test_the_same_words_in_another_order_are_refused(encoder):
    with pytest.raises(ValueError, match="gives other ids"):
        check_encoder(PretrainedTokenEncoder(encoder), tokenizer_of(WORDS[1:] + WORDS[:1]))


def test_the_encoders_own_tokenizer_and_one_with_an_added_token_are_accepted(encoder):
    own, padded = tokenizer_of(WORDS), tokenizer_of(WORDS)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert len(padded) == len(own) + 1
    for tokenizer in (own, padded):
        check_encoder(PretrainedTokenEncoder(encoder), tokenizer)


@pytest.mark.parametrize(("renamed", "refused"), [(2, False), (3, True)])
def test_of_200_words_two_may_differ_and_three_may_not(tmp_path, renamed, refused):
    words = [f"word{i}" for i in range(197)]
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=200, hidden_size=HIDDEN, **sizes)).save_pretrained(tmp_path)
    tokenizer_of(words).save_pretrained(str(tmp_path))
    other = tokenizer_of([f"new{i}" for i in range(renamed)] + words[renamed:])
    token_encoder = PretrainedTokenEncoder(str(tmp_path), layer=-1)
    if refused:
        with pytest.raises(ValueError, match="gives other ids"):
            check_encoder(token_encoder, other)
    else:
        check_encoder(token_encoder, other)


def test_where_there_is_nothing_to_compare_nothing_is_refused(encoder, tmp_path):
    other = tokenizer_of([f"other{i}" for i in range(VOCAB - 3)])
    check_encoder(FixedTokenEncoder(), other)
    check_encoder(PretrainedTokenEncoder(encoder), None)
    make_pretrained("bert", tmp_path)  # weights with no tokenizer beside them
    check_encoder(PretrainedTokenEncoder(str(tmp_path)), other)


def test_a_fit_with_another_models_words_is_refused_before_its_first_step(encoder, tmp_path):
    other = tokenizer_of([*WORDS[5:], *WORDS[:5]])
    task = make_task(token_encoder=PretrainedTokenEncoder(encoder), tokenizer=other, timestep_refresh=1)
    trainer = make_trainer(tmp_path, [])
    with pytest.raises(ValueError, match="gives other ids than the one of the token encoder"):
        trainer.fit(task, make_data(tmp_path, tokenizer=other))
    assert trainer.global_step == 0
