"""Reading the answer from inside."""

import torch

from ..evidence import Item
from ..registry import attack
from ..tables.passes import Hidden
from .case import Attack, Case, Found


@attack(
    group="latent",
    access="hidden",
    paper="arXiv:2309.17410",
    caveat="Looks at the first token of the answer only; frequent values rank high in any model: subtract gold.",
)
def logit_lens(case: Case, *, rank: int = 1) -> Attack:
    """Read the residual stream at the end of the prompt through the model's own head, layer by layer.

    A fact is found if the first token of its answer is among the `rank` most likely ones in the last layer or in any of
    the upper half of the layers.
    """
    states = yield Hidden(tuple((row, None) for row in case.forget))
    upper = states[:, (states.shape[1] + 1) // 2 :]
    items = []
    per_layer = torch.zeros(upper.shape[1])
    for row, state in zip(case.forget, upper):
        encoded = case.subject.encode(row)
        logits = case.subject.lens(state)
        token = encoded.ids[encoded.start]
        better = (logits > logits[:, token : token + 1]).sum(-1)
        found = (better < rank).cpu()
        per_layer += found
        items.append(Item(row.entity or row.id, row.id, float(found.any())))
    first = states.shape[1] - upper.shape[1]
    curve = [(float(first + i), float(value) / len(items)) for i, value in enumerate(per_layer)]
    return Found(items, {"queries": len(items)}, curve, "layer", note="first answer token only")
