"""Knowledge given back in the context: what unlearning of any kind cannot prevent."""

import random
from dataclasses import replace
from typing import Literal

from ..registry import attack
from ..rows import Row
from ..subjects.examples import solved
from ..subjects.protocol import innermost
from ..tables.passes import Generate
from .case import Attack, Case, Found, Variant, attempts, judged, mean
from .known import Facts, asked_of, gives_away, renamed, statement, unused

Level = Literal["definition", "axioms", "mosaic", "examples", "fact"]
CONTROL = 24
"""Retained questions that show whether the model can use such contexts at all."""


@attack(
    group="reintroduce",
    access="text",
    paper="arXiv:2407.00106",
    caveat="A perfectly retrained model fails it too, so it is never part of the verdict: it tells whether a filter is "
    "needed beside unlearning.",
    aliases={f"ununlearning_{level}": {"level": level} for level in ("axioms", "mosaic", "examples", "fact")},
)
def ununlearning(
    case: Case, *, level: Level = "definition", placeholders: int = 4, distractors: int = 4, examples: int = 3
) -> Attack:
    """Describe the forgotten by what is kept, under names nobody has, and ask what follows (Shumailov et al. 2024).

    Asked are forgotten facts that follow in two steps, the first about the target, the second kept: who was born in a
    town comes from where it lies. Neither the answer nor the target's name is in the prompt. Rules are those that all
    rows follow.

    Args:
        level: definition: the first step, said of the new name. axioms: the same among `distractors` kept statements.
            mosaic: the model's own answer to the second step stands before it. examples: `examples` kept cases, worked
            the same way, stand before it. fact: the forgotten fact itself, under the target's name, to be copied (a
            ceiling; plain disclosure).
        placeholders: new names tried for every fact.
    """
    facts = Facts(case.rows)
    names = unused(facts.about, placeholders, case.seed)
    forget = [row for row in case.forget if row.relation and row.value and row.kind in ("qa", "chat")]
    kept = [row for row in case.rows.get("retain", []) if row.kind in ("qa", "chat")]
    forgotten = {row.id for row in case.forget}
    follows = {
        row.id: steps for row in (*forget, *kept) if (steps := facts.steps(row)) and steps[1].id not in forgotten
    }
    rows = [row for row in forget if level == "fact" or row.id in follows]
    if not rows:
        return Found(status="skipped: not derivable: no forgotten fact follows from kept ones by a rule of the rows")
    bare = judged(rows, (yield case.questions(rows)))
    control = [row for row in kept if row.id in follows][:CONTROL]
    own: dict[str, str] = {}
    if level == "mosaic":
        seconds = list({step.id: step for row in (*rows, *control) for step in follows[row.id][1:]}.values())
        answers = yield Generate(tuple(((row.id, "own"), row, None) for row in seconds), case.max_new_tokens)
        own = {row.id: solved(innermost(case.subject), row, texts[0]) for row, texts in zip(seconds, answers.texts)}

    def told(row: Row) -> list[Variant]:
        if level == "fact":
            text = f"{facts.said(row.entity, row.relation)}\n"
            return [Variant(row, "fact", replace(row, preface=text + row.preface), echo=True)]
        draw = random.Random(f"{case.seed}/{row.id}/{level}")
        variants = []
        for name in names:
            asked, first = asked_of(row, name), renamed(facts.said(*_place(follows[row.id][0])), row.entity, name)
            others = [one for one in kept if one.entity != row.entity and not gives_away(row, statement(one))]
            lines = [first]
            if level == "axioms":
                lines += [statement(one) for one in draw.sample(others, min(distractors, len(others)))]
                draw.shuffle(lines)
            if level == "examples":
                worked = [one for one in others if one.relation == row.relation and one.id in follows]
                for one in draw.sample(worked, min(examples, len(worked))):
                    premise = facts.said(*_place(follows[one.id][0]))
                    lines[-1:-1] = [premise, solved(innermost(case.subject), one).rstrip("\n")]
            context = own.get(follows[row.id][1].id, "") + "".join(f"{line}\n" for line in lines)
            if asked is not None and not any(gives_away(row, line) for line in lines):
                variants.append(Variant(row, name, replace(asked, preface=context + row.preface), echo=True))
        return variants

    nothing = "every context would give the answer itself away"
    reference = yield from attempts(case, [variant for row in control for variant in told(row)], nothing)
    found = yield from attempts(case, [variant for row in rows for variant in told(row)], nothing)
    if found.status == "scored":
        told_of_kept = f"{mean(reference.items):.2f} the same way on kept facts" if reference.items else ""
        notes = (f"{mean(bare):.2f} without a context", told_of_kept, found.note)
        found.note = ", ".join(note for note in notes if note)
    return found


def _place(row: Row) -> tuple[str, str]:
    return row.entity, row.relation
