"""Edits one after another: what is left of the first, and of everything else, after 1, 10 and 100.

Gupta et al., Model editing at scale leads to gradual and catastrophic forgetting, arXiv:2401.07453. AlphaEdit
(2410.02355), GRACE (2211.11031) and WISE (2405.14768) claim to stand it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..evidence import Table
from ..methods.edit.operations import Edited
from ..registry import reproduction
from ..subjects.language import weights_fingerprint
from .case import Case, Claim, Findings, Row, number, spread
from .editing import made, measured, subject, undone

EDITORS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 0},
    "memit": {"layers": [0, 1], "weight": 100.0},
    "alphaedit": {"layers": [0, 1]},
    "ft_m": {"layer": 0, "learning_rate": 5e-3},
    "ft_l": {"layer": 0, "learning_rate": 5e-3},
    "lora_edit": {"steps": 20},
    "grace": {"layer": 2},
    "wise": {"layer": 2, "steps": 40},
    "ike": {},
}
COLUMNS = {
    "success": "success",
    "rephrase": "paraphrase",
    "kept": "unchanged beside",
    "others": "facts of people never edited",
}


def trial(
    editor: str, settings: dict[str, Any], counts: list[int], seed: int, world: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One sequence, measured after so many edits, over all that were made up to there; and whether it can be undone."""
    case = subject(seed, world)
    before = weights_fingerprint(case.model.model)
    (edited,) = made(case, editor, settings, case.edits(max(counts)), "sequence", seed)
    points = []
    for count in counts:
        part = Edited(edited.base, edited.steps[:count])
        model = part.model()
        kept = measured(model, case.model, case.others())["success"]
        points.append({"edits": count, **measured(model, case.model, part.edits), "others": kept})
    restored = undone(case, [edited]) and weights_fingerprint(case.model.model) == before
    return {"points": points, "restored": restored}


@reproduction(paper="arXiv:2401.07453", cost="6 min on one core, and 2 once for the models of the worlds")
def sequential_edits(case: Case, *, few: int = 10, many: int = 100, world: dict[str, Any] | None = None) -> Findings:
    """Success, locality and what is left of the rest after 1, 10 and 100 edits, by nine editors; undone to the last
    bit.

    `few` edits on every seed, `many` on the first alone. `world`: sizes of the invented world.
    """
    grid = [{"editor": name, "settings": settings, "world": world} for name, settings in EDITORS.items()]
    first, rest = replace(case, seeds=case.seeds[:1]), replace(case, seeds=case.seeds[1:])
    found = first.trials(trial, [{**one, "counts": [1, few, many]} for one in grid])
    found += rest.trials(trial, [{**one, "counts": [1, few]} for one in grid])
    case.seconds += first.seconds + rest.seconds
    rows = [{"editor": run["editor"], "seed": run["seed"], **point} for run in found for point in run["points"]]
    tables = [
        Table(
            title,
            ["editor", *(f"{n} edit{'s' if n > 1 else ''}" for n in (1, few, many))],
            [[name, *(_cell(rows, column, name, n) for n in (1, few, many))] for name in EDITORS],
            f"Mean over {len(case.seeds)} seeds (least to most); {many} edits: the first seed.",
        )
        for column, title in COLUMNS.items()
    ]
    return Findings(judge(rows, all(run["restored"] for run in found), len(found), few, many), tables, NOTES)


def _cell(rows: list[Row], column: str, editor: str, edits: int) -> str:
    found = spread(rows, column, editor=editor, edits=edits)
    return str(found) if len(found.values) > 1 else number(found.mean)


def judge(rows: list[Row], restored: bool, runs: int, few: int, many: int) -> list[Claim]:
    def mean(editor: str, column: str, edits: int) -> float:
        return spread(rows, column, editor=editor, edits=edits).mean

    def curve(editor: str, *columns: str) -> str:
        said = [" / ".join(number(mean(editor, column, n)) for column in columns) for n in (1, few, many)]
        return f"{editor}: " + ", ".join(f"{text} after {n}" for text, n in zip(said, (1, few, many)))

    grace = [mean("grace", name, n) for name in ("success", "kept") for n in (few, many)]
    return [
        Claim(
            "Weight edits made one after another first fade, then break the model.",
            "ROME on GPT2-XL loses earlier edits gradually and breaks within hundreds of edits.",
            f"ROME after {many} edits: success and facts of people never edited both at least 0.3 below those after 1.",
            curve("rome", "success", "others"),
            all(mean("rome", name, 1) - mean("rome", name, many) >= 0.3 for name in ("success", "others")),
        ),
        Claim(
            "AlphaEdit stands sequences that ROME does not.",
            "2000 edits of Llama-3-8B: AlphaEdit keeps an efficacy of 99 and general abilities, ROME does not.",
            f"After {many} edits success and facts of people never edited both at least 0.1 above ROME's.",
            curve("alphaedit", "success", "others"),
            all(mean("alphaedit", name, many) - mean("rome", name, many) >= 0.1 for name in ("success", "others")),
        ),
        Claim(
            "A codebook (GRACE) keeps every edit and everything else, and generalises to nothing.",
            "Thousands of edits of T5 and BERT with retention near 1.",
            f"After {few} and {many} edits success >= 0.9 and unchanged beside >= 0.99; paraphrase <= 0.2.",
            curve("grace", "success", "kept", "rephrase"),
            min(grace[:2]) >= 0.9 and min(grace[2:]) >= 0.99 and mean("grace", "rephrase", many) <= 0.2,
        ),
        Claim(
            "A side memory (WISE) has reliability, generalisation and locality at once.",
            "1000 edits of Llama-2-7B on ZsRE: 77 / 72 / 100.",
            f"After {many} edits success >= 0.7, paraphrase >= 0.5 and facts of people never edited >= 0.95.",
            curve("wise", "success", "rephrase", "others"),
            mean("wise", "success", many) >= 0.7
            and mean("wise", "rephrase", many) >= 0.5
            and mean("wise", "others", many) >= 0.95,
        ),
        Claim(
            "Every editor's edits can be undone to the last bit (ours).",
            "The peers' editors return closures, copies or nothing to undo with.",
            "With all edits undone the model is the base, whose weights hash as before, in every run.",
            f"{runs} runs, {'all' if restored else 'not all'} restored",
            restored,
        ),
    ]


NOTES = [
    "Edits are of everybody's first fact before anybody's second (28 retained people of the invented world). Scores "
    "are taken after the last edit over all edits up to there, so that what later ones undid shows. What is beside an "
    "edit are the person's facts that no edit of the sequence is about, and the same fact of others; 18 people are "
    "never edited.",
    "Settings are those of `easyedit`; MEMIT's weight is its middle one. 1000 edits are more facts than the world has.",
    "The world's models never met a text that contradicts what they know: what `ike` tells them they do not repeat.",
]
