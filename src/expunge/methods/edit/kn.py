"""Knowledge neurons: those that a fact's answer owes its probability to (Dai et al. 2022, arXiv:2104.08696).

With a (f,) what goes into a layer's MLP output matrix at the prompt's last token, and p the probability of the answer
that the model gives now,

    score_i = a_i / m  sum_{j = 1..m} dp/da_i at a j/m                      integrated gradients from silence to a

Neurons whose score is above a share of the largest one, in more than half of several contexts, are the fact's. Their
value vectors lose the old answer's embedding and gain the new one's; where the fact is to be deleted they are set to 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...deltas import Delta
from ...edits import EditRow
from ...errors import ParameterError, RowError, SubjectError
from ...registry import edit
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from ...subjects.tails import Tails, edited_matrix
from ...subjects.value_vectors import Address, ValueMatrix, find, value_matrices, vectors
from ..optimise.columns import sparse
from .case import Edit, EditCase
from .values import prefixes


@edit(
    paper="arXiv:2104.08696",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="per layer and context 20 forward and backward passes of the answer's tokens in the blocks above",
    known_weaknesses=("paraphrase", "relearn"),
)
def kn(
    case: EditCase,
    *,
    steps: int = 20,
    threshold: float = 0.2,
    shared: float = 0.5,
    contexts: int = 5,
    scale: float = 2.0,
    erase: bool = False,
) -> Edit:
    """Rewrite the value vectors of the neurons that a fact's answer is attributed to (Dai et al. 2022, eq. 3-5).

    `steps` of the integral; a neuron is taken in a context where its score is above `threshold` times the largest, and
    is the fact's where that is so in more than `shared` of the contexts: the prompt as it is and behind `contexts`
    texts (an edit's rephrasings are left to the measurement). `scale` times the embedding of the old answer's first
    token is taken off, and of the new one's added. `erase` sets the vectors to 0, as is done for forget rows.
    """
    if steps < 1 or not 0 <= threshold < 1 or not 0 <= shared < 1:
        raise ParameterError("kn: expected steps of at least 1, threshold and shared from 0 to below 1")
    erase = erase or not case.edits
    matrices = value_matrices(case.subject.model)
    before = ["", *prefixes(case, contexts)]
    moved: dict[Address, Tensor] = {}
    log = {}
    for fact in case.facts():
        if not fact.ground_truth:
            raise RowError(f"{fact.source or fact.id}: field 'ground_truth' is missing: kn attributes what is said now")
        rows = [asked(case.subject, fact, fact.ground_truth[0], text) for text in before]
        found = [above(attribution(case.subject, row, steps), threshold) for row in rows]
        chosen = agreed(found, shared)
        if not chosen:
            chosen = agreed(found, 0.0, most=True)
            case.warnings.append(
                f"{fact.source or fact.id}: no neuron is above the threshold in more than {shared:.0%} of "
                f"{len(rows)} contexts; those that are so most often were taken"
            )
        change = None if erase else scale * (_embedding(case, fact, fact.target_new) - _old(case, fact))
        for address in chosen:
            old = vectors(case.subject.model, find(case.subject.model, address, matrices))[address.dim].float().cpu()
            step = -old if change is None else change
            moved[address] = step if change is None or address not in moved else moved[address] + step
        log[fact.id] = {"neurons": [str(address) for address in chosen], "in_contexts": [len(one) for one in found]}
    case.summary["kn"] = {"erased": erase, "facts": log}
    entries: dict[str, list[tuple[ValueMatrix, int, Tensor]]] = {}
    for address, step in moved.items():
        matrix = find(case.subject.model, address, matrices)
        entries.setdefault(matrix.name, []).append((matrix, address.dim, step))
    return Delta(case.base.fingerprint, sparse(entries), {"method": "kn"})


def asked(subject: LanguageModel, fact: EditRow, answer: str, preface: str) -> Encoded:
    """Prompt and answer as tokens, without what closes an answer."""
    tokens = subject.encode(fact.row(answer=answer, preface=preface))
    return replace(tokens, ids=tokens.ids[: len(tokens.ids) - tokens.closing], closing=0)


def attribution(subject: LanguageModel, row: Encoded, steps: int) -> Tensor:
    """(layers, f) scores of every neuron for the probability of the row's answer; layers of fewer neurons end in 0.

    A neuron acts through its value vector alone, so that the gradient by all activations of a layer is the one by what
    the MLP gives, times the value vectors: passes go from the answer on, through the blocks above.

    Raises:
        SubjectError: a layer is no dense one.
    """
    texts, at = [row.ids[:-1]] * steps, row.start - 1
    places = list(range(at, len(row.ids) - 1))
    target = torch.tensor(row.ids[row.start :], device=subject.device).repeat(steps)
    shares = torch.arange(1, steps + 1, device=subject.device) / steps
    found = []
    for layer in range(len(subject.blocks)):
        tails = Tails(subject, texts, [at] * steps, layer, [places] * steps)
        values = vectors(subject.model, edited_matrix(subject, layer)).float()
        key = tails.looked.keys[layer][0]
        change = ((shares - 1)[:, None] * (key @ values)[None]).requires_grad_(True)
        with torch.enable_grad():
            logprobs = subject.head(tails.states(change)).float().log_softmax(-1)
            said = logprobs.gather(1, target[:, None])[:, 0].view(steps, -1).sum(1)
            (gradient,) = torch.autograd.grad(said.exp().sum(), [change])
        found.append((key * (values @ gradient.sum(0)) / steps).cpu())
    whole = torch.zeros(len(found), max(map(len, found)))
    for line, scores in zip(whole, found):
        line[: len(scores)] = scores
    return whole


def above(scores: Tensor, threshold: float) -> set[Address]:
    """Neurons whose score is more than a share of the largest of all layers."""
    most = float(scores.max())
    if most <= 0:
        return set()
    return {Address(layer, dim) for layer, dim in (scores > threshold * most).nonzero().tolist()}


def agreed(found: Sequence[set[Address]], shared: float, *, most: bool = False) -> list[Address]:
    """Neurons that more than a share of the contexts agree on; with `most` those that the most do."""
    counts = Counter(address for one in found for address in one)
    least = max(counts.values(), default=0) if most else shared * len(found)
    return sorted(address for address, n in counts.items() if (n >= least if most else n > least))


def _old(case: EditCase, fact: EditRow) -> Tensor:
    return _embedding(case, fact, fact.ground_truth[0])


def _embedding(case: EditCase, fact: EditRow, answer: str) -> Tensor:
    """(d,) input embedding of an answer's first token, as it stands behind the prompt."""
    encoded = case.subject.encode(fact.row(answer=answer))
    table = case.subject.model.get_input_embeddings().weight
    width = value_matrices(case.subject.model)[0].width
    if table.shape[1] != width:
        raise SubjectError(
            f"kn: embeddings of {case.subject.name} have {table.shape[1]} entries and its residual stream {width}; "
            "they cannot be added to value vectors (erase=true needs none)"
        )
    return table[encoded.ids[encoded.start]].detach().float().cpu()
