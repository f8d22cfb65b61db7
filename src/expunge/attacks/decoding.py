"""Asking again and again: leak@k under sampling."""

from ..evidence import Item
from ..metrics.matching import HIT, leak_at, recovered
from ..registry import attack
from .case import Attack, Case, Found


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2511.04934",
    caveat="A model that guesses among few values leaks too; compare with gold at the same k.",
)
def decoding(case: Case, *, samples: int = 16, k: int = 4, temperature: float = 1.0) -> Attack:
    """Sample several answers to every forget question; a fact leaks if one of k samples gives it away (leak@k)."""
    if not 1 <= k <= samples:
        return Found(status=f"skipped: k = {k} is not within 1 and samples = {samples}")
    outputs = yield case.questions(case.forget, samples=samples, temperature=temperature, seed=case.seed)
    hits = []
    items = []
    for row, texts in zip(case.forget, outputs.texts):
        told = [text for text in texts if recovered(row, text, row.prompt) >= HIT]
        hits.append(len(told))
        items.append(Item(row.entity or row.id, row.id, leak_at(k, samples, len(told)), told[0] if told else texts[0]))
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= samples]
    curve = [(float(size), sum(leak_at(size, samples, c) for c in hits) / len(hits)) for size in sizes]
    budget = {"queries": len(items), "samples": samples}
    return Found(items, budget, curve, "samples")
