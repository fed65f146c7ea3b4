"""Other people's samplers held to their published rules: known distributions have exact transitions and paths."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import generator
from helpers.waits import Waits
from scipy import stats
from scipy.integrate import solve_ivp
from torch import Tensor

from ldlm.baselines import sampling as baselines
from ldlm.baselines.sampling import TokenBackbone, draw, lazy_masked_diffusion, masked_diffusion, one_hot_flow
from ldlm.nn.denoiser import DiT

V, N, WIDTH = 4, 8, 12
P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
FLOATS = [torch.float32, torch.float64]
MASKED = {
    "float32": masked_diffusion,
    "float64": functools.partial(masked_diffusion, sampling_dtype=torch.float64),
    "cached": functools.partial(masked_diffusion, cache=True),
    "lazy": lazy_masked_diffusion,
}
every_masked_loop = pytest.mark.parametrize("sample", MASKED.values(), ids=MASKED)


class Watched(TokenBackbone):
    """Keeps the tokens and the points that it is shown, call by call."""

    def __init__(self, dit: DiT, vocab_size: int) -> None:
        super().__init__(dit, vocab_size)
        self.tokens: list[Tensor] = []
        self.points: list[Tensor] = []

    def embed(self, tokens: Tensor) -> Tensor:
        self.tokens.append(tokens.clone())
        return super().embed(tokens)

    def features(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        self.points.append(x.clone())
        return super().features(x, modulations)


def make(blind: bool = False) -> Watched:
    """A network of random weights; a blind one takes no notice of the time."""
    torch.manual_seed(0)
    backbone = Watched(DiT(WIDTH, N, WIDTH, layers=2, heads=3), V)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if blind:
            for modulator in [*backbone.dit.modulators, backbone.dit.final_modulator]:
                modulator.weight.zero_()
    return backbone


def make_known() -> Watched:
    """Its distribution is P, whatever it is shown."""
    backbone = make()
    with torch.no_grad():
        backbone.head.weight.zero_()
        backbone.head.bias.copy_(P.log())
    return backbone


def likely(counts: np.ndarray, expected: np.ndarray) -> bool:
    return stats.chisquare(counts, expected).pvalue > 1e-3


# --- the network


def test_the_blocks_are_driven_as_the_denoiser_drives_them():
    backbone, t = make().double(), torch.tensor([0.3], dtype=torch.float64)
    dit, eye = backbone.dit, torch.eye(WIDTH)
    x = torch.randn(2, N, WIDTH, generator=generator(), dtype=torch.float64)
    with torch.no_grad():  # its first layer passes z_t on, its last everything
        dit.input.weight.copy_(torch.cat([eye, 0 * eye], dim=1))
        dit.output.weight.copy_(eye)
        dit.input.bias.zero_()
        dit.output.bias.zero_()
        want = dit(x, t.expand(2), torch.zeros_like(x))
        torch.testing.assert_close(backbone.features(x, dit.modulations(t)), want)
        torch.testing.assert_close(backbone(x, dit.modulations(t)), want @ backbone.head.weight.T + backbone.head.bias)


def test_modulations_made_in_chunks_are_those_of_each_time(monkeypatch):
    monkeypatch.setattr(baselines, "TIMES", 3)
    backbone, times = make().double(), torch.linspace(0, 1, 7, dtype=torch.float64)
    along = list(backbone.at_times(times))
    assert len(along) == 7
    for t, modulations in zip(times, along, strict=True):
        torch.testing.assert_close(list(modulations), backbone.dit.modulations(t[None]))


def test_a_one_hot_point_is_embedded_as_its_token():
    backbone, tokens = make().double(), torch.randint(V, (3, N), generator=generator())
    torch.testing.assert_close(backbone.embed_points(F.one_hot(tokens, V)), backbone.embed(tokens))


# --- masked diffusion


@every_masked_loop
def test_each_step_is_the_published_transition(sample):
    rows, nfe = 3000, 5
    backbone = make_known()
    tokens, calls = sample(backbone, rows, N, nfe, generator(1))
    assert calls == len(backbone.tokens) == nfe
    assert (backbone.tokens[0] == V).all()
    alpha = [k / nfe for k in range(nfe + 1)]  # log-linear: 1 − t
    for k, (before, after) in enumerate(itertools.pairwise([*backbone.tokens, tokens])):
        masked = before == V
        count = masked.sum().item()
        assert stats.binomtest(count, rows * N, 1 - alpha[k]).pvalue > 1e-3
        assert torch.equal(before[~masked], after[~masked])
        # q(z_s | z_t = m) = Cat(((1 − alpha_s) m + (alpha_s − alpha_t) x)/(1 − alpha_t))
        posterior = [*((alpha[k + 1] - alpha[k]) * P), 1 - alpha[k + 1]]
        expected = count * np.array(posterior) / (1 - alpha[k])
        counts = np.bincount(after[masked], minlength=V + 1)
        if k + 1 == nfe:
            assert counts[V] == 0
            counts, expected = counts[:V], expected[:V]
        assert likely(counts, expected)
    assert likely(np.bincount(tokens.flatten()), rows * N * P.numpy())


class Twins(TokenBackbone):
    """Knows the posterior of texts of two equal tokens, 0 with probability 0.7 or 1."""

    def __init__(self) -> None:
        super().__init__(DiT(WIDTH, 2, WIDTH, layers=1, heads=3), 2)
        self.head = torch.nn.Identity()

    def embed(self, tokens: Tensor) -> Tensor:
        return F.one_hot(tokens, 3).float()

    def features(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        other = x.flip(1)
        return (other[..., :2] + other[..., 2:] * torch.tensor([0.7, 0.3])).log()


@every_masked_loop
@pytest.mark.parametrize("nfe", [1, 4])
def test_two_equal_tokens_differ_only_if_both_were_unmasked_in_one_step(sample, nfe):
    rows, p = 20_000, np.array([0.7, 0.3])
    tokens, _ = sample(Twins(), rows, 2, nfe, generator(2))
    expected = rows * ((1 - 1 / nfe) * np.diag(p) + np.outer(p, p) / nfe)
    counts = np.bincount(2 * tokens[:, 0] + tokens[:, 1], minlength=4)
    assert likely(counts, expected.flatten())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gumbel_max_is_a_draw_from_the_softmax(dtype):
    logits = P.log().float() + 3  # not normalised
    noise = torch.empty(60_000, V, dtype=dtype)
    drawn = draw(logits.expand(60_000, V), noise, generator(3))
    assert likely(np.bincount(drawn), 60_000 * P.numpy())
    # The same uniforms in the form of a race: the first of exponentials with rates p.
    uniforms = torch.rand(60_000, V, generator=generator(3), dtype=dtype).double().numpy()
    assert (drawn.numpy() == (-np.log(uniforms) / P.numpy()).argmin(1)).mean() > 0.9999


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sample", [masked_diffusion, lazy_masked_diffusion])
def test_noise_is_drawn_in_the_dtype_that_was_asked_for(monkeypatch, sample, dtype):
    dtypes = set()
    monkeypatch.setattr(baselines, "draw", lambda *given: dtypes.add(given[1].dtype) or draw(*given))
    sample(make(), 2, N, 3, generator(), dtype)
    assert dtypes == {dtype}


def test_caching_saves_calls_and_changes_no_token():
    plain, cached = make(blind=True), make(blind=True)
    tokens, calls = masked_diffusion(plain, 2, N, 200, generator(4))
    assert calls == len(plain.tokens) == 200
    assert tokens.unique().numel() > 1
    saved = masked_diffusion(cached, 2, N, 200, generator(4), cache=True)
    assert torch.equal(saved.tokens, tokens)
    assert saved.calls == len(cached.tokens) <= 1 + 2 * N
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(cached.tokens))


@pytest.mark.parametrize("name", ["cached", "lazy"])
def test_as_many_calls_are_made_as_steps_are_hit_by_tokens_thrown_at_them(name):
    nfe, runs, backbone = 64, 60, make()
    calls = [MASKED[name](backbone, 1, N, nfe, generator(seed)).calls for seed in range(runs)]
    # Occupancy: N balls in nfe boxes. The cached loop begins with a call, and a change in the last step asks for none.
    boxes = nfe - (name == "cached")
    empty, both_empty = (1 - 1 / nfe) ** N, (1 - 2 / nfe) ** N
    variance = boxes * empty * (1 - empty) + boxes * (boxes - 1) * (both_empty - empty**2)
    expected = boxes * (1 - empty) + (name == "cached")
    assert np.mean(calls) == pytest.approx(expected, abs=4 * math.sqrt(variance / runs))


def test_the_network_is_told_the_time_of_the_step_unless_calls_are_cached(monkeypatch):
    told: list[float] = []
    modulations = DiT.modulations
    monkeypatch.setattr(DiT, "modulations", lambda dit, t: told.extend(t.tolist()) or modulations(dit, t))
    times = {}
    for name, sample in {**MASKED, "flow": one_hot_flow}.items():
        told.clear()
        sample(make(), 50, N, 4, generator())
        times[name] = list(told)
    assert times["float32"] == times["float64"] == times["lazy"] == [1, 0.75, 0.5, 0.25]
    assert times["cached"] == [0]
    assert times["flow"] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("name", "count"), [("float32", 0), ("lazy", 0), ("flow", 0), ("cached", 9)])
def test_the_loops_wait_for_no_device_but_for_the_cached_ones_check(name, count):
    backbone = make()
    with Waits() as waits:
        {**MASKED, "flow": one_hot_flow}[name](backbone, 2, N, 9, generator())
    assert len(waits.found) == count


# --- flow matching


class Posterior(TokenBackbone):
    """Knows E[x_1 | x_t] of one-hot vectors drawn from P: a softmax of log P + t x/(1 − t)²."""

    def __init__(self) -> None:
        super().__init__(DiT(WIDTH, 1, WIDTH, layers=1, heads=3), V)
        self.head = torch.nn.Identity()
        self.points: list[Tensor] = []

    def embed_points(self, points: Tensor) -> Tensor:
        return points

    def at_times(self, times: Tensor) -> Tensor:
        return times.double()

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        self.points.append(x.clone())
        return P.log() + t * x / (1 - t) ** 2


def noise_of(rows: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    source = generator(seed)
    return torch.stack([torch.randn(n, V, generator=source, dtype=dtype) for _ in range(rows)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_towards_an_estimate_that_never_changes_the_path_is_the_straight_line(dtype):
    backbone = make_known()
    tokens, calls = one_hot_flow(backbone, 3, N, 5, generator(5), dtype)
    assert calls == len(backbone.points) == 5
    assert (tokens == P.argmax()).all()
    noise = noise_of(3, N, 5, dtype)
    for k, x in enumerate(backbone.points):
        assert x.dtype == dtype
        line = (1 - k / 5) * noise + k / 5 * P.to(dtype)
        torch.testing.assert_close(x.float(), backbone.embed_points(line), rtol=1e-5, atol=1e-5)


def test_what_is_carried_embedded_is_the_published_loop_over_the_vocabulary():
    backbone, nfe = make(), 6
    tokens, _ = one_hot_flow(backbone, 4, N, nfe, generator(6))
    x = noise_of(4, N, 6, torch.float32)
    with torch.no_grad():
        for k in range(nfe):
            t, s = k / nfe, (k + 1) / nfe
            mean = backbone(backbone.embed_points(x), backbone.dit.modulations(torch.tensor([t]))).softmax(-1)
            x = x + (s - t) * (mean - x) / (1 - t)
    torch.testing.assert_close(x, mean, rtol=0, atol=1e-6)
    assert torch.equal(tokens, x.argmax(-1))
    assert tokens.unique().numel() > 1


def velocity(t: float, x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, V)
    logits = P.log().numpy() + t * x / (1 - t) ** 2
    mean = np.exp(logits - logits.max(1, keepdims=True))
    return ((mean / mean.sum(1, keepdims=True) - x) / (1 - t)).ravel()


def test_the_path_converges_with_order_1_to_the_exact_flow():
    noise = noise_of(20, 1, 7, torch.float64)
    exact = solve_ivp(velocity, (0, 0.5), noise.numpy().ravel(), rtol=1e-9, atol=1e-9).y[:, -1]
    errors = []
    for nfe in (16, 32, 64, 128):
        backbone = Posterior()
        one_hot_flow(backbone, 20, 1, nfe, generator(7), torch.float64)
        errors.append(np.abs(backbone.points[nfe // 2].numpy().ravel() - exact).max())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02


def test_with_the_exact_posterior_tokens_come_as_often_as_in_the_data():
    rows = 4000
    tokens, _ = one_hot_flow(Posterior(), rows, 1, 200, generator(8), torch.float64)
    assert likely(np.bincount(tokens.flatten()), rows * P.numpy())


# --- bad input


@pytest.mark.parametrize("sample", [masked_diffusion, lazy_masked_diffusion, one_hot_flow])
def test_impossible_sizes_and_coarse_noise_are_refused(sample):
    backbone = make()
    with pytest.raises(ValueError, match="0 rows of 8 tokens"):
        sample(backbone, 0, N, 4, generator())
    with pytest.raises(ValueError, match=r"1 rows of 9 tokens.*1 to 8 tokens"):
        sample(backbone, 1, N + 1, 4, generator())
    with pytest.raises(ValueError, match="nfe is 0"):
        sample(backbone, 1, N, 0, generator())
    with pytest.raises(ValueError, match=r"sampling_dtype is torch\.bfloat16"):
        sample(backbone, 1, N, 4, generator(), torch.bfloat16)
    assert sample(backbone, 2, N - 3, 4, generator()).tokens.shape == (2, N - 3)


def test_a_vocabulary_without_tokens_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 0"):
        TokenBackbone(DiT(WIDTH, N, WIDTH, layers=1, heads=3), 0)
