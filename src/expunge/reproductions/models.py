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
    kind: str,
    curricula: Mapping[str, Sequence[Row]],
    recipe: Recipe,
    seed: int,
    texts: Sequence[str] = (),
    words: Any = None,
) -> dict[str, LanguageModel]:
    """One model for each curriculum; trained the first time, found in the user's cache afterwards.

    Args:
        kind: what they are called in the cache.
        texts: what else the one tokenizer of all of them is to know.
        words: a tokenizer; by default one is trained on all that they are taught.
    """

    def train(folder: Any) -> None:
        spoken = [f"{row.prompt} {row.answer}".strip() for rows in curricula.values() for row in rows]
        chosen = words or tokenizer([*spoken, *texts], recipe.vocabulary)
        for number, (name, rows) in enumerate(curricula.items(), start=10 * seed):
            subject = untrained(chosen, recipe, number)
            teach(subject, rows, recipe, number)
            subject.save(folder / name)

    said = {name: [[row.kind, row.prompt, row.answer] for row in rows] for name, rows in curricula.items()}
    given = [] if words is None else [words.backend_tokenizer.to_str()]
    path = kept(kind, [said, list(texts), asdict(recipe), seed, *given], train)
    return {name: LanguageModel.load(path / name, device="cpu") for name in curricula}
