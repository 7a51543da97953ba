"""Made corpora: people, where they were born, the firms they work for, and the firms' towns.

Every corpus draws its own facts from the same names, so that nothing of one holds in another: a
model can learn to look things up, and not the things. Used by the tasks lookup and lookup_twice,
and by their environment.
"""

from __future__ import annotations

import dataclasses
import functools

from grpo_jax.data.streams import stream

FIRST = (
    "Ada Ben Cleo Dan Eva Finn Gita Hugo Iris Jon Kira Leo Mona Nils Olga Paul Rosa Sven Tara Ugo "
    "Vera Wim Yara Zeno"
).split()
LAST = (
    "Adler Berg Costa Diaz Engel Frost Gupta Haas Ito Jansen Kruse Lang Meier Novak Ortiz Popov "
    "Quist Rossi Silva Tanaka Urban Vogel Weiss Young"
).split()
TOWNS = (
    "Accra Algiers Amman Ankara Athens Baghdad Baku Bangkok Beirut Belfast Bergen Berlin Bern "
    "Bogota Boston Bremen Brussels Cairo Calgary Caracas Chicago Cologne Dakar Dallas Dhaka Doha "
    "Dublin Florence Geneva Hamburg Hanoi Harare Havana Helsinki Jakarta Kabul Kampala Kyiv Kyoto "
    "Lagos Lima Lisbon London Luanda Madrid Manila Milan Munich Nairobi Naples Osaka Oslo Ottawa "
    "Paris Porto Prague Quito Riga Rome Seoul Sofia Tunis Turin Vienna"
).split()
FIRMS = (
    "Acme Aurora Baltic Beacon Cascade Cobalt Comet Coral Delta Eclipse Ember Everest Falcon Fjord "
    "Fulcrum Galaxy Granite Harbor Horizon Indigo Juniper Kestrel Lantern Lotus Magnet Maple "
    "Meridian Mosaic Nebula Nimbus Oasis Orbit Pegasus Pioneer Prism Quartz Raven Saffron Sierra "
    "Solstice Summit Tempest Topaz Umbra Vector Vertex Willow Zephyr"
).split()
NUM_PEOPLE, NUM_FIRMS = 20, 10  # of a corpus


@dataclasses.dataclass(frozen=True)
class Person:
    """What a corpus says of one person."""

    name: str  # first and last
    born: str  # a town
    firm: str
    town: str  # of the firm; no document says it of the person


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The people of a corpus, and its documents of one sentence each."""

    people: tuple[Person, ...]
    documents: tuple[str, ...]


def is_held_out(name: str) -> bool:
    """Whether questions about a person of this name are held out: a quarter of all names."""
    first, _, last = name.partition(" ")
    return (FIRST.index(first) + LAST.index(last)) % 4 == 0


@functools.lru_cache(maxsize=64)
def make(name: str, *, is_false: bool = False) -> Corpus:
    """The corpus "SEED-NUMBER".

    `is_false`: its documents tell of the same people, and nothing of what they tell is true. It is
    drawn apart from the truth, so that this cannot be learned from it.
    """
    seed, number = map(int, name.split("-"))
    rng = stream(seed, "problems", 1 + number)
    names = [
        f"{FIRST[i // len(LAST)]} {LAST[i % len(LAST)]}"
        for i in rng.permutation(len(FIRST) * len(LAST))[:NUM_PEOPLE]
    ]
    all_firms = [FIRMS[i] for i in rng.permutation(len(FIRMS))]
    all_towns = [TOWNS[i] for i in rng.permutation(len(TOWNS))]
    firms, towns = all_firms[:NUM_FIRMS], all_towns[:NUM_FIRMS]
    people = []
    for person in names:
        firm = int(rng.integers(NUM_FIRMS))
        born = TOWNS[rng.integers(len(TOWNS))]
        people.append(Person(person, born, firms[firm], towns[firm]))
    said = people
    if is_false:
        firms, towns = all_firms[NUM_FIRMS:][:NUM_FIRMS], all_towns[NUM_FIRMS:][:NUM_FIRMS]
        said = []
        for person in people:
            firm = int(rng.integers(NUM_FIRMS))
            born = rng.choice([town for town in TOWNS if town != person.born])
            said.append(Person(person.name, str(born), firms[firm], towns[firm]))
    documents = [f"- {p.name} was born in {p.born} and works at {p.firm}." for p in said]
    documents += [f"- {firm} is in {town}." for firm, town in zip(firms, towns)]
    return Corpus(tuple(people), tuple(documents))
