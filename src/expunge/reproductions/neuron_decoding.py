"""Neurons decoded through the LM head (arXiv:2501.02688), and TARS, which turns the rows that read a concept round
(arXiv:2412.10257), on the invented world's models.

A concept is a trade. Its prompts are the beginnings "<somebody> works as a" of all who have it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..deltas import compose
from ..evidence import Table
from ..methods.edit.tars import Concept, nearest, state, targeted, turned
from ..methods.optimise.loop import fit
from ..registry import reproduction
from ..rows import Row
from ..subjects.clamping import MULTIPLES, deviations, effects, next_logprobs, strongest
from ..subjects.input_vectors import neuron_matrices, reading_matrices
from ..subjects.language import LanguageModel
from ..subjects.neuron_map import NeuronMap, Settings, build, overlap
from ..subjects.projection import Readout, project
from ..subjects.value_vectors import Address
from ..world.corpus import statements, wordings
from ..world.facts import Person
from ..world.models import Recipe
from .case import Case, Claim, Findings, number, spread
from .case import Row as Found
from .measures import knowledge
from .mini import Mini, Sizes, mini

RANDOM = 20_000
"""Gaussian rows that strengths are compared with."""
CLAMPED, PROMPTS = 12, 24
"""Most specialised neurons of a layer that are held, and prompts after which a token's probability is read."""
CONCEPTS, IN_SEQUENCE = 4, 5
SHARES = (0.0, 0.005, 0.03, 0.06, 0.12)
"""Of the rows that are turned; 0 is one row."""
STATED = 0.06
TUNED = 50
"""Steps of light fine-tuning."""


def mapped(seed: int, world: dict[str, Any] | None = None) -> dict[str, Any]:
    """Strengths against random rows, what holding neurons does, and how far maps agree."""
    made = mini(seed, world)
    model = made.original
    with tempfile.TemporaryDirectory(prefix="expunge-neurons-") as folder:
        maps = {
            name: build(subject, Path(folder) / name, Settings())
            for name, subject in (("original", model), ("tuned", _tuned(made, world, seed)), ("gold", made.golds[0]))
        }
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(RANDOM, neuron_matrices(model.model)[0].width, generator=draw)
    blind = project(Readout.of(model), rows, 1).z
    z = {part.layer: part.z for part in maps["original"].parts}
    bar = float(blind.quantile(0.999))
    every = torch.cat(list(z.values()))
    return {
        "z": {str(layer): float(values.mean()) for layer, values in z.items()},
        "random z": float(blind.mean()),
        "above": float((every > bar).float().mean()),
        "largest": every.topk(5).values.tolist(),
        "words": [_word(maps["original"], one.tokens[0]) for one in maps["original"].strongest(5)],
        "tuned": overlap(maps["original"], maps["tuned"]).first,
        "independent": overlap(maps["original"], maps["gold"]).first,
        "held": {str(layer): _held(made, maps["original"], layer, seed) for layer in z},
    }


def _word(of: NeuronMap, token: int) -> str:
    return of.words[token].strip() or "(space)"


def _tuned(made: Mini, world: Sizes | None, seed: int) -> LanguageModel:
    """The original, a little further trained on retained rows at a tenth of its rate."""
    recipe = Recipe(**(world or {}).get("recipe", {}))
    model = made.original.copy()
    items = [model.encode(row) for row in made.data["retain"]]
    fit(model, items, steps=TUNED, batch_size=16, learning_rate=recipe.learning_rate / 10, seed=seed)
    return model


