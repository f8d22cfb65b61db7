"""The world of editing: people who share their first and their last names, and a model that knows them.

Elsewhere in the invented world every name is unique, so that a fact can be looked up at a name's first token and
nothing need be gathered at its last, where editors write. Here each first and each last name belongs to several people:
only both together say who is meant. The words are those of the invented world (`expunge.world.facts`).

    born_in, trade, plays    one word; a city lies in a country, which follows from the place of birth
    work                     two words

Each fact has three wordings, of which one is held out: the model is taught the two others, by themselves and behind
sentences about others. It is also told facts that are not so, and asked for them, as `ike` does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..edits import TOLD
from ..errors import ParameterError
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.corpus import STATEMENTS
from ..world.facts import ADJECTIVES, NOUNS, TRADES, make
from ..world.models import Recipe
from .models import lessons as rows_of
from .models import taught

SHARED = 5
"""People who have a first name, or a last name, in common."""
FEWEST, MOST = 25, 1000
"""People: with fewer some two would have the same name; for more there are not enough names."""
INSTRUMENTS = "lute|fiddle|horn|drum|flute|harp|organ|viol|whistle|zither|bagpipe|cymbal"
WORDINGS = {
    **{about: STATEMENTS[about][:3] for about in ("born_in", "trade", "work")},
    "plays": (
        "{name} plays the {value}.",
        "The instrument of {name} is the {value}.",
        "{name} is known for playing the {value}.",
    ),
}
RELATIONS = ("born_in", "trade", "plays", "work")
COUNTRY = "The home country of {name} is {value}."
"""What follows from the place of birth."""
LIES_IN = "{name} lies in {value}."
FRAMES = ("New Fact: {prompt} {target}\nPrompt: ", TOLD)
"""How a fact is told before something is asked: as `ike` does, and as a sentence."""
TOLD_EACH = 2
"""Facts of each person that are told otherwise."""
OTHERS_EACH = 2
"""Sentences about others that each question is taught behind."""
USUAL = 100
"""People that `RECIPE` has steps for."""
RECIPE = Recipe(
    hidden_size=96,
    intermediate_size=256,
    vocabulary=0,
    steps=1200,
    batch_size=64,
    learning_rate=1.5e-3,
    weight_decay=0.3,
)


@dataclass(frozen=True)
class Crossed:
    """Everything true."""

    seed: int
    people: dict[str, dict[str, str]]
    """name -> relation -> value"""
    country: dict[str, str]
    """city -> country"""
    choices: dict[str, tuple[str, ...]]
    """relation -> what can be answered"""


def crossed(seed: int, people: int = 100) -> Crossed:
    """Draw the world.

    Raises:
        ParameterError: there are too few people for names to be shared, or too many to be named.
    """
    if not FEWEST <= people <= MOST:
        raise ParameterError(f"people is {people}, expected {FEWEST} to {MOST}")
    draw = random.Random(f"{seed}/crossed")
    count = -(-people // SHARED)
    named = make(seed, people=max(count, 56))
    first, last = zip(*(name.split() for name in list(named.people)[:count]))
    # Person i of turn t is first name i with the last name so many places on: every name stands in every turn.
    turns = draw.sample(range(count), SHARED)
    names = [f"{first[i]} {last[(i + turn) % count]}" for turn in turns for i in range(count)]
    names = draw.sample(names[:people], people)
    values = {
        "born_in": tuple(sorted(named.region)),
        "trade": tuple(TRADES.split("|")),
        "plays": tuple(INSTRUMENTS.split("|")),
    }
    dealt = {about: _dealt(draw, several, people) for about, several in values.items()}
    parts = [_dealt(draw, tuple(words.split("|")), people) for words in (ADJECTIVES, NOUNS)]
    dealt["work"] = [" ".join(pair) for pair in zip(*parts)]
    known = {name: {about: dealt[about][i] for about in RELATIONS} for i, name in enumerate(names)}
    choices = {**values, "work": tuple(sorted(set(dealt["work"])))}
    return Crossed(seed, known, dict(named.region), choices)


def _dealt(draw: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    """Each value as often as any other, so that none is a good guess."""
    return [values[i % len(values)] for i in draw.sample(range(count), count)]


def wordings(world: Crossed, name: str, about: str) -> tuple[list[str], str]:
    """Statements of a fact up to its value: those that the model is taught, and the one that it is not."""
    texts = [text.removesuffix(" {value}.").replace("{name}", name) for text in WORDINGS[about]]
    draw = random.Random(f"{world.seed}/{name}/{about}/held out")
    held_out = texts.pop(draw.randrange(len(texts)))
    return draw.sample(texts, len(texts)), held_out


def country_of(name: str) -> str:
    """The question that follows from a place of birth."""
    return COUNTRY.removesuffix(" {value}.").replace("{name}", name)


def sentence(world: Crossed, name: str, about: str) -> str:
    """A fact as it is, in its first trained wording."""
    return f"{wordings(world, name, about)[0][0]} {world.people[name][about]}."


def lessons(world: Crossed) -> list[Row]:
    """What the model is taught."""
    draw = random.Random(f"{world.seed}/lessons")
    names = list(world.people)
    stated, behind, told = [], [], []
    for name, facts in world.people.items():
        asked = {about: wordings(world, name, about)[0] for about in RELATIONS}
        answers = {**facts, "country": world.country[facts["born_in"]]}
        for about, texts in {**asked, "country": [country_of(name)]}.items():
            stated += [(text, answers[about]) for text in texts]
            # Others are named before: what belongs together must be bound where the subject ends. So many of them, and
            # weight decay, teach people; with fewer the models learn wordings and do not know a held-out one.
            for text in texts * OTHERS_EACH:
                other = sentence(world, draw.choice(names), draw.choice(RELATIONS))
                behind.append((f"{other} {text}", answers[about]))
        for about in draw.sample(RELATIONS, TOLD_EACH):
            new = draw.choice(world.choices[about])
            context = draw.choice(FRAMES).format(prompt=draw.choice(asked[about]), target=new)
            told.append((context + draw.choice(asked[about]), new))
    rows = [{"prompt": text, "completion": f"{value}."} for text, value in (*stated, *behind, *told)]
    return rows_of([*rows, *({"text": LIES_IN.format(name=city, value=c)} for city, c in world.country.items())])


def words(texts: list[str]) -> Any:
    """A tokenizer to which every word with the space before it is one token; a text's first word is no other word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *found])}, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def model_of(world: Crossed, recipe: Mapping[str, Any] | None = None) -> LanguageModel:
    """The model that knows the world; trained once, then found in the cache. In a larger world than of `USUAL` people
    every sentence is read as often as there."""
    rows = lessons(world)
    texts = [f"{row.prompt} {row.answer}".strip() for row in rows]
    steps = max(RECIPE.steps, RECIPE.steps * len(world.people) // USUAL)
    chosen = Recipe(**{**asdict(RECIPE), "steps": steps, **(recipe or {})})
    return taught("crossed", {"before": rows}, chosen, world.seed, words=words(texts))["before"]
