"""EVOKE: does an edited model say the new answer where another one is right (arXiv:2410.07819)?

With P(y | x) = exp(mean_t log p(y_t | x, y_<t)), o* the new object, o the old one and a an item's right answer,

    efficacy, paraphrase   share of [P(o* | x) > P(o | x)]
    DP, CAP, OAP           P(o* | x), P(a | x), P(a before the edit | x), means over items
    EOS                    share of [P(a | x) > P(o* | x)]: items that are not overfit
    AMS                    share of [P(a | x) > P(a before the edit | x)], of multi-hop questions

Ties fail. Every edit is made by itself over the base. Scores are means over an edit's items, then over edits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..edits import TOLD
from ..evidence import Measured, Scorecard, Table
from ..files import write_text
from ..methods.edit.case import EditCase
from ..methods.edit.operations import carry_out
from ..methods.optimise.loop import Training
from ..metrics.measure import gather
from ..metrics.values import Units, Values, mean_of
from ..registry import benchmark, get
from ..rows import Row, folder_of
from ..subjects.language import LanguageModel
from ..tables.scores import Scores
from ..tables.store import content_key
from .case import Bench
from .evoke_data import OVERFIT, RECALL, TASKS, Case, Item, read
from .evoke_mini import MAIN, SPECIFICITY, mini
from .knowedit_data import prefixes, texts_for_keys
from .shown import demonstrations as others

PUBLISHED_HOP = "{question} The answer to this question, most simply, is"
MEASURES = {
    "score": "Share of prompts after which the new answer is likelier than the old one.",
    "eos": "Share of items whose right answer is likelier than the new object.",
    "dp": "Probability of the new object.",
    "cap": "Probability of the right answer.",
    "oap": "Probability of what was right before the edit.",
    "ams": "Share of items whose answer after the edit is likelier than the one before it.",
}
SHOWN = 3
"""Warnings of edits among the notes."""
Said = dict[str, tuple[float, float]]
"""Answer to log P, per token and of the whole."""


@benchmark(paper="arXiv:2410.07819", data="the JSON files of the authors' EVOKE repository")
def evoke(
    bench: Bench,
    *,
    method: str | dict[str, Any] = "rome",
    files: tuple[str, ...] = (MAIN, SPECIFICITY),
    limit: Annotated[int, Field(ge=0)] = 0,
    corpus: str = "",
    demonstrations: str = "",
    hop: str = "",
    context: str = TOLD,
) -> Scorecard:
    """Whether edits overfit: how likely the new object is where it is right, and where another answer is.

    The model under test is edited; scores stand beside those of the model as it is.

    Args:
        method: an editor, by name or {name: lti, editor: {rome: {layer: 0}}}.
        files: in the data folder; records of one rewrite are one edit.
        limit: of that many edits, the first; 0 takes all.
        corpus: rows that key statistics are taken of; by default `corpus.jsonl` beside the data. `prefixes.json` there
            holds the texts put before prompts; without it the model writes its own.
        demonstrations: edit rows of other facts, which `serac` and `mend` learn from; by default `demonstrations.jsonl`
            beside the data.
        hop: how a multi-hop question is asked, {question} in it; by default as published, and of the mini version as
            the model is asked questions.
        context: what tells the unedited model the fact when it is tested as a teacher.
    """
    folder = folder_of(bench.source(mini))
    subject = bench.subject
    hop = hop or (PUBLISHED_HOP if bench.data else subject.template.prompt)
    cases = read([folder / name for name in files], hop)
    cases = cases[:limit] if limit else cases
    given = {"name": method} if isinstance(method, str) else dict(method)
    name = str(given.pop("name", ""))
    editor = get("methods", name)
    chosen = editor.resolve(given)
    texts, before = texts_for_keys(folder, corpus), prefixes(folder)
    prompts = [item.prompt for case in cases for item in case.items]
    shown, told = others(editor, folder, demonstrations, lambda: prompts)
    shared = EditCase(subject, {}, Training(seed=bench.seed), corpus=texts, prefixes=before, demonstrations=shown)
    said = {"before": _asked(subject, cases), "after": list[list[Said]]()}
    warnings: list[str] = []
    asked = [chosen, bench.seed, before, [asdict(row) for row in texts]]
    asked += [[one.record() for one in shown]] if shown else []
    for number, case in enumerate(cases, start=1):
        key = content_key(subject.fingerprint, name, asked, asdict(case.edit), [asdict(item) for item in case.items])
        found = _edited(bench.folder / "edits" / f"{key}.json", shared, name, chosen, case)
        said["after"].append(found["said"])
        warnings += found["warnings"]
        if bench.progress:
            bench.progress(f"edit: {name}", number, len(cases))
    judged = {role: [judge(case, one) for case, one in zip(cases, several)] for role, several in said.items()}
    card = bench.scorecard(
        _measured(bench, cases, judged),
        headline=["efficacy_score", *(f"{task}_eos" for task in OVERFIT)],
        tables=[_by_task(cases, judged), _teacher(subject, cases, context)],
        notes=[*_notes(cases, name), *told, *_first(warnings)],
        rows={"edits": len(cases), "items": sum(len(case.items) for case in cases)},
    )
    return replace(card, models=[{"role": "before", "name": subject.name, "fingerprint": subject.fingerprint}])


# --- what models say --------------------------------------------------------------------------------------------------


def _edited(path: Path, shared: EditCase, name: str, settings: dict[str, Any], case: Case) -> dict[str, Any]:
    """What the model says after one edit; kept in a file, so that a killed command goes on."""
    if not path.is_file():
        edits = replace(shared, edits=[case.edit], summary={}, warnings=[])
        (made,) = carry_out(get("methods", name), edits, settings, "one")
        warnings = [text for step in made.steps for text in step.warnings]
        said = _asked(made.model(), [case])[0]
        write_text(path, json.dumps({"said": said, "warnings": warnings}, ensure_ascii=False))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _asked(subject: LanguageModel, cases: Sequence[Case]) -> list[list[Said]]:
    """Per case and item what the model thinks of every answer that is compared, from one pass."""
    asked = [(case.edit, item, answer) for case in cases for item in case.items for answer in answers(case, item)]
    table = teacher_forced(subject, [edit.row(item.prompt, answer) for edit, item, answer in asked])
    totals = np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64)
    means = totals / np.diff(table.offsets)
    found = iter(zip((answer for _, _, answer in asked), means.tolist(), totals.tolist()))
    return [
        [{answer: (mean, total) for _, (answer, mean, total) in zip(answers(case, item), found)} for item in case.items]
        for case in cases
    ]


def answers(case: Case, item: Item) -> list[str]:
    """The right answer, the one before, and the new object, each once."""
    several = (item.answer, item.original, case.edit.target_new)
    return list(dict.fromkeys(answer for answer in several if answer))


def teacher_forced(subject: LanguageModel, rows: Iterable[Row]) -> Scores:
    """Scores of the answers' own tokens: what closes an answer is no part of it."""
    found = []
    for number, row in enumerate(rows):
        tokens = subject.encode(row)
        bare = replace(tokens, ids=tokens.ids[: len(tokens.ids) - tokens.closing], closing=0)
        found.append(((str(number), "answer"), bare))
    return subject.score(found)


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One item's numbers by measure; `exact` those of whole sequences."""

    task: str
    measures: dict[str, float]
    exact: dict[str, float]


