"""Every kind of tokenizer keeps what packed text promises: no special token in it, one digest, nothing lost unsaid."""

import json
import warnings
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers.tiny import (
    HIDDEN,
    VOCAB,
    WORDS,
    FixedTokenEncoder,
    make_data,
    make_model,
    make_task,
    make_tokenizer,
    make_trainer,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertTokenizer,
    ByT5Tokenizer,
    CanineTokenizer,
    DPRReaderTokenizerFast,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RemBertTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from ldlm.data.corpus import FileCorpus
from ldlm.data.packing import open_packed, pack
from ldlm.nn.token_decoders import LinearTokenDecoder
from ldlm.tokenizer import (
    bos_id,
    check_tokenizer,
    eos_id,
    pack_tokenizer,
    packed_vocabulary_size,
    special_ids,
    token_id_function,
    tokenizer_digest,
    unknown_id,
    unpack_tokenizer,
    vocabulary_size,
)

LETTERS = [chr(code) for code in range(33, 127)]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIALS = [*NAMES.values(), "<pad>", "[SEP]"]
PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("[SEP]", 0.0), ("▁", -2.0), ("▁a", -2.5)]
PIECES += [("<s", -2.9), ("s>", -3.1), ("un", -3.0), *((letter, -4.0 - i / 100) for i, letter in enumerate(LETTERS))]
MERGES = [
    ("<", "s"),
    ("<s", ">"),
    ("<", "/"),
    ("</", "s"),
    ("</s", ">"),
    ("u", "n"),
    ("a", "b"),
    ("s", ">"),
    ("▁", "a"),
]


def wrapped(model: models.Model, before=None, *, normalizer=None, decoder=None, **changes) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer, backend.decoder = normalizer, decoder
    if before is not None:
        backend.pre_tokenizer = before
    names = NAMES | {"pad_token": "<pad>", "additional_special_tokens": ["[SEP]"]} | changes
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})


def unigram(before=None, **changes) -> PreTrainedTokenizerFast:
    before = before or pre_tokenizers.Metaspace(prepend_scheme="first")
    return wrapped(models.Unigram(PIECES, 0), before, decoder=decoders.Metaspace(), **changes)


def bpe_vocabulary() -> dict[str, int]:
    pieces = [*SPECIALS, "▁", *LETTERS, *("".join(pair) for pair in MERGES)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def bpe(**changes) -> PreTrainedTokenizerFast:
    model = models.BPE(bpe_vocabulary(), MERGES, unk_token="<unk>", **changes)
    return wrapped(model, pre_tokenizers.Metaspace(prepend_scheme="first"), decoder=decoders.Metaspace())


def byte_level(**changes) -> PreTrainedTokenizerFast:
    pieces = [*SPECIALS, *pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in MERGES[:-1])]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(sorted(pieces)))}
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(models.BPE(vocabulary, MERGES[:-1], **changes), before, decoder=decoders.ByteLevel(), unk_token=None)


def words(before=None, **changes) -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate([*SPECIALS, *LETTERS, "word", "un"])}
    return wrapped(models.WordLevel(ids, unk_token="<unk>"), before or pre_tokenizers.WhitespaceSplit(), **changes)


def word_pieces(before=None) -> PreTrainedTokenizerFast:
    ids = {piece: number for number, piece in enumerate([*SPECIALS, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}
    model = models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=100)
    return wrapped(model, before or pre_tokenizers.WhitespaceSplit(), decoder=decoders.WordPiece(cleanup=False))


def llama(**changes) -> LlamaTokenizer:
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*NAMES.values(), *bpe_vocabulary()]))}
    return LlamaTokenizer(vocab=vocabulary, merges=MERGES, **changes)


def t5() -> T5Tokenizer:
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=head + [pair for pair in PIECES if pair not in head], extra_ids=3)


