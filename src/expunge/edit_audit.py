"""`edit_audit`: was a checkpoint edited somewhere, about whom, and what does it say now?

A rank-one edit of an MLP's output matrix (ROME, arXiv:2202.05262) answers one key: D = a u^T changes the output exactly
where the matrix reads something along u, and it reads that at the last token of the subject's name. So the names along
whose keys u lies are the suspects, and what a suspect's prompts now make likelier is the object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .errors import RequestError
from .subjects.differences import Difference, difference, differences, overall, tensors
from .subjects.language import LanguageModel
from .subjects.value_vectors import ValueMatrix, value_matrices
from .subjects.watch import activations

GAINS = 5
"""Tokens listed per prompt."""


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
    """Candidates and |cos(u, k)| of their keys, best first."""
    gains: tuple[Gain, ...]
    """For the best candidates, largest gain first."""


@dataclass(frozen=True)
class EditAudit:
    """What was found."""

    differences: tuple[Difference, ...]
    edits: tuple[Localised, ...]
    overall: str


def edit_audit(
    reference: str | Path,
    suspect: str | Path,
    *,
    names: Sequence[str] = (),
    prompts: Sequence[str] = (),
    top: int = 3,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EditAudit:
    """Compare two checkpoints of one architecture, matrix by matrix.

    Edits that change no weight (in the prompt, in a memory beside the model) cannot be seen here.

    Args:
        names: subjects an edit may be about; without them matrices are judged and no more.
        prompts: texts with `{}` for a name, one for each relation an edit may be about.
        top: candidates whose prompts are run.

    Raises:
        MismatchError: the checkpoints differ in their tensors; SubjectError: a folder holds none.
        RequestError: a prompt has no place for a name.
    """
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise RequestError(f"prompt {prompt!r}: found {prompt.count('{}')} places for a name, expected one {{}}")
    with tensors(reference) as before, tensors(suspect) as after:
        tell = None if progress is None else partial(progress, "compare")
        found = differences(before, after, progress=tell)
    edited = {d.name: d for d in found if d.kind == "low_rank_edit"}
    localised: list[Localised] = []
    if edited and names:
        models = [LanguageModel.load(path, device=device) for path in (reference, suspect)]
        for matrix in value_matrices(models[0].model):
            stored = next((name for name in edited if name.endswith(matrix.name) or matrix.name.endswith(name)), None)
            if stored is not None and matrix.owner is not None:
                localised.append(_about(models[0], models[1], matrix, names, prompts, top))
    return EditAudit(tuple(found), tuple(localised), overall(found))


def _about(
    reference: LanguageModel,
    suspect: LanguageModel,
    matrix: ValueMatrix,
    names: Sequence[str],
    prompts: Sequence[str],
    top: int,
) -> Localised:
    """Names and gains behind one edited matrix."""
    pair = [model.model.get_parameter(matrix.name).detach() for model in (reference, suspect)]
    before, after = pair if matrix.across else [t.T for t in pair]
    direction = difference(before, after, matrix.name).right
    if direction is None:  # low-rank as it is stored, not as it is loaded
        return Localised(matrix.name, matrix.layer, (), ())
    (keys,) = activations(reference, list(names), [matrix])
    along = torch.cosine_similarity(keys.float().cpu(), direction[None], dim=1).abs().tolist()
    ranked = sorted(zip(names, along), key=lambda pair: -pair[1])
    gains: list[Gain] = []
    asked = [(name, prompt, prompt.format(name)) for name, _ in ranked[:top] for prompt in prompts]
    if asked:
        texts = [text for *_, text in asked]
        old, new = (m.lens(m.hidden(texts)[:, -1]).log_softmax(-1).cpu() for m in (reference, suspect))
        best = (new - old).topk(GAINS, dim=-1)
        for (name, prompt, _), values, tokens in zip(asked, best.values.tolist(), best.indices.tolist()):
            gains += [Gain(name, prompt, suspect.tokenizer.decode([t]), v) for v, t in zip(values, tokens)]
    return Localised(matrix.name, matrix.layer, tuple(ranked), tuple(sorted(gains, key=lambda g: -g.gain)))
