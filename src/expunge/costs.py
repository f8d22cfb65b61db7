"""What a model's passes cost, from its structure alone: FLOPs and bytes. Works on models without weights (meta device).

A matrix of n weights costs 2n FLOPs per token forward, 2n for the gradient of its weights where they move, and 2n for
the gradient of its input where something that moves lies before it. The loop does nothing else, so nothing else is
counted. tests/test_plan.py compares with measured passes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .methods.optimise.scope import Resolved
from .subjects.anatomy import anatomy
from .subjects.anatomy import structure as subject_structure
from .subjects.head import CHUNK_ELEMENTS, KEEP_ELEMENTS
from .subjects.language import LanguageModel
from .subjects.packed import Encoded, pack
from .subjects.protocol import Taps

STAGES = {"attention_qkv": 0, "attention_out": 1, "router": 2, "experts": 2, "mlp_in": 2, "mlp_gate": 2, "mlp_out": 3}
"""Where a matrix stands in its block; what moves at one stage needs the gradient at every later one."""

Place = tuple[int, int]
"""(block, stage); (-1, 0) is the embedding, (blocks, 0) the final norm, (blocks, 1) the head."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that tokens meet."""

    role: str
    at: Place
    size: int
    """Weights that one token meets: of experts only the chosen ones."""
    moves: float
    """The share of it that moves: of experts those in the scope."""
    adapter: int
    """Weights of the LoRA adapter beside it."""


@dataclass(frozen=True)
class Pass:
    """What is fed at once."""

    tokens: int
    pairs: int
    """Query-key pairs of the attention; masked ones count, as they do in torch's counter."""
    answers: tuple[int, ...]
    """Answer tokens of every side."""
    read: int
    """Tokens whose final state is read."""


@dataclass(frozen=True)
class Structure:
    """A decoder as far as costs go, and what of it moves."""

    matrices: tuple[Matrix, ...]
    blocks: int
    head: int
    """Weights of the LM head."""
    vocabulary: int
    attention: int
    """Heads times their width."""
    first: Place | None
    """Where the first thing that moves stands; None where nothing moves."""
    head_moves: bool
    total: int
    """Parameters, tied ones once."""
    moved: int
    """Parameters that move, with adapters."""
    item: int
    """Bytes of a stored weight."""
    entry: Place = (-1, 0)
    """Where passes start."""
    exit: int | None = None
    """Block that passes end after; None where they run through all blocks and the head."""
    spares: bool = False
    """The MLP of the last block takes only tokens that are read."""

    def reaching(self, taps: Taps) -> Structure:
        """As far as passes run that hand out `taps`."""
        last = self.blocks - 1 if taps.last is None else taps.last
        return replace(self, exit=taps.last, spares=self.spares and not taps.everywhere(last))

    @property
    def whole(self) -> Structure:
        """Passes through everything."""
        return replace(self, entry=(-1, 0), exit=None, spares=False)

    @property
    def bare(self) -> Structure:
        """The start model's passes: adapters are not there yet."""
        return replace(self, matrices=tuple(replace(m, adapter=0) for m in self.matrices))

    @property
    def run(self) -> range:
        """The blocks that passes run through from their beginning."""
        block, stage = max(self.entry, (0, 0))
        return range(block + (stage > 0), self.blocks if self.exit is None else self.exit + 1)

    @property
    def met(self) -> list[Matrix]:
        """The matrices that passes meet."""
        last = self.blocks if self.exit is None else self.exit
        return [m for m in self.matrices if self.entry <= m.at and m.at[0] <= last]

    def after(self, *at: int) -> bool:
        """Whether something that moves stands before `at`."""
        return self.first is not None and self.first < at

    # --- FLOPs -------------------------------------------------------------------------------------------------

    def forward(self, fed: Pass) -> float:
        """FLOPs of one pass without gradients, the head on answer tokens only."""
        products = sum(2 * (m.size + m.adapter) * self._tokens(m, fed) for m in self.met)
        attention = 4 * self.attention * fed.pairs * len(self.run)
        return products + attention + 2 * self.head * sum(self._answers(fed))

    def backward(self, fed: Pass) -> float:
        """FLOPs of the backward pass, with logits that are computed again."""
        products = sum(
            (2 * m.size * (m.moves + self.after(*m.at)) + 4 * m.adapter) * self._tokens(m, fed) for m in self.met
        )
        # Five products where forward has two: the CPU and CUDA kernels compute the scores again.
        attention = 10 * self.attention * fed.pairs * sum(self.after(block, 1) for block in self.run)
        per_answer = 2 * self.head * (self.head_moves + self.after(self.blocks, 1))
        answers = self._answers(fed)
        again = sum(2 * self.head * n for n in answers if n * self.vocabulary > KEEP_ELEMENTS)
        return products + attention + per_answer * sum(answers) + again

    def _tokens(self, matrix: Matrix, fed: Pass) -> int:
        """Tokens that a matrix meets in a pass."""
        last = bool(self.run) and matrix.at[0] == self.run[-1] and matrix.role in ("mlp_in", "mlp_gate", "mlp_out")
        return fed.read if self.spares and last else fed.tokens

    def _answers(self, fed: Pass) -> tuple[int, ...]:
        """Answer tokens of every side that logits are computed for."""
        return fed.answers if self.exit is None else ()

    # --- bytes -------------------------------------------------------------------------------------------------

    def logits(self, answers: Sequence[int]) -> int:
        """Bytes of logits at their peak: kept up to a limit, else in chunks."""
        if self.exit is not None:
            return 0
        kept = sum(4 * n * self.vocabulary for n in answers if n * self.vocabulary <= KEEP_ELEMENTS)
        chunked = any(n * self.vocabulary > KEEP_ELEMENTS for n in answers)
        return kept + (2 * 4 * CHUNK_ELEMENTS if chunked else 0)


