"""SalUn: an objective that moves only the weights that forget rows depend on most."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...errors import ParameterError, ScopeError
from ...registry import optimise
from .importance import cross_entropy, flowing
from .loop import Turn
from .scope import resolve
from .shards import cut
from .terms import Objective
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    if case.training.weight_decay:
        raise ParameterError(
            f"salun: training.weight_decay is {case.training.weight_decay:g}, expected 0: decay would move weights "
            "outside the mask"
        )
    resolved = resolve("all" if case.scope is None else case.scope, case.subject.model)
    if resolved.lora is not None or resolved.slices or resolved.columns:
        raise ScopeError(f"salun: scope {resolved.form!r} is not made of whole tensors; masks need e.g. all")
    if case.dry or not resolved.parameters:
        return
    parameters = [case.subject.model.get_parameter(name) for name, _ in resolved.parameters]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    rows, size = case.rows["forget"], case.training.batch_size
    with flowing(case.subject.model, parameters):
        for first in range(0, len(rows), size):
            loss = cross_entropy(case.subject, rows[first : first + size])
            for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True)):
                if gradient is not None:
                    sum_ += gradient.float()
    flat = torch.cat([sum_.abs().flatten() for sum_ in total])
    kept = int(case.settings["share"] * len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(kept).indices] = True
    masks = chosen.split([p.numel() for p in parameters])
    case.given["mask"] = [mask.view(p.shape) for mask, p in zip(masks, parameters)]
    case.summary |= {"mask": {"kept": kept, "of": len(flat)}}


@optimise(
    paper="arXiv:2310.12508",
    modality=("image", "language"),
    intention="suppression",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="the objective's, plus 6N once per token of forget rows",
    known_weaknesses=("relearn",),
    prepare=_prepare,
)
def salun(
    turn: Turn, *, objective: Objective = "random_label", share: Annotated[float, Field(gt=0, le=1)] = 0.5
) -> Tensor:
    """Mask the gradients of an objective to the `share` of weights that are most salient for forget rows (Fan et al.
    2024, eq. 3-4).

    Saliency is |sum over batches of d CE / d theta| under the start model; exactly floor(share N) weights of all
    together may move, the others stay bit for bit as they are. Batches may cancel in the sum: the mask depends on
    `training.batch_size`.
    """
    loss = turn.backward()
    for parameter, mask in zip(turn.parameters, turn.recipe.given["mask"]):
        if parameter.grad is not None:
            parameter.grad.mul_(cut(parameter, mask))
    return loss
