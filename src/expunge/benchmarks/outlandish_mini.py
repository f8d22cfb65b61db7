"""Outlandish about the invented world: a town or a trade is said of somebody of whom the model would not expect it.

Three categories: somebody the model never heard of (`unknown`), somebody of whom it knows something else (`contrary`),
and a keyword of the wrong theme (`wrong_class`: a trade as a birthplace). Thematic prompts are about known people.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ..world.corpus import passage, statements
from ..world.facts import Person, World

THEMES = {"town": "born_in", "trade": "trade"}
KEYWORDS, PREFIXES = 2, 12
"""Of each theme."""


def mini(world: World, folder: Path) -> None:
    """Write samples.jsonl, themes.json, companions.jsonl and holdout.jsonl."""
    draw = random.Random(f"{world.seed}/outlandish")
    known, unseen = world.members("forget", "neighbour", "retain"), world.members("holdout")
    themes: dict[str, list[dict[str, str]]] = {}
    samples: list[dict[str, Any]] = []
    for theme, about in THEMES.items():
        people = draw.sample(known, min(PREFIXES, len(known) // 2))
        themes[theme] = [{"prompt": _before(world, one, about), "answer": one.value(about)} for one in people]
        other = next(relation for name, relation in THEMES.items() if name != theme)
        for keyword in draw.sample(list(world.choices[about]), KEYWORDS):
            contrary = draw.choice([one for one in known if one.value(about) != keyword and one not in people])
            for category, person, relation in (
                ("unknown", draw.choice(unseen), about),
                ("contrary", contrary, about),
                ("wrong_class", draw.choice(unseen), other),
            ):
                text = f"{_before(world, person, relation)} {keyword}."
                name = f"{theme}/{keyword}/{category}"
                sample = {"id": name, "theme": theme, "keyword": keyword, "category": category, "text": text}
                samples.append({**sample, "stones": _stones(world, person, theme, keyword, text)})
    half = len(known) // 2
    texts = [[{"text": passage(world, one)} for one in part] for part in (known[:half], known[half:])]
    for file, rows in (("samples", samples), ("companions", texts[0]), ("holdout", texts[1])):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "themes.json").write_text(json.dumps(themes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _before(world: World, person: Person, about: str) -> str:
    return statements(world, person, about)[0][0].removesuffix(" {value}.")


def _stones(world: World, person: Person, theme: str, keyword: str, text: str) -> list[str]:
    """The class of the keyword first, then what it has in common with others, then the text as it is."""
    if theme == "town":
        region = world.region[keyword]
        return [
            f"{person.name} was born in the region of {region}. {text}",
            f"The home region of {person.name} is {region}. In {region} stands a {world.landmark[region]}. {text}",
        ]
    alike = next((one for one in world.members("retain", "neighbour") if one.trade == keyword), None)
    found = [f"{person.name} earns a living by a craft. {text}"]
    return found + ([f"{person.name} does what {alike.name} does. {text}"] if alike else [])
