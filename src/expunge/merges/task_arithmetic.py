"""Task arithmetic: deltas are vectors, and are added with a coefficient."""

from ..errors import ParameterError
from ..registry import merge
from .case import Entries, Merging


@merge(paper="arXiv:2212.04089", cost="one pass over the weights")
def task_arithmetic(case: Merging, *, coefficient: float | list[float] = 1.0) -> Entries:
    """coefficient x the sum of all deltas, or sum_k coefficient_k delta_k (Ilharco et al. 2023).

    A negative coefficient takes what a delta taught away. Published for several fine-tunes: one coefficient for all,
    searched on held-out rows, often 0.3 to 0.5.
    """
    each = coefficient if isinstance(coefficient, list) else [coefficient] * len(case.deltas)
    if len(each) != len(case.deltas):
        raise ParameterError(f"task_arithmetic: {len(each)} coefficients for {len(case.deltas)} deltas")
    return case.combined(each)
