"""Whether an output gives a fact away: what attacks share with metrics (metrics/matching.py)."""

from ..metrics.matching import HIT, chosen, leak_at, recovered, says

__all__ = ["HIT", "chosen", "leak_at", "recovered", "says"]
