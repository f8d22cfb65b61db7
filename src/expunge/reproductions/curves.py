"""How far a method is after so many steps: what it forgot and what it damaged on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evidence import Table
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import Outcome, unlearn
from ..registry import get
from ..subjects.language import LanguageModel
from ..trials import Result
from .case import Case, Row, spread
from .measures import measure
from .mini import Mini

BATCH = 16
"""Forget rows of a step, with as many retain rows beside them."""
WATCHED = ("forget", "retain", "neighbour")


def curve(
    world: Mini,
    method: str,
    *,
    steps: int,
    learning_rate: float,
    at: Sequence[int],
    settings: Mapping[str, Any] | None = None,
    scope: str | None = None,
    seed: int = 0,
    observe: Callable[[LanguageModel, int], dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], Outcome]:
    """Unlearn the world's forget rows from its original, without the utility guard: papers train to the end.

    Args:
        at: steps after which the model is measured.
        seed: decides the order of rows.
        observe: (model in training, step) -> what to measure there; by default `measure` of `WATCHED`.

    Returns:
        (one point {"step": ..., measures} for each of `at`, what the method left)
    """
    watched = {name: world.data[name] for name in WATCHED}
    points: list[dict[str, Any]] = []

    def evaluate(model: LanguageModel, step: int) -> None:
        found = measure(model, watched) if observe is None else observe(model, step)
        points.append({"step": step, **found})

    outcome = unlearn(
        world.original,
        get("methods", method),
        settings or {},
        scope=scope,
        data=world.data,
        training=Training(steps=steps, learning_rate=learning_rate, batch_size=BATCH, seed=seed, guard=None),
        evaluate_at=at,
        evaluate=evaluate,
    )
    return points, outcome


def gather(case: Case, trial: Callable[..., Result], runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row for every run, seed and point of its curve.

    Args:
        trial: gives {"points": [...], anything else}; the latter stands in every row of its run.
        runs: the trial's settings by the name that `run` has in the rows.
    """
    found = case.trials(trial, runs.values())
    names = [name for name in runs for _ in case.seeds]
    rows = []
    for name, result in zip(names, found):
        whole = {key: value for key, value in result.items() if key != "points"}
        rows += [{**whole, **point, "run": name} for point in result["points"]]
    return rows


COLUMNS = {
    "forget_accuracy": "forget",
    "held_out_accuracy": "held-out wording",
    "retain_accuracy": "retain",
    "neighbour_accuracy": "neighbour",
    "forget_nll": "forget NLL",
    "retain_nll": "retain NLL",
    "forget_value": "value, nats",
}


def table(rows: Sequence[Row], title: str, note: str = "", columns: Mapping[str, str] = COLUMNS) -> Table:
    """Every run at its measuring points, mean and range over seeds."""
    points = dict.fromkeys((row["run"], row["step"]) for row in rows)
    cells = [[run, step, *(str(spread(rows, name, run=run, step=step)) for name in columns)] for run, step in points]
    return Table(title, ["run", "steps", *columns.values()], cells, note)


MEANING = (
    "Accuracies: share of rows whose value is the greedy choice; held-out wording: the forget questions as nothing "
    "was trained on them; neighbour: people who taught the forgotten. NLL in nats per answer token. Value: "
    "log-probability of the forgotten values. Mean (lowest to highest) over seeds."
)
