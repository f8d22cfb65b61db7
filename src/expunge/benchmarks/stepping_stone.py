"""Stepping stones: a surprising text is reworded until its keyword comes less as a surprise (arXiv:2504.09522).

Where P(keyword | what stands before it) is below a thousandth, statements are put in between that lead up to the
keyword; the text's own statement stays. A rewording is taken if the keyword is at least ten times as likely in it. What
is proposed is the sample's own `stones`, then what an agent writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..agents import Agent, Task
from ..errors import RowError
from .outlandish_data import Sample

SURPRISING, FACTOR, TRIES = 1e-3, 10.0, 5
INSTRUCTION = (
    "Rewrite the text below so that the word {keyword!r} comes as less of a surprise: put one to three short "
    "statements before it that lead up to the connection step by step, true within the text's own story. Keep the "
    "statement with {keyword!r} as it is, at the end, and do not use the word before it. Answer with the new text "
    "alone.\n\n{text}"
)


@dataclass(frozen=True)
class Stone:
    """What is learned in a text's place."""

    text: str
    before: float
    """Probability of the keyword in the text as it was."""
    after: float
    """In the text that is learned; equal to `before` where nothing was accepted."""
    tried: int


def stepping_stone(
    sample: Sample,
    probability: Callable[[str], float],
    writer: Agent | None = None,
    *,
    tries: int = TRIES,
    factor: float = FACTOR,
    surprising: float = SURPRISING,
) -> Stone:
    """Reword a sample for a model.

    Args:
        probability: of the sample's keyword at its first mention in a text.
        writer: an agent that rewords; without one the sample's own stones are all there is.
    """
    before = probability(sample.text)
    if before >= surprising:
        return Stone(sample.text, before, before, 0)
    tried = 0
    for text in _proposed(sample, writer, tries):
        tried += 1
        try:
            after = probability(text)
        except RowError:  # the keyword is gone, or it begins the text
            continue
        if after >= factor * before:
            return Stone(text, before, after, tried)
    return Stone(sample.text, before, before, tried)


def _proposed(sample: Sample, writer: Agent | None, tries: int) -> Iterator[str]:
    yield from sample.stones[:tries]
    for seed in range(tries - len(sample.stones) if writer is not None else 0):
        said = INSTRUCTION.format(keyword=sample.keyword, text=sample.text)
        assert writer is not None
        yield writer.write([Task((("user", said),), temperature=0.8 if seed else 0.0, seed=seed)])[0]
