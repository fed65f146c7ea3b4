"""The mathematics of the diffusion process, which knows no text."""
