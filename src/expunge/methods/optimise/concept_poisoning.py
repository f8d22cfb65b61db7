"""Concept poisoning: the part of a picture that speaks for its class is covered by another class's, and its label too.

1. Which concept speaks for the class, and which other class shares it most (the donor): from a concept bottleneck
   (bottleneck.py) where rows tell their concepts, else from what the classifier confuses the class with.
2. Where it is in every forget picture, and in the donor's (`LOCATORS`).
3. The place is covered by a donor picture's patch, the row gets the donor's class, and the head is trained on these
   rows beside retain rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import ParameterError, RequestError, SubjectError, suggest
from ...pictures import known_as
from ...registry import optimise
from ...subjects.image import EncodedPicture
from ...subjects.packed import pack
from .bottleneck import Bottleneck, fit, learn
from .importance import flowing
from .scope import resolve
from .terms import RetainTerm, Step, negative_log_likelihood
from .unlearn import Preparation

BATCH = 256
"""Pictures in one pass."""
SHORT = 0.1
"""The bottleneck's accuracy may be so much lower than the classifier's."""
SHARES = {"center": 96 / 224, "random": 96 / 224, "full": 160 / 224}
LOCAL_SHARE = 64 / 224
"""Side of a patch as a share of the picture's shorter side (published)."""

Locate = Literal["integrated_gradients", "gradcam", "margin", "clip_patch", "center", "random", "full", "none"]


def _prepare(case: Preparation) -> None:
    case.scope = "role:head" if case.scope is None else case.scope
    if case.dry:
        return
    subject: Any = case.subject
    settings = case.settings
    forget, retain = case.rows["forget"], [subject.encode(row) for row in case.data.get("retain", [])]
    labels = sorted({row.answer for row in case.data["forget"]})
    others = {row.answer for row in case.data.get("retain", [])}
    if len(labels) != 1 or not others or labels[0] in others:
        raise RequestError(
            f"concept_poisoning needs a class request: forget rows all of one class, found {', '.join(labels)}, and "
            f"retain rows of others, found {', '.join(sorted(others)) or 'none'}"
        )
    bottleneck = explained(subject, case.data, settings["concepts"], case.seed) if settings["concepts"] else None
    target = forget[0].ids[-1]
    choice = choose(subject, bottleneck, forget, retain, settings)
    donor = choice.donor
    if settings["locate"] not in ("none", "center", "random", "full") and _moves_more_than_head(case):
        case.warnings.append(
            f"concept_poisoning: scope {case.scope!r} moves more than the head, and {settings['locate']} covers what "
            "the class is known by: the covered part is never seen with the new label, which hinders forgetting; use "
            "the scope role:head, or locate = none"
        )
    rng = np.random.default_rng([case.seed, 5])
    labelled = relabelled(target, donor, len(subject.classes), len(forget), settings["labels"], rng)
    pixels = torch.stack([row.pixels for row in forget])  # type: ignore[attr-defined]
    side = patch_side(settings, pixels)
    if settings["locate"] != "none":
        givers = [row for row in retain if row.ids[-1] == donor]
        drawn = [givers[i] for i in rng.integers(len(givers), size=len(forget))]
        sources = torch.stack([row.pixels for row in drawn])
        looking = Looking(subject, bottleneck, settings["top"], side, rng)
        find = LOCATORS[settings["locate"]]
        places = find(looking, pixels, target, choice.concept), find(looking, sources, donor, choice.donor_concept)
        pixels = pasted(pixels, places[0], sources, places[1], side)
    case.rows["forget"] = [
        EncodedPicture((_name(one), int(label)), 1, 0, subject.classes[label], one)
        for one, label in zip(pixels, labelled)
    ]
    case.summary["poison"] = {
        "target_class": subject.classes[target],
        "donor_class": subject.classes[donor],
        "target_concept": choice.concept,
        "donor_concept": choice.donor_concept,
        "locate": settings["locate"],
        "labels": settings["labels"],
        "patch": side,
        "count": len(pixels),
        "seed": case.seed,
        **({"top_concepts": choice.ranked, "bottleneck_accuracy": bottleneck.accuracy} if bottleneck else {}),
    }


