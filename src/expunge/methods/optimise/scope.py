"""Scopes: which weights may move. One small language, resolved against a model's anatomy.

    all                                        every floating parameter
    regex:model\\.layers\\.(5|6)\\.mlp\\..*       full match on parameter names
    role:mlp_out@5-7                           an anatomy role, in a range of layers
    layers:-2-                                 whole layers
    lora(r=8, alpha=16, modules=mlp, layers=5-7)   adapters; init=default, gaussian, pissa or fila
    expert(layer=16, index=3, router=true)     one routed expert (index=1|3|5: several) and the layer's router
    column(layer=20, index=10513)              value vectors of single neurons (index=1|3|5: several)
    none                                       nothing

Ranges are inclusive: 5, 5-7, -7, 5-, all; negative numbers count from the end, numbers with a point are shares of the
depth (0.5- is the upper half). Forms are joined with + and taken away with -.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...errors import ScopeError, SubjectError, nearest, suggest
from ...subjects.anatomy import Structure, structure
from ...subjects.quantised import is_quantised
from ...subjects.value_vectors import Address, ValueMatrix, find, value_matrices
from .columns import Column
from .slices import Slice, experts

FORMS = ("all", "none", "regex:", "role:", "layers:", "lora", "expert(", "column(")
_SPLIT = re.compile(r"\s*([+-])\s*(?=all\b|none\b|regex:|role:|layers:|lora\b|expert\(|column\()")
_NUMBER = r"-?\d+(?:\.\d+)?|-?\.\d+"
INITS = ("default", "gaussian", "pissa", "fila")
PRINCIPAL = ("pissa", "fila")
"""Inits that take the adapters' start out of the base weight."""
LORA_MODULES = {
    "all": ("attention_qkv", "attention_out", "mlp_in", "mlp_gate", "mlp_out"),
    "attention": ("attention_qkv", "attention_out"),
    "mlp": ("mlp_in", "mlp_gate", "mlp_out"),
}


@dataclass(frozen=True)
class LoraSpec:
    """Adapters: W + (alpha / r) B A with A (r, in) and B (out, r).

    default and gaussian: A random and B zero at the start. pissa and fila: see fila.py, which sets them.
    """

    r: int
    alpha: float
    dropout: float
    init: str
    targets: tuple[str, ...]
    """Full names of the modules that get one."""
    transposed: bool
    """The modules keep (in, out)."""

    def config(self) -> Any:
        """The adapters as peft's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            init_lora_weights=True if self.init != "gaussian" else self.init,
            target_modules=list(self.targets),
            fan_in_fan_out=self.transposed,
        )


@dataclass(frozen=True)
class Resolved:
    """What a scope means for one model."""

    form: str
    parameters: list[tuple[str, tuple[int, ...]]]
    """Names and shapes of the tensors that move; tied ones once."""
    lora: LoraSpec | None
    trainable: int
    """Parameters that move, adapters included."""
    share: float
    """... of all."""
    first_layer: int | None
    """Lowest block in which something moves; None where something below the blocks does, or nothing in them."""
    last_layer: int | None
    first_is_out: bool = False
    """Of the lowest block nothing moves but the matrix that its MLP gives out through."""
    slices: list[Slice] = field(default_factory=list)
    """Tensors of which only some experts move: (name, their places, shape of what moves)."""
    columns: list[Column] = field(default_factory=list)
    """MLP output matrices of which only some neurons' value vectors move."""
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """For reports and keys."""
        return {
            "form": self.form,
            "resolved": [
                *([name, list(shape), None] for name, shape in self.parameters),
                *([name, list(shape), list(places)] for name, places, shape in self.slices),
                *([matrix.name, [len(dims), matrix.width], list(dims)] for matrix, dims in self.columns),
            ],
            "lora": None if self.lora is None else {**vars(self.lora), "targets": list(self.lora.targets)},
            "trainable": self.trainable,
            "share": self.share,
            "layers": [self.first_layer, self.last_layer],
            "notes": self.notes,
        }