@dataclass(frozen=True)
class Traced:
    """A model that is no decoder, as far as costs go: torch's counter over one row's pass, without weights."""

    row: float
    """FLOPs of one row forward."""
    back: float
    """And backward, to what moves."""
    kept: float
    """Bytes that one row keeps for the backward pass."""
    head: int
    vocabulary: int
    blocks: int
    total: int
    moved: int
    item: int

    def reaching(self, taps: Taps) -> Traced:
        """Passes run through everything."""
        return self

    @property
    def whole(self) -> Traced:
        return self

    @property
    def bare(self) -> Traced:
        return self

    def forward(self, fed: Pass) -> float:
        return self.row * fed.tokens

    def backward(self, fed: Pass) -> float:
        return self.back * fed.tokens

    def logits(self, answers: Sequence[int]) -> int:
        return sum(4 * n * self.vocabulary for n in answers)


def shape_of(subject: Any, resolved: Resolved) -> Structure | Traced:
    """What a subject's costs follow from: a decoder's matrices, or one pass of any other model over its example."""
    if not hasattr(subject, "example"):
        return replace(structure(subject.model, resolved), spares=subject.can_spare)
    from torch.utils.flop_counter import FlopCounterMode

    model = _moving(subject.model, resolved)
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = subject.with_model(model).logits(subject.example.to("meta", subject.dtype))
        row = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()
    return Traced(
        row=float(row),
        back=float(counter.get_total_flops() - row),
        kept=float(sum(size for storage, size in found.items() if storage not in own)),
        head=sum(model.get_parameter(name).numel() for _, name in subject_structure(model).roles["head"]),
        vocabulary=subject.vocabulary,
        blocks=len(subject.blocks),
        total=sum(p.numel() for p in subject.model.parameters()),
        moved=resolved.trainable,
        item=next(subject.model.parameters()).element_size(),
    )


