"""What the parts of a model, and its data, must agree on, so that a misfit is named and not met in a matrix product.

In: parts, a tokenizer, a data module. Out: nothing, or a ValueError in one sentence.
No section of the paper.
"""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from transformers import PreTrainedTokenizerBase

from ldlm.data import PackedTextDataModule
from ldlm.decoders import TokenDecoder
from ldlm.denoiser import Denoiser
from ldlm.encoders import FrozenTokenEncoder, TokenEncoder
from ldlm.latents import LatentDecoder, LatentEncoder
from ldlm.packing import name_tokenizer, packed_vocabulary_size, tokenizer_digest, vocabulary_size


def check_parts(
    token_encoder: TokenEncoder,
    encoder: LatentEncoder,
    denoiser: Denoiser,
    decoder: LatentDecoder,
    token_decoder: TokenDecoder,
    tokenizer: PreTrainedTokenizerBase | None,
    reconstructs: bool,
) -> None:
    """Compare the sizes that the parts have in common, and the tokenizer's vocabulary with the encoder's.

    A model that reconstructs hidden states decodes into their width; others may use any.
    """
    width = token_encoder.hidden_size if reconstructs else decoder.hidden_size
    for one, other, what in [
        (token_encoder.hidden_size, encoder.hidden_size, "token_encoder and latent_encoder: hidden_size"),
        (width, decoder.hidden_size, "token_encoder and latent_decoder: hidden_size"),
        (decoder.hidden_size, token_decoder.hidden_size, "latent_decoder and token_decoder: hidden_size"),
        (token_encoder.vocab_size, token_decoder.vocab_size, "both token coders: vocab_size"),
        (encoder.latent_size, denoiser.latent_size, "latent_encoder and denoiser: latent_size"),
        (encoder.latent_size, decoder.latent_size, "latent_encoder and latent_decoder: latent_size"),
        (encoder.num_latents, denoiser.num_latents, "latent_encoder and denoiser: num_latents"),
        (encoder.num_latents, decoder.num_latents, "latent_encoder and latent_decoder: num_latents"),
    ]:
        if one != other:
            raise ValueError(f"{what} differs, {one} and {other}: give both the same")
    if tokenizer is None:
        return
    known = token_encoder.vocab_size
    # Some models pad their vocabulary a little; a tokenizer that is much smaller is another model's. Ids of special
    # tokens may be too large: no text has them. Those that every row has, BOS and EOS, may not.
    if vocabulary_size(tokenizer) < 0.95 * known or packed_vocabulary_size(tokenizer) > known:
        raise ValueError(
            f"the tokenizer has {vocabulary_size(tokenizer)} tokens, but the token encoder knows {known}: "
            "use the tokenizer that belongs to the encoder"
        )


def check_data(data: PackedTextDataModule, sequence_length: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compare the data's row length and tokenizer with the model's."""
    if data.sequence_length != sequence_length:
        raise ValueError(
            f"the data has sequence_length={data.sequence_length} and the model {sequence_length}: give both the same"
        )
    if tokenizer is not None and tokenizer_digest(data.loaded_tokenizer) != tokenizer_digest(tokenizer):
        raise ValueError(
            f"the data is tokenised by {name_tokenizer(data.loaded_tokenizer)} and the model's texts are made by "
            f"{name_tokenizer(tokenizer)}: give both the same tokenizer"
        )


def check_encoder(token_encoder: TokenEncoder, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compare the tokenizer with the one that lies beside a pre-trained encoder's weights, token by token.

    A few tokens may differ, as when somebody added a padding token; two models' vocabularies differ almost everywhere,
    even where their sizes agree.
    """
    own = token_encoder.own_tokenizer() if isinstance(token_encoder, FrozenTokenEncoder) else None
    if own is None or tokenizer is None:
        return
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    if sum(ours.get(token) != number for token, number in theirs.items()) > 0.01 * len(theirs):
        raise ValueError(
            f"the tokenizer {name_tokenizer(tokenizer)} gives other ids than the one of the token encoder, "
            f"{name_tokenizer(own)}: use the tokenizer that belongs to the encoder"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that cut the parameters up: norms, averages and checkpoints here are of whole ones."""
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(strategy).__name__} cuts the parameters up, and gradient norm, averaged weights and checkpoints "
            "would be of a piece: use strategy='ddp'; the paper's model, optimizer and averages take 6 GB on each GPU"
        )
