"""What `muse` and `muse_baselines` share: models that have the mini version's news by heart, and the eight baselines.

A degree of unlearning is an epoch of the six gradient methods, a scale alpha of task vectors and Who's Harry Potter.
As in the paper the first degree counts whose knowmem_f is at most the retrained model's, else the last one.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .. import registry
from ..benchmarks.case import Bench
from ..benchmarks.muse import OUTPUTS, chosen, muse
from ..benchmarks.muse_data import cut, few_shot, folds, read
from ..benchmarks.muse_mini import ASKED, asked, mini
from ..deltas import Delta, compose
from ..methods.edit.case import EditCase
from ..methods.guard.case import GuardCase
from ..methods.guard.whp_offset import Offset
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..metrics.texts import overlap
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.facts import World, make
from ..world.models import Recipe, teach, tokenizer, untrained
from .measures import said

BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ga": ("gradient_ascent", {"retain": "none"}),
    "ga_gdr": ("gradient_ascent", {"retain": "nll"}),
    "ga_klr": ("gradient_ascent", {"retain": "kl"}),
    "npo": ("npo", {"retain": "none"}),
    "npo_gdr": ("npo", {"retain": "nll"}),
    "npo_klr": ("npo", {"retain": "kl"}),
    "tv": ("task_vector", {}),
    "whp": ("whp_offset", {}),
}
"""MUSE's names, and what they are here."""
GRADIENT = tuple(name for name in BASELINES if name not in ("tv", "whp"))
ALPHAS = tuple(float(2**i) for i in range(9))
SCORES = ("verbmem_f", "knowmem_f", "privleak", "knowmem_r")
KNOWN = {"knowmem_f": "forget_qa", "knowmem_r": "retain_qa"}
"""Scores that are followed over requests, and their questions."""

PEOPLE = {"people": 80, "forget": 8, "neighbours": 8, "holdout": 16}
RECIPE = Recipe(
    hidden_size=80,
    intermediate_size=160,
    layers=2,
    vocabulary=1200,
    context=256,
    steps=450,
    batch_size=32,
    learning_rate=6e-3,
)
QUESTIONS = 3
"""Questions of a training document: two examples and a question, as the benchmark asks."""
ROUNDS = 4
"""Documents that every question stands in, among other ones each time."""
ANSWER = 12
"""Tokens of an answer; the mini version's have five at most."""


@dataclass(frozen=True)
class Subjects:
    """One seed's models and where its data are."""

    target: LanguageModel
    """Trained on train/forget, retain1 and retain2."""
    retrained: LanguageModel
    """The same without raw/forget."""
    place: str

    def rows(self, config: str, split: str) -> list[Row]:
        return read(self.place, config, split)


def subjects(seed: int, people: Mapping[str, int] | None = None, recipe: Mapping[str, Any] | None = None) -> Subjects:
    """Models that know the news and the answers to questions about them; trained once, then found in the cache."""
    world = make(seed, **(people or PEOPLE))
    made = Recipe(**recipe) if recipe else RECIPE
    with tempfile.TemporaryDirectory(prefix="expunge-muse-") as folder:
        mini(world, Path(folder))
        content = {str(path.relative_to(folder)): path.read_text("utf-8") for path in sorted(Path(folder).rglob("*.*"))}
    documents = {name: _documents(world, content, name, seed) for name in ("target", "retrained")}

    def train(folder: Path) -> None:
        mini(world, folder / "data")
        texts = [json.loads(line)["text"] for line in content["raw/holdout.jsonl"].splitlines()]
        words = tokenizer(documents["target"] + texts, made.vocabulary)
        for number, name in enumerate(documents):
            subject = untrained(words, made, 10 * seed + number)
            rows = [Row(id=str(i), answer=text, kind="text") for i, text in enumerate(documents[name])]
            teach(subject, rows, made, 10 * seed + number)
            subject.save(folder / name)

    path = kept("muse", [documents, content, asdict(made), seed], train)
    target, retrained = (LanguageModel.load(path / name, device="cpu") for name in documents)
    return Subjects(target, retrained, str(path / "data"))


