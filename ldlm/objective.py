"""What is minimised: the joint objective, and the interface of another one.

In: a model, token ids [b n], schedule times u [b], gamma. Out: the losses of the batch.
Paper: sections 3 and 4, Eq. 1-4 and 25-27; section 5.2 and Eq. 28 (warm-up), section 5.4 (decoder noise).

b rows, n tokens a row, h hidden width, m latents a row, d latent width; gamma is the diffusion-to-encoder coefficient
of Eq. 30.
"""

import abc
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldlm.model import LDLM
from ldlm.rng import RowNoise, Source, normal, uniform


class Losses(NamedTuple):
    """The losses of one batch.

    Attributes:
        total: What is minimised, scalar.
        terms: The losses that count, by name, scalars: logged as ``train/NAME`` and ``validation/NAME``.
        rows: The diffusion loss of each row [b], detached, from which the timestep sampler learns; None without one.
        z0: The latents [b m d], with their gradient: another objective may add a term of them.
    """

    total: Tensor
    terms: dict[str, Tensor]
    rows: Tensor | None
    z0: Tensor


class Objective(abc.ABC):
    """A training objective, which a recipe names by ``training.objective.class_path``.

    Constructor arguments are plain data, kept under their own names: checkpoints describe them. An objective has no
    weights; what learns is a part of the model.
    """

    @abc.abstractmethod
    def __call__(self, model: LDLM, tokens: Tensor, u: Tensor, gamma: Tensor | float, source: Source) -> Losses:
        """The losses of a batch.

        Args:
            model: The model.
            tokens: Token ids [b n].
            u: Schedule times [b].
            gamma: Share of the diffusion gradient that reaches the latent encoder, in [0, 1].
            source: Draws all noise, on its own device: one generator for the batch, or one for each row.
        """

    def prepare(self, model: LDLM) -> None:  # noqa: B027  # a hook
        """Check that a model suits, and freeze what gets no gradient: a method meant to be overridden, empty here.

        Called when a task is made, which then sets the parts free again, and at the start of each of its fits, which
        sets them free at its end. DDP wants every trainable parameter used in every step.
        """


