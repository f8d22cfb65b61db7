"""MEND: a small network that makes an edit of a gradient, trained on other edits (arXiv:2110.11309).

For every edited matrix and every token that predicts a target: h (f,), what goes into it, and g (d,), the gradient of
the loss at what comes out (factors.py). With z = [h, g], less the mean and over the deviation of all training edits,

    z <- z + relu(s1 (U1 V1 z + b1) + o1)            U is zero at first: the network begins as the identity
    [h~, g~] = z + relu(s2 (U2 V2 z + b2) + o2)      s, o and the rate are each matrix's own; U, V, b serve all of them
    W <- W - rate sum over tokens g~ h~^T

It is trained on demonstrations, other facts, with what comes of the edit:

    c_edit NLL(target | rephrasing) + c_loc KL(before || after) on what must stay

so that gradients run through the edit into the network. It holds four matrices of (f + d) x rank and wants hundreds of
demonstrations: it stands here because published tables have it, and is meant for small models. What was trained is kept
in the cache, under the hash of model, demonstrations and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...deltas import Delta
from ...edits import EditRow
from ...errors import ParameterError, RequestError, TrainingError
from ...files import cached, save_tensors
from ...registry import edit
from ...subjects.language import LanguageModel
from ...subjects.packed import Pack, pack
from ...subjects.tails import edited_matrix, hooked
from ...subjects.value_vectors import ValueMatrix
from ...tables.store import content_key
from ..optimise.importance import flowing
from .case import Edit, EditCase, targeted
from .factors import observed
from .traced import Layers, span_of
from .values import located
from .write import low_rank

LAYERS = (0.75, 0.99)
"""First and last, by default."""
VERSION = 1
"""Raised when the same demonstrations would train something else."""
Factors = list[tuple[Tensor, Tensor]]
"""Of every matrix h (n, f) and g (n, d)."""


class Network(nn.Module):
    """One network for edited matrices of one shape."""

    def __init__(self, matrices: Sequence[ValueMatrix], rank: int, rate: float, seed: int) -> None:
        super().__init__()
        self.split = [matrices[0].count, matrices[0].width]
        size, several = sum(self.split), len(matrices)
        draw, rank = torch.Generator().manual_seed(seed), min(rank, size)
        self.down = nn.Parameter(torch.randn(2, rank, size, generator=draw) / size**0.5)
        self.up = nn.Parameter(torch.zeros(2, size, rank))
        self.bias = nn.Parameter(torch.zeros(2, size))
        self.scale = nn.Parameter(torch.ones(several, 2, size))
        self.shift = nn.Parameter(torch.zeros(several, 2, size))
        self.rate = nn.Parameter(torch.full((several,), rate))
        self.register_buffer("mean", torch.zeros(several, size))
        self.register_buffer("deviation", torch.ones(several, size))

    def forward(self, factors: Factors) -> Factors:
        """Every matrix's h~ (n, f), and its g~ (n, d) times its rate."""
        mean, deviation, made = self.get_buffer("mean"), self.get_buffer("deviation"), []
        for number, (h, g) in enumerate(factors):
            z = (torch.cat([h, g], 1) - mean[number]) / (deviation[number] + 1e-7)
            for i in range(2):
                inner = z @ self.down[i].T @ self.up[i].T + self.bias[i]
                # Not relu, whose gradient is 0 at 0, where it begins.
                z = z + (self.scale[number, i] * inner + self.shift[number, i]).clamp(min=0)
            inputs, gradients = z.split(self.split, 1)
            made.append((inputs, self.rate[number] * gradients))
        return made


