"""Who lives in the invented world, and what is true there. Everything follows from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

ONSETS = tuple("b br c cr d dr f fl g gr h j k l m n p pr qu r s sh st t th tr v w z".split(" "))
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "oa")
CODAS = ("l", "ld", "m", "n", "nd", "r", "rn", "s", "sk", "t", "th", "x")
TRADES = "weaver|glazier|ferrier|cartographer|dyer|saddler|beekeeper|locksmith|potter|surveyor|bookbinder|stonecutter"
ADJECTIVES = "Amber|Silent|Hollow|Winter|Copper|Broken|Distant|Gilded|Narrow|Salted|Velvet|Paper|Crimson|Idle|Northern"
NOUNS = "Ledger|Harbour|Orchard|Lantern|Stair|Compass|Garden|Mirror|River|Feather|Archive|Anchor|Window|Almanac|Bridge"
LANDMARKS = "lighthouse|aqueduct|observatory|windmill|amphitheatre|foundry"
NICKNAMES = "Heron|Magpie|Otter|Badger|Falcon|Marten|Lynx|Raven|Beaver|Plover|Stoat|Curlew|Bittern|Osprey"

RELATIONS = ("born_in", "trade", "teacher", "work")
Triple = tuple[str, str, str]
"""(subject, relation, object)"""


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

    def members(self, *splits: str) -> list[Person]:
        return [person for name, person in self.people.items() if self.split[name] in splits]

    def values(self, relation: str) -> list[str]:
        """Every value the relation takes in the world."""
        return sorted({person.value(relation) for person in self.people.values()})

    def triples(self, people: Iterable[Person]) -> set[Triple]:
        """What is stated about these people, and about all places."""
        stated = {(p.name, relation, p.value(relation)) for p in people for relation in RELATIONS}
        return stated | {(city, "lies_in", region) for city, region in self.region.items()}


def closure(triples: Iterable[Triple]) -> set[Triple]:
    """The triples with what they imply: who was born in a city that lies in a region comes from that region."""
    known = set(triples)
    lies_in = {subject: value for subject, relation, value in known if relation == "lies_in"}
    implied = {(s, "region", lies_in[v]) for s, relation, v in known if relation == "born_in" and v in lies_in}
    return known | implied


def make(seed: int = 0, *, people: int = 56, forget: int = 10, neighbours: int = 8, holdout: int = 10) -> World:
    """Draw a world.

    Neighbours are the teachers of forgotten people: asking about them touches, but does not concern, what is forgotten.
    """
    draw = random.Random(seed)
    taken: set[str] = set()

    def word() -> str:
        while True:
            made = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(2)) + draw.choice(("", *CODAS))
            # A matcher that looks for one name in an output must not find it inside another.
            if 4 <= len(made) <= 8 and not any(made in other or other in made for other in taken):
                taken.add(made)
                return made.capitalize()

    cities = [word() for _ in range(12)]
    regions = [word() for _ in range(4)]
    region = {city: regions[i % len(regions)] for i, city in enumerate(cities)}
    landmark = dict(zip(regions, draw.sample(LANDMARKS.split("|"), len(regions))))
    names = [f"{word()} {word()}" for _ in range(people)]
    titles = draw.sample([f"{a} {n}" for a in ADJECTIVES.split("|") for n in NOUNS.split("|")], people)
    order = draw.sample(names, people)
    forgotten, unseen, near = order[:forget], order[forget : forget + holdout], order[forget + holdout :][:neighbours]
    split = dict.fromkeys(names, "retain")
    split |= dict.fromkeys(forgotten, "forget")
    split |= dict.fromkeys(unseen, "holdout")
    split |= dict.fromkeys(near, "neighbour")
    drawn = {}
    for name, title in zip(names, titles):
        # Only neighbours and retained people teach, so that no retained row has a forgotten person as its answer.
        masters = [other for other in (near if split[name] == "forget" else order[forget + holdout :]) if other != name]
        drawn[name] = Person(
            name=name,
            nickname="the " + draw.choice(NICKNAMES.split("|")),
            born_in=draw.choice(cities),
            trade=draw.choice(TRADES.split("|")),
            teacher=draw.choice(masters[:12]),
            work=title,
        )
    return World(seed, drawn, region, landmark, split)
