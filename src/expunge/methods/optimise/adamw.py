"""AdamW (arXiv:1711.05101) for weights in any precision: torch's fused kernel, clipping in the same pass.

16-bit weights are moved through fp32 masters, block by block: a block's gradient is widened, its master moved and its
weights written back, so that no gradient is ever held in fp32 as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .shards import is_part, local

BLOCK = 1 << 22
"""Weights of a block: 16 MiB of gradient in fp32. Smaller ones, which would stay in cache, took up to twice as
long."""


class AdamW:
    """The optimiser of one run. `masters` are what it moves: a parameter, or this process's part of it, or an fp32 copy
    of either where weights have 16 bits."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.masters = [_master(p) for p in parameters]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        """Per master: step (), exp_avg and exp_avg_sq in its shape."""
        self.weight_decay = weight_decay
        self._room = torch.empty(0)
        """(BLOCK,) fp32 for a block's gradient."""

    @torch.no_grad()
    def step(self, learning_rate: float, norm: Tensor, max_norm: float) -> None:
        """Move everything that has a gradient; gradients are scaled down first so that their `norm` () is `max_norm`
        at most (0: as they are). Gradients are spent afterwards."""
        limit = max_norm / (float(norm) + 1e-6) if max_norm else math.inf
        wide: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for parameter, master in zip(self.parameters, self.masters):
            if parameter.grad is None:
                continue
            state = self.state.get(master) or self._begin(master)
            if parameter.dtype == torch.float32:
                wide.append((master, local(parameter.grad), state))
            else:
                self._blocks(parameter, master, state, learning_rate, limit)
        if wide:
            masters, gradients, states = (list(part) for part in zip(*wide))
            self._move(masters, gradients, states, learning_rate, limit)

    def write_back(self) -> None:
        """Give 16-bit weights their masters' values."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters):
                if parameter.dtype != torch.float32:
                    local(parameter).copy_(master)

    def _begin(self, master: nn.Parameter) -> dict[str, Tensor]:
        return self.state.setdefault(
            master,
            {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            },
        )

    def _blocks(
        self, parameter: nn.Parameter, master: nn.Parameter, state: dict[str, Tensor], rate: float, limit: float
    ) -> None:
        weights = local(parameter)
        gradient = local(parameter.grad)  # type: ignore[arg-type]
        if self._room.device != master.device or not len(self._room):
            self._room = torch.empty(BLOCK, device=master.device)
        narrow = weights.detach().view(-1) if weights.is_contiguous() else None
        # Views, never copies: what is moved must be the master's and the state's own memory.
        moved = [t.view(-1).split(BLOCK) for t in (master.detach(), state["exp_avg"], state["exp_avg_sq"])]
        step = state["step"]
        for number, (given, own, mean, square) in enumerate(zip(gradient.reshape(-1).split(BLOCK), *moved)):
            step = state["step"].clone()
            wide = self._room[: len(given)].copy_(given)
            self._move([own], [wide], [{"step": step, "exp_avg": mean, "exp_avg_sq": square}], rate, limit)
            if narrow is not None:
                narrow[number * BLOCK : number * BLOCK + len(own)] = own
        state["step"].copy_(step)
        if narrow is None:
            weights.detach().copy_(master)

    def _move(
        self, masters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], rate: float, limit: float
    ) -> None:
        scale = torch.tensor(1 / limit, device=masters[0].device) if limit < 1 else None
        adamw(
            masters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype != torch.float32:
        return nn.Parameter(local(parameter).detach().float().contiguous().clone())
    return nn.Parameter(local(parameter)) if is_part(parameter) else parameter
