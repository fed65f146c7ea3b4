"""The task: how a model is trained with a Trainer.

In: a model, an objective, batches of token ids [b n]. Out: a loss a step; numbers to log; checkpoints.
Paper: section 5 (the recipe), App. C (optimisation).

A batch passes `training_step` to the objective; its gradient passes `configure_gradient_clipping` to the optimizer;
what happened is handed to the callbacks as a `StepOutput`. The paper's two callbacks and three monitors come along.
"""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldlm._files import brief
from ldlm.checkpoints.description import make
from ldlm.checkpoints.pretrained import check_weights, read_checkpoint, restored
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.samplers import Sampler
from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.model import LDLM
from ldlm.objective import JointObjective, Objective, normal_like
from ldlm.rng import RowNoise, generator
from ldlm.tokenizer import check_tokenizer, pack_tokenizer, unknown_id
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.timesteps import AdaptiveTimestepUpdate
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.checks import (
    check_callbacks,
    check_data,
    check_encoder,
    check_precision,
    check_strategy,
    check_uncompiled,
    tokens_of,
)
from ldlm.training.files import check_finite, check_saved, end_of_fit, take_over
from ldlm.training.optim import LearningRate, adamw, clip_or_skip, guarded
from ldlm.training.outputs import StepOutput, Task, ValidationOutput
from ldlm.training.preemption import StopOnSignal
from ldlm.training.records import describe_run, name_weights
from ldlm.training.resuming import align_progress, check_continues, read_training
from ldlm.training.stability import LatentMonitor, SkippedSteps, spread_over_rows
from ldlm.training.statistics import measure_statistics

# What a file may ask to be made for a task: nothing with weights, which no memory is compared with.
KINDS = (Objective, NoiseSchedule, Sampler, TimeGrid)
GOLDEN = (math.sqrt(5) - 1) / 2


