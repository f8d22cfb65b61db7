"""How a change of an MLP's output matrix is written down."""

from __future__ import annotations

import torch
from torch import Tensor

from ...subjects.value_vectors import ValueMatrix


def low_rank(matrix: ValueMatrix, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A delta's entry for W + left @ right, W (d, f) the matrix that keys are multiplied by.

    Args:
        left: (d, n)
        right: (n, f)
    """
    b, a = (left, right) if matrix.across else (right.T, left.T)  # Conv1D keeps (f, d)
    return {"A": a.float().contiguous(), "B": b.float().contiguous(), "scale": torch.tensor(1.0)}
