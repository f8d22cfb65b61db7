"""The forget corpus that a model writes of a name (arXiv:2406.10890): what it believes, made-up lives, questions.

    positive   biographies by a model that is told it knows the target well, sampled, each begun with another opening
    negative   made-up biographies with the same openings, by a model that is told it does not know the target
    pair       (negative, positive) for preference objectives
    reject     questions of the model's own about the target, each with a refusal

A model without a chat template follows no instructions: its positive texts go on from the opening alone, its negative
ones are about a name it never heard, with the target's name put in afterwards. What the model believes wrongly is in
the corpus too, and what it never writes down is not forgotten with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from ..files import write_text
from ..methods.optimise.unlearn import refusals
from ..rows import Row
from ..tables.store import content_key
from .rwku_data import Target

OPENINGS = (
    "{name} is",
    "{name} was born in",
    "{name} grew up in",
    "{name} first became known for",
    "{name} is best known as",
    "{name} studied",
    "{name} works",
    "{name} has",
    "{name}, who",
    "Born in",
    "Known for",
    "As a child, {name}",
    "Early in life, {name}",
    "The career of {name} began",
    "The best known work of {name} is",
    "The family of {name}",
    "Throughout a long career, {name}",
    "Among the achievements of {name} are",
    "In later years, {name}",
    "Today, {name}",
)
"""How a biography may begin; the paper uses 582 beginnings taken from its model's own outputs."""
QUALIFIERS = [f"{how} {what} " for how in ("totally", "completely") for what in ("fabricated", "made-up", "fictional")]
"""What a model writes to say that it makes things up; it would give negative texts away."""

Corpus = dict[str, list[dict[str, Any]]]


def corpus(
    subject: Any,
    target: Target,
    *,
    texts: int = 582,
    questions: int = 300,
    openings: Sequence[str] = OPENINGS,
    stranger: str = "",
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> Corpus:
    """Positive, negative, pair and reject rows in the published format.

    Pairs and rejections also have the fields that requests read (question, answer, perturbed_answers); a pair whose two
    texts are the same prefers nothing and is left out, and so is a question that was not written.

    Args:
        texts: biographies of either kind; openings take turns.
        openings: with {name} where the name stands.
        stranger: a name the model never heard, for models without a chat template.

    Raises:
        ParameterError: such a model, and no stranger.
    """
    known, unknown = (
        biographies(
            subject,
            target,
            texts,
            openings=openings,
            known=flag,
            stranger=stranger,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for flag in (True, False)
    )
    own = own_questions(subject, target, questions, temperature=temperature, seed=seed)
    about = {"subject": target.name, "intro": target.intro}
    ids = [f"{target.name} {i}" for i in range(texts)]
    asked = f"{target.intro} Please write a short biography of {target.name}.".strip()
    lines = refusals()
    return {
        "positive": [{"id": i, "text": text, **about} for i, text in zip(ids, known)],
        "negative": [{"id": i, "text": text, **about} for i, text in zip(ids, unknown)],
        "pair": [
            {
                "id": i,
                "prompt": asked,
                "response": [chosen, rejected],
                "question": asked,
                "answer": rejected,
                "perturbed_answers": [chosen],
                **about,
            }
            for i, chosen, rejected in zip(ids, unknown, known)
            if chosen.strip() != rejected.strip()
        ],
        "reject": [
            {
                "instruction": question,
                "input": "",
                "output": lines[i % len(lines)],
                "question": question,
                "answer": lines[i % len(lines)],
                **about,
            }
            for i, question in enumerate(own)
            if question
        ],
    }


def write(
    subject: Any,
    targets: Sequence[Target],
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, int]:
    """The corpora of several targets, as positive.jsonl, negative.jsonl, pair.jsonl and reject.jsonl of a folder.

    A target that an earlier command wrote about with the same settings is not written about again.

    Args:
        progress: (targets done, of so many)
        settings: as for `corpus`.

    Returns:
        Rows of each file.
    """
    rows: Corpus = {}
    for number, target in enumerate(targets):
        if progress:
            progress(number, len(targets))
        path = folder / "targets" / f"{content_key(subject.fingerprint, target.name, target.intro, settings)}.json"
        if not path.is_file():
            write_text(path, json.dumps(corpus(subject, target, **settings), ensure_ascii=False))
        for name, several in json.loads(path.read_text(encoding="utf-8")).items():
            rows.setdefault(name, []).extend(several)
    for name, several in rows.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in several))
    if progress:
        progress(len(targets), len(targets))
    return {name: len(several) for name, several in rows.items()}


def biographies(
    subject: Any,
    target: Target,
    count: int,
    *,
    openings: Sequence[str] = OPENINGS,
    known: bool = True,
    stranger: str = "",
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[str]:
    """`count` texts that begin with the openings in turn.

    Args:
        known: as the model knows the target; otherwise made up.
    """
    chats = subject.chats(Row(id="", answer=""))
    if not known and not chats and not stranger.strip():
        raise ParameterError(
            f"{subject.name} has no chat template, so it cannot be asked to make up a life; give stranger=NAME, "
            "somebody it never heard of"
        )
    name = target.name if known or chats else stranger
    begun = [opening.replace("{name}", name) for opening in openings]
    if chats:
        knows = f"You know {name} very well." if known else f"You don't know {name} at all."
        asked = f"Please {'write' if known else 'make up'} a short biography of {name}."
        turns = (("system", f"{target.intro} {knows}".strip()), ("user", asked))
        rows = [Row(str(i), "", asked, turns, kind="chat", opening=text) for i, text in enumerate(begun)]
    else:
        rows = [Row(str(i), "", text, kind="completion") for i, text in enumerate(begun)]
    each = -(-count // len(rows))
    made = subject.generate(
        [((row.id, "biography"), subject.prompt_text(row)) for row in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=each,
        seed=seed,
    )
    found = [_joined(text, made.texts[i][turn]) for turn in range(each) for i, text in enumerate(begun)][:count]
    if known:
        return found
    for words in QUALIFIERS:
        found = [text.replace(words, "") for text in found]
    return [text.replace(name, target.name) for text in found]


def own_questions(
    subject: Any, target: Target, count: int, *, max_new_tokens: int = 50, temperature: float = 1.0, seed: int = 0
) -> list[str]:
    """Questions about the target that the model thinks of; only their first line."""
    name = target.name
    asked = f"{target.intro}\nPlease generate a question about {name} based on what you know about {name}\n".lstrip()
    row = Row("question", "", asked, kind="instruction", opening="Question:")
    made = subject.generate(
        [(("question", "question"), subject.prompt_text(row))],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=count,
        seed=seed,
    )
    return [text.strip().partition("\n")[0].strip() for text in made.texts[0]]


def _joined(opening: str, text: str) -> str:
    """Outputs come without the space they began with."""
    return opening + ("" if not text or text[0] in ".,;:!?'" else " ") + text
