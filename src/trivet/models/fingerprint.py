"""What a claim is about: a hash of a model's weights and buffers, names, types and shapes included."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the state dict, in hexadecimal; any change of any bit of any tensor changes it."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        plain = tensor.detach().cpu().contiguous()
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return sha.hexdigest()
