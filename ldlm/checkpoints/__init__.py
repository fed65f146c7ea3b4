"""What is written of a model, and how it is read."""