def structure(model: nn.Module, resolved: Resolved) -> Structure:
    """What costs follow from: the decoder's matrices, and what of it the scope lets move.

    Args:
        model: a causal language model, with or without weights.
        resolved: the scope, resolved on this model.
    """
    found = anatomy(model)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    blocks = len(found.blocks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A tied tensor moves under whichever of its names the scope gave.
    moving = {id(parameters[name]): 1.0 for name, _ in resolved.parameters}
    moving |= {id(parameters[name]): len(places) / len(parameters[name]) for name, places, _ in resolved.slices}
    adapters = {}
    if resolved.lora is not None:
        adapters = {t: resolved.lora.r * sum(parameters[t + ".weight"].shape) for t in resolved.lora.targets}
    places: list[Place] = []
    matrices: dict[str, Matrix] = {}
    for role, members in found.roles.items():
        for layer, name in members:
            owner = name.rpartition(".")[0]
            parameter, at = parameters[name], _place(role, layer, blocks)
            if found.narrowing and owner == found.narrowing[0]:
                at = (blocks, 0)
            moves, adapter = moving.get(id(parameter), 0.0), adapters.get(owner, 0)
            if moves or adapter:
                places.append(at)
            lookup = isinstance(model.get_submodule(owner), nn.Embedding)
            if parameter.ndim > 1 and role not in ("embedding", "lm_head") and not lookup:
                size = round(parameter.numel() * _share(role, parameter, config))
                # A fused gate-and-in matrix has two roles and is one matrix.
                matrices.setdefault(name, Matrix(role, at, size, moves, adapter))
    last = [m for m in matrices.values() if m.at[0] == blocks - 1]
    head = parameters[f"{found.lm_head[0]}.weight"]
    unique = {id(p): p for p in parameters.values()}
    return Structure(
        matrices=tuple(matrices.values()),
        blocks=blocks,
        head=head.numel(),
        vocabulary=head.shape[0],
        attention=max(m.size for m in last if m.role == "attention_out") // int(config.hidden_size),
        first=min(places, default=None),
        head_moves=id(head) in moving,
        total=sum(p.numel() for p in unique.values()),
        moved=sum(round(moving.get(key, 0.0) * p.numel()) for key, p in unique.items()) + sum(adapters.values()),
        item=head.element_size(),
    )


def _place(role: str, layer: int | None, blocks: int) -> Place:
    if role in ("embedding", "other"):
        return (-1, 0)
    if layer is None:
        return (blocks, 1 if role == "lm_head" else 0)
    # A norm that moves needs gradients up to its block's beginning, as far as we look.
    return (layer, STAGES.get(role, -1))


def _share(role: str, parameter: nn.Parameter, config: Any) -> float:
    """The part of a tensor that one token meets."""
    if role != "experts":
        return 1.0
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = (
        parameter.shape[0] if parameter.ndim == 3 else next(filter(None, (getattr(config, n, 0) for n in names)), 1)
    )
    return float(getattr(config, "num_experts_per_tok", None) or 1) / experts


def kept(subject: LanguageModel, resolved: Resolved, rows: Sequence[Encoded]) -> float | None:
    """Bytes per packed token that the decoder keeps for the backward pass, from a pass of `rows` without weights.

    Returns:
        None where the model cannot run without weights.
    """
    model = _moving(subject.model, resolved)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    packed = pack(rows, "meta")
    made = subject.with_model(model)
    made._mode, made._can_spare = "families", subject.can_spare
    # Products over groups of experts are only defined in 16 bits without weights.
    for dtype, factor in ((subject.dtype, 1), (torch.bfloat16, 2)):
        model.to(dtype)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                made.hidden_states(packed)
        except Exception:
            found.clear()
        else:
            return factor * sum(t.untyped_storage().nbytes() for t in found.values()) / packed.tokens
    return None


def _moving(model: nn.Module, resolved: Resolved) -> nn.Module:
    """A copy without weights in which only what the scope names needs gradients, adapters included."""
    # Empty stand-ins for its tensors: a copy of a large model's weights would be thrown away at once.
    empty: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    for p in model.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    made = copy.deepcopy(model, empty).to("meta")
    if resolved.lora is not None:
        from peft import inject_adapter_in_model

        made = inject_adapter_in_model(resolved.lora.config(), made)
    # Where some experts move alone, all of their layer are counted: a bound from above.
    moving = {name for name, *_ in (*resolved.parameters, *resolved.slices)}
    for name, parameter in made.named_parameters(remove_duplicate=False):
        # A layer beside which an adapter stands has another name.
        parameter.requires_grad_(name.replace(".base_layer.", ".") in moving or ".lora_" in name)
    return made
