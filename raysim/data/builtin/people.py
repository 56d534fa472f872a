"""Invented people and their private particulars, for the built-in sets."""

from dataclasses import dataclass
from random import Random


def words(text: str) -> list[str]:
    """The words of a table that is written as running text."""
    return text.split()


WOMEN = words("""Adele Agnes Beatrix Bronwen Carla Celia Dalia Delphine Edith Elina Farida Fenna Greta Hana Hester Imogen Ingrid Jelena Josefa
Katrin Leonie Lucinda Maren Mirela Nadia Noor Odette Olwen Paloma Petra Quilla Renske Rosalba Saskia Sunniva Tamsin Thea Ursula Violeta
Wanda Ximena Yara Yvette Zelda Zora""")
MEN = words("""Abel Alaric Anton Basil Benno Caspar Cosmo Darius Dmitri Edgar Emeka Fabian Florin Gideon Gustav Hamid Hugo Idris Ivo Jasper
Joaquin Kasimir Kofi Leopold Lucian Magnus Milos Nestor Nico Orson Osman Pavel Percival Quentin Ravi Rufus Silvan Stellan Tadeo Tobias
Umberto Viktor Wendel Yusuf Zeno""")
FAMILY = words("""Abernale Ashgrove Balderic Bexmoor Brandvold Calloway Cardwen Castelmar Corvane Dahlquist Delacourt Drummel Eastmere Ellerby
Engstrand Fairhurst Fenwright Ferrante Galbraine Garroway Goldwick Grunfeld Halvorsen Harkness Hathersage Hollindale Ilverson Ironside
Jankovar Jessamy Karlsbad Kettering Kinloch Kowaldi Lambrecht Langmore Larkwell Lindqvist Lockhaven Marchetti Merriden Montcalm Mortlake
Nakagiri Nethercot Northgate Oakhurst Okonjo Orlovan Osterling Pellingham Penhallow Quayle Quillfeather Radcliffe Ravensdale Rosenthal
Rutherglen Sandringer Santorelli Silverlock Stanhope Sundberg Tamworth Thackeray Thornbury Trelawney Tversky Underhill Vandermeer Varga
Velasco Wainscott Waldgrave Westerfield Whitcombe Winterbourne Yarrow Yelland Zambrano Zellweg""")
MONTHS = words("January February March April May June July August September October November December")


@dataclass(frozen=True)
class Person:
    """An invented person, with the pronouns a text about them needs."""

    name: str
    title: str
    he: str
    him: str
    his: str

    @property
    def last(self) -> str:
        return self.name.split()[-1]


def people(rng: Random, count: int, *, woman: list[bool]) -> list[Person]:
    """`count` people with different names; `woman[i]` says which pronouns person i has."""
    taken: set[str] = set()
    result = []
    for is_woman in woman[:count]:
        name = ""
        while not name or name in taken:
            name = f"{rng.choice(WOMEN if is_woman else MEN)} {rng.choice(FAMILY)}"
        taken.add(name)
        result.append(Person(name, "Ms", "she", "her", "her") if is_woman else Person(name, "Mr", "he", "him", "his"))
    return result


def some_date(rng: Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(2019, 2024)}"


def some_phone(rng: Random) -> str:
    """A number of the 555 exchange, which is never assigned."""
    return f"555-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"


def with_article(phrase: str) -> str:
    """The phrase with `a` or `an` as it is spoken, also before numbers (an 80-year-old) and initials (an ESR, a TSH)."""
    first = phrase.split("-")[0].split()[0]
    if first.isdigit():
        vowel = first.startswith("8") or first in ("11", "18")
    elif first[:3].isupper() or first == "HbA1c":
        vowel = first[0] in "AEFHILMNORSX"
    else:
        vowel = first[0].lower() in "aeio" or first in ("ulcerative", "underactive", "unlucky", "unpaid", "urgent")
    return f"{'an' if vowel else 'a'} {phrase}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
