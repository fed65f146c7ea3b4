"""Peak memory of the token loss over that of plain cross-entropy: python scripts/measure_token_loss.py --help.

Both losses, forward and backward, run in a process of their own over the same linear head and the same hidden states,
which have no gradient, as in training. What is printed is by how much each raised its process's peak memory; the head's
gradient is in both.
"""

import argparse
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from ldlm import LinearTokenDecoder

parser = argparse.ArgumentParser(description="Peak memory of the token loss over plain cross-entropy's.")
parser.add_argument("--rows", type=int, default=16, help="rows of the batch (default: %(default)s)")
parser.add_argument("--tokens", type=int, default=1024, help="tokens a row (default: %(default)s)")
parser.add_argument("--vocabulary", type=int, default=50257, help="(default: %(default)s)")
parser.add_argument("--width", type=int, default=768, help="of the hidden states (default: %(default)s)")
parser.add_argument("--bfloat16", action="store_true", help="under bfloat16 autocast")
parser.add_argument("--only", choices=("plain", "ours"), help="one of them, in this process: prints bytes")


def peak_bytes() -> int:
    """The most memory that this process has ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def measure(options: argparse.Namespace) -> int:
    """Bytes by which one loss raises the peak."""
    decoder = LinearTokenDecoder(options.width, options.vocabulary)
    hidden = torch.randn(options.rows, options.tokens, options.width)
    tokens = torch.randint(options.vocabulary, (options.rows, options.tokens))
    before = peak_bytes()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        if options.only == "plain":
            loss = F.cross_entropy(decoder(hidden).float().flatten(0, 1), tokens.flatten())
        else:
            loss = decoder.loss(hidden, tokens)
    loss.backward()
    return peak_bytes() - before


if __name__ == "__main__":
    options = parser.parse_args()
    if options.only:
        print(measure(options))
    else:
        command = [sys.executable, *sys.argv, "--only"]
        plain, ours = (
            int(subprocess.run([*command, loss], check=True, stdout=subprocess.PIPE, text=True).stdout)
            for loss in ("plain", "ours")
        )
        dtype = "bfloat16 autocast" if options.bfloat16 else "float32"
        print(f"{options.rows} x {options.tokens} x {options.vocabulary:,}, {dtype}, forward and backward:")
        print(f"plain {plain / 1e9:.2f} GB, ours {ours / 1e9:.2f} GB: {ours / plain:.3f}")
