"""LoKU: the inverted hinge, and adapters that start in Fisher-weighted principal directions; tested apart and together.

Cha et al., Towards robust and parameter-efficient knowledge unlearning for LLMs, arXiv:2408.06621; extraction by Jang
et al., arXiv:2210.01504. Three experiments: `trial` in the full scope, `adapted` in LoRA with three starts, `passages`
on running text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from ..benchmarks.extraction import extraction_likelihood
from ..evidence import Table
from ..methods.optimise.loop import Training, fit
from ..methods.optimise.stop import Stop
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import Row as Text
from ..subjects.language import LanguageModel
from ..world.corpus import passage
from .case import Case, Claim, Findings, Row, number, spread
from .curves import MEANING, WATCHED, curve, gather, table
from .measures import knowledge, measure
from .mini import mini

FORGOTTEN = 0.1
"""Forget accuracy at which a run counts as done."""
EVERY = 5
"""Steps between looks at the forget accuracy."""
NGRAM = 5
STARTS = ("default", "fila", "pissa")


def trial(
    method: str,
    seed: int,
    steps: int,
    learning_rate: float = 5e-4,
    at: Sequence[int] = (),
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A curve in the full scope; of the loss without its retain term the lowest and the highest value of any step."""
    points, outcome = curve(
        mini(seed, world), method, scope="all", steps=steps, learning_rate=learning_rate, at=at, seed=seed
    )
    log = outcome.summary["log"]
    terms = [loss - retain for loss, retain in zip(log["loss"], log["nll"]["retain"])]
    return {"points": points, "lowest": min(terms), "highest": max(terms)}


