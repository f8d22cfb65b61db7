"""SERAC: edits in a memory, a classifier that asks which of them a question is about, and a model that answers from it
(arXiv:2206.06520).

    p_i = probability that the question is within the scope of edit i (guard/in_scope.py)
    max p >= threshold    the counterfactual model answers, with the edit of the largest p told before the question
    else                  the model answers, as if there were no edits

Neither is trained on the edits: both are on demonstrations, other facts with rephrasings, once. An edit is then a line
in the memory, and can be left out again. The counterfactual model is the model itself with adapters that were trained
to answer from what is told; the paper trains a smaller one of its own. What was trained is kept in the cache, under the
hash of model, demonstrations and settings; where it is not there, it is trained again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ...deltas import Delta
from ...edits import KINDS, EditRow
from ...errors import ParameterError, RequestError
from ...files import cached, save_tensors
from ...registry import guard
from ...rows import Row
from ...subjects.contexts import read as read_all
from ...subjects.language import LanguageModel
from ...tables.store import content_key
from ..edit.case import targeted
from ..optimise.loop import Training
from ..optimise.reinforce import REINFORCE
from ..optimise.unlearn import unlearn
from .case import GuardCase
from .edit_memory import EditMemory, Trained, read
from .embeddings import embedder as named
from .in_scope import Asked, Embed, Likeness, Scope, fitted, questions

VERSION = 1
"""Raised when the same demonstrations would train something else."""
TOGETHER = 256
"""Questions read in one call."""


@guard(
    paper="arXiv:2206.06520",
    needs=("edits", "demonstrations"),
    requires=("weights", "gradients", "forget_data", "retain_data", "classifier"),
    keeps=("the new facts, and adapters of a copy that answers from them",),
    sequential="free",
    cost="adapters trained on the demonstrations, once; the classifier per prompt; in scope the tokens of one fact",
    known_weaknesses=("logit_lens", "relearn", "paraphrase"),
)
def serac(
    case: GuardCase,
    *,
    threshold: float = 0.5,
    fact: str = "New Fact: {prompt} {target}\n",
    embedder: str = "hidden",
    rank: int = 16,
    epochs: float = 10.0,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> EditMemory:
    """Answer questions in the scope of an edit by a model that is told the edit, and all others untouched (Mitchell et
    al. 2022).

    Demonstrations are other facts, in the form of edits, with rephrasings and best with locality; in a run without any
    the retain rows, with their paraphrased questions and another row's answer. Forget rows are facts whose new answer
    is a refusal. A few dozen demonstrations do not teach a small model to answer from what it is told.

    Args:
        threshold: probability from which on an edit answers.
        fact: how it is told; {prompt}, {target} and {subject} are the edit's.
        embedder: of the classifier: `hidden` for the model's final hidden state at the end of a question (what it is
            about to say), `subject` for its input embeddings, or a sentence-transformers model.
        rank: of the adapters, on all of attention's and the MLPs' matrices.
        epochs: over the demonstrations' questions.
        learning_rate: of the adapters.
        batch_size: questions in a step.
        seed: of adapters, order and refusals.

    Raises:
        RequestError: fewer than two demonstrations, none with rephrasings, or nothing out of their scopes; a guard
            inside.
        ParameterError: a number out of its range.
    """
    if not (0 < threshold < 1 and rank > 0 and epochs > 0 and learning_rate > 0 and batch_size > 0):
        raise ParameterError("serac: expected 0 < threshold < 1, and rank, epochs, learning_rate, batch_size > 0")
    if "{target}" not in fact:
        raise ParameterError(f"serac: fact is {fact!r}, expected a text with {{target}}")
    if not isinstance(case.subject, LanguageModel):
        raise RequestError("serac trains a copy of the model; put it around the model, and other guards around it")
    facts = targeted(case.edits, case.rows.get("forget", []), seed)
    shown = targeted(case.demonstrations or _others(case.rows.get("retain", []), seed), [], seed)
    settings: list[Any] = [threshold, fact, embedder, rank, epochs, learning_rate, batch_size, seed]
    if not facts:
        return EditMemory(case.subject, [], None, settings)
    if len(shown) < 2:
        raise RequestError(
            f"serac trains its classifier and its model on other facts, and there are {len(shown)}: give at least 2 "
            "edit rows with rephrasings as demonstrations (or retain rows with paraphrased questions)"
        )
    training = Training(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, schedule="cosine", guard=None, seed=seed
    )
    return EditMemory(case.subject, facts, trained(case.subject, shown, fact, embedder, rank, training), settings)


def _others(rows: Sequence[Row], seed: int) -> list[EditRow]:
    """Rows as facts that are to change: each gets the answer of another row, of its relation if there is one."""
    rows = [row for row in rows if row.kind in KINDS]
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.relation, set()).add(row.answer)
    every = set().union(*answers.values())
    draw = random.Random(seed)
    found = []
    for row in rows:
        several = sorted(answers[row.relation] - {row.answer}) or sorted(every - {row.answer})
        if several:
            who = row.entity if row.entity in row.prompt else ""
            texts = (row.prompt, draw.choice(several), who, (row.answer,), row.paraphrased_prompts)
            found.append(EditRow(row.id, *texts, kind=row.kind, source=row.source))  # type: ignore[arg-type]
    return found


# --- what is trained --------------------------------------------------------------------------------------------------


Learnt = tuple[Delta, dict[str, Tensor]]
"""Adapters, and of the classifier its weights, bias and the centre of its embeddings."""


def trained(
    subject: LanguageModel, shown: Sequence[EditRow], fact: str, embedder: str, rank: int, training: Training
) -> Trained:
    """Adapters and classifier, from the cache where they are there; errors as `serac`'s."""
    asked = [
        Asked(
            read(subject, one, one.prompt),
            one.subject,
            tuple(read(subject, one, text) for text in one.rephrasings),
            tuple(read(subject, one, probe.prompt) for several in one.locality.values() for probe in several),
        )
        for one in shown
    ]
    texts = questions(asked)

    def kept(folder: Path) -> Learnt:
        return Delta.load(folder / "adapters"), load_file(folder / "scope.safetensors")

    def learn() -> Learnt:
        centre = ends(subject, texts).mean(0) if embedder == "hidden" else torch.zeros(1)
        scope = fitted(Likeness(texts, _embed(subject, embedder, centre)), asked)
        rows = []
        for one in shown:
            for i, question in enumerate((one.prompt, *one.rephrasings)):
                prompt = subject.prompt_text(one.row(question)).removeprefix(subject.tokenizer.bos_token or "")
                rows.append(Row(f"{one.id}/{i}", one.target_new, one.told(fact) + prompt, kind="completion"))
        how = f"lora(r={rank}, alpha={2 * rank}, modules=all)"
        adapters = unlearn(subject, REINFORCE, {}, scope=how, data={"forget": rows}, training=training).delta
        numbers = {"weights": torch.from_numpy(scope.weights), "bias": torch.tensor(scope.bias).double()}
        return adapters, {**numbers, "centre": centre}

    def keep(made: Learnt, folder: Path) -> None:
        made[0].save(folder / "adapters")
        save_tensors(made[1], folder / "scope.safetensors")

    records = [one.record() for one in shown]
    key = content_key(VERSION, subject.fingerprint, records, fact, embedder, rank, asdict(training))
    adapters, numbers = cached("serac", key, read=kept, make=learn, write=keep)
    likeness = Likeness(texts, _embed(subject, embedder, numbers["centre"]))
    return Trained(adapters, Scope(likeness, numbers["weights"].numpy(), float(numbers["bias"])))


def _embed(subject: LanguageModel, name: str, centre: Tensor) -> Embed:
    """Hidden states lie around a common mean that says nothing."""
    if name == "hidden":
        return lambda texts: F.normalize(ends(subject, texts) - centre, dim=1).numpy()
    encoder = named(name, subject)
    return lambda texts: encoder.embed(texts).numpy()


@torch.no_grad()
def ends(subject: LanguageModel, texts: Sequence[str]) -> Tensor:
    """(n, d) final hidden states at the last tokens of texts, fp32 on the CPU."""
    ids = [subject.prompt_ids(text, (str(i), "serac")) for i, text in enumerate(texts)]
    found = []
    for first in range(0, len(ids), TOGETHER):
        part = read_all(subject, ids[first : first + TOGETHER], keep=False)
        found.append(part.states[torch.stack([at[-1] for at in part.places])].float().cpu())
    return torch.cat(found)