def marked(special: bool, **flags) -> PreTrainedTokenizerFast:
    """Its special tokens were added to the backend first, in another way than transformers adds them."""
    backend = Tokenizer(models.Unigram(PIECES, 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_tokens([AddedToken(token, special=special, **flags) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES, pad_token="<pad>")


def with_more(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With tokens behind the vocabulary: some special, some words of their own."""
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.add_tokens(["ordinary", "<think>"])
    tokenizer.add_tokens([AddedToken("<|mark|>", special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("Other", normalized=True)])
    return tokenizer


SPELLED: dict[str, Callable[[], PreTrainedTokenizerBase]] = {  # a vocabulary that can spell any text in ASCII
    "Unigram": unigram,
    "Unigram, every piece with a space": lambda: unigram(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Unigram, not split": lambda: unigram(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False)])),
    "Unigram, more tokens": lambda: with_more(unigram()),
    "Unigram, added plainly": lambda: marked(False),
    "Unigram, added normalised": lambda: marked(True, normalized=True),
    "Unigram, added with spaces": lambda: marked(True, lstrip=True, rstrip=True),
    "Unigram, added as words": lambda: marked(True, single_word=True),
    "BPE": bpe,
    "BPE, merges ignored": lambda: bpe(ignore_merges=True),
    "BPE, more tokens": lambda: with_more(bpe()),
    "byte-level BPE": byte_level,
    "byte-level BPE, merges ignored": lambda: byte_level(ignore_merges=True),
    "byte-level BPE, more tokens": lambda: with_more(byte_level()),
    "Llama": llama,
    "Llama, legacy": lambda: llama(legacy=True),
    "ByT5": ByT5Tokenizer,
    "CANINE": CanineTokenizer,
}
OTHERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {  # not so, or spaces are lost
    "WordLevel": words,
    "WordLevel, punctuation apart": lambda: words(pre_tokenizers.Whitespace()),
    "WordLevel, divided at brackets": lambda: words(pre_tokenizers.Split("[", "isolated")),
    "WordLevel, more tokens": lambda: with_more(words()),
    "WordPiece": word_pieces,
    "WordPiece, punctuation apart": lambda: word_pieces(pre_tokenizers.BertPreTokenizer()),
    "T5": t5,
    "XLM-R": lambda: XLMRobertaTokenizer(vocab=[*PIECES, ("<mask>", 0.0)]),
    "ALBERT": lambda: AlbertTokenizer(vocab=[("[CLS]", 0.0), ("[MASK]", 0.0), *PIECES], unk_token="<unk>"),
    "RemBERT": lambda: RemBertTokenizer(vocab=[("[CLS]", 0.0), ("[MASK]", 0.0), *PIECES]),
}
KINDS = SPELLED | OTHERS
QUICK = [kind for kind in KINDS if kind != "CANINE"]  # a million ids


def literals(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts with each special token written out, alone, inside words, twice, cut short, and with all others."""
    names = [token for token in map(tokenizer.convert_ids_to_tokens, sorted(special_ids(tokenizer))) if token.isascii()]
    names = [name for name in names if name.isprintable()][:12]
    shapes = ["{0}", "a {0} b", "un{0}un", "{0}{0}", "<{0}>", "{1}a{2}", " {0} ", "the ordinary{0}<think>Other"]
    return [shape.format(name, name[:-1], name[1:]) for name in names for shape in shapes] + [" ".join(names)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_special_token_comes_out_of_a_text_that_spells_it(kind):
    tokenizer = KINDS[kind]()
    special = special_ids(tokenizer) - {unknown_id(tokenizer)}
    texts = literals(tokenizer)
    for text, ids in zip(texts, token_id_function(tokenizer)(texts), strict=True):
        assert special.isdisjoint(ids), (text, tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("kind", SPELLED)
def test_a_text_that_spells_special_tokens_comes_back_whole(kind):
    tokenizer = SPELLED[kind]()
    texts = [text.strip() for text in literals(tokenizer)]
    for text, ids in zip(texts, token_id_function(tokenizer)(texts), strict=True):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_special_tokens_gets_transformers_own_ids(kind):
    tokenizer = KINDS[kind]()
    draw = np.random.default_rng(0)
    pool = ["ordinary", "<think>", "Other", "Others", "un", " ", "  ", "\n", *LETTERS]
    texts = ["".join(draw.choice(pool, 30)) for _ in range(100)]
    names = [tokenizer.convert_ids_to_tokens(number) for number in special_ids(tokenizer)]
    texts = [text for text in texts if not any(name in text for name in names)]
    assert len(texts) > 90
    wanted = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert token_id_function(tokenizer)(texts) == wanted


def best_segmentation(text: str, pieces: dict[str, float]) -> list[str]:
    """Of all ways to cut a text, the one whose pieces are all known and score highest in sum."""
    ways = []
    for count in range(len(text)):
        for cuts in combinations(range(1, len(text)), count):
            parts = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
            if all(part in pieces for part in parts):
                ways.append((sum(pieces[part] for part in parts), parts))
    return max(ways)[1]


@pytest.mark.parametrize("text", ["<s>", "un<s>", "</s>a", "<unk>", "[SEP]", "<s></s>"])
def test_unigram_spells_a_special_token_in_the_best_of_all_segmentations_into_other_pieces(text):
    tokenizer = unigram()
    pieces = {piece: score for piece, score in PIECES if piece not in SPECIALS}
    ids = token_id_function(tokenizer)([text])[0]
    assert tokenizer.convert_ids_to_tokens(ids) == best_segmentation("▁" + text, pieces)


@pytest.mark.parametrize("text", ["<s>", "un<s>", "</s>a", "<unk>", "[SEP]", "<s></s>"])
def test_bpe_spells_a_special_token_by_all_merges_that_do_not_make_one(text):
    merged = list("▁" + text)
    for pair in MERGES:  # each wherever it can be, in the order of the list
        place = 0
        while "".join(pair) not in SPECIALS and place < len(merged) - 1:
            if tuple(merged[place : place + 2]) == pair:
                merged[place : place + 2] = ["".join(pair)]
            place += 1
    for tokenizer in (bpe(), bpe(ignore_merges=True)):
        assert tokenizer.convert_ids_to_tokens(token_id_function(tokenizer)([text])[0]) == merged


def test_a_special_token_is_unknown_to_a_vocabulary_of_whole_words():
    tokenizer = words()
    text = "word <s> a </s> <pad> <s>x [SEP] <unk> un"
    spelled = [word if word in ("word", "a", "un") else "<unk>" for word in text.split()]
    assert tokenizer.convert_ids_to_tokens(token_id_function(tokenizer)([text])[0]) == spelled


def test_a_tokenizer_written_in_python_with_special_characters_refuses_them_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"makes its special token '\\ue000' of the text 'a\\ue000b', and has no token"
    ):
        token_id_function(CanineTokenizer())(["fine", "a\ue000b"])


def test_a_text_that_a_tokenizer_has_no_id_for_is_a_sentence():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(
        ValueError, match=r"cannot read a text \(WordLevel error: Missing \[UNK\].*give it an unk_token"
    ):
        token_id_function(tokenizer)(["b"])


def test_a_special_token_cannot_take_the_place_of_unknown_text():
    tokenizer = RemBertTokenizer()  # its vocabulary of five has [CLS] for what it lacks
    assert unknown_id(tokenizer) is None
    with pytest.raises(ValueError, match=r"makes its special token '\[CLS\]' of the text 'some text'"):
        token_id_function(tokenizer)(["some text"])


def test_unknown_text_that_would_end_a_document_is_refused(tmp_path):
    tokenizer = wrapped(models.Unigram(PIECES, 2), pre_tokenizers.Metaspace())  # its unknown piece is </s>
    (tmp_path / "a.txt").write_text("a é")
    with pytest.raises(ValueError, match="makes its special token '</s>' of the text 'a é'"):
        pack(FileCorpus(tmp_path / "a.txt"), tokenizer, tmp_path)


# --- the digest


@pytest.mark.parametrize("kind", [*QUICK, pytest.param("CANINE", marks=pytest.mark.slow)])
def test_the_digest_survives_being_saved_and_carried_by_a_checkpoint(kind, tmp_path):
    tokenizer = KINDS[kind]()
    before = tokenizer_digest(tokenizer)
    carried = unpack_tokenizer(pack_tokenizer(tokenizer))
    again = unpack_tokenizer(pack_tokenizer(carried))
    texts = [*literals(tokenizer), "a b\n c", "Other ordinary<think>"]
    assert tokenizer_digest(carried) == tokenizer_digest(again) == before
    assert token_id_function(carried)(texts) == token_id_function(again)(texts) == token_id_function(tokenizer)(texts)
    check_tokenizer(tokenizer)


@pytest.mark.parametrize("kind", ["Unigram", "BPE", "byte-level BPE", "WordLevel", "WordPiece", "Llama", "T5", "ByT5"])
def test_a_new_padding_token_changes_neither_the_digest_nor_the_packed_file(kind, tmp_path):
    (tmp_path / "a.txt").write_text("a b a ( un a")
    tokenizer, padded = KINDS[kind](), KINDS[kind]()
    padded.add_special_tokens({"pad_token": "<|new padding|>"})
    assert len(padded) == len(tokenizer) + 1
    if tokenizer.is_fast:
        assert tokenizer_digest(padded) == tokenizer_digest(tokenizer)
        assert len({pack(FileCorpus(tmp_path / "a.txt"), one, tmp_path)["train"] for one in (tokenizer, padded)}) == 1
    assert packed_vocabulary_size(padded) == packed_vocabulary_size(tokenizer)


def test_whatever_changes_an_id_changes_the_digest():
    added, other_end = unigram(), unigram(eos_token="[SEP]")
    added.add_tokens(["word"])
    scores = wrapped(models.Unigram([*PIECES[:-1], ("~", -9.0)], 0), pre_tokenizers.Metaspace())
    lower = unigram(normalizer=normalizers.Lowercase())
    split = unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))
    prefixed = unigram(pre_tokenizers.Metaspace(prepend_scheme="never"))
    merges = wrapped(models.BPE(bpe_vocabulary(), MERGES[:-1], unk_token="<unk>"), pre_tokenizers.Metaspace())
    pieces = marked(True)  # [SEP] is special in both, and a piece
    pieces.add_special_tokens({"mask_token": "un"})  # a piece that text had until now
    different = [unigram(), added, other_end, scores, lower, split, prefixed, bpe(), merges, words(), pieces, llama()]
    different += [ByT5Tokenizer()]
    assert len({tokenizer_digest(one) for one in different}) == len(different)


def test_what_changes_no_id_changes_no_digest():
    before = tokenizer_digest(unigram())
    assert tokenizer_digest(KINDS["Unigram, every piece with a space"]()) == before  # a text is one piece to it
    framed, used = unigram(), unigram()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    framed.backend_tokenizer.decoder = decoders.Fuse()
    used(["a b", "c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(framed) == tokenizer_digest(used) == before


def test_a_tokenizer_that_transformers_saves_as_another_is_refused_before_the_first_step(tmp_path):
    cased = DPRReaderTokenizerFast(do_lower_case=False)  # saved, it is lower-cased (transformers 5.23)
    assert tokenizer_digest(unpack_tokenizer(pack_tokenizer(cased))) != tokenizer_digest(cased)
    with pytest.raises(ValueError, match="gives other ids once it is saved and loaded again"):
        check_tokenizer(cased)
    legacy = llama(legacy=True)
    legacy.add_tokens(["Other"])  # behind it the text goes on with a space, and after saving it does not
    encoder_ = FixedTokenEncoder(vocab_size=len(legacy))
    task = make_task(token_encoder=encoder_, token_decoder=LinearTokenDecoder(HIDDEN, len(legacy)), tokenizer=legacy)
    trainer = make_trainer(tmp_path, [])
    (tmp_path / "texts.txt").write_text("\n\n".join(["a b c Other d"] * 40))
    with pytest.raises(ValueError, match="gives other ids once it is saved"):
        trainer.fit(task, make_data(tmp_path, tokenizer=legacy))
    assert trainer.global_step == 0


# --- ids that packed text cannot have


def test_a_model_takes_a_tokenizer_with_more_special_tokens_than_it_has_ids_and_trains(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
    assert vocabulary_size(tokenizer) == VOCAB + 2
    assert packed_vocabulary_size(tokenizer) == VOCAB
    trainer = make_trainer(tmp_path, [], max_steps=2)
    trainer.fit(make_task(tokenizer=tokenizer, timestep_refresh=1), make_data(tmp_path, tokenizer=tokenizer))
    assert trainer.global_step == 2


def test_a_tokenizer_whose_text_or_frame_has_ids_that_the_model_lacks_is_refused():
    word, frame = make_tokenizer(), make_tokenizer()
    word.add_tokens(["another"])
    frame.add_special_tokens({"bos_token": "<begin>"})
    for tokenizer in (word, frame):
        with pytest.raises(ValueError, match="the tokenizer has 41 tokens, but the token encoder knows 40"):
            make_model(tokenizer=tokenizer)


# --- unknown text


def texts_with_unknown(share: float, count: int = 1000) -> list[str]:
    """A hundred documents of ten words each, of which a share is unknown."""
    lost = set(np.random.default_rng(0).choice(count, round(share * count), replace=False).tolist())
    tokens = [f"unknown{i}" if i in lost else WORDS[i % len(WORDS)] for i in range(count)]
    return [" ".join(tokens[i : i + 10]) for i in range(0, count, 10)]


@pytest.mark.parametrize("share", [0.0, 0.009, 0.01, 0.05, 0.25])
def test_the_share_of_unknown_tokens_is_in_the_header_and_is_warned_of_from_one_percent(tmp_path, share):
    (tmp_path / "a.txt").write_text("\n\n".join(texts_with_unknown(share)))
    for _ in range(2):  # when it is packed, and when it is found
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            path = pack(FileCorpus(tmp_path / "a.txt"), make_tokenizer(), tmp_path)["train"]
        told = [str(one.message) for one in warned if "unknown to" in str(one.message)]
        assert (len(told) == 1 and told[0].startswith(f"{share:.1%} of the tokens")) if share >= 0.01 else not told
    header = json.loads(path.with_suffix(".json").read_text())
    stream = np.fromfile(path, "<u2").tolist()
    assert header["unknown"] == stream.count(0) == round(1000 * share)
    assert (header["tokens"], header["documents"], header["lost"]) == (1100, 100, 0)


def test_text_of_which_more_than_a_quarter_is_unknown_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(texts_with_unknown(0.26)))
    with pytest.raises(ValueError, match=r"26% of the text's tokens are unknown to tokenizer='.*', and more than 25%"):
        pack(FileCorpus(tmp_path / "a.txt"), make_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def dropping(special: bool) -> PreTrainedTokenizerFast:
    """A BPE vocabulary without a token for unknown text drops it; its special tokens are pieces of it, or are not."""
    names = ["<s>", "</s>", "<pad>"] if special else []
    vocabulary = {piece: number for number, piece in enumerate(["a", "b", *names])}
    return wrapped(models.BPE(vocabulary, []), unk_token=None)


@pytest.mark.parametrize(("special", "lost"), [(True, 7), (False, 2)])
def test_text_that_gives_no_token_counts_as_unknown_and_blank_text_does_not(tmp_path, special, lost):
    texts = [
        "ab" * 45,
        "aéééeeb",
        "",
        " \n",
        "x",
        "é",
    ]  # 5 dropped among others; two documents of which nothing is left
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    blank = 2 if special else 0  # a space and a line feed are characters too, which it drops
    with pytest.warns(UserWarning, match=rf"^{(lost + blank) / (92 + lost + blank):.1%} of the tokens"):
        path = pack(FileCorpus(tmp_path / "a.jsonl"), dropping(special), tmp_path)["train"]
    header = json.loads(path.with_suffix(".json").read_text())
    assert (header["lost"], header["unknown"], header["tokens"]) == (lost + blank, 0, 92 + 6)
    end = eos_id(dropping(special))
    assert np.fromfile(path, "<u2").tolist() == [0, 1] * 45 + [end, 0, 1] + [end] * 5
    assert token_id_function(dropping(special))(texts) == [[0, 1] * 45, [0, 1], [], [], [], []]


def test_a_tokenizer_that_drops_most_of_a_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abé" * 40)
    with pytest.raises(ValueError, match="33% of the text's tokens are unknown"):
        pack(FileCorpus(tmp_path / "a.txt"), dropping(True), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["empty GPT-2", "other characters", "special ones outside"])
def test_a_tokenizer_that_makes_no_token_of_any_text_is_refused(tmp_path, kind):
    if kind == "empty GPT-2":  # the arguments of transformers 4, which transformers 5 ignores
        tokenizer = GPT2Tokenizer(vocab_file="encoder.json", merges_file="vocab.bpe")
    else:
        tokenizer = dropping(kind == "other characters")
    (tmp_path / "a.txt").write_text("\n\n".join(["other text"] * 150))
    with pytest.raises(ValueError, match="made no token of the text of 150 documents: its vocabulary is empty"):
        pack(FileCorpus(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_corpus_of_blank_documents_is_no_fault_of_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    path = pack(FileCorpus(tmp_path / "a.jsonl"), make_tokenizer(), tmp_path)["train"]
    assert np.fromfile(path, "<u2").tolist() == [2, 2]


def test_a_perfect_reconstruction_of_unknown_tokens_counts_as_wrong(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n\n".join(texts_with_unknown(0.2)))
    tokenizer = make_tokenizer()
    data = make_data(tmp_path, tokenizer=tokenizer, validation=0.5)
    task = make_task(tokenizer=tokenizer)
    model, objective = task.model, task.objective
    model.token_encoder.fit_statistics([torch.arange(VOCAB)[None]], 1)
    rows = []
    task.objective = lambda model, tokens, *rest: rows.append(tokens) or objective(model, tokens, *rest)
    monkeypatch.setattr(model, "decode", lambda z: rows[-1])
    (found,) = make_trainer(tmp_path, []).validate(task, data, verbose=False)
    seen = data.validation_dataset[list(range(len(data.validation_dataset)))]
    wanted = (seen != 0).float().mean().item()
    assert 0.8 < wanted < 0.9
    assert found["validation/accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert found["validation/accuracy_noised"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", QUICK)
def test_rows_begin_and_end_with_bos_and_eos_of_each_kind(kind, tmp_path):
    tokenizer = KINDS[kind]()
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        tokenizer.eos_token = "</s>"
    (tmp_path / "a.txt").write_text("[" * 40 if "brackets" in kind else "a ( a ) a b " * 9)
    rows = open_packed(pack(FileCorpus(tmp_path / "a.txt"), tokenizer, tmp_path)["train"], tokenizer, 5)
    every = rows[list(range(len(rows)))]
    begin, end = [tokenizer.bos_token_id, tokenizer.cls_token_id], [tokenizer.eos_token_id, tokenizer.sep_token_id]
    end = next(number for number in end if number is not None)
    begin = next(number for number in [*begin, end] if number is not None)
    assert (bos_id(tokenizer), eos_id(tokenizer)) == (begin, end)
    assert set(every[:, 0].tolist()) == {begin}
    assert set(every[:, -1].tolist()) == {end}
