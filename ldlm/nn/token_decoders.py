"""Token decoders: from estimated hidden states to tokens.

In: normalised hidden states [b n h], as the latent decoder estimates them.
Out: logits [b n v], token ids [b n], or the cross-entropy in nats per token.
Paper: section 4.1, Eq. 3 and 27; App. C (66M parameters with 3 layers, 38M for the linear head alone).
"""

import abc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldlm.nn.layers import TransformerBlock, check_layers, initialise, sinusoids, widened
from ldlm.nn.token_encoders import TokenEncoder

# Positions whose logits are held at once: 2,048 x 50,257 in float32 is 412 MB.
CHUNK = 2048


class TokenDecoder(nn.Module, abc.ABC):
    """Features of the hidden states under a linear head over the vocabulary.

    A subclass writes `features`; the head, the chunked loss and the chunked argmax are here.

    Args:
        hidden_size: Width h of the token encoder.
        vocab_size: Vocabulary size v.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.head = nn.Linear(hidden_size, vocab_size)

    @abc.abstractmethod
    def features(self, hidden: Tensor) -> Tensor:
        """Hidden states [b n h] -> inputs of the head [b n h]."""

    def start(self, token_encoder: TokenEncoder) -> None:
        """Called once when training starts, after the hidden-state statistics are known. A seam: does nothing here."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[b n h] -> all logits at once, [b n v]. `loss` and `predict` do without that much memory."""
        out: Tensor = self.head(self.features(hidden))
        return out

    def loss(self, hidden: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats (Eq. 27), never holding more than `CHUNK` rows of logits.

        Args:
            hidden: Hidden states [b n h].
            tokens: Targets [b n].
            positions: Indices into the b·n positions; the mean is over these alone. None for all of them.
        """
        features, targets = self.features(hidden).flatten(0, 1), tokens.flatten()
        if positions is not None:
            features, targets = features[positions], targets[positions]
        if len(targets) <= CHUNK:
            return self._nats(features, targets) / len(targets)
        # Checkpointing makes each chunk's logits again in the backward pass, so that no two chunks' logits coexist.
        # F.linear_cross_entropy also chunks, but in bfloat16 its loss itself is rounded to bfloat16.
        pairs = zip(torch.split(features, CHUNK), torch.split(targets, CHUNK), strict=True)
        sums = [checkpoint(self._nats, part, target, use_reentrant=False) for part, target in pairs]
        return torch.stack(sums).sum() / len(targets)

    def _nats(self, features: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of one chunk, in float32."""
        return F.cross_entropy(widened(self.head(features)), targets, reduction="sum")

    def nats(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Cross-entropy of each row summed over its tokens, float64 [b]; arguments as in `loss`, no gradient wanted."""
        features, targets = self.features(hidden).flatten(0, 1), tokens.flatten()
        pairs = zip(torch.split(features, CHUNK), torch.split(targets, CHUNK), strict=True)
        nats = [F.cross_entropy(widened(self.head(part)), target, reduction="none") for part, target in pairs]
        return torch.cat(nats).double().view(tokens.shape).sum(1)

    def predict(self, hidden: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Token ids [b n]: the argmax, or a draw from softmax(logits / temperature), in chunks of positions."""
        ids = []
        for features in torch.split(self.features(hidden).flatten(0, 1), CHUNK):
            logits = self.head(features).float()
            if temperature > 0:
                probabilities = F.softmax(logits / temperature, dim=-1)
                ids.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(1))
            else:
                ids.append(logits.argmax(-1))
        return torch.cat(ids).view(hidden.shape[:2])


class LinearTokenDecoder(TokenDecoder):
    """The linear head alone (App. C: 38M at 768 x 50,257).

    Args:
        hidden_size: Width h of the token encoder.
        vocab_size: Vocabulary size v.
        from_embeddings: Start at the token encoder's own input embeddings E read on de-normalised hidden states,
            logits = E (mean + std · h). A short run then does not spend its time on finding the vocabulary again.
    """

    def __init__(self, hidden_size: int = 768, vocab_size: int = 50257, from_embeddings: bool = False) -> None:
        super().__init__(hidden_size, vocab_size)
        self.from_embeddings = from_embeddings

    def features(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden

    @torch.no_grad()
    def start(self, token_encoder: TokenEncoder) -> None:
        """Write the embeddings into the head, if asked for."""
        if self.from_embeddings:
            embeddings = token_encoder.embeddings().to(self.head.weight)
            self.head.weight.copy_(embeddings * token_encoder.std)
            self.head.bias.copy_(embeddings @ token_encoder.mean)


class TransformerTokenDecoder(TokenDecoder):
    """Bidirectional transformer blocks of 16 d² under an untied head (App. C: 66M with 3 layers).

    Args:
        hidden_size: Width h of the token encoder.
        vocab_size: Vocabulary size v.
        layers: Number of blocks.
        heads: Attention heads; must divide ``hidden_size``.
        learned_positions: Add an embedding of its position to each hidden state. Contextual hidden states carry their
            positions and the paper's 66M leave no room for more; where static embeddings are the latents (Table 2),
            nothing else tells these blocks the order of the tokens.
        sequence_length: Tokens a row, n; used for ``learned_positions`` alone.
    """

    positions: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int = 768,
        vocab_size: int = 50257,
        layers: int = 3,
        heads: int = 12,
        learned_positions: bool = False,
        sequence_length: int = 128,
    ) -> None:
        super().__init__(hidden_size, vocab_size)
        check_layers(layers)
        self.layers = layers
        self.heads = heads
        self.learned_positions = learned_positions
        self.sequence_length = sequence_length
        self.blocks = nn.Sequential(*(TransformerBlock(hidden_size, heads, gated=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden_size)
        self.blocks.apply(initialise)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(hidden_size))
        nn.init.zeros_(self.head.bias)
        positions = nn.Parameter(sinusoids(torch.arange(sequence_length), hidden_size)) if learned_positions else None
        self.register_parameter("positions", positions)

    def features(self, hidden: Tensor) -> Tensor:
        """[b n h] -> [b n h]; ValueError if n is not the number of learned positions."""
        if self.positions is not None:
            if hidden.shape[1] != self.sequence_length:
                raise ValueError(
                    f"the token decoder has sequence_length={self.sequence_length} learned positions for rows of "
                    f"{hidden.shape[1]} tokens: give it the model's sequence_length"
                )
            hidden = hidden + self.positions
        out: Tensor = self.norm(self.blocks(hidden))
        return out
