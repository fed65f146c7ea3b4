"""A language model of a few thousand weights with every part of the real one, and what it takes to train it."""

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ldlm.checkpoints.io import CheckpointFiles
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.model import LDLM
from ldlm.nn.denoiser import Call, Denoiser, DiT
from ldlm.nn.latent_coders import PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.layers import Block
from ldlm.nn.token_decoders import LinearTokenDecoder
from ldlm.nn.token_encoders import TokenEncoder
from ldlm.objective import JointObjective
from ldlm.training.task import LDLMTask

VOCAB, HIDDEN, LENGTH, LATENT = 40, 16, 8, 12
WORDS = [f"word{i}" for i in range(VOCAB - 3)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int, seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=generator(seed))


class FixedTokenEncoder(TokenEncoder):
    """A frozen table of vectors that are neither centred nor scaled; stands for somebody's own encoder."""

    table: Tensor

    def __init__(self, hidden_size: int = HIDDEN, vocab_size: int = VOCAB, seed: int = 0) -> None:
        super().__init__(hidden_size, vocab_size)
        self.seed = seed
        table = 3 * torch.randn(vocab_size, hidden_size, generator=generator(seed)) + 1
        self.register_buffer("table", table, persistent=False)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def embeddings(self) -> Tensor:
        return self.table


class Given(TokenEncoder):
    """Answers with the hidden states it was given, whatever the tokens."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(hidden.shape[-1], len(hidden))
        self.hidden = hidden

    def hidden_states(self, tokens: Tensor) -> Tensor:
        return self.hidden[tokens]

    def embeddings(self) -> Tensor:
        return self.hidden


class TanhBlock(Block):
    """Somebody's own layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class TimeOnlyDenoiser(Denoiser):
    """Its estimate depends on t alone, so that no loss depends on the noise that was drawn."""

    def __init__(self, latent_size: int = LATENT, num_latents: int = LENGTH) -> None:
        super().__init__(latent_size, num_latents)
        self.slope = torch.nn.Parameter(torch.ones(num_latents, latent_size))

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        return t[:, None, None] * self.slope


class Calls:
    """Listens to a model's denoiser while it samples: rows of each call, what it was told last, what it answered."""

    def __init__(self, model: LDLM) -> None:
        self.rows: list[int] = []
        self.conditions: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.at_times = model.denoiser.at_times
        model.denoiser.at_times = self

    def __call__(self, times: Tensor) -> Iterator[Call]:
        return (partial(self.note, call) for call in self.at_times(times))

    def note(self, call: Call, z_t: Tensor, self_condition: Tensor) -> Tensor:
        self.rows.append(len(z_t))
        self.conditions.append(self_condition.clone())
        self.answers.append(call(z_t, self_condition))
        return self.answers[-1]


def make_model(seed: int = 0, shake: float = 0.1, **changes: Any) -> LDLM:
    """A tiny LDLM; `shake` moves all weights off their start, at which much is zero."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "token_encoder": FixedTokenEncoder(),
        "latent_encoder": PerceiverResamplerEncoder(HIDDEN, LATENT, LENGTH, width=16, layers=1, heads=2),
        "latent_decoder": PerceiverResamplerDecoder(HIDDEN, LATENT, LENGTH, width=16, layers=1, heads=2),
        "denoiser": DiT(LATENT, LENGTH, width=16, layers=1, heads=2),
        "token_decoder": LinearTokenDecoder(HIDDEN, VOCAB),
        "sequence_length": LENGTH,
        "sigma_dec": 1.0,
    }
    model = LDLM(**(parts | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return model


OBJECTIVE, MODEL = (set(inspect.signature(kind).parameters) for kind in (JointObjective, LDLM))


def make_task(seed: int = 0, shake: float = 0.1, model: LDLM | None = None, **changes: Any) -> LDLMTask:
    """A tiny LDLMTask; each change goes to the model, the `JointObjective` or the task, whichever takes it.

    Without a warm-up, unless ``warmup_steps`` are given.
    """
    if model is None:
        parts = {name: changes.pop(name) for name in MODEL & changes.keys()}
        model = make_model(seed, shake, **parts)
    objective = changes.pop("objective", None)
    if objective is None:
        objective = JointObjective(**{name: changes.pop(name) for name in OBJECTIVE & changes.keys()})
    defaults = {"warmup_steps": 0, "statistics_rows": 8, "learning_rate": 1e-3, "lr_warmup_steps": 0}
    return LDLMTask(model, objective, **(defaults | changes))


def make_trainer(folder: Path, callbacks: list[L.Callback], **changes: Any) -> L.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
        "callbacks": callbacks,
    }
    return L.Trainer(**(arguments | changes))


def save_both(model: LDLM, folder: Path) -> None:
    """Write ``whole.ckpt`` and ``export`` of a model that no run trained."""
    trainer = make_trainer(folder, [])
    trainer.strategy.connect(LDLMTask(model, warmup_steps=0))
    trainer.strategy.checkpoint_io = CheckpointFiles()
    trainer.save_checkpoint(folder / "whole.ckpt")
    model.save_pretrained(folder / "export")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, 40 of them, [BOS] and [EOS] among them."""
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_data(folder: Path, batch_size: int = 4, **changes: Any) -> PackedTextDataModule:
    """27 rows of 8 tokens, 3 of them held out."""
    file = folder / "texts.txt"
    if not file.exists():
        text = torch.randint(0, len(WORDS), (30, 5), generator=generator(5)).tolist()
        file.write_text("\n\n".join(" ".join(WORDS[i] for i in line) for line in text))
    arguments: dict[str, Any] = {"dataset": str(file), "tokenizer": make_tokenizer(), "sequence_length": LENGTH}
    arguments |= {"batch_size": batch_size, "validation": 0.1, "cache_dir": str(folder / "cache")}
    return PackedTextDataModule(**(arguments | changes))


def make_pretrained(family: str, folder: Path) -> PreTrainedModel:
    """A randomly initialised transformers model of 4 blocks, saved into `folder`; its norms are moved off 1 and 0."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2Model(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=4, n_head=2))
    elif family == "bert":
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=32, **sizes))
    else:
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        model = LlamaModel(LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=32, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def make_scorer_folder(folder: Path, positions: int = 32) -> Path:
    """A random GPT-2 with a vocabulary of `make_tokenizer`, saved as people save scorers."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "n_positions": positions, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(str(folder))
    return folder


def make_home(folder: Path) -> None:
    """Put an encoder with its tokenizer and a text into a folder, by the names that a recipe gives them."""
    make_pretrained("bert", folder / "encoder")
    make_tokenizer().save_pretrained(str(folder / "encoder"))
    text = "\n\n".join(" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(20)) for i in range(30))
    (folder / "text.txt").write_text(text)
