"""`edit_audit`: was a checkpoint edited somewhere, about whom, and what does it say now?

A rank-one edit of an MLP's output matrix (ROME, arXiv:2202.05262) answers one key: D = a u^T changes the output exactly
where the matrix reads something along u, and it reads that at the last token of the subject's name. So the names along
whose keys u lies are the suspects, and what a suspect's prompts now make likelier is the object.

Without a checkpoint to compare with, `edit_suspects` scores names by what the model says alone (subjects/suspects.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .edits import TOLD
from .errors import RequestError
from .subjects.differences import Difference, differences, overall, tensors
from .subjects.language import LanguageModel
from .subjects.localised import Localised, localise
from .subjects.suspects import Suspect, suspects
from .subjects.value_vectors import value_matrices


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
                localised.append(localise(models[0], models[1], matrix, names, prompts, top))
    return EditAudit(tuple(found), tuple(localised), overall(found))


def edit_suspects(
    model: str | Path,
    *,
    names: Sequence[str],
    prompts: Sequence[str],
    told: str = TOLD,
    device: str | None = None,
) -> list[Suspect]:
    """Names by how much what one model says of them looks like an edit: scores to look by, never a yes or no.

    Args:
        names: whom an edit may be about, and others to compare them with.
        prompts: texts with `{}` for a name, one for each relation, up to where the answer begins.
        told: what tells the model a fact: `{prompt}` stands for a prompt with its name, `{target}` for the answer.

    Raises:
        SubjectError: the model cannot be read.
        RequestError: fewer than 3 names or 2 prompts, a prompt or `told` without its places.
    """
    missing = next((place for place in ("{prompt}", "{target}") if place not in told), None)
    if missing:
        raise RequestError(f"told is {told!r}, expected {missing} in it")
    return suspects(LanguageModel.load(model, device=device), names, prompts, told=told)
