"""Everything that ``ldlm evaluate`` does."""
