"""Needle: the value vectors that hold a concept are drowned in noise, or taken out (ConceptVectors).

noise    v <- v + N(0, s^2 I), s a multiple of the vector's own root mean square
zero     v <- 0: as if the neuron never fired
flip     v <- -v
project  v <- v less its part in the span of the concept's rows of the LM head

With an objective the vectors are then trained, alone, by gradient unlearning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...deltas import Delta, compose
from ...errors import RequestError
from ...registry import edit
from ...rows import Row
from ...subjects.concepts import Criterion, Search, distinctive, search
from ...subjects.language import LanguageModel
from ...subjects.projection import Readout
from ...subjects.value_vectors import Address, ValueMatrix, find, value_matrices, vectors
from ...tables.store import content_key
from ..optimise.columns import sparse
from ..optimise.scope import resolve
from ..optimise.terms import Objective
from .case import Edit, EditCase, knows

Mode = Literal["noise", "zero", "flip", "project"]
COUNTS = (1, 2, 5, 10, 20)
"""Numbers of vectors that `count: search` tries."""
HALVED, SPARED = 0.5, 0.02
"""A number of vectors is enough where the concept's answers lose half of their probability and retain rows at most this
much accuracy."""


@edit(
    paper="arXiv:2406.11614",
    intention="removal",
    requires=("weights", "forget_data", "retain_data"),
    cost="2N per prompt token, once, to find the vectors; d numbers for each of them",
    known_weaknesses=("relearn",),
    aliases={"concept_ablation": {}},
)
def needle(
    case: EditCase,
    *,
    vectors: tuple[str, ...] = (),
    count: int | Literal["search"] = "search",
    by: Criterion = "attribution",
    mode: Mode = "noise",
    noise: float = 5.0,
    absolute: bool = False,
    by_entity: bool = False,
    objective: Objective | None = None,
) -> Edit:
    """Drown the value vectors that hold a concept in noise, or zero, flip or project them (Hong et al. 2024).

    `vectors` names them ("20:10513": layer and neuron); without any they are searched for: the forget rows are taken to
    be about one concept, known by the tokens they are full of and retain rows are not. `count: search` takes the
    fewest of 1, 2, 5, 10, 20 that halve the probability of the concept's answers and cost retain rows at most 2 points
    of accuracy. `noise` is in multiples of a vector's root mean square; `absolute` takes it as it is (the paper: 0.1,
    about 5 times the entries of a 7B model). `by_entity` takes every entity of the forget rows for a concept of its
    own. `objective` then trains the vectors, and nothing else, with any gradient objective.
    """
    if noise < 0:
        raise RequestError(f"needle: noise is {noise}, expected at least 0")
    if count != "search" and count < 1:
        raise RequestError(f"needle: count is {count}, expected at least 1 or search")
    named = [Address.parse(text) for text in vectors]
    twice = [str(address) for address in named if named.count(address) > 1]
    if twice:
        raise RequestError(f"needle: vectors names {twice[0]} twice")
    if named and by_entity:
        raise RequestError("needle: by_entity searches the vectors of every entity, and vectors names some already")
    matrices = _within(case)
    settings: dict[str, Any] = {"mode": mode, "noise": noise, "absolute": absolute, "seed": case.seed}
    concepts = _concepts(case, by_entity) if not named or mode == "project" else {}
    tokens = {name: _tokens(one) for name, one in concepts.items()}
    chosen, about = named, dict[str, Any]()
    if not named:
        found = {name: _located(one, tokens[name], by, count, matrices, settings) for name, one in concepts.items()}
        if by_entity:
            case.warnings += [f"{name}: {text}" for name, one in concepts.items() for text in one.warnings]
        chosen = list(dict.fromkeys(address for addresses, _ in found.values() for address in addresses))
        about = {"by": by, "concepts": {name: told for name, (_, told) in found.items()}}
        if not by_entity:
            about = {"by": by, **next(iter(about["concepts"].values()))}
        case.warnings += _shared({name: addresses for name, (addresses, _) in found.items()})
    for address in chosen:
        find(case.subject.model, address, matrices)
    every = tuple(dict.fromkeys(token for several in tokens.values() for token in several))
    delta = ablate(case.subject, chosen, tokens=every, **settings)
    case.summary["needle"] = {"vectors": [str(address) for address in chosen], "mode": mode, **about}
    if objective is None:
        return delta
    start = delta.apply(case.subject)
    trained = case.unlearn(objective, phase="train", subject=start, scope=" + ".join(map(_scope, chosen)))
    return compose([delta, trained.delta])


def _concepts(case: EditCase, by_entity: bool) -> dict[str, EditCase]:
    """The request, or one for each entity of its forget rows; other entities' rows are among those to be kept."""
    if not by_entity:
        return {"": case}
    forget = case.data.get("forget", [])
    found = {}
    for name in dict.fromkeys(row.entity for row in forget):
        own = [row for row in forget if row.entity == name]
        others = [row for row in forget if row.entity != name]
        data = {**case.data, "forget": own, "retain": [*case.data.get("retain", []), *others]}
        found[name] = replace(case, data=data, warnings=[])
    return found or {"": case}


