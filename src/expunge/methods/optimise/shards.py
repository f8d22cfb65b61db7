"""Weights in training that lie in parts over the processes of a launch: `accelerate launch --use_fsdp`.

Within `sharded` every block that something moves in is wrapped by torch's `fully_shard` (FSDP2): its moving tensors,
their gradients, their fp32 masters and their optimiser state lie in parts, one in each process, and a block is whole
only while it runs. Frozen tensors are the base's own, which every process holds anyway for references and for the audit
(a working copy shares them), and so are not cut. Tensors outside the blocks (embedding, final norm, head) stay whole:
objectives read the head's weights outside of any pass.

Blocks are wrapped one by one, not the model: passes enter at a block, end at a block, and read between blocks
(subjects/language.py), and a wrapped block does not mind. What is wrapped is a twin of the block's modules around the
same tensors; afterwards the blocks themselves are back, with what was learnt in their own tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import processes
from ...errors import LaunchError
from ...subjects.language import LanguageModel

INSTEAD = "Launch with --multi_gpu instead, or choose another scope."


@contextmanager
def sharded(subject: LanguageModel, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within the block `parameters` of the subject lie in parts, if the launch asks for it; gives what stands in for
    them, in their order.

    After an error the subject's weights are gone.

    Raises:
        LaunchError: the parameters cannot be cut.
    """
    if not processes.sharding() or subject.sharded:
        yield list(parameters)
        return
    from torch.distributed.device_mesh import init_device_mesh

    model = subject.model
    subject.settle()  # a pass that only some processes tried would find the others elsewhere
    names, moving = [block.name for block in subject.blocks], {id(p) for p in parameters}
    _check(model, names, moving)
    shared = (*parameters, *model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo |= {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    mesh = init_device_mesh(subject.device.type, (processes.count(),))
    parts: dict[int, nn.Parameter] = {}
    before: dict[str, nn.Module] = {}
    try:
        for name in names:
            block = model.get_submodule(name)
            own = {key: p for key, p in block.named_parameters() if id(p) in moving}
            if not own:
                continue
            twin: nn.Module = copy.deepcopy(block, dict(memo))
            _wrap(twin, {p for p in block.parameters() if id(p) not in moving}, mesh)
            parts |= {id(own[key]): p for key, p in twin.named_parameters() if key in own}
            before[name] = block
            model.set_submodule(name, twin)
            for p in own.values():
                p.data = p.data.new_empty(0)
        subject.sharded = bool(parts)
        yield [parts.get(id(p), p) for p in parameters]
        with torch.no_grad():
            for p in parameters:
                if id(p) in parts:
                    p.data = whole(parts[id(p)])
    finally:
        for name, block in before.items():
            model.set_submodule(name, block)
        subject.sharded = False


def _wrap(block: nn.Module, frozen: set[nn.Parameter], mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    block.register_forward_hook(_own_memory)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    made = fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=frozen)
    # A step's gradient is the sum over its rows, wherever they ran. Gloo knows no other reduction.
    made.set_gradient_divide_factor(1.0)
    made.set_force_sum_reduction_for_comms(True)


def _own_memory(_: nn.Module, __: Any, output: Any) -> Any:
    """A block's output as no view of anything: one that is written into would lose torch's hooks, and gradients."""
    several = isinstance(output, tuple)
    states = output[0] if several else output
    if not states._is_view():
        return None
    return (states.clone(), *output[1:]) if several else states.clone()


def _check(model: nn.Module, blocks: Sequence[str], moving: set[int]) -> None:
    named = list(model.named_parameters(remove_duplicate=False))
    lists = [name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    seen: dict[int, str] = {}
    for name, p in named:
        block = next((block for block in blocks if name.startswith(block + ".")), None)
        if id(p) in seen and id(p) in moving:
            raise LaunchError(f"FSDP cannot cut {name}: it is one tensor with {seen[id(p)]}. {INSTEAD}")
        if block is None:
            continue
        seen[id(p)] = name
        if id(p) in moving and any(name.startswith(path) and path.startswith(block + ".") for path in lists):
            # Processes whose tokens reach other experts would have gradients of other tensors.
            raise LaunchError(
                f"FSDP cannot cut {name}: modules in a list, like experts, see no token in some passes. {INSTEAD}"
            )


# --- parts and wholes ------------------------------------------------------------------------------------------------


def is_part(tensor: Tensor) -> bool:
    """Whether the tensor lies in parts over the processes."""
    return processes.sharding() and hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a tensor that is whole itself."""
    part: Any = tensor.detach()
    return part.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, which all must ask for it."""
    part: Any = tensor.detach()
    return part.full_tensor() if is_part(tensor) else part


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """This process's part of something shaped like the parameter (its optimiser state) as a tensor over processes."""
    if not is_part(parameter):
        return part
    from torch.distributed.tensor import DTensor

    p: Any = parameter
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def cut(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same in every process, laid over the processes as the parameter is."""
    if not is_part(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    p: Any = parameter
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm () of all tensors together, fp32; 0 of none."""
    total = _norm([t for t in tensors if not is_part(t)])
    parts = [local(t) for t in tensors if is_part(t)]
    if not parts:
        return total
    square = _norm(parts).square()
    torch.distributed.all_reduce(square)
    return (total.to(square.device).square() + square).sqrt()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Block by block where they have 16 bits, so that no copy of a whole tensor is made."""
    narrow = [t for t in tensors if t.dtype != torch.float32]
    norms = [torch.linalg.vector_norm(block.float()) for t in narrow for block in t.flatten().split(1 << 20)]
    return torch.nn.utils.get_total_norm([*(t for t in tensors if t.dtype == torch.float32), *norms])
