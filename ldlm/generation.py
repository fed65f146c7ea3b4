"""Generation: from noise to tokens and texts.

In: how many texts, with how many calls of the denoiser. Out: token ids [b n], or texts.
Paper: section 4.3 (sampling; no noise is added before decoding), App. C: neither token encoder nor latent encoder runs.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.samplers import OnStep, Sampler
from ldlm.objective import JointObjective
from ldlm.rng import generator
from ldlm.tokenizer import join_documents, split_documents


def scored_fields(column: str) -> tuple[str, str]:
    """The names under which a line of JSON has the token ids, special ones among them, and documents of a column."""
    return ("ids", "documents") if column == "text" else (f"{column}_ids", f"{column}_documents")


class Generation(JointObjective):
    """Sampling, in terms of parts that `LDLM`'s constructor puts in place."""

    sampler: Sampler
    grid: TimeGrid
    tokenizer: PreTrainedTokenizerBase | None

    def to_bfloat16(self) -> Self:
        """Keep denoiser and decoders in bfloat16 from now on, to sample faster; for a model that is trained no more.

        The state of a sampler stays in float32.
        """
        for part in (self.denoiser, self.latent_decoder, self.token_decoder):
            part.to(torch.bfloat16)
        return self

    @torch.no_grad()
    def sample_batches(
        self,
        num_samples: int,
        nfe: int = 128,
        sampler: Sampler | None = None,
        grid: TimeGrid | None = None,
        seed: int = 0,
        batch_size: int = 16,
        temperature: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Iterator[Tensor]:
        """Generated token ids, batch by batch: [batch_size n], the last one cut to what is missing.

        Args:
            num_samples: Texts over all batches.
            nfe: Calls of the denoiser per text.
            sampler: Solver; None takes the model's.
            grid: Time grid; None takes the model's.
            seed: The same seed and batch size give the same texts, and the first k do not depend on ``num_samples``.
            batch_size: Rows sampled together. Every batch is computed at this size.
            temperature: Of the last choice of tokens; 0 is the argmax.
            on_step: Called with 1 ... nfe and the prediction [batch_size m d] within each batch; may not change it.

        Raises:
            ValueError: If a count is below 1.
        """
        for name, count in [("num_samples", num_samples), ("nfe", nfe), ("batch_size", batch_size)]:
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")

        solver, times = self.sampler if sampler is None else sampler, self.grid if grid is None else grid
        shape = (batch_size, self.latent_encoder.num_latents, self.latent_encoder.latent_size)
        training = self.training
        self.eval()
        try:
            for batch, start in enumerate(range(0, num_samples, batch_size)):
                source = generator(seed, "generate", batch, device=self.device)
                noise = torch.randn(shape, generator=source, device=self.device)
                z0_hat = solver.sample(
                    self.denoiser,
                    self.schedule,
                    noise,
                    nfe,
                    source,
                    times,
                    self.timesteps,
                    on_step,
                    self_condition=self.self_conditioning > 0,
                )
                yield self.decode(z0_hat, temperature, source)[: num_samples - start]
        finally:
            self.train(training)

    def sample_tokens(
        self,
        num_samples: int,
        nfe: int = 128,
        sampler: Sampler | None = None,
        grid: TimeGrid | None = None,
        seed: int = 0,
        batch_size: int = 16,
        temperature: float = 0.0,
    ) -> Tensor:
        """Generated token ids [num_samples n]; arguments as in `sample_batches`."""
        return torch.cat(list(self.sample_batches(num_samples, nfe, sampler, grid, seed, batch_size, temperature)))

    def generate(
        self,
        num_samples: int,
        nfe: int = 128,
        sampler: Sampler | None = None,
        grid: TimeGrid | None = None,
        seed: int = 0,
        batch_size: int = 16,
        temperature: float = 0.0,
    ) -> list[str]:
        """Generated texts; arguments as in `sample_batches`. Needs neither token encoder nor network."""
        tokens = self.sample_tokens(num_samples, nfe, sampler, grid, seed, batch_size, temperature)
        return self.to_text(tokens)

    def to_text(self, tokens: Tensor, boundary: str | None = None) -> list[str]:
        """Token ids [b n] -> texts.

        Args:
            tokens: Rows of token ids.
            boundary: What stands for each special token that begins, ends or pads a document, as in `join_documents`.

        Raises:
            ValueError: If the model was made without a tokenizer.
        """
        return [join_documents(documents, boundary) for documents in self.to_documents(tokens)]

    def to_documents(self, tokens: Tensor) -> list[list[str]]:
        """Token ids [b n] -> the documents of each row, as `split_documents` gives them; errors as in `to_text`."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer to make text with: give LDLM(tokenizer=...)")
        return split_documents(self.tokenizer, tokens.tolist())

    def to_lines(self, tokens: Tensor, column: str = "text") -> list[dict[str, Any]]:
        """Token ids [b n] as JSON lines that ``ldlm evaluate`` scores as it scores the rows; errors as in `to_text`.

        Each has a text to read as ``column``, and by the names of `scored_fields` what scores are computed from.
        """
        ids, documents = scored_fields(column)
        pairs = zip(self.to_documents(tokens), tokens.tolist(), strict=True)
        return [{column: join_documents(split), ids: row, documents: split} for split, row in pairs]
