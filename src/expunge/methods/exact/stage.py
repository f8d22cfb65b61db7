"""One stage of a chain: a group of adapters and the head are taught what the first slices of an order say.

A chain's state is a mapping of parameter names to tensors: what its stages taught, later ones over earlier ones. A
stage begins at the state before it, moves its own tensors and gives those back; all others are as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...deltas import Delta
from ...errors import ParameterError, RowError
from ...subjects.anatomy import structure
from ...subjects.image import ImageClassifier
from ...subjects.packed import Encoded
from ...subjects.protocol import Progress
from ..optimise.loop import Recipe, Training, draw, entries, train
from ..optimise.scope import LoraSpec, resolve
from ..optimise.terms import negative_log_likelihood
from ..optimise.unlearn import add_adapters
from .layout import groups

State = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How stages are trained; everything but which rows they see."""

    slices: int
    layer_wise: bool
    """A stage teaches its own group of blocks (S3T); off, all blocks (SISA)."""
    adapters: bool
    """Off, whole weights move."""
    rank: int
    alpha: float
    """Adapters add alpha / rank B A; with `rslora` alpha / sqrt(rank)."""
    rslora: bool
    modules: str
    """Which linear layers of a block get adapters: all, attention, mlp, or names joined with |."""
    epochs: float
    """Passes of a stage over the rows it sees."""
    batch_size: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    classes: tuple[str, ...]
    """Of a classifier's new head; empty: the base's."""
    seed: int


