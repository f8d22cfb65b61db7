"""Passes without gradients through blocks of the common kind (plain.py): few operators, in memory that is there.

A model's own code gives every product, norm, rotation and sum a tensor of its own. For a pack of thousands of tokens
these are megabytes that no cache holds and that the system must hand out anew. Here residuals are added to by the
products themselves, and MLPs go through tokens in chunks whose inner states stay in a core's cache. The last MLP takes
only the tokens that are read.

On CPUs and in fp32: in half precision models round in ways of their own. Whether a model computes this is tried once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import anatomy
from .fused import rotated, touched
from .packed import Encoded, Pack, Scoring, along_paths, pack
from .plain import Linear, Names, Norm, Parts, angles
from .side_by_side import alone

if TYPE_CHECKING:
    from .language import LanguageModel

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (groups of heads, tokens, width) of every block."""
CHUNK_ELEMENTS = 1 << 19
"""Inner states of MLPs worked out at once (2 MiB)."""
FEWEST = 256
"""Tokens that keep a product busy."""


@dataclass(frozen=True)
class Plan:
    """What is known of a model whose passes may run so."""

    kinds: tuple[type, ...]
    """Of its modules: what stands in a module's place is noticed."""
    blocks: tuple[Names, ...]
    norm: str
    """The final one."""
    window: int | None
    """Tokens that attention looks back at; None: all."""


class PlainPass:
    """A model's parts as they are now."""

    def __init__(self, subject: LanguageModel, plan: Plan) -> None:
        """
        Raises:
            ValueError: it is of another kind by now, or somebody looks into it.
        """
        model, embedding = subject.model, subject.embedding
        if embedding is None or _kinds(model) != plan.kinds or touched(model):
            raise ValueError("modules are others, or looked at")
        if subject.sharded or subject.device.type != "cpu" or subject.dtype != torch.float32:
            raise ValueError("weights in parts, elsewhere or of another type")
        self.table: Tensor = embedding.weight
        self.rotary: Any = subject.decoder.get_submodule("rotary_emb")
        self.blocks = [Parts(model, names, self.table) for names in plan.blocks]
        self.norm = Norm(model.get_submodule(plan.norm))
        self.window = plan.window

    def states(self, pack_: Pack) -> Tensor:
        """(m, d) final states at the tokens that are read."""
        return self._run(pack_, pack_.read, None)

    def every(self, pack_: Pack) -> tuple[Tensor, Layers]:
        """(tokens, d) final states, and every block's keys and values."""
        layers: Layers = []
        return self._run(pack_, None, layers), layers

    def _run(self, pack_: Pack, read: Tensor | None, layers: Layers | None) -> Tensor:
        x = F.embedding(pack_.ids[0], self.table)
        turned = [part[0][:, None] for part in angles(*self.rotary(x[None], pack_.positions))]
        width, wide = turned[0].shape[-1], max(len(block.gate.weight) for block in self.blocks)
        size = max(FEWEST, CHUNK_ELEMENTS // wide)
        a = torch.empty_like(x)
        room = x.new_empty(2, min(size, len(x)), wide)
        for block in self.blocks:
            self._attend(block, pack_, x, a, turned, width, layers)
            if block is self.blocks[-1] and read is not None:
                x, a = x.index_select(0, read), a[: len(read)]
            for part, m in zip(x.split(size), a.split(size)):
                gate, up = (one[: len(part), : len(block.gate.weight)] for one in room)
                block.second.into(part, m)
                gate = block.act(block.gate.into(m, gate))
                block.down.onto(gate.mul_(block.up.into(m, up)), part)
        return self.norm.into(x, a)

    def _attend(
        self,
        block: Parts,
        pack_: Pack,
        x: Tensor,
        a: Tensor,
        turned: list[Tensor],
        width: int,
        layers: Layers | None,
    ) -> None:
        """Add to x what attention makes of it; a is room for as much."""
        block.first.into(x, a)

        def heads(matrix: Linear) -> Tensor:
            return matrix.forward(a).unflatten(1, (-1, width))

        q, k = (rotated(heads(matrix), *turned) for matrix in (block.q, block.k))
        v = heads(block.v)
        if layers is not None:
            layers.append((k.transpose(0, 1), v.transpose(0, 1)))
        out = along_paths(pack_, q, k, v, Scoring(block.scale, self.window))
        block.o.onto(out.flatten(1), x)


def _kinds(model: nn.Module) -> tuple[type, ...]:
    return tuple(type(module) for module in model.modules())


def plain_pass(subject: LanguageModel) -> PlainPass | None:
    """A pass without gradients in few operators; None where the model runs its own code."""
    plan = None if torch.is_grad_enabled() else subject.plain
    try:
        return None if plan is None else PlainPass(subject, plan)
    except ValueError:
        return None


@torch.no_grad()
@alone()
def plan_of(subject: LanguageModel) -> Plan | None:
    """How passes may run so; None where they may not. Tried on a few rows."""
    if subject.mode != "families":
        return None
    generator = torch.Generator().manual_seed(4)
    first, *others = (torch.randint(0, subject.vocabulary, (n,), generator=generator).tolist() for n in (12, 4, 7, 7))
    texts = [(*first, *others[0]), (*first, *others[1]), (*first[:9], *others[2])]
    pack_ = pack([Encoded(text, 12, 0, "") for text in texts], subject.device)
    try:
        parts = anatomy(subject.model)
        if parts.final_norm is None or parts.narrowing is not None:
            raise ValueError("no final norm alone above the blocks")
        plan = Plan(_kinds(subject.model), tuple(Names.of(b) for b in parts.blocks), parts.final_norm[0], None)
        PlainPass(subject, plan)
        with subject.packing(pack_):
            own = subject.run_decoder(pack_)[pack_.read]
        (window,) = pack_.windows
        plan = replace(plan, window=window)
        found = PlainPass(subject, plan).states(pack_)
    except Exception:  # any failure means that this model is of another kind
        return None
    return plan if float((found - own).abs().max()) <= 1e-5 * float(own.abs().max()) else None