def _located(
    case: EditCase,
    tokens: Sequence[int],
    by: Criterion,
    count: int | Literal["search"],
    matrices: Sequence[ValueMatrix],
    settings: Mapping[str, Any],
) -> tuple[list[Address], dict[str, Any]]:
    """The vectors of one concept, and what was found on the way."""
    ranked = _search(case, tokens, by, matrices)
    best = [one.address for one in ranked.candidates]
    if ranked.unsearched:
        case.warnings.append(
            f"{ranked.unsearched} value vectors of fused experts were not searched: they show no activations; "
            "needle(by='z') ranks them too"
        )
    chosen, about = best if count == "search" else best[:count], dict[str, Any]()
    if count == "search":
        chosen, about = _fewest(case, best, lambda found: ablate(case.subject, found, tokens=tokens, **settings))
    about |= {"searched": ranked.searched, "concept": case.subject.tokenizer.convert_ids_to_tokens(list(tokens))}
    return chosen, {**about, "vectors": [str(address) for address in chosen]}


def _shared(found: Mapping[str, Sequence[Address]]) -> list[str]:
    """A sentence for every vector that several concepts lay claim to; it is ablated once."""
    owners: dict[Address, list[str]] = {}
    for name, addresses in found.items():
        for address in addresses:
            owners.setdefault(address, []).append(name)
    return [
        f"vector {address} holds several concepts ({', '.join(names)}); it is ablated once"
        for address, names in owners.items()
        if len(names) > 1
    ]


def ablate(
    subject: LanguageModel,
    addresses: Sequence[Address],
    *,
    mode: Mode = "noise",
    noise: float = 5.0,
    absolute: bool = False,
    tokens: Sequence[int] = (),
    seed: int = 0,
) -> Delta:
    """The change of some value vectors, by itself.

    Args:
        noise: standard deviation, in multiples of a vector's root mean square unless `absolute`.
        tokens: of the concept, for `project`.
        seed: the noise of a vector depends on it and on the vector's address alone.

    Raises:
        SubjectError: there is no such vector.
    """
    matrices = value_matrices(subject.model)
    basis = _basis(subject, tokens) if mode == "project" else None
    moved: dict[str, list[tuple[ValueMatrix, int, Tensor]]] = {}
    for address in dict.fromkeys(addresses):
        matrix = find(subject.model, address, matrices)
        old = vectors(subject.model, matrix)[address.dim].float().cpu()
        if mode == "noise":
            generator = torch.Generator().manual_seed(int(content_key(seed, str(address))[:15], 16))
            scale = noise if absolute else noise * float(old.square().mean().sqrt())
            change = scale * torch.randn(len(old), generator=generator)
        elif mode == "project":
            assert basis is not None
            change = -(basis @ (basis.T @ old))
        else:
            change = -old if mode == "zero" else -2 * old
        if bool(change.any()):
            moved.setdefault(matrix.name, []).append((matrix, address.dim, change))
    settings = {"vectors": [str(a) for a in addresses], "noise": noise, "absolute": absolute, "seed": seed}
    return Delta(subject.fingerprint, sparse(moved), {"method": "needle", "mode": mode, **settings})


