"""Small models that a reproduction trains itself, where the invented world's own lack what a claim is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.models import Recipe, teach, tokenizer, untrained


def lessons(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Training rows of records {text}, {prompt, completion} or {question, answer}."""
    found = []
    for number, record in enumerate(records):
        if "text" in record:
            row = Row(id=str(number), answer=record["text"], kind="text")
        elif "completion" in record:
            row = Row(id=str(number), prompt=record["prompt"], answer=record["completion"], kind="completion")
        else:
            row = Row(id=str(number), prompt=record["question"], answer=record["answer"])
        found.append(row)
    return found


def taught(
    kind: str, curricula: Mapping[str, Sequence[Row]], recipe: Recipe, seed: int, texts: Sequence[str] = ()
) -> dict[str, LanguageModel]:
    """One model for each curriculum; trained the first time, found in the user's cache afterwards.

    Args:
        kind: what they are called in the cache.
        texts: what else the one tokenizer of all of them is to know.
    """

    def train(folder: Any) -> None:
        spoken = [f"{row.prompt} {row.answer}".strip() for rows in curricula.values() for row in rows]
        words = tokenizer([*spoken, *texts], recipe.vocabulary)
        for number, (name, rows) in enumerate(curricula.items(), start=10 * seed):
            subject = untrained(words, recipe, number)
            teach(subject, rows, recipe, number)
            subject.save(folder / name)

    said = {name: [[row.kind, row.prompt, row.answer] for row in rows] for name, rows in curricula.items()}
    path = kept(kind, [said, list(texts), asdict(recipe), seed], train)
    return {name: LanguageModel.load(path / name, device="cpu") for name in curricula}