class Stages:
    """What a base can be taught stage by stage. Neither base nor states are changed."""

    def __init__(self, base: Any, settings: Settings) -> None:
        """
        Raises:
            ParameterError: more slices than blocks.
            ScopeError: no block has a linear layer of `modules`.
        """
        self.settings = settings
        self.subject: Any = _with_head(base, settings) if isinstance(base, ImageClassifier) else base
        blocks = structure(base.model).blocks
        self.groups = groups(len(blocks), settings.slices)
        self.specs = [self._adapters(group) for group in self.groups] if settings.adapters else []
        self.head: tuple[str, ...] = ()
        """Parameters of a classifier's head; an LM head stays as it is."""
        if isinstance(base, ImageClassifier):
            head = self.subject.linear_head
            self.head = tuple(f"{base._head_name}.{name}" for name, _ in head.named_parameters())
        self._copies: dict[int, Any] = {}

    def _adapters(self, group: Sequence[int]) -> LoraSpec:
        s = self.settings
        alpha = s.alpha * s.rank**0.5 if s.rslora else s.alpha
        scope = f"lora(r={s.rank}, alpha={alpha}, modules={s.modules}, layers={group[0]}-{group[-1]})"
        spec = resolve(scope, self.subject.model).lora
        assert spec is not None
        return spec

    def _working(self, stage: int) -> Any:
        """A copy with the adapters of all groups up to this stage's, sharing every other tensor with the base."""
        stage = stage if self.settings.layer_wise else 0
        if stage in self._copies:
            return self._copies[stage]
        memo: dict[int, Any] = {}
        if self.settings.adapters:
            memo = {id(p): p for name, p in self.subject.model.named_parameters() if name not in self.head}
        working = self.subject.with_model(copy.deepcopy(self.subject.model, memo))
        if self.specs:
            used = self.specs[: stage + 1] if self.settings.layer_wise else self.specs
            targets = tuple(target for spec in used for target in spec.targets)
            with torch.random.fork_rng(devices=[]):  # what peft draws is drawn anew below
                add_adapters(working.model, replace(self.specs[0], targets=targets))
        self._copies[stage] = working
        return working

    def _begin(self, working: Any, state: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Put a working copy, whatever it was used for before, at a state; adapters that it lacks are new."""
        start = dict(self.subject.model.named_parameters())
        working.model.requires_grad_(False)
        with torch.no_grad():
            for name, parameter in working.model.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
                elif ".lora_A." in name:
                    drawn = torch.empty(parameter.shape)  # on the CPU, so that every device begins alike
                    parameter.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
                elif ".lora_B." in name:
                    parameter.zero_()
                elif name in self.head or not self.settings.adapters:
                    parameter.copy_(start[name])

    def _moves(self, stage: int, name: str) -> bool:
        """Whether a stage teaches this parameter of its working copy."""
        if not self.settings.adapters or name in self.head:
            return True
        specs = [self.specs[stage]] if self.settings.layer_wise else self.specs
        return ".lora_" in name and any(name.startswith(f"{target}.") for spec in specs for target in spec.targets)

    def teach(
        self,
        stage: int,
        state: Mapping[str, Tensor],
        rows: Sequence[Encoded],
        *,
        seed: int,
        checkpoint: Path | None = None,
        key: str = "",
        progress: Progress | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """What a stage teaches on top of a state.

        Args:
            stage: from 0.
            rows: those of the first slices of an order, in a fixed sequence.
            seed: draws the adapters' start and the batches.
            checkpoint: where a killed stage finds its last step again, if `key` says that it is the same.

        Returns:
            The stage's own tensors, and tokens, steps and last losses.

        Raises:
            RowError: no rows.
            TrainingError: the loss is not finite.
            MismatchError: another version of expunge left the checkpoint, in another layout.
        """
        if not rows:
            raise RowError(f"stage {stage + 1}: 0 rows to learn from, expected at least 1")
        s = self.settings
        working = self._working(stage)
        generator = torch.Generator().manual_seed(seed)
        self._begin(working, state, generator)
        moving = {name: p for name, p in working.model.named_parameters() if self._moves(stage, name)}
        for parameter in moving.values():
            parameter.requires_grad_(True)
        training = Training(
            epochs=s.epochs,
            batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
            guard=None,
        )
        drawn = draw({"rows": list(rows)}, ["rows"], training=training, generator=generator)
        lowest = self.groups[stage][0] if s.adapters and s.layer_wise else None
        log = train(
            working,
            list(moving.values()),
            drawn,
            Recipe(lambda step: negative_log_likelihood(step.sides["rows"]), ("rows",)),
            training,
            entries=entries(self.subject, drawn, lowest),
            checkpoint=checkpoint,
            key=key,
            progress=progress,
        )
        taught = {name: parameter.detach().cpu().clone() for name, parameter in moving.items()}
        about = {"steps": len(log.loss), "tokens": drawn.tokens[0], "loss": log.loss[-1], "seconds": log.seconds}
        return taught, about

    def delta(self, state: Mapping[str, Tensor]) -> Delta:
        """A chain's state as a delta over `subject`: B A for adapters, differences for whole tensors."""
        before = dict(self.subject.model.named_parameters())
        found: dict[str, dict[str, Tensor]] = {}
        scale = torch.tensor(self.specs[0].alpha / self.specs[0].r) if self.specs else torch.ones(())
        for name, tensor in state.items():
            target, adapter, rest = name.partition(".lora_")
            if not adapter:
                difference = tensor.float() - before[name].detach().float().cpu()
                found[name] = {"difference": difference}
            elif rest.startswith("A"):
                a, b = tensor.float(), state[name.replace(".lora_A.", ".lora_B.")].float()
                if self.specs[0].transposed:  # the layer keeps (in, out): (B A)^T = A^T B^T
                    a, b = b.T, a.T
                found[f"{target}.weight"] = {"A": a.contiguous(), "B": b.contiguous(), "scale": scale.clone()}
        return Delta(self.subject.fingerprint, found)


def _with_head(base: ImageClassifier, settings: Settings) -> ImageClassifier:
    """The classifier with a new head for its classes, drawn by the seed: the old one may know other ones."""
    classes = list(settings.classes or base.classes)
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ParameterError(f"classes are {classes}; expected at least 2, with names of their own")
    old = base.linear_head
    name = base._head_name
    model = copy.deepcopy(base.model, {id(p): p for p in base.model.parameters()})
    head = nn.Linear(old.in_features, len(classes), device=old.weight.device, dtype=old.weight.dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    bound = old.in_features**-0.5
    with torch.no_grad():
        for parameter in head.parameters():
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
    model.set_submodule(name, head)
    config = getattr(model, "config", None)
    if config is not None:
        config.id2label = dict(enumerate(classes))
        config.label2id = {one: number for number, one in enumerate(classes)}
    return ImageClassifier(model, classes, base.processor, base.name, base.factory)