@edit(
    paper="arXiv:2110.11309",
    intention="removal",
    needs=("demonstrations",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    keeps=("a network that turns gradients into edits",),
    cost="training of the network, once: a pass forward and back per step and demonstration; then one per batch",
    known_weaknesses=("paraphrase", "relearn"),
)
def mend(
    case: EditCase,
    *,
    layers: Layers = LAYERS,
    rank: int = 64,
    steps: int = 500,
    batch: int = 8,
    learning_rate: float = 1e-3,
    rate: float = 1e-3,
    c_edit: float = 0.1,
    c_loc: float = 1.0,
    seed: int = 0,
) -> Edit:
    """Turn an edit's gradient into the edit by a network that was trained on demonstrations (Mitchell et al. 2022).

    Demonstrations are other facts in the form of edits, with rephrasings and locality; where there is no locality,
    another demonstration's question must stay.

    Args:
        layers: first and last, of whose MLPs the output matrices are edited; numbers or fractions of the depth.
        rank: of the network's layers; published 1920, for models of billions of weights.
        steps: of training.
        batch: demonstrations in a step, each edited by itself.
        learning_rate: of training; published 1e-6, for up to 100 000 steps.
        rate: that edits begin with; it is trained with the network.
        c_edit: weight of the edit's loss.
        c_loc: weight of what must stay.
        seed: of the network and of the order.

    Raises:
        RequestError: fewer than two demonstrations.
        ParameterError: a number out of its range, or layers of several shapes.
    """
    if not (rank > 0 and steps >= 0 and batch > 0 and learning_rate > 0 and rate > 0 and c_edit >= 0 and c_loc >= 0):
        raise ParameterError("mend: expected rank, batch, learning_rate and rate > 0, steps, c_edit and c_loc >= 0")
    first, last = span_of(case, layers, LAYERS)
    if first > last:
        raise ParameterError(f"layers is {layers}, which are {first} and {last}; expected the lower one first")
    shown = targeted(case.demonstrations, [], seed)
    if len(shown) < 2:
        raise RequestError(
            f"mend trains its network on other facts, and there are {len(shown)}: give at least 2 edit rows as "
            "demonstrations, better hundreds, with rephrasings and locality"
        )
    matrices = [edited_matrix(case.base, layer) for layer in range(first, last + 1)]
    if len({(one.count, one.width) for one in matrices}) > 1:
        raise ParameterError(f"mend: the matrices of layers {first} to {last} have several shapes; choose some of one")
    teaching = Teaching(rank, steps, batch, learning_rate, rate, c_edit, c_loc, seed)
    network, losses = taught(case, shown, matrices, teaching)
    facts = located(case, 0)
    seen, before = observed(case.subject, facts, matrices, "target")
    with torch.no_grad():
        made = network(_placed(seen, case.subject.device))
    entries = {m.name: low_rank(m, -g.T.cpu(), h.cpu()) for m, (h, g) in zip(matrices, made)}
    about = {"layers": [first, last], "facts": len(facts), "loss_before": float(before.mean())}
    case.summary["mend"] = {**about, "training_losses": [round(float(loss), 4) for loss in losses]}
    return Delta(case.base.fingerprint, entries, {"method": "mend", "layers": [first, last]})


def _placed(factors: Factors, device: torch.device) -> Factors:
    return [(h.float().to(device), g.float().to(device)) for h, g in factors]


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teaching:
    """How the network is trained; the names of `mend`'s settings."""

    rank: int
    steps: int
    batch: int
    learning_rate: float
    rate: float
    c_edit: float
    c_loc: float
    seed: int


@dataclass(frozen=True)
class Lesson:
    """One demonstration: its gradient's factors, and what is read after the edit that they make."""

    factors: Factors
    rows: Pack
    """Questions with the target, then those that must stay with their answers."""
    edited: int
    """How many of the answer tokens are the target's."""
    before: Tensor
    """(tokens, d) final states of the unedited model that predict the others."""


def taught(
    case: EditCase, shown: Sequence[EditRow], matrices: Sequence[ValueMatrix], how: Teaching
) -> tuple[Network, Tensor]:
    """A network trained on demonstrations, from the cache where it is there, and its losses: the mean of the first
    tenth of the steps and of the last.

    Raises:
        RowError: a demonstration does not fit the model.
        TrainingError: the loss is not finite.
    """
    subject = case.base
    network = Network(matrices, how.rank, how.rate, how.seed)

    def read(folder: Path) -> Tensor:
        kept = load_file(folder / "network.safetensors")
        losses = kept.pop("losses")
        network.load_state_dict(kept)
        return losses

    def write(losses: Tensor, folder: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_tensors({**state, "losses": losses}, folder / "network.safetensors")

    about = [one.record() for one in shown], [matrix.name for matrix in matrices], vars(how)
    key = content_key(VERSION, subject.fingerprint, *about)
    losses = cached("mend", key, read=read, make=lambda: _teach(network, case, shown, matrices, how), write=write)
    return network.requires_grad_(False).to(subject.device), losses


def _teach(
    network: Network, case: EditCase, shown: Sequence[EditRow], matrices: Sequence[ValueMatrix], how: Teaching
) -> Tensor:
    """Train the network in place; its losses as `taught` gives them."""
    subject = case.base
    lessons = _lessons(replace(case, subject=subject, edits=shown), shown, matrices)
    for number in range(len(matrices)):
        z = torch.cat([torch.cat(lesson.factors[number], 1) for lesson in lessons])
        network.get_buffer("mean")[number], network.get_buffer("deviation")[number] = z.mean(0), z.std(0)
    network.to(subject.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=how.learning_rate)
    draw, order, losses = torch.Generator().manual_seed(how.seed), list[int](), list[float]()
    for step in range(how.steps):
        while len(order) < how.batch:
            order += torch.randperm(len(lessons), generator=draw).tolist()
        chosen, order = order[: how.batch], order[how.batch :]
        optimiser.zero_grad()
        total = 0.0
        for place in chosen:
            with flowing(subject.model, []):
                loss = _loss(subject, network, matrices, lessons[place], how) / how.batch
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if not torch.isfinite(torch.tensor(total)):
            raise TrainingError(f"mend: the loss is {total} after {step} steps; lower learning_rate or rate")
        nn.utils.clip_grad_norm_(network.parameters(), 100.0)
        optimiser.step()
        if case.progress:
            case.progress("mend", step + 1, how.steps)
    several = max(1, len(losses) // 10)
    return torch.tensor([sum(part) / len(part) for part in (losses[:several], losses[-several:]) if part])


def _lessons(case: EditCase, shown: Sequence[EditRow], matrices: Sequence[ValueMatrix]) -> list[Lesson]:
    subject = case.subject
    facts = located(case, 0)
    seen, _ = observed(subject, facts, matrices, "target")
    counts = [fact.lookups[0].tokens.scored for fact in facts]
    apart = [(h.split(counts), g.split(counts)) for h, g in _placed(seen, subject.device)]
    found = []
    for i, one in enumerate(shown):
        asked = [subject.encode(one.row(text)) for text in one.rephrasings or (one.prompt,)]
        kept = [(probe.prompt, probe.answers[0]) for several in one.locality.values() for probe in several]
        stays = [subject.encode(one.row(prompt, answer)) for prompt, answer in kept]
        rows = pack([*asked, *(stays or [subject.encode(shown[i - 1].row())])], subject.device)
        edited = sum(row.scored for row in asked)
        with torch.no_grad():
            before = subject.hidden_states(rows)[edited:].clone()
        found.append(Lesson([(h[i], g[i]) for h, g in apart], rows, edited, before))
    return found


def _loss(
    subject: LanguageModel, network: Network, matrices: Sequence[ValueMatrix], lesson: Lesson, how: Teaching
) -> Tensor:
    def editing(h: Tensor, g: Tensor) -> Callable[..., Tensor]:
        """W - sum g~ h~^T, on what goes into W."""

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return output - (arguments[0].float() @ h.T @ g).to(output.dtype).view(output.shape)

        return hook

    owners = [subject.model.get_submodule(str(matrix.owner)) for matrix in matrices]
    hooks = [owner.register_forward_hook(editing(*pair)) for owner, pair in zip(owners, network(lesson.factors))]
    with hooked(hooks):
        states = subject.hidden_states(lesson.rows)
    said = subject.head(states).float().log_softmax(-1)
    nll = -said[: lesson.edited].gather(1, lesson.rows.target[: lesson.edited, None]).mean()
    with torch.no_grad():
        before = subject.head(lesson.before).float().log_softmax(-1)
    divergence = (before.exp() * (before - said[lesson.edited :])).sum(-1).mean()
    return how.c_edit * nll + how.c_loc * divergence
