"""The model: its parts wired together, and how it is trained.

In: parts, batches of token ids [b n]. Out: a loss a step; numbers to log.
Paper: section 4 (the framework), section 5 (the recipe).

What is minimised stands in `objective.py`, sampling in `generation.py`, files in `storage.py`, the optimizer's step in
`optimisation.py`, what watches over a run in `guards.py` and `signals.py`.
"""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm.agreement import check_data, check_encoder, check_parts, check_strategy
from ldlm.checkpoints import check_description
from ldlm.data import PackedTextDataModule, check_resumed
from ldlm.decoders import TokenDecoder, TransformerTokenDecoder
from ldlm.denoiser import Denoiser, DiT
from ldlm.encoders import TokenEncoder
from ldlm.grids import TimeGrid, UniformGrid
from ldlm.guards import BadSteps, LatentWatch, spread_over_rows
from ldlm.latents import LatentDecoder, LatentEncoder, PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.noise import generator, share
from ldlm.objective import MISSING_WARMUP, normal_like
from ldlm.optimisation import Optimisation, guarded
from ldlm.packing import load_tokenizer
from ldlm.samplers import EulerMaruyama, Sampler
from ldlm.schedules import NoiseSchedule, TangentSchedule
from ldlm.signals import StopOnSignal
from ldlm.timesteps import AdaptiveTimesteps, TimestepSampler


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
        token_fraction: Share of positions, drawn anew each step, on which the cross-entropy is taken. With the
            stopped gradient this only makes the token decoder's own gradient noisier.
        self_conditioning: Probability that a row is trained on its own previous estimate; 0 switches it off.
        hidden_masking: Share of the positions whose hidden states the latent encoder does not see in training; the
            paper's model sees all of them, COSMOS-like autoencoders do not.
        statistics_rows: Rows over which the hidden states' mean and deviation are measured.
        sampler: Solver used by `generate` when none is given.
        grid: Time grid likewise.
        learning_rate: Of AdamW.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        lr_warmup_steps: Steps of linear warm-up from 1e-8.
        lr_decay: Last share of the run over which the learning rate falls linearly to 0; 0 keeps it constant.
        seed: Of the noise in training and validation.

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
    ) -> None:
        super().__init__()
        h, v, n = token_encoder.hidden_size, token_encoder.vocab_size, sequence_length
        self.token_encoder = token_encoder
        self.latent_encoder = latent_encoder or PerceiverResamplerEncoder(h, h, n, width=h)
        d, m = self.latent_encoder.latent_size, self.latent_encoder.num_latents
        self.denoiser = denoiser or DiT(d, m, width=h)
        self.latent_decoder = latent_decoder or PerceiverResamplerDecoder(h, d, n, m, width=h)
        self.token_decoder = token_decoder or TransformerTokenDecoder(h, v)
        self.schedule = schedule or TangentSchedule()
        self.timesteps = timesteps or AdaptiveTimesteps()
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
        self.sampler = sampler or EulerMaruyama()
        self.grid = grid or UniformGrid()
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.seed = seed
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
        self._last_step, self._micro_step = -1, 0

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
        """The guards of every run, but for those that the trainer's own callbacks bring already."""
        guards: list[L.Callback] = [BadSteps(), LatentWatch(), StopOnSignal()]
        there: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [guard for guard in guards if not any(isinstance(callback, type(guard)) for callback in there)]

    def setup(self, stage: str) -> None:
        """Refuse strategies that cannot work; forget an earlier fit's gamma, so that each fit asks for its warm-up."""
        check_strategy(self.trainer.strategy)
        if stage == "fit":
            self.gamma = self.skipped = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on as another run; else take the checkpoint's weights."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.training and "ldlm" in checkpoint:
            allowed = data.allow_changes if isinstance(data, PackedTextDataModule) else ()
            stored = check_description(checkpoint["ldlm"], "the checkpoint")["model"]["init_args"]
            check_resumed(stored, {"sequence_length": self.sequence_length, "seed": self.seed}, allowed)
        super().on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Refuse what would fail or mislead later; measure the hidden states' statistics, once."""
        if self.gamma is None and self.diffusion_weight > 0:
            raise ValueError(MISSING_WARMUP)
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision={self.trainer.precision!r} would keep weights and bin statistics in 16 bits: "
                "use 'bf16-mixed', which computes in 16 bits and keeps 32"
            )
        self.description()  # a part that no checkpoint could describe is found now, not at the first checkpoint
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PackedTextDataModule):
            check_data(data, self.sequence_length, self.tokenizer)
        check_encoder(self.token_encoder, self.tokenizer)
        self._last_step = -1  # a second fit may begin with the step at which the first one ended
        adaptive = isinstance(self.timesteps, AdaptiveTimesteps) and self.diffusion_weight > 0
        if adaptive and self.refresh_every is None:
            raise ValueError(
                "AdaptiveTimesteps are never refreshed without their callback, and would stay uniform: add "
                "AdaptiveTimestepUpdate(every_n_steps=5000) to the trainer's callbacks, or use UniformTimesteps()"
            )
        if self.token_encoder.statistics_rows == 0:
            self.trainer.fit_loop.setup_data()
            loader: Iterable[Tensor] = self.trainer.train_dataloader or []
            self.token_encoder.fit_statistics(loader, self.statistics_rows)
            self.token_decoder.start(self.token_encoder)
            self.check_finite()  # the embeddings from which it starts are the encoder's too

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One micro-step. All randomness is a function of (seed, step, micro-step, rank)."""
        step, ranks, parts = self.trainer.global_step, self.trainer.world_size, self.trainer.accumulate_grad_batches
        self._micro_step = self._micro_step + 1 if step == self._last_step else 0
        self._last_step = step
        # Times are drawn for the global batch and sliced, so that they do not depend on the number of ranks.
        rows = len(batch) * ranks * parts
        mine = share(rows, self.global_rank, ranks, self._micro_step, parts)
        self.times = self.timesteps.sample(rows, generator(self.seed, "times", step, device=self.device))
        u = self.times[mine]
        noise = generator(self.seed, "noise", step, self._micro_step, self.global_rank, device=self.device)
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

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor] | None:
        """Losses at evenly spread times, and the accuracy of clean and noised reconstruction."""
        # The last batch may leave a rank nothing; it still takes part in the sums over ranks, with no weight.
        rows, batch = len(batch), batch if len(batch) else batch.new_zeros(1, self.sequence_length)
        noise = generator(self.seed, "validation", batch_idx, self.global_rank, device=self.device)
        # Spread over the rows of all ranks, so that the loss does not depend on their number.
        counts = torch.zeros(self.trainer.world_size, device=self.device)
        counts[self.global_rank] = rows
        counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        place = counts[: self.global_rank].sum() + torch.arange(len(batch), device=self.device) + 0.5
        u = (place / counts.sum()).clamp(max=1)
        losses = self.losses(batch, noise, u)
        noised = losses.z0 + self.sigma_dec * normal_like(losses.z0, noise)
        values = self.switched_on(losses)
        values["accuracy"] = (self.decode(losses.z0) == batch).float().mean()
        values["accuracy_noised"] = (self.decode(noised) == batch).float().mean()
        logged = {f"validation/{name}": value for name, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=rows, sync_dist=True)
        return {"u": u, "loss": losses.rows} if rows and self.diffusion_weight > 0 else None

    def test_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor] | None:
        """The same on the test rows."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Token ids [b n] -> their clean reconstruction [b n]."""
        return self.decode(self.encode(batch))
