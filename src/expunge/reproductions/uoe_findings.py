"""What the trials of the reproduction of UOE say: the claims, judged at equal forgetting, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evidence import Table
from ..routing import SETS
from .case import Claim, Row, Spread, number, spread
from .mixture import Sizes

# --- equal forgetting ------------------------------------------------------------------------------------------------


def at_rates(rows: Sequence[Row], variant: str) -> dict[float, list[Row]]:
    """Learning rate to the variant's rows, one a seed."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if row["variant"] == variant:
            found.setdefault(row["learning_rate"], []).append(row)
    return found


def kept(rows: Sequence[Row], variant: str) -> Spread | None:
    """Retain accuracy when forgotten, at that of the learning rates which keeps most, of those at which every seed
    forgets; None where there is none."""
    able = [some for some in at_rates(rows, variant).values() if all(row["reached"] is not None for row in some)]
    return max((spread(some, "retain_accuracy") for some in able), key=lambda one: one.mean, default=None)


def said(one: Spread | None) -> str:
    return "not forgotten by every seed" if one is None else str(one)


def keeps_more(rows: Sequence[Row], variant: str, others: Sequence[str], by: float) -> tuple[str, bool | None]:
    """(what was measured, whether the variant forgets and keeps so much more than each other one; None where one of
    them never forgets and nothing else decides)."""
    mine, theirs = kept(rows, variant), {other: kept(rows, other) for other in others}
    measured = f"{variant} {said(mine)}; " + "; ".join(f"{name} {said(one)}" for name, one in theirs.items())
    if mine is None or any(one is not None and mine.mean < one.mean + by for one in theirs.values()):
        return measured, False
    return measured, None if None in theirs.values() else True


def judge(rows: Sequence[Row], sizes: Sizes, steps: int, threshold: float) -> list[Claim]:
    """The claims: the criteria of specs: uoe, section 6, and beside them the paper's other comparisons with margins of
    our own."""
    forgotten = f"when forget accuracy is at most {threshold:g}, retain accuracy of"
    more = keeps_more(rows, "top expert", ["all parameters"], 0.2)
    three = keeps_more(rows, "top expert", ["top 3 of the layer"], 0.05)
    spread_out = keeps_more(rows, "top expert", ["top 1 of each layer"], 0.05)
    foremost = keeps_more(rows, "top expert", ["lowest expert"], 0.05)
    retained = kept(rows, "grad_diff, top expert")
    claims = [
        _drift(rows),
        _parts(rows),
        Claim(
            "One expert with its router forgets, and keeps more than all parameters do",
            "GA on Qwen, WMDP-Cyber / MMLU: 0.299 / 0.501 against 0.295 / 0.339; RWKU: 0.006 / 0.571 against 0.008 / "
            "0.485",
            f"{forgotten} the top expert at least 0.2 above that of all parameters",
            *more,
        ),
        Claim(
            "One expert is better than several of its layer",
            "DeepSeek, MMLU at equal forgetting: 0.510 against 0.465 with 6 of the layer",
            f"{forgotten} the top expert at least 0.05 above that of three in its layer",
            *three,
        ),
        Claim(
            "One expert is better than several in different layers",
            "DeepSeek, MMLU at equal forgetting: 0.510 against 0.285 and 0.257 with 3 and 6",
            f"{forgotten} the top expert at least 0.05 above that of one in each layer",
            *spread_out,
        ),
        _lowest(rows, steps),
        Claim(
            "The expert that forget rows use most keeps more than the one they use least",
            "DeepSeek, RWKU: MMLU 0.549 at rank 1, 0.236 at rank 26",
            f"{forgotten} the top expert at least 0.05 above that of the lowest",
            *foremost,
        ),
        _anchored(rows),
        _weights(rows, forgotten),
        Claim(
            "With likelihood of retain rows beside it one expert forgets and keeps nearly all",
            "GDIFF + SEUF on Qwen: 0.245 / 0.530, start 0.419 / 0.598",
            f"{forgotten} the top expert (grad_diff) at least 0.9",
            said(retained),
            retained is not None and retained.mean >= 0.9,
        ),
    ]
    for objective, against, published in (
        ("grad_diff", "all parameters", "0.530 against 0.297"),
        ("npo", "all parameters", "0.547 against 0.461"),
        ("rmu", "all experts", "0.535 against 0.356"),
    ):
        claims.append(
            Claim(
                f"One expert keeps more than {against} do, with retain rows too: {objective}",
                f"Qwen, WMDP-Cyber, MMLU: {published}",
                f"{forgotten} the top expert at least 0.02 above that of {against}",
                *keeps_more(rows, f"{objective}, top expert", [f"{objective}, {against}"], 0.02),
            )
        )
    return [*claims, _count(rows, sizes)]


