"""The model: parts wired together, their three losses, and the way back from noise to text.

In: token ids [b n] in training; a number of texts and of denoiser calls in generation.
Out: losses (Eq. 4); texts.
Paper: section 4 (the framework), section 5 (the recipe), App. A.2 (warm-up), App. C (optimisation).

Legend: b rows, n tokens a row, h hidden width, m latents a row, d latent width, u schedule times, gamma the
diffusion-to-encoder coefficient of Eq. 30.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning as L
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ldlm
from ldlm.checkpoints import (
    FORMAT,
    build,
    describe,
    load_weights,
    pack_tokenizer,
    read_checkpoint,
    read_json,
    unpack_tokenizer,
)
from ldlm.decoders import TokenDecoder, TransformerTokenDecoder
from ldlm.denoiser import Denoiser, DiT
from ldlm.encoders import TokenEncoder, local_folder
from ldlm.files import write_atomically
from ldlm.latents import LatentDecoder, LatentEncoder, PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.noise import generator, share
from ldlm.packing import load_tokenizer
from ldlm.samplers import EulerMaruyama, Sampler, TimeGrid, UniformGrid
from ldlm.schedules import NoiseSchedule, TangentSchedule
from ldlm.timesteps import AdaptiveTimesteps, TimestepSampler


class Losses(NamedTuple):
    """The losses of one batch (Eq. 4 and 25-27), means over elements or tokens.

    Attributes:
        total: What is minimised, scalar.
        diffusion: Mean squared error of z0_hat, scalar.
        reconstruction: Mean squared error of the hidden states, scalar.
        token: Cross-entropy in nats per token, scalar.
        rows: The diffusion loss of each row [b], detached.
        z0: The latents [b m d], detached.
    """

    total: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    token: Tensor
    rows: Tensor
    z0: Tensor


class LDLM(L.LightningModule):
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
        diffusion_weight: Weight of the diffusion loss.
        reconstruction_weight: Weight of the hidden-state MSE; 0 switches it off.
        token_weight: Weight of the cross-entropy; 0 switches it off and freezes the token decoder.
        token_gradient: Whether the cross-entropy reaches latent decoder and encoder (Table 1's CE rows). The paper
            stops it.
        token_fraction: Share of positions, drawn anew each step, on which the cross-entropy is taken. With the
            stopped gradient this only makes the token decoder's own gradient noisier.
        self_conditioning: Probability that a row is trained on its own previous estimate; 0 switches it off.
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

    gamma: Tensor | None

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
        if token_weight == 0:
            self.token_decoder.requires_grad_(False)  # DDP wants every trainable parameter used in every step
        self.register_buffer("gamma", None, persistent=False)
        # Set by callbacks: how often the timesteps are refreshed, and the averaged and the raw parameters.
        self.refresh_every: int | None = None
        self.averaged: dict[str, Tensor] | None = None
        self.raw: dict[str, Tensor] | None = None
        self._last_step, self._micro_step = -1, 0
        self.means = torch.nn.ModuleDict({name: MeanMetric() for name in VALIDATION_MEANS})

    def _check(self) -> None:
        """Compare what the parts say of themselves, so that a misfit is named here and not by a matrix product."""
        for name, value, low, high in [
            ("sigma_dec", self.sigma_dec, 0, None),
            ("diffusion_weight", self.diffusion_weight, 0, None),
            ("reconstruction_weight", self.reconstruction_weight, 0, None),
            ("token_weight", self.token_weight, 0, None),
            ("self_conditioning", self.self_conditioning, 0, 1),
            ("lr_decay", self.lr_decay, 0, 1),
        ]:
            if not value >= low or (high is not None and value > high):
                raise ValueError(f"{name}={value} must be at least {low}" + (f" and at most {high}" if high else ""))
        if not 0 < self.token_fraction <= 1:
            raise ValueError(f"token_fraction={self.token_fraction} must be above 0 and at most 1")
        encoder, denoiser, decoder = self.latent_encoder, self.denoiser, self.latent_decoder
        for one, other, what in [
            (self.token_encoder.hidden_size, encoder.hidden_size, "token_encoder and latent_encoder: hidden_size"),
            (self.token_encoder.hidden_size, decoder.hidden_size, "token_encoder and latent_decoder: hidden_size"),
            (self.token_encoder.hidden_size, self.token_decoder.hidden_size, "both token coders: hidden_size"),
            (self.token_encoder.vocab_size, self.token_decoder.vocab_size, "both token coders: vocab_size"),
            (encoder.latent_size, denoiser.latent_size, "latent_encoder and denoiser: latent_size"),
            (encoder.latent_size, decoder.latent_size, "latent_encoder and latent_decoder: latent_size"),
            (encoder.num_latents, denoiser.num_latents, "latent_encoder and denoiser: num_latents"),
            (encoder.num_latents, decoder.num_latents, "latent_encoder and latent_decoder: num_latents"),
        ]:
            if one != other:
                raise ValueError(f"{what} differs, {one} and {other}: give both the same")
        if self.tokenizer is not None and len(self.tokenizer) > self.token_encoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, but the token encoder knows "
                f"{self.token_encoder.vocab_size}: use the tokenizer that belongs to the encoder"
            )

    # ---- text to latents and back ------------------------------------------------------------------------------

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> latents z0 [b m d], float32."""
        z0: Tensor = self.latent_encoder(self.token_encoder(tokens))
        return z0.float()

    def decode(self, z: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents [b m d] -> token ids [b n]; no noise is added. Argmax, or a draw at ``temperature`` above 0."""
        return self.token_decoder.predict(self.latent_decoder(z), temperature, generator)

    def losses(self, tokens: Tensor, generator: torch.Generator, u: Tensor | None = None) -> Losses:
        """The three losses of a batch.

        Args:
            tokens: Token ids [b n].
            generator: Draws all noise, on its own device.
            u: Schedule times [b]; None draws them from `timesteps`.

        Raises:
            ValueError: If gradients are wanted and gamma is unset.
        """
        if u is None:
            u = self.timesteps.sample(len(tokens), generator).to(tokens.device)
        hidden = self.token_encoder(tokens)
        z0 = self.latent_encoder(hidden).float()

        # Eq. 28, in a form that leaves the value exact in every dtype: the noised input and the target see z0, and only
        # the gradient that reaches the latent encoder is multiplied by gamma.
        target = z0 if self._gamma() is None else z0.detach() + self._gamma() * (z0 - z0.detach())
        alpha, sigma = self.schedule.alpha(u)[:, None, None], self.schedule.sigma(u)[:, None, None]
        z_t = alpha * target + sigma * _normal_like(z0, generator)
        z0_hat = self.denoiser(z_t, u, self._self_condition(z_t, u, generator))
        rows = (target - z0_hat).square().mean(dim=(1, 2))  # Eq. 25, per row
        diffusion = rows.mean()

        hidden_hat = self.latent_decoder(z0 + self.sigma_dec * _normal_like(z0, generator))
        reconstruction = F.mse_loss(hidden_hat.float(), hidden.detach())  # Eq. 26
        token = torch.zeros((), device=z0.device)
        if self.token_weight > 0:
            positions = None
            if self.token_fraction < 1:
                count = max(1, round(self.token_fraction * tokens.numel()))
                shuffled = torch.rand(tokens.numel(), generator=generator, device=generator.device).argsort()
                positions = shuffled[:count].to(tokens.device)
            seen = hidden_hat if self.token_gradient else hidden_hat.detach()
            token = self.token_decoder.loss(seen, tokens, positions)  # Eq. 27

        total = self.diffusion_weight * diffusion + self.token_weight * token
        if self.reconstruction_weight > 0:
            total = total + self.reconstruction_weight * reconstruction
        return Losses(total, diffusion, reconstruction, token, rows.detach(), z0.detach())

    def _gamma(self) -> Tensor | None:
        """Gamma, which may be unset only where there is no gradient to scale."""
        if self.gamma is None and torch.is_grad_enabled():
            raise ValueError(MISSING_WARMUP)
        return self.gamma

    @torch.no_grad()
    def _self_condition(self, z_t: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
        """A first estimate for a share of the rows, zeros for the others: [b m d].

        Slices of the global batch are contiguous, so with slices of even size the rows that are even here are those
        that are even there: half of the rows, the same for any number of ranks, with nothing drawn.
        """
        condition = torch.zeros_like(z_t)
        if self.self_conditioning == 0.5 and len(z_t) % 2 == 0:
            condition[0::2] = self.denoiser(z_t[0::2], u[0::2], condition[0::2]).to(condition)
        elif self.self_conditioning > 0:
            coin = torch.rand(len(z_t), generator=generator, device=generator.device) < self.self_conditioning
            estimate = self.denoiser(z_t, u, condition).to(condition)
            condition = torch.where(coin.to(z_t.device)[:, None, None], estimate, condition)
        return condition

    # ---- training ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse to train without the recipe's callbacks; measure the hidden states' statistics, once."""
        if self.gamma is None:
            raise ValueError(MISSING_WARMUP)
        if isinstance(self.timesteps, AdaptiveTimesteps) and self.refresh_every is None:
            raise ValueError(
                "AdaptiveTimesteps are never refreshed without their callback, and would stay uniform: add "
                "AdaptiveTimestepUpdate(every_n_steps=5000) to the trainer's callbacks, or use UniformTimesteps()"
            )
        if self.token_encoder.statistics_rows == 0:
            self.trainer.fit_loop.setup_data()
            self.token_encoder.fit_statistics(iter(self.trainer.train_dataloader), self.statistics_rows)
            self.token_decoder.start(self.token_encoder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One micro-step. All randomness is a function of (seed, step, micro-step, rank)."""
        step = self.trainer.global_step
        self._micro_step = self._micro_step + 1 if step == self._last_step else 0
        self._last_step = step
        # Times are drawn for the global batch and sliced, so that they do not depend on the number of ranks.
        calls = self.trainer.world_size * self.trainer.accumulate_grad_batches
        mine = share(
            len(batch) * calls,
            self.trainer.global_rank,
            self.trainer.world_size,
            self._micro_step,
            self.trainer.accumulate_grad_batches,
        )
        times = generator(self.seed, "times", step, device=self.device)
        u = self.timesteps.sample(len(batch) * calls, times)[mine]
        noise = generator(self.seed, "noise", step, self._micro_step, self.global_rank, device=self.device)
        losses = self.losses(batch, noise, u)
        self.timesteps.observe(u, losses.rows)
        self.log_dict(
            {
                "train/loss": losses.total.detach(),
                "train/diffusion": losses.diffusion.detach(),
                "train/reconstruction": losses.reconstruction.detach(),
                "train/token": losses.token.detach(),
                "train/latent_std": losses.z0.std(dim=(0, 1)).mean(),
            }
        )
        return losses.total

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor] | None:
        """Losses at evenly spread times, and the accuracy of clean and noised reconstruction."""
        if len(batch) == 0:  # a rank's share of the last batch
            return None
        noise = generator(self.seed, "validation", batch_idx, self.global_rank, device=self.device)
        u = (torch.arange(len(batch), device=self.device) + 0.5) / len(batch)
        losses = self.losses(batch, noise, u)
        noised = losses.z0 + self.sigma_dec * _normal_like(losses.z0, noise)
        values = {
            "diffusion": losses.diffusion,
            "reconstruction": losses.reconstruction,
            "token": losses.token,
            "accuracy": (self.decode(losses.z0) == batch).float().mean(),
            "accuracy_noised": (self.decode(noised) == batch).float().mean(),
        }
        for name in VALIDATION_MEANS:
            mean = self.means[name]
            mean.update(values[name], weight=len(batch))
            self.log(f"validation/{name}", mean, on_step=False, on_epoch=True)
        return {"u": u, "loss": losses.rows}

    def test_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor] | None:
        """The same on the test rows."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Token ids [b n] -> their clean reconstruction [b n]."""
        return self.decode(self.encode(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, linear warm-up from 1e-8, constant, and a linear fall over the last ``lr_decay`` of the run."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=self.trainer.precision != "16-mixed",  # a fused optimizer unscales by itself, after clipping
        )
        end = self.trainer.estimated_stepping_batches if self.lr_decay else float("inf")
        if self.lr_decay and end == float("inf"):
            raise ValueError(f"lr_decay={self.lr_decay} needs to know where the run ends: give the trainer max_steps")

        def factor(step: int) -> float:
            start = 1e-8 / self.learning_rate
            rise = 1.0 if step >= self.lr_warmup_steps else start + (1 - start) * step / self.lr_warmup_steps
            fall = min(1.0, (end - step) / (self.lr_decay * end)) if self.lr_decay else 1.0
            return min(rise, max(fall, 0.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm in one fused pass; Lightning's own mixed-precision plugin refuses fused optimizers."""
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm == "value" or self.trainer.precision == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        self.log("train/grad_norm", norm)

    # ---- generation --------------------------------------------------------------------------------------------

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
        on_step: Callable[[int], None] | None = None,
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
            on_step: Called with 1 ... nfe within each batch.

        Raises:
            ValueError: If a count is below 1.
        """
        for name, count in [("num_samples", num_samples), ("nfe", nfe), ("batch_size", batch_size)]:
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")

        def denoise(z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
            # A denoiser that never saw a self-condition in training is given none here.
            known = self_condition if self.self_conditioning > 0 else torch.zeros_like(self_condition)
            z0_hat: Tensor = self.denoiser(z_t, t, known)
            return z0_hat

        solver, times = sampler or self.sampler, grid or self.grid
        shape = (batch_size, self.latent_encoder.num_latents, self.latent_encoder.latent_size)
        for batch, start in enumerate(range(0, num_samples, batch_size)):
            source = generator(seed, "generate", batch, device=self.device)
            noise = torch.randn(shape, generator=source, device=self.device)
            z0_hat = solver.sample(denoise, self.schedule, noise, nfe, source, times, self.timesteps, on_step)
            yield self.decode(z0_hat, temperature, source)[: num_samples - start]

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

    def to_text(self, tokens: Tensor) -> list[str]:
        """Token ids [b n] -> texts, without special tokens.

        Raises:
            ValueError: If the model was made without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer to make text with: give LDLM(tokenizer=...)")
        return [text.strip() for text in self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """The model as plain data: parts, arguments, versions."""
        model = describe(self, leave_out=("tokenizer",))
        return {"format": FORMAT, "version": ldlm.__version__, "model": model}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model; put averaged parameters into ``state_dict`` and raw ones beside it."""
        checkpoint["ldlm"] = self.description()
        if self.tokenizer is not None:
            checkpoint["tokenizer"] = pack_tokenizer(self.tokenizer)
        if self.averaged is not None:
            raw = self.raw or {name: checkpoint["state_dict"][name] for name in self.averaged}
            checkpoint["raw_parameters"] = raw
            checkpoint["state_dict"] = checkpoint["state_dict"] | self.averaged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the raw parameters when training goes on; `callbacks.EMA` takes the averaged ones."""
        if "raw_parameters" in checkpoint and self.trainer.training:
            if self.averaged is None:
                raise ValueError(
                    "this checkpoint holds averaged weights, but nothing here goes on averaging: add EMA() to the "
                    "trainer's callbacks"
                )
            for name, average in self.averaged.items():
                average.copy_(checkpoint["state_dict"][name])
            checkpoint["state_dict"] = checkpoint["state_dict"] | checkpoint["raw_parameters"]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu") -> Self:  # type: ignore[override]
        """The model of a checkpoint, with its averaged weights, in eval mode.

        Args:
            checkpoint_path: A ``.ckpt`` file made by a Trainer with this model, from the command or from a script.
            map_location: Device the model is put on.

        Raises:
            ValueError: If the file is missing, damaged, of something else, or uses classes that are not imported.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        tokenizer = unpack_tokenizer(checkpoint["tokenizer"]) if "tokenizer" in checkpoint else None
        return cls._rebuilt(checkpoint["ldlm"], checkpoint["state_dict"], tokenizer, str(checkpoint_path), map_location)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``ldlm.json`` and the tokenizer's files into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
        with write_atomically(folder / "model.safetensors") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in self.state_dict().items()}))
        with write_atomically(folder / "ldlm.json") as file:
            file.write((json.dumps(self.description(), indent=2) + "\n").encode())

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
        folder = local_folder(str(path_or_repo), revision, "*.json", "*.safetensors", "*.txt", "*.model")
        if not (folder / "ldlm.json").is_file():
            raise ValueError(f"{path_or_repo} holds no ldlm.json: it is not an exported ldlm model")
        about = read_json(folder / "ldlm.json")
        try:
            state = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder}/model.safetensors could not be read ({error}): export the model again"
            ) from error
        with_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder) if with_tokenizer else None
        return cls._rebuilt(about, state, tokenizer, str(folder), map_location)

    @classmethod
    def _rebuilt(
        cls,
        about: dict[str, Any],
        state: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase | None,
        source: str,
        device: str | torch.device,
    ) -> Self:
        """A model from its description, its tensors and its tokenizer."""
        arguments = {name: build(value) for name, value in about["model"]["init_args"].items()}
        model = cls(**arguments, tokenizer=tokenizer)
        load_weights(model, state, source)
        return model.to(device).eval()


VALIDATION_MEANS = ("diffusion", "reconstruction", "token", "accuracy", "accuracy_noised")
MISSING_WARMUP = (
    "gamma, the share of the diffusion gradient that reaches the latent encoder, is unset: add "
    "DiffusionToEncoderWarmup(steps=...) to the trainer's callbacks (steps=0 for no warm-up, the paper's worst row)"
)


def _normal_like(z: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape, dtype and device of z."""
    return torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