def resolve(scope: str | Mapping[str, Any], model: nn.Module) -> Resolved:
    """The tensors and adapters that a scope stands for.

    Raises:
        ScopeError: malformed, or it matches nothing that can move.
    """
    text = _text(scope)
    parts = structure(model)
    pieces = _SPLIT.split("+" + text.strip() if text.strip()[:1] not in "+-" else text.strip())
    if pieces[0].strip() or len(pieces) < 3:
        raise ScopeError(f"scope {text!r} is not understood; expected one of {', '.join(FORMS)}, joined with + and -")
    tensors = dict(model.named_parameters())
    chosen: dict[str, set[int] | None] = {}
    """Name to the experts that move; None: the whole tensor does."""
    lora: LoraSpec | None = None
    columns: dict[ValueMatrix, set[int]] = {}
    for sign, piece in zip(pieces[1::2], pieces[2::2]):
        if piece.startswith("lora"):
            if sign == "-" or lora is not None:
                raise ScopeError(f"scope {text!r}: adapters can be added once and not be taken away")
            lora = _lora(piece, text, model, parts)
            continue
        if piece.startswith("column("):
            if sign == "-":
                raise ScopeError(f"scope {text!r}: columns can be added, not taken away")
            for matrix, dims in _columns(piece.strip(), text, model).items():
                columns.setdefault(matrix, set()).update(dims)
            continue
        if piece.startswith("expert("):
            named = _experts(piece.strip(), text, model, parts)
        else:
            named = dict.fromkeys(_names(piece.strip(), text, model, parts))
        for name, places in named.items():
            before = _places(chosen.pop(name, set()), tensors[name])
            these = _places(places, tensors[name])
            after = before | these if sign == "+" else before - these
            if after:
                chosen[name] = None if after == _places(None, tensors[name]) else after
    stuck = [name for name in chosen if not tensors[name].is_floating_point()]
    if stuck or (chosen and getattr(model, "is_quantized", False)):
        raise ScopeError(
            f"scope {text!r}: {(stuck or list(chosen))[0]} is quantised; only adapters can move: lora(...)"
        )
    twice = [matrix.name for matrix in columns if matrix.name in chosen]
    if twice or (columns and lora is not None):
        what = f"{twice[0]} moves as a whole" if twice else "adapters move too"
        raise ScopeError(f"scope {text!r}: {what}; columns move alone or not at all")
    if not chosen and not columns and lora is None and not any(piece.strip() == "none" for piece in pieces[2::2]):
        raise ScopeError(f"scope {text!r} leaves nothing that may move")
    parameters = [(name, tuple(p.shape)) for name, p in tensors.items() if chosen.get(name, ()) is None]
    slices = [
        (name, tuple(sorted(places)), (len(places), *p.shape[1:]))
        for name, p in tensors.items()
        if (places := chosen.get(name))
    ]
    trainable = sum(math.prod(shape) for _, shape in parameters) + sum(math.prod(shape) for *_, shape in slices)
    trainable += sum(len(dims) * matrix.width for matrix, dims in columns.items())
    layers = [*(parts.layer(name) for name in chosen), *(matrix.layer for matrix in columns)]
    if lora is not None:
        for target in lora.targets:
            owner: Any = model.get_submodule(target)
            # A quantised weight may be packed, and have another shape than the layer.
            sides = (owner.in_features, owner.out_features) if hasattr(owner, "in_features") else owner.weight.shape
            trainable += lora.r * sum(sides)
            layers.append(parts.layer(target + ".weight"))
    inside = [layer for layer in layers if layer is not None]
    moving = [*chosen, *(matrix.name for matrix in columns), *(f"{t}.weight" for t in (lora.targets if lora else ()))]
    lowest = {name for name in moving if parts.layer(name) == min(inside, default=None)}
    below = {name for role in ("embedding", "other") for _, name in parts.roles[role]}
    total = sum(p.numel() for p in tensors.values())
    return Resolved(
        form=text,
        parameters=parameters,
        lora=lora,
        trainable=trainable,
        share=trainable / total,
        first_layer=None if not inside or any(name in below for name in chosen) else min(inside),
        last_layer=max(inside, default=None),
        first_is_out=lowest <= {name for _, name in parts.roles["mlp_out"]},
        slices=slices,
        columns=[(matrix, tuple(sorted(dims))) for matrix, dims in columns.items()],
        notes=_notes(model, chosen),
    )


def _text(scope: str | Mapping[str, Any]) -> str:
    if isinstance(scope, str):
        return scope
    form = next(iter(scope)) if isinstance(scope, Mapping) and len(scope) == 1 else None
    if form in ("lora", "expert", "column") and isinstance(scope[form], Mapping):
        values = (
            f"{key}={'|'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for key, value in scope[form].items()
        )
        return f"{form}({', '.join(values)})"
    raise ScopeError(
        f"scope {scope!r} is not understood; expected text, or a mapping {{lora: {{r: 8, ...}}}}, "
        "{expert: {layer: 16, index: 3}} or {column: {layer: 20, index: 10513}}"
    )


def _places(places: set[int] | None, tensor: nn.Parameter) -> set[int]:
    """None written out: all places on the first axis."""
    return set(range(tensor.shape[0] if tensor.dim() else 1)) if places is None else places