def _documents(world: World, content: Mapping[str, str], name: str, seed: int) -> list[str]:
    """Every story once, and documents of questions about everybody in them."""
    texts: list[str] = []
    for split in ("forget", "retain1", "retain2"):
        texts += [json.loads(line)["text"] for line in content[f"train/{split}.jsonl"].splitlines()]
    if name == "retrained":
        forgotten = {json.loads(line)["text"] for line in content["raw/forget.jsonl"].splitlines()}
        texts = [text for text in texts if text not in forgotten]
    known = [person for person in world.people.values() if any(person.name in text for text in texts)]
    questions = [asked(world, person, about) for person in known for about in ASKED]
    draw = random.Random(seed)
    for _ in range(ROUNDS):
        order = draw.sample(questions, len(questions))
        for first in range(0, len(order), QUESTIONS):
            several = [
                f"Question: {q['question']}\nAnswer: {q['answer']}\n\n" for q in order[first : first + QUESTIONS]
            ]
            texts.append("".join(several))
    return texts


# --- what is measured ------------------------------------------------------------------------------------------------


def knowmem(subject: Any, made: Subjects, split: str = "forget_qa") -> float:
    """The benchmark's knowmem_f or knowmem_r (`retain_qa`) alone."""
    rows = few_shot(made.rows("knowmem", split), made.rows("knowmem", f"{split}_icl"))
    texts = [cut(text) for text in said(subject, rows, ANSWER)]
    return fmean(
        overlap(row.answer, text, "rougeL", "fmeasure", "rouge_score_unstemmed") for row, text in zip(rows, texts)
    )


def scores(subject: Any, made: Subjects) -> dict[str, float]:
    """The four scores, and the shares of answers about forgotten texts that are empty or one word over and over."""
    with tempfile.TemporaryDirectory(prefix="expunge-muse-") as folder:
        case = Bench(subject, Path(folder), None, [made.retrained], made.place, bootstrap=0)
        card = muse(case, answer=ANSWER)
    found = {name: card.value(name) for name in SCORES}
    outputs = next(table for table in card.tables if table.title == OUTPUTS)
    at = [str(column) for column in outputs.columns]
    line = next(dict(zip(at, row)) for row in outputs.rows if row[:2] == ["after", "forget_qa"])
    return found | {"empty": line["empty"], "repeating": line["repeating"]}


# --- unlearning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Degree:
    """A model unlearned to some degree, and what it still knows."""

    degree: float
    """Epochs, or alpha."""
    subject: Any
    knowmem_f: float
    knowmem_r: float


