"""Anatomy: which tensor of a decoder does what, found by structure, never by a model's name.

- Blocks are the largest list of alike modules that is not inside another one.
- Attention is the innermost module of a block that runs a softmax between tokens (seen by tracing one short pass).
- Experts are 3-D tensors, or a list of alike modules, in the rest of a block; the router is the matrix with one row for
  each of them.
- In the rest of a block, a matrix leads into the MLP or out of it by the width of what it takes and gives. Of two that
  lead in, the gate is the one whose output meets an activation first.

The trace works without weights (meta device); where a pass cannot be finished there (experts choose their tokens by
value) what was seen until then is enough. Of a model that is no decoder the first block is traced alone, on a few rows
of the residual stream's width: vision transformers have a decoder's roles, a convolution has blocks and a head.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import SubjectError

TOKENS = 13
"""Length of the traced pass."""
SCORES = (TOKENS, TOKENS + 1)
"""A softmax over so many entries is attention; sinks (gpt-oss) add one."""

Place = tuple[int | None, str]
"""(layer, parameter name)"""


@dataclass(frozen=True)
class Block:
    """One decoder layer; every entry is a parameter name of the whole model."""

    index: int
    name: str
    module: nn.Module
    qkv: tuple[str, ...]
    attention_out: tuple[str, ...]
    mlp_in: tuple[str, ...]
    """Into the MLP; a fused gate-and-in matrix stands here and in `mlp_gate`."""
    mlp_gate: tuple[str, ...]
    mlp_out: tuple[str, ...]
    router: tuple[str, ...]
    experts: tuple[str, ...]
    """Routed experts: fused tensors with the expert as first axis, or every expert's own matrices."""
    norm: tuple[str, ...]
    """What is left: norms and other vectors."""
    width: int
    """Of the residual stream."""


@dataclass(frozen=True)
class Structure:
    """What scopes know of any model: where its blocks are, and which parameters have a role."""

    blocks: tuple[Block, ...]
    """Where they are no transformer's they have names only."""
    roles: dict[str, list[Place]]
    """Role to parameters: embedding, lm_head, final_norm, attention_qkv, attention_out, mlp_in, mlp_gate, mlp_out,
    router, experts, norm, other (position embeddings, projections outside the blocks). A model that is no decoder has
    those of its blocks, head (its last linear layer) and other."""

    def layer(self, parameter: str) -> int | None:
        """The block a parameter stands in; None outside all of them."""
        return next((block.index for block in self.blocks if parameter.startswith(block.name + ".")), None)


@dataclass(frozen=True)
class Anatomy(Structure):
    """A decoder's parts."""

    embedding: tuple[str, nn.Module]
    final_norm: tuple[str, nn.Module] | None
    lm_head: tuple[str, nn.Module]
    narrowing: tuple[str, nn.Module] | None = None
    """A matrix between final norm and head (OPT's project_out)."""


def structure(model: nn.Module) -> Structure:
    """A decoder's anatomy; of any other model its blocks (the largest list of alike modules), what is in them where
    they are a transformer's, and its head.

    Raises:
        SubjectError: it looks like a decoder and cannot be taken apart.
    """
    if _part(model, "get_output_embeddings") is not None:
        return anatomy(model)
    if model not in _others:
        _others[model] = _structure(model)
    return _others[model]


