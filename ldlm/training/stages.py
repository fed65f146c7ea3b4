"""The other trainings: some parts of a model learn while the rest stands still.

In: a checkpoint whose latents are kept as they are. Out: a denoiser of them, or another token decoder for them.
Paper: Table 2, row COSMOS (an autoencoder first, then a diffusion model on its fixed latents), and sections 4.1 and 8,
App. B.2, Table 5 (token decoders trained after everything else).

An autoencoder alone needs nothing from here: it is an `LDLM` trained by ``JointObjective(diffusion_weight=0)``.
"""

from typing import Any

import lightning as L

from ldlm.checkpoints.description import describe
from ldlm.checkpoints.pretrained import check_weights
from ldlm.model import LDLM
from ldlm.nn.latent_coders import IdentityDecoder, LatentDecoder
from ldlm.nn.token_decoders import LinearTokenDecoder, TokenDecoder, TransformerTokenDecoder
from ldlm.tokenizer import name_tokenizer, tokenizer_digest
from ldlm.training.outputs import model_of
from ldlm.training.records import Recorded, name_weights

CODERS = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")
# Arguments that may differ: the same hidden states come from copies elsewhere and in other dtypes.
FREE = ("dtype", "revision")


class FixedLatents(Recorded):
    """Takes a checkpoint's encoders and decoders into the model and freezes them, so that only the denoiser learns.

    The task's objective should be ``JointObjective(reconstruction_weight=0, token_weight=0)``: nothing is left for
    those losses to teach.

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
        model, stored = model_of(pl_module), LDLM.load_from_checkpoint(self.checkpoint)
        self._compare(model, stored)
        coders = {name: tensor for name, tensor in stored.state_dict().items() if name.partition(".")[0] in CODERS}
        self._digest = name_weights(coders)
        for name in CODERS:
            part = model.get_submodule(name)
            state = stored.get_submodule(name).state_dict()
            check_weights(part, state, f"{name} of {self.checkpoint}")
            part.load_state_dict(state)
            part.requires_grad_(False)

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


def replace_token_decoder(
    model: LDLM,
    token_decoder: TokenDecoder,
    latent_decoder: LatentDecoder | None = None,
    sigma_dec: float | None = None,
) -> LDLM:
    """A model with another token decoder, to be trained by an `LDLMTask` with `TokenObjective`; all else is frozen.

    The paper's main models are made so (sections 4.1 and 8): no token decoder in joint training
    (``JointObjective(token_weight=0)``), then one on the trained latent decoder. Table 5's read the latents themselves:
    give ``latent_decoder=IdentityDecoder(d, n)``, of which there must be one latent a token.

    Args:
        model: A trained model, whose other parts are taken, not copied.
        token_decoder: The new one.
        latent_decoder: What it reads in place of the model's latent decoder, trained with it; None keeps the model's,
            frozen.
        sigma_dec: Standard deviation of the noise on the latents; None for the model's.

    Raises:
        ValueError: If the decoders do not fit the model's latents or its vocabulary.
    """
    model.requires_grad_(False)
    return LDLM(
        model.token_encoder,
        model.latent_encoder,
        model.denoiser,
        model.latent_decoder if latent_decoder is None else latent_decoder,
        token_decoder,
        model.schedule,
        model.timesteps,
        model.tokenizer,
        model.sequence_length,
        sigma_dec=model.sigma_dec if sigma_dec is None else sigma_dec,
        self_conditioning=model.self_conditioning,
        sampler=model.sampler,
        grid=model.grid,
    )


def token_decoder_stage(
    checkpoint: str,
    layers: int = 3,
    heads: int = 12,
    token_decoder: TokenDecoder | None = None,
    latent_decoder: LatentDecoder | None = None,
    keep_latent_decoder: bool = False,
    sigma_dec: float | None = None,
) -> LDLM:
    """`replace_token_decoder` for the model of a checkpoint, with a decoder of so many layers.

    Args:
        checkpoint: A ``.ckpt`` file of a trained model.
        layers: Transformer layers of the token decoder, with learned positions if the checkpoint's has them; 0 for
            the linear head alone (App. C).
        heads: Their attention heads.
        token_decoder: A decoder of another kind, in place of those layers.
        latent_decoder: What the token decoder reads, trained with it; None for the latents themselves (Table 5).
        keep_latent_decoder: Whether it reads the checkpoint's latent decoder, frozen (sections 4.1 and 8).
        sigma_dec: Standard deviation of the noise on the latents; None for the checkpoint's.

    Raises:
        ValueError: If the checkpoint is not one of an `LDLM`, or the decoders do not fit its latents.
    """
    if layers < 0:
        raise ValueError(f"layers={layers} must be 0 (the linear head alone) or more")
    if keep_latent_decoder and latent_decoder is not None:
        raise ValueError("keep_latent_decoder=True keeps the checkpoint's, and latent_decoder gives another: give one")
    old = LDLM.load_from_checkpoint(checkpoint)
    m, d, n = old.latent_encoder.num_latents, old.latent_encoder.latent_size, old.sequence_length
    read = old.latent_decoder if keep_latent_decoder else latent_decoder
    if read is None and m != n:
        raise ValueError(
            f"{checkpoint} has {m} latents for {n} tokens, and a token decoder straight from latents needs one a "
            "token: give latent_decoder=PerceiverResamplerDecoder(...)"
        )
    read = IdentityDecoder(d, n) if read is None else read
    h, v, before = read.hidden_size, old.token_decoder.vocab_size, old.token_decoder
    if token_decoder is None:
        positions = isinstance(before, TransformerTokenDecoder) and before.learned_positions
        token_decoder = (
            TransformerTokenDecoder(h, v, layers, heads, positions, n) if layers else LinearTokenDecoder(h, v)
        )
    return replace_token_decoder(old, token_decoder, None if keep_latent_decoder else read, sigma_dec)