@dataclass(frozen=True)
class How:
    """Training of all methods."""

    epochs: int = 10
    batch_size: int = 2
    learning_rate: float = 1e-3

    def training(self, seed: int, **changes: Any) -> Training:
        settings = {"epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        return Training(**{**settings, "seed": seed, "guard": None, **changes})


def degrees(method: str, made: Subjects, how: How, seed: int) -> tuple[list[Degree], int]:
    """The model after every degree of forgetting raw/forget, and the place of the one that counts as unlearned."""
    forget, retain = made.rows("raw", "forget"), made.rows("raw", "retain1")
    found: list[Degree] = []

    def note(degree: float, subject: Any) -> None:
        found.append(Degree(degree, subject, knowmem(subject, made), knowmem(subject, made, "retain_qa")))

    if method in GRADIENT:
        per_epoch = -(-len(forget) // how.batch_size)
        ends = [per_epoch * (epoch + 1) for epoch in range(how.epochs)]
        by_gradient(
            method, made.target, forget, retain, how.training(seed), ends, lambda s, at: note(at // per_epoch, s.copy())
        )
    else:
        to_degree = by_scale(method, made.target, forget, how.training(seed))
        for alpha in ALPHAS:
            note(alpha, to_degree(alpha))
    return found, chosen([one.knowmem_f for one in found], knowmem(made.retrained, made))


def by_gradient(
    method: str,
    subject: LanguageModel,
    forget: list[Row],
    retain: list[Row],
    training: Training,
    evaluate_at: Sequence[int] = (),
    evaluate: Callable[[LanguageModel, int], None] | None = None,
) -> LanguageModel:
    name, settings = BASELINES[method]
    data = {"forget": forget, "retain": retain}
    outcome = unlearn(
        subject,
        registry.get("methods", name),
        settings,
        scope=None,
        data=data,
        training=training,
        evaluate_at=evaluate_at,
        evaluate=evaluate,
    )
    return outcome.delta.apply(subject)


def by_scale(method: str, subject: LanguageModel, forget: list[Row], training: Training) -> Callable[[float], Any]:
    """Task vector or Who's Harry Potter: one model trained further, then any scale of it."""
    part = registry.get("methods", BASELINES[method][0])
    settings = {"alpha": 1.0, "epochs": training.epochs, "learning_rate": training.learning_rate}
    if method == "tv":
        vector = part.function(EditCase(subject, {"forget": forget}, training), **part.resolve(settings))
        return lambda alpha: vector.scaled(alpha).apply(subject)
    settings |= {"batch_size": training.batch_size, "seed": training.seed}
    guard = part.function(GuardCase(subject, {"forget": forget}), **part.resolve(settings))
    return lambda alpha: Offset(subject, guard.reinforced, alpha)


def forget_fold(
    method: str, subject: LanguageModel, fold: list[Row], made: Subjects, degree: float, how: How, seed: int
) -> LanguageModel:
    """The subject without one fold, unlearned to the degree that was right for the first."""
    if method in GRADIENT:
        training = how.training(seed, epochs=degree)
        return by_gradient(method, subject, fold, made.rows("raw", "retain1"), training)
    return by_scale(method, subject, fold, how.training(seed))(degree)  # type: ignore[no-any-return]


def trial(
    method: str,
    seed: int,
    epochs: int = 10,
    batch_size: int = 2,
    learning_rate: float = 1e-3,
    people: dict[str, int] | None = None,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The four scores of a baseline at the degree that counts, its way there, and what larger requests and requests in
    turn leave (not of a guard, which leaves the model as it is and has nothing to go on from).

    `target` and `retrained` are no methods: these models are measured as they are.
    """
    made, how = subjects(seed, people, recipe), How(epochs, batch_size, learning_rate)
    if method in ("target", "retrained"):
        return scores(getattr(made, method), made)
    points, at = degrees(method, made, how, seed)
    found: dict[str, Any] = {
        "degree": points[at].degree,
        "curve": [[one.degree, one.knowmem_f, one.knowmem_r] for one in points],
        **scores(points[at].subject, made),
    }
    if method != "whp":
        found |= {kind: curve(kind, method, made, points[at], how, seed) for kind in ("scal", "sust")}
    return found


def curve(
    kind: Literal["scal", "sust"], method: str, made: Subjects, first: Degree, how: How, seed: int
) -> list[dict[str, float]]:
    """What is left after each fold: ever larger ones, each from the target (scal), or one after the other (sust).

    The optimiser starts anew with every request, and the model before a request is its reference.
    """
    subject, deltas, found = made.target, [], []
    for number, fold in enumerate(folds(made.place, kind)):
        start = made.target if kind == "scal" else subject
        # The first fold is raw/forget, which was forgotten already.
        subject = first.subject if number == 0 else forget_fold(method, start, fold, made, first.degree, how, seed)
        if kind == "sust":
            deltas.append(Delta.from_models(start, subject))
        known = {score: knowmem(subject, made, split) for score, split in KNOWN.items()}
        found.append({"texts": len(fold), **known})
    if deltas:
        # What is kept of a sequence is one delta over the untouched target.
        stacked = compose(deltas).apply(made.target)
        found[-1]["stacked_knowmem_r"] = knowmem(stacked, made, "retain_qa")
    return found