class LDLMTask(Task):
    """Trains an `LDLM`: the recipe of the paper around any objective.

    ``state_dict`` is the model's, under the model's own names.

    Args:
        model: What is trained, in place.
        objective: What is minimised; None for the paper's `JointObjective`.
        warmup_steps: Length S of the diffusion-to-encoder warm-up in optimizer steps; 0 for none, the paper's worst
            row. A `DiffusionToEncoderWarmup` among the trainer's callbacks takes its place.
        timestep_refresh: Optimizer steps between refreshes of the timestep density. An `AdaptiveTimestepUpdate` among
            the trainer's callbacks takes its place.
        statistics_rows: Rows over which the hidden states' mean and standard deviation are measured, at least: complete
            optimizer steps are read.
        learning_rate: AdamW's, after its warm-up.
        betas: AdamW's decays of the first and the second moment.
        eps: AdamW's, added to the root of the second moment.
        weight_decay: AdamW's, on all that is trained.
        lr_warmup_steps: Steps of linear warm-up from 1e-8.
        lr_decay: Last share of the run over which the learning rate falls linearly to 0; 0 keeps it constant.
        seed: Of the noise in training and validation.
        allow_changes: What a resumed run may change of its checkpoint's run that is refused otherwise, by name:
            ``sigma_dec``, ``schedule.d``, ``schedule`` with all its arguments, ``objective.token_weight``,
            ``batch_size`` and ``data`` of the data, ``EMA.decay`` of a callback; ``DiffusionToEncoderWarmup.steps`` for
            ``warmup_steps``, ``AdaptiveTimestepUpdate.every_n_steps`` for ``timestep_refresh``.

    Raises:
        ValueError: If an argument is out of range, or the objective does not suit the model.
    """

    skipped: Tensor

    def __init__(
        self,
        model: LDLM,
        objective: Objective | None = None,
        *,
        warmup_steps: int,
        timestep_refresh: int = 5000,
        statistics_rows: int = 4096,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_warmup_steps: int = 5000,
        lr_decay: float = 0.0,
        seed: int = 0,
        allow_changes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        objective = JointObjective() if objective is None else objective
        if not isinstance(model, LDLM):
            raise ValueError(
                f"model is of type {type(model).__name__}, and an LDLM is wanted: give one, and compile its "
                "layers, if any are to be, by ldlm.CompileBlocks() among the callbacks"
            )
        if not isinstance(objective, Objective):
            raise ValueError(f"objective is of type {type(objective).__name__}, and an Objective is wanted: give one")
        if isinstance(objective, nn.Module):
            raise ValueError(
                f"{type(objective).__name__} is an nn.Module, whose weights no checkpoint would hold: keep what learns "
                "in a part of the model"
            )
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be 0 (no warm-up) or more")
        if timestep_refresh < 1:
            raise ValueError(f"timestep_refresh={timestep_refresh} must be at least 1")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate} must be above 0")
        if not 0 <= lr_decay <= 1:
            raise ValueError(f"lr_decay={lr_decay} must be at least 0 and at most 1")
        self.model = model.train()  # a loaded one is in eval mode
        self.objective = objective
        self.warmup_steps = warmup_steps
        self.timestep_refresh = timestep_refresh
        self.statistics_rows = statistics_rows
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.seed = seed
        self.allow_changes = tuple(allow_changes)
        # A part that comes frozen is what an earlier run left: a resumed run is to have the same.
        self._given = [name for name, part in model.named_children() if _is_frozen(part)]
        self._digest: str | None = None  # of their weights
        self._thaw(self._prepare())  # a misfit is named now, and parts are frozen for the length of a fit
        self._frozen: list[nn.Parameter] = []
        self.register_buffer("gamma", torch.ones(()), persistent=False)  # written by the warm-up
        self.register_buffer("skipped", torch.zeros(()), persistent=False)  # see `StepOutput`
        self._packed: tuple[PreTrainedTokenizerBase, dict[str, Tensor]] | None = None
        self._counted: tuple[int, float] | None = None
        self._last_step, self._micro_step, self._rows_done, self._rows_validated = -1, 0, 0, 0

    def _prepare(self) -> list[nn.Parameter]:
        """The parameters that the objective freezes."""
        before = [p for p in self.model.parameters() if p.requires_grad]
        self.objective.prepare(self.model)
        return [p for p in before if not p.requires_grad]

    def _thaw(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)

    # ---- steps -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> StepOutput:
        """One micro-step. All randomness is a function of (seed, step, row of the global batch)."""
        step, ranks, parts = self.trainer.global_step, self.trainer.world_size, self.trainer.accumulate_grad_batches
        if step != self._last_step:
            self._last_step, self._micro_step, self._rows_done = step, -1, 0
        self._micro_step += 1
        total = self._rows_done + len(batch) * ranks * (parts - self._micro_step)
        first = self._rows_done + len(batch) * self.global_rank
        mine = range(first, first + len(batch))
        self._rows_done += len(batch) * ranks
        # Times are drawn for the global batch and sliced, so that the report of a skipped step has all of them.
        times = self.model.timesteps.sample(total, generator(self.seed, "times", step, device=self.device))
        u = times[mine.start : mine.stop]
        noise = RowNoise(self.seed, "noise", step, rows=mine, total=total, device=self.device)
        losses = self.objective(self.model, batch, u, self.gamma, noise)
        rows = None if losses.rows is None else losses.rows.detach()
        if rows is not None:
            self.model.timesteps.observe(u, rows)
        terms = {name: loss.detach() for name, loss in losses.terms.items()}
        std = spread_over_rows(losses.z0.detach())
        logged = {"train/loss": losses.total.detach()} | ({} if std is None else {"train/latent_std": std})
        self.log_dict(logged | {f"train/{name}": loss for name, loss in terms.items()})
        return {
            "loss": guarded(losses.total),
            "terms": terms,
            "rows": rows,
            "times": times,
            "latent_std": std,
            "gamma": self.gamma,
            "skipped": self.skipped,
        }

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> ValidationOutput | None:
        """Losses at evenly spread times, and the accuracy of clean and noised reconstruction, 0 on unknown tokens."""
        model = self.model
        # The last batch may leave a rank nothing; it still takes part in the sums over ranks, with no weight.
        rows, batch = len(batch), batch if len(batch) else batch.new_zeros(1, model.sequence_length)
        counts: list[int] = self.all_gather(torch.tensor([rows], device=self.device)).flatten().tolist()  # type: ignore[union-attr]
        first = (self._rows_validated if batch_idx else 0) + sum(counts[: self.global_rank])
        self._rows_validated = first + sum(counts[self.global_rank :])
        mine = range(first, first + len(batch))
        noise = RowNoise(self.seed, "validation", rows=mine, device=self.device)
        # Multiples of the golden ratio are evenly spread over any rows that follow each other.
        u = ((torch.arange(mine.start, mine.stop, dtype=torch.float64) + 0.5) * GOLDEN % 1).float().to(self.device)
        losses = self.objective(model, batch, u, self.gamma, noise)
        noised = losses.z0 + model.sigma_dec * normal_like(losses.z0, noise)
        values = dict(losses.terms)
        # A token for unknown text stands for many texts: it is never right.
        lost = None if model.tokenizer is None else unknown_id(model.tokenizer)
        wanted = batch if lost is None else batch.masked_fill(batch == lost, -1)
        values["accuracy"] = (model.decode(losses.z0) == wanted).float().mean()
        values["accuracy_noised"] = (model.decode(noised) == wanted).float().mean()
        logged = {f"validation/{name}": value for name, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=rows, sync_dist=True)
        return {"u": u, "loss": losses.rows} if rows and losses.rows is not None else None

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> ValidationOutput | None:
        """The same on the test rows."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Token ids [b n] -> their clean reconstruction [b n]."""
        return self.model.decode(self.model.encode(batch))

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Tensor:
        """A loader's batch -> its token ids, int64 [b n], which all steps and callbacks are given; see `tokens_of`.

        ``on_before_batch_transfer`` of a subclass or of a data module comes first, and gives a batch of a known kind.
        Lightning's own method (2.6.6) calls one of these two hooks. To override the public one here would be warned of
        in each run with a data module, and skipped where that has one.
        """
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        return tokens_of(batch, self.model.sequence_length, self.model.token_encoder.vocab_size)

    # ---- optimizer ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what is trained, and its `LearningRate`."""
        fused = self.trainer.precision != "16-mixed"  # a fused optimizer unscales by itself, after clipping
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = adamw(parameters, self.learning_rate, self.betas, self.eps, self.weight_decay, fused)
        end = self.trainer.estimated_stepping_batches if self.lr_decay else math.inf
        rate = LearningRate(optimizer, self.lr_warmup_steps, self.lr_decay, end)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, or skip the step. With 16-mixed, the loss scaler skips it by itself."""
        parameters: list[Tensor] = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.skipped.copy_(~norm.isfinite())
        self.log("train/grad_norm", norm)
        if self.trainer.precision != "16-mixed":
            clip_or_skip(
                optimizer, parameters, norm, self.skipped, gradient_clip_val, gradient_clip_algorithm == "value"
            )
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- the course of a run, hook by hook -----------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """The recipe's callbacks and the monitors of every run, but for those that the trainer's own stand for.

        The first hook of all: what cannot work is refused here, before texts are packed and callbacks touch the model.
        """
        recipe = (DiffusionToEncoderWarmup, AdaptiveTimestepUpdate)
        there: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        there[:] = [one for one in there if not (isinstance(one, recipe) and one.brought)]  # by an earlier fit
        check_precision(str(self.trainer.precision))
        if self.trainer.training:
            check_callbacks(there)
            check_uncompiled(self, self.model)
        ours: list[L.Callback] = [SkippedSteps(), LatentMonitor(), StopOnSignal()]
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._frozen += self._prepare()
            warmup, refresh = DiffusionToEncoderWarmup(self.warmup_steps), AdaptiveTimestepUpdate(self.timestep_refresh)
            warmup.brought = refresh.brought = True
            ours = [warmup, refresh, *ours]
        # Lightning would let ours win over an instance of the same class.
        return [callback for callback in ours if not any(isinstance(one, type(callback)) for one in there)]

    def setup(self, stage: str) -> None:
        """Refuse strategies that cannot work; forget what an earlier fit left."""
        check_strategy(self.trainer.strategy)
        encoder = self.model.token_encoder
        if stage == "fit":
            self._counted = self._digest = encoder.stored = None
        elif encoder.statistics_rows == 0:
            rank_zero_warn(
                "the hidden states' mean and deviation were never measured, as this model was never fitted: the "
                "numbers that follow say nothing of a trained one"
            )

    def teardown(self, stage: str) -> None:
        """Set free what the objective had frozen."""
        if stage == "fit":
            self._thaw(self._frozen)
            self._frozen = []

    def configure_model(self) -> None:
        """The first hook after callbacks know their folders, before a checkpoint is read: see to the files."""
        if self.trainer.training:
            self._packed = None
            self._pack_tokenizer()  # needs a temporary folder, which a save during the run must not
            check_finite(self.state_dict())
        take_over(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue another run. Training takes the live parameters, everything else the EMA weights."""
        if not self.trainer.training:
            check_weights(self.model, checkpoint["state_dict"], "the checkpoint")
            return
        self._counted = check_continues(checkpoint, self.about_run(), self, self.allow_changes)
        if (ema := self._ema()) is not None:
            ema.restore(checkpoint)
        elif "raw_parameters" in checkpoint:
            raise ValueError(
                "this checkpoint holds averaged weights, but nothing here goes on averaging: add EMA() to the "
                "trainer's callbacks"
            )

    def on_fit_start(self) -> None:
        """Refuse what would fail or mislead later; measure the hidden states' statistics, once."""
        model = self.model
        if others := [name for name in super().state_dict() if not name.startswith("model.")]:
            raise ValueError(
                f"{type(self).__name__} has weights of its own, {others[0]}, which no checkpoint would hold: keep what "
                "learns in a part of the model"
            )
        if self._given:
            rank_zero_info(f"not trained, as they came frozen: {', '.join(self._given)}")
        self.about_run()  # a part that no checkpoint could describe is found now, not at the first checkpoint
        if self.trainer.ckpt_path is not None:
            # Whoever asked for the loader until now (for the length of the run) got one that begins at step 0.
            self.trainer.fit_loop._combined_loader = None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PackedTextDataModule):
            check_data(data, model.sequence_length, model.tokenizer)
        check_encoder(model.token_encoder, model.tokenizer)
        if model.tokenizer is not None:
            check_tokenizer(model.tokenizer)
        self._last_step = -1  # a second fit may begin with the step at which the first one ended
        if model.token_encoder.statistics_rows == 0:
            measure_statistics(self, self.statistics_rows)
            model.token_decoder.start(model.token_encoder)
            check_finite(self.state_dict())  # the embeddings from which it starts are the encoder's too

    def on_train_start(self) -> None:
        """See that all can be saved, that ranks are at the same step, and that Lightning counts this run's calls."""
        check_saved(self.trainer, self)
        align_progress(self.trainer, self._counted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe model and run; put the EMA weights into ``state_dict`` and the live ones beside it."""
        checkpoint["ldlm"] = self.about_run()
        if (tokenizer := self._pack_tokenizer()) is not None:
            checkpoint["tokenizer"] = tokenizer
        if (ema := self._ema()) is not None:
            ema.save(checkpoint, self.model)

    def on_fit_end(self) -> None:
        """Raise OSError if the last save failed."""
        end_of_fit(self.trainer)

    # ---- files -------------------------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]  # torch overloads it
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's."""
        state: dict[str, Any] = self.model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Into the model."""
        return self.model.load_state_dict(state_dict, strict, assign)

    def about_run(self) -> dict[str, Any]:
        """Model, task and run as plain data: what a checkpoint says of itself, by which a resumed run is compared."""
        if self._given and self._digest is None:
            weights = self.model.named_parameters()
            self._digest = name_weights({n: p for n, p in weights if n.partition(".")[0] in self._given})
        return describe_run(self, self.objective, self._digest)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu") -> Self:  # type: ignore[override]
        """The task of a checkpoint: its model, with EMA weights if it has some, its objective and its arguments.

        Raises:
            ValueError: As `LDLM.load_from_checkpoint`; also if the objective's class is not imported.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        model = restored(LDLM, checkpoint, str(checkpoint_path)).to(map_location)
        # What may change is for the user alone to say.
        arguments = read_training(checkpoint["ldlm"]) | {"model": model, "allow_changes": ()}
        for name in {"objective", "allow_changes"} - inspect.signature(cls).parameters.keys():
            del arguments[name]  # a subclass may settle it
        try:
            return make(cls, arguments, KINDS)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint_path} does not say how its model was trained: {brief(error, 400)}"
            ) from error

    def _ema(self) -> EMA | None:
        callbacks: list[L.Callback] = self.trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, EMA)), None)

    def _pack_tokenizer(self) -> dict[str, Tensor] | None:
        """The tokenizer's files, made once a fit."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return None
        if self._packed is None or self._packed[0] is not tokenizer:
            self._packed = tokenizer, pack_tokenizer(tokenizer)
        return self._packed[1]

    def __repr__(self) -> str:
        """The model, and what it is trained with."""
        known = inspect.signature(type(self.objective)).parameters
        objective = ", ".join(f"{name}={value!r}" for name, value in vars(self.objective).items() if name in known)
        options = {name: value for name, value in vars(self).items() if name in inspect.signature(LDLMTask).parameters}
        told = (f"{name}={value!r}" for name, value in options.items() if name not in ("objective", "allow_changes"))
        lines = [f"{type(self).__name__} with {type(self.objective).__name__}({objective})", f"  {', '.join(told)}"]
        return "\n".join([*lines, *(f"  {line}" for line in repr(self.model).splitlines())])


def _is_frozen(part: nn.Module) -> bool:
    """Whether a part has parameters and none of them is trained."""
    return any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters())
