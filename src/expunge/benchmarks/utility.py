"""General ability: tasks of lm-evaluation-harness where it is installed, our own small exams otherwise."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ParameterError, suggest
from ..evidence import Interval, Measured, Scorecard
from ..files import write_text
from ..registry import benchmark
from ..subjects.language import LanguageModel
from ..tables.store import content_key
from .case import Bench
from .exams import mini, read, take

LEAST = 1.959964
"""Standard errors to either side of a 95 % interval."""


@benchmark(
    paper="EleutherAI, lm-evaluation-harness", data="tasks of lm-evaluation-harness by name, or a folder of exams"
)
def utility(
    bench: Bench,
    *,
    tasks: str = "",
    shots: int = -1,
    limit: int = 0,
    chat: bool = False,
    include: str = "",
    batch_size: int = 8,
) -> Scorecard:
    """What a model can do in general: multiple choice, written answers, fluency; or any task of lm-evaluation-harness.

    Without `tasks`: a folder with one file per ability (`--data`; question and choices, question and answers, or
    instruction), by default about the invented world.

    Args:
        tasks: names of harness tasks, groups or tags, with commas (needs `pip install 'expunge[lm-eval]'`).
        shots: solved examples before each question of a task; -1 leaves it to the task.
        limit: rows of every task or exam; 0 takes all.
        chat: put tasks through the model's chat template.
        include: a folder with task files of your own.
        batch_size: of tasks.
    """
    if tasks.strip():
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        settings = {
            "tasks": names,
            "num_fewshot": shots if shots >= 0 else None,
            "limit": limit or None,
            "apply_chat_template": chat,
            "batch_size": batch_size,
            "random_seed": bench.seed,
            "numpy_random_seed": bench.seed,
            "torch_random_seed": bench.seed,
            "fewshot_random_seed": bench.seed,
            "bootstrap_iters": bench.bootstrap,
        }
        return _harness(bench, settings, include)
    exams = read(bench.source(mini), limit=limit, seed=bench.seed)
    measured = take(bench, exams)
    return bench.scorecard(
        measured,
        headline=[one.metric for one in measured],
        rows={exam.ability: len(exam.rows) for exam in exams},
    )


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


def _harness(bench: Bench, settings: dict[str, Any], include: str) -> Scorecard:
    """What the harness finds on every model; results that are in the folder are not computed again."""
    try:
        import lm_eval
        from lm_eval import tasks
    except ImportError as error:
        raise ParameterError(
            f"utility: tasks = {', '.join(settings['tasks'])} needs lm-evaluation-harness ({error}): "
            "pip install 'expunge[lm-eval]'"
        ) from None
    manager = tasks.TaskManager(include_path=include or None)
    for name in settings["tasks"]:
        if name not in manager.all_tasks:
            raise ParameterError(f"utility: the harness has no task {name!r}. {suggest(name, manager.all_tasks)}")
    for role, model in bench.models.items():
        if not isinstance(model, LanguageModel):
            raise ParameterError(
                f"utility: the harness asks a model itself, without the guard around it ({role}: {model.name}); leave "
                "tasks out to measure a guard"
            )
    found = {}
    for role, model in bench.models.items():
        key = content_key(model.fingerprint, settings, include, getattr(lm_eval, "__version__", ""))
        path = bench.folder / "harness" / f"{key}.json"
        if not path.is_file():
            write_text(path, json.dumps(_evaluate(model, settings, manager), default=str))
        found[role] = json.loads(path.read_text(encoding="utf-8"))
    measured = _measured(found)
    card = bench.scorecard(
        measured,
        headline=[one.metric for one in measured],
        rows={task: int(counts["effective"]) for task, counts in found["after"]["n-samples"].items()},
    )
    return replace(card, data=f"lm-evaluation-harness {getattr(lm_eval, '__version__', '')}".strip())


def _evaluate(model: LanguageModel, settings: Mapping[str, Any], manager: Any) -> dict[str, Any]:
    """
    Raises:
        ParameterError: a task cannot be set up, for example because its data is not at hand.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness gives tokenizers a padding token; ours stays as it is.
    wrapped = HFLM(
        pretrained=model.model,
        tokenizer=copy.deepcopy(model.tokenizer),
        max_length=model.context_length,
        batch_size=settings["batch_size"],
    )
    try:
        found = simple_evaluate(model=wrapped, task_manager=manager, log_samples=False, **settings)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ParameterError(f"utility: the harness cannot run {', '.join(settings['tasks'])}: {reason}") from error
    return {name: found[name] for name in ("results", "n-samples", "higher_is_better")}


def _measured(found: Mapping[str, Mapping[str, Any]]) -> list[Measured]:
    """Every number of every task; intervals from the harness's standard errors, gold's as the mean over golds."""
    measured = []
    for task, numbers in found["after"]["results"].items():
        for name, value in numbers.items():
            metric, _, filter_ = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if metric in ("alias", "sample_len"):
                continue
            intervals: dict[str, list[tuple[float, float]]] = {}
            for role, of in found.items():
                error = of["results"][task].get(f"{metric}_stderr,{filter_}")
                spread = float(error) if isinstance(error, int | float) else math.nan
                intervals.setdefault(role.partition("/")[0], []).append((float(of["results"][task][name]), spread))
            higher = found["after"]["higher_is_better"].get(task, {}).get(metric)
            plain = "" if filter_ in ("", "none") else f" ({filter_})"
            measured.append(
                Measured(
                    metric=f"{task} {metric}{plain}",
                    rows=task,
                    before=_interval(intervals.get("before")),
                    after=_interval(intervals["after"]),
                    gold=_interval(intervals.get("gold")),
                    n=int(found["after"]["n-samples"].get(task, {}).get("effective", 0)),
                    direction="lower" if higher is False else "higher",
                    ideal="the value before",
                    sentence=f"{metric} of lm-evaluation-harness on {task}.",
                )
            )
    return measured


def _interval(several: list[tuple[float, float]] | None) -> Interval | None:
    if not several:
        return None
    value = float(np.mean([number for number, _ in several]))
    half = LEAST * float(np.sqrt(np.sum(np.square([error for _, error in several]))) / len(several))
    return Interval(value - half, value, value + half)
