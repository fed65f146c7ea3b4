"""Networks, which know neither the diffusion process nor a Trainer."""
