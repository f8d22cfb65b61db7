"""Direct preference optimisation towards plausible other answers."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ...errors import ParameterError, RowError
from ...registry import optimise
from ...rows import Source, read_rows
from .alternates import written
from .terms import RetainTerm, Step, preference
from .unlearn import Preparation

SHOWN = 5
"""Rows whose written alternatives are in the report."""


def _prepare(case: Preparation) -> None:
    """Put the alternatives beside their rows: the first of every row, then the second of every row, and so on."""
    path, rows = case.settings["alternates"], case.data.get("forget", [])
    if path and case.settings["write"]:
        raise ParameterError("altpo: alternates come from a file (alternates) or from the model (write); leave out one")
    listed: dict[str, list[str]] = {}
    for entry in read_rows(Source(path, {"answer": "alternate"}), "alternates") if path else ():
        listed.setdefault(entry.prompt, []).append(entry.answer)
    found = [listed.get(row.prompt, []) if path else list(row.perturbed_answers) for row in rows]
    if case.settings["write"] and case.dry:
        # A plan has nothing that writes: what is written is about as long as the answers.
        case.rows["alternative"] = [case.subject.encode(row) for _ in range(case.settings["write"]) for row in rows]
        return
    if case.settings["write"] and rows:
        found = written(case.subject, rows, case.settings["write"], case.seed)
        case.summary["alternates"] = {row.id: several for row, several in zip(rows[:SHOWN], found)}
    for row, choices in zip(rows, found):
        where = row.source or f"row {row.id}"
        if not choices:
            lacking = f"{path} has no alternate for {row.prompt!r}" if path else "no perturbed answers"
            raise RowError(
                f"{where}: {lacking}, but altpo needs at least one alternative to every forget row (or write=5)"
            )
        if row.answer.strip() in (text.strip() for text in choices):
            raise RowError(f"{where}: its alternative {row.answer!r} equals its answer")
    variants = range(max(map(len, found), default=0))
    case.rows["alternative"] = [
        case.subject.encode(row, answer=choices[i % len(choices)])
        for i in variants
        for row, choices in zip(rows, found)
    ]


@optimise(
    paper="arXiv:2409.13474",
    intention="suppression",
    needs=("forget.reference", "alternative.reference"),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget, alternative and retain rows, plus 2N once per distinct one",
    known_weaknesses=("relearn", "logit_lens", "decoding"),
    prepare=_prepare,
)
def altpo(
    step: Step,
    *,
    beta: float = 0.1,
    alternates: str = "",
    write: Annotated[int, Field(ge=0)] = 0,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """DPO towards plausible other answers, the next one in every epoch (Mekala et al. 2024, AltPO).

    `alternates` is a file of {"question", "alternate"} rows, several per question; `write` has the model itself write
    so many at temperature 1 (5 in the paper), which takes one that follows instructions. By default each row's
    perturbed answers. The report shows the first ones that were written.
    """
    return preference(step, beta) + retain_weight * step.retain_term(retain)