def adapted(
    method: str,
    init: str,
    order: int,
    seed: int,
    steps: int,
    learning_rate: float = 2e-3,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """When a run in adapters has forgotten (None: not within `steps`), what it kept there, and all measures at its end.

    Args:
        order: seed of the order of rows.
    """
    made = mini(seed, world)
    watched = {name: made.data[name] for name in WATCHED}
    reached: dict[str, float] = {}

    def observe(model: LanguageModel, step: int) -> dict[str, Any]:
        if reached and step < steps:
            return {}
        accuracy = knowledge(model, watched["forget"]).accuracy
        if accuracy <= FORGOTTEN and not reached:
            reached.update(measure(model, watched), step=step)
        return measure(model, watched) if step == steps else {"forget_accuracy": accuracy}

    at = sorted({*range(EVERY, steps, EVERY), steps})
    scope = f"lora(r=4, alpha=8, init={init})"
    points, _ = curve(
        made, method, scope=scope, steps=steps, learning_rate=learning_rate, at=at, seed=order, observe=observe
    )
    there = {f"reached_{name}": reached.get(name) for name in ("step", "retain_accuracy", "retain_nll")}
    return {**there, **points[-1]}


def passages(
    method: str,
    seed: int,
    memorise: int,
    steps: int,
    stop: bool = False,
    learning_rate: float = 2e-3,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Running text about people, learnt by heart, then forgotten with LoKU's adapters: MA and EL before and after.

    Args:
        stop: end by the paper's rule, looked at every few steps.
    """
    made = mini(seed, world)
    texts = {
        name: [Text(id=one.name, answer=passage(made.world, one), kind="text") for one in made.world.members(name)]
        for name in ("forget", "retain", "holdout")
    }
    model = made.original.copy()
    learnt = [model.encode(text) for name in ("forget", "retain") for text in texts[name]]
    fit(model, learnt, steps=memorise, batch_size=16, learning_rate=1e-3, seed=seed)
    outcome = unlearn(
        model,
        get("methods", method),
        {},
        scope="lora(r=4, alpha=8, init=fila)",
        data=texts,
        training=Training(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=16,
            seed=seed,
            guard=None,
            stop=Stop(n=NGRAM, every=EVERY) if stop else None,
        ),
    )
    found: dict[str, float] = {"ended": outcome.summary["steps"]}
    for when, subject in (("before", model), ("after", outcome.delta.apply(model))):
        for name, rows in texts.items():
            accuracy, likelihood = extraction_likelihood(subject, rows, n=NGRAM).means
            found |= {f"{name}_ma_{when}": accuracy, f"{name}_el_{when}": likelihood}
    return found


@reproduction(
    paper="arXiv:2408.06621", cost="4 min on 2 cores, and 2 once for the models of the worlds", systems=("ihl", "fila")
)
def loku(
    case: Case,
    *,
    steps: int = 120,
    orders: int = 2,
    memorise: int = 60,
    world: dict[str, Any] | None = None,
) -> Findings:
    """What LoKU's loss does and what the start of its adapters does, apart and on running text.

    `orders`: seeds of row orders for each world; `memorise`: steps in which passages are learnt by heart. `world`:
    sizes of the invented world, arguments of expunge.world.build.build.
    """
    shared = {"steps": steps, "world": world}
    at = [steps // 4, steps // 2, steps]
    whole = gather(case, trial, {name: {**shared, "method": name, "at": at} for name in ("ihl", "grad_diff")})
    parts = case.trials(
        adapted,
        [
            {**shared, "method": method, "init": init, "order": order}
            for method, starts in (("ihl", STARTS), ("grad_diff", STARTS[:2]))
            for init in starts
            for order in range(orders)
        ],
    )
    texts = case.trials(
        passages, [{**shared, "method": "ihl", "memorise": memorise, "stop": stop} for stop in (False, True)]
    )
    return Findings(
        claims=judge(whole, parts, texts, steps),
        tables=[
            table(whole, "Full scope", MEANING),
            _adapters(parts),
            _passages(texts),
        ],
        notes=NOTES,
    )


def _passages(texts: Sequence[Row]) -> Table:
    cells = []
    for stop in (False, True):
        mine = [row for row in texts if row["stop"] == stop]
        for name in ("forget", "retain", "holdout"):
            found = [str(spread(mine, f"{name}_{what}")) for what in _EXTRACTED]
            cells.append([name, str(spread(mine, "ended")), *found])
    return Table(
        "Passages",
        ["texts", "steps", "MA before", "MA after", f"EL_{NGRAM} before", f"EL_{NGRAM} after"],
        cells,
        "MA: memorisation accuracy. EL: extraction likelihood. Holdout: passages in no training data. Below: runs that "
        f"the paper's rule ended, EL_{NGRAM} and MA looked at every {EVERY} steps.",
    )


_EXTRACTED = ("ma_before", "ma_after", "el_before", "el_after")

NOTES = [
    "The subject is the invented world's own (4 layers, d = 96, 100 forget rows). The criteria were written on "
    "another mini subject with 48 rows and 60 steps; 120 steps of 16 + 16 rows make the same 19 passes, and both are "
    "judged. Full scope at 5e-4; adapters r = 4, alpha = 8 on all seven projections at 2e-3. The paper trains 5 epochs "
    "at 1e-4 and 2e-4 on 1.3B to 7B models.",
    "Fisher information is of single rows; the released code squares gradients of batches (fila.py).",
    "ICLR's reviewers saw FILA make GradDiff worse in the paper's own figures; the table has both objectives. PiSSA "
    "is the control that shows whether the Fisher weighting matters, or only starting in principal directions.",
    "Passages are 4 sentences about a person. All but the holdout's were learnt by heart before; thresholds are the "
    "holdout's means under that model. The paper's rule ends a run at the first check at which both are reached; the "
    "criteria are older than the rule is here, so runs with and without it are judged by them.",
]


def _reached(parts: Sequence[Row], steps: int, **where: str) -> list[float]:
    """Steps to the threshold; a run that never came there counts as twice its length."""
    found = [row for row in parts if all(row[key] == value for key, value in where.items())]
    return [row["reached_step"] or 2 * steps for row in found]


_KEPT = ("retain there", "retain NLL there", "retain at the end", "retain NLL at the end", "forget NLL at the end")


def _adapters(parts: Sequence[Row]) -> Table:
    cells = []
    for method, init in dict.fromkeys((row["method"], row["init"]) for row in parts):
        where = {"method": method, "init": init}
        mine = [row for row in parts if row["method"] == method and row["init"] == init]
        there = [row for row in mine if row["reached_step"]]
        steps = [row["reached_step"] or "never" for row in mine]
        kept = [str(spread(there, f"reached_{name}")) if there else "-" for name in ("retain_accuracy", "retain_nll")]
        end = [str(spread(parts, name, **where)) for name in ("retain_accuracy", "retain_nll", "forget_nll")]
        cells.append([method, init, ", ".join(map(str, steps)), *kept, *end])
    return Table(
        "Adapters",
        ["objective", "start", f"steps to forget accuracy {FORGOTTEN:g}", *_KEPT],
        cells,
        f"Looked at every {EVERY} steps. Steps by order, then world seed; the rest mean (lowest to highest).",
    )


def judge(whole: Sequence[Row], parts: Sequence[Row], texts: Sequence[Row], steps: int) -> list[Claim]:
    """The claims; criteria were fixed before (specs: loku, section 6).

    Args:
        whole: rows of `trial`, `parts` of `adapted`, `texts` of `passages`.
    """
    low, high = spread(whole, "lowest", run="ihl").low, spread(whole, "highest", run="ihl").high
    return [
        *(_damage(whole, step) for step in (steps // 2, steps)),
        Claim(
            "The inverted hinge is bounded",
            "within [0, 2]",
            "its value stays within [0, 2] at every step of every seed (rounding 1e-5)",
            f"{number(low)} to {number(high)}",
            low >= -1e-5 and high <= 2 + 1e-5,
        ),
        *_starts(parts, steps),
        _utility(parts),
        *_extraction([row for row in texts if not row["stop"]], f"{steps} steps"),
        *_extraction([row for row in texts if row["stop"]], "stopped by the paper's rule"),
    ]


def _damage(whole: Sequence[Row], step: int) -> Claim:
    ihl, diff = (
        {name: spread(whole, name, run=run, step=step).mean for name in ("retain_nll", "forget_nll", "forget_accuracy")}
        for run in ("ihl", "grad_diff")
    )
    ratios = [ihl[name] / diff[name] for name in ("retain_nll", "forget_nll")]
    return Claim(
        f"The inverted hinge forgets with less damage than GradDiff, which is unbounded ({step} steps)",
        "GPT-Neo on TDEC, Phi-1.5 and Llama-2 on TOFU: forgotten at utility near the start model's",
        "full scope: retain NLL at most 0.2 x, forget NLL at most 0.6 x GradDiff's; forget accuracy at most 0.05 for "
        "both",
        f"{number(ratios[0])} x, {number(ratios[1])} x; {number(ihl['forget_accuracy'])} and "
        f"{number(diff['forget_accuracy'])}",
        ratios[0] <= 0.2 and ratios[1] <= 0.6 and max(ihl["forget_accuracy"], diff["forget_accuracy"]) <= 0.05,
    )


def _starts(parts: Sequence[Row], steps: int) -> list[Claim]:
    ihl = {init: median(_reached(parts, steps, method="ihl", init=init)) for init in STARTS}
    diff = {init: median(_reached(parts, steps, method="grad_diff", init=init)) for init in STARTS[:2]}
    told = ", ".join(f"{init} {number(value)}" for init, value in ihl.items())
    return [
        Claim(
            "Starting adapters in Fisher-weighted principal directions makes them forget in fewer steps",
            "fewer epochs to the threshold at better utility",
            f"IHL, median steps to forget accuracy {FORGOTTEN:g}: fila at most 0.75 x default",
            f"{told}; GradDiff: " + ", ".join(f"{init} {number(value)}" for init, value in diff.items()),
            ihl["fila"] <= 0.75 * ihl["default"],
        ),
        Claim(
            "The Fisher weighting matters, not only the principal directions",
            "not shown; no such control in the paper",
            "IHL: fila needs fewer steps than pissa (reported, not expected)",
            told,
            ihl["fila"] < ihl["pissa"],
        ),
    ]


def _utility(parts: Sequence[Row]) -> Claim:
    gains = {}
    for init in STARTS[:2]:
        kept = [
            [row["reached_retain_accuracy"] for row in parts if row["method"] == method and row["init"] == init]
            for method in ("ihl", "grad_diff")
        ]
        means = [fmean(known) if (known := [v for v in values if v is not None]) else None for values in kept]
        gains[init] = None if None in means else means[0] - means[1]  # type: ignore[operator]
    told = ", ".join(f"{init} {'never there' if gain is None else number(gain)}" for init, gain in gains.items())
    return Claim(
        "In adapters GradDiff trades forgetting badly for utility, the inverted hinge does not",
        "GA and GradDiff with LoRA: slow, or utility lost",
        "retain accuracy where the threshold is reached: IHL's at least 0.15 above GradDiff's, for both starts",
        f"difference: {told}",
        None if None in gains.values() else min(gain for gain in gains.values() if gain is not None) >= 0.15,
    )


def _extraction(texts: Sequence[Row], when: str) -> list[Claim]:
    mean: Mapping[str, float] = {
        f"{name}_{what}": spread(texts, f"{name}_{what}").mean
        for name in ("forget", "retain", "holdout")
        for what in _EXTRACTED
    }
    above = {what: mean[f"forget_{what}_after"] - mean[f"holdout_{what}_before"] for what in ("el", "ma")}
    told = (
        f"EL {number(mean['forget_el_before'])} to {number(mean['forget_el_after'])} (holdout "
        f"{number(mean['holdout_el_before'])}), MA {number(mean['forget_ma_before'])} to "
        f"{number(mean['forget_ma_after'])} (holdout {number(mean['holdout_ma_before'])})"
    )
    return [
        Claim(
            f"Memorised text can no longer be extracted, other text is kept ({when})",
            "GPT-Neo on TDEC: EL_10 and MA at or below those of unseen text",
            f"EL_{NGRAM} and MA of forgotten passages at most those of holdout passages under the model before; MA of "
            "retained passages at least 0.9 of before",
            f"{told}; retained MA {number(mean['retain_ma_before'])} to {number(mean['retain_ma_after'])}",
            max(above.values()) <= 0 and mean["retain_ma_after"] >= 0.9 * mean["retain_ma_before"],
        ),
        Claim(
            f"Memorised text ends like text never seen ({when})",
            "-",
            f"EL_{NGRAM} and MA within 0.05 of the holdout's, above or below",
            told,
            max(map(abs, above.values())) <= 0.05,
        ),
    ]
