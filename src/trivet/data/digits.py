"""The embedded dataset: scikit-learn's handwritten digits, always there, small enough for a demonstration."""

from __future__ import annotations

import numpy as np
import torch

from trivet.data.dataset import Splits
from trivet.data.extras import extra
from trivet.data.labels import Part, labelled
from trivet.methods import method


@method(title="Handwritten digits, 8x8", paper="Alpaydin & Kaynak, UCI repository 1998", year=1998)
def digits() -> Splits:
    """1,797 digits, inputs [B, 1, 8, 8], 17 grey levels (0 to 16), 10 classes.

    It comes undivided. The split here never changes: within each class, in the order of the file, every fifth record
    (the 5th, the 10th, …) is a test record: 1,442 to train, 355 to test. Both parts hold digits of the same writers.
    """
    with extra("digits", "the embedded digits need scikit-learn"):
        from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images.astype(np.uint8))[:, None]
    labels = loaded.target.astype(np.int64)
    rank = np.empty(len(labels), np.int64)
    for label in range(10):
        members = labels == label
        rank[members] = np.arange(members.sum())
    test = rank % 5 == 4
    train_part, test_part = (Part(images[torch.from_numpy(chosen)], labels[chosen]) for chosen in (~test, test))
    return labelled(train_part, test_part, title="digits", classes=list(map(str, range(10))), scale=16.0)