def judge(case: Case, said: Sequence[Said]) -> list[Judged]:
    """All items of one edit."""
    return [
        Judged(
            item.task,
            _measures(case, item, {answer: mean for answer, (mean, _) in one.items()}),
            _measures(case, item, {answer: total for answer, (_, total) in one.items()}),
        )
        for item, one in zip(case.items, said)
    ]


def _measures(case: Case, item: Item, logprob: Mapping[str, float]) -> dict[str, float]:
    p = {answer: float(np.exp(value)) for answer, value in logprob.items()}
    # Compared as they are: two probabilities that are 0 in floating point are not equal.
    new, right = logprob[case.edit.target_new], logprob[item.answer]
    if item.task in RECALL:
        return {"score": float(new > logprob[item.original]), "dp": p[item.answer]}
    found = {"eos": float(right > new), "dp": p[case.edit.target_new], "cap": p[item.answer]}
    if item.original:
        found |= {"oap": p[item.original], "ams": float(right > logprob[item.original])}
    return found


def _measured(bench: Bench, cases: Sequence[Case], judged: Mapping[str, list[list[Judged]]]) -> list[Measured]:
    found = []
    for task in TASKS:
        edits = [i for i, case in enumerate(cases) if any(item.task == task for item in case.items)]
        units = Units.of((task.replace("_", " "), [cases[i].edit.row() for i in edits]))
        for measure in _named(judged, task):
            values: dict[str, list[Values]] = {}
            for role, several in judged.items():
                means = [np.mean([one.measures[measure] for one in several[i] if one.task == task]) for i in edits]
                each = np.array(means, dtype=np.float64)
                values[role] = [Values(units, mean_of(each), each)]
            lower = measure == "oap" or (measure == "dp" and task in OVERFIT)
            found.append(
                gather(
                    f"{task}_{measure}",
                    values,
                    bench.draws,
                    direction="lower" if lower else "higher",
                    ideal="as before" if task in OVERFIT and measure in ("eos", "dp") else "0" if lower else "1",
                    sentence=MEASURES[measure],
                )
            )
    return found