@optimise(
    paper="arXiv:2405.15662",
    modality="image",
    intention="suppression",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="16 forward and backward passes over forget rows and as many donor rows once; then 6N per row of a step",
    known_weaknesses=("relearn", "linear_probe", "nearest_features"),
    prepare=_prepare,
)
def concept_poisoning(
    step: Step,
    *,
    locate: Locate = "integrated_gradients",
    labels: Literal["targeted", "random", "keep"] = "targeted",
    concepts: list[str] | None = None,
    concept: str | None = None,
    donor: str | None = None,
    rank: Literal["weight", "integrated_gradients"] = "weight",
    top: Annotated[int, Field(ge=1)] = 3,
    patch: Annotated[float, Field(gt=0)] | None = None,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Cover what a class is known by with another class's patch, relabel the pictures, and train the head on them
    beside retain rows (Chang et al. 2024, section 4).

    `concepts` names columns of the rows' metadata: each value is a concept, learnt from the pictures that have it and
    those that have another one (of any row set but holdout; a picture without the column says nothing). They choose
    the class's `concept` and the `donor`, and `margin` and `clip_patch` look for them; without concepts the donor is
    the class that the forget rows are most often confused with. `patch` is a share of the shorter side; None takes the
    published 64 of 224 pixels, 96 for center and random, 160 for full. It is the label that forgets: `none` does as
    well as any place, and `labels = keep` forgets nothing. The features keep the class, and the head learns it back
    from few rows.
    """
    return negative_log_likelihood(step.forget) + retain_weight * step.retain_term(retain)


# --- which concept, which donor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What is poisoned, and with what."""

    donor: int
    concept: str | None = None
    donor_concept: str | None = None
    ranked: tuple[str, ...] = ()
    """The class's concepts, the most important first."""


def choose(
    subject: Any,
    bottleneck: Bottleneck | None,
    forget: Sequence[Any],
    retain: Sequence[Any],
    settings: dict[str, Any],
) -> Choice:
    """
    Raises:
        ParameterError: no such concept or donor, the donor is the target, a parameter needs concepts.
    """
    target = forget[0].ids[-1]
    present = sorted({row.ids[-1] for row in retain})
    names = [subject.classes[i] for i in present]
    if settings["donor"] is not None and settings["donor"] not in names:
        why = "is the class to be forgotten" if settings["donor"] == subject.classes[target] else "has no retain rows"
        raise ParameterError(
            f"concept_poisoning: donor {settings['donor']!r} {why}. {suggest(settings['donor'], names)}"
        )
    donor = None if settings["donor"] is None else present[names.index(settings["donor"])]
    if bottleneck is None:
        needing = [settings["locate"]] if settings["locate"] in ("margin", "clip_patch") else []
        needing += [f"concept = {settings['concept']!r}"] if settings["concept"] is not None else []
        if needing:
            raise ParameterError(
                f"concept_poisoning: {needing[0]} needs concepts, and a name alone says nothing to a classifier "
                "without a text encoder; give concepts: [COLUMN], columns of metadata that say what pictures show"
            )
        if donor is None:
            said = _logits(subject, torch.stack([row.pixels for row in forget])).softmax(-1).mean(0)
            donor = max(present, key=lambda kind: float(said[kind]))
        return Choice(donor)
    known = bottleneck.bank.names
    if settings["concept"] is not None and settings["concept"] not in known:
        raise ParameterError(
            f"concept_poisoning: there is no concept {settings['concept']!r}. {suggest(settings['concept'], known)}"
        )

    def ranked(kind: int, rows: Sequence[Any]) -> list[int]:
        values = (
            bottleneck.weights[kind]
            if settings["rank"] == "weight"
            else bottleneck.attributions(_features(subject, rows), kind)
        )
        return np.argsort(-values, kind="stable").tolist()  # type: ignore[no-any-return]

    order = ranked(target, forget)
    if settings["concept"] is not None:
        first = known.index(settings["concept"])
        order = [first, *(j for j in order if j != first)]
    if donor is None:
        donor = max(present, key=lambda kind: float(bottleneck.weights[kind, order[0]]))
    theirs = ranked(donor, [row for row in retain if row.ids[-1] == donor])
    return Choice(donor, known[order[0]], known[theirs[0]], tuple(known[j] for j in order[: settings["top"]]))


def explained(subject: Any, data: Mapping[str, Sequence[Any]], columns: Sequence[str], seed: int) -> Bottleneck:
    """The concept bottleneck of a classifier's forget and retain rows, with the values of `columns` for concepts.

    Raises:
        RequestError: no row has one of the columns, or the concepts do not explain the classes.
        RowError: too few pictures of a concept.
    """
    every = [row for name, some in data.items() if name != "holdout" for row in some]
    marked: dict[str, list[bool | None]] = {}
    for column in columns:
        values = [known_as(row, column) for row in every]
        if not any(values):
            raise RequestError(f"concept_poisoning: concepts names the column {column!r}, which no row has")
        for name in sorted({value for value in values if value}):
            marked[name if name not in marked else f"{column}={name}"] = [
                None if value is None else value == name for value in values
            ]
    bank = learn(_features(subject, [subject.encode(row) for row in every]), marked, seed)
    rows = [subject.encode(row) for name in ("forget", "retain") for row in data[name]]
    features, classes = _features(subject, rows), np.array([row.ids[-1] for row in rows])
    with torch.no_grad():
        said = subject.head(torch.from_numpy(features).to(subject.device, subject.dtype)).argmax(-1).cpu().numpy()
    return fit(bank, features, classes, len(subject.classes), float((said == classes).mean()), SHORT)


@torch.no_grad()
def _features(subject: Any, rows: Sequence[Any]) -> np.ndarray:
    """(n, d)"""
    return subject.hidden_states(pack(rows, subject.device)).float().cpu().numpy()  # type: ignore[no-any-return]


# --- where it is ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looking:
    """What looking for a concept takes."""

    subject: Any
    bottleneck: Bottleneck | None
    top: int
    side: int
    """Pixels of a patch."""
    rng: np.random.Generator

    def windows(self, pixels: Tensor) -> Tensor:
        """(2,) how many places a patch has, down and across."""
        return torch.tensor(pixels.shape[-2:]) - self.side + 1

    def fullest(self, maps: Tensor) -> Tensor:
        """(n, 2) corners of the windows that hold most of maps (n, h, w)."""
        sums = nn.functional.avg_pool2d(maps[:, None], self.side, stride=1)[:, 0]
        return torch.stack(torch.unravel_index(sums.flatten(1).argmax(1), sums.shape[1:]), -1)


def integrated_gradients(subject: Any, pixels: Tensor, kind: int, steps: int = 16) -> Tensor:
    """(n, c, h, w) attributions of a class's logit to prepared pixels (n, c, h, w), from a black picture along a
    straight line in `steps` midpoints (Sundararajan et al. 2017): they sum to the difference of the logits, nearly."""
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(lambda x: _run(subject, x)).attribute(
        pixels.to(subject.device, subject.dtype),
        baselines=_black(subject, pixels),
        target=kind,
        n_steps=steps,
        method="riemann_middle",
        internal_batch_size=BATCH,
    )
    return found.detach().float().cpu()  # type: ignore[no-any-return]


def _black(subject: Any, pixels: Tensor) -> Tensor:
    """(1, c, h, w)"""
    height, width = pixels.shape[-2:]
    made = subject.processor(images=np.zeros((height, width, 3), np.uint8), return_tensors="pt")["pixel_values"]
    return made.to(subject.device, subject.dtype)  # type: ignore[no-any-return]


def _by_gradients(looking: Looking, pixels: Tensor, kind: int, _: str | None) -> Tensor:
    with flowing(looking.subject.model, []):
        found = integrated_gradients(looking.subject, pixels, kind)
    return looking.fullest(found.sum(1).clamp(min=0))


def _by_gradcam(looking: Looking, pixels: Tensor, kind: int, _: str | None) -> Tensor:
    from captum.attr import LayerGradCam

    subject = looking.subject
    layer = LayerGradCam(lambda x: _run(subject, x), _last_map(subject, pixels[:1]))
    parts = []
    with flowing(subject.model, list(subject.model.parameters())):
        for part in pixels.split(BATCH):
            found = layer.attribute(part.to(subject.device, subject.dtype), target=kind, relu_attributions=True)
            parts.append(nn.functional.interpolate(found.detach().float().cpu(), pixels.shape[-2:], mode="bilinear"))
    return looking.fullest(torch.cat(parts)[:, 0])


def _last_map(subject: Any, pixels: Tensor) -> nn.Module:
    """The module that gives out the last map of several places.

    Raises:
        SubjectError: the model is no stack of convolutions.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] * output.shape[-2] > 1:
            found.append(module)

    handles = [m.register_forward_hook(note) for m in subject.model.modules() if not any(m.children())]
    try:
        _logits(subject, pixels)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < 2:
        raise SubjectError(
            f"concept_poisoning: gradcam needs convolutions, {subject.name} has none; use another locate"
        )
    return found[-1]


def _by_patches(score: Callable[[Looking, np.ndarray, int, str | None], np.ndarray]) -> Any:
    """Look at one patch after the other, each enlarged to a whole picture."""

    @torch.no_grad()
    def find(looking: Looking, pixels: Tensor, kind: int, concept: str | None) -> Tensor:
        stride = max(1, looking.side // 4)
        down, across = (range(0, int(count), stride) for count in looking.windows(pixels))
        places = torch.tensor([(y, x) for y in down for x in across])
        best = []
        for one in pixels:
            patches = torch.stack([one[:, y : y + looking.side, x : x + looking.side] for y, x in places.tolist()])
            large = nn.functional.interpolate(patches, one.shape[-2:], mode="bilinear", antialias=True)
            rows = [EncodedPicture((_name(part), kind), 1, 0, "", part) for part in large]
            best.append(int(score(looking, _features(looking.subject, rows), kind, concept).argmax()))
        return places[best]

    return find


def _cosine(looking: Looking, features: np.ndarray, _: int, concept: str | None) -> np.ndarray:
    assert looking.bottleneck is not None
    vector = looking.bottleneck.bank.vectors[looking.bottleneck.bank.names.index(str(concept))]
    return features @ vector / np.maximum(np.linalg.norm(features, axis=1), 1e-12)  # type: ignore[no-any-return]


def _margin(looking: Looking, features: np.ndarray, kind: int, _: str | None) -> np.ndarray:
    assert looking.bottleneck is not None
    weights = looking.bottleneck.weights[kind]
    kept = np.argsort(-weights, kind="stable")[: looking.top]
    return looking.bottleneck.inputs(features)[:, kept] @ weights[kept]  # type: ignore[no-any-return]


def _centre(looking: Looking, pixels: Tensor, _: int, __: str | None) -> Tensor:
    return ((looking.windows(pixels) - 1) // 2).expand(len(pixels), 2)


def _anywhere(looking: Looking, pixels: Tensor, _: int, __: str | None) -> Tensor:
    return torch.from_numpy(looking.rng.integers(looking.windows(pixels).numpy(), size=(len(pixels), 2)))


LOCATORS: dict[str, Callable[[Looking, Tensor, int, str | None], Tensor]] = {
    "integrated_gradients": _by_gradients,
    "gradcam": _by_gradcam,
    "margin": _by_patches(_margin),
    "clip_patch": _by_patches(_cosine),
    "center": _centre,
    "random": _anywhere,
    "full": _centre,
}
"""(what looking takes, prepared pixels (n, c, h, w), class, concept) -> (n, 2) top left corners of patches, which
never reach over the border."""


# --- poison -----------------------------------------------------------------------------------------------------------


def patch_side(settings: dict[str, Any], pixels: Tensor) -> int:
    """Pixels of a patch's side, in pictures as the model takes them.

    Raises:
        ParameterError: it is larger than the picture.
    """
    share = settings["patch"] or SHARES.get(settings["locate"], LOCAL_SHARE)
    if share > 1:
        raise ParameterError(f"concept_poisoning: patch is {share:g} of the picture's side, expected at most 1")
    return max(1, round(share * min(pixels.shape[-2:])))


def pasted(pixels: Tensor, places: Tensor, sources: Tensor, theirs: Tensor, side: int) -> Tensor:
    """Pictures (n, c, h, w) with the patch at `places` (n, 2) taken from `sources` (n, c, h, w) at `theirs` (n, 2)."""
    made = pixels.clone()
    for one, source, (y, x), (v, u) in zip(made, sources, places.tolist(), theirs.tolist()):
        one[:, y : y + side, x : x + side] = source[:, v : v + side, u : u + side]
    return made


def relabelled(target: int, donor: int, classes: int, count: int, labels: str, rng: np.random.Generator) -> list[int]:
    """Classes of the poisoned rows; random ones may be the true one, as published."""
    if labels == "random":
        return rng.integers(classes, size=count).tolist()  # type: ignore[no-any-return]
    return [donor if labels == "targeted" else target] * count


def _moves_more_than_head(case: Preparation) -> bool:
    assert case.scope is not None
    asked, head = (resolve(scope, case.subject.model) for scope in (case.scope, "role:head"))
    return asked.lora is not None or not {name for name, _ in asked.parameters} <= {name for name, _ in head.parameters}


def _name(pixels: Tensor) -> int:
    """The number by which a pack knows a picture: of what it shows."""
    return int(hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:15], 16)


def _run(subject: Any, pixels: Tensor) -> Tensor:
    """(n, K) logits of prepared pixels, with gradients where they are enabled."""
    output = subject.model(pixels)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def _logits(subject: Any, pixels: Tensor) -> Tensor:
    return torch.cat([_run(subject, part.to(subject.device, subject.dtype)) for part in pixels.split(BATCH)]).float()
