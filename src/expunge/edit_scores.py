"""What edits did: success, rephrasings, portability, locality and fluency, as KnowEdit (arXiv:2401.01286) does.

    acc(f; x, y)   share of y's tokens that are f's first choice after x and the tokens before (teacher-forced)
    edit success   acc(after; prompt, target)               rephrase  the same for other wordings
    portability    acc(after; x, y) for what follows from the new fact
    locality       share of y's tokens at which after and before choose alike, whatever they choose
    fluency        n-gram entropy of the prompt and a sampled continuation

Per edit the mean over sub-types of means over their prompts; then over the edits that have any. Teacher forcing knows
the beginning of the answer and flatters (arXiv:2502.11177): what models write by themselves stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .edits import EditRow
from .evidence import Measured, Scorecard, Table
from .metrics.bootstrap import Bootstrap
from .metrics.means import harmonic_mean
from .metrics.measure import gather
from .metrics.texts import text_entropy
from .metrics.values import Units, Values, mean_of
from .subjects.packed import LOGIT_ELEMENTS, TOKEN_BUDGET, Encoded, batches, in_order, pack

Progress = Callable[[int, int], None]
SETS = ("edit_success", "rephrase", "portability", "locality")
SENTENCES = {
    "edit_success": "How much of the new answer the model says when asked in the edit's own words.",
    "rephrase": "How much of it the model says when asked in other words.",
    "portability": "How much the model says of what follows from the new fact.",
    "locality": "How often the model still chooses what it chose before, where nothing was to change.",
    "written": "How often the new answer is what the model writes when asked in the edit's own words.",
    "written_rephrase": "How often the new answer is what the model writes when asked in other words.",
    "written_portability": "How often the model writes what follows from the new fact.",
    "fluency": "How varied the model's sentences are, in bits; a low value means that it repeats itself.",
    "words": "How many words the model's sampled sentences have beyond the prompt; short ones vary little.",
}
WORDS: dict[str, dict[str, Any]] = {
    name: {
        "direction": "higher",
        "ideal": "as before" if name in ("fluency", "words") else "1",
        "sentence": sentence,
    }
    for name, sentence in SENTENCES.items()
}
"""What `gather` is told of each score."""
SPARE = 4
"""Tokens that a written answer may be longer than the longest wanted one."""


@dataclass(frozen=True)
class Question:
    """One thing that is asked about one edit."""

    edit: int
    part: str
    """A name of `SETS`."""
    kind: str
    """The sub-type: neighbourhood, one_hop ...; "" for the edit itself."""
    prompt: str
    answers: tuple[str, ...]


@dataclass
class Answers:
    """What one model said to every question."""

    chosen: list[list[np.ndarray]]
    """Per question and alternative answer: the model's first choice at each of its tokens."""
    accuracy: list[float]
    """Per question: share of tokens it chose right, of the best alternative."""
    written: list[str]
    """Per question what it wrote by itself; "" where it was not asked to (locality)."""
    entropy: list[float]
    """Per edit, of prompts with their sampled continuations."""
    words: list[float] = field(default_factory=list)
    """Per edit, of the continuations."""


Keep = Callable[[str, Sequence[EditRow], Callable[[], Any], Callable[[Any], Answers]], Answers]


def questions(edits: Sequence[EditRow]) -> list[Question]:
    """Everything that is asked."""
    found = []
    for number, edit in enumerate(edits):
        found.append(Question(number, "edit_success", "", edit.prompt, (edit.target_new,)))
        found += [Question(number, "rephrase", "", text, (edit.target_new,)) for text in edit.rephrasings]
        for part, probes in (("portability", edit.portability), ("locality", edit.locality)):
            for kind, several in probes.items():
                found += [Question(number, part, kind, probe.prompt, probe.answers) for probe in several]
    return found