def _drift(rows: Sequence[Row]) -> Claim:
    whole = at_rates(rows, "all parameters")
    lost = {
        r: spread(some, "start_retain_accuracy").mean - spread(some, "retain_accuracy").mean
        for r, some in whole.items()
    }
    same = {r: spread(some, "forget_overlap") for r, some in whole.items()}
    return Claim(
        "Objectives made for dense models send tokens to other experts and damage the rest",
        "GA on Qwen: MMLU 0.598 to 0.339",
        "gradient ascent on all parameters, when forgotten, at both rates: retain accuracy at least 0.2 below the "
        "start, at most 0.9 of the forget tokens' experts are the same",
        "; ".join(f"rate {r:g}: {number(lost[r])} lost, {same[r]} the same" for r in whole),
        all(lost[r] >= 0.2 and same[r].mean <= 0.9 for r in whole),
    )


def _parts(rows: Sequence[Row]) -> Claim:
    whole = kept(rows, "all parameters")
    others = {name: kept(rows, name) for name in ("all routers", "all experts")}
    return Claim(
        "Routers alone or experts alone are no better than all parameters",
        "GA on Qwen: MMLU 0.298 and 0.334 against 0.339",
        "neither forgets and keeps 0.05 more retain accuracy than all parameters",
        "; ".join(f"{name} {said(one)}" for name, one in {**others, "all parameters": whole}.items()),
        None if whole is None else all(one is None or one.mean < whole.mean + 0.05 for one in others.values()),
    )


def _lowest(rows: Sequence[Row], steps: int) -> Claim:
    """Not within twice the top expert's steps. Where neither has forgotten that cannot be told."""
    low, top = (
        {(row["learning_rate"], row["seed"]): row["reached"] for row in rows if row["variant"] == name}
        for name in ("lowest expert", "top expert")
    )
    within = [key for key, at in low.items() if at is not None and (top[key] is None or at <= 2 * top[key])]
    open_ = [key for key, at in low.items() if at is None and (top[key] is None or steps < 2 * top[key])]
    return Claim(
        "An expert that forget rows hardly use does not make the model forget",
        "a random expert under-forgets: RMU on Qwen 0.351, the top expert 0.254",
        "the lowest expert does not reach forgetting within twice the top expert's steps, at either rate and seed",
        f"it does in {len(within)} of {len(low)} runs" + (f"; too short to tell: {len(open_)}" if open_ else ""),
        False if within else None if open_ else True,
    )


def _anchored(rows: Sequence[Row]) -> Claim:
    some = [row for row in rows if row["variant"] == "top expert"]
    rises = [row["forget_taken_after"] > row["forget_taken_before"] for row in some]
    return Claim(
        "The anchor holds forget tokens on the expert",
        "-",
        "more forget tokens take it than at the start, with anchor 1, in every run",
        f"{spread(some, 'forget_taken_before')} of the tokens, then {spread(some, 'forget_taken_after')}; it rises in "
        f"{sum(rises)} of {len(rises)} runs",
        all(rises),
    )


def _weights(rows: Sequence[Row], forgotten: str) -> Claim:
    found = [kept(rows, name) for name in ("top expert, anchor 0", "top expert", "top expert, anchor 100")]
    means = [one.mean for one in found if one is not None]
    return Claim(
        "The anchor's weight is uncritical",
        "DeepSeek, RWKU: MMLU 0.544, 0.549, 0.547, 0.547 at weights 0, 1, 100, 1000",
        f"{forgotten} the top expert differs by at most 0.05 between weights 0, 1 and 100",
        "; ".join(f"{weight}: {said(one)}" for weight, one in zip((0, 1, 100), found)),
        len(means) == len(found) and max(means) - min(means) <= 0.05,
    )