def _structure(model: nn.Module) -> Structure:
    path, modules = _block_list(model) or ("", [])
    seen = _alone(model, modules[0]) if modules else _Seen()
    # Attention may be a module within one that holds the way out of it as well.
    inside = None if seen.attention is None else seen.attention.partition(".")[0]
    blocks = tuple(
        _block(i, f"{path}.{i}", m, inside, seen)
        if inside
        else Block(i, f"{path}.{i}", m, (), (), (), (), (), (), (), (), 0)
        for i, m in enumerate(modules)
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    roles: dict[str, list[Place]] = {role: [] for role in ROLES} | _inside(blocks)
    every = [name for name, _ in model.named_parameters()]
    roles["head"] = [(None, name) for name in every if linear and name.rpartition(".")[0] == linear[-1]]
    within = tuple(f"{block.name}." for block in blocks)
    roles["other"] = [
        (None, name) for name in every if not name.startswith(within) and (None, name) not in roles["head"]
    ]
    return Structure(blocks, roles)


def top(model: nn.Module, blocks: int) -> list[str]:
    """Names of the modules that are the last `blocks` blocks and of those above them: norm and head.

    A head that is the embedding too is none of them. Of a model that is no decoder what was made after its blocks is
    taken to stand above them.

    Raises:
        SubjectError: there are fewer blocks.
    """
    parts = structure(model)
    if not 0 < blocks <= len(parts.blocks):
        raise SubjectError(f"{type(model).__name__} has {len(parts.blocks)} blocks, there are no last {blocks}")
    tensors = dict(model.named_parameters())
    if isinstance(parts, Anatomy):
        above = [part[0] for part in (parts.final_norm, parts.narrowing, parts.lm_head) if part is not None]
    else:
        last = max(i for i, name in enumerate(tensors) if parts.layer(name) is not None)
        above = [name.rpartition(".")[0] for name in list(tensors)[last + 1 :]]
        above += [name.rpartition(".")[0] for _, name in parts.roles["head"]]
    # Tied tensors have the name of their first owner only.
    own = [
        name for name in above if all(f"{name}.{p}" in tensors for p, _ in model.get_submodule(name).named_parameters())
    ]
    return list(dict.fromkeys([*(block.name for block in parts.blocks[-blocks:]), *own]))


ROLES = (
    *("embedding", "lm_head", "final_norm", "attention_qkv", "attention_out"),
    *("mlp_in", "mlp_gate", "mlp_out", "router", "experts", "norm", "other"),
)

_known: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()
_others: weakref.WeakKeyDictionary[nn.Module, Structure] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a causal language model.

    Raises:
        SubjectError: it is no stack of decoder blocks with an embedding, attention and a head.
    """
    if model not in _known:
        _known[model] = _anatomy(model)
    return _known[model]


def _anatomy(model: nn.Module) -> Anatomy:
    kind = type(model).__name__
    embedding, head = _part(model, "get_input_embeddings"), _part(model, "get_output_embeddings")
    if embedding is None or head is None:
        raise SubjectError(f"{kind} has no token embedding or no LM head; expected a causal language model")
    stack = _block_list(model)
    if stack is None:
        raise SubjectError(f"{kind} has no list of alike blocks; expected a decoder stack")
    name, modules = stack
    seen = _trace(model, modules[0])
    if seen.attention is None:
        raise SubjectError(f"{kind}: no attention between tokens was found in {name}.0; it cannot be taken apart")
    inside = seen.attention
    blocks = tuple(_block(i, f"{name}.{i}", module, inside, seen) for i, module in enumerate(modules))
    norm = _final_norm(model, name, embedding, head)
    roles: dict[str, list[Place]] = {
        "embedding": _parameters(None, *embedding),
        "lm_head": _parameters(None, *head),
        "final_norm": _parameters(None, *norm) if norm else [],
    }
    roles |= _inside(blocks)
    named = {name for places in roles.values() for _, name in places}
    roles["other"] = [(None, name) for name, _ in model.named_parameters() if name not in named]
    taken = getattr(head[1], "in_features", None)
    narrowing = next(
        (
            (path, module)
            for path, module in model.named_modules()
            if getattr(module, "out_features", None) == taken
            and getattr(module, "in_features", taken) != taken
            and not path.startswith(name + ".")
        ),
        None,
    )
    return Anatomy(blocks, roles, embedding, norm, head, narrowing)


def _inside(blocks: Iterable[Block]) -> dict[str, list[Place]]:
    """The roles that stand in blocks."""
    attributes = {
        role: role for role in ("attention_out", "mlp_in", "mlp_gate", "mlp_out", "router", "experts", "norm")
    }
    return {
        role: [(block.index, name) for block in blocks for name in getattr(block, attribute)]
        for role, attribute in {"attention_qkv": "qkv", **attributes}.items()
    }


def _part(model: nn.Module, getter: str) -> tuple[str, nn.Module] | None:
    module = getattr(model, getter, lambda: None)()
    if module is None:
        return None
    return next((name, found) for name, found in model.named_modules() if found is module)


def _parameters(layer: int | None, name: str, module: nn.Module) -> list[Place]:
    return [(layer, f"{name}.{parameter}") for parameter, _ in module.named_parameters()]


def _block_list(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """The largest list of alike modules that is not part of another list."""
    best: tuple[int, str, list[nn.Module]] | None = None
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(name.startswith(o + ".") for o in outer):
            continue
        if len({type(child) for child in module}) == 1:
            outer.append(name)
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, list(module))
    return (best[1], best[2]) if best else None


def _final_norm(
    model: nn.Module, blocks: str, embedding: tuple[str, nn.Module], head: tuple[str, nn.Module]
) -> tuple[str, nn.Module] | None:
    """The last module with only vectors as parameters beside the block list."""
    parent = blocks.rpartition(".")[0]
    owner = model.get_submodule(parent)
    found = None
    before = {embedding[1], head[1]}
    after_blocks = False
    for name, child in owner.named_children():
        after_blocks = after_blocks or f"{parent}.{name}".lstrip(".") == blocks
        shapes = [p.dim() for p in child.parameters()]
        # A norm of embeddings (BLOOM) is made before the blocks, the final norm may be too (OPT): the last one counts.
        if child not in before and shapes and max(shapes) == 1 and len(list(child.children())) == 0:
            found = (f"{parent}.{name}".lstrip("."), child)
    return found


# --- the trace -------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    attention: str | None = None
    """Path of the attention module inside its block."""
    activated: set[str] = field(default_factory=set)
    """Paths, inside the block, of modules whose output first met a function of one tensor."""
    multiplied: set[str] = field(default_factory=set)
    """... a product with another tensor."""


class _Watch(TorchFunctionMode):
    """Notes which module runs a softmax between tokens, and what happens first to every matrix's output."""

    def __init__(self, seen: _Seen, stack: list[str]) -> None:
        super().__init__()
        self.seen = seen
        self.stack = stack
        self.waiting: dict[int, tuple[str, Tensor]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        tensors = [a for a in args if isinstance(a, Tensor)]
        between = name == "softmax" and tensors and tensors[0].dim() > 2 and tensors[0].shape[-1] in SCORES
        if self.stack and self.seen.attention is None and (between or function is F.scaled_dot_product_attention):
            self.seen.attention = self.stack[-1]
        for tensor in tensors:
            waiting = self.waiting.get(id(tensor))
            if waiting and name in _PRODUCTS and len(tensors) > 1:
                self.seen.multiplied.add(waiting[0])
                del self.waiting[id(tensor)]
            elif waiting and len(tensors) == 1 and tensor.is_floating_point() and name not in _LAYOUT:
                self.seen.activated.add(waiting[0])
                del self.waiting[id(tensor)]
        return function(*args, **(kwargs or {}))


_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_LAYOUT = {"view", "reshape", "transpose", "permute", "chunk", "split", "size", "contiguous", "to", "__get__", "dim"}


def _trace(model: nn.Module, block: nn.Module) -> _Seen:
    """Run a few tokens and look at the first block."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    # With a mask given nothing looks into positions for packed rows, which it could not without weights.
    run = lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)  # noqa: E731
    # Without weights, routing by value cannot run; attention comes before it.
    return _watched(model, block, run, unfinished=device.type == "meta")


def _alone(model: nn.Module, block: nn.Module) -> _Seen:
    """Run a block alone on a few rows; what it is not made for, it does not finish."""
    own = dict(block.named_parameters())
    if not any(p.dim() == 2 for p in own.values()):
        return _Seen()
    weight = next(iter(own.values()))
    rows = torch.zeros(1, TOKENS, _width(block, own, list(own)), device=weight.device, dtype=weight.dtype)
    # Masks that must be given may be None.
    wanted = list(inspect.signature(block.forward).parameters.values())[1:]
    masks = {p.name: None for p in wanted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return _watched(model, block, lambda: block(rows, **masks), unfinished=True)


def _watched(model: nn.Module, block: nn.Module, run: Callable[[], Any], *, unfinished: bool) -> _Seen:
    """What happens inside the block while `run` runs; `unfinished` ones count for what was seen until then."""
    seen, stack = _Seen(), []  # type: ignore[var-annotated]
    watch = _Watch(seen, stack)
    handles = []
    for path, module in block.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            stack.append(path)

        def leave(module: nn.Module, _: Any, output: Any, path: str = path) -> None:
            stack.pop()
            if isinstance(output, Tensor) and _matrix(module) is not None:
                watch.waiting[id(output)] = (path, output)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), plain_attention(model), watch:
            run()
    except Exception:
        if not unfinished:
            raise
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return seen


@contextmanager
def plain_attention(model: nn.Module) -> Any:
    """Attention as visible operations, whatever kernel the model would use."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _matrix(module: nn.Module) -> Tensor | None:
    """The matrix of a linear layer, quantised and adapted ones included."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


# --- one block -------------------------------------------------------------------------------------------------------


def _block(index: int, name: str, block: nn.Module, attention: str, seen: _Seen) -> Block:
    own = dict(block.named_parameters())
    inside = attention + "."
    mixing = [p for p in own if p.startswith(inside)]
    rest = [p for p in own if not p.startswith(inside)]
    matrices = [p for p in mixing if own[p].dim() == 2]
    owners = {p: p.rpartition(".")[0] for p in own}
    vectors = {owners[p] for p in own if own[p].dim() == 1} - {owners[p] for p in own if own[p].dim() > 1}
    width = _width(block, own, rest)
    # The way out of attention is its last matrix that gives back the width of the residual stream.
    out = next((owners[m] for m in reversed(matrices) if _gives(block, owners[m]) == width), "")

    experts = {p for p in rest if own[p].dim() == 3}
    count = next((own[p].shape[0] for p in rest if p in experts), None)
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            experts |= {p for p in rest if p.startswith(path + ".")}
            count = len(module)
    if count is not None:  # expert biases
        holders = {owners[p] for p in experts}
        experts |= {p for p in rest if owners[p] in holders and own[p].shape[0] == count}
    router = {p for p in rest if p not in experts and count and own[p].dim() == 2 and own[p].shape[0] == count}
    router |= {p for p in rest if owners[p] in {owners[r] for r in router}}

    groups: dict[str, list[str]] = {}
    for p in rest:
        if p not in experts and p not in router and owners[p] not in vectors:
            groups.setdefault(owners[p], []).append(p)
    met = seen.activated | seen.multiplied  # tells square matrices apart: what leads out is added, nothing else
    square = [o for o in groups if _takes(block, o) == width == _gives(block, o)]
    leading_in = [o for o in groups if (o in met if o in square else _takes(block, o) == width)]
    leading_out = [o for o in groups if o not in leading_in and _gives(block, o) == width]
    inner = {_takes(block, o) for o in leading_out}
    fused = [o for o in leading_in if _gives(block, o) not in inner and _gives(block, o) // 2 in inner]
    single = [o for o in leading_in if _gives(block, o) == 1]  # a gate on a shared expert, one number per token
    pairs = [o for o in leading_in if o not in fused and o not in single]
    gates = [o for o in pairs if o in seen.activated] if _paired(block, pairs) else []
    if _paired(block, pairs) and not gates:
        # Not seen running (experts without weights, later blocks of another kind): modules are made in this order.
        known = {o.rpartition(".")[2] for o in seen.activated}
        for parent in dict.fromkeys(o.rpartition(".")[0] for o in pairs):
            two = [o for o in pairs if o.rpartition(".")[0] == parent]
            gates.append(next((o for o in two if o.rpartition(".")[2] in known), two[0]))

    def full(parameters: Iterable[str]) -> tuple[str, ...]:
        wanted = set(parameters)
        return tuple(f"{name}.{p}" for p in own if p in wanted)

    def of(holders: Iterable[str]) -> tuple[str, ...]:
        return full(p for holder in holders for p in groups[holder])

    attention_vectors = [p for p in mixing if owners[p] in vectors]
    leaving = [p for p in mixing if owners[p] == out]
    return Block(
        index=index,
        name=name,
        module=block,
        qkv=full(p for p in mixing if p not in attention_vectors and p not in leaving),
        attention_out=full(leaving),
        mlp_in=of([o for o in pairs if o not in gates] + fused),
        mlp_gate=of(gates + fused),
        mlp_out=of(leading_out),
        router=full(router) + of(single),
        experts=full(experts),
        norm=full([p for p in rest if owners[p] in vectors] + attention_vectors),
        width=width,
    )


def _paired(block: nn.Module, owners: list[str]) -> bool:
    """Whether matrices that lead in come two by two (a gate beside each)."""
    parents = [owner.rpartition(".")[0] for owner in owners]
    return bool(parents) and all(parents.count(parent) == 2 for parent in parents)


def transposed(module: nn.Module) -> bool:
    """Conv1D keeps (in, out): it says how many it gives in `nf`, and has no `out_features`."""
    return not hasattr(module, "out_features") and hasattr(module, "nf")


def _takes(block: nn.Module, owner: str) -> int:
    module: Any = block.get_submodule(owner)
    weight = _matrix(module)
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(weight.shape[0 if transposed(module) else 1]) if weight is not None else -1


def _gives(block: nn.Module, owner: str) -> int:
    module: Any = block.get_submodule(owner)
    weight = _matrix(module)
    if hasattr(module, "out_features"):
        return int(module.out_features)
    return int(weight.shape[1 if transposed(module) else 0]) if weight is not None else -1


def _width(block: nn.Module, own: dict[str, nn.Parameter], rest: list[str]) -> int:
    """Width of the residual stream: what the norms directly in the block scale, or the smaller side of its matrices."""
    holders = {p.rpartition(".")[0] for p in own if own[p].dim() > 1}
    shallow = [p for p in rest if own[p].dim() == 1 and p.count(".") == 1 and p.rpartition(".")[0] not in holders]
    if shallow:
        return int(own[shallow[0]].shape[0])
    return min(min(own[p].shape) for p in rest if own[p].dim() == 2)