def ask(
    subject: Any,
    edits: Sequence[EditRow],
    asked: Sequence[Question],
    *,
    fluency: int = 100,
    writes: bool = True,
    seed: int = 0,
) -> Answers:
    """All questions to one model: one teacher-forced pass over what they share, and one writing of all answers.

    Args:
        fluency: tokens of the sampled continuation; 0 asks for none.
        writes: whether answers are written, too.

    Raises:
        RowError: a question does not fit the model.
    """
    rows, places = list[Encoded](), list[tuple[int, int]]()
    for number, one in enumerate(asked):
        for alternative, answer in enumerate(one.answers):
            tokens = subject.encode(edits[one.edit].row(one.prompt, answer))
            rows.append(Encoded(tokens.ids[: len(tokens.ids) - tokens.closing], tokens.start, 0, answer))
            places.append((number, alternative))
    chosen: list[list[np.ndarray]] = [[np.zeros(0)] * len(one.answers) for one in asked]
    accuracy = [0.0] * len(asked)
    for (number, alternative), row, choice in zip(places, rows, first_choices(subject, rows)):
        chosen[number][alternative] = choice
        right = float((choice == np.array(row.ids[row.start :])).mean())
        accuracy[number] = max(accuracy[number], right)
    written = [""] * len(asked)
    wanted = [i for i, one in enumerate(asked) if one.part != "locality"] if writes else []
    longest = max((row.scored for row in rows), default=1) + SPARE
    prompts = [
        ((str(i), asked[i].part), subject.prompt_text(edits[asked[i].edit].row(asked[i].prompt))) for i in wanted
    ]
    for i, texts in zip(wanted, subject.generate(prompts, max_new_tokens=longest).texts):
        written[i] = texts[0]
    entropy, words = list[float](), list[float]()
    if fluency:
        started = [edit.generation or (edit.prompt,) for edit in edits]
        about = [
            ((edit.id, f"fluency {i}"), subject.prompt_text(edit.row(text)))
            for edit, several in zip(edits, started)
            for i, text in enumerate(several)
        ]
        said = subject.generate(about, max_new_tokens=fluency, temperature=1.0, seed=seed).texts
        written_on = iter([found[0] for found in said])
        for several in started:
            mine = [(text, next(written_on)) for text in several]
            # As published: of the whole text. What a guard puts before it is no part of that.
            entropy.append(float(np.mean([text_entropy(f"{begun} {text}") for begun, text in mine])))
            words.append(float(np.mean([len(text.split()) for _, text in mine])))
    return Answers(chosen, accuracy, written, entropy, words)


