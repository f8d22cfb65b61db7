"""Outlandish: what one learned text does to prompts that have nothing to do with it (arXiv:2504.09522).

Every text is learned by itself from the same weights. With x its keyword, X_c what stands before it there, and X_j
prompts of the keyword's theme whose right answer is another,

    S_prime = mean_j P_after(x | X_j) / P_before(x | X_j)        priming: how much likelier the word became elsewhere
    S_mem   = P_after(x | X_c) / P_before(x | X_c)               memorisation
    P_before(x | X_c)                                            how surprising the text was: what predicts priming

A mean of ratios is ruled by prompts that hardly allowed the word before; the geometric mean and the plain difference
stand beside it. Variants are learned or cut from the same run, so that they are compared text by text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from ..agents import agent
from ..deltas import Delta
from ..errors import ParameterError, RowError
from ..evidence import Measured, Scorecard, Table
from ..files import write_text
from ..methods.optimise.loop import Drawn, Recipe, Training, Turn, mean_loss, train
from ..methods.optimise.magnitude import Granularity, ignored, without_largest
from ..methods.optimise.terms import negative_log_likelihood
from ..metrics.bootstrap import Bootstrap
from ..metrics.measure import gather
from ..metrics.values import Units, Values, mean_of, median_of
from ..registry import benchmark
from ..rows import Row, Source, folder_of, read_rows
from ..subjects.language import LanguageModel
from ..subjects.packed import Encoded
from ..tables.store import content_key
from .case import Bench
from .outlandish_data import Prefix, Sample, asked, read, themes, unrelated
from .outlandish_mini import mini
from .stepping_stone import Stone, stepping_stone

Variant = Literal["plain", "ignore_k", "random_k", "ignore_k_gradient", "stepping_stone"]
MINI_RATE, USUAL_RATE = 2e-3, 1e-5
MEMORISED = 0.5
TINY = 1e-12
"""Probability below which a ratio is mostly rounding."""
COLUMNS = ("s_prime", "s_prime_geometric", "difference", "s_mem", "keyword", "memorised")
SENTENCES = {
    "s_prime": "How many times likelier the learned word became after prompts that have nothing to do with the text.",
    "s_prime_geometric": "The same, as the geometric mean over prompts.",
    "difference": "How much probability the word gained after such prompts.",
    "s_mem": "How many times likelier the word became in the text itself.",
    "keyword": "Probability of the word in the text itself.",
    "memorised": "Share of texts in which the word is at least as likely as not.",
}


@benchmark(paper="arXiv:2504.09522", data="the authors' Outlandish texts, in any file of rows; themes.json beside it")
def outlandish(
    bench: Bench,
    *,
    variants: tuple[Variant, ...] = ("plain", "ignore_k"),
    presentations: Annotated[int, Field(ge=1)] = 20,
    every: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 8,
    learning_rate: Annotated[float, Field(gt=0)] | None = None,
    k: Annotated[float, Field(ge=0, lt=100)] = 8.0,
    granularity: Granularity = "tensor",
    writer: str = "offline",
    whole: bool = False,
    samples: str = "samples.jsonl",
    fields: dict[str, str] | None = None,
    limit: Annotated[int, Field(ge=0)] = 0,
) -> Scorecard:
    """How far learning one surprising text primes its keyword elsewhere, and what dilutes that.

    With `--original` nothing is learned: both models are asked as they are, which tells how far any change (a refusal
    that was taught, say) primes the keywords.

    Args:
        variants: plain learning; ignore_k, without the largest k % of its change; random_k, without k % drawn at random
            (a control); ignore_k_gradient, without the largest k % of each gradient; stepping_stone, of a rewording.
        presentations: times a text is shown.
        every: steps from one presentation to the next; in between companions alone are learned.
        batch_size: texts of a step: the sample and companions (companions.jsonl in the data folder); 1 learns it alone.
        learning_rate: by default 1e-5; on the mini version, whose models are small, 2e-3.
        k: per cent of the change, or of a gradient.
        granularity: the largest of each tensor, each row or all tensors together.
        writer: agent that rewords for stepping_stone, beside the samples' own `stones`.
        whole: probability of the whole keyword in place of its first token.
        samples: the file of texts in the data folder.
        fields: our names to the file's columns.
        limit: of that many texts, the first; 0 takes all.
    """
    folder = folder_of(bench.source(mini))
    found = read(folder / samples, fields or {})
    found = found[:limit] if limit else found
    prompts = themes(folder / "themes.json")
    lacking = next((sample for sample in found if sample.theme not in prompts), None)
    if lacking:
        raise RowError(f"{lacking.source}: theme {lacking.theme!r} is not in {folder / 'themes.json'}")
    told = [unrelated(prompts[sample.theme], sample) for sample in found]
    settings = Learning(
        variants if bench.original is None else ("plain",),
        presentations,
        every,
        batch_size,
        learning_rate or (USUAL_RATE if bench.data else MINI_RATE),
        k,
        granularity,
        whole,
        bench.seed,
    )
    base = bench.original or bench.subject
    start = _before(base, found, told, whole)
    if bench.original is not None:
        after = [Said(one.keyword, one.prefixes) for one in _before(bench.subject, found, told, whole)]
        said: list[dict[str, Said]] = [{"plain": one} for one in after]
    else:
        said = _learned(bench, settings, folder, found, told, writer)
    rows: Scores = {name: [score(a, one[name]) for a, one in zip(start, said)] for name in settings.variants}
    card = bench.scorecard(
        _measured(bench, found, rows),
        headline=["s_prime", "s_mem", "memorised"],
        tables=_tables(bench.draws, found, start, said, rows),
        notes=_notes(settings, bench, start),
        rows={"texts": len(found), "thematic prompts": sum(map(len, told))},
    )
    if bench.original is not None:
        return card
    return replace(card, models=[{"role": "before", "name": base.name, "fingerprint": base.fingerprint}])


@dataclass(frozen=True)
class Learning:
    """How texts are learned."""

    variants: tuple[Variant, ...]
    presentations: int
    every: int
    batch_size: int
    learning_rate: float
    k: float
    granularity: Granularity
    whole: bool
    seed: int


@dataclass(frozen=True)
class Said:
    """Log-probabilities of one keyword under one model."""

    keyword: float
    """In its text."""
    prefixes: list[float]
    holdout: float = 0.0
    """Loss on texts nobody learned from, nats a token."""
    stone: dict[str, Any] | None = None


# --- what models say --------------------------------------------------------------------------------------------------


def logprobs(subject: LanguageModel, rows: Sequence[Row], whole: bool) -> list[float]:
    """Of each row's answer: of its first token, or of all."""
    table = subject.score([((str(i), "keyword"), subject.encode(row)) for i, row in enumerate(rows)])
    if whole:
        return np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64).tolist()
    return [float(table.logprob[start]) for start in table.offsets[:-1]]


