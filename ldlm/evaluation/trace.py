"""A text taking shape: what the predictions from noise to text decode to, and when each token last changed.

In: token ids of one text's prediction z0_hat at every call of the denoiser. Out: frames, and a page to step through.
Paper: section 4.3 (the sampler's predictions, and how the last one becomes a text).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.samplers import Sampler
from ldlm.evaluation.html import write_page
from ldlm.model import LDLM
from ldlm.tokenizer import join_documents, split_documents


@dataclass(frozen=True)
class Token:
    """One position of a frame.

    Attributes:
        text: What it adds to the text before it, blanks included; a special token's name.
        changed: Call of the denoiser, 1 ... nfe, since which it has been this token; 1 if it never was another.
        special: Whether it is a special token, which is no part of the text.
    """

    text: str
    changed: int
    special: bool


@dataclass(frozen=True)
class Frame:
    """What one prediction decodes to.

    Attributes:
        call: Number of the denoiser's call that made it, 1 ... nfe.
        t: Schedule time of that call, from 1 (noise) down.
        tokens: One a position.
        final: How many of them are as in the last prediction.
        text: As `LDLM.to_text` gives it.
    """

    call: int
    t: float
    tokens: list[Token]
    final: int
    text: str


@dataclass(frozen=True)
class Trace:
    """One text at several calls of the denoiser, of `nfe` in all; the last frame is the text."""

    nfe: int
    frames: list[Frame]


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each id adds to the text: together they are what the tokenizer decodes all ids to.

    A character of several tokens, as byte-level vocabularies have them, goes to the token that completes it.
    """
    found, start, known = [], 0, 0
    for end in range(1, len(ids) + 1):
        # How an id is spelled depends on its neighbour: it is decoded behind one, whose own text is then cut off.
        before, text = (tokenizer.decode(ids[start:stop], skip_special_tokens=True) for stop in (known, end))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")  # perhaps the first bytes of a character
        else:
            found.append(text[len(before) :])
            start, known = known, end
    return found


def make_trace(ids: Tensor, times: Tensor, tokenizer: PreTrainedTokenizerBase, steps: int = 16) -> Trace:
    """The frames of a text, evenly spread over the denoiser's calls; the first and the last are among them.

    Args:
        ids: What the prediction at each call decodes to, [nfe n].
        times: Schedule time of each call, [nfe].
        tokenizer: Turns ids into text.
        steps: Frames, if there are as many calls; with one there is only the last.
    """
    ids = ids.cpu()
    nfe = len(ids)
    call = torch.arange(1, nfe + 1)[:, None]
    fresh = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
    changed = torch.where(fresh, call, 1).cummax(0).values  # [nfe n]
    shown = torch.linspace(nfe, 1, min(steps, nfe)).round().long().flip(0) - 1
    specials = set(tokenizer.all_special_ids)
    frames = []
    for k in shown.tolist():
        row = ids[k].tolist()
        texts = iter(pieces([token for token in row if token not in specials], tokenizer))
        tokens = [
            Token(tokenizer.convert_ids_to_tokens(token), since, True)
            if token in specials
            else Token(next(texts), since, False)
            for token, since in zip(row, changed[k].tolist(), strict=True)
        ]
        (documents,) = split_documents(tokenizer, [row])
        final = int((ids[k] == ids[-1]).sum())
        frames.append(Frame(k + 1, float(times[k]), tokens, final, join_documents(documents)))
    return Trace(nfe, frames)


class Recorder:
    """Listens to a model that samples, and keeps what the first text's predictions decode to.

    An instance is an `on_step` of `LDLM.sample_batches`. It takes one row through the decoders at each call of the
    denoiser, draws nothing and changes no text.
    """

    def __init__(self, model: LDLM) -> None:
        self.model = model
        self.ids: list[Tensor] = []

    def __call__(self, step: int, z0_hat: Tensor) -> None:
        """Decode the first row of [b m d], in the first batch."""
        if step == len(self.ids) + 1:  # a later batch begins again at 1
            self.ids.append(self.model.decode(z0_hat[:1])[0])

    def trace(self, answer: Tensor, grid: TimeGrid | None = None, steps: int = 16) -> Trace:
        """The frames.

        Args:
            answer: The ids that sampling ended in, [n]: the last frame, whatever the temperature was.
            grid: The one that was sampled on; None for the model's.
            steps: As in `make_trace`.

        Raises:
            ValueError: If the model has no tokenizer.
        """
        if self.model.tokenizer is None:
            raise ValueError("this model has no tokenizer to make text with: give LDLM(tokenizer=...)")
        ids = torch.stack([*self.ids[:-1], answer])
        grid = self.model.grid if grid is None else grid
        times = grid.times(len(ids), self.model.schedule, self.model.timesteps)
        return make_trace(ids, times[:-1], self.model.tokenizer, steps)


def trace_text(
    model: LDLM,
    nfe: int = 128,
    sampler: Sampler | None = None,
    grid: TimeGrid | None = None,
    seed: int = 0,
    batch_size: int = 16,
    temperature: float = 0.0,
    steps: int = 16,
) -> Trace:
    """The first text of ``model.generate`` with the same arguments, taking shape; ``steps`` as in `make_trace`."""
    recorder = Recorder(model)
    (tokens,) = model.sample_batches(1, nfe, sampler, grid, seed, batch_size, temperature, recorder)
    return recorder.trace(tokens[0], grid, steps)


def write_trace(path: str | Path, trace: Trace, title: str) -> None:
    """Write a page on which a text takes shape, to be stepped through; without scripts it shows all frames."""
    write_page(path, "trace.html.j2", {"title": title, "trace": trace})
