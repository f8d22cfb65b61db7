"""Causal tracing: which states, put back into a corrupted run, bring a fact back (ROME, arXiv:2202.05262, section 2).

    clean      the prompt as it is: p
    corrupted  noise on the embeddings of the subject's tokens, S draws of it: p_low, their mean
    restored   the corrupted run with what the clean one gives out at some layer and token: p_restored

    indirect effect  p_restored - p_low            total effect  p - p_low

Runs of one prompt are as long as one another, so they stand in one batch without padding. What lies below the lowest
restored layer is the corrupted run itself: it is kept, and a batch begins at that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..edits import EditRow
from ..errors import ParameterError, RowError
from ..tables.store import content_key
from .anatomy import Block, anatomy
from .entering import Entry, entering
from .packed import LOGIT_ELEMENTS, in_order
from .watch import attention

if TYPE_CHECKING:
    from .language import LanguageModel
    from .protocol import Progress

Kind = Literal["block", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("block", "mlp", "attention")
"""The residual stream after a block, and what its MLP and its attention give out."""
PLACES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
TOKENS = 8192
"""Tokens fed in one pass."""


@dataclass(frozen=True)
class Fact:
    """A prompt about a subject, and the token that is followed."""

    edit: EditRow
    ids: tuple[int, ...]
    """Of the prompt."""
    first: int
    """The subject's first token."""
    stop: int
    """Behind its last one."""
    answer: int | None
    """None: the model's own first choice."""

    @property
    def places(self) -> list[str]:
        """What each token from the subject's first one on is called; one that is two of `PLACES` is the later of them
        within the subject and behind it."""
        inside = self.stop - self.first
        names = [PLACES[0], *[PLACES[1]] * (inside - 2), PLACES[2]][-inside:]
        behind = len(self.ids) - self.stop
        return names + ([PLACES[3], *[PLACES[4]] * (behind - 2), PLACES[5]][-behind:] if behind else [])


@dataclass(frozen=True)
class Traced:
    """One fact; effects are differences of probabilities, averaged over draws of noise."""

    fact: Fact
    answer: int
    chosen: bool
    """Whether the answer is what the clean run makes likeliest."""
    clean: float
    low: float
    effects: Mapping[Kind, np.ndarray]
    """(tokens from the subject's first one on, layers). What stands before the subject is not corrupted."""

    @property
    def total(self) -> float:
        return self.clean - self.low

    def by_place(self, kind: Kind) -> dict[str, np.ndarray]:
        """(layers,) mean effect of the tokens of each place."""
        rows: dict[str, list[np.ndarray]] = {}
        for place, row in zip(self.fact.places, self.effects[kind]):
            rows.setdefault(place, []).append(row)
        return {place: np.mean(several, axis=0) for place, several in rows.items()}


def locate(subject: LanguageModel, edit: EditRow) -> Fact:
    """An edit's prompt as tokens; its answer is the first token of what it says now.

    Raises:
        RowError: it names no subject, or it does not stand in the prompt as the model reads it.
    """
    where = edit.source or edit.id
    if not edit.subject:
        raise RowError(f"{where}: tracing needs a subject, whose tokens are corrupted; the row names none")
    row = edit.row(answer=edit.ground_truth[0] if edit.ground_truth else "x")
    tokens, (text, spans) = subject.encode(row), subject.spans(row)
    begin = text[: len(subject.prompt_text(row))].rfind(edit.subject)
    if begin < 0:
        raise RowError(f"{where}: the subject {edit.subject!r} does not stand in the prompt as the model reads it")
    end = begin + len(edit.subject)
    inside = [i for i, (a, b) in enumerate(spans[: tokens.start]) if a < end and b > begin]
    answer = tokens.ids[tokens.start] if edit.ground_truth else None
    return Fact(edit, tokens.ids[: tokens.start], inside[0], inside[-1] + 1, answer)


@dataclass(frozen=True)
class Site:
    """What is restored together: what modules of a kind give out at some layers and tokens."""

    kind: Kind
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    """Places in the prompt."""


def module_of(subject: LanguageModel, kind: Kind, layer: int) -> nn.Module:
    """The module whose output is read and restored."""
    block = anatomy(subject.model).blocks[layer]
    if kind == "attention":
        return subject.model.get_submodule(attention(subject)[layer][0])
    return subject.model.get_submodule(block.name if kind == "block" else _mlp(block))


