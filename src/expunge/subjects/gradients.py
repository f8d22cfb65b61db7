"""How strongly each row pulls at each weight: norms of the gradients of single rows, from backward passes over many.

A row's gradient in a matrix is G^T A, where A (T, in) holds what the matrix read at the row's T tokens and G (T, out)
the gradient of what it gave. Its squared norm is sum_tu (G G^T)_tu (A A^T)_tu, so that no gradient of a weight is ever
formed where T (in + out) < in out (ghost norms, arXiv:2110.05679). Rows share nothing on the way back: tokens that two
rows shared would get the sum of their gradients. Where the head is the embedding too, the cross term of both joins.

Blocks of the common kind go there and back in few operators, and what rows begin with alike is read once
(plain_norms.py); others as autograd has it. Models with weights that are used in another way (experts, heads with caps)
run backward row by row. Which it is, is tried once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..errors import LaunchError
from .packed import Encoded, Pack, in_order, pack
from .plain_norms import Add, Walk, pays
from .plain_pass import PlainPass, plain_pass
from .quantised import is_quantised
from .side_by_side import alone, side_by_side
from .sparing import sparing
from .token_statistics import token_statistics

if TYPE_CHECKING:
    from .language import LanguageModel
    from .protocol import Progress

TOKENS = 2048
"""Tokens with activations at once."""
LOGITS = 1 << 20
"""Logits at once (4 MiB), or those of one row."""

_together: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_walks: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def gradient_norms(
    subject: LanguageModel, rows: Sequence[Encoded], *, progress: Progress | None = None
) -> tuple[list[str], np.ndarray]:
    """(names of the parameter tensors, (rows, tensors) 2-norms of the gradient of each row's loss).

    The loss is the mean over the tokens of the answer's text; tokens that close it do not count. NaN where a row does
    not use a tensor at all (an expert), and where a tensor is quantised: it has no gradient.

    Raises:
        LaunchError: the weights lie in parts over several processes, as they do while FSDP trains them.
    """
    if subject.sharded:
        raise LaunchError("gradients of single rows need whole weights, and these lie in parts over several processes")
    texts = [replace(row, ids=row.ids[: len(row.ids) - row.closing], closing=0) for row in rows]
    if rows and can_go_together(subject):
        names, norms, _, _ = norms_and_columns(subject, texts, columns=False, progress=progress)
        return names, norms
    parts = subject.share(
        [[i] for i in range(len(texts))],
        lambda group: [_one(subject, texts[i]) for i in group],
        of=[row.ids for row in texts],
        progress=progress,
    )
    names = [name for name, _ in subject.model.named_parameters()]
    return names, np.stack([norms for (norms,) in parts]) if parts else np.zeros((0, len(names)), np.float32)


def norms_and_columns(
    subject: LanguageModel, rows: Sequence[Encoded], *, columns: bool = True, progress: Progress | None = None
) -> tuple[list[str], np.ndarray, list[list[int]], list[dict[str, np.ndarray]]]:
    """As `gradient_norms`, of a model whose rows go together; also the rows of each pass, and for each pass the columns
    of `Scores`, which follow from the same states."""
    groups = _groups(rows)
    walks = _can_walk(subject)

    def both(model: LanguageModel, group: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        members = [rows[i] for i in group]
        plain = _plain(model) if walks else None
        walk = plain if plain and pays(plain, max(len(row.ids) for row in members)) else None
        return _many(model, members, columns, walk)

    with _moving(list(subject.model.parameters()), False):
        parts = side_by_side(
            subject,
            groups,
            both,
            of=[row.ids for row in rows],
            progress=progress,
        )
    names = [name for name, _ in subject.model.named_parameters()]
    norms = in_order(groups, [list(found) for found, _ in parts])
    return names, np.stack(norms), groups, [found for _, found in parts]


def _groups(rows: Sequence[Encoded]) -> list[list[int]]:
    """Rows of alike lengths, within a budget of tokens."""
    found: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if not found or (len(found[-1]) + 1) * len(rows[index].ids) > TOKENS:
            found.append([])
        found[-1].append(index)
    return found


# --- one row ---------------------------------------------------------------------------------------------------------


@torch.enable_grad()
def _one(subject: LanguageModel, row: Encoded) -> np.ndarray:
    """(tensors,) by an ordinary backward pass."""
    parameters = list(subject.model.parameters())
    places = [i for i, parameter in enumerate(parameters) if not is_quantised(parameter)]
    moving = [parameters[i] for i in places]
    with _moving(moving, True):
        logits = subject.head(subject.plain_states(row)).float()
        target = torch.tensor(row.ids[row.start :], device=subject.device)
        loss = torch.nn.functional.cross_entropy(logits, target)
        found = torch.autograd.grad(loss, moving, allow_unused=True)
    norms = np.full(len(parameters), np.nan, np.float32)
    for i, gradient in zip(places, found):
        if gradient is not None:
            # Summed in double precision: over a million elements float32 is off by 2e-4.
            norms[i] = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return norms


@contextmanager
def _moving(parameters: Sequence[nn.Parameter], wanted: bool) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter, flag in zip(parameters, before):
            parameter.requires_grad_(flag)


# --- many rows -------------------------------------------------------------------------------------------------------


def can_go_together(subject: LanguageModel) -> bool:
    """Whether a backward pass over several rows tells their gradients apart; tried once."""
    if subject.model not in _together:
        _together[subject.model] = _try(subject)
    return _together[subject.model]


def could_go_together(subject: LanguageModel) -> bool:
    """As much of it as shows without weights: every one is used in a way whose gradients can be told apart, as those of
    experts are not."""
    return _owners(subject) is not None


@alone()
def _try(subject: LanguageModel) -> bool:
    if subject.mode == "rows" or subject.linear_head is None or not could_go_together(subject):
        return False
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, subject.vocabulary, (3, 9), generator=generator).tolist()
    rows = [Encoded(tuple(text[:length]), 4, 0, "") for text, length in zip(ids, (7, 9, 9))]
    plain = np.stack([_one(subject, row) for row in rows])
    try:
        with _moving(list(subject.model.parameters()), False):
            packed, _ = _many(subject, rows)
    except Exception:  # any failure means that this model's gradients cannot be told apart
        return False
    tolerance = 1e-4 if subject.dtype == torch.float32 else 5e-2
    return bool(np.allclose(plain, packed, rtol=tolerance, atol=tolerance * float(np.nanmax(plain))))


def _owners(subject: LanguageModel) -> list[tuple[str, nn.Module, _Norms]] | None:
    """Modules with weights of their own but for the head, and how the norms of their gradients follow."""
    found: list[tuple[str, nn.Module, _Norms]] = []
    owned: set[int] = set()
    for path, module in subject.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or module is subject.model.get_output_embeddings():
            continue
        kind = next((norms for types, norms in _KINDS if type(module) in types), None)
        if kind is None and all(p.dim() == 1 for p in own.values()) and set(own) <= {"weight", "bias"}:
            kind = _scale
        if kind is None or any(id(p) in owned for p in own.values()):
            return None
        owned |= {id(p) for p in own.values()}
        found.append((path, module, kind))
    return found


class _Rows:
    """Tokens row by row: rows of one length stand together, so that views tell them apart."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.runs: list[tuple[slice, int]] = []
        """Tokens of rows of one length, and that length."""
        start = 0
        for length, alike in groupby(self.lengths):
            self.runs.append((slice(start, start := start + sum(alike)), length))
        self._products: tuple[Tensor, list[Tensor]] | None = None

    def parts(self, values: Tensor) -> list[Tensor]:
        """(tokens, ...) -> a view (rows, T, ...) for every run."""
        return [values[tokens].unflatten(0, (-1, length)) for tokens, length in self.runs]

    def products(self, read: Tensor) -> list[Tensor]:
        """(rows, T, T) products of what tokens of one row read, for every run; kept for the next matrix."""
        if self._products is None or self._products[0] is not read:
            self._products = read, [a @ a.mT for a in self.parts(read)]
        return self._products[1]

    def sums(self, values: Tensor) -> Tensor:
        """(tokens, ..., n) -> (rows, n)"""
        return torch.cat([part.flatten(1, -2).sum(1) for part in self.parts(values)])


_Norms = Callable[[nn.Module, Tensor, Tensor, _Rows], dict[str, Tensor]]
"""(module, what it read, gradient of what it gave, rows) -> squared norms (rows,) by the parameter's name."""


def _matrix(module: nn.Module, read: Tensor, gradient: Tensor, rows: _Rows) -> dict[str, Tensor]:
    wide, gave = read.shape[1], gradient.shape[1]
    found = []
    for number, (a, g) in enumerate(zip(rows.parts(read), rows.parts(gradient))):
        if a.shape[1] * (wide + gave) < wide * gave:
            found.append((g @ g.mT * rows.products(read)[number]).sum((1, 2)))
        else:
            found.append((g.mT @ a).square().sum((1, 2)))
    weight = torch.cat(found)
    return {"weight": weight} if module.bias is None else {"weight": weight, "bias": _squares(rows.sums(gradient))}


def _squares(values: Tensor) -> Tensor:
    return values.square().sum(1)


def _table(module: nn.Module, read: Tensor, gradient: Tensor, rows: _Rows) -> dict[str, Tensor]:
    assert isinstance(module, nn.Embedding)
    ids = read.flatten()
    if module.padding_idx is not None:  # its row of the table gets no gradient
        gradient = gradient * ids.ne(module.padding_idx)[:, None]
    number = torch.arange(len(rows.lengths), device=ids.device)
    row = number.repeat_interleave(torch.tensor(rows.lengths, device=ids.device))
    # One number for row and token: pairs would be compared one by one, each comparison an operator.
    pairs, at = (row * module.num_embeddings + ids).unique(return_inverse=True)
    summed = gradient.new_zeros(len(pairs), gradient.shape[1]).index_add_(0, at, gradient)
    whose = pairs.div(module.num_embeddings, rounding_mode="floor")
    return {"weight": gradient.new_zeros(len(number)).index_add_(0, whose, _squares(summed))}


def _scale(module: nn.Module, read: Tensor, gradient: Tensor, rows: _Rows) -> dict[str, Tensor]:
    # What norms give is affine in their weights, token by token (and head by head).
    own = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
    width = len(next(iter(own.values())))
    read, gradient = read.unflatten(1, (-1, width)), gradient.unflatten(1, (-1, width))
    example = torch.linspace(-1, 2, width, device=read.device).view(1, 1, -1)
    # Norms that multiply by 1 + weight give something without any weights, most others nothing.
    rest = functional_call(module, own, (read,)) if functional_call(module, own, (example,)).any() else None
    found = {}
    for name, zero in own.items():
        by_weight = functional_call(module, {**own, name: torch.ones_like(zero)}, (read,))
        by_weight = by_weight.float() if rest is None else (by_weight - rest).float()
        found[name] = _squares(rows.sums(gradient * by_weight))
    return found


_KINDS: tuple[tuple[tuple[type, ...], _Norms], ...] = (((nn.Linear, Conv1D), _matrix), ((nn.Embedding,), _table))


def _many(
    subject: LanguageModel, rows: Sequence[Encoded], columns: bool = False, plain: PlainPass | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows, tensors) by one pass forward and one back, in which no weight gets a gradient; rows from short to long.
    Where they are asked for, the columns of `Scores` too.

    Weights must not ask for gradients meanwhile.

    Args:
        plain: goes there and back in few operators.
    """
    pack_ = pack(rows, subject.device, sharing="nothing")
    whole = _Rows([len(row.ids) - 1 for row in rows])
    names = {id(p): number for number, p in enumerate(subject.model.parameters())}
    squares = torch.zeros(len(names), len(rows), device=subject.device)
    embedding, head = subject.model.get_input_embeddings(), subject.linear_head
    assert head is not None
    tied = head.weight is embedding.weight
    crossing = torch.zeros(pack_.tokens, embedding.weight.shape[1], device=subject.device) if tied else None
    statistics: list[Sequence[Tensor]] = []

    def add(parameter: Tensor, found: Tensor) -> None:
        squares[names[id(parameter)]] += found

    def turn(hidden: Tensor) -> Tensor:
        back, found = _head(head, hidden, pack_, crossing, statistics.append if columns else None)
        for name, values in found.items():
            add(head.get_parameter(name), values)
        return back

    def fed(gradient: Tensor) -> None:
        add(embedding.weight, _table(embedding, pack_.ids[0], gradient, whole)["weight"])
        if crossing is not None:
            add(embedding.weight, 2 * whole.sums(gradient * crossing).sum(1))

    if plain is None:
        _watched(subject, pack_, turn, add, fed)
    else:
        walk = Walk(plain, rows)
        fed(walk.back(turn(walk.there()), add))
    pulls: np.ndarray = squares.clamp_min(0).sqrt().T.cpu().numpy()
    return pulls, subject.named(pack_, [torch.cat(one) for one in zip(*statistics)]) if columns else {}


@torch.enable_grad()
def _watched(
    subject: LanguageModel,
    pack_: Pack,
    turn: Callable[[Tensor], Tensor],
    add: Add,
    fed: Callable[[Tensor], None],
) -> None:
    """There and back by the model's own code and autograd.

    Args:
        turn: from final states (A, d) to their gradients.
        fed: takes the gradients (tokens, d) of what the embedding gave.
    """
    whole = _Rows([len(row.ids) - 1 for row in pack_.rows])
    predicting = _Rows([row.scored for row in pack_.rows])
    mlp = subject.blocks[-1].mlp if subject.can_spare and len(pack_.read) < pack_.tokens else None
    embedding = subject.model.get_input_embeddings()
    flat: tuple[Tensor, Tensor] | None = None

    def watch(module: nn.Module, norms: _Norms) -> Callable[..., None]:
        def forward(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            # Gradients start at the embeddings: weights get none.
            if norms is _table:
                output.requires_grad_()
            nonlocal flat
            # The last MLP may see the tokens that predict alone.
            spared = mlp is not None and arguments[0].dim() == 3 and arguments[0].shape[1] == len(pack_.read)
            places, tokens = (predicting, len(pack_.read)) if spared else (whole, pack_.tokens)
            if flat is None or flat[0] is not arguments[0]:  # several matrices read one tensor
                read = arguments[0].detach().reshape(tokens, -1)
                flat = arguments[0], read if norms is _table else read.float()
            read = flat[1]

            @torch.no_grad()
            def backward(gradient: Tensor) -> None:
                gradient = gradient.reshape(tokens, -1).float()
                if module is embedding:
                    return fed(gradient)
                for name, found in norms(module, read, gradient, places).items():
                    add(module.get_parameter(name), found)

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    with subject.packing(pack_):
        with ExitStack() as stack:
            for _, module, norms in _owners(subject) or ():
                stack.callback(module.register_forward_hook(watch(module, norms)).remove)
            if mlp is not None:
                stack.enter_context(sparing(subject.model.get_submodule(mlp), pack_.read))
            hidden = subject.run_decoder(pack_)[pack_.predict]
        hidden.backward(turn(hidden.detach()))


@torch.no_grad()
def _plain(subject: LanguageModel) -> PlainPass | None:
    return plain_pass(subject)


def _can_walk(subject: LanguageModel) -> bool:
    """Whether passes go there and back in few operators; tried once."""
    if subject.model not in _walks:
        _walks[subject.model] = _walk(subject)
    return _walks[subject.model]


@alone()
def _walk(subject: LanguageModel) -> bool:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, subject.vocabulary, (3, 9), generator=generator).tolist()
    rows = [Encoded((*ids[0], *text[:length]), 11, 0, "") for text, length in zip(ids, (5, 7, 9))]
    plain = _plain(subject)
    if plain is None:
        return False
    with _moving(list(subject.model.parameters()), False):
        own, _ = _many(subject, rows)
        try:
            walked, _ = _many(subject, rows, plain=plain)
        except Exception:  # any failure means that this model is of another kind
            return False
    return bool(np.allclose(own, walked, rtol=1e-4, atol=1e-4 * float(np.nanmax(own))))


@torch.no_grad()
def _head(
    head: nn.Linear,
    hidden: Tensor,
    pack_: Pack,
    crossing: Tensor | None,
    keep: Callable[[Sequence[Tensor]], None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(gradients of rows' losses at the states that predict, what the head adds to squared norms (rows,)).

    Args:
        crossing: (tokens, d), becomes what the head's gradient holds at every fed token's own row of the table.
        keep: takes the statistics of the tokens of several rows, row by row.
    """
    rows = pack_.rows
    fed = pack_.every.split([len(row.ids) - 1 for row in rows])
    back = torch.empty_like(hidden)
    found: dict[str, list[Tensor]] = {name: [] for name, _ in head.named_parameters()}
    texts = [row.scored - row.closing for row in rows]
    shares = [1 / n if at < n else 0.0 for row, n in zip(rows, texts) for at in range(row.scored)]
    weights = torch.tensor(shares, device=hidden.device)  # a row's loss is the mean over its answer's text
    many = max(1, LOGITS // len(head.weight) // max(row.scored for row in rows))
    stop = 0
    for first in range(0, len(rows), many):
        counts = [row.scored for row in rows[first : first + many]]
        part = slice(stop, stop := stop + sum(counts))
        logits = torch.nn.functional.linear(hidden[part], head.weight, head.bias).float()
        if keep is not None:
            order = torch.arange(len(logits), device=logits.device)
            # Which overwrite what they read.
            keep(token_statistics(torch.clone, logits, pack_.target[part], order, len(head.weight)))
        g = logits.softmax(-1)
        g[torch.arange(len(g)), pack_.target[part]] -= 1
        g *= weights[part, None]
        back[part] = g.to(hidden.dtype) @ head.weight
        for own, states, ids in zip(g.split(counts), hidden[part].float().split(counts), fed[first:]):
            found["weight"].append((own @ own.T * (states @ states.T)).sum())
            if head.bias is not None:
                found["bias"].append(own.sum(0).square().sum())
            if crossing is not None:
                crossing[ids] = own[:, pack_.ids[0, ids]].T @ states
    return back, {name: torch.stack(values) for name, values in found.items()}
