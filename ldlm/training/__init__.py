"""Training an `LDLM` with a Trainer."""