def _before(subject: LanguageModel, found: Sequence[Sample], told: Sequence[list[Prefix]], whole: bool) -> list[Said]:
    """One pass over all texts and prompts; a prompt that several keywords share is read once."""
    rows = [row for sample, prefixes in zip(found, told) for row in _asks(sample, prefixes)]
    values = iter(logprobs(subject, rows, whole))
    return [Said(next(values), [next(values) for _ in prefixes]) for prefixes in told]


def _asks(sample: Sample, prefixes: Sequence[Prefix]) -> list[Row]:
    return [sample.context(), *(asked(sample.id, f"{one.prompt} ", sample.keyword) for one in prefixes)]


def _learned(
    bench: Bench,
    settings: Learning,
    folder: Path,
    found: Sequence[Sample],
    told: Sequence[list[Prefix]],
    writer: str,
) -> list[dict[str, Said]]:
    subject = bench.subject
    companions, holdout = (
        [subject.encode(row) for row in _texts(folder / f"{name}.jsonl")] for name in ("companions", "holdout")
    )
    if settings.batch_size > 1 and not companions:
        raise RowError(f"{folder / 'companions.jsonl'} is missing; batch_size=1 learns texts without companions")
    about = [asdict(settings), [row.ids for row in (*companions, *holdout)], writer]
    said: list[dict[str, Said]] = []
    for number, (sample, prefixes) in enumerate(zip(found, told), start=1):
        key = content_key(subject.fingerprint, about, asdict(sample), [asdict(one) for one in prefixes])
        path = bench.folder / "texts" / f"{key}.json"
        if not path.is_file():
            made = _one(subject, settings, sample, prefixes, companions, holdout, writer)
            write_text(path, json.dumps({name: asdict(one) for name, one in made.items()}))
        kept = json.loads(path.read_text(encoding="utf-8"))
        said.append({name: Said(**kept[name]) for name in settings.variants})
        if bench.progress:
            bench.progress("learn", number, len(found))
    return said


def _texts(path: Path) -> list[Row]:
    return read_rows(Source(str(path)), path.stem) if path.is_file() else []


