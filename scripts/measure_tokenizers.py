"""What holds for a tokenizer, a row of a table each: python scripts/measure_tokenizers.py FOLDER ...

Each folder is one that `AutoTokenizer.from_pretrained` reads. Some State of the Union addresses are packed, a tiny
model trains on them for two steps, and its checkpoint is loaded and generates; another text spells the special tokens.
"""

import argparse
import json
import logging
import tempfile
import warnings
from itertools import islice
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm import (
    LDLM,
    DiT,
    LDLMTask,
    LinearTokenDecoder,
    PackedTextDataModule,
    PerceiverResamplerDecoder,
    PerceiverResamplerEncoder,
    TokenEncoder,
)
from ldlm.data.corpus import FileCorpus, open_corpus
from ldlm.data.packing import pack, unknown_share
from ldlm.tokenizer import frame_ids, load_tokenizer, special_ids, token_id_function, tokenizer_digest, unknown_id
from ldlm.tokenizer import packed_vocabulary_size as size

parser = argparse.ArgumentParser(description="What holds for tokenizers.")
parser.add_argument("folders", nargs="+", help="folders that AutoTokenizer.from_pretrained reads")
parser.add_argument("--addresses", type=int, default=4, help="State of the Union addresses (default: %(default)s)")
FOREIGN = "人人生而自由，在尊严和权利上一律平等。 Все люди рождаются свободными и равными в своем достоинстве и правах."


class RandomVectors(TokenEncoder):
    """A vector a token; stands for a real encoder, of which only the number of tokens matters here."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(16, vocab_size)
        self.register_buffer("table", torch.randn(vocab_size, 16), persistent=False)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """[b n] -> [b n 16]."""
        return self.embeddings()[tokens]

    def embeddings(self) -> Tensor:
        """The vectors."""
        return self.get_buffer("table")


def train(tokenizer: PreTrainedTokenizerBase, folder: str) -> tuple[float, bool]:
    """The share of unknown tokens in some addresses; whether the checkpoint's tokenizer finds the packed file again."""
    arguments = {"sequence_length": 16, "batch_size": 4, "cache_dir": folder, "text_unit": "line", "validation": None}
    data = PackedTextDataModule(f"{folder}/texts.txt", tokenizer, **arguments)
    coder = {"hidden_size": 16, "latent_size": 8, "sequence_length": 16, "width": 16, "layers": 1, "heads": 2}
    parts = {"latent_encoder": PerceiverResamplerEncoder(**coder), "latent_decoder": PerceiverResamplerDecoder(**coder)}
    parts |= {"denoiser": DiT(8, 16, width=16, layers=1, heads=2), "sequence_length": 16}
    vocabulary = size(tokenizer)
    model = LDLM(
        RandomVectors(vocabulary), token_decoder=LinearTokenDecoder(16, vocabulary), tokenizer=tokenizer, **parts
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=2, default_root_dir=folder, **quiet)
    trainer.fit(LDLMTask(model, warmup_steps=0, timestep_refresh=1, statistics_rows=8), data)
    trainer.save_checkpoint(f"{folder}/model.ckpt")
    loaded = LDLM.load_from_checkpoint(f"{folder}/model.ckpt")
    loaded.generate(1, nfe=2)
    again = PackedTextDataModule(f"{folder}/texts.txt", loaded.tokenizer, **arguments)
    header = json.loads(data.train_dataset.path.with_suffix(".json").read_text())
    return unknown_share(header), again.train_dataset.path == data.train_dataset.path


def spelled(tokenizer: PreTrainedTokenizerBase) -> str:
    """What becomes of special tokens in a text, of the few that a text can spell."""
    special, unknown = special_ids(tokenizer), unknown_id(tokenizer)
    names = [name for name in map(tokenizer.convert_ids_to_tokens, sorted(special)) if len(name) > 1][:20]
    text = "a " + " a".join(names or ["(none)"])
    ids = token_id_function(tokenizer)([text])[0]
    assert not (special - {unknown}) & set(ids)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text:
        return "come back"
    return "unknown" if unknown in ids else "text, spaced or lower-cased"


def row(folder: str, texts: str) -> str:
    """The table's row."""
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        digest = tokenizer_digest(load_tokenizer(place)) == tokenizer_digest(tokenizer)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "texts.txt").write_text(texts, encoding="utf-8")
        unknown, found = train(tokenizer, place)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "texts.txt").write_text("\n".join([FOREIGN] * 20), encoding="utf-8")
        try:
            file = pack(FileCorpus(f"{place}/texts.txt"), tokenizer, place)["train"]
            foreign = f"{unknown_share(json.loads(file.with_suffix('.json').read_text())):.1%}"
        except ValueError as error:
            foreign = f"refused, {str(error).split()[0]}"
    sample = texts.partition("\n")[0]
    back = (
        tokenizer.decode(token_id_function(tokenizer)([sample])[0], clean_up_tokenization_spaces=False).strip()
        == sample.strip()
    )
    frame = " … ".join(
        f"`{tokenizer.convert_ids_to_tokens(number)}`" for number in frame_ids(tokenizer) if number is not None
    )
    kind = type(tokenizer).__name__ if not tokenizer.is_fast else type(tokenizer.backend_tokenizer.model).__name__
    cells = [Path(folder).name, kind, f"{len(tokenizer):,}", f"{size(tokenizer):,}", frame, f"{unknown:.2%}", foreign]
    cells += [spelled(tokenizer), "yes" if digest and found else "NO", "yes" if back else "no"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    addresses = "\n".join(islice(open_corpus("package:ldlm/corpora/sotu.parquet"), options.addresses))
    print("| tokenizer | kind | tokens | ids in rows | a row | unknown | other scripts | special | saved | back |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for folder in options.folders:
        print(row(folder, addresses), flush=True)
