"""The ``ldlm`` command: words to calls, and nothing else."""
