"""S3T (arXiv:2406.16257) and SISA (arXiv:1912.03817): how long an ensemble serves deletions, how well it answers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evidence import Table
from ..methods.exact.capacity import (
    leading_term,
    retraining_share,
    simulate,
    until_all_out,
    until_one_out,
)
from ..methods.exact.ensemble import Ensemble, ExactCase
from ..methods.exact.layout import row_passes
from ..methods.exact.orders import Order, cyclic, live, orders, prefixes
from ..pictures import Picture
from ..registry import get, reproduction
from ..subjects.packed import pack
from ..world.pictures.draw import digits
from ..world.pictures.models import Recipe, trained
from .case import Case, Claim, Findings, number, spread
from .case import Row as Trial

LAYOUTS = ((5, 6, 1), (5, 6, 2), (5, 6, 3), (5, 6, 6), (10, 8, 8))
"""(shards, slices, budget)"""
AFTER = (1, 5, 10, 20)
BACKBONE = Recipe(kind="vit", widths=(32,), patches=4, epochs=40, learning_rate=3e-3)
"""Four blocks of width 32; 16 patches."""
TRAINING = {"rank": 8, "alpha": 8.0, "modules": "q_proj|v_proj", "batch_size": 32, "learning_rate": 1e-2}
EPOCHS = 10.0
"""Of a stage."""
SHARDS = 2
REQUESTS, STREAMS = 24, 200
GUESS = 0.1
"""Accuracy where no shard answers: ten classes."""


# --- trials -----------------------------------------------------------------------------------------------------------


def capacity(seed: int, trials: int) -> dict[str, Any]:
    """Simulated layouts, no model."""
    found = []
    for shards, slices, budget in LAYOUTS:
        for rows in (None, 40):
            seen = simulate(cyclic(slices, budget), shards, trials=trials, requests=max(AFTER), rows=rows, seed=seed)
            found.append(
                {
                    "layout": [shards, slices, budget],
                    "rows": rows,
                    "all_out": float(seen.all_out.mean()),
                    "error": float(seen.all_out.std(ddof=1) / trials**0.5),
                    "one_out": float(seen.one_out.mean()),
                    "usable": [float(seen.usable[k]) for k in AFTER],
                }
            )
    every = simulate(orders("all", 4, 1), 3, trials=trials, seed=seed).all_out
    most = simulate(orders("all", 6, 1), 5, trials=trials // 4, requests=max(AFTER), seed=seed).usable
    return {
        "layouts": found,
        "every": float(every.mean()),
        "every_error": float(every.std(ddof=1) / trials**0.5),
        "every_usable": [float(most[k]) for k in AFTER],
    }


def models(seed: int) -> dict[str, Any]:
    """Ensembles over one frozen backbone: their accuracy whatever slices are gone, and what deletions take."""
    data = digits()
    public, private, test = data["train"][:650], data["train"][650:], data["test"]
    coarse = [replace(row, answer=row.tags["group"]) for row in public]
    base = trained(coarse, sorted({row.answer for row in coarse}), BACKBONE, seed)
    with tempfile.TemporaryDirectory(prefix="expunge-s3t-") as folder:
        made = _Made(base, private, test, Path(folder), seed)
        pair = made.ensemble("s3t", slices=2, budget=2)
        long = made.ensemble("s3t", slices=4, budget=4)
        sisa = made.ensemble("sisa", slices=4)
        logits = {"pair": made.logits(pair), "long": made.logits(long), "sisa": made.logits(sisa)}
        # Epochs that read as many rows as the chain of stages does.
        whole = made.logits(made.ensemble("sisa", slices=1, epochs=EPOCHS * 3 / 2))
        single = made.ensemble("sisa", shards=1, slices=1, epochs=EPOCHS * 5 / 2)
        return {
            "two": {str(budget): _two(pair, logits["pair"], budget, made.answers) for budget in (1, 2)},
            "before": {str(budget): made.right(logits["pair"], _full(pair, budget)) for budget in (1, 2)},
            "whole": made.right(whole, [(0,), (0,)]),
            "single": made.right(made.logits(single), [(0,)]),
            "stream": {
                **{str(b): _stream(long, logits["long"], b, made.answers, seed) for b in (1, 2, 4)},
                "sisa": _stream(sisa, logits["sisa"], 1, made.answers, seed),
            },
            "cost": made.costs(pair, long, sisa, seed),
            "single_cost": made.spent[single.folder.name],
        }


class _Made:
    """Ensembles of one seed."""

    def __init__(self, base: Any, rows: list[Picture], test: Sequence[Picture], folder: Path, seed: int) -> None:
        self.base, self.rows, self.test, self.folder, self.seed = base, rows, test, folder, seed
        self.answers = np.array([int(row.answer) for row in test])
        self.spent: dict[str, float] = {}

    def ensemble(self, method: str, **settings: Any) -> Ensemble:
        part = get("methods", method)
        name = f"{method}-{len(self.spent)}"
        shared = {"shards": SHARDS, "epochs": EPOCHS, "classes": [str(i) for i in range(10)], "seed": self.seed}
        chosen = part.resolve({**shared, **TRAINING, **settings})
        began = time.process_time()
        made: Ensemble = part.function(ExactCase(self.base, self.rows, self.folder / name), **chosen)
        self.spent[name] = time.process_time() - began
        return made

    @torch.no_grad()
    def logits(self, ensemble: Ensemble) -> dict[tuple[int, Order], np.ndarray]:
        """(test rows, classes) of every chain of every shard."""
        stages = ensemble.over(self.base)
        packed = pack([stages.subject.encode(row) for row in self.test])
        found = {}
        for shard in range(ensemble.design.shards):
            for prefix in prefixes(ensemble.orders(shard)):
                subject = stages.delta(ensemble.state(shard, prefix)).apply(stages.subject)
                found[shard, prefix] = subject.head(subject.hidden_states(packed)).numpy()  # type: ignore[arg-type]
        return found

    def right(self, logits: Mapping[tuple[int, Order], np.ndarray], served: Sequence[Order]) -> float:
        return accuracy(logits, served, self.answers)

    def costs(self, pair: Ensemble, long: Ensemble, sisa: Ensemble, seed: int) -> dict[str, Any]:
        """Real deletions: what they take, and whether what is left is what training without the rows gives."""
        gone = np.random.default_rng([seed, 1]).permutation(len(self.rows))[:6].tolist()
        names = [self.rows[i].id for i in gone]
        decided, whole = [], []
        left = long
        for name in names:
            began = time.process_time()
            left, done = left.delete([name])
            whole.append(time.process_time() - began)
            decided.append(done.ledger_seconds)
        again, passes = [], []
        retrained = sisa
        for name in names[:3]:
            began = time.process_time()
            retrained, _ = retrained.delete([name])
            retrained, done_again = retrained.train(self.base, self.rows)
            again.append(time.process_time() - began)
            passes.append(done_again.row_passes)
        smaller, _ = pair.delete(names[:1])
        return {
            "decided": max(decided),
            "deleted": float(np.mean(whole)),
            "retrained": float(np.mean(again)),
            "retrained_passes": float(np.mean(passes)),
            "retrained_accuracy": self.right(self.logits(retrained), [retrained.served(k) for k in range(SHARDS)]),
            "same_after_deletion": all(smaller.verify(self.base, self.rows).values()),
            "same_after_retraining": all(retrained.verify(self.base, self.rows, shards=[0]).values()),
        }


def accuracy(logits: Mapping[tuple[int, Order], np.ndarray], served: Sequence[Order], answers: np.ndarray) -> float:
    """Of the mean of logits over shards that answer; a guess where none does."""
    found = [logits[shard, prefix] for shard, prefix in enumerate(served) if prefix]
    return float((np.mean(found, axis=0).argmax(1) == answers).mean()) if found else GUESS


def best(many: Sequence[Order], hit: set[int]) -> Order:
    """What a shard answers from: the longest live prefix of its orders."""
    lengths = [live(order, hit) for order in many]
    at = max(range(len(many)), key=lambda i: (lengths[i], -i))
    return many[at][: lengths[at]]


def _full(ensemble: Ensemble, budget: int) -> list[Order]:
    return [best(ensemble.design.orders[k][:budget], set()) for k in range(ensemble.design.shards)]


def _two(ensemble: Ensemble, logits: Mapping[Any, np.ndarray], budget: int, answers: np.ndarray) -> float:
    """Mean accuracy over all pairs of slices that are hit."""
    every = [(shard, s) for shard in range(SHARDS) for s in range(ensemble.slices)]
    found = []
    for pair in combinations(every, 2):
        many = [ensemble.design.orders[k][:budget] for k in range(SHARDS)]
        served = [best(many[k], {s for shard, s in pair if shard == k}) for k in range(SHARDS)]
        found.append(accuracy(logits, served, answers))
    return float(np.mean(found))


def _stream(
    ensemble: Ensemble, logits: Mapping[Any, np.ndarray], budget: int, answers: np.ndarray, seed: int
) -> dict[str, Any]:
    """Mean accuracy after 0 ... REQUESTS deletions of rows drawn at random, each at most once; and how many deletions
    it took until the first shard was out."""
    where = [cell for cell, _ in ensemble.rows.values()]
    many = [ensemble.design.orders[k][:budget] for k in range(SHARDS)]
    known: dict[tuple[Order, ...], float] = {}
    curves = np.zeros((STREAMS, REQUESTS + 1))
    rng = np.random.default_rng([seed, 2])
    for stream in range(STREAMS):
        hit: list[set[int]] = [set() for _ in range(SHARDS)]
        for request, place in enumerate([-1, *rng.permutation(len(where))[:REQUESTS].tolist()]):
            if place >= 0:
                shard, s = where[place]
                hit[shard].add(s)
            served = tuple(best(many[k], hit[k]) for k in range(SHARDS))
            if served not in known:
                known[served] = accuracy(logits, served, answers)
            curves[stream, request] = known[served]
    return {"curve": curves.mean(0).round(4).tolist(), "area": float(curves[:, 1:].mean())}


# --- findings ---------------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2406.16257", cost="4 min on 1 core", systems=("s3t", "sisa"), modality=("image",))
def s3t(case: Case, *, trials: int = 4000) -> Findings:
    """Exact unlearning by leaving trained stages out: deletions served, accuracy under a stream of them, exactness."""
    counted = case.trials(capacity, [{"trials": trials}])
    taught = case.trials(models, [{}])
    return Findings(
        claims=[*judge_capacity(counted), *judge_models(taught)],
        tables=[_deletions(counted), _usable(counted), _accuracy(taught), _curve(taught), _costs(taught)],
        notes=NOTES,
    )


NOTES = [
    "Deletions served: a request hits one of all slices, uniformly, with replacement, as in the paper. With rows that "
    "are deleted once each (40 a slice) ensembles serve a little less: the slices that are left untouched have more "
    "rows left, so they are hit sooner.",
    "Models: digits of 32 x 32, a vision transformer of four blocks (width 32, 16 patches) that was taught five "
    "superclasses on 650 public rows and is frozen; 650 private rows of ten classes in two shards; adapters of rank 8 "
    "on query and value, and a new head; 10 epochs a stage at learning rate 1e-2, batches of 32. Learning rate and "
    "modules were chosen on one adapter set trained on all private rows.",
    "An ensemble without any shard that answers is counted as guessing, 0.1.",
    "Streams: 200 of 24 random rows each; accuracy is that of real chains, whichever are left, the mean of logits over "
    "shards. SISA here serves the checkpoint before the hit slice, or (`retrained`) is trained from there on.",
    "Four slices leave one block for a stage: compare S3T and SISA before deletions.",
    "The paper's models (ViT base and large, RoBERTa, Llama) and its data sets are not repeated.",
]


def _layout(counted: Sequence[Trial], layout: Sequence[int], rows: int | None = None) -> list[dict[str, Any]]:
    return [
        one
        for trial in counted
        for one in trial["layouts"]
        if tuple(one["layout"]) == tuple(layout) and one["rows"] == rows
    ]


def _mean(found: Sequence[Mapping[str, Any]], name: str = "all_out") -> float:
    return float(np.mean([one[name] for one in found]))


def _error(found: Sequence[Mapping[str, Any]], name: str = "error") -> float:
    """Standard error of the mean over seeds of equal size."""
    return float(np.sqrt(np.mean([one[name] ** 2 for one in found]) / len(found)))


def judge_capacity(counted: Sequence[Trial]) -> list[Claim]:
    """Criteria were fixed before (specs: s3t, section 6)."""
    apart = {}
    low = {}
    for layout in LAYOUTS:
        found = _layout(counted, layout)
        apart[layout] = abs(_mean(found) - until_all_out(*layout)) / _error(found)
        low[layout] = 1 - leading_term(*layout) / _mean(found)
    ratio = _mean(_layout(counted, (5, 6, 6))) / _mean(_layout(counted, (5, 6, 1)))
    every = float(np.mean([trial["every"] for trial in counted]))
    error = _error(counted, "every_error")
    usable = {
        budget: np.mean([one["usable"] for one in _layout(counted, (5, 6, budget))], axis=0) for budget in (1, 2, 3, 6)
    }
    rising = all((usable[a] < usable[b]).all() for a, b in ((1, 2), (2, 3), (3, 6)))
    return [
        Claim(
            "An ensemble serves m L H(m B') deletions until it must be trained again",
            "m L ln(m B')",
            "simulated mean within 3 standard errors of m L H(m B') for all of "
            + ", ".join(str(layout) for layout in LAYOUTS),
            "standard errors apart: " + ", ".join(number(value) for value in apart.values()),
            max(apart.values()) <= 3,
        ),
        Claim(
            "The leading term says how many",
            "m L ln(m B')",
            "at most a tenth below the simulation at (5, 6), budgets 1 and 6",
            f"{low[5, 6, 1]:.0%} and {low[5, 6, 6]:.0%} below",
            max(low[5, 6, 1], low[5, 6, 6]) <= 0.1,
        ),
        Claim(
            "More orders serve more deletions",
            "SISA m L ln m, S3T m L ln(m B')",
            "budget 6 at least 1.6 times budget 1 at (5, 6)",
            f"{number(ratio)} times",
            ratio >= 1.6,
        ),
        Claim(
            "More orders than slices serve no more",
            "B' = min(B, L)",
            "(3, 4): all 24 orders within 3 standard errors of 12 H(12), that is of budget 4",
            f"{number(every)}, {number(until_all_out(3, 4, 4))} expected; standard error {number(error)}",
            abs(every - until_all_out(3, 4, 4)) <= 3 * error,
        ),
        Claim(
            "More orders keep more of what was learnt",
            "-",
            f"usable share at (5, 6) rises with the budget 1, 2, 3, 6 after {', '.join(map(str, AFTER))} requests",
            "after 10 requests: " + ", ".join(f"{usable[b][2]:.2f}" for b in usable),
            rising,
        ),
    ]


def judge_models(taught: Sequence[Trial]) -> list[Claim]:
    """Criteria were fixed before (specs: s3t, section 6; those about streams and costs, before anything was run)."""

    def mean(*path: str) -> float:
        return float(np.mean([_at(trial, path) for trial in taught]))

    two = mean("two", "2") - mean("two", "1")
    before = mean("before", "2") - mean("before", "1")
    slice_wise = mean("whole") - mean("before", "1")
    gains = [trial["stream"]["4"]["area"] - trial["stream"]["sisa"]["area"] for trial in taught]
    same = [[trial["cost"][f"same_after_{what}"] for trial in taught] for what in ("deletion", "retraining")]
    decided = max(trial["cost"]["decided"] for trial in taught)
    share = mean("cost", "deleted") / mean("cost", "retrained")
    return [
        Claim(
            "What is left after a deletion was never touched by the row",
            "exact unlearning",
            "served weights equal those of training without the row bit for bit, in every seed: after leaving stages "
            "out, and after retraining",
            f"{sum(same[0])} and {sum(same[1])} of {len(taught)} seeds",
            all(same[0]) and all(same[1]),
        ),
        Claim(
            "A second order keeps accuracy after deletions",
            "S3T stays above SISA as deletions come in",
            "two slices of two shards with two slices hit, mean over all pairs: budget 2 at least 0.03 above budget 1",
            f"{number(mean('two', '2'))} against {number(mean('two', '1'))}",
            two >= 0.03,
        ),
        Claim(
            "... and costs none before",
            "-",
            "budgets 1 and 2 at most 0.03 apart without deletions",
            f"{number(abs(before))} apart",
            abs(before) <= 0.03,
        ),
        Claim(
            "Learning slice by slice and block by block costs little accuracy",
            "little, on GLUE, CIFAR, Tiny-ImageNet and Alpaca",
            "two shards: at most 0.05 below one adapter set per shard, as many rows read",
            f"{number(mean('before', '1'))} against {number(mean('whole'))}",
            slice_wise <= 0.05,
        ),
        Claim(
            "Under a stream of deletions S3T answers better than SISA without retraining",
            "S3T stays above SISA",
            f"mean accuracy after 1 to {REQUESTS} random rows: budget 4 at least 0.03 above SISA's checkpoints in "
            "every seed",
            f"{number(mean('stream', '4', 'area'))} against {number(mean('stream', 'sisa', 'area'))}; gains "
            + ", ".join(number(gain) for gain in gains),
            min(gains) >= 0.03,
        ),
        Claim(
            "A deletion needs no training",
            "layers are switched off",
            "deciding what goes takes at most 1 ms; the whole deletion, files included, at most a tenth of the CPU "
            "time of SISA's retraining",
            f"{1000 * decided:.2g} ms at most; {number(share)} of it",
            decided <= 0.001 and share <= 0.1,
        ),
    ]


def _at(trial: Trial, path: Sequence[str]) -> float:
    value: Any = trial
    for name in path:
        value = value[name]
    return float(value)


def _deletions(counted: Sequence[Trial]) -> Table:
    lines = []
    for layout in LAYOUTS:
        found = _layout(counted, layout)
        lines.append(
            [
                str(layout),
                f"{_mean(found):.1f} ± {_error(found):.1f}",
                f"{until_all_out(*layout):.1f}",
                f"{leading_term(*layout):.1f}",
                f"{_mean(_layout(counted, layout, 40)):.1f}",
                f"{_mean(found, 'one_out'):.1f}",
                f"{until_one_out(*layout):.1f}",
            ]
        )
    columns = ["(m, L, B)", "until all are out", "m L H(m B')", "m L ln(m B')", "rows once each"]
    return Table(
        "Deletions served",
        [*columns, "until one shard is out", "theory"],
        lines,
        "± one standard error. B = 1 is SISA.",
    )


def _usable(counted: Sequence[Trial]) -> Table:
    lines = [
        [f"{budget}", *(f"{v:.3f}" for v in np.mean([o["usable"] for o in _layout(counted, (5, 6, budget))], axis=0))]
        for budget in (1, 2, 3, 6)
    ]
    lines.append(["all 720", *(f"{v:.3f}" for v in np.mean([t["every_usable"] for t in counted], axis=0))])
    note = "Mean over shards of the longest live prefix, as a share of six slices; five shards."
    return Table("Usable share", ["budget", *(f"after {k}" for k in AFTER)], lines, note)


def _accuracy(taught: Sequence[Trial]) -> Table:
    flat = [
        {
            "seed": trial["seed"],
            "one": trial["before"]["1"],
            "two": trial["before"]["2"],
            "whole": trial["whole"],
            "single": trial["single"],
            "long": trial["stream"]["4"]["curve"][0],
            "sisa": trial["stream"]["sisa"]["curve"][0],
            "pair_one": trial["two"]["1"],
            "pair_two": trial["two"]["2"],
        }
        for trial in taught
    ]
    lines = [
        [words, str(spread(flat, name)), str(spread(flat, after)) if after else ""]
        for words, name, after in (
            ("S3T, 2 slices, budget 1", "one", "pair_one"),
            ("S3T, 2 slices, budget 2", "two", "pair_two"),
            ("one adapter set per shard", "whole", ""),
            ("S3T, 4 slices, budget 4", "long", ""),
            ("SISA, 4 slices", "sisa", ""),
            ("one adapter set on all rows", "single", ""),
        )
    ]
    return Table(
        "Test accuracy", ["two shards", "before deletions", "after two slices"], lines, "Mean (lowest to highest)."
    )


def _curve(taught: Sequence[Trial]) -> Table:
    names = {"4": "S3T, budget 4", "2": "S3T, budget 2", "1": "S3T, budget 1", "sisa": "SISA, checkpoints"}
    at = [k for k in (0, 1, 2, 3, 4, 8, 16, 24) if k <= REQUESTS]
    lines = []
    for key, words in names.items():
        curve = np.mean([trial["stream"][key]["curve"] for trial in taught], axis=0)
        area = np.mean([trial["stream"][key]["area"] for trial in taught])
        lines.append([words, *(f"{curve[k]:.3f}" for k in at), f"{area:.3f}"])
    again = {
        0: np.mean([trial["stream"]["sisa"]["curve"][0] for trial in taught]),
        3: np.mean([trial["cost"]["retrained_accuracy"] for trial in taught]),
    }
    lines.append(["SISA, retrained after each", *(f"{again[k]:.3f}" if k in again else "" for k in at), ""])
    note = (
        f"Four slices; means over seeds and {STREAMS} streams of random rows; mean of 1 to {REQUESTS} deletions last. "
        "Retraining was carried out three times."
    )
    return Table("Accuracy after deletions", ["", *(str(k) for k in at), "mean"], lines, note)


def _costs(taught: Sequence[Trial]) -> Table:
    rows = 650
    flat = [{"seed": trial["seed"], **trial["cost"], "single": trial["single_cost"]} for trial in taught]
    shard = EPOCHS * row_passes([rows // SHARDS // 4] * 4, (0, 1, 2, 3))
    lines = [
        ["S3T: a deletion", str(spread(flat, "deleted")), "0"],
        ["SISA: a deletion and retraining", str(spread(flat, "retrained")), str(spread(flat, "retrained_passes"))],
        ["... expected for a random row", "", f"{shard * retraining_share(4):.0f}"],
        ["one adapter set on all rows, anew", str(spread(flat, "single")), f"{rows * EPOCHS * 5 / 2:.0f}"],
    ]
    note = (
        f"A shard of SISA anew: {shard:.0f} row passes. Training SISA takes that for each shard, S3T with budget 4 "
        "four times as much."
    )
    return Table("Cost of a deletion", ["", "CPU seconds", "row passes"], lines, note)
