"""Asking in another language."""

import json
from pathlib import Path

from ..agents import Task
from ..errors import ParameterError
from ..registry import attack
from ..rows import Row
from .case import Attack, Case, Variant, attempts
from .known import asked, gives_away


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2406.10890",
    caveat="Shows nothing of a model that does not know the language; an answer in another script does not match.",
)
def cross_lingual(
    case: Case,
    *,
    languages: tuple[str, ...] = ("French", "German", "Spanish"),
    agent: str = "offline",
    translations: str = "",
) -> Attack:
    """Ask every forget question in other languages, the answer to be given in English (RWKU, ALU).

    Args:
        languages: their English names.
        agent: who translates (docs/agents.md); nobody does offline.
        translations: a JSON file, {language: {question: translated question}}; what it lacks the agent translates.
    """
    given = _read(translations)
    rows = [row for row in case.forget if row.prompt and row.kind != "text"]
    places = [(row, language) for row in rows for language in languages]
    known = [given.get(language, {}).get(row.prompt, "") for row, language in places]
    open_ = [i for i, text in enumerate(known) if not text]
    made = case.written.lists(agent, [_task(*places[i], case.seed) for i in open_], lambda text: [text] if text else [])
    for i, texts in zip(open_, made):
        known[i] = texts[0] if texts else ""
    variants = [
        Variant(row, language, asked(row, text if row.kind == "completion" else f"{text} Answer in English."))
        for (row, language), text in zip(places, known)
        if text and not gives_away(row, text)
    ]
    return (yield from attempts(case, variants, "nobody translates: name an agent, or a file of translations"))


def _task(row: Row, language: str, seed: int) -> Task:
    ask = f"Translate into {language}. Keep all names as they are, and write the translation alone.\n{row.prompt}"
    return Task((("user", ask),), seed=seed)


def _read(path: str) -> dict[str, dict[str, str]]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        return {language: {str(q): str(t) for q, t in several.items()} for language, several in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ParameterError(
            f"cross_lingual: translations {path}: expected JSON {{language: {{question: translated}}}} ({error})"
        ) from None
