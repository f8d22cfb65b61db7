"""Who lives in the invented world, and what is true there. Everything follows from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import ParameterError
from ..inference import Fact, Rule

ONSETS = tuple("b br c cr d dr f fl g gr h j k l m n p pr qu r s sh st t th tr v w z".split(" "))
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "oa")
CODAS = ("l", "ld", "m", "n", "nd", "r", "rn", "s", "sk", "t", "th", "x")
TRADES = "weaver|glazier|ferrier|cartographer|dyer|saddler|beekeeper|locksmith|potter|surveyor|bookbinder|stonecutter"
ADJECTIVES = "Amber|Silent|Hollow|Winter|Copper|Broken|Distant|Gilded|Narrow|Salted|Velvet|Paper|Crimson|Idle|Northern"
NOUNS = "Ledger|Harbour|Orchard|Lantern|Stair|Compass|Garden|Mirror|River|Feather|Archive|Anchor|Window|Almanac|Bridge"
LANDMARKS = "lighthouse|aqueduct|observatory|windmill|amphitheatre|foundry|viaduct|monastery"
ANIMALS = "Heron|Magpie|Otter|Badger|Falcon|Marten|Lynx|Raven|Beaver|Plover|Stoat|Curlew|Bittern|Osprey"

CITIES, REGIONS = 12, 6
MOST_PEOPLE = 200
"""Nicknames (15 adjectives, 14 animals) and titles stay unique up to here."""
FEWEST_RETAINED = 8
"""With a neighbour they make nine known people: enough for five wrong answers to every question."""

RELATIONS = ("born_in", "trade", "teacher", "work")
IMPLIED = ("region", "teacher_born_in")
"""What follows in two steps: the region of the city of birth, the city where the teacher was born."""
RULES = (Rule("region", ("born_in", "lies_in")), Rule("teacher_born_in", ("teacher", "born_in")))


@dataclass(frozen=True)
class Person:
    """Somebody, and what is true of them."""

    name: str
    nickname: str
    born_in: str
    trade: str
    teacher: str
    work: str

    def value(self, relation: str) -> str:
        return str(getattr(self, relation))


@dataclass(frozen=True)
class World:
    """Everything true, and who belongs to which split."""

    seed: int
    people: dict[str, Person]
    region: dict[str, str]
    """city -> region"""
    landmark: dict[str, str]
    """region -> landmark"""
    split: dict[str, str]
    """person -> forget, neighbour, retain or holdout"""
    choices: dict[str, tuple[str, ...]]
    """relation -> what can be answered, right or wrong; nothing that is said of forgotten or held-out people only"""

    def members(self, *splits: str) -> list[Person]:
        return [person for name, person in self.people.items() if self.split[name] in splits]

    def value(self, person: Person, relation: str) -> str:
        """What is true of the person, stated or implied."""
        if relation == "region":
            return self.region[person.born_in]
        return self.people[person.teacher].born_in if relation == "teacher_born_in" else person.value(relation)

    def triples(self, people: Iterable[Person]) -> set[Fact]:
        """What is stated about these people, and about all places."""
        stated = {(p.name, relation, p.value(relation)) for p in people for relation in RELATIONS}
        return stated | {(city, "lies_in", region) for city, region in self.region.items()}


def check_sizes(people: int, forget: int, neighbours: int, holdout: int) -> None:
    """ParameterError with a sentence if no world has these sizes."""
    for name, count in (("forget", forget), ("neighbours", neighbours), ("holdout", holdout)):
        if count < 1:
            raise ParameterError(f"{name} is {count}, expected at least 1")
    fewest = forget + neighbours + holdout + FEWEST_RETAINED
    if people < fewest:
        raise ParameterError(
            f"people is {people}, expected at least {fewest}: {forget} to forget, {neighbours} neighbours, "
            f"{holdout} held out and {FEWEST_RETAINED} retained"
        )
    if people > MOST_PEOPLE:
        raise ParameterError(f"people is {people}, expected at most {MOST_PEOPLE}: names must stay unique")


def make(seed: int = 0, *, people: int = 56, forget: int = 10, neighbours: int = 8, holdout: int = 10) -> World:
    """Draw a world.

    Neighbours are the teachers of forgotten people: asking about them touches, but does not concern, what is forgotten.

    Raises:
        ParameterError: there cannot be so many or so few people.
    """
    check_sizes(people, forget, neighbours, holdout)
    draw = random.Random(seed)
    taken: set[str] = set()

    def word() -> str:
        while True:
            made = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(2)) + draw.choice(("", *CODAS))
            # A matcher that looks for one name in an output must not find it inside another.
            if 4 <= len(made) <= 8 and not any(made in other or other in made for other in taken):
                taken.add(made)
                return made.capitalize()

    cities = [word() for _ in range(CITIES)]
    regions = [word() for _ in range(REGIONS)]
    region = {city: regions[i % REGIONS] for i, city in enumerate(cities)}
    landmark = dict(zip(regions, draw.sample(LANDMARKS.split("|"), REGIONS)))
    names = [f"{word()} {word()}" for _ in range(people)]
    titles = _pairs(draw, NOUNS, people)
    nicknames = _pairs(draw, ANIMALS, people)
    trades = TRADES.split("|")
    order = draw.sample(names, people)
    forgotten, unseen, near = order[:forget], order[forget : forget + holdout], order[forget + holdout :][:neighbours]
    split = dict.fromkeys(names, "retain")
    split |= dict.fromkeys(forgotten, "forget")
    split |= dict.fromkeys(unseen, "holdout")
    split |= dict.fromkeys(near, "neighbour")
    # Only neighbours and retained people teach, so that no retained row has a forgotten person as its answer.
    known = order[forget + holdout :]
    teachers = known[:12]
    drawn = {
        name: Person(name, f"the {nickname}", born_in, trade, _teacher(draw, name, pool), title)
        for name, nickname, born_in, trade, title, pool in zip(
            names,
            nicknames,
            _dealt(draw, cities, people),
            _dealt(draw, trades, people),
            titles,
            [near if split[name] == "forget" else teachers for name in names],
        )
    }
    choices = {
        "born_in": cities,
        "trade": trades,
        "teacher": teachers,
        "work": [drawn[name].work for name in known],
        "region": regions,
        "teacher_born_in": cities,
    }
    ordered = {relation: tuple(sorted(values)) for relation, values in choices.items()}
    return World(seed, drawn, region, landmark, split, ordered)


def _pairs(draw: random.Random, nouns: str, count: int) -> list[str]:
    """Different pairs of an adjective and a noun."""
    return draw.sample([f"{a} {n}" for a in ADJECTIVES.split("|") for n in nouns.split("|")], count)


def _dealt(draw: random.Random, values: Sequence[str], count: int) -> list[str]:
    """Each value as often as any other, so that none is a good guess."""
    found: list[str] = []
    while len(found) < count:
        found += draw.sample(values, len(values))
    return found[:count]


def _teacher(draw: random.Random, name: str, pool: Sequence[str]) -> str:
    return draw.choice([other for other in pool if other != name])
