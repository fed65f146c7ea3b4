"""The paper's tables as sets of runs."""
