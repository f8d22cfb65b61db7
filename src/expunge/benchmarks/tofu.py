"""TOFU, the Task of Fictitious Unlearning (arXiv:2401.06121), with OpenUnlearning's additions (arXiv:2506.12618).

200 invented authors, 20 questions each. A model is trained on all, then asked to forget 1, 5 or 10 % of them; gold is
trained on the rest. Measured are, on four row sets, the answer's probability, ROUGE-L recall of what is written, and
the truth ratio; from them model utility (nine numbers about what should be kept) and forget quality (can truth ratios
on forget rows tell the model from gold?); beside these exact memorisation, extraction strength and likelihood, six
membership attacks against holdout rows, and with the model before and gold the unlearning depth. Forget quality alone
proves nothing: a ruined model passes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from ..evidence import Measured, Scorecard, Table
from ..metrics.quantities import Form
from ..registry import benchmark
from ..rows import Row
from . import tofu_logs
from .case import Bench
from .tofu_rows import AUTHOR, MINI_AUTHOR, mini, read

ASKED = ("forget", "retain", "real_authors", "world_facts")
PER_SET = ("answer_probability", "rouge", "truth_ratio")
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm", "mia_reference")


@benchmark(paper="arXiv:2401.06121", data="locuslab/TOFU")
def tofu(
    bench: Bench,
    *,
    split: Literal["forget01", "forget05", "forget10"] = "forget10",
    form: Form = "geometric",
    k: Annotated[float, Field(gt=0, le=1)] = 0.4,
    max_new_tokens: Annotated[int, Field(ge=1)] = 200,
    author: Annotated[int, Field(ge=0)] = 0,
    gold_log: str = "",
) -> Scorecard:
    """Forgetting invented authors: model utility, forget quality, memorisation and membership against gold.

    Args:
        split: what was to be forgotten.
        form: how wrong answers are averaged in truth ratios; published tables are geometric, the paper's formula is
            arithmetic, and model utility differs by 0.04 between them.
        k: share of hardest tokens in mia_min_k and mia_min_k_plus_plus.
        max_new_tokens: length of answers; fewer, where the model's context holds fewer.
        author: rows about one author, in sequence: the unit of intervals. 0 stands for 20, as published (4 in the mini
            version).
        gold_log: evaluation log of a gold model (TOFU's eval_log_aggregated.json, or OpenUnlearning's TOFU_EVAL.json),
            for forget quality without the model.
    """
    data, notes = read(bench.source(mini), split, author or (AUTHOR if bench.data else MINI_AUTHOR))
    limit, cut = _room(bench, data, max_new_tokens)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("model_utility", {**tofu_logs.UTILITY, "form": form}),
        ("forget_quality", {"form": form}),
        ("privleak", {"k": k}),
    ]
    for rows in ASKED:
        asked += [
            ("answer_probability", {"rows": rows, "among_options": rows in tofu_logs.UTILITY["options"]}),
            ("rouge", {"rows": rows}),
            ("truth_ratio", {"rows": rows, "form": form}),
        ]
    asked += [("exact_memorization", {}), ("extraction_strength", {})]
    asked += [(name, {"k": k} if "min_k" in name else {}) for name in ATTACKS]
    asked += [("extraction_likelihood", {}), ("unlearning_depth", {})]
    views = bench.views(data, limit, written=ASKED, metrics=asked)
    measured, left_out = bench.measure(views, asked)
    tables = [_by_set(measured)]
    quality = next((one for one in measured if one.metric == "forget_quality"), None)
    if quality is not None:
        tables.append(_quality(quality, form))
    if gold_log:
        against = tofu_logs.against(views["after"], gold_log, form)
        tables.append(Table(f"Forget quality against {gold_log}", ("log10 p", "D", "n"), [against]))
    return bench.scorecard(
        measured,
        headline=["forget_quality", "model_utility", "privleak"],
        tables=tables,
        rows={name: len(rows) for name, rows in data.items()},
        notes=[*notes, *cut, *left_out],
    )


def _room(bench: Bench, data: Mapping[str, Sequence[Row]], wanted: int) -> tuple[int, list[str]]:
    """How many tokens an answer may have in the model's context."""
    subject = bench.subject
    longest = max(subject.encode(row).start for rows in ASKED for row in data[rows])
    room = min(wanted, subject.context_length - longest)
    if room == wanted:
        return wanted, []
    return room, [f"Answers may have {room} tokens instead of {wanted}: the context holds {subject.context_length}."]


def _by_set(measured: Sequence[Measured]) -> Table:
    """Probability, ROUGE-L recall and truth ratio by row set and model; all but forget make up model utility."""
    found = {(one.metric, one.rows): one for one in measured if one.metric in PER_SET}
    rows = []
    for name in ASKED:
        for role in ("before", "after", "gold"):
            cells = [getattr(found[metric, name], role) for metric in PER_SET if (metric, name) in found]
            if cells and None not in cells:
                rows.append([name, role, *(cell.value for cell in cells)])
    return Table(
        "By row set",
        ("rows", "model", "probability", "ROUGE-L recall", "truth ratio"),
        rows,
        "Model utility is the harmonic mean of the nine numbers about retain, real_authors and world_facts.",
    )


def _quality(quality: Measured, form: str) -> Table:
    rows = []
    for role in ("before", "after", "gold"):
        for number, about in enumerate(quality.extra.get(role, [])):
            name = f"{role} {number}" if role == "gold" else role
            log10_p = fmean(gold["log10_p"] for gold in about["per_gold"])
            rows.append([name, log10_p, *(about[key] for key in ("D", "n", "paired_p", "paired_p_entities"))])
    return Table(
        f"Forget quality ({form} truth ratios)",
        ("model", "log10 p", "D", "n", "paired p, rows", "paired p, authors"),
        rows,
        "p depends on n; the paired test flips signs of the differences in log truth ratio. A gold is compared with "
        "the other golds.",
    )
