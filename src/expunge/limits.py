"""What a report must say about itself: every line of taxonomy 3.7, or why it does not apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .evidence import ProbeRun, Verdict

IMPLIED = 5
"""Facts that follow from others, named in the report."""

NO_PROMPTS = "In-context reintroduction: not applicable because the model takes no text beside what it classifies."
REINTRODUCED = 0.5
"""Share of the forgotten facts that contexts bring back from which on a filter is called for."""


def lines(
    *,
    runs: Sequence[ProbeRun],
    method: Mapping[str, Any],
    golds: int,
    gold_kind: str,
    access: str,
    verdict: Verdict,
    implied: Mapping[str, Sequence[str]] | None = None,
    safety: int = 0,
    prompts: bool = True,
    notes: Sequence[str] = (),
) -> list[str]:
    """The limits section, in the order of the specification, followed by what this audit in particular left out.

    Args:
        implied: forget rows that follow from kept ones, with those; None where the request has no rules of inference.
        safety: number of safety prompts.
        prompts: whether a model is asked in texts, into which knowledge and orders can be written.
    """
    card = method.get("card") or {}
    scored = [run for run in runs if run.status == "scored"]
    queries = int(sum(run.budget.get("queries", 0) * run.budget.get("samples", 1) for run in scored))
    steps = int(max((run.budget.get("steps", 0) for run in scored), default=0))
    found = [
        f"Tested: {', '.join(run.attack for run in scored) or 'nothing'}; {queries} answers in all, at most {steps} "
        f"relearning steps, access to {'weights' if access == 'weights' else 'text only'}. The verdict holds for these "
        "attacks at this budget only.",
        _gold(golds, gold_kind),
        _weights(card, verdict),
        _kept(card),
        _reintroduced(scored) if prompts else NO_PROMPTS,
        _implied(implied),
        _open(access, verdict),
        _safety(safety, prompts),
        "Nothing is claimed about knowledge the request did not name, and nothing here is a legal conclusion.",
    ]
    found += [f"Not scored: {run.attack} ({run.status})." for run in runs if run.status != "scored"]
    return found + list(notes)


def needs_filter(runs: Sequence[ProbeRun]) -> bool:
    """Whether contexts that do not state the forgotten facts bring at least half of them back."""
    return any(run.score >= REINTRODUCED for run in _contexts(runs) if run.settings.get("level") != "fact")


def _contexts(runs: Sequence[ProbeRun]) -> list[ProbeRun]:
    return [run for run in runs if run.group == "reintroduce" and run.status == "scored"]


def _reintroduced(runs: Sequence[ProbeRun]) -> str:
    tried = _contexts(runs)
    if not tried:
        return (
            "In-context reintroduction was not tested: a text in the prompt that states the forgotten facts lets any "
            "model repeat them, a perfectly retrained one too. Regulating content needs a filter beside it."
        )
    rates = "; ".join(f"{run.attack} {run.score:.2f} ({run.note})" for run in tried)
    return (
        f"In-context reintroduction succeeds at these rates: {rates}. No unlearning prevents it, retraining included, "
        "as long as what the facts follow from is kept; regulating content needs a filter beside it."
    )


def _gold(golds: int, kind: str) -> str:
    if not golds:
        return "Gold: none. No model retrained without the data was given, so nothing can be called removed."
    seeds = f"{golds} training seed{'s' if golds > 1 else ''}"
    if kind == "surrogate":
        return f"Gold: surrogate, {seeds}. A model known not to have seen the data stands in for a retrained one."
    more = "" if golds > 1 else " With one seed chance between retrained models is unknown."
    return f"Gold: exact, {seeds} trained without the forget rows.{more}"


def _weights(card: Mapping[str, Any], verdict: Verdict) -> str:
    if card.get("kind") == "guard":
        return "The weights still contain what the guard hides: whoever removes the guard has it back."
    if verdict.verdict in ("suppressed", "not_forgotten"):
        return "The weights still contain what was to be forgotten: the probes named in the verdict brought it back."
    return "Whether the weights still contain a trace that none of these attacks finds is not known."


def _kept(card: Mapping[str, Any]) -> str:
    keeps = card.get("keeps") or []
    if keeps:
        return f"Kept after the request: {'; '.join(keeps)}. Whoever keeps it holds the data that was to be erased."
    return (
        "The method keeps no forget data; tables beside this report quote what the models said and are personal data."
    )


def _implied(implied: Mapping[str, Sequence[str]] | None) -> str:
    if implied is None:
        return (
            "Which forgotten facts follow from retained ones was not tested: the request gives no rules of inference."
        )
    if not implied:
        return "No forgotten fact follows from retained ones by the request's rules of inference."
    shown = [f"{row} from {' and '.join(premises)}" for row, premises in list(implied.items())[:IMPLIED]]
    more = f" and {len(implied) - IMPLIED} more (evidence.json lists all)" if len(implied) > IMPLIED else ""
    follow = "1 forgotten fact follows" if len(implied) == 1 else f"{len(implied)} forgotten facts follow"
    return (
        f"{follow} from retained ones and cannot be removed without these: {'; '.join(shown)}{more}. "
        "Extend the request to them, or accept that it can be inferred."
    )


def _safety(rows: int, prompts: bool) -> str:
    if rows:
        return f"Safety behaviours were compared with those before on {rows} prompts, and on no others."
    if not prompts:
        return "Safety behaviours were not tested: the request names no rows on which the model must do as before."
    return (
        "Safety behaviours (refusing unsafe requests, system over user) were not tested: the request names no prompts."
    )


def _open(access: str, verdict: Verdict) -> str:
    if verdict.verdict == "suppressed" and access == "weights":
        return "Weights are taken to be open: an attacker who has them recovers this knowledge."
    if access == "api":
        return "Weights are taken to be closed: an attacker who has them was not considered."
    return "Weights are taken to be open to the attacker."
