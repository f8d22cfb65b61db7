"""Published evaluation logs of TOFU (arXiv:2401.06121), read as tables: metrics on models one does not have.

A log is the `eval_log_aggregated.json` of the paper's code: four row sets, per set one map row index -> value for every
measure. It holds means over answers, not scores of tokens; metrics that read tokens say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TableError, suggest
from ..metrics import measure
from ..metrics.quantities import Form, log_truth_ratio, option_probability, with_wrong_answers
from ..metrics.texts import RougeKind, overlaps
from ..metrics.two_samples import ks_distance, ks_log10_p
from ..rows import Row
from ..tables.generations import Generations
from ..tables.scores import Scores
from ..tables.view import View

SECTIONS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
OPEN_UNLEARNING = "forget_truth_ratio"
"""The measure of OpenUnlearning's logs that forget quality is taken from."""
UTILITY = {"plain": ("retain",), "options": ("real_authors", "world_facts")}
"""Settings of model_utility for TOFU's row sets."""
FIELDS = ("generated_text", "avg_gt_loss", "num_token_gt", "avg_paraphrased_loss", "average_perturb_loss")
ROUGE: tuple[RougeKind, ...] = ("rouge1", "rougeL")
AUTHOR = 20
"""Questions about one author, in sequence, in the forget and retain sets."""


def load(path: Path) -> dict[str, Any]:
    """A log as it stands.

    Raises:
        TableError: no such log, not a log.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"evaluation log {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TableError(f"evaluation log {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TableError(f"evaluation log {path} holds {type(data).__name__}, expected an object of measures")
    return data


def columns(path: str | Path) -> dict[str, dict[str, list[Any]]]:
    """Row set -> measure -> values in row order, as they are logged.

    Raises:
        TableError: no such log, not a log, a measure missing or of another length.
    """
    path = Path(path)
    data = load(path)
    found: dict[str, dict[str, list[Any]]] = {}
    for rows, section in SECTIONS.items():
        if not isinstance(data.get(section), dict):
            raise TableError(f"{path} has no section {section!r}. {suggest(section, data)}")
        for field in FIELDS:
            if field not in data[section]:
                raise TableError(f"{path}, {section}: measure {field!r} is missing. {suggest(field, data[section])}")
        keys = list(data[section]["generated_text"])
        found[rows] = {}
        for field, by_row in data[section].items():
            if list(by_row) != keys:
                raise TableError(
                    f"{path}, {section}: {field!r} has {len(by_row)} rows, 'generated_text' has {len(keys)} or others"
                )
            found[rows][field] = list(by_row.values())
    return found


def read(path: str | Path) -> View:
    """A model's view from its log: sets forget, retain, real_authors and world_facts.

    Rows are known by their question as it was asked, so that logs of different splits can be compared on the rows they
    share (`shared`). Errors as `columns`.
    """
    path = Path(path)
    rows: dict[str, list[Row]] = {}
    scores: dict[str, Scores] = {}
    generations: dict[str, Generations] = {}
    for name, logged in columns(path).items():
        rows[name] = [
            Row(
                id=prompt,
                prompt=prompt,
                answer=answer,
                kind="completion",
                entity=f"author {index // AUTHOR}" if name in ("forget", "retain") else "",
                # The log names no texts; what counts is that these candidates were scored.
                paraphrased_answer="(not in the log)",
                perturbed_answers=("(not in the log)",) * len(logged["average_perturb_loss"][index]),
                source=f"{path.name}, {SECTIONS[name]}:{index}",
            )
            for index, (prompt, _, answer) in enumerate(logged["generated_text"])
        ]
        ids = [row.id for row in rows[name]]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise TableError(f"{path}, {SECTIONS[name]}: the question {twice!r} occurs twice")
        scores[name] = _scores(rows[name], logged)
        generations[name] = Generations(
            [(i, "question") for i in ids],
            ids,
            [[text] for _, text, _ in logged["generated_text"]],
            [[True]] * len(ids),
        )
    return View(rows, scores, generations, name=path.name.split(".")[0])


def _scores(rows: list[Row], logged: Mapping[str, list[Any]]) -> Scores:
    """Every token of an answer gets the answer's mean log-probability: means over answers are then what was logged."""
    items: list[tuple[tuple[str, str], float, int, str]] = []
    for index, row in enumerate(rows):
        items.append(((row.id, "answer"), logged["avg_gt_loss"][index], logged["num_token_gt"][index], row.answer))
        items.append(((row.id, "paraphrase"), logged["avg_paraphrased_loss"][index], 1, ""))
        for place, value in enumerate(logged["average_perturb_loss"][index]):
            items.append(((row.id, f"perturbed/{place}"), value, 1, ""))
    keys, losses, lengths, texts = zip(*items)
    nothing = np.full(sum(lengths), np.nan)
    return Scores(
        list(keys),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.full(len(nothing), -1),
        -np.repeat(np.array(losses, dtype=np.float64), lengths),
        *(nothing, nothing, nothing, nothing),
        list(texts),
        {"means_only": True},
    )