def _basis(subject: LanguageModel, tokens: Sequence[int]) -> Tensor:
    """(d, r) orthonormal: what of the residual stream the concept's tokens are read from."""
    readout, width = Readout.of(subject), value_matrices(subject.model)[0].width
    # All steps on the way to the head are linear: what they make of unit vectors is the whole of them.
    through = readout.read(torch.eye(width, device=readout.head.device))
    rows = readout.head[torch.tensor(tokens, device=readout.head.device)].float() @ through.T
    _, sizes, directions = torch.linalg.svd(rows.cpu(), full_matrices=False)
    return directions[sizes > 1e-5 * sizes[0]].T


def _within(case: EditCase) -> list[ValueMatrix]:
    """The matrices of which the request's scope lets vectors change."""
    matrices = value_matrices(case.subject.model)
    if case.scope is None:
        return matrices
    resolved = resolve(case.scope, case.subject.model)
    free = {name for name, _ in resolved.parameters}
    found = [matrix for matrix in matrices if matrix.name in free]
    if not found:
        raise RequestError(f"needle: scope {resolved.form!r} holds no MLP output matrix, expected at least 1")
    return found


def _tokens(case: EditCase) -> tuple[int, ...]:
    forget, retain = (case.data.get(name, []) for name in ("forget", "retain"))
    for name, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise RequestError(
                f"request.data.{name}: 0 rows, but needle needs some to find the concept's vectors; or name them: "
                "vectors=[20:10513]"
            )
    texts, others = ([" ".join((row.prompt, row.answer, *row.aliases)) for row in rows] for rows in (forget, retain))
    return distinctive(case.subject, texts, others)


def _search(case: EditCase, tokens: Sequence[int], by: Criterion, matrices: Sequence[ValueMatrix]) -> Search:
    asked, others = ([_asked(case.subject, row) for row in case.data[name]] for name in ("forget", "retain"))
    if by == "attribution":
        return search(case.subject, tokens, prompts=asked, others=others, matrices=matrices)
    k = min(200, len(case.subject.tokenizer) // 20)
    return search(case.subject, tokens, by=by, k=k if by == "purity" else None, matrices=matrices)


def _asked(subject: LanguageModel, row: Row) -> str:
    """The text at whose end the row's knowledge is called for; of running text the first half."""
    if row.prompt:
        return subject.prompt_text(row)
    words = row.answer.split()
    return " ".join(words[: (len(words) + 1) // 2])


def _fewest(
    case: EditCase, best: Sequence[Address], ablated: Callable[[Sequence[Address]], Delta]
) -> tuple[list[Address], dict[str, Any]]:
    """The fewest vectors that carry the concept, and what each number of them did."""
    before = {name: knows(case.subject, case.data[name]) for name in ("forget", "retain")}
    tried: dict[int, tuple[float, float]] = {}
    for count in dict.fromkeys(min(count, len(best)) for count in COUNTS):
        changed = ablated(best[:count]).apply(case.subject)
        kept = knows(changed, case.data["forget"]).probability / max(before["forget"].probability, 1e-9)
        lost = before["retain"].accuracy - knows(changed, case.data["retain"]).accuracy
        tried[count] = (kept, lost)
        if kept <= HALVED and lost <= SPARED:
            break
    sparing = [count for count, (_, lost) in tried.items() if lost <= SPARED] or list(tried)[:1]
    chosen = min(sparing, key=lambda count: tried[count][0])
    kept, lost = tried[chosen]
    if not (kept <= HALVED and lost <= SPARED):
        case.warnings.append(
            f"the concept is not localised: no number of vectors up to {max(tried)} halves the probability of its "
            f"answers and spares retain rows; {chosen} were taken, which leave {kept:.0%} of it and cost {lost:.1%} of "
            "retain accuracy"
        )
    return list(best[:chosen]), {
        "tried": {str(n): {"probability_kept": round(k, 4), "retain_lost": round(r, 4)} for n, (k, r) in tried.items()}
    }


def _scope(address: Address) -> str:
    expert = "" if address.expert is None else f", expert={address.expert}"
    return f"column(layer={address.layer}, index={address.dim}{expert})"