def _one(
    subject: LanguageModel,
    settings: Learning,
    sample: Sample,
    prefixes: Sequence[Prefix],
    companions: Sequence[Encoded],
    holdout: Sequence[Encoded],
    writer: str,
) -> dict[str, Said]:
    """Every variant of one text."""
    asks = _asks(sample, prefixes)

    def said(model: LanguageModel, stone: Stone | None = None) -> Said:
        values = logprobs(model, asks, settings.whole)
        loss = mean_loss(model, holdout) if holdout else 0.0
        return Said(values[0], values[1:], loss, None if stone is None else asdict(stone))

    made: dict[str, Said] = {}
    known: dict[str, LanguageModel] = {}

    def learned(text: str) -> LanguageModel:
        if text not in known:
            known[text] = learn(subject, text, companions, settings)
        return known[text]

    for name in settings.variants:
        if name == "plain":
            made[name] = said(learned(sample.text))
        elif name == "stepping_stone":
            stone = stepping_stone(sample, _probability(subject, sample, settings.whole), _writer(writer, subject))
            made[name] = said(learned(stone.text), stone)
        elif name == "ignore_k_gradient":
            made[name] = said(learn(subject, sample.text, companions, settings, pruned=True))
        else:
            drawn = settings.seed if name == "random_k" else None
            whole = Delta.from_models(subject, learned(sample.text))
            delta, _ = ignored(whole, settings.k, granularity=settings.granularity, random=drawn)
            made[name] = said(delta.apply(subject))
    return made


def _writer(name: str, subject: LanguageModel) -> Any:
    return None if name == "offline" else agent(name, subject=subject)


def _probability(subject: LanguageModel, sample: Sample, whole: bool) -> Callable[[str], float]:
    return lambda text: float(np.exp(logprobs(subject, [sample.context(text)], whole)[0]))


def learn(
    subject: LanguageModel,
    text: str,
    companions: Sequence[Encoded],
    settings: Learning,
    *,
    pruned: bool = False,
) -> LanguageModel:
    """A copy that learned one text among companions, by ordinary next-token training of all weights.

    Which companions stand beside it is drawn by the seed alone, so that all texts and variants have the same.
    """
    working = subject.copy()
    rows = [subject.encode(Row(id="sample", answer=text, kind="text")), *companions]
    generator = torch.Generator().manual_seed(settings.seed)
    stream: list[int] = []

    def drawn(count: int) -> list[int]:
        while len(stream) < count and companions:
            stream.extend((torch.randperm(len(companions), generator=generator) + 1).tolist())
        return [stream.pop(0) for _ in range(min(count, len(stream)))]

    steps = []
    for step in range((settings.presentations - 1) * settings.every + 1):
        shown = [0] if step % settings.every == 0 else drawn(1)
        steps.append({"rows": shown + drawn(settings.batch_size - 1)})
    if not all(step["rows"] for step in steps):
        raise ParameterError(f"every is {settings.every}: the steps in between need companions, and there are none")
    working.model.requires_grad_(True)
    parameters = list(working.model.parameters())

    def around(turn: Turn) -> torch.Tensor:
        loss = turn.backward()
        for p in turn.parameters:
            p.grad = None if p.grad is None else without_largest(p.grad, settings.k)
        return loss

    recipe = Recipe(
        lambda step: negative_log_likelihood(step.sides["rows"]), ("rows",), around=around if pruned else None
    )
    training = Training(learning_rate=settings.learning_rate, seed=settings.seed, guard=None)
    train(working, parameters, Drawn({"rows": rows}, steps), recipe, training)
    working.model.requires_grad_(False)
    working.__dict__.pop("fingerprint", None)
    return working


# --- scores -----------------------------------------------------------------------------------------------------------


def score(before: Said, after: Said) -> dict[str, float]:
    """S_prime, S_mem and their kin of one text."""
    was, now = np.array(before.prefixes), np.array(after.prefixes)
    return {
        "s_prime": float(np.exp(now - was).mean()),
        "s_prime_geometric": float(np.exp((now - was).mean())),
        "difference": float((np.exp(now) - np.exp(was)).mean()),
        "s_mem": float(np.exp(after.keyword - before.keyword)),
        "keyword": float(np.exp(after.keyword)),
        "memorised": float(np.exp(after.keyword) >= MEMORISED),
    }


Scores = Mapping[str, list[dict[str, float]]]
"""Variant to the scores of each text."""


def _measured(bench: Bench, found: Sequence[Sample], rows: Scores) -> list[Measured]:
    units = Units.of(("texts", found))
    measured = []
    for variant, several in rows.items():
        for name in COLUMNS:
            each = np.array([one[name] for one in several])
            rule = mean_of(each) if name in ("memorised", "difference") else median_of(each)
            lower = name in ("s_prime", "s_prime_geometric", "difference")
            measured.append(
                gather(
                    name if variant == "plain" else f"{variant}_{name}",
                    {"after": [Values(units, rule, each)]},
                    bench.draws,
                    direction="lower" if lower else "higher",
                    ideal={"difference": "0"}.get(name, "1") if lower else "as plain",
                    sentence=SENTENCES[name],
                )
            )
    return measured