class JointObjective(Objective):
    """The paper's objective: diffusion, hidden-state and token loss together (Eq. 4, 25-28).

    Each is a mean over elements or tokens, and has a weight; with 0 it is switched off.

    Args:
        diffusion_weight: Weight of the diffusion loss; 0 freezes the denoiser, which leaves an autoencoder.
        reconstruction_weight: Weight of the hidden-state MSE.
        token_weight: Weight of the cross-entropy; 0 freezes the token decoder.
        token_gradient: Whether the cross-entropy reaches latent decoder and encoder (Table 1's CE rows). The paper
            stops it.
        token_fraction: Share of each row's positions, drawn anew each step, on which the cross-entropy is taken (one
            position at least). With the stopped gradient this only makes the token decoder's own gradient noisier.
        hidden_masking: Share of the positions whose hidden states the latent encoder does not see in training; the
            paper's model sees all of them, COSMOS-like autoencoders do not.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        diffusion_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        token_weight: float = 1.0,
        token_gradient: bool = False,
        token_fraction: float = 1.0,
        hidden_masking: float = 0.0,
    ) -> None:
        weights = {
            "diffusion_weight": diffusion_weight,
            "reconstruction_weight": reconstruction_weight,
            "token_weight": token_weight,
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not 0 <= hidden_masking <= 1:
            raise ValueError(f"hidden_masking={hidden_masking} must be at least 0 and at most 1")
        check_fraction(token_fraction)
        self.diffusion_weight = diffusion_weight
        self.reconstruction_weight = reconstruction_weight
        self.token_weight = token_weight
        self.token_gradient = token_gradient
        self.token_fraction = token_fraction
        self.hidden_masking = hidden_masking

    def prepare(self, model: LDLM) -> None:
        """Compare the decoder's width with the hidden states' and freeze the parts that no loss reaches.

        Raises:
            ValueError: If hidden states are to be reconstructed and the latent decoder's width is another.
        """
        wanted, width = model.token_encoder.hidden_size, model.latent_decoder.hidden_size
        if self.reconstruction_weight > 0 and wanted != width:
            raise ValueError(
                f"token_encoder and latent_decoder: hidden_size differs, {wanted} and {width}: give both the same"
            )
        decodes = self.reconstruction_weight > 0 or (self.token_gradient and self.token_weight > 0)
        if self.diffusion_weight == 0:
            model.denoiser.requires_grad_(False)
        if self.token_weight == 0:
            model.token_decoder.requires_grad_(False)
        if not decodes:
            model.latent_decoder.requires_grad_(False)
        if not decodes and self.diffusion_weight == 0:
            model.latent_encoder.requires_grad_(False)

    def __call__(self, model: LDLM, tokens: Tensor, u: Tensor, gamma: Tensor | float, source: Source) -> Losses:
        """The weighted sum of the three losses; see `Objective.__call__`."""
        hidden = model.token_encoder(tokens)
        z0 = model.latent_encoder(self._masked(hidden, source, model.training)).float()
        total, terms, rows = z0.new_zeros(()), {}, None

        if self.diffusion_weight > 0:
            # Eq. 28, in a form that leaves the value exact in every dtype: the noised input and the target see z0, and
            # only the gradient that reaches the latent encoder is multiplied by gamma.
            target = z0.detach() + gamma * (z0 - z0.detach())
            losses = denoising_loss(model, target, u, source)
            rows, terms["diffusion"] = losses.detach(), losses.mean()
            total = total + self.diffusion_weight * terms["diffusion"]

        if self.reconstruction_weight > 0 or self.token_weight > 0:
            hidden_hat = model.latent_decoder(z0 + model.sigma_dec * normal_like(z0, source))
            if self.reconstruction_weight > 0:
                terms["reconstruction"] = F.mse_loss(hidden_hat.float(), hidden.detach())  # Eq. 26
                total = total + self.reconstruction_weight * terms["reconstruction"]
            if self.token_weight > 0:
                seen = hidden_hat if self.token_gradient else hidden_hat.detach()
                positions = draw_positions(tokens, self.token_fraction, source)
                terms["token"] = model.token_decoder.loss(seen, tokens, positions)  # Eq. 27
                total = total + self.token_weight * terms["token"]

        return Losses(total, terms, rows, z0)

    def _masked(self, hidden: Tensor, source: Source, training: bool) -> Tensor:
        """What the latent encoder sees: in training, a share of the positions is zero, which is their mean."""
        if self.hidden_masking == 0 or not training:
            return hidden
        kept = uniform((hidden.shape[0], hidden.shape[1]), source) >= self.hidden_masking
        return hidden * kept.to(hidden)[..., None]


class TokenObjective(Objective):
    """The cross-entropy alone, on noised latents that stay as they are (sections 4.1 and 8, App. B.2).

    For a token decoder trained after everything else, see `replace_token_decoder`.

    Args:
        token_fraction: Share of each row's positions on which the cross-entropy is taken, as in `JointObjective`.

    Raises:
        ValueError: If it is out of range.
    """

    def __init__(self, token_fraction: float = 1.0) -> None:
        check_fraction(token_fraction)
        self.token_fraction = token_fraction

    def prepare(self, model: LDLM) -> None:
        """Freeze latents and denoiser. The latent decoder learns with the token decoder unless it is frozen already."""
        for part in (model.token_encoder, model.latent_encoder, model.denoiser):
            part.requires_grad_(False)

    def __call__(self, model: LDLM, tokens: Tensor, u: Tensor, gamma: Tensor | float, source: Source) -> Losses:
        """The cross-entropy in nats per token, Eq. 27; neither u nor gamma matters. See `Objective.__call__`."""
        z0 = model.encode(tokens)
        hidden_hat = model.latent_decoder(z0 + model.sigma_dec * normal_like(z0, source))
        token = model.token_decoder.loss(hidden_hat, tokens, draw_positions(tokens, self.token_fraction, source))
        return Losses(token, {"token": token}, None, z0)


def denoising_loss(model: LDLM, z0: Tensor, u: Tensor, source: Source) -> Tensor:
    """The diffusion loss of each row [b], Eq. 1 and 25, with self-conditioning as in training.

    Args:
        model: Its schedule, denoiser and self_conditioning are used.
        z0: Latents [b m d].
        u: Schedule times [b].
        source: Draws the noise.
    """
    alpha, sigma = model.schedule.alpha(u)[:, None, None], model.schedule.sigma(u)[:, None, None]
    z_t = alpha * z0 + sigma * normal_like(z0, source)
    z0_hat = model.denoiser(z_t, u, _self_condition(model, z_t, u, source))
    rows: Tensor = (z0 - z0_hat).square().mean(dim=(1, 2))
    return rows


@torch.no_grad()
def _self_condition(model: LDLM, z_t: Tensor, u: Tensor, source: Source) -> Tensor:
    """A first estimate for a share of the rows, zeros for the others: [b m d].

    With a probability of 0.5 and a global batch of even size these are its rows of even index: exactly half, the
    same for any number of ranks and accumulated batches, with nothing drawn. Else each row throws a coin.
    """
    condition = torch.zeros_like(z_t)
    start, total = (source.rows.start, source.total) if isinstance(source, RowNoise) else (0, len(z_t))
    if model.self_conditioning == 0.5 and (total is None or total % 2 == 0):
        even = slice(start % 2, None, 2)
        if len(z_t[even]):  # one row alone may be of odd index
            condition[even] = model.denoiser(z_t[even], u[even], condition[even]).to(condition)
    elif model.self_conditioning > 0:
        coin = uniform((len(z_t),), source) < model.self_conditioning
        estimate = model.denoiser(z_t, u, condition).to(condition)
        condition = torch.where(coin.to(z_t.device)[:, None, None], estimate, condition)
    return condition


def draw_positions(tokens: Tensor, fraction: float, source: Source) -> Tensor | None:
    """Indices into the b·n positions on which the cross-entropy is taken, as many in each row; None for all."""
    if fraction == 1:
        return None
    b, n = tokens.shape
    chosen = uniform((b, n), source).argsort(dim=1)[:, : max(1, round(fraction * n))]
    return (chosen + n * torch.arange(b, device=chosen.device)[:, None]).flatten().to(tokens.device)


def normal_like(z: Tensor, source: Source) -> Tensor:
    """Standard normal noise of the shape, dtype and device of z [b ...]."""
    return normal(tuple(z.shape), source, z.dtype).to(z.device)


def check_fraction(token_fraction: float) -> None:
    """Raise ValueError unless a share of positions is one."""
    if not 0 < token_fraction <= 1:
        raise ValueError(f"token_fraction={token_fraction} must be above 0 and at most 1")
