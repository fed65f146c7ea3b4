"""Likelihood bounds while a model trains.

In: a Trainer and its task. Out: numbers to log. Paper: App. A.1.
"""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldlm.likelihood import AUGMENTED, Terms, likelihood_terms
from ldlm.rng import generator
from ldlm.training.outputs import model_of, task_of


class LikelihoodBound(L.Callback):
    """Logs the bounds over the rows of fit's validation, ``validate`` and ``test``, in nats per token, specials too.

    * ``validation/token_bound``: on −log p(w), comparable with other models over the same tokens; the sum of
      ``validation/token_cross_entropy`` and ``validation/kl``.
    * ``validation/token_bound_error``: its Monte-Carlo standard error √(Σ over batches of variance/samples), from the
      spread over repetitions on the same rows. How much rows differ is not in it.
    * ``validation/augmented_nelbo_not_comparable_with_other_models_sigma_rec_1`` (ends in ``sigma_rec``): the paper's
      NELBO, Eq. 23 with its constants; token bound plus ``validation/hidden_density``, a −log density.

    Args:
        tau: Deviation of the posterior, in units of the latents. No default: any is valid, the best is the model's own.
        sigma_rec: Deviation of the hidden states in the augmented NELBO; the token bound does not know it.
        samples: Repetitions, each with its own times and noise.

    Raises:
        ValueError: If a deviation is not above 0, ``samples`` is below 2, or (in ``setup``) a trainer has two of these.
    """

    def __init__(self, tau: float, sigma_rec: float = 1.0, samples: int = 4) -> None:
        for name, value in (("tau", tau), ("sigma_rec", sigma_rec)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is a standard deviation: it must be above 0 and finite")
        if samples < 2:
            raise ValueError(f"samples={samples} must be at least 2: the error is measured between repetitions")
        self.tau, self.sigma_rec, self.samples = tau, sigma_rec, samples
        self._sums = torch.zeros(5, dtype=torch.float64)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second one."""
        if sum(isinstance(c, LikelihoodBound) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("give the trainer one LikelihoodBound: two would log under the same names")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation."""
        self._sums = torch.zeros(5, dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch's nats. The noise is a function of (seed, batch, rank), the same after each epoch."""
        if len(batch) == 0:  # this rank's share of the last batch
            return
        model, seed = model_of(pl_module), task_of(pl_module).seed
        noise = generator(seed, "likelihood", batch_idx, trainer.global_rank, device=model.device)
        with trainer.precision_plugin.forward_context():
            terms = likelihood_terms(model, batch, noise, self.tau, self.sigma_rec, self.samples)
        nats = torch.stack(terms).sum(dim=2).mean(dim=1)  # of the batch, for each term: [3]
        variance = terms.token_bound.sum(dim=1).var() / self.samples
        self._sums = self._sums + torch.stack([*nats, variance, nats.new_tensor(batch.numel())])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum over ranks and log, while `EMA` has the averaged parameters in place."""
        model = model_of(pl_module)
        *nats, variance, tokens = trainer.strategy.reduce(self._sums, reduce_op="sum")
        terms = Terms(*(term / tokens for term in nats))
        values = terms._asdict() | {"token_bound": terms.token_bound, "token_bound_error": variance.sqrt() / tokens}
        values[f"{AUGMENTED}_{self.sigma_rec:g}"] = terms.augmented_nelbo
        if model.latent_decoder.hidden_size != model.token_encoder.hidden_size:
            values = {name: value for name, value in values.items() if name.startswith(("token", "kl"))}
        # All ranks hold the same sums by now, but without sync_dist Lightning would warn.
        pl_module.log_dict({f"validation/{name}": value for name, value in values.items()}, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
