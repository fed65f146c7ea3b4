"""The model: its parts wired together, and how it is trained.

In: parts, batches of token ids [b n]. Out: a loss a step; numbers to log.
Paper: section 4 (the framework), section 5 (the recipe).

What is minimised stands in `objective.py`, sampling in `generation.py`, files in `storage.py`, the optimizer's step in
`optimisation.py`, what watches over a run in `guards.py` and `signals.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm.checkpoints.description import check_description
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.diffusion.grids import TimeGrid, UniformGrid
from ldlm.diffusion.samplers import EulerMaruyama, Sampler
from ldlm.diffusion.schedules import NoiseSchedule, TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps, TimestepSampler
from ldlm.nn.denoiser import Denoiser, DiT
from ldlm.nn.latent_coders import LatentDecoder, LatentEncoder, PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.token_decoders import TokenDecoder, TransformerTokenDecoder
from ldlm.nn.token_encoders import TokenEncoder
from ldlm.objective import MISSING_WARMUP, normal_like
from ldlm.rng import RowNoise, generator
from ldlm.tokenizer import check_tokenizer, load_tokenizer, unknown_id
from ldlm.training.checks import (
    check_callbacks,
    check_data,
    check_encoder,
    check_parts,
    check_precision,
    check_strategy,
    check_uncompiled,
    tokens_of,
)
from ldlm.training.optim import Optimisation, guarded
from ldlm.training.preemption import StopOnSignal
from ldlm.training.resuming import check_requeued, check_resumed, count_calls, read_run, reopen_epoch
from ldlm.training.stability import LatentMonitor, SkippedSteps, spread_over_rows

GOLDEN = (math.sqrt(5) - 1) / 2


class LDLM(Optimisation):
    """A latent diffusion language model trained jointly with its latent space.

    A part left out is the paper's, at the token encoder's width.

    Args:
        token_encoder: Tokens to normalised hidden states; frozen.
        latent_encoder: Hidden states to latents.
        denoiser: Noised latents to clean ones.
        latent_decoder: Latents to hidden states.
        token_decoder: Hidden states to tokens.
        schedule: Noise levels over time.
        timesteps: Which times are trained at.
        tokenizer: Hub id, folder, ``package:NAME/folder`` or a tokenizer; what texts are made with. Checkpoints
            carry its files.
        sequence_length: Tokens a row, n.
        sigma_dec: Deviation of the noise added to the decoder's input in training.
        diffusion_weight: Weight of the diffusion loss; 0 switches it off and freezes the denoiser, which leaves an
            autoencoder.
        reconstruction_weight: Weight of the hidden-state MSE; 0 switches it off.
        token_weight: Weight of the cross-entropy; 0 switches it off and freezes the token decoder.
        token_gradient: Whether the cross-entropy reaches latent decoder and encoder (Table 1's CE rows). The paper
            stops it.
        token_fraction: Share of each row's positions, drawn anew each step, on which the cross-entropy is taken (one
            position at least). With the stopped gradient this only makes the token decoder's own gradient noisier.
        self_conditioning: Probability that a row is trained on its own previous estimate; 0 switches it off.
        hidden_masking: Share of the positions whose hidden states the latent encoder does not see in training; the
            paper's model sees all of them, COSMOS-like autoencoders do not.
        statistics_rows: Rows over which the hidden states' mean and standard deviation are measured, at least: whole
            optimizer steps are read.
        sampler: Solver used by `generate` when none is given.
        grid: Time grid likewise.
        learning_rate: Of AdamW.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        lr_warmup_steps: Steps of linear warm-up from 1e-8.
        lr_decay: Last share of the run over which the learning rate falls linearly to 0; 0 keeps it constant.
        seed: Of the noise in training and validation.
        allow_changes: What a resumed run may change of its checkpoint's run that is refused otherwise, by name:
            ``sigma_dec``, ``schedule.d``, ``schedule`` with all its arguments, ``batch_size`` and ``data`` of the data,
            ``EMA.decay`` of a callback.

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
        diffusion_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        token_weight: float = 1.0,
        token_gradient: bool = False,
        token_fraction: float = 1.0,
        self_conditioning: float = 0.5,
        hidden_masking: float = 0.0,
        statistics_rows: int = 4096,
        sampler: Sampler | None = None,
        grid: TimeGrid | None = None,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_warmup_steps: int = 5000,
        lr_decay: float = 0.0,
        seed: int = 0,
        allow_changes: Sequence[str] = (),
    ) -> None:
        super().__init__()
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
        self.diffusion_weight = diffusion_weight
        self.reconstruction_weight = reconstruction_weight
        self.token_weight = token_weight
        self.token_gradient = token_gradient
        self.token_fraction = token_fraction
        self.self_conditioning = self_conditioning
        self.hidden_masking = hidden_masking
        self.statistics_rows = statistics_rows
        self.sampler = EulerMaruyama() if sampler is None else sampler
        self.grid = UniformGrid() if grid is None else grid
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.seed = seed
        self.allow_changes = tuple(allow_changes)
        self._check()
        # DDP wants every trainable parameter used in every step.
        if diffusion_weight == 0:
            self.denoiser.requires_grad_(False)
        if token_weight == 0:
            self.token_decoder.requires_grad_(False)
        if reconstruction_weight == 0 and not (token_gradient and token_weight > 0):
            self.latent_decoder.requires_grad_(False)
        self.register_buffer("gamma", None, persistent=False)
        # Set by callbacks: how often the timesteps are refreshed, and the averaged and the raw parameters.
        self.refresh_every: int | None = None
        self.averaged: dict[str, Tensor] | None = None
        self.raw: dict[str, Tensor] | None = None
        self.skipped: Tensor | None = None
        self.counted: tuple[int, float] | None = None
        self._last_step, self._micro_step, self._rows_done, self._rows_validated = -1, 0, 0, 0

    def _check(self) -> None:
        """Compare what the parts say of themselves, so that a misfit is named here and not by a matrix product."""
        for name, value, low, high in [
            ("sigma_dec", self.sigma_dec, 0, None),
            ("diffusion_weight", self.diffusion_weight, 0, None),
            ("reconstruction_weight", self.reconstruction_weight, 0, None),
            ("token_weight", self.token_weight, 0, None),
            ("self_conditioning", self.self_conditioning, 0, 1),
            ("hidden_masking", self.hidden_masking, 0, 1),
            ("lr_decay", self.lr_decay, 0, 1),
        ]:
            if not value >= low or (high is not None and value > high):
                raise ValueError(f"{name}={value} must be at least {low}" + (f" and at most {high}" if high else ""))
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 < self.token_fraction <= 1:
            raise ValueError(f"token_fraction={self.token_fraction} must be above 0 and at most 1")
        check_parts(
            self.token_encoder,
            self.latent_encoder,
            self.denoiser,
            self.latent_decoder,
            self.token_decoder,
            self.tokenizer,
            self.reconstruction_weight > 0,
        )

    # ---- training ----------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """The guards of every run, but for those that the trainer's own callbacks bring already.

        The first hook of all: what cannot work is refused here, before texts are packed and callbacks touch the model;
        an earlier fit's averages are forgotten.
        """
        if self.trainer.state.fn == TrainerFn.FITTING and (self.trainer.global_step == 0 or not self.averages_stand()):
            self.averaged = self.raw = None
        guards: list[L.Callback] = [SkippedSteps(), LatentMonitor(), StopOnSignal()]
        there: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        check_precision(str(self.trainer.precision))
        if self.trainer.training:
            check_callbacks(there)
            check_uncompiled(self)
        return [guard for guard in guards if not any(isinstance(callback, type(guard)) for callback in there)]

    def setup(self, stage: str) -> None:
        """Refuse strategies that cannot work; forget what an earlier fit left, so that each asks for its callbacks."""
        check_strategy(self.trainer.strategy)
        if stage == "fit":
            self.gamma = self.skipped = self.refresh_every = self.counted = self.token_encoder.stored = None
        elif self.token_encoder.statistics_rows == 0:
            rank_zero_warn(
                "the hidden states' mean and deviation were never measured, as this model was never fitted: the "
                "numbers that follow say nothing of a trained one"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on as another run; else take the checkpoint's weights."""
        if self.trainer.training:
            about = check_description(checkpoint.get("ldlm"), "the checkpoint")
            check_requeued(self.trainer.ckpt_path, read_run(about), self.trainer)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            check_resumed(checkpoint, self.about_run(), self.token_encoder, data, self.allow_changes)
            reopen_epoch(checkpoint.get("loops"))
            self.counted = count_calls(read_run(about))
        super().on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Refuse what would fail or mislead later; measure the hidden states' statistics, once."""
        if self.gamma is None and self.diffusion_weight > 0:
            raise ValueError(MISSING_WARMUP)
        self.about_run()  # a part that no checkpoint could describe is found now, not at the first checkpoint
        if self.trainer.ckpt_path is not None:
            # Whoever asked for the loader until now (for the length of the run) got one that begins at step 0.
            self.trainer.fit_loop._combined_loader = None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PackedTextDataModule):
            check_data(data, self.sequence_length, self.tokenizer)
        check_encoder(self.token_encoder, self.tokenizer)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer)
        self._last_step = -1  # a second fit may begin with the step at which the first one ended
        adaptive = isinstance(self.timesteps, AdaptiveTimesteps) and self.diffusion_weight > 0
        if adaptive and self.refresh_every is None:
            raise ValueError(
                "AdaptiveTimesteps are never refreshed without their callback, and would stay uniform: add "
                "AdaptiveTimestepUpdate(every_n_steps=5000) to the trainer's callbacks, or use UniformTimesteps()"
            )
        if self.token_encoder.statistics_rows == 0:
            self.trainer.fit_loop.setup_data()
            loader = self.trainer.train_dataloader
            loaders = [] if loader is None else CombinedLoader(loader).flattened
            if len(loaders) > 1:
                raise ValueError(f"the trainer was given {len(loaders)} training loaders together: give one")
            batches = (self._on_before_batch_transfer(batch) for loader in loaders for batch in loader)
            rows = self.statistics_rows
            if isinstance(data, PackedTextDataModule):  # whole optimizer steps, however they are divided into calls
                rows = -(-rows // data.batch_size) * data.batch_size
            self.token_encoder.fit_statistics(batches, rows)
            self.token_decoder.start(self.token_encoder)
            self.check_finite()  # the embeddings from which it starts are the encoder's too

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Tensor:
        """A loader's batch -> its token ids, int64 [b n], which all steps and callbacks are given; see `tokens_of`.

        ``on_before_batch_transfer`` of a subclass or of a data module comes first, and gives a batch of a known kind.
        Lightning's own method (2.6.6) calls one of these two hooks. To override the public one here would be warned of
        in each run with a data module, and skipped where that has one.
        """
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        return tokens_of(batch, self.sequence_length, self.token_encoder.vocab_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One micro-step. All randomness is a function of (seed, step, row of the global batch)."""
        step, ranks, parts = self.trainer.global_step, self.trainer.world_size, self.trainer.accumulate_grad_batches
        if step != self._last_step:
            self._last_step, self._micro_step, self._rows_done = step, -1, 0
        self._micro_step += 1
        total = self._rows_done + len(batch) * ranks * (parts - self._micro_step)
        first = self._rows_done + len(batch) * self.global_rank
        mine = range(first, first + len(batch))
        self._rows_done += len(batch) * ranks
        # Times are drawn for the global batch and sliced, so that the report of a skipped step has all of them.
        self.times = self.timesteps.sample(total, generator(self.seed, "times", step, device=self.device))
        u = self.times[mine.start : mine.stop]
        noise = RowNoise(self.seed, "noise", step, rows=mine, total=total, device=self.device)
        losses = self.losses(batch, noise, u)
        if self.diffusion_weight > 0:
            self.timesteps.observe(u, losses.rows)
        self.logged = {
            "train/loss": losses.total.detach(),
            **spread_over_rows(losses.z0.detach()),
            **{f"train/{name}": loss for name, loss in self.switched_on(losses).items()},
        }
        self.log_dict(self.logged)
        return guarded(losses.total)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor] | None:
        """Losses at evenly spread times, and the accuracy of clean and noised reconstruction, 0 on unknown tokens."""
        # The last batch may leave a rank nothing; it still takes part in the sums over ranks, with no weight.
        rows, batch = len(batch), batch if len(batch) else batch.new_zeros(1, self.sequence_length)
        counts: list[int] = self.all_gather(torch.tensor([rows], device=self.device)).flatten().tolist()  # type: ignore[union-attr]
        first = (self._rows_validated if batch_idx else 0) + sum(counts[: self.global_rank])
        self._rows_validated = first + sum(counts[self.global_rank :])
        mine = range(first, first + len(batch))
        noise = RowNoise(self.seed, "validation", rows=mine, device=self.device)
        # Multiples of the golden ratio are evenly spread over any rows that follow each other.
        u = ((torch.arange(mine.start, mine.stop, dtype=torch.float64) + 0.5) * GOLDEN % 1).float().to(self.device)
        losses = self.losses(batch, noise, u)
        noised = losses.z0 + self.sigma_dec * normal_like(losses.z0, noise)
        values = self.switched_on(losses)
        # A token for unknown text stands for many texts: it is never right.
        lost = None if self.tokenizer is None else unknown_id(self.tokenizer)
        wanted = batch if lost is None else batch.masked_fill(batch == lost, -1)
        values["accuracy"] = (self.decode(losses.z0) == wanted).float().mean()
        values["accuracy_noised"] = (self.decode(noised) == wanted).float().mean()
        logged = {f"validation/{name}": value for name, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=rows, sync_dist=True)
        return {"u": u, "loss": losses.rows} if rows and self.diffusion_weight > 0 else None

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor] | None:
        """The same on the test rows."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Token ids [b n] -> their clean reconstruction [b n]."""
        return self.decode(self.encode(batch))
