"""A token encoder of one's own: what `custom_encoder.py` and `custom_encoder.yaml` train with."""

from torch import Tensor, nn

from ldlm import TokenEncoder


class NeighbourEncoder(TokenEncoder):
    """Learned embeddings, each mixed with those of its neighbours.

    Args:
        hidden_size: Width h of the hidden states.
        vocab_size: Vocabulary size v.
        reach: How many neighbours on each side.
    """

    def __init__(self, hidden_size: int = 96, vocab_size: int = 30522, reach: int = 2) -> None:
        super().__init__(hidden_size, vocab_size)
        self.reach = reach
        self.table = nn.Embedding(vocab_size, hidden_size)
        self.mix = nn.Conv1d(hidden_size, hidden_size, 2 * reach + 1, padding=reach)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> hidden states [b n h]; the base class normalises them."""
        embedded = self.table(tokens)
        out: Tensor = embedded + self.mix(embedded.transpose(1, 2)).transpose(1, 2)
        return out

    def embeddings(self) -> Tensor:
        """The input embedding matrix [v h]."""
        table: Tensor = self.table.weight
        return table
