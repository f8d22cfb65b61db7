"""WISE: a side memory beside one MLP matrix, and a router that decides which of the two answers (arXiv:2405.14768).

W' starts as a copy of W. An edit trains those of its weights that the shard's mask leaves free, on

    NLL(target) + max(0, a_out - alpha) + max(0, beta - a_in) + max(0, a_out - a_in + gamma)

a: |W' k - W k| in units of the median |W k| of the edit's tokens; a_in its mean over tokens that predict the target,
a_out over all tokens of unrelated texts. A token takes W' where its |W' k - W k| is above `ratio` times the smallest
that editing has seen. After `shard` edits another mask is drawn, and shards are merged by TIES (arXiv:2306.01708).

The published thresholds are absolute numbers for one model; here they are shares, which do not depend on its scale. The
published router takes texts as a whole, by the mean over their tokens; here every token is routed (subjects/memory.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import ParameterError, RequestError, TrainingError
from ...registry import edit
from ...subjects import memory
from ...subjects.tails import edited_matrix, look
from ...tables.store import content_key
from .case import Edit, EditCase
from .traced import Layer, layer_of
from .tuning import ENOUGH, below, copied, target_loss
from .values import located

MOST = 2000
"""Rows of the corpus that unrelated texts are drawn from."""


@edit(
    paper="arXiv:2405.14768",
    intention="suppression",
    level="activations",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    keeps=("a second copy of one matrix's masked weights, with the new answers in it",),
    cost="70 forward and backward passes of prompt, target and a few unrelated texts; then one product more per token",
    known_weaknesses=("paraphrase", "relearn"),
)
def wise(
    case: EditCase,
    *,
    layer: Layer = 0.84,
    steps: int = 70,
    learning_rate: float = 1.0,
    mask: float = 0.2,
    alpha: float = 0.25,
    beta: float = 1.0,
    gamma: float = 0.5,
    ratio: float = 0.88,
    bound: float = 1.0,
    unrelated: int = 8,
    shard: int = 500,
    density: float = 0.53,
) -> Edit:
    """Write edits into a side copy of one MLP matrix that only edited texts take (Wang et al. 2024).

    `alpha`, `beta`, `gamma` in shares of the median |W k|, in the proportions of the published 5, 20 and 10. `mask`:
    share of the weights that a shard of `shard` edits may move, by at most `bound`, with SGD. `unrelated`: texts of the
    corpus that must stay with the main memory, drawn anew for every edit.
    """
    if not (0 < mask <= 1 and 0 < density <= 1 and shard > 0 and unrelated > 0 and steps >= 0 and learning_rate > 0):
        raise ParameterError(
            "wise: expected 0 < mask <= 1, 0 < density <= 1, shard > 0, unrelated > 0, steps >= 0, learning_rate > 0"
        )
    at = layer_of(case, layer)
    matrix = edited_matrix(case.base, at)
    present = memory.of(case.subject.model, matrix.name)
    before = present.entry if isinstance(present, memory.Side) else None
    number = (0 if before is None else len(before["least"])) // shard
    draw = torch.Generator().manual_seed(case.seed * 1_000_003 + number)
    free = (torch.rand(matrix.width, matrix.count, generator=draw) < mask).to(case.base.device)
    start = torch.zeros_like(free, dtype=torch.float32)
    if before is not None:  # the shard goes on where the edits before left it
        mine = before["shard"][before["edit"]] == number
        start.view(-1).index_add_(0, before["index"][mine], before["value"][mine])
    rows = [fact.lookups[0].tokens for fact in located(case, 0)]
    texts = [row.ids[:-1] for row in rows]
    own = [(i, place) for i, row in enumerate(rows) for place in range(row.start - 1, len(row.ids) - 1)]
    whose = torch.tensor([i for i, _ in own], device=case.base.device)
    # No token's key depends on W', so that all margins are products with the same keys.
    seen = look(case.base, texts, [place for _, place in own], [at], rows=[i for i, _ in own])
    inside, scale = seen.keys[at], float(seen.values[at].norm(dim=-1).median())
    outside = _unrelated(case, at, unrelated)

    working, weight, main = copied(case.base, matrix)
    run = below(case.base, rows, at)
    turned = (lambda t: t) if matrix.across else (lambda t: t.T)

    def far(k: Tensor) -> Tensor:
        """(n,) |W' k - W k|"""
        return (k @ turned(weight.float() - main).T).norm(dim=-1)

    with torch.no_grad():
        # Nothing has no direction that it could grow along.
        little = 1e-4 * torch.randn(start.shape, generator=draw).to(start.device)
        weight += turned(start if before is not None and bool(start.any()) else little * free)
    losses = list[float]()
    for _ in range(steps):
        with torch.enable_grad():
            a_in, a_out = far(inside).mean() / scale, far(outside).mean() / scale
            margin = (a_out - alpha).relu() + (beta - a_in).relu() + (a_out - a_in + gamma).relu()
            value = run(working, target_loss) + margin
        losses.append(float(value.detach()))
        if not torch.isfinite(value.detach()):
            raise TrainingError(f"wise: the loss is {losses[-1]} after {len(losses) - 1} steps; lower learning_rate")
        if losses[-1] < ENOUGH:
            break
        (gradient,) = torch.autograd.grad(value, [weight])
        with torch.no_grad():
            moved = weight - learning_rate * gradient * turned(free)
            weight.copy_(moved.clamp(main - bound, main + bound))
    with torch.no_grad():
        sizes = far(inside)
        more = (turned(weight.float() - main) - start).contiguous().view(-1).cpu()
    index = more.nonzero()[:, 0]
    entry = {
        "index": index,
        "value": more[index],
        "edit": torch.zeros(len(index), dtype=torch.long),  # those made together go together
        "shard": torch.full((len(rows),), number),
        "least": torch.stack([sizes[whose == i].min() for i in range(len(rows))]).cpu(),
        "ratio": torch.full((len(rows),), ratio),
        "density": torch.full((len(rows),), density),
    }
    log = {"steps": len(losses), "loss_before": losses[0], "loss_after": losses[-1]} if losses else {}
    case.summary["wise"] = {"layer": at, "matrix": matrix.name, "facts": len(rows), "shard": number, **log}
    return Delta(case.base.fingerprint, {matrix.name: entry}, {"method": "wise", "layer": at})


def _unrelated(case: EditCase, layer: int, count: int) -> Tensor:
    """(n, f) keys of all tokens of texts drawn from the corpus, anew for every edit."""
    rows = list(case.corpus) or case.data.get("general") or case.data.get("retain") or []
    if not rows:
        raise RequestError("wise needs texts that the side memory must leave alone: give a corpus")
    draw = torch.Generator().manual_seed(int(content_key(case.seed, [fact.id for fact in case.facts()])[:15], 16))
    chosen = torch.randperm(min(len(rows), MOST), generator=draw)[:count].tolist()
    texts = [case.base.encode(rows[i]).ids for i in chosen]
    places = [(i, place) for i, text in enumerate(texts) for place in range(len(text))]
    return look(case.base, texts, [p for _, p in places], [layer], rows=[i for i, _ in places]).keys[layer]
