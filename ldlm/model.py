"""The model: its parts wired together, usable without any Trainer.

In: parts; token ids [b n], or how many texts. Out: latents [b m d], token ids, texts; files, and the model of a file.
Paper: section 4 (the framework), section 4.3 (sampling; no noise is added before decoding), App. C (neither token
encoder nor latent encoder runs in generation).

b rows, n tokens a row, h hidden width, m latents a row, d latent width, v vocabulary. What is minimised stands in
`objective.py`, training in `training/task.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldlm.checkpoints.description import describe_model
from ldlm.checkpoints.pretrained import load_checkpoint, load_pretrained, save_pretrained
from ldlm.diffusion.grids import TimeGrid, UniformGrid
from ldlm.diffusion.samplers import EulerMaruyama, OnStep, Sampler
from ldlm.diffusion.schedules import NoiseSchedule, TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps, TimestepSampler
from ldlm.nn.denoiser import Denoiser, DiT
from ldlm.nn.latent_coders import LatentDecoder, LatentEncoder, PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.layers import dtype_of
from ldlm.nn.token_decoders import TokenDecoder, TransformerTokenDecoder
from ldlm.nn.token_encoders import TokenEncoder
from ldlm.rng import generator
from ldlm.tokenizer import (
    join_documents,
    load_tokenizer,
    packed_vocabulary_size,
    split_documents,
    vocabulary_size,
)


class LDLM(nn.Module):
    """A latent diffusion language model whose latent space is trained with it.

    A part that is not given is the paper's, at the token encoder's width.

    Args:
        token_encoder: Tokens to normalised hidden states; a pre-trained one is frozen.
        latent_encoder: Hidden states to latents.
        denoiser: Noised latents to clean ones.
        latent_decoder: Latents to hidden states.
        token_decoder: Hidden states to tokens.
        schedule: Noise levels over time.
        timesteps: Which times are trained at.
        tokenizer: Hub id, folder, ``package:NAME/folder`` or a tokenizer; what texts are made with. Checkpoints
            carry its files.
        sequence_length: Tokens a row, n.
        sigma_dec: Standard deviation of the noise added to the decoder's input in training.
        self_conditioning: Probability that a row is trained on its own previous estimate; 0 switches it off, in
            sampling too.
        sampler: Solver used by `generate` when none is given.
        grid: Time grid likewise.

    Raises:
        ValueError: If an argument is out of range, or two parts do not fit.
    """

    def __init__(
        self,
        token_encoder: TokenEncoder,
        latent_encoder: LatentEncoder | None = None,
        denoiser: Denoiser | None = None,
        latent_decoder: LatentDecoder | None = None,
        token_decoder: TokenDecoder | None = None,
        schedule: NoiseSchedule | None = None,
        timesteps: TimestepSampler | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        sequence_length: int = 128,
        sigma_dec: float = 3.0,
        self_conditioning: float = 0.5,
        sampler: Sampler | None = None,
        grid: TimeGrid | None = None,
    ) -> None:
        super().__init__()
        if not sigma_dec >= 0:
            raise ValueError(f"sigma_dec={sigma_dec} must be at least 0")
        if not 0 <= self_conditioning <= 1:
            raise ValueError(f"self_conditioning={self_conditioning} must be at least 0 and at most 1")
        h, v, n = token_encoder.hidden_size, token_encoder.vocab_size, sequence_length
        self.token_encoder = token_encoder
        if latent_encoder is None:
            latent_encoder = PerceiverResamplerEncoder(h, h, n, width=h)
        d, m = latent_encoder.latent_size, latent_encoder.num_latents
        self.latent_encoder = latent_encoder
        self.denoiser = DiT(d, m, width=h) if denoiser is None else denoiser
        if latent_decoder is None:
            latent_decoder = PerceiverResamplerDecoder(h, d, n, m, width=h)
        self.latent_decoder = latent_decoder
        self.token_decoder = TransformerTokenDecoder(h, v) if token_decoder is None else token_decoder
        self.schedule = TangentSchedule() if schedule is None else schedule
        self.timesteps = AdaptiveTimesteps() if timesteps is None else timesteps
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else None
        self.sequence_length = sequence_length
        self.sigma_dec = sigma_dec
        self.self_conditioning = self_conditioning
        self.sampler = EulerMaruyama() if sampler is None else sampler
        self.grid = UniformGrid() if grid is None else grid
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Compare what the parts say of themselves, so that a misfit is named here and not by a matrix product.

        The latent decoder may decode into any width, unless hidden states are reconstructed: see `JointObjective`.
        """
        encoder, decoder = self.latent_encoder, self.latent_decoder
        for one, other, what in [
            (self.token_encoder.hidden_size, encoder.hidden_size, "token_encoder and latent_encoder: hidden_size"),
            (decoder.hidden_size, self.token_decoder.hidden_size, "latent_decoder and token_decoder: hidden_size"),
            (self.token_encoder.vocab_size, self.token_decoder.vocab_size, "both token coders: vocab_size"),
            (encoder.latent_size, self.denoiser.latent_size, "latent_encoder and denoiser: latent_size"),
            (encoder.latent_size, decoder.latent_size, "latent_encoder and latent_decoder: latent_size"),
            (encoder.num_latents, self.denoiser.num_latents, "latent_encoder and denoiser: num_latents"),
            (encoder.num_latents, decoder.num_latents, "latent_encoder and latent_decoder: num_latents"),
        ]:
            if one != other:
                raise ValueError(f"{what} differs, {one} and {other}: give both the same")
        if self.tokenizer is None:
            return
        known, size = self.token_encoder.vocab_size, vocabulary_size(self.tokenizer)
        # Some models pad their vocabulary a little; a tokenizer that is much smaller is another model's. Ids of special
        # tokens may be too large: no text has them. Those that every row has, BOS and EOS, may not.
        if size < 0.95 * known or packed_vocabulary_size(self.tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {size} tokens, but the token encoder knows {known}: "
                "use the tokenizer that belongs to the encoder"
            )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.token_encoder.mean.device

    # ---- text to latents and back ------------------------------------------------------------------------------

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> latents z0 [b m d], float32."""
        z0: Tensor = self.latent_encoder(self.token_encoder(tokens))
        return z0.float()

    def decode(self, z: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents [b m d] -> token ids [b n]; no noise is added. Argmax, or a draw at ``temperature`` above 0."""
        hidden = self.latent_decoder(z.to(dtype_of(self.latent_decoder, z.dtype)))
        return self.token_decoder.predict(hidden, temperature, generator)

    # ---- generation --------------------------------------------------------------------------------------------

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
        return self.to_text(self.sample_tokens(num_samples, nfe, sampler, grid, seed, batch_size, temperature))

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

    # ---- files -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``ldlm.json`` and the tokenizer's files into a folder.

        An earlier export there is replaced once the new one is on the disk, and its files that the new one has not are
        removed. Other files stay.

        Raises:
            ValueError: If the folder holds a file that the export has too, and that no export wrote.
            OSError: If the disk is full, or the folder cannot be written to.
        """
        save_pretrained(folder, describe_model(self), self.state_dict(), self.tokenizer)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, revision: str | None = None, map_location: str | torch.device = "cpu"
    ) -> Self:
        """The model of an exported folder, local or on the hub, in eval mode.

        Args:
            path_or_repo: A folder written by `save_pretrained` or ``ldlm export``, or a hub id.
            revision: Branch, tag or commit on the hub.
            map_location: Device the model is put on.

        Raises:
            ValueError: If there is no such folder or repository, or it holds something else.
        """
        return load_pretrained(cls, str(path_or_repo), revision).to(map_location).eval()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu") -> Self:
        """The model of a checkpoint, with its EMA weights if it has some, in eval mode.

        Args:
            checkpoint_path: A ``.ckpt`` file of a run of `LDLMTask`, from the command or from a script.
            map_location: Device the model is put on.

        Raises:
            ValueError: If the file is missing, damaged, of something else, or uses classes that are not imported.
        """
        return load_checkpoint(cls, checkpoint_path).to(map_location).eval()

    def __repr__(self) -> str:
        """The parts, their sizes and their parameters, one line each."""
        encoder = self.latent_encoder
        tokenizer = "no tokenizer" if self.tokenizer is None else f"a tokenizer of {vocabulary_size(self.tokenizer):,}"
        lines = [
            f"{type(self).__name__} of {self.sequence_length} tokens in {encoder.num_latents} latents of "
            f"{encoder.latent_size} numbers, {tokenizer}, {count_parameters(self):,} parameters",
            *(f"  {name}: {type(part).__name__}, {_size(part)}" for name, part in self.named_children()),
        ]
        lines += [f"  sampler: {type(self.sampler).__name__}", f"  grid: {type(self.grid).__name__}"]
        return "\n".join([*lines, f"  sigma_dec={self.sigma_dec:g}, self_conditioning={self.self_conditioning:g}"])


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters hold, those of frozen pre-trained models not among them."""
    return sum(p.numel() for p in module.parameters())


def _size(part: nn.Module) -> str:
    """A part's parameters, and whether they are trained."""
    if (count := count_parameters(part)) == 0:
        return "no parameters of its own"
    return f"{count:,} parameters{'' if any(p.requires_grad for p in part.parameters()) else ', frozen'}"


def scored_fields(column: str) -> tuple[str, str]:
    """The names under which a line of JSON has the token ids, special ones among them, and documents of a column."""
    return ("ids", "documents") if column == "text" else (f"{column}_ids", f"{column}_documents")