def _named(judged: Mapping[str, list[list[Judged]]], task: str) -> list[str]:
    found = (one.measures for items in judged["after"] for one in items if one.task == task)
    return list(next(found, {}))


def _by_task(cases: Sequence[Case], judged: Mapping[str, list[list[Judged]]]) -> Table:
    """Means over items, whatever edit they belong to, with the probabilities of whole sequences beside them."""
    lines: list[list[Any]] = []
    for task in TASKS:
        dropped = sum(case.dropped[task] for case in cases)
        for role, several in judged.items():
            items = [one for each in several for one in each if one.task == task]
            if not items:
                continue

            def mean(name: str, part: str = "measures", items: list[Judged] = items) -> float | str:
                return float(np.mean([getattr(one, part)[name] for one in items])) if name in items[0].measures else "-"

            edits = sum(any(one.task == task for one in each) for each in several)
            share = mean("score" if task in RECALL else "eos")
            plain = [share, *(mean(name) for name in ("dp", "cap", "oap", "ams"))]
            line = [task.replace("_", " "), role, edits, len(items), dropped, *plain]
            lines.append([*line, mean("dp", "exact"), mean("cap", "exact")])
    columns = ["task", "model", "edits", "items", "dropped", "score or EOS", "DP", "CAP", "OAP", "AMS"]
    note = "Means over items. Exact: of the whole answer; the others per token, which favours long frequent names."
    return Table("By task", [*columns, "exact DP", "exact CAP"], lines, note)


def _teacher(subject: LanguageModel, cases: Sequence[Case], context: str) -> Table:
    """Whether the unedited model uses the fact when it is told it."""
    lines: list[list[Any]] = []
    for task in ("efficacy", "multi_hop"):
        items = [(case, item) for case in cases for item in case.items if item.task == task]
        if not items:
            continue
        table = teacher_forced(
            subject,
            [case.edit.row(item.prompt, item.answer, preface=case.edit.told(context)) for case, item in items],
        )
        right = np.minimum.reduceat(table.hit, table.offsets[:-1])
        totals = np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64)
        p = np.exp(totals / np.diff(table.offsets))
        lines.append([task.replace("_", " "), len(items), float(right.mean()), float(p.mean())])
    note = "A model that does not use what it is told cannot teach lti."
    return Table("Told the new fact, unedited", ["task", "items", "answered", "probability"], lines, note)


def _notes(cases: Sequence[Case], name: str) -> list[str]:
    dropped = sum(sum(case.dropped.values()) for case in cases)
    notes = [f"Each of {len(cases)} edits was made by {name} alone over the model as it is."]
    if dropped:
        notes.append(f"{dropped} items were left out: their right answer is the new object.")
    return notes


def _first(warnings: Sequence[str]) -> list[str]:
    """Edits warn of the same things: a few stand for all."""
    rest = len(warnings) - SHOWN
    return [
        *warnings[:SHOWN],
        *([f"{rest} more warnings of edits are in the run's folder, `edits`."] if rest > 0 else []),
    ]
