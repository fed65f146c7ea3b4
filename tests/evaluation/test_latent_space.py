"""Measurements of latent spaces against closed forms, numpy and the same thing done by hand."""

import numpy as np
import pytest
import torch
from helpers.tiny import (
    HIDDEN,
    LATENT,
    LENGTH,
    WORDS,
    TimeOnlyDenoiser,
    generator,
    make_model,
    make_tokenizer,
    rows,
)

from ldlm.data.datamodule import PackedTextDataModule
from ldlm.evaluation.latent_space import interpolation, loss_over_time, measure_latents, pack, reconstruction, spectrum
from ldlm.rng import generator as keyed


def latents(model, tokens):
    with torch.no_grad():
        return model.encode(tokens)


def decoded(model, z):
    with torch.no_grad():
        return model.decode(z)


def test_paths_begin_and_end_in_reconstructions_of_all_texts():
    model = make_model()
    z = 3 * torch.randn(7, LENGTH, LATENT, generator=generator(1))
    with torch.no_grad():
        found = interpolation(model, z, lambda ids: float(ids.double().mean()), seed=3, batch_size=2)
    assert found["a"] == pytest.approx([i / 10 for i in range(11)])
    plain = float(decoded(model, z).double().mean())
    assert found["perplexity"][0] == found["perplexity"][-1] == plain
    assert any(value != plain for value in found["perplexity"])


def test_paths_are_straight_and_join_each_text_with_another(monkeypatch):
    model, seen = make_model(), []
    monkeypatch.setattr(model, "decode", lambda z: (1000 * z[..., 0]).round().long())  # tells latents apart
    z = torch.randn(7, LENGTH, LATENT, generator=generator(1))
    interpolation(model, z, lambda ids: float(bool(seen.append(ids))), seed=3, batch_size=2)
    starts, stops = ([model.decode(z).tolist().index(row) for row in seen[end].tolist()] for end in (0, 10))
    assert sorted(starts) == sorted(stops) == list(range(7))
    assert all(i != j for i, j in zip(starts, stops, strict=True))
    assert torch.equal(seen[5], model.decode((z[starts] + z[stops]) / 2))
    assert torch.equal(seen[2], model.decode(0.8 * z[starts] + 0.2 * z[stops]))


def test_the_loss_over_time_is_that_of_a_denoiser_whose_loss_is_known():
    model = make_model(denoiser=TimeOnlyDenoiser(), self_conditioning=0.0)
    model.timesteps.density.copy_(torch.linspace(1, 3, 100, dtype=torch.float64) / 200)
    z, slope = latents(model, rows(5)), model.denoiser.slope.detach()
    with torch.no_grad():
        found = loss_over_time(model, z, seed=0, batch_size=2)
    u = torch.tensor(found["u"])
    want = (z.double() - u[:, None, None, None].double() * slope.double()).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(found["loss"], want, rtol=1e-5)
    # F is piecewise linear; numpy integrates the density.
    knots, cumulative = np.arange(101) / 100, np.concatenate([[0], np.cumsum(model.timesteps.density.numpy())])
    np.testing.assert_allclose(found["adapted"], np.interp(found["u"], knots, cumulative / cumulative[-1]), atol=1e-12)
    assert found["u"] == sorted(found["u"])
    even = (np.arange(24) + 0.5) / 24
    for axis in ("u", "adapted"):  # half of the times are evenly spread on each axis
        assert all(np.abs(np.array(found[axis]) - value).min() < 1e-9 for value in even)


def test_reconstruction_counts_the_tokens_that_come_back_under_the_same_noise_at_each_level(monkeypatch):
    model = make_model(sigma_dec=0.5)
    monkeypatch.setattr(model, "decode", lambda z: z[..., 0].round().long())  # noise of 0.5 changes many of its tokens
    z = 3 * torch.randn(6, LENGTH, LATENT, generator=generator(1))
    tokens = model.decode(z)
    found = reconstruction(model, z, tokens, seed=4, batch_size=4)
    parts = [torch.randn(rows, LENGTH, LATENT, generator=keyed(4, "reconstruction", n)) for n, rows in ((0, 4), (1, 2))]
    want = [(model.decode(z + s * torch.cat(parts)) == tokens).double().mean().item() for s in found["noise"]]
    assert found["accuracy"] == pytest.approx(want, abs=1e-12)
    assert want[0] == 1 > want[4] > want[-1] > 0
    assert (found["noise"][0], found["noise"][4], found["noise"][-1]) == (0, 0.5, 1.5)


def test_the_spectrum_is_numpys_and_that_of_the_gaussian_it_came_from():
    variances = torch.tensor([9.0, 4.0, 1.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator(1)))[0]
    z = (torch.randn(4000, 5, 3, generator=generator(2)) * variances.sqrt()) @ turn.T + 7
    found = spectrum(z)
    np.testing.assert_allclose(found["eigenvalues"], variances / 14, rtol=0.03)
    assert found["dimensions"] == pytest.approx(14**2 / (81 + 16 + 1), rel=0.03)
    flat = z.double().flatten(0, 1).numpy()
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(found["eigenvalues"], singular / singular.sum(), rtol=1e-9)
    np.testing.assert_allclose(found["std"], sorted(flat.std(0, ddof=1), reverse=True), rtol=1e-12)
    assert found["vectors"] == 20000


def test_equal_eigenvalues_make_as_many_dimensions():
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[None]
    assert spectrum(corners)["dimensions"] == pytest.approx(2)
    assert spectrum(corners)["eigenvalues"] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("framed", [True, False])
def test_texts_are_packed_as_the_data_module_packs_them(tmp_path, framed):
    texts = [" ".join(WORDS[i] for i in row) for row in torch.randint(0, 30, (9, 5), generator=generator(8)).tolist()]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    tokenizer = make_tokenizer()
    data = PackedTextDataModule(
        str(tmp_path / "texts.txt"),
        tokenizer,
        LENGTH,
        batch_size=1,
        validation=None,
        cache_dir=str(tmp_path),
        special_tokens=framed,
    )
    want = data.train_dataset[list(range(len(data.train_dataset)))]
    got = pack(make_model(tokenizer=tokenizer), texts, 100, framed)
    assert torch.equal(got, want)
    assert torch.equal(pack(make_model(tokenizer=tokenizer), texts, 3, framed), want[:3])


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="makes 1 rows of 8 tokens, and two are needed"):
        pack(make_model(tokenizer=make_tokenizer()), ["word1 word2 word3 word4 word5 word6 word7"], 9, framed=False)


def test_all_measurements_are_functions_of_the_seed():
    model, tokens = make_model(), rows(4)
    first, second = (
        measure_latents(model, tokens, lambda ids: float(ids.sum()), seed=1, batch_size=3) for _ in range(2)
    )
    assert first == second
    other = measure_latents(model, tokens, lambda ids: float(ids.sum()), seed=2, batch_size=3)
    assert other["loss_over_time"]["loss"] != first["loss_over_time"]["loss"]
    assert other["spectrum"] == first["spectrum"]
    assert (len(first["spectrum"]["std"]), first["rows"]) == (LATENT, 4)
    assert HIDDEN != LATENT


def test_a_denoiser_that_answers_0_loses_the_latents_mean_square_at_every_time():
    untrained = make_model(shake=0.0)  # a DiT at its start; of an autoencoder it stays there
    measured = measure_latents(untrained, rows(4), lambda ids: 1.0, seed=1, batch_size=3)["loss_over_time"]
    wanted = untrained.encode(rows(4)).square().mean().item()
    assert measured["loss"] == pytest.approx([wanted] * len(measured["u"]), rel=1e-5)
