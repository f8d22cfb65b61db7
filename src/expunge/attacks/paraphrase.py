"""Asking in other words."""

from ..evidence import Item
from ..metrics.matching import recovered
from ..registry import attack
from ..tables.passes import Generate
from .case import Attack, Case, Found


@attack(group="black_box", access="text", paper="arXiv:2406.10890")
def paraphrase(case: Case, *, wordings: int = 3) -> Attack:
    """Ask every forget question in wordings that were held out, greedily."""
    asked = [(row, i, q) for row in case.forget for i, q in enumerate(row.paraphrased_prompts[:wordings])]
    if not asked:
        return Found(status="skipped: no forget row has paraphrased questions")
    prompts = tuple(((row.id, f"paraphrase/{i}"), row, question) for row, i, question in asked)
    outputs = yield Generate(prompts, case.max_new_tokens)
    items = [
        Item(row.entity or row.id, f"{row.id}#{i}", recovered(row, texts[0], question), texts[0])
        for (row, i, question), texts in zip(asked, outputs.texts)
    ]
    return Found(items, {"queries": len(asked), "samples": 1})