def _mlp(block: Block) -> str:
    """The module that holds all of the MLP; its output matrix where the block itself holds it (OPT)."""
    parts = (*block.mlp_in, *block.mlp_gate, *block.mlp_out, *block.router, *block.experts)
    paths = [name.split(".") for name in parts]
    common = next((i for i, names in enumerate(zip(*paths)) if len(set(names)) > 1), 0)
    holder = ".".join(paths[0][:common])
    return holder if len(holder) > len(block.name) else block.mlp_out[0].rpartition(".")[0]


class Corrupted:
    """One prompt, read as it is and under draws of noise, into which states of the clean run can be put back."""

    @torch.no_grad()
    def __init__(self, subject: LanguageModel, fact: Fact, noise: Tensor, kinds: Sequence[Kind] = KINDS) -> None:
        """
        Args:
            noise: (draws, subject tokens, d), added to embeddings.
        """
        self.subject, self.fact, self.noise = subject, fact, noise.to(subject.device)
        subject.settle()  # tries that must not happen under the hooks below
        self.layers = len(subject.blocks)
        draws, length = len(noise), len(fact.ids)
        kept: dict[tuple[Kind, int], Tensor] = {}

        def keep(kind: Kind, layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                kept[kind, layer] = _plain(output).reshape(1 + draws, length, -1)

            return hook

        with ExitStack() as stack:
            for kind in {*kinds, "block"}:
                for layer in range(self.layers):
                    handle = module_of(subject, kind, layer).register_forward_hook(keep(kind, layer))  # type: ignore[arg-type]
                    stack.callback(handle.remove)
            found = subject.head(self._run([None, *range(draws)], {})).float().softmax(-1)
        self.clean_states = {
            kind: torch.stack([kept[kind, layer][0] for layer in range(self.layers)]) for kind in kinds
        }
        self.streams = [kept["block", layer][1:] for layer in range(self.layers)]
        """Per block (draws, tokens, d) what it gives out under noise."""
        self.choice = int(found[0].argmax())
        self.answer = self.choice if fact.answer is None else fact.answer
        probabilities = found[:, self.answer]
        self.clean = float(probabilities[0])
        self.low = probabilities[1:]
        """(draws,)"""

    @torch.no_grad()
    def restored(self, sites: Sequence[Site]) -> Tensor:
        """(sites, draws) the answer's probability with each site restored.

        Raises:
            ParameterError: a site names a layer or a token that is not there.
        """
        draws, length = len(self.noise), len(self.fact.ids)
        for site in sites:
            for name, values, count in (("layer", site.layers, self.layers), ("token", site.tokens, length)):
                wrong = [value for value in values if not 0 <= value < count]
                if wrong:
                    raise ParameterError(f"there is no {name} {wrong[0]} to restore, expected 0 to {count - 1}")
        order = sorted(range(len(sites)), key=lambda i: min(sites[i].layers, default=0))
        step = max(1, TOKENS // (length * draws))
        parts: dict[int, Tensor] = {}
        for begin in range(0, len(order), step):
            chunk = order[begin : begin + step]
            put: dict[tuple[Kind, int], tuple[list[int], list[int]]] = {}
            for number, index in enumerate(chunk):
                site = sites[index]
                for layer in site.layers:
                    rows, tokens = put.setdefault((site.kind, layer), ([], []))
                    for draw in range(draws):
                        rows += [(number * draws + draw) * length + token for token in site.tokens]
                        tokens += site.tokens
            entry = min((layer for _, layer in put), default=0)
            states = self._run(list(range(draws)) * len(chunk), put, entry)
            size = max(1, LOGIT_ELEMENTS // self.subject.vocabulary)
            found = [self.subject.head(part).float().softmax(-1)[:, self.answer] for part in states.split(size)]
            parts |= dict(zip(chunk, torch.cat(found).view(len(chunk), draws)))
        return torch.stack([parts[index] for index in range(len(sites))]) if sites else self.low[None][:0]

    def _run(
        self,
        draws: Sequence[int | None],
        put: Mapping[tuple[Kind, int], tuple[list[int], list[int]]],
        entry: int = 0,
    ) -> Tensor:
        """(rows, d) final states at the prompt's end, of rows under one draw each.

        Args:
            draws: None is a clean row.
            put: by kind and layer, where in the batch's tokens which tokens of the clean run stand instead.
            entry: blocks below are not run; not for clean rows.
        """
        subject, fact = self.subject, self.fact
        ids = torch.tensor([fact.ids], device=subject.device).expand(len(draws), -1)
        noisy = [row for row, draw in enumerate(draws) if draw is not None]
        of = torch.tensor([draw for draw in draws if draw is not None], device=subject.device, dtype=torch.long)

        def corrupt(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[noisy, fact.first : fact.stop] += self.noise[of].to(output.dtype)
            return changed

        with ExitStack() as stack:
            stack.callback(anatomy(subject.model).embedding[1].register_forward_hook(corrupt).remove)
            for (kind, layer), (rows, tokens) in put.items():
                hook = _put(self.clean_states[kind][layer], rows, tokens)
                stack.callback(module_of(subject, kind, layer).register_forward_hook(hook).remove)
            if entry and subject.can_enter:
                stack.enter_context(entering(subject, Entry(entry, self.streams[entry - 1][of])))
            found: Tensor = subject.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        return found


def _plain(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _put(clean: Tensor, rows: list[int], tokens: list[int]) -> Callable[..., Any]:
    """A hook that replaces some tokens of all in the batch by those of the clean run (tokens, d)."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        whole = _plain(output)
        flat = whole.reshape(-1, whole.shape[-1]).clone()
        flat[rows] = clean[tokens].to(flat.dtype)
        changed = flat.view(whole.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def window(layer: int, layers: int, width: int) -> tuple[int, ...]:
    """`width` layers around one, as far as there are any."""
    return tuple(range(max(0, layer - width // 2), min(layers, layer - (-width // 2))))


@torch.no_grad()
def causal_trace(
    subject: LanguageModel,
    facts: Sequence[Fact],
    *,
    kinds: Sequence[Kind] = KINDS,
    noise: float = 3.0,
    draws: int = 10,
    width: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Traced]:
    """Every (token, layer) of every fact restored by itself.

    Args:
        noise: its standard deviation, in standard deviations of the entries of the subjects' embeddings.
        draws: of noise, over which probabilities are averaged.
        width: layers that MLPs and attentions are restored at together; by default a fifth of the depth. The
            residual stream is restored after one block at a time.

    Raises:
        ParameterError: a setting that cannot be.
    """
    count = len(subject.blocks)
    width = max(1, round(0.2 * count)) if width is None else width
    if noise < 0 or draws < 1 or not 1 <= width <= count:
        raise ParameterError(
            f"noise is {noise}, draws {draws} and width {width}; expected noise >= 0, draws >= 1 and width 1 to {count}"
        )
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ParameterError(f"kinds is {', '.join(kinds) or 'empty'}, expected some of {', '.join(KINDS)}")
    embedding = anatomy(subject.model).embedding[1]
    about = [token for fact in facts for token in fact.ids[fact.first : fact.stop]]
    entries = embedding(torch.tensor([about or [0]], device=subject.device)).float()
    scale = noise * float(entries.std())

    def read(group: Sequence[int]) -> list[Traced]:
        return [_traced(subject, facts[i], kinds, scale, draws, width, seed) for i in group]

    groups = [[i] for i in range(len(facts))]
    return in_order(groups, subject.share(groups, read, of=[fact.ids for fact in facts], progress=progress))


def _traced(
    subject: LanguageModel, fact: Fact, kinds: Sequence[Kind], scale: float, draws: int, width: int, seed: int
) -> Traced:
    generator = torch.Generator().manual_seed(int(content_key(seed, list(fact.ids))[:15], 16))
    matrix = subject.model.get_parameter(f"{anatomy(subject.model).embedding[0]}.weight")
    noise = torch.randn(draws, fact.stop - fact.first, matrix.shape[1], generator=generator)
    run = Corrupted(subject, fact, scale * noise, kinds)
    tokens, low, effects = range(fact.first, len(fact.ids)), float(run.low.mean()), {}
    for kind in kinds:
        wide = 1 if kind == "block" else width
        sites = [Site(kind, window(i, run.layers, wide), (token,)) for token in tokens for i in range(run.layers)]
        found = run.restored(sites).mean(1).view(len(tokens), run.layers)
        effects[kind] = found.cpu().numpy().astype(np.float64) - low
    return Traced(fact, run.answer, run.answer == run.choice, run.clean, low, effects)
