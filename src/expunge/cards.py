"""What a part says of itself. Cards are checked when a part is registered (specs: taxonomy 3.1)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import CardError

METHOD_KINDS = ("optimise", "edit", "guard", "exact")
NEEDS = (
    "weights",
    "gradients",
    "forget_data",
    "retain_data",
    "target_name_only",
    "reference_model",
    "judge_model",
    "training_checkpoints",
    "classifier",
    "routed_experts",
)
NOT_STUDIED = "not studied"


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """How a method forgets, what it was meant to achieve, and what is known to break it."""

    name: str
    kind: Literal["optimise", "edit", "guard", "exact"]
    paper: str
    summary: str
    intention: Literal["removal", "suppression"]
    survey_class: Literal["parameter_optimisation", "parameter_merging", "in_context", "retraining"]
    level: Literal["weights", "activations", "decoding", "prompt", "training_layout"]
    modality: tuple[str, ...]
    requires: tuple[str, ...] = ()
    """Who must bring what: a subset of `NEEDS`."""
    needs: tuple[str, ...] = ()
    """Named quantities that do not change during training, e.g. `forget.reference`; of editors `edits` and
    `demonstrations`, other facts that they learn from."""
    keeps: tuple[str, ...] = ()
    """What must be kept after "forgetting"; shown in the report."""
    sequential: Literal["exact", "accumulates_error", "rebuild_from_original", "free"] = "accumulates_error"
    cost: str = ""
    known_weaknesses: tuple[str, ...] = ()
    guarantee: Literal["none", "statistical", "exact_by_construction"] = "none"

    def __post_init__(self) -> None:
        def wrong(why: str) -> CardError:
            return CardError(f"card of method {self.name}: {why}")

        if self.kind not in METHOD_KINDS:
            raise wrong(f"kind is {self.kind!r}, expected one of {', '.join(METHOD_KINDS)}")
        if self.kind == "guard" and self.intention != "suppression":
            raise wrong("a guard leaves the weights as they are, so its intention can only be suppression")
        if self.kind == "exact" and (self.intention, self.guarantee) != ("removal", "exact_by_construction"):
            raise wrong("an exact method has intention removal and guarantee exact_by_construction")
        if self.survey_class == "in_context" and self.kind != "guard":
            raise wrong("survey_class in_context implies kind guard")
        if self.intention == "removal" and self.level in ("prompt", "decoding"):
            raise wrong(f"nothing is removed at the level of {self.level}; the intention is suppression")
        if not self.known_weaknesses:
            raise wrong(f'known_weaknesses is empty; name attacks of the catalogue, or say "{NOT_STUDIED}"')
        unknown = set(self.requires) - set(NEEDS)
        if unknown:
            raise wrong(f"requires {', '.join(sorted(unknown))}, which is not one of {', '.join(NEEDS)}")
        if not self.summary:
            raise wrong("the function has no docstring")


@dataclass(frozen=True, kw_only=True)
class MergeCard:
    """A way to make one delta of several."""

    name: str
    paper: str
    summary: str
    cost: str
    requires: tuple[str, ...] = ()
    """Beside the deltas: the `base` model, `rows` without answers."""
    modality: tuple[str, ...] = ("image", "language")
    kind: str = "merge"


@dataclass(frozen=True, kw_only=True)
class AttackCard:
    """An attempt to bring the knowledge back."""

    name: str
    paper: str
    summary: str
    group: Literal["direct", "black_box", "latent", "tamper", "reintroduce"]
    access: Literal["text", "logits", "hidden", "weights"]
    modality: tuple[str, ...] = ("language",)
    kind: str = "attack"
    caveat: str = ""
    """What a reader must know before trusting the number."""


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """What a number means."""

    name: str
    paper: str
    summary: str
    sentence: str
    """The sentence a reader who is not a researcher needs."""
    direction: Literal["lower", "higher", "closest_to_gold"]
    """Where a good unlearned model lies on the forget set: `closest_to_gold` has no better end."""
    ideal: str
    """What perfect forgetting would score, e.g. "the gold model's value"."""
    range: tuple[float | None, float | None]
    needs: tuple[str, ...]
    """Tables the metric reads: scores, generations."""
    standard: bool = True
    """Whether audits measure it unasked."""
    version: int = 1
    modality: tuple[str, ...] = ("language",)
    kind: str = "metric"


@dataclass(frozen=True, kw_only=True)
class BenchmarkCard:
    """Published data, its published protocol and its aggregate scores."""

    name: str
    paper: str
    summary: str
    data: str
    """Where the published data is: a hub id, or a place in words."""
    modality: tuple[str, ...] = ("language",)
    version: int = 1
    kind: str = "benchmark"


@dataclass(frozen=True, kw_only=True)
class ReproductionCard:
    """A paper's claim, tested at small scale."""

    name: str
    paper: str
    summary: str
    cost: str
    """Time on 2 cores for three seeds."""
    systems: tuple[str, ...] = ()
    """Names of docs/systems.csv that it is about; by default its own."""
    modality: tuple[str, ...] = ("language",)
    version: int = 1
    """Raised when the same settings would give another result: finished trials of another version are not used."""
    kind: str = "reproduction"


@dataclass(frozen=True, kw_only=True)
class SubjectCard:
    """A kind of model that can be changed and audited."""

    name: str
    summary: str
    modality: tuple[str, ...]
    paper: str = ""
    kind: str = "subject"


Card = MethodCard | MergeCard | AttackCard | MetricCard | BenchmarkCard | SubjectCard | ReproductionCard


def first_sentence(summary: str) -> str:
    """What a list shows of a summary; "et al." and "eq." end none."""
    return re.split(r"(?<!\bal)(?<!\beq)\. ", summary)[0].rstrip(".:")


def card_dict(card: Card) -> dict[str, Any]:
    """The card as plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(card).items()}