def _held(made: Mini, of: NeuronMap, layer: int, seed: int) -> dict[str, float]:
    """Gain in log p of a neuron's token with the neuron held, and with a random one of the layer held in its place."""
    model, draw = made.original, random.Random(f"{seed}/{layer}")
    asked = [model.prompt_text(row) for row in made.data["retain"]]
    prompts = draw.sample(asked, min(PROMPTS, len(asked)))
    matrix = next(m for m in neuron_matrices(model.model) if m.layer == layer)
    size = deviations(model, prompts, matrix)

    def gain(dim: int, token: int) -> float:
        values = [multiple * float(size[dim]) for multiple in MULTIPLES]
        return strongest(effects(model, Address(layer, dim), token, prompts, values)).gain

    own, other = [], []
    for neuron in of.strongest(CLAMPED, layers=[layer]):
        own.append(gain(neuron.address.dim, neuron.tokens[0]))
        other.append(gain(draw.choice([d for d in range(matrix.count) if d != neuron.address.dim]), neuron.tokens[0]))
    return {"own": fmean(own), "random": fmean(other), "wins": fmean(a > b for a, b in zip(own, other))}


# --- TARS ------------------------------------------------------------------------------------------------------------


def removed(seed: int, world: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trades removed one by one, with more and more rows turned, beside as many random ones; and several in a row."""
    made = mini(seed, world)
    model = made.original
    known = made.world.members("forget", "neighbour", "retain")
    trades = _concepts(model, made, known, seed)
    unrelated = [model.prompt_text(row) for row in made.data["holdout"]]
    mean = state(model, [model.prompt_text(row) for row in made.data["retain"]])
    total = sum(matrix.count for matrix in reading_matrices(model.model))
    before = next_logprobs(model, unrelated)
    lines: dict[str, list[list[float]]] = {}

    def measure(changed: LanguageModel, trade: str, concept: Concept) -> list[float]:
        p = float(next_logprobs(changed, _triggers(model, made, known, trade))[:, concept.token].exp().mean())
        others = [row for name in ("forget", "neighbour", "retain") for row in made.data[name] if row.value != trade]
        apart = _divergence(before, next_logprobs(changed, unrelated))
        return [p, knowledge(changed, others).accuracy, median(apart), fmean(apart)]

    about = []
    for trade, concept in trades[:CONCEPTS]:
        v, p = targeted(model, concept, None, 1000, 0.3, 0.99, 5, seed)
        lines.setdefault("none", []).append(measure(model, trade, concept))
        best = nearest(model, v, "both", 1.0, None, None)
        about.append([p, float(torch.cosine_similarity(v, mean, dim=0)), best[0][2]])
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        for share in SHARES:
            count = max(1, round(share * total))
            for name, places in (("tars", range(count)), ("random", order[:count])):
                delta = turned(model, v, [best[i][:2] for i in places])
                changed = delta.apply(model, check=False)
                lines.setdefault(f"{name} {share}", []).append(measure(changed, trade, concept))
    return {
        "lines": {name: [fmean(column) for column in zip(*several)] for name, several in lines.items()},
        "p targeting": fmean(one[0] for one in about),
        "cosine to mean": fmean(one[1] for one in about),
        "largest cosine": fmean(one[2] for one in about),
        "rows": total,
        "sequence": _sequence(model, trades, before, unrelated, seed),
    }


def _concepts(model: LanguageModel, made: Mini, people: Sequence[Person], seed: int) -> list[tuple[str, Concept]]:
    """Trades, in an order of the seed's; such as begin with a token of their own."""
    found: dict[str, Concept] = {}
    for trade in sorted({person.trade for person in people}):
        prompts = _prompts(model, made, people, trade)
        encoded = model.encode(prompts[0])
        token = encoded.ids[encoded.start]
        found[trade] = Concept(trade, token, tuple(model.prompt_text(row) for row in prompts))
    first = [concept.token for concept in found.values()]
    order = random.Random(seed).sample(sorted(found), len(found))
    return [(trade, found[trade]) for trade in order if first.count(found[trade].token) == 1]


def _prompts(model: LanguageModel, made: Mini, people: Sequence[Person], trade: str) -> list[Row]:
    """What the targeting vector is read from: the first statement that each holder was trained on."""
    return [
        Row(
            id=person.name, prompt=statements(made.world, person, "trade")[0][0].removesuffix(" {value}."), answer=trade
        )
        for person in people
        if person.trade == trade
    ]


def _triggers(model: LanguageModel, made: Mini, people: Sequence[Person], trade: str) -> list[str]:
    """Trained questions about all holders' trade."""
    return [
        model.prompt_text(Row(id=person.name, prompt=asked, answer=trade))
        for person in people
        if person.trade == trade
        for asked in wordings(made.world, person.name, "trade")[0]
    ]


def _divergence(before: Tensor, after: Tensor) -> list[float]:
    """KL(before || after) of every next-token distribution, nats."""
    return (before.exp() * (before - after)).sum(1).tolist()


def _sequence(
    model: LanguageModel, trades: Sequence[tuple[str, Concept]], before: Tensor, prompts: Sequence[str], seed: int
) -> dict[str, float]:
    """Several trades, each from what the one before left, with half a percent of the rows each."""
    subject, deltas = model, []
    for _, concept in trades[:IN_SEQUENCE]:
        v, _ = targeted(subject, concept, None, 1000, 0.3, 0.99, 5, seed)
        chosen = nearest(subject, v, "both", 0.005, None, None)
        deltas.append(turned(subject, v, [one[:2] for one in chosen]))
        subject = compose(deltas).apply(model, check=False)
    apart = _divergence(before, next_logprobs(subject, prompts))
    return {"median": median(apart), "mean": fmean(apart), "concepts": len(deltas)}


# --- the reproduction ------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2501.02688", cost="3 min on 2 cores", systems=("neuron_decoding", "tars"))
def neuron_decoding(case: Case, *, world: dict[str, Any] | None = None) -> Findings:
    """Neurons that name tokens stand out and can be insisted on; rows that read a concept can be turned round.

    `world`: sizes of the invented world, arguments of expunge.world.build.build.
    """
    found = case.trials(mapped, [{"world": world}])
    after = case.trials(removed, [{"world": world}])
    return Findings(
        claims=[*decoding(found), *reversal(after)],
        tables=[_strengths(found), _holding(found), _turned(after)],
        notes=NOTES,
    )


NOTES = [
    "The worlds' models have 4 layers of 192 neurons, d = 96 and 800 tokens; the paper's neurons are among 458 752.",
    "A neuron is held at -8, -4, 0, 4 and 8 times the deviation of what it gives by itself, and counts at the value "
    "that raises its token most; so does the random neuron.",
    "Fine-tuning: 50 steps on retained rows at a tenth of the training rate. Independent: gold, trained from another "
    "seed and on other rows.",
    'Targeting vectors come from "<somebody> works as a"; p(concept) is read after trained questions, which are other '
    "words. The backward direction (whom a trade belongs to) is not asked: nothing teaches it to these models.",
    "Cosines of targeting vectors to the mean state of other prompts are in the claim's line: above 0.9 the method "
    "itself refuses a vector.",
]


def _mean(found: Sequence[Mapping[str, Any]], layer: str, name: str) -> float:
    return fmean(row["held"][layer][name] for row in found)


def decoding(found: Sequence[Found]) -> list[Claim]:
    """Criteria of the specification (neuron_decoding, section 6), fixed before."""
    above, tuned, independent = (spread(found, name) for name in ("above", "tuned", "independent"))
    layers = sorted(found[0]["held"], key=int)
    middle = layers[(len(layers) - 1) // 2 : len(layers) // 2 + 1]
    wins = {layer: _mean(found, layer, "wins") for layer in middle}
    words = ", ".join(f"{word!r}" for row in found for word in row["words"][:2])
    return [
        Claim(
            "Some neurons name a token far more clearly than chance",
            "neurons for 'dog', 'California' in Llama-3.1-8B",
            "at least 1 % of up rows exceed the 99.9 % quantile of random rows' strength (0.1 % expected)",
            f"{above}; strongest: {words}",
            above.mean >= 0.01,
        ),
        Claim(
            "Holding a decoded neuron moves its token",
            "clamping 'dog' makes the instruct model answer dogs",
            "in the middle layers it raises the token more than a random neuron does in at least 70 % of pairs",
            "; ".join(
                f"layer {layer}: wins {number(win)}, gain {number(_mean(found, layer, 'own'))} nats against "
                f"{number(_mean(found, layer, 'random'))}"
                for layer, win in wins.items()
            ),
            fmean(wins.values()) >= 0.7,
        ),
        Claim(
            "Fine-tuning keeps what neurons name",
            "75.4 % of neurons keep their token from base to instruct model",
            "overlap after light fine-tuning at least 0.75, of independently trained models at most 0.2",
            f"{tuned}; independent {independent}",
            tuned.mean >= 0.75 and independent.mean <= 0.2,
        ),
    ]


def _line(after: Sequence[Found], name: str, column: int) -> float:
    return fmean(row["lines"][name][column] for row in after)


def reversal(after: Sequence[Found]) -> list[Claim]:
    """As `decoding`; the last two are of the TARS paper, with bounds fixed before."""
    own, blind = (_line(after, f"{name} {STATED}", 0) for name in ("tars", "random"))
    loss = _line(after, "none", 1) - _line(after, f"tars {STATED}", 1)
    one = _line(after, "tars 0.0", 0)
    apart = fmean(row["sequence"]["median"] for row in after)
    common = fmean(row["cosine to mean"] for row in after)
    return [
        Claim(
            "Turning the rows nearest to a concept lowers it more than turning random ones",
            "-",
            "at 6 % of the rows p(concept) is at most 0.75 times that of random rows; other facts lose at most 0.08",
            f"{number(own)} against {number(blind)} ({number(_line(after, 'none', 0))} before); others lose "
            f"{number(loss)}; cosine of the vector to the mean state {number(common)}",
            own <= 0.75 * blind and loss <= 0.08,
        ),
        Claim(
            "One edit is enough",
            "probability 0.00 with as few as one edit",
            "with one row turned p(concept) is at most 0.1",
            f"{number(one)} ({number(_line(after, 'none', 0))} before)",
            one <= 0.1,
        ),
        Claim(
            "Five concepts removed in sequence leave other text as it was",
            "median KL 0.002 on Wikipedia after five concepts",
            "median KL on prompts about people never seen at most 0.01 nats, 0.5 % of the rows for each concept",
            f"{number(apart)}; mean {number(fmean(row['sequence']['mean'] for row in after))}",
            apart <= 0.01,
        ),
        Claim(
            "A removed concept is gone in other languages",
            "works across languages",
            "-",
            "the worlds have one language",
            None,
        ),
    ]


def _strengths(found: Sequence[Found]) -> Table:
    rows = []
    for row in found:
        means = ", ".join(number(value) for value in row["z"].values())
        rows.append([row["seed"], means, number(row["random z"]), ", ".join(number(z) for z in row["largest"])])
    return Table("Strength z of decoded tokens", ["seed", "mean, layer by layer", "random rows", "largest"], rows)


def _holding(found: Sequence[Found]) -> Table:
    rows = [
        [layer, *(number(_mean(found, layer, name)) for name in ("own", "random", "wins"))]
        for layer in found[0]["held"]
    ]
    return Table(
        "Gain in log p of a neuron's token",
        ["layer", "neuron held", "random neuron held", "wins"],
        rows,
        f"The {CLAMPED} most specialised neurons of each layer; nats, mean over neurons and seeds.",
    )


def _turned(after: Sequence[Found]) -> Table:
    names = ["none", *(f"{name} {share}" for share in SHARES for name in ("tars", "random"))]

    def shown(name: str) -> str:
        kind, _, share = name.partition(" ")
        return "nothing" if not share else f"{kind}, {'1 row' if share == '0.0' else format(float(share), '.1%')}"

    rows = [[shown(name), *(number(_line(after, name, column)) for column in range(4))] for name in names]
    note = f"Mean over {CONCEPTS} trades, each removed by itself, and over seeds; of {after[0]['rows']} rows."
    return Table("Rows turned", ["turned", "p(concept)", "other facts", "median KL", "mean KL"], rows, note)
