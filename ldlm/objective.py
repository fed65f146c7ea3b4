"""The joint objective: what is minimised, and the way from text to latents and back.

In: token ids [b n]. Out: latents [b m d], token ids again, and the three losses.
Paper: sections 3 and 4, Eq. 1-4 and 25-27; section 5.2 and Eq. 28 (warm-up), section 5.4 (decoder noise).

Legend: b rows, n tokens a row, h hidden width, m latents a row, d latent width, u schedule times, gamma the
diffusion-to-encoder coefficient of Eq. 30.
"""

from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.diffusion.timesteps import TimestepSampler
from ldlm.nn.denoiser import Denoiser
from ldlm.nn.latent_coders import LatentDecoder, LatentEncoder
from ldlm.nn.layers import dtype_of
from ldlm.nn.token_decoders import TokenDecoder
from ldlm.nn.token_encoders import TokenEncoder
from ldlm.rng import RowNoise, Source, normal, uniform

MISSING_WARMUP = (
    "gamma, the share of the diffusion gradient that reaches the latent encoder, is unset: add "
    "DiffusionToEncoderWarmup(steps=...) to the trainer's callbacks (steps=0 for no warm-up, the paper's worst row)"
)


class Losses(NamedTuple):
    """The losses of one batch (Eq. 4 and 25-27), means over elements or tokens; zero where a loss is switched off.

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


class JointObjective(L.LightningModule):
    """Encoding, decoding and the losses, in terms of parts that `LDLM`'s constructor puts in place."""

    token_encoder: TokenEncoder
    latent_encoder: LatentEncoder
    denoiser: Denoiser
    latent_decoder: LatentDecoder
    token_decoder: TokenDecoder
    schedule: NoiseSchedule
    timesteps: TimestepSampler
    sigma_dec: float
    diffusion_weight: float
    reconstruction_weight: float
    token_weight: float
    token_gradient: bool
    token_fraction: float
    self_conditioning: float
    hidden_masking: float
    gamma: Tensor | None

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> latents z0 [b m d], float32."""
        z0: Tensor = self.latent_encoder(self.token_encoder(tokens))
        return z0.float()

    def decode(self, z: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents [b m d] -> token ids [b n]; no noise is added. Argmax, or a draw at ``temperature`` above 0."""
        hidden = self.latent_decoder(z.to(dtype_of(self.latent_decoder, z.dtype)))
        return self.token_decoder.predict(hidden, temperature, generator)

    def losses(self, tokens: Tensor, source: Source, u: Tensor | None = None) -> Losses:
        """The three losses of a batch.

        Args:
            tokens: Token ids [b n].
            source: Draws all noise, on its own device: one generator for the batch, or one for each row.
            u: Schedule times [b]; None draws them from `timesteps`.

        Raises:
            ValueError: If the diffusion loss and gradients are wanted and gamma is unset.
        """
        if u is None:
            u = self.timesteps.sample(len(tokens), source).to(tokens.device)
        hidden = self.token_encoder(tokens)
        z0 = self.latent_encoder(self._masked(hidden, source)).float()
        diffusion = reconstruction = token = z0.new_zeros(())
        rows = z0.new_zeros(len(tokens))

        if self.diffusion_weight > 0:
            # Eq. 28, in a form that leaves the value exact in every dtype: the noised input and the target see z0, and
            # only the gradient that reaches the latent encoder is multiplied by gamma.
            target = z0 if self._gamma() is None else z0.detach() + self._gamma() * (z0 - z0.detach())
            rows = self.diffusion_rows(target, u, source)
            diffusion = rows.mean()

        if self.reconstruction_weight > 0 or self.token_weight > 0:
            hidden_hat = self.latent_decoder(z0 + self.sigma_dec * normal_like(z0, source))
            if self.reconstruction_weight > 0:
                reconstruction = F.mse_loss(hidden_hat.float(), hidden.detach())  # Eq. 26
            if self.token_weight > 0:
                seen = hidden_hat if self.token_gradient else hidden_hat.detach()
                token = self.token_decoder.loss(seen, tokens, self._positions(tokens, source))  # Eq. 27

        total = (
            self.diffusion_weight * diffusion + self.reconstruction_weight * reconstruction + self.token_weight * token
        )
        return Losses(total, diffusion, reconstruction, token, rows.detach(), z0.detach())

    def diffusion_rows(self, z0: Tensor, u: Tensor, source: Source) -> Tensor:
        """The diffusion loss of each row [b], Eq. 1 and 25, with self-conditioning as in training.

        Args:
            z0: Latents [b m d].
            u: Schedule times [b].
            source: Draws the noise.
        """
        alpha, sigma = self.schedule.alpha(u)[:, None, None], self.schedule.sigma(u)[:, None, None]
        z_t = alpha * z0 + sigma * normal_like(z0, source)
        z0_hat = self.denoiser(z_t, u, self._self_condition(z_t, u, source))
        rows: Tensor = (z0 - z0_hat).square().mean(dim=(1, 2))
        return rows

    def switched_on(self, losses: Losses) -> dict[str, Tensor]:
        """The losses that count in this model, by name, detached."""
        weights = {
            "diffusion": (self.diffusion_weight, losses.diffusion),
            "reconstruction": (self.reconstruction_weight, losses.reconstruction),
            "token": (self.token_weight, losses.token),
        }
        return {name: loss.detach() for name, (weight, loss) in weights.items() if weight > 0}

    def _masked(self, hidden: Tensor, source: Source) -> Tensor:
        """What the latent encoder sees: in training, a share of the positions is zero, which is their mean."""
        if self.hidden_masking == 0 or not self.training:
            return hidden
        kept = uniform((hidden.shape[0], hidden.shape[1]), source) >= self.hidden_masking
        return hidden * kept.to(hidden)[..., None]

    def _positions(self, tokens: Tensor, source: Source) -> Tensor | None:
        """Indices into the b·n positions on which the cross-entropy is taken, as many in each row; None for all."""
        if self.token_fraction == 1:
            return None
        b, n = tokens.shape
        chosen = uniform((b, n), source).argsort(dim=1)[:, : max(1, round(self.token_fraction * n))]
        return (chosen + n * torch.arange(b, device=chosen.device)[:, None]).flatten().to(tokens.device)

    def _gamma(self) -> Tensor | None:
        """Gamma, which may be unset only where there is no gradient to scale."""
        if self.gamma is None and torch.is_grad_enabled():
            raise ValueError(MISSING_WARMUP)
        return self.gamma

    @torch.no_grad()
    def _self_condition(self, z_t: Tensor, u: Tensor, source: Source) -> Tensor:
        """A first estimate for a share of the rows, zeros for the others: [b m d].

        With a probability of 0.5 and a global batch of even size these are its rows of even index: exactly half, the
        same for any number of ranks and accumulated batches, with nothing drawn. Else each row throws a coin.
        """
        condition = torch.zeros_like(z_t)
        start, total = (source.rows.start, source.total) if isinstance(source, RowNoise) else (0, len(z_t))
        if self.self_conditioning == 0.5 and (total is None or total % 2 == 0):
            even = slice(start % 2, None, 2)
            if len(z_t[even]):  # one row alone may be of odd index
                condition[even] = self.denoiser(z_t[even], u[even], condition[even]).to(condition)
        elif self.self_conditioning > 0:
            coin = uniform((len(z_t),), source) < self.self_conditioning
            estimate = self.denoiser(z_t, u, condition).to(condition)
            condition = torch.where(coin.to(z_t.device)[:, None, None], estimate, condition)
        return condition


def normal_like(z: Tensor, source: Source) -> Tensor:
    """Standard normal noise of the shape, dtype and device of z [b ...]."""
    return normal(tuple(z.shape), source, z.dtype).to(z.device)