def _tables(
    draws: Bootstrap, found: Sequence[Sample], start: Sequence[Said], said: Sequence[dict[str, Said]], rows: Scores
) -> list[Table]:
    plain = next(iter(rows))
    groups: list[tuple[str, list[bool]]] = [("all", [True] * len(found))]
    for field in ("theme", "category"):
        for name in sorted({getattr(sample, field) for sample in found}):
            groups.append((f"{field} {name}", [getattr(sample, field) == name for sample in found]))
    lines, predicted = list[list[Any]](), list[list[Any]]()
    surprise = np.array([one.keyword for one in start])
    priming = np.array([np.log(one["s_prime"]) for one in rows[plain]])
    for label, inside in groups:
        at = np.flatnonzero(inside)
        for column in ("s_prime", "s_mem"):
            quartiles = np.quantile([rows[plain][i][column] for i in at], (0.25, 0.5, 0.75))
            lines.append([label, column, len(at), *map(float, quartiles)])
        if not label.startswith("theme"):
            predicted.append([label, len(at), *correlation(surprise[at], priming[at], draws)])
    tables = [
        Table(f"By theme and category, {plain}", ["texts", "score", "n", "lower quartile", "median", "upper"], lines),
        Table(
            "Does surprise predict priming?",
            ["texts", "n", "Spearman", "low", "high"],
            predicted,
            "Of log P(keyword) before and log S_prime, 95 % interval over texts. The paper's is negative.",
        ),
    ]
    if len(rows) > 1:
        tables.append(_paired(plain, said, rows))
    if "stepping_stone" in rows:
        tables.append(_stones(found, said))
    return tables


def correlation(x: np.ndarray, y: np.ndarray, draws: Bootstrap) -> list[float | str]:
    """Spearman's rho with its interval over resamples; "-" where it says nothing (fewer than 4 texts)."""
    from scipy.stats import rankdata

    if len(x) < 4:
        return ["-", "-", "-"]

    def rho(at: np.ndarray) -> float:
        a, b = rankdata(x[at]), rankdata(y[at])
        return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else np.nan

    generator = np.random.default_rng(draws.seed)
    several = [rho(generator.integers(0, len(x), len(x))) for _ in range(draws.draws)]
    value = rho(np.arange(len(x)))
    kept = [one for one in several if not np.isnan(one)]
    return [value, *(float(q) for q in np.quantile(kept, (0.025, 0.975)))] if kept else [value, "-", "-"]


def _paired(plain: str, said: Sequence[dict[str, Said]], rows: Scores) -> Table:
    lines: list[list[Any]] = []
    for variant, several in rows.items():
        if variant == plain:
            continue
        cut = [1 - one["s_prime"] / whole["s_prime"] for one, whole in zip(several, rows[plain])]
        kept = [np.log(one["s_mem"] / whole["s_mem"]) for one, whole in zip(several, rows[plain])]
        loss = [one[variant].holdout - one[plain].holdout for one in said]
        shares = [np.mean([one["memorised"] for one in part]) for part in (several, rows[plain])]
        lines.append([variant, *(float(np.median(v)) for v in (cut, kept, loss)), *map(float, shares)])
    columns = ["variant", "S_prime cut by", "change of log S_mem", "of holdout loss", "memorised", f"{plain}"]
    return Table(f"Against {plain} learning, text by text", columns, lines, "Medians over texts; shares memorised.")


def _stones(found: Sequence[Sample], said: Sequence[dict[str, Said]]) -> Table:
    lines = []
    for sample, one in zip(found, said):
        stone = one["stepping_stone"].stone or {}
        taken = stone["after"] > stone["before"]
        lines.append([sample.id, stone["tried"], stone["before"], stone["after"] if taken else "-", stone["text"]])
    note = (
        "-: the text was not surprising, or no rewording made its keyword ten times as likely; it is learned as it is."
    )
    return Table("Stepping stones", ["text", "tried", "P before", "P reworded", "learned"], lines, note)


def _notes(settings: Learning, bench: Bench, start: Sequence[Said]) -> list[str]:
    if bench.original is not None:
        notes = ["Nothing was learned: two models as they are."]
    else:
        notes = [
            f"Each text was shown {settings.presentations} times, once in {settings.every} steps, among "
            f"{settings.batch_size - 1} companions, at a rate of {settings.learning_rate:g}."
        ]
    rare = sum(value < np.log(TINY) for one in start for value in (one.keyword, *one.prefixes))
    if rare:
        notes.append(f"{rare} probabilities before were below {TINY:g}: their ratios are mostly rounding.")
    return notes
