"""Where the parts of WMDP are, and its corpora as text rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RowError, suggest
from ..rows import Row, Source, read_rows
from .choices import Question, read
from .muse_data import head

TOPICS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
"""The published domains, as their descriptions call them."""
GATED = "bio-forget-corpus"
ROWS = {3668: "the present release", 4157: "the first release"}
"""How many questions all three domains have; figures of one release say nothing about the other."""


@dataclass(frozen=True)
class Places:
    """A local folder or a hub id of each part; "" where there is none."""

    questions: str
    corpora: str
    mmlu: str


def places(root: str, *, mmlu: str = "", corpora: str = "") -> Places:
    """The parts of a data set: a folder with `wmdp`, `wmdp-corpora` and `mmlu` in it, one with the questions alone, or
    the hub id of the questions. Corpora on the hub are read only if they are named."""
    folder = Path(root)
    if not folder.is_dir():
        return Places(root, corpora, mmlu or "cais/mmlu")

    def inside(name: str) -> str:
        return str(folder / name) if (folder / name).is_dir() else ""

    return Places(inside("wmdp") or root, corpora or inside("wmdp-corpora"), mmlu or inside("mmlu"))


def restricted(place: str, asked: Sequence[str] = ()) -> dict[str, list[Question]]:
    """Questions by domain: those asked for, or all there are.

    Raises:
        RowError: there are none, or a question is not as it must be.
    """
    folder = Path(place)
    found = list(asked) or list(TOPICS)
    if folder.is_dir():
        known = sorted(p.name.removeprefix("wmdp-") for p in folder.glob("wmdp-*") if p.is_dir())
        missing = [name for name in asked if name not in known]
        if missing:
            raise RowError(f"{folder} has no folder wmdp-{missing[0]}. {suggest(missing[0], known)}")
        if not known:
            raise RowError(f"{folder} has no folders wmdp-DOMAIN (wmdp-bio ...) with questions in them")
        found = list(asked) or known
    return {
        name: read(Source(place, config=f"wmdp-{name}", split="test"), name, topic=TOPICS.get(name, name))
        for name in found
    }


def spans(by_domain: Mapping[str, Sequence[Question]]) -> dict[str, np.ndarray]:
    """Where each domain's questions stand among all."""
    ends = np.cumsum([len(several) for several in by_domain.values()])
    return {name: np.arange(end - len(several), end) for (name, several), end in zip(by_domain.items(), ends)}


def general(place: str, *, sample: int, shots: int, seed: int) -> tuple[list[Question], dict[str, list[Question]]]:
    """(questions, examples by topic) of MMLU.

    Args:
        sample: questions of each subject, drawn by the seed; 0 takes all.
        shots: examples of each subject, the first of its dev split.

    Raises:
        RowError: as `choices.read`, or a subject has fewer examples.
    """
    folder = Path(place)
    if folder.is_dir() and not (folder / "all").is_dir():
        subjects = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "auxiliary_train")
    else:
        subjects = ["all"]
    asked: dict[str, list[Question]] = {}
    examples: dict[str, list[Question]] = {}
    for into, split in ((asked, "test"), (examples, "dev")):
        if split == "test" or shots:
            for subject in subjects:
                topic = "" if subject == "all" else subject.replace("_", " ")
                source = Source(place, config=subject, split=split)
                for one in read(source, f"mmlu/{subject}/{split}", topic=topic):
                    into.setdefault(one.topic, []).append(one)
    few = [topic for topic in asked if len(examples.get(topic, [])) < shots]
    if few:
        raise RowError(f"{place}: {few[0]} has {len(examples.get(few[0], []))} dev questions, shots asks for {shots}")
    chosen: list[Question] = []
    for topic, several in sorted(asked.items()):
        if sample and len(several) > sample:
            places_ = sorted(random.Random(f"{seed}/{topic}").sample(range(len(several)), sample))
            several = [several[i] for i in places_]
        chosen += several
    return chosen, {topic: several[:shots] for topic, several in examples.items()}


def corpus(place: str, name: str, *, longer_than: int = 50) -> tuple[list[Row], int]:
    """(rows, how many were left out for being short) of a corpus, `cyber-forget-corpus` for example.

    Args:
        place: folder with NAME.jsonl, or the hub id of the corpora.
        longer_than: characters; the authors' loader leaves out shorter texts.

    Raises:
        RowError: there is no such corpus, or nobody may have it without asking.
    """
    folder = Path(place)
    if folder.is_dir():
        files = [p.name.removesuffix(".jsonl") for p in folder.glob("*.jsonl")]
        if name not in files:
            gated = "; access is granted on request at huggingface.co/datasets/cais/wmdp-bio-forget-corpus"
            raise RowError(f"{folder} has no {name}.jsonl{gated if name == GATED else ''}. {suggest(name, files)}")
        rows = read_rows(Source(str(folder / f"{name}.jsonl")), name)
    elif name == GATED:
        raise RowError(
            "the bio forget corpus is gated and never fetched: ask for access at "
            f"huggingface.co/datasets/cais/wmdp-bio-forget-corpus, put it as {name}.jsonl into a folder with the other "
            "corpora and name that folder with corpora=, or leave the domain out"
        )
    else:
        rows = read_rows(Source(place, config=name), name)
    kept = [row for row in rows if len(row.answer) > longer_than]
    return kept, len(rows) - len(kept)


def cut(subject: Any, rows: Sequence[Row], tokens: int = 512) -> tuple[list[Row], int]:
    """(rows whose texts have at most so many tokens, how many were cut); RMU takes 512, or 768 for later topics."""
    limit = min(tokens, subject.context_length)
    found: list[Row] = []
    count = 0
    for row in rows:
        short, keep = row, limit
        # A text that ends earlier may end in other tokens, and the model may add some of its own.
        while len(subject.spans(short)[1]) > limit:
            short, keep = replace(row, answer=head(subject.tokenizer, row.answer, keep)), keep - 1
        count += short is not row
        found.append(short)
    return found, count
