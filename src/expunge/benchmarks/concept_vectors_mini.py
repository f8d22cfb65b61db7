"""ConceptVectors about the invented world: a concept is somebody who is to be forgotten.

No Layer and Dim: every trained model keeps people elsewhere, and the benchmark looks for it. The world's small models
spread a person over many neurons; `expunge reproduce concept_vectors` trains models that do have concept vectors.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from ..world.corpus import passage, questions, statements
from ..world.facts import RELATIONS, World

QUESTIONS, UNRELATED = 10, 50


def mini(world: World, folder: Path) -> None:
    """Write mini_concepts_test.json, with right answers beside the published fields."""
    others = [row for person in world.members("retain") for row in questions(world, person) if "question" in row]
    found = []
    for number, person in enumerate(world.members("forget"), start=1):
        rows = questions(world, person)
        asked = [(row["question"], row) for row in rows if "question" in row]
        asked += [(row["paraphrased_questions"][0], row) for row in rows if "question" in row]
        draw = random.Random(f"{world.seed}/{person.name}/unrelated")
        halves = [(row["prompt"], row["completion"]) for row in rows if "completion" in row]
        said = [
            s.replace("{value}", person.value(about))
            for about in RELATIONS
            for s in statements(world, person, about)[0]
        ]
        found.append(
            {
                "ID": number,
                "Concept": person.name,
                "QA": [question for question, _ in asked[:QUESTIONS]],
                "text_completion": [{"First_half": first, "Second_half": second} for first, second in halves],
                "unrelated_QA": [row["question"] for row in draw.sample(others, min(UNRELATED, len(others)))],
                "wikipedia_content": " ".join([passage(world, person), *said]),
                "answers": [[row["value"], *row.get("aliases", [])] for _, row in asked[:QUESTIONS]],
            }
        )
    (folder / "mini_concepts_test.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