def shared(view: View, gold: View, rows: str = "forget") -> View:
    """The view on those rows of a set that gold's log has too, with gold beside it.

    Raises:
        TableError: they share none.
    """
    present = {row.id for row in gold.of(rows)}
    kept = [row for row in view.of(rows) if row.id in present]
    if not kept:
        raise TableError(
            f"the logs of {view.name} ({len(view.of(rows))} rows) and {gold.name} ({len(present)} rows) share no "
            f"{rows} row: they were made on different splits"
        )
    return replace(view, rows={**view.rows, rows: kept}, golds=[gold])


def against(view: View, path: str | Path, form: Form = "geometric") -> tuple[float, float, int]:
    """Forget quality of a model against a gold model's log: log10 p, D and the number of rows.

    Args:
        path: `eval_log_aggregated.json` of the paper's code, or `TOFU_EVAL.json` of OpenUnlearning (geometric only).

    Raises:
        TableError: no such log, or it is of another split or form.
    """
    kept = with_wrong_answers(view, "forget")
    logged = _logged_ratios(Path(path), form)
    if len(logged) != len(kept):
        raise TableError(f"the log of gold, {path}, has {len(logged)} forget rows, this split has {len(kept)}")
    mine = log_truth_ratio(view, "forget", kept, form)
    distance = float(ks_distance(mine, logged)(np.ones((1, len(kept))))[0])
    return float(ks_log10_p(distance, len(kept))), distance, len(kept)


def _logged_ratios(path: Path, form: Form) -> np.ndarray:
    """(rows,) log R on the forget rows of a log."""
    if not isinstance(logged := load(path).get(OPEN_UNLEARNING), dict):
        gold = read(path)
        return log_truth_ratio(gold, "forget", gold.of("forget"), form)
    if form != "geometric":
        raise TableError(f"{path} holds geometric truth ratios; form is {form!r}")
    try:
        each = logged["value_by_index"]
        ratios = np.array([each[key]["score"] for key in sorted(each, key=int)], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: {OPEN_UNLEARNING} holds no scores by row ({error})") from None
    if not (np.isfinite(ratios) & (ratios >= 0)).all():
        raise TableError(f"{path}: {OPEN_UNLEARNING} holds ratios that are not numbers, or negative ones")
    return np.log(np.maximum(ratios, np.finfo(np.float64).tiny))


def differences(path: str | Path) -> dict[str, float]:
    """Largest difference between what a log states and what our metrics make of its raw values.

    Absolute, for ratios above 1 relative: they were logged in single precision and reach 34.
    """
    view, logged = read(path), columns(path)
    largest: dict[str, float] = {}

    def compare(name: str, ours: np.ndarray, theirs: Sequence[float]) -> None:
        largest[name] = max(largest.get(name, 0.0), float(np.max(np.abs(ours - theirs) / np.maximum(1, theirs))))

    for rows, at in logged.items():
        kept = view.of(rows)
        for kind in ROUGE:
            compare(kind, overlaps(view, rows, kept, kind, "recall"), at[f"{kind}_recall"])
        compare("truth_ratio", np.exp(log_truth_ratio(view, rows, kept)), at["truth_ratio"])
        if "normalized_gt_loss" in at:
            compare("options_loss", -np.log(option_probability(view, rows, kept)), at["normalized_gt_loss"])
    return largest


def figures(paths: Sequence[str | Path], gold: str | Path, *, bootstrap: int = 1000) -> list[dict[str, Any]]:
    """One dictionary per log: model, utility with its nine parts (both forms), and forget quality against `gold`.

    Forget quality is None, with the reason beside it, where the two logs share no forget rows.
    """
    reference = read(gold)
    found = []
    for path in paths:
        view = read(path)
        line: dict[str, Any] = {"model": view.name, "forget_quality": None, "reason": ""}
        for form in ("geometric", "arithmetic"):
            made = measure.values("model_utility", view, {**UTILITY, "form": form})
            line[f"utility_{form}"], line[f"parts_{form}"] = made.value, made.extra["parts"]
        line["forget_truth_ratio"] = measure.values("truth_ratio", view).value
        try:
            common = shared(view, reference)
            made = measure.values("forget_quality", common)
            within = measure.measure("forget_quality", common, bootstrap=bootstrap)
            line["forget_quality"] = {"log10_p": made.value, "low": within.low, "high": within.high, **made.extra}
        except TableError as error:
            line["reason"] = str(error)
        found.append(line)
    return found


def table(paths: Sequence[str | Path], gold: str | Path) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| model | utility, geometric | arithmetic | forget truth ratio | n | D | log10 forget quality | paired p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in figures(paths, gold):
        quality = line["forget_quality"]
        tail = "- | - | no common rows | -"
        if quality:
            value, low, high = (round(quality[key], 2) + 0.0 for key in ("log10_p", "low", "high"))
            tail = (
                f"{quality['n']} | {quality['D']:.3f} | {value:.2f} [{low:.2f}, {high:.2f}] | {quality['paired_p']:.4f}"
            )
        lines.append(
            f"| {line['model']} | {line['utility_geometric']:.3f} | {line['utility_arithmetic']:.3f} "
            f"| {line['forget_truth_ratio']:.3f} | {tail} |"
        )
    return "\n".join(lines)
