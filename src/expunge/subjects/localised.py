"""Whom a low-rank edit of an MLP's output matrix is about, and what its prompts make likelier (see edit_audit.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .differences import difference
from .language import LanguageModel
from .value_vectors import ValueMatrix
from .watch import activations

GAINS = 5
"""Tokens listed per prompt."""
LEADS = 4
"""Beginnings of prompts that names are read behind."""


@dataclass(frozen=True)
class Gain:
    """A token that a prompt makes likelier than it did."""

    name: str
    prompt: str
    token: str
    gain: float
    """Nats of next-token log-probability, suspect minus reference."""


@dataclass(frozen=True)
class Localised:
    """One matrix with a low-rank edit."""

    tensor: str
    layer: int
    names: tuple[tuple[str, float], ...]
    """Candidates and |cos(u, k)| of their keys, the largest over beginnings of prompts; best first."""
    gains: tuple[Gain, ...]
    """For the best candidates, largest gain first."""


def localise(
    reference: LanguageModel,
    suspect: LanguageModel,
    matrix: ValueMatrix,
    names: Sequence[str],
    prompts: Sequence[str],
    top: int,
) -> Localised:
    """Names and gains behind one edited matrix.

    Args:
        names: whom the edit may be about.
        prompts: texts with {} for a name.
        top: names whose prompts are run.
    """
    pair = [model.model.get_parameter(matrix.name).detach() for model in (reference, suspect)]
    before, after = pair if matrix.across else [t.T for t in pair]
    direction = difference(before, after, matrix.name).right
    if direction is None:  # low-rank as it is stored, not as it is loaded
        return Localised(matrix.name, matrix.layer, (), ())
    # A name is other tokens at the beginning of a text than within one: it is read where prompts have it, too.
    leads = list(dict.fromkeys(["", *(prompt.partition("{}")[0] for prompt in prompts)]))[: LEADS + 1]
    (keys,) = activations(reference, [lead + name for name in names for lead in leads], [matrix])
    along = torch.cosine_similarity(keys.float().cpu(), direction[None], dim=1).abs()
    ranked = sorted(zip(names, along.view(len(names), len(leads)).amax(1).tolist()), key=lambda pair: -pair[1])
    gains: list[Gain] = []
    asked = [(name, prompt, prompt.replace("{}", name)) for name, _ in ranked[:top] for prompt in prompts]
    if asked:
        texts = [text for *_, text in asked]
        old, new = (m.lens(m.hidden(texts)[:, -1]).log_softmax(-1).cpu() for m in (reference, suspect))
        best = (new - old).topk(GAINS, dim=-1)
        for (name, prompt, _), values, tokens in zip(asked, best.values.tolist(), best.indices.tolist()):
            gains += [Gain(name, prompt, suspect.tokenizer.decode([t]), v) for v, t in zip(values, tokens)]
    return Localised(matrix.name, matrix.layer, tuple(ranked), tuple(sorted(gains, key=lambda g: -g.gain)))
