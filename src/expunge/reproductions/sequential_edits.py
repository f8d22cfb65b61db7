"""Edits one after another: what is left of the first, and of everything else, as their number grows.

Gupta et al., Model editing at scale leads to gradual and catastrophic forgetting, arXiv:2401.07453. AlphaEdit
(2410.02355), GRACE (2211.11031) and WISE (2405.14768) claim to stand it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..edits import EditRow
from ..evidence import Table
from ..methods.edit.operations import Step
from ..registry import reproduction
from ..subjects.language import weights_fingerprint
from .case import Case, Claim, Findings, Row, number, spread
from .editing import made, measured, subject, undone
from .figures import figure

EDITORS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 0},
    "memit": {"layers": [0, 1], "weight": 100.0},
    "alphaedit": {"layers": [0, 1]},
    "ft_m": {"layer": 0, "learning_rate": 5e-3},
    "ft_l": {"layer": 0, "learning_rate": 5e-3},
    "lora_edit": {"steps": 20},
    "ultraedit": {"learning_rate": 3e-3},
    "mend": {"steps": 200, "batch": 4, "c_edit": 1.0},
    "grace": {"layer": 2},
    "wise": {"layer": 2, "steps": 40},
    "steer": {"layer": 2},
    "ike": {},
    "serac": {},
}
SLOW = ("lora_edit", "wise", "ft_l")
"""Editors whose edits cost most; they stop earlier."""
COLUMNS = {
    "success": "success",
    "rephrase": "paraphrase",
    "kept": "unchanged beside",
    "others": "facts of people never edited",
}
COST = "milliseconds"
ASKED = 200
"""Edits that are asked about at most."""


def sampled(edits: Sequence[EditRow], seed: int) -> Sequence[EditRow]:
    """At most `ASKED` of the edits, by the seed."""
    if len(edits) <= ASKED:
        return edits
    return [edits[i] for i in sorted(random.Random(seed).sample(range(len(edits)), ASKED))]


def trial(
    editor: str, settings: dict[str, Any], counts: list[int], seed: int, people: int = 375, broken: float = 0.2
) -> dict[str, Any]:
    """One sequence, measured on its way after so many edits, over those that were made; and whether it can be undone.

    It ends early where the model answers less than the share `broken` both of the edits and of the facts of people
    never edited.
    """
    case = subject(seed, people)
    before = weights_fingerprint(case.model.model)
    steps: tuple[Step, ...] = ()
    memory, points = dict[str, Any](), list[dict[str, Any]]()
    for count in counts:
        edits, began = case.edits(count), time.process_time()
        (edited,) = made(case, editor, settings, edits, "sequence", seed, done=steps, memory=memory)
        cost = 1000 * (time.process_time() - began) / (count - len(steps))
        steps, model = edited.steps, edited.model()
        found = measured(model, case.model, sampled(edits, seed))
        found["others"] = measured(model, case.model, case.others())["success"]
        points.append({"edits": count, **found, COST: cost})
        if max(found["success"], found["others"]) < broken:
            break
    restored = undone(case, [edited]) and weights_fingerprint(case.model.model) == before
    return {"points": points, "restored": restored}


@reproduction(paper="arXiv:2401.07453", cost="25 min on one core, and 26 once for the models of the worlds")
def sequential_edits(
    case: Case,
    *,
    counts: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000),
    shared: int = 10,
    people: int = 375,
    broken: float = 0.2,
    slow: int = 100,
) -> Findings:
    """Success, locality and what is left of the rest over 1 to 1000 edits, by every editor; undone to the last bit.

    Every seed goes on to the last of `counts` that is at most `shared`, the first seed to the end. `people`: of the
    world of editing. `broken`: a sequence ends where less than this share both of its edits and of the facts of people
    never edited is answered; 0 ends none. `slow`: edits that the three slowest editors make at most.
    """
    common = {"people": people, "broken": broken}
    grid = [{"editor": name, "settings": settings, **common} for name, settings in EDITORS.items()]
    first, rest = replace(case, seeds=case.seeds[:1]), replace(case, seeds=case.seeds[1:])
    found = list[Row]()
    for some, most in ((first, max(counts)), (rest, shared)):
        found += some.trials(
            trial, [{**one, "counts": _counts(str(one["editor"]), counts, most, slow)} for one in grid]
        )
    case.seconds += first.seconds + rest.seconds
    rows = [{"editor": run["editor"], "seed": run["seed"], **point} for run in found for point in run["points"]]
    note = f"Mean over {len(case.seeds)} seeds (least to most)" if len(case.seeds) > 1 else "One seed"
    note += f"; more than {shared} edits: the first seed." if max(counts) > shared and len(case.seeds) > 1 else "."
    if any(_last(rows, name) < max(counts) for name in EDITORS):
        note += " -: not made; the notes say why."
    tables = [_table(rows, column, title, counts, note) for column, title in COLUMNS.items()]
    cost = "CPU time of an edit, of those since the measurement before. The first takes the statistics of the corpus."
    tables.append(_table(rows, COST, "milliseconds per edit", counts, cost))
    curves = figure(
        rows,
        "curves",
        "Over the number of edits",
        COLUMNS,
        run="editor",
        at="edits",
        x="edits made",
        y="share of answers",
        logarithmic=True,
        note=f"{note} Bars: least to most. Editors stand side by side where they agree.",
    )
    restored = all(run["restored"] for run in found)
    return Findings(
        judge(rows, restored, len(found), counts), tables, [*NOTES, *_ending(broken, slow, max(counts))], [curves]
    )


def _counts(editor: str, counts: Sequence[int], most: int, slow: int) -> list[int]:
    """Numbers of edits after which an editor is measured."""
    return [count for count in counts if count <= (min(most, slow) if editor in SLOW else most)]


def _table(rows: Sequence[Row], column: str, title: str, counts: Sequence[int], note: str) -> Table:
    heads = ["editor", *(f"{n} edit{'s' if n > 1 else ''}" for n in counts)]
    return Table(title, heads, [[name, *(_cell(rows, column, name, n) for n in counts)] for name in EDITORS], note)


def _cell(rows: Sequence[Row], column: str, editor: str, edits: int) -> str:
    if edits > _last(rows, editor):
        return "-"
    found = spread(rows, column, editor=editor, edits=edits)
    return str(found) if len(found.values) > 1 else number(found.mean)


def _last(rows: Sequence[Row], editor: str) -> int:
    """How many edits an editor made."""
    return max(row["edits"] for row in rows if row["editor"] == editor)


def judge(rows: Sequence[Row], restored: bool, runs: int, counts: Sequence[int]) -> list[Claim]:
    """The claims. After more edits than an editor made its model counts as it was when its sequence ended."""
    first, last = counts[0], counts[-1]

    def mean(editor: str, column: str, edits: int) -> float:
        return spread(rows, column, editor=editor, edits=min(edits, _last(rows, editor))).mean

    def curve(editor: str, *columns: str) -> str:
        kept = [n for n in counts if n <= _last(rows, editor)]
        said = [" / ".join(number(mean(editor, column, n)) for column in columns) for n in kept]
        ended = ", where it ended" if kept[-1] < last else ""
        return f"{editor}: " + ", ".join(f"{text} after {n}" for text, n in zip(said, kept)) + ended

    return [
        Claim(
            "Weight edits made one after another first fade, then break the model.",
            "ROME on GPT2-XL loses earlier edits gradually and breaks within hundreds of edits.",
            f"ROME after {_last(rows, 'rome')} edits: success and facts of people never edited both at least 0.3 below "
            f"those after {first}.",
            curve("rome", "success", "others"),
            all(mean("rome", name, first) - mean("rome", name, last) >= 0.3 for name in ("success", "others")),
        ),
        Claim(
            "AlphaEdit stands sequences that ROME does not.",
            "2000 edits of Llama-3-8B: AlphaEdit keeps an efficacy of 99 and general abilities, ROME does not.",
            f"After {last} edits success and facts of people never edited both at least 0.1 above ROME's.",
            curve("alphaedit", "success", "others"),
            all(mean("alphaedit", name, last) - mean("rome", name, last) >= 0.1 for name in ("success", "others")),
        ),
        Claim(
            "A codebook (GRACE) keeps every edit and everything else, and generalises to nothing.",
            "Thousands of edits of T5 and BERT with retention near 1.",
            f"Success >= 0.9 and unchanged beside >= 0.99 after every number of edits; paraphrase <= 0.2 after {last}.",
            curve("grace", "success", "kept", "rephrase"),
            all(mean("grace", "success", n) >= 0.9 and mean("grace", "kept", n) >= 0.99 for n in counts)
            and mean("grace", "rephrase", last) <= 0.2,
        ),
        Claim(
            "A side memory (WISE) has reliability, generalisation and locality at once.",
            "1000 edits of Llama-2-7B on ZsRE: 77 / 72 / 100.",
            f"After {_last(rows, 'wise')} edits success >= 0.7, paraphrase >= 0.5 and facts of people never edited >= "
            "0.95.",
            curve("wise", "success", "rephrase", "others"),
            mean("wise", "success", last) >= 0.7
            and mean("wise", "rephrase", last) >= 0.5
            and mean("wise", "others", last) >= 0.95,
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
    "Edits are of everybody's first fact before anybody's second. After so many edits all of them are asked about, of "
    f"more than {ASKED} a sample of {ASKED} drawn by the seed, so that what later edits undid of earlier ones shows. "
    "What is beside an edit are the person's facts that none of the edits made is about, and the same fact of four "
    "others; of the people whom no edit is ever about all facts are asked.",
    "A measurement is that of the model with the steps made so far; a sequence that goes on behind it comes to the "
    "same bits as one that was never interrupted.",
    "Settings are those of `easyedit`; MEMIT's weight is its middle one. ROME, MEMIT and AlphaEdit have the published "
    "25 steps, rates and clamps behind five sentences, GRACE its 50 steps.",
    "MEND and SERAC are trained on the facts of a sixth of the people, who are asked about nowhere. MEND's weight of "
    "the edit, its steps and UltraEdit's rate were chosen on models of the invented world: the published ones are for "
    "models of billions of weights.",
]


def _ending(broken: float, slow: int, most: int) -> list[str]:
    """Why some sequences are shorter."""
    found = list[str]()
    if broken > 0:
        found.append(
            f"A sequence ends where the model answers less than {number(broken)} both of its edits and of the facts of "
            "people never edited: nothing is left that more edits could break. `--set broken=0` ends none."
        )
    if slow < most:
        found.append(
            f"The three editors whose edits cost most ({', '.join(SLOW)}) stop after {slow} edits, so that the command "
            f"stays within its time; `--set slow={most}` has them go on."
        )
    return found