def _count(rows: Sequence[Row], sizes: Sizes) -> Claim:
    wanted = 3 * sizes.hidden * sizes.intermediate + sizes.experts * sizes.hidden
    found = sorted({row["trainable"] for row in rows if row["variant"] == "top expert"})
    whole = next(row["trainable"] for row in rows if row["variant"] == "all parameters")
    return Claim(
        "One expert and one router are all that moves",
        "0.06% of the parameters of a model with 64 experts in each of 27 layers; Mixtral 0.41%",
        f"3 x hidden x intermediate + experts x hidden = {wanted} parameters",
        f"{', '.join(map(str, found))}, {number(100 * found[-1] / whole)}% of {whole}",
        found == [wanted],
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def reached(some: Sequence[Row]) -> str:
    """Steps until forgotten over the seeds that forget."""
    able = [row for row in some if row["reached"] is not None]
    steps = str(spread(able, "reached")) if able else "-"
    return steps if len(able) == len(some) else f"{steps}; {len(able)} of {len(some)} seeds"


MEASURES = {
    "forget_accuracy": "forget",
    "retain_accuracy": "retain",
    "retain_nll": "retain NLL",
    "forget_overlap": "forget experts kept",
    "retain_overlap": "retain experts kept",
}


def _lines(rows: Sequence[Row]) -> list[list[Any]]:
    return [
        [name, f"{rate:g}", reached(some), *(str(spread(some, measure)) for measure in MEASURES)]
        for name in names(rows, "variant")
        for rate, some in at_rates(rows, name).items()
    ]


def names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def forgetting(rows: Sequence[Row], threshold: float) -> Table:
    start = [str(spread(rows, f"start_{name}")) for name in ("forget_accuracy", "retain_accuracy", "retain_nll")]
    return Table(
        "At equal forgetting",
        ["run", "rate", "steps", *MEASURES.values()],
        [["start", "-", "0", *start, "1", "1"], *_lines(rows)],
        f"The first check at which forget accuracy is at most {threshold:g}; where a seed never gets there, its last "
        "step. Gradient ascent without retain rows unless another objective is named. Accuracy: share of rows whose "
        "value is the greedy choice; guessing knows one in ten. NLL in nats per answer token. Experts kept: share of "
        "tokens' experts that are the same as in the start model, mean over blocks. Mean (lowest to highest) over "
        "seeds.",
    )


def routes(rows: Sequence[Row]) -> Table:
    found = [
        [
            name,
            f"{rate:g}",
            "; ".join(" ".join(f"{block}.{expert}" for block, expert in row["experts"]) for row in some),
            str(Spread(tuple(row["affinity"][0] / row["affinity_mean"] for row in some))),
            *(str(spread(some, f"{side}_taken_{when}")) for side in SETS for when in ("before", "after")),
            "; ".join(" ".join(f"{value:.2f}" for value in row["forget_blocks"]) for row in some),
        ]
        for name in names([row for row in rows if row["experts"]], "variant")
        for rate, some in at_rates(rows, name).items()
    ]
    columns = ["forget tokens there, start", "forgotten", "retain tokens there, start", "forgotten"]
    return Table(
        "Who is taken, and who goes there",
        ["run", "rate", "block.expert of each seed", "affinity / mean", *columns, "forget experts kept, by block"],
        found,
        "Tokens there: share of tokens that take one of the experts taken (mean over their blocks), at the start and "
        "when forgotten. Affinity: of the first expert taken, over the mean of all.",
    )


def elsewhere(rows: Sequence[Row]) -> Table:
    lines = [
        [world, *line]
        for world in names(rows, "world")
        for line in _lines([row for row in rows if row["world"] == world])
    ]
    note = "As the first table, on another corpus or with other experts. Told, not judged."
    return Table("Elsewhere", ["world", "run", "rate", "steps", *MEASURES.values()], lines, note)
