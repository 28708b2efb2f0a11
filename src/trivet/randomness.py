"""Randomness as a function of (seed, purpose): every draw can be named, so nothing needs to be saved to resume.

A run has one seed. Each consumer (the order of records in epoch 3, the attack in step 217, the noise of image 12)
asks for the generator of *its* purpose, and gets the same stream however the work was interrupted, batched
or sharded. Streams of different purposes are independent: the key is hashed with BLAKE2b.

Not for privacy noise: that comes from the operating system's entropy, unseeded.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """The 63-bit seed of the stream named by `purpose` in the run seeded with `seed`."""
    key = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` for one purpose, e.g. `generator(seed, "attack", step)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))