def _names(piece: str, text: str, model: nn.Module, parts: Structure) -> list[str]:
    every = [name for name, _ in model.named_parameters()]
    if piece == "none":
        return []
    if piece == "all":
        return [name for name, p in model.named_parameters() if p.is_floating_point()]
    form, colon, rest = piece.partition(":")
    if not colon or form not in ("regex", "role", "layers"):
        raise ScopeError(f"scope {text!r}: {piece!r} is not understood; expected one of {', '.join(FORMS)}")
    if form == "regex":
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ScopeError(f"scope {text!r}: {rest!r} is not a regular expression: {error}") from None
        found = [name for name in every if pattern.fullmatch(name)]
        if not found:
            near = nearest(re.sub(r"\\(.)", r"\1", rest), every, 5) or every[:5]
            raise ScopeError(f"scope {text!r}: no parameter matches {rest!r}. Nearest names: {', '.join(near)}")
        return found
    if form == "layers":
        wanted = set(_range(rest, len(parts.blocks), text))
        return [name for name in every if parts.layer(name) in wanted]
    role, at, span = rest.partition("@")
    if role not in parts.roles:
        raise ScopeError(f"scope {text!r}: there is no role {role!r}. {suggest(role, parts.roles)}")
    wanted = set(_range(span if at else "all", len(parts.blocks), text))
    named = {id(p): name for name, p in model.named_parameters()}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found = [named[id(tensors[name])] for layer, name in parts.roles[role] if layer is None or layer in wanted]
    if not found:
        present = [name for name, places in parts.roles.items() if places]
        raise ScopeError(f"scope {text!r}: the model has no {role} there; it has {', '.join(present)}")
    return found


def _range(span: str, depth: int, text: str) -> range:
    span = span.strip()
    if span == "all":
        return range(depth)
    single = re.fullmatch(_NUMBER, span)
    pair = re.fullmatch(rf"({_NUMBER})?-({_NUMBER})?", span)
    if not single and (not pair or span == "-"):
        raise ScopeError(f"scope {text!r}: {span!r} is not a range of layers; expected e.g. 5, 5-7, -2-, 0.5- or all")
    low, high = (span, span) if single else (pair.group(1), pair.group(2))  # type: ignore[union-attr]
    first = _layer(low, depth, end=False) if low else 0
    last = first if single else _layer(high, depth, end=True) if high else depth - 1
    if not 0 <= first <= last < depth:
        raise ScopeError(f"scope {text!r}: layers {span} are not within 0-{depth - 1}")
    return range(first, last + 1)


def _layer(number: str, depth: int, *, end: bool) -> int:
    if "." in number:
        if not 0 <= float(number) <= 1:
            return -1
        place = float(number) * depth
        return max(0, math.ceil(place) - 1) if end else min(depth - 1, math.floor(place))
    value = int(number)
    return value + depth if value < 0 else value


def _settings(form: str, written: str, known: Sequence[str], text: str) -> dict[str, str]:
    """ "r=8, alpha=16" by name."""
    given: dict[str, str] = {}
    for setting in filter(None, (s.strip() for s in written.split(","))):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or key not in known:
            raise ScopeError(f"scope {text!r}: {form} has no setting {setting!r}. {suggest(key, known)}")
        given[key] = value
    return given


def _experts(piece: str, text: str, model: nn.Module, parts: Structure) -> dict[str, set[int] | None]:
    """Names to the experts meant, or to None for tensors that are meant whole."""
    match = re.fullmatch(r"expert\((.*)\)", piece)
    given = _settings("expert", match.group(1) if match else "", ("layer", "index", "router"), text)
    if "layer" not in given or "index" not in given or given.get("router", "true").lower() not in ("true", "false"):
        raise ScopeError(
            f"scope {text!r}: {piece!r} is not understood; expected expert(layer=16, index=3, router=true)"
        )
    held = {block.index: experts(model, block) for block in parts.blocks}
    mixed = [layer for layer, found in held.items() if found is not None]
    if not mixed:
        raise ScopeError(f"scope {text!r}: expert(...) needs routed experts; {type(model).__name__} is dense")
    named: dict[str, set[int] | None] = {}
    for layer in _range(given["layer"], len(parts.blocks), text):
        found = held[layer]
        if found is None:
            raise ScopeError(f"scope {text!r}: layer {layer} has no experts; layers with experts: {_spans(mixed)}")
        for number in given["index"].split("|"):
            index = int(number) if number.strip().isdecimal() else -1
            if not 0 <= index < found.count:
                raise ScopeError(
                    f"scope {text!r}: there is no expert {number.strip()!r}; layer {layer} has 0-{found.count - 1}"
                )
            for name in found.fused:
                places = named.setdefault(name, set())
                assert places is not None
                places.add(index)
            named |= dict.fromkeys(found.own[index] if found.own else ())
        if given.get("router", "true").lower() == "true":
            named |= dict.fromkeys(found.router)
    return named


