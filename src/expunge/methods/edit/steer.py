"""Steering: the way from unwanted to wanted answers, added to what the model thinks (arXiv:2312.06681, CAA).

    v = mean over facts of (mean of h over the wanted answer's tokens - mean of h over the unwanted answer's)
    h <- h + multiplier v          at every token

h: the residual stream after one block. The vector is added to what the block's MLP gives, which comes to the same where
that is added to the stream as it is. Nothing is trained and no weight changes; what is kept is one vector. It is the
only one of EasyEdit2's steering methods that needs nothing downloaded. EasyEdit2 adds the vector at every token, as is
done here; the paper at those after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...deltas import Delta
from ...edits import EditRow
from ...errors import RowError
from ...registry import edit
from ...subjects.language import LanguageModel
from ...subjects.tails import look, residual_matrix
from .case import Edit, EditCase
from .traced import Layer, layer_of

TOGETHER = 128
"""Answers read in one pass."""


@edit(
    paper="arXiv:2312.06681",
    intention="suppression",
    level="activations",
    requires=("weights", "forget_data"),
    keeps=("one vector, that leads from the old answers to the new ones",),
    sequential="free",
    cost="two passes over prompt and answer up to the layer; then one addition per token",
    known_weaknesses=("not studied",),
)
def steer(case: EditCase, *, layer: Layer = 0.41, multiplier: float = 1.0) -> Edit:
    """Add the mean difference between new and old answers to the activations at one layer (Panickssery et al. 2023).

    New is an edit's target, old its ground truth; of forget rows a refusal and the answer. The facts of a batch give
    one vector, which moves all that the model says: a manner of answering (refusing, a tone) rather than one fact. The
    steps of a sequence add up. `multiplier` 0 changes nothing, below 0 it leads the other way.
    """
    at = layer_of(case, layer)
    matrix = residual_matrix(case.base, at)
    facts = case.facts()
    for fact in facts:
        if not fact.ground_truth:
            raise RowError(
                f"{fact.source or fact.id}: field 'ground_truth' is missing: steer leads from what is said now to "
                "target_new"
            )
    wanted = meant(case.base, facts, [fact.target_new for fact in facts], at)
    unwanted = meant(case.base, facts, [fact.ground_truth[0] for fact in facts], at)
    way = (wanted - unwanted).mean(0)
    case.summary["steer"] = {"layer": at, "matrix": matrix.name, "facts": len(facts), "length": float(way.norm())}
    entry = {"offset": (multiplier * way)[None].cpu()}
    return Delta(case.base.fingerprint, {matrix.name: entry}, {"method": "steer", "layer": at})


def meant(subject: LanguageModel, edits: Sequence[EditRow], answers: Sequence[str], layer: int) -> Tensor:
    """(n, d) mean of the residual stream after block `layer` over the tokens of each answer, behind its edit's prompt.

    Raises:
        RowError: an answer does not fit the model.
    """
    rows = [subject.encode(edit.row(answer=answer)) for edit, answer in zip(edits, answers)]
    found = []
    for first in range(0, len(rows), TOGETHER):
        group = rows[first : first + TOGETHER]
        texts = [row.ids[: len(row.ids) - row.closing] for row in group]
        places = [(i, place) for i, row in enumerate(group) for place in range(row.start, len(texts[i]))]
        owners = [i for i, _ in places]
        streams = look(subject, texts, [place for _, place in places], [layer], rows=owners).streams[layer]
        owner = torch.tensor(owners, device=streams.device)
        sums = streams.new_zeros(len(group), streams.shape[1]).index_add(0, owner, streams)
        found.append(sums / torch.bincount(owner)[:, None])
    return torch.cat(found)
