"""Which prompts are held out."""

import hashlib

import numpy as np


def validation_split(groups: list[str], percent: float, seed: int) -> np.ndarray:
    """True for held-out rows; all rows of a prompt group fall on the same side."""
    # By a hash of the prompt, not by drawing: a pair stays on its side when others are added or left out.
    digests = [int(hashlib.sha256(f"{seed}:{g}".encode()).hexdigest()[:8], 16) % 10_000 for g in groups]
    return np.array(digests, dtype=np.int64) < percent * 100