def _columns(piece: str, text: str, model: nn.Module) -> dict[ValueMatrix, set[int]]:
    """Matrices to the neurons meant."""
    match = re.fullmatch(r"column\((.*)\)", piece)
    given = _settings("column", match.group(1) if match else "", ("layer", "index", "expert"), text)
    numbers = {name: [part.strip() for part in value.split("|")] for name, value in given.items()}
    if not {"layer", "index"} <= given.keys() or not all(n.isdecimal() for ns in numbers.values() for n in ns):
        raise ScopeError(f"scope {text!r}: {piece!r} is not understood; expected column(layer=20, index=10513)")
    found: dict[ValueMatrix, set[int]] = {}
    matrices = value_matrices(model)
    for layer in numbers["layer"]:
        for expert in numbers.get("expert", [""]):
            for dim in numbers["index"]:
                address = Address(int(layer), int(dim), int(expert) if expert else None)
                try:
                    matrix = find(model, address, matrices)
                except SubjectError as error:
                    raise ScopeError(f"scope {text!r}: {error}") from None
                weight = model.get_parameter(matrix.name)
                if matrix.owner is None or is_quantised(weight):
                    state = "quantised" if matrix.owner else "one of a fused stack of experts"
                    raise ScopeError(f"scope {text!r}: {matrix.name} is {state}; its columns cannot move alone")
                found.setdefault(matrix, set()).add(address.dim)
    return found


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


def _lora(piece: str, text: str, model: nn.Module, parts: Structure) -> LoraSpec:
    match = re.fullmatch(r"lora(?:\((.*)\))?", piece.strip())
    if not match:
        raise ScopeError(f"scope {text!r}: {piece!r} is not understood; expected lora or lora(r=8, alpha=16, ...)")
    given = _settings("lora", match.group(1) or "", ("r", "alpha", "modules", "layers", "init", "dropout"), text)
    try:
        r = int(given.get("r", "8"))
        alpha = float(given.get("alpha", str(2 * r)))
        dropout = float(given.get("dropout", "0"))
    except ValueError as error:
        raise ScopeError(f"scope {text!r}: {error}") from None
    if r < 1 or dropout != 0:
        raise ScopeError(f"scope {text!r}: r must be at least 1, and dropout 0 (objectives compare stored references)")
    init = given.get("init", "default")
    if init not in INITS:
        raise ScopeError(f"scope {text!r}: there is no init {init!r}. {suggest(init, INITS)}")
    if init in PRINCIPAL and getattr(model, "is_quantized", False):
        raise ScopeError(
            f"scope {text!r}: init {init} takes a part out of the weights, and these are quantised; use init=default"
        )
    repacked = next((name for name, module in model.named_modules() if _drops_gradients(module)), None)
    if repacked is not None:
        raise ScopeError(
            f"scope {text!r}: {repacked} is in 4 bits on a CPU whose kernel for them has no gradient; load the model "
            "in 8 bits, or set support_avx512bf16_for_cpu = False on its layers before their first pass"
        )
    layers = set(_range(given.get("layers", "all"), len(parts.blocks), text))
    modules = given.get("modules", "all")
    roles = LORA_MODULES.get(modules, (modules,) if modules in parts.roles else ())
    places = [place for role in roles for place in parts.roles[role]]
    if not roles:
        wanted = set(modules.split("|"))
        weighty = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
        places = [(parts.layer(n + "."), n + ".weight") for n in weighty if n.rpartition(".")[2] in wanted]
        if not places:
            names = {n.rpartition(".")[2] for n in weighty if parts.layer(n + ".") is not None}
            raise ScopeError(
                f"scope {text!r}: no module is called {modules!r}. {suggest(modules, {*names, *LORA_MODULES})}"
            )
    linear = {name for name, module in model.named_modules() if hasattr(module, "in_features") or hasattr(module, "nf")}
    owners = dict.fromkeys(name.removesuffix(".weight") for layer, name in places if layer in layers)
    targets = [owner for owner in owners if owner in linear]
    if not targets:
        where = given.get("layers", "all")
        raise ScopeError(f"scope {text!r}: no linear layer of {modules} stands in layers {where}")
    first = model.get_submodule(next(iter(targets)))
    transposed = not hasattr(first, "out_features") and hasattr(first, "nf")
    return LoraSpec(r, alpha, dropout, init, tuple(targets), transposed)


def _drops_gradients(module: nn.Module) -> bool:
    """bitsandbytes repacks 4-bit weights at the first pass of a model in evaluation mode, on CPUs with AVX512-BF16; its
    product with them passes no gradient on, and says nothing."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return False
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    return bool(packed or getattr(module, "support_avx512bf16_for_cpu", False))


def _notes(model: nn.Module, chosen: Collection[str]) -> list[str]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied = [several for several in names.values() if len(several) > 1 and any(name in chosen for name in several)]
    return [f"{' and '.join(several)} are one tensor and move together" for several in tied]
