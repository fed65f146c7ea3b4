"""Scores of generated texts while a model trains.

In: a Trainer and its task, the name of a scorer. Out: numbers to log, and to choose checkpoints by.
Paper: section 6 (the metrics), with a small budget of samples.
"""

from typing import Any

import lightning as L

from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.protocols import find_protocol
from ldlm.metrics.scorer import Scorer, load_scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy
from ldlm.model import LDLM
from ldlm.training.outputs import model_of


class ScoreSamples(L.Callback):
    """Generates texts after validations and logs what they score, by the metrics of ``ldlm evaluate``.

    ``validation/generative_perplexity``, ``validation/entropy`` (nats, over all of the model's ids) and
    ``validation/diversity``. They are the same on all ranks, so that a checkpoint may be chosen by one.

    Args:
        scorer: Hub id, folder or ``.gguf`` file. Rank 0 loads it once, at the first validation, the sanity check's too.
        num_samples: Texts each time.
        nfe: Calls of the denoiser per text.
        every_n_validations: Score after every so many validations.
        protocol: Of perplexity, see `ldlm.metrics.protocols.PROTOCOLS`.
        seed: The same noise each time.

    Raises:
        ValueError: If there is no such protocol or a number is below 1; later, if the scorer is not to be had.
    """

    def __init__(
        self,
        scorer: str = "gpt2-large",
        num_samples: int = 64,
        nfe: int = 32,
        every_n_validations: int = 1,
        protocol: str = "mdlm",
        seed: int = 0,
    ) -> None:
        for name, count in (("num_samples", num_samples), ("nfe", nfe), ("every_n_validations", every_n_validations)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        self.scorer, self.num_samples, self.nfe = scorer, num_samples, nfe
        self.every_n_validations, self.protocol, self.seed = every_n_validations, protocol, seed
        self._definition = find_protocol(protocol)
        self._loaded: Scorer | None = None
        self._validations = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank 0 generates and scores, while `EMA` has the averaged parameters in place; the others wait."""
        if trainer.global_rank == 0 and self._loaded is None:
            self._loaded = load_scorer(self.scorer, device=pl_module.device)
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        values = self._scores(trainer, model_of(pl_module), self._loaded) if self._loaded is not None else {}
        values = trainer.strategy.broadcast(values)
        # All ranks have the same by now, but without sync_dist Lightning would warn.
        pl_module.log_dict({f"validation/{name}": value for name, value in values.items()}, sync_dist=True)

    def _scores(self, trainer: L.Trainer, model: LDLM, scorer: Scorer) -> dict[str, float]:
        with trainer.precision_plugin.forward_context():
            tokens = model.sample_tokens(self.num_samples, self.nfe, seed=self.seed, batch_size=self.num_samples)
        length = self._definition.limit(model.sequence_length, scorer)
        perplexity, diversity = GenerativePerplexity(scorer, self.protocol, max_length=length), NGramDiversity()
        entropy = UnigramEntropy()
        metrics = {"generative_perplexity": perplexity, "entropy": entropy, "diversity": diversity}
        for metric in metrics.values():
            metric.distributed_available_fn = None  # the other ranks have no texts to add, and would be waited for
        perplexity.update(model.to_text(tokens, self._definition.boundary(scorer)))
        entropy.update(tokens)
        diversity.update(model.to_text(tokens))
        return {name: metric.compute().item() for name, metric in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """How many validations there have been."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]
