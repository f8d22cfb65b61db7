"""Value vectors: what every neuron of an MLP adds to the residual stream.

An MLP gives out  sum_j k_j v_j  (Geva et al. 2022, arXiv:2203.14680): k_j is the activation of neuron j, v_j (d,) its
value vector, stored in the MLP's output matrix W (d, f) as column j. Layouts differ (Conv1D keeps W transposed, fused
experts keep a stack); here every matrix reads as (f, d), one value vector a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SubjectError
from .anatomy import Block, anatomy, transposed
from .quantised import dense_weight, is_quantised


@dataclass(frozen=True, order=True)
class Address:
    """Where a value vector is. As text "20:10513", in an expert "20:3:10513"."""

    layer: int
    dim: int
    """The neuron: the index along the input of the output matrix."""
    expert: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}:{self.dim}" if self.expert is None else f"{self.layer}:{self.expert}:{self.dim}"

    @staticmethod
    def parse(text: str) -> Address:
        """Raises SubjectError: it is no address."""
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(part.strip().isdecimal() for part in parts):
            raise SubjectError(
                f"{text!r} is no address of a value vector; expected layer:neuron or layer:expert:neuron"
            )
        numbers = [int(part) for part in parts]
        return Address(numbers[0], numbers[-1], numbers[1] if len(numbers) == 3 else None)


@dataclass(frozen=True)
class ValueMatrix:
    """The value vectors of one MLP, or of one expert of it; or its neurons' other vectors (input_vectors.py)."""

    layer: int
    expert: int | None
    name: str
    """The parameter that holds them."""
    count: int
    """f, the neurons."""
    width: int
    """d, of the residual stream."""
    across: bool
    """The parameter keeps a vector in every column, not in every row."""
    fused: bool = False
    """The parameter is a stack of which `expert` is one place."""
    part: tuple[int, int, int] | None = None
    """(first, step, of): of the parameter's `of` vectors first, first + step ... are meant (a fused gate-and-in
    matrix); None: all."""

    @property
    def owner(self) -> str | None:
        """The module whose inputs (of a matrix that leads in: outputs) are the activations; None where experts are
        fused."""
        return None if self.fused else self.name.rpartition(".")[0]

    def address(self, dim: int) -> Address:
        return Address(self.layer, dim, self.expert)

    def places(self, dim: int) -> Tensor:
        """(d,) where the vector's entries stand in the flattened parameter."""
        place, of = self.place(dim), self.part[2] if self.part else self.count
        start = (self.expert or 0) * of * self.width if self.fused else 0
        steps = torch.arange(self.width)
        return start + (steps * of + place if self.across else place * self.width + steps)

    def place(self, dim: int) -> int:
        """Which of the parameter's vectors a neuron's is."""
        return self.part[0] + self.part[1] * dim if self.part else dim


def value_matrices(model: nn.Module) -> list[ValueMatrix]:
    """Every MLP output matrix of a causal language model, layer by layer.

    Raises:
        SubjectError: a matrix whose orientation cannot be told.
    """
    own = dict(model.named_parameters())
    found: list[ValueMatrix] = []
    for block in anatomy(model).blocks:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in block.mlp_out)
        found += [_linear(model, block, None, owner) for owner in owners]
        stacks = [name for name in block.experts if own[name].dim() == 3]
        if stacks:
            found += _fused(block, {name: tuple(own[name].shape) for name in stacks})
        else:
            found += _listed(model, block)
    return found


def _linear(model: nn.Module, block: Block, expert: int | None, owner: str) -> ValueMatrix:
    module: nn.Module = model.get_submodule(owner)
    taken = getattr(module, "in_features", None)
    weight = module.get_parameter("weight")
    count = int(taken if taken is not None else weight.shape[0 if transposed(module) else 1])
    return ValueMatrix(block.index, expert, f"{owner}.weight", count, block.width, across=not transposed(module))


def _fused(block: Block, shapes: dict[str, tuple[int, ...]]) -> list[ValueMatrix]:
    """Of stacks that lead into experts and one that leads out: the latter holds the value vectors."""
    # A fused gate and input matrix is twice as large; of three equal ones the output lies the other way round.
    sizes = {name: shape[1] * shape[2] for name, shape in shapes.items()}
    small = [name for name in shapes if sizes[name] == min(sizes.values())]
    if len(small) > 1:
        small = [name for name in small if sum(shapes[other] == shapes[name] for other in small) == 1]
    if len(small) != 1:
        raise SubjectError(f"{block.name}: which of {', '.join(shapes)} leads out of the experts cannot be told")
    name = small[0]
    experts, rows, columns = shapes[name]
    if rows == columns:  # then the others show how inputs and outputs are laid
        inward = next(shape for other, shape in shapes.items() if other != name)
        across = inward[2] == block.width
    else:
        across = rows == block.width
    count = columns if across else rows
    return [ValueMatrix(block.index, e, name, count, block.width, across, fused=True) for e in range(experts)]


def _listed(model: nn.Module, block: Block) -> list[ValueMatrix]:
    """Experts that are modules of their own: the matrix of each that gives back the residual stream's width."""
    found = []
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in block.experts):
        module = model.get_submodule(owner)
        if getattr(module, "out_features", None) == block.width != getattr(module, "in_features", None):
            expert = int(next(part for part in owner.removeprefix(block.name).split(".") if part.isdecimal()))
            found.append(_linear(model, block, expert, owner))
    return found


def vectors(model: nn.Module, matrix: ValueMatrix) -> Tensor:
    """(f, d) vectors, one a row; a view of the parameter, or a dense copy of a quantised one."""
    weight = model.get_parameter(matrix.name).detach()
    if is_quantised(weight):
        dtype = next(p.dtype for p in model.parameters() if not is_quantised(p))
        weight = dense_weight(model.get_submodule(str(matrix.owner)), dtype)
    if matrix.fused:
        weight = weight[matrix.expert or 0]
    weight = weight.T if matrix.across else weight
    return weight if matrix.part is None else weight[matrix.part[0] :: matrix.part[1]][: matrix.count]


def find(model: nn.Module, address: Address, matrices: Sequence[ValueMatrix] | None = None) -> ValueMatrix:
    """The matrix in which a value vector stands.

    Raises:
        SubjectError: there is no such vector; says what sizes there are.
    """
    matrices = value_matrices(model) if matrices is None else matrices
    here = [m for m in matrices if m.layer == address.layer and m.expert == address.expert]
    if len(here) == 1 and address.dim < here[0].count:
        return here[0]
    depth = 1 + max(m.layer for m in matrices)
    layer = [m for m in matrices if m.layer == address.layer]
    experts = sorted({m.expert for m in layer if m.expert is not None})
    if not layer:
        found = f"the model has layers 0-{depth - 1}"
    elif len(here) == 1:
        found = f"its MLP there has neurons 0-{here[0].count - 1}"
    elif here:
        found = f"its MLP there has {len(here)} output matrices"
    else:
        found = f"layer {address.layer} has experts {experts[0]}-{experts[-1]}" if experts else "it is dense there"
    raise SubjectError(f"there is no value vector {address} in {type(model).__name__}: {found}")


def vector(model: nn.Module, address: Address, matrices: Sequence[ValueMatrix] | None = None) -> Tensor:
    """(d,) one value vector; errors as `find`."""
    return vectors(model, find(model, address, matrices))[address.dim]
