"""LTI: an edit learns how a fact is used, from the model itself with the fact in its context (arXiv:2410.07819).

An edit that is only made to say the new answer says it to other questions too. The unedited model that is *told* the
fact uses it where it belongs; so its states are imitated by the edited model that is not told:

    L = subject_weight * KL(pi_told || pi_edited)    pi: the head's reading of the residual stream after a middle block
                                                     at the subject's last token
      + output_weight  * KL(p_told || p_edited)      where the target's tokens are predicted
      + fact_weight    * NLL(target)
      + the editor's bound on the value's size

over the prompt as it is and behind the editor's contexts. "{subject} is a" takes part in both divergences untold, in
place of the editor's own term on it. Where the value is written, and how, is the editor's: ROME, MEMIT, AlphaEdit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ... import registry
from ...edits import TOLD
from ...errors import ParameterError
from ...registry import edit
from ...subjects.anatomy import anatomy
from ...subjects.language import LanguageModel
from ...subjects.packed import pack
from ...subjects.protocol import Taps
from ..optimise.terms import Objective
from .case import Edit, EditCase
from .values import Together, depth, lookup


@edit(
    paper="arXiv:2410.07819",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="the editor's, one forward pass of told prompts, and a second product with the head a step",
    known_weaknesses=("paraphrase", "relearn"),
    aliases={"rome_lti": {"editor": "rome"}, "memit_lti": {"editor": "memit"}},
)
def lti(
    case: EditCase,
    *,
    editor: Objective = "rome",
    middle: float | None = None,
    subject_weight: float = 1.0,
    output_weight: float = 1.0,
    fact_weight: float = 1.0,
    context: str = TOLD,
    least: float = 0.5,
) -> Edit:
    """Edit with an editor whose values imitate the unedited model that is told the fact (Zhang et al. 2025).

    `middle`: the block whose stream is read, a number or a fraction of the depth; by default a quarter of the depth
    above the edited layer. `context` is what the model is told; for a deletion say what should follow ("Imagine that
    nobody knows {subject}."). Where a told model gives the target less than `least`, it has nothing to teach: that
    fact's prompts are not imitated and its NLL weighs 1, with a warning. The published weights and middle layers are
    not known: 1, 1, 1 are ours.
    """
    weights = (subject_weight, output_weight, fact_weight)
    if min(weights) < 0 or max(weights) == 0:
        raise ParameterError(f"lti: weights are {weights}, expected none below 0 and one above it")
    name, settings = (editor, {}) if isinstance(editor, str) else next(iter(editor.items()))
    inner = registry.get("methods", name)
    if inner.card.kind != "edit":
        raise ParameterError(f"lti: editor {name!r} is of kind {inner.card.kind}, expected rome, memit or alphaedit")
    teacher: dict[str, float] = {}

    def goal(group: Together) -> Callable[[Tensor], Tensor]:
        return _imitation(case, group, _block(group, middle), weights, context, least, teacher)

    delta: Edit = inner.function(replace(case, goal=goal), **inner.resolve(settings))
    if not teacher:
        raise ParameterError(f"lti: {name} optimises no value that could imitate; expected rome, memit or alphaedit")
    case.summary["lti"] = {"told": teacher}
    return delta


def _block(group: Together, middle: float | None) -> int:
    count, edited = len(group.subject.blocks), group.tails.layer
    at = min(edited + max(1, round(count / 4)), count - 1) if middle is None else depth(group.subject, middle, "middle")
    if at <= edited:
        raise ParameterError(
            f"lti: middle is block {at} of {count} and the value is written at {edited}; no stream up to there "
            "says anything of it, expected a block above"
        )
    return at


def _imitation(
    case: EditCase,
    group: Together,
    middle: int,
    weights: tuple[float, float, float],
    context: str,
    least: float,
    teacher: dict[str, float],
) -> Callable[[Tensor], Tensor]:
    subject, tails = group.subject, group.tails
    of_subject, of_output, of_fact = weights
    count, asked = len(group.target), int(group.text.max()) + 1
    nothing = torch.zeros(len(group.owner), tails.matrix.width, device=group.device)
    with torch.no_grad():
        # Untold, for the essences.
        clean, stream = tails.through(nothing, middle)
        wanted, streams = _told_states(group, middle, context)
        outputs = subject.head(torch.cat([wanted, clean[count:]])).float().log_softmax(-1)
        middles = _read(subject, torch.cat([streams, stream[asked:]]))
        said = group.of_texts(group.said(outputs)).exp()
    firsts = torch.tensor([len(fact.lookups) for fact in group.facts]).cumsum(0)
    known = [float(said[int(end) - len(fact.lookups)]) for fact, end in zip(group.facts, firsts)]
    for fact, probability in zip(group.facts, known):
        teacher[fact.edit.id] = round(probability, 4)
        if probability < least:
            case.warnings.append(
                f"{fact.edit.source or fact.edit.id}: told the fact, the model gives {fact.edit.target_new!r} a "
                f"probability of {probability:.2f} only; it has nothing to imitate and is learned by its likelihood"
            )
    taught = torch.tensor([float(p >= least) for p in known], device=group.device)
    owner = group.fact
    # Means over the texts of each fact; prompts of a fact whose teacher does not know it count for naught.
    share = 1 / torch.bincount(owner).float()[owner]
    share[:asked] *= taught[owner[:asked]]
    alpha = torch.where(taught > 0, of_fact, 1.0)

    def losses(delta: Tensor) -> Tensor:
        final, now = tails.through(delta[owner], middle)
        logprobs = subject.head(final).float().log_softmax(-1)
        apart = _divergence(middles, _read(subject, now))
        each = _divergence(outputs, logprobs)
        further = torch.cat([group.of_texts(each[:count]), each[count:]])
        imitated = group.of_facts(share * (of_subject * apart + of_output * further))
        return imitated + alpha * group.nll(group.said(logprobs))

    return losses


def _told_states(group: Together, middle: int, context: str) -> tuple[Tensor, Tensor]:
    """Of every context, with the fact told before it: (T, d) final states that predict the target, and (contexts, d)
    the stream after block `middle` at the subject's last token, both where they stand in the *told* text."""
    lookups = [
        lookup(group.subject, fact.edit.row(preface=fact.edit.told(context) + text), fact.edit.subject)
        for fact in group.facts
        for text in fact.prefaces
    ]
    rows = [one.tokens for one in lookups]
    seen = group.subject.states(pack(rows, group.device), Taps(layers=(middle,)))
    starts = torch.tensor([len(row.ids) - 1 for row in rows]).cumsum(0)
    places = [int(end) - (len(row.ids) - 1) + one.at for end, row, one in zip(starts, rows, lookups)]
    return seen["final"], seen[f"layer.{middle}"][torch.tensor(places, device=group.device)]


def _read(subject: LanguageModel, states: Tensor) -> Tensor:
    """(k, V) what the head reads in streams (k, d), as log-probabilities; gradients flow, as through no `lens`."""
    parts = anatomy(subject.model)
    for part in (parts.final_norm, parts.narrowing):
        states = part[1](states) if part is not None else states
    return subject.head(states).float().log_softmax(-1)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """(k,) KL(wanted || found) of log-probabilities (k, V)."""
    return (wanted.exp() * (wanted - found)).sum(-1)
