"""How probable the model finds a text: upper bounds on −log p(w), as validation metrics in nats per token.

In: token ids [b n]. Out: nats of each row; numbers to log.
Paper: App. A.1, Eq. 15-23 (the diffusion term is Kingma et al., 2021, Variational Diffusion Models).

Legend: w a row of tokens, mu its noise-free latent, h its normalised hidden states, r = e^λ = alpha²/sigma² the SNR.

What is bounded is p: z_1 ~ N(0, I) goes through the denoiser's reverse diffusion, in continuous time and with no
self-condition, until the time t_tau at which sigma/alpha = tau; then z0 = z_t/alpha, z~ = z0 + sigma_dec eps, and the
decoders draw w at z~. (`LDLM.generate` is not p: finitely many steps, self-conditioned, decoded without noise.) With
the posterior q^tau = N(mu, tau² I),

    −log p(w) ≤ E CE(w; mu + √(tau² + sigma_dec²) eps) + KL(q^tau ‖ p),                          the token bound
    KL(q^tau ‖ p) ≤ ∫_{t_tau}^1 omega(t) E‖mu − z0_hat(z_t, t)‖² dt,   omega(t) = −½ λ'(t) e^λ(t)       Eq. 22
                  = ½ ∫_0^{1/tau²} E‖mu − z0_hat‖² dr,                 as omega dt = −½ dr.

Why any tau > 0 will do: noised from mu as far as t_tau, z_t/alpha is distributed exactly as q^tau, and at t = 1, where
alpha is 0, exactly as p begins. So the integral, which compares the two paths, bounds the divergence of their ends.
What tau chooses is where p stops. A larger one costs cross-entropy: more noise is decoded. A smaller one costs KL:
every element is told more precisely, in ½ log(1 + s²/tau²) nats for latents N(0, s²) and a perfect denoiser, which
diverges like −log tau. A tau far below sigma_dec buys no cross-entropy.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.model import LDLM
from ldlm.objective import normal_like

AUGMENTED = "augmented_nelbo_not_comparable_with_other_models_sigma_rec"


class Terms(NamedTuple):
    """The terms of Eq. 23 in nats a row, float64 [k b]: k independent, unbiased estimates for each of b rows.

    Attributes:
        token_cross_entropy: CE(w; z~), summed over tokens.
        kl: The bound on KL(q^tau ‖ p), summed over the latents' elements.
        hidden_density: −log N(h; latent_decoder(z~), sigma_rec² I), its constant included; a density's, so of any sign;
            NaN where the latent decoder does not decode into hidden states.
    """

    token_cross_entropy: Tensor
    kl: Tensor
    hidden_density: Tensor

    @property
    def token_bound(self) -> Tensor:
        """On −log p(w)."""
        return self.token_cross_entropy + self.kl

    @property
    def augmented_nelbo(self) -> Tensor:
        """On −log p(w, h): it moves with sigma_rec and with what h is, so it is not comparable with other models."""
        return self.token_bound + self.hidden_density


def integration_times(schedule: NoiseSchedule, position: Tensor, tau: float, power: Tensor) -> tuple[Tensor, Tensor]:
    """Times [b] to take f = E‖mu − z0_hat‖² at, and weights [b] that make its mean over positions the KL integral.

    Times are uniform in y = log(1 + c r), between 0 and Y = log(1 + c/tau²), with c = power + tau²:

        r = (e^y − 1)/c,   ½ ∫_0^{1/tau²} f dr = ½ ∫_0^Y f e^y/c dy = E[weight · f],   weight = ½ Y e^y/c.

    Where signal outweighs noise (c r ≫ 1) this is uniform in log-SNR. Below, where log-SNR runs to −inf and the
    integral has hardly anything left, it is uniform in r: t = 1 is reached, and no tail is cut off or guessed.
    For latents N(0, power) and a perfect denoiser f = power/(1 + power · r), and weight · f is nearly constant.

    Args:
        schedule: Where the time of a log-SNR is looked up.
        position: y/Y in [0, 1], float64 [b].
        tau: Noise-to-signal ratio sigma/alpha at which the integral ends, above 0.
        power: Mean square of a row's latents, float64 [b]. Only the variance depends on it.
    """
    c = power + tau**2
    end = torch.log1p(c / tau**2)
    y = position * end
    return schedule.time_at(torch.log(torch.expm1(y) / c)), end * y.exp() / (2 * c)


@torch.no_grad()
def likelihood_terms(
    model: LDLM, tokens: Tensor, generator: torch.Generator, tau: float, sigma_rec: float, samples: int
) -> Terms:
    """Monte-Carlo estimates of the terms of the bounds; each costs one call of the denoiser and of both decoders.

    Args:
        model: The model; its own sigma_dec is part of p.
        tokens: Token ids [b n].
        generator: Draws times and noise, on its own device.
        tau: Deviation of the posterior, above 0, in units of the latents.
        sigma_rec: Deviation of the hidden states, above 0, in units of their normalised scale.
        samples: Independent estimates a row, k.
    """
    hidden = model.token_encoder(tokens)
    mu = model.latent_encoder(hidden).float()
    power = mu.double().square().mean(dim=(1, 2))
    strata = torch.arange(len(mu), device=mu.device, dtype=torch.float64) / len(mu)
    estimates = []
    for _ in range(samples):
        # One uniform offset for all rows: each row's position alone is uniform, and together they are evenly spaced.
        offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).to(mu.device)
        t, weight = integration_times(model.schedule, (offset + strata) % 1, tau, power)
        alpha, sigma = model.schedule.alpha(t).to(mu)[:, None, None], model.schedule.sigma(t).to(mu)[:, None, None]
        z_t = alpha * mu + sigma * normal_like(mu, generator)
        z0_hat = model.denoiser(z_t, t.to(mu), torch.zeros_like(mu))
        kl = weight * (mu - z0_hat.double()).square().sum(dim=(1, 2))

        hidden_hat = model.latent_decoder(mu + math.hypot(tau, model.sigma_dec) * normal_like(mu, generator))
        if hidden_hat.shape == hidden.shape:
            error = (hidden - hidden_hat.double()).square().sum(dim=(1, 2))
            density = 0.5 * (error / sigma_rec**2 + hidden[0].numel() * math.log(2 * math.pi * sigma_rec**2))
        else:  # straight from latents to tokens (`replace_token_decoder`): this model says nothing of h
            density = torch.full_like(kl, math.nan)
        estimates.append(torch.stack([model.token_decoder.nats(hidden_hat, tokens), kl, density]))
    return Terms(*torch.stack(estimates, dim=1))
