"""Who's Harry Potter: answer as a model would that never heard of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import RequestError, RowError
from ...registry import optimise
from ...rows import Row
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from .loop import references
from .reinforce import REINFORCE
from .terms import RetainTerm, Step, chunked
from .unlearn import Preparation, unlearn


@dataclass(frozen=True)
class Translation:
    """A forget row with its anchored terms replaced."""

    row: Encoded
    at: list[int]
    """Per answer token of the original the answer token of the translation whose prediction is taken; -1 for tokens of
    an anchored term, which the model must be able to repeat."""


def _prepare(case: Preparation) -> None:
    """Translate every forget row, reinforce a copy, and store what both models see."""
    if case.dry:
        return
    settings, subject, rows = case.settings, case.subject, case.data["forget"]
    words = anchors(case, settings["anchors"])
    generator = torch.Generator().manual_seed(case.seed)
    translated = [translate(subject, row, encoded, words, generator) for row, encoded in zip(rows, case.rows["forget"])]
    base = references(subject, [t.row for t in translated], hidden=True)
    reinforced = subject
    if settings["alpha"]:
        training = replace(
            case.training,
            epochs=settings["epochs"],
            steps=None,
            learning_rate=settings["learning_rate"],
            guard=None,
        )
        folder = None if case.folder is None else case.folder / "reinforce"
        data = {"forget": rows}
        outcome = unlearn(subject, REINFORCE, {}, scope=case.scope, data=data, training=training, folder=folder)
        reinforced = outcome.delta.apply(subject)
        case.summary |= {"reinforced_loss": outcome.summary["log"]["loss"][-1]}
    other = references(reinforced, case.rows["forget"], hidden=True)
    case.given["reinforced_head"] = reinforced.head
    case.constants["forget"] = []
    for t, b, r in zip(translated, base, other):
        at = torch.tensor(t.at, device=subject.device)
        states = b["reference_hidden"][at.clamp_min(0)]
        case.constants["forget"].append(
            {"generic": torch.cat([states, r["reference_hidden"]], dim=1), "repeated": at < 0}
        )


@optimise(
    paper="arXiv:2310.02238",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget (and retain) rows, 6N per token of the reinforcing epochs, 4N once per forget token",
    known_weaknesses=("relearn", "logit_lens", "decoding", "sleek"),
    prepare=_prepare,
)
def whp(
    step: Step,
    *,
    alpha: float = 5.0,
    anchors: str = "",
    epochs: float = 3.0,
    learning_rate: float = 3e-6,
    centre: bool = True,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Distil z - alpha relu(z_reinforced - z), with z from the text about somebody else (Eldan & Russinovich 2023).

    `anchors` is a jsonl file of {"term", "replacement"}; by default each row's entity becomes a made-up one. `epochs`
    and `learning_rate` are the reinforced model's; alpha 0 needs none. `centre` compares log-probabilities, so that
    logits that are all higher count for nothing (off for the paper's own form). The retain term is ours: without it
    generic answers leak to everybody.
    """
    side, head = step.forget, step.given["reinforced_head"]

    def towards(hidden: Tensor, other: Tensor) -> Tensor:
        generic, target, repeated = other[:, :-2], other[:, -2].long(), other[:, -1].bool()
        with torch.no_grad():
            own, reinforced = generic.to(hidden.dtype).chunk(2, dim=1)
            z = side.frozen_head(own).float()
            if alpha:
                r = head(reinforced).float()
                z, r = (z.log_softmax(-1), r.log_softmax(-1)) if centre else (z, r)
                z = z - alpha * (r - z).relu()
            wanted = z.softmax(-1)
            wanted[repeated] = torch.nn.functional.one_hot(target[repeated], z.shape[1]).float()
        return cross_entropy(side.head(hidden).float(), wanted, reduction="none")

    about = torch.stack([side.target.float(), side.constants["repeated"].float()], dim=1)
    other = torch.cat([side.constants["generic"].float(), about], dim=1)
    forget = chunked(towards, side.hidden, other, side.vocabulary).mean()
    return forget + retain_weight * step.retain_term(retain)


# --- anchors and translations --------------------------------------------------------------------------------------


def anchors(case: Preparation, path: str) -> dict[str, list[str]]:
    """Term -> what may stand in its place.

    Raises:
        RequestError: no anchors and no way to make some; a term of the file is also a retain entity.
    """
    retain = sorted({row.entity for row in case.data.get("retain", []) if row.entity and row.entity != row.id})
    if path:
        found: dict[str, list[str]] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            entry = json.loads(line)
            term, other = entry.get("term"), entry.get("replacement")
            if not term or not other or term == other:
                raise RowError(f"{path}:{number}: expected a term and another text as its replacement, found {entry}")
            if term in retain:
                raise RequestError(f"{path}:{number}: {term!r} is to be kept; renaming it would damage it")
            found.setdefault(term, []).append(other)
        return found
    terms = {row.entity for row in case.data["forget"] if row.entity and row.entity != row.id}
    known = {*terms, *retain}
    parts = [name.split() for name in retain]
    made: dict[str, list[str]] = {}
    generator = torch.Generator().manual_seed(case.seed)
    for term in sorted(terms):
        words = term.split()
        like = [name for name in parts if len(name) == len(words)] or parts
        if len(like) < 2:
            raise RequestError(
                "whp: there are no entities of retain rows to make names from; give `anchors`, a jsonl file of "
                "{term, replacement}"
            )
        options: dict[str, None] = {}
        for _ in range(100):
            draw = torch.randint(len(like), (len(words),), generator=generator).tolist()
            name = " ".join(like[i][min(at, len(like[i]) - 1)] for at, i in enumerate(draw))
            if name not in known:
                options[name] = None
            if len(options) == 8:
                break
        if not options:
            raise RequestError(f"whp: no name in place of {term!r} can be made; give `anchors`")
        made[term] = list(options)
    return made


def translate(
    subject: LanguageModel, row: Row, encoded: Encoded, words: Mapping[str, Sequence[str]], generator: torch.Generator
) -> Translation:
    """The row about somebody else, and which of its predictions belong to which answer token."""
    present = sorted((t for t in words if t in row.prompt or t in row.answer), key=len, reverse=True)
    chosen = {t: words[t][int(torch.randint(len(words[t]), (1,), generator=generator))] for t in present}
    made = subject.encode(row, prompt=_replaced(row.prompt, chosen), answer=_replaced(row.answer, chosen))
    mine, theirs = list(encoded.ids[encoded.start :]), list(made.ids[made.start :])
    at = [-1] * len(mine)
    for block in SequenceMatcher(a=mine, b=theirs, autojunk=False).get_matching_blocks():
        at[block.a : block.a + block.size] = range(block.b, block.b + block.size)
    # Pieces that both names happen to have in common are still parts of names.
    text, spans = subject.spans(row)
    for found in re.finditer("|".join(map(re.escape, chosen)) or r"(?!)", text):
        for i, (first, stop) in enumerate(spans[encoded.start :]):
            if first < found.end() and stop > found.start():
                at[i] = -1
    return Translation(made, at)


def _replaced(text: str, chosen: Mapping[str, str]) -> str:
    """Terms replaced, longest first; what was put in is not looked at again."""
    if not chosen:
        return text
    return re.sub("|".join(map(re.escape, chosen)), lambda found: chosen[found[0]], text)
