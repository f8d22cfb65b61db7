"""Means of several numbers about one model."""

from __future__ import annotations

import numpy as np


def harmonic_mean(parts: np.ndarray) -> np.ndarray:
    """Along the last axis; 0 where a part is 0."""
    with np.errstate(divide="ignore"):
        return np.where(np.any(parts <= 0, axis=-1), 0.0, parts.shape[-1] / np.sum(1 / parts, axis=-1))
