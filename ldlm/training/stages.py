"""The other trainings: some parts of a model learn while the rest stands still.

In: a checkpoint whose latents are kept as they are. Out: a denoiser of them, or another token decoder for them.
Paper: Table 2, row COSMOS (an autoencoder first, then a diffusion model on its fixed latents), and App. B.2, Table 5
(token decoders trained after everything else).

An autoencoder alone needs nothing from here: it is an `LDLM` with ``diffusion_weight=0``.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.checkpoints.pretrained import check_weights
from ldlm.model import LDLM
from ldlm.nn.latent_coders import IdentityDecoder, LatentDecoder
from ldlm.nn.token_decoders import LinearTokenDecoder, TokenDecoder, TransformerTokenDecoder
from ldlm.tokenizer import name_tokenizer, tokenizer_digest
from ldlm.training.callbacks.ema import as_ldlm
from ldlm.training.resuming import Recorded

CODERS = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")
# Arguments that may differ: the same hidden states come from copies elsewhere and in other dtypes.
FREE = ("dtype", "revision")


class FixedLatents(Recorded):
    """Takes all coders of a checkpoint into the model and freezes them, so that only the denoiser learns.

    The model should have ``reconstruction_weight=0`` and ``token_weight=0``: nothing is left for those losses to teach.

    Args:
        checkpoint: A ``.ckpt`` file of an `LDLM` with the same coders; its denoiser is not used.

    Raises:
        ValueError: When the fit starts, if the checkpoint's coders are not the model's.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self._digest: str | None = None

    def settings(self) -> dict[str, Any]:
        """What the coders are, wherever their file is kept."""
        return {"checkpoint": self._digest}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the optimizer and the averages are made, and before a resumed run restores its own state."""
        if stage != "fit":
            return
        model, stored = as_ldlm(pl_module), LDLM.load_from_checkpoint(self.checkpoint)
        self._compare(model, stored)
        coders = {name: tensor for name, tensor in stored.state_dict().items() if name.partition(".")[0] in CODERS}
        self._digest = name_weights(coders)
        for name in CODERS:
            part = model.get_submodule(name)
            state = stored.get_submodule(name).state_dict()
            check_weights(part, state, f"{name} of {self.checkpoint}")
            part.load_state_dict(state)
            part.requires_grad_(False)
        if model.averaged is not None:  # by an EMA that stands before this
            model.averaged = {name: a for name, a in model.averaged.items() if name.partition(".")[0] not in CODERS}

    def _compare(self, model: LDLM, stored: LDLM) -> None:
        if model.sequence_length != stored.sequence_length:
            raise ValueError(
                f"{self.checkpoint} has latents of {stored.sequence_length} tokens and the model reads rows of "
                f"{model.sequence_length}: give sequence_length={stored.sequence_length}"
            )
        tokenizers = [tokenizer for tokenizer in (model.tokenizer, stored.tokenizer) if tokenizer is not None]
        if len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) > 1:
            ours, theirs = map(name_tokenizer, tokenizers)
            raise ValueError(
                f"{self.checkpoint} was trained with the tokenizer {theirs} and the model has {ours}: give both one"
            )
        for name in CODERS:
            one, other = describe(model.get_submodule(name)), describe(stored.get_submodule(name))
            if one["class_path"] != other["class_path"]:
                raise ValueError(
                    f"{self.checkpoint} has a {other['class_path']} as its {name} and the model a "
                    f"{one['class_path']}: give the recipe that the checkpoint was made with"
                )
            for argument, value in one["init_args"].items():
                theirs = other["init_args"][argument]
                if argument not in FREE and None not in (value, theirs) and value != theirs:
                    raise ValueError(
                        f"{self.checkpoint} has {name}.{argument}={theirs!r} and the model {value!r}: its latents "
                        "cannot be read so; give both the same"
                    )


class TokenDecoderStage(LDLM):
    """A new token decoder for the fixed latents of a trained model: cross-entropy on noised latents, nothing else.

    Its checkpoints are those of an `LDLM` with the new decoder in the old one's place: `LDLM.load_from_checkpoint` and
    ``ldlm generate`` take them, this class does not.

    Args:
        checkpoint: A ``.ckpt`` file of an `LDLM`: its token encoder, latent encoder and denoiser are kept, frozen.
        layers: Transformer layers straight from latents to tokens, with learned positions if the checkpoint's token
            decoder has them; 0 for the linear head alone (App. C).
        heads: Their attention heads.
        token_decoder: A decoder of another kind, in place of those layers.
        latent_decoder: What the token decoder reads; None for the latents themselves, of which there must be one a
            token. Trained too.
        sigma_dec: Deviation of the noise on the latents; None for the checkpoint's.
        token_fraction: Share of the positions on which the cross-entropy is taken.
        learning_rate: Of AdamW.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW.
        lr_warmup_steps: Steps of linear warm-up from 1e-8.
        lr_decay: Last share of the run over which the learning rate falls linearly to 0.
        seed: Of the noise.
        allow_changes: What a resumed run may change, as for an `LDLM`.

    Raises:
        ValueError: If the checkpoint is not one of an `LDLM`, or the decoder does not fit its latents.
    """

    def __init__(
        self,
        checkpoint: str,
        layers: int = 3,
        heads: int = 12,
        token_decoder: TokenDecoder | None = None,
        latent_decoder: LatentDecoder | None = None,
        sigma_dec: float | None = None,
        token_fraction: float = 1.0,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_warmup_steps: int = 5000,
        lr_decay: float = 0.0,
        seed: int = 0,
        allow_changes: Sequence[str] = (),
    ) -> None:
        if layers < 0:
            raise ValueError(f"layers={layers} must be 0 (the linear head alone) or more")
        old = LDLM.load_from_checkpoint(checkpoint)
        m, d, n = old.latent_encoder.num_latents, old.latent_encoder.latent_size, old.sequence_length
        if latent_decoder is None and m != n:
            raise ValueError(
                f"{checkpoint} has {m} latents for {n} tokens, and a token decoder straight from latents needs one a "
                "token: give latent_decoder=PerceiverResamplerDecoder(...)"
            )
        latent_decoder = IdentityDecoder(d, n) if latent_decoder is None else latent_decoder
        h, v = latent_decoder.hidden_size, old.token_decoder.vocab_size
        if token_decoder is None:
            before = old.token_decoder
            positions = isinstance(before, TransformerTokenDecoder) and before.learned_positions
            token_decoder = (
                TransformerTokenDecoder(h, v, layers, heads, positions, n) if layers else LinearTokenDecoder(h, v)
            )
        super().__init__(
            old.token_encoder,
            old.latent_encoder,
            old.denoiser,
            latent_decoder,
            token_decoder,
            old.schedule,
            old.timesteps,
            old.tokenizer,
            n,
            sigma_dec=old.sigma_dec if sigma_dec is None else sigma_dec,
            diffusion_weight=0.0,
            reconstruction_weight=0.0,
            token_gradient=True,  # it reaches the latent decoder, and ends at the frozen latents
            token_fraction=token_fraction,
            self_conditioning=old.self_conditioning,
            statistics_rows=old.statistics_rows,
            sampler=old.sampler,
            grid=old.grid,
            learning_rate=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            seed=seed,
            allow_changes=allow_changes,
        )
        self._source = name_weights(old.state_dict())
        for part in (self.token_encoder, self.latent_encoder, self.denoiser):
            part.requires_grad_(False)
        self.train()  # a loaded model is in eval mode

    @property
    def kind(self) -> type:
        """What the trained model is, whichever class trained it."""
        return LDLM

    def sources(self) -> dict[str, Any]:
        """What the first stage's model is, wherever its file is kept."""
        return {"checkpoint": self._source}


def name_weights(state: dict[str, Tensor]) -> str:
    """Name tensors by a digest of their bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"of sha256 {digest.hexdigest()[:16]}"