def compared(
    before: Any,
    made: Sequence[Any],
    *,
    fluency: int = 100,
    seed: int = 0,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> tuple[list[EditRow], list[Question], dict[str, Answers]]:
    """Edits, questions and what the models before and after them answer.

    Args:
        made: changed models: each has `edits` and gives its `model()`. It is asked about its own edits.
        keep: called with the model's role, edits, what makes the model and what asks it; may know the answers already.
    """
    edits: list[EditRow] = [one for found in made for one in found.edits]
    asked = questions(edits)

    def take(role: str, several: Sequence[EditRow], model: Callable[[], Any], own: Sequence[Question]) -> Answers:
        def inquire(subject: Any) -> Answers:
            return ask(subject, several, own, fluency=fluency, seed=seed)

        return inquire(model()) if keep is None else keep(role, several, model, inquire)

    first = take("before", edits, lambda: before, asked)
    after = Answers([], [], [], [])
    start = 0
    for number, found in enumerate(made, start=1):
        mine = range(start, start + len(found.edits))
        start = mine.stop
        own = [replace(one, edit=one.edit - mine.start) for one in asked if one.edit in mine]
        said = take("after", found.edits, found.model, own)
        for name in ("chosen", "accuracy", "written", "entropy", "words"):
            getattr(after, name).extend(getattr(said, name))
        if progress:
            progress(number, len(made))
    return edits, asked, {"before": first, "after": after}


@torch.no_grad()
def first_choices(subject: Any, rows: Sequence[Encoded]) -> list[np.ndarray]:
    """Per row the likeliest token at each place of its answer, after the answer's own tokens before it."""
    groups = list(batches(rows, TOKEN_BUDGET))
    size = max(1, LOGIT_ELEMENTS // subject.vocabulary)
    parts = []
    for group in groups:
        pack_ = pack([rows[i] for i in group], subject.device)
        first, at = pack_.distinct
        states = subject.hidden_states(pack_)[first]
        best = torch.cat([subject.head(chunk).argmax(-1) for chunk in states.split(size)])[at]
        parts.append([part.cpu().numpy() for part in best.split([rows[i].scored for i in group])])
    return in_order(groups, parts)


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether a written text begins with one of the answers, whatever the case, as whole words."""
    words = " ".join(text.casefold().split())
    wanted = [" ".join(answer.casefold().split()) for answer in answers]
    return any(words.startswith(one) and not words[len(one) : len(one) + 1].isalnum() for one in wanted)


def scores(
    edits: Sequence[EditRow],
    asked: Sequence[Question],
    answers: dict[str, Answers],
    *,
    models: list[dict[str, str]],
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scorecard:
    """The scorecard: what both models said, in numbers with intervals over subjects.

    Args:
        answers: of `before` and `after`, to the same questions.
    """
    draws = Bootstrap(bootstrap, seed)
    measured: list[Measured] = []
    columns: dict[str, dict[int, float]] = {}
    for name, each in by_edit(asked, answers).items():
        kept = sorted(each["after"])
        columns[name] = each["after"]
        rows = [edits[i].row() for i in kept]
        found = {}
        for role, values in each.items():
            array = np.array([values[i] for i in kept], dtype=np.float64)
            found[role] = [Values(Units.of(("edits", rows)), mean_of(array), array)]
        measured.append(gather(name, found, draws, **WORDS[name]))
    notes = [
        "Teacher-forced scores know the answer's beginning and flatter; the written ones are what a user would see.",
    ]
    if all(name in columns for name in SETS):
        parts = np.array([[np.mean(list(columns[name].values())) for name in SETS]])
        notes.append(
            f"Harmonic mean of success, rephrase, portability and locality (ours): {harmonic_mean(parts)[0]:.3f}."
        )
    return Scorecard(
        models=models,
        measured=measured,
        headline=[name for name in ("edit_success", "rephrase", "locality", "portability") if name in columns],
        tables=[*by_kind(asked, answers), _by_edit(edits, asked, answers, columns)],
        notes=notes,
        rows={"edits": len(edits), "questions": len(asked)},
        data="edits",
        cost={},
    )


def by_edit(asked: Sequence[Question], answers: dict[str, Answers]) -> dict[str, dict[str, dict[int, float]]]:
    """Score to role to edit to value; scores that nothing was asked for are left out.

    Args:
        answers: of `before` and `after`, to the same questions.
    """
    before = answers["before"]
    found: dict[str, dict[str, dict[int, float]]] = {}
    for part in SETS:
        for role, said in answers.items():
            alike = part == "locality"
            values = [_alike(a[0], b[0]) for a, b in zip(before.chosen, said.chosen)] if alike else said.accuracy
            found.setdefault(part, {})[role] = _per_edit(asked, part, values)
    for part, name in zip(SETS[:3], ("written", "written_rephrase", "written_portability")):
        for role, said in answers.items():
            right = [float(says(text, q.answers)) for text, q in zip(said.written, asked)]
            found.setdefault(name, {})[role] = _per_edit(asked, part, right)
    found["fluency"] = {role: dict(enumerate(said.entropy)) for role, said in answers.items()}
    found["words"] = {role: dict(enumerate(said.words)) for role, said in answers.items()}
    return {name: each for name, each in found.items() if each["after"]}


def _alike(before: np.ndarray, after: np.ndarray) -> float:
    return float((before == after).mean())


def _per_edit(asked: Sequence[Question], part: str, values: Sequence[float]) -> dict[int, float]:
    """Per edit the mean over sub-types of means over prompts."""
    found: dict[int, dict[str, list[float]]] = {}
    for one, value in zip(asked, values):
        if one.part == part:
            found.setdefault(one.edit, {}).setdefault(one.kind, []).append(value)
    return {edit: float(np.mean([np.mean(several) for several in kinds.values()])) for edit, kinds in found.items()}


def by_kind(asked: Sequence[Question], answers: dict[str, Answers]) -> list[Table]:
    rows = []
    for part, kind in dict.fromkeys((one.part, one.kind) for one in asked if one.kind):
        at = [i for i, one in enumerate(asked) if (one.part, one.kind) == (part, kind)]
        if part == "locality":
            alike = [_alike(answers["before"].chosen[i][0], answers["after"].chosen[i][0]) for i in at]
            rows.append([part, kind, len(at), 1.0, float(np.mean(alike))])
        else:
            rows.append([part, kind, len(at), *(float(np.mean([a.accuracy[i] for i in at])) for a in answers.values())])
    return [Table("By sub-type", ["score", "sub-type", "prompts", *answers], rows)] if rows else []


def _by_edit(
    edits: Sequence[EditRow],
    asked: Sequence[Question],
    answers: dict[str, Answers],
    columns: dict[str, dict[int, float]],
) -> Table:
    shown = [name for name in SETS if name in columns]
    rows = []
    for number, edit in enumerate(edits):
        at = next(i for i, one in enumerate(asked) if one.edit == number)
        said = [answers[role].written[at] for role in ("before", "after")]
        rows.append([edit.id, edit.prompt, edit.target_new, *said, *(columns[n].get(number, "-") for n in shown)])
    heads = ["edit", "prompt", "target", "wrote before", "writes", *(name.replace("_", " ") for name in shown)]
    return Table("By edit", heads, rows)
