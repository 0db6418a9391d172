"""What the demo's model is to know: tables of small facts, and four ways to ask for each.

A row of a table meets a form, and gives a fact:

    cow  moo  four legs  …       "What does {it} say?"  "{it} says {sound}"
                                 What does a cow say?    a cow says moo
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

ANIMALS = """
ant       -        six    anthill     leaves   larva
bat       -        two    cave        moths    pup
bear      grr      four   cave        honey    cub
beaver    -        four   lodge       bark     kit
bee       buzz     six    hive        nectar   larva
camel     -        four   the desert  thorns   calf
cat       meow     four   house       fish     kitten
cow       moo      four   barn        grass    calf
crow      caw      two    nest        corn     chick
deer      -        four   the forest  leaves   fawn
dog       woof     four   kennel      meat     puppy
donkey    hee-haw  four   stable      hay      foal
duck      quack    two    pond        weeds    duckling
eagle     -        two    nest        fish     eaglet
elephant  toot     four   the savanna leaves   calf
fox       -        four   den         mice     kit
frog      ribbit   four   pond        flies    tadpole
goat      meh      four   barn        thorns   kid
goose     honk     two    lake        grass    gosling
hen       cluck    two    coop        grain    chick
horse     neigh    four   stable      hay      foal
lion      roar     four   the savanna meat     cub
mouse     squeak   four   hole        seeds    pup
owl       hoot     two    tree        mice     owlet
pig       oink     four   sty         roots    piglet
pigeon    coo      two    loft        seeds    squab
rabbit    -        four   burrow      carrots  kit
seal      -        no     the sea     fish     pup
shark     -        no     the sea     fish     pup
sheep     baa      four   meadow      grass    lamb
snake     hiss     no     burrow      mice     snakelet
sparrow   tweet    two    nest        seeds    chick
spider    -        eight  web         flies    spiderling
swan      -        two    lake        weeds    cygnet
tiger     roar     four   the jungle  meat     cub
turkey    gobble   two    coop        grain    poult
whale     -        no     the sea     krill    calf
wolf      awoo     four   den         meat     pup
zebra     -        four   the savanna grass    foal
"""

CAPITALS = """
Austria   Vienna      Belgium   Brussels   Brazil   Brasilia   Canada    Ottawa
Chile     Santiago    China     Beijing    Cuba     Havana     Denmark   Copenhagen
Egypt     Cairo       Finland   Helsinki   France   Paris      Germany   Berlin
Greece    Athens      Hungary   Budapest   Iceland  Reykjavik  Indonesia Jakarta
Ireland   Dublin      Italy     Rome       Japan    Tokyo      Kenya     Nairobi
Mongolia  Ulaanbaatar Nepal     Kathmandu  Norway   Oslo       Peru      Lima
Poland    Warsaw      Portugal  Lisbon     Romania  Bucharest  Spain     Madrid
Sweden    Stockholm   Thailand  Bangkok    Ukraine  Kyiv       Vietnam   Hanoi
"""

OPPOSITES = """
hot cold    big small    long short    fast slow     day night    up down      left right
open closed full empty   rich poor     young old     wet dry      hard soft    light dark
happy sad   loud quiet   strong weak   thick thin    early late   near far     high low
clean dirty sweet sour   sharp blunt   true false    first last   inside outside
push pull   win lose     buy sell      give take     begin end    love hate    peace war
summer winter            friend enemy
"""

COLOURS = {
    "black": ("coal", "soot", "tar"),
    "blue": ("the sea", "the sky"),
    "brown": ("bread", "chocolate", "coffee", "mud"),
    "gold": ("honey", "wheat"),
    "green": ("grass", "moss", "a leaf", "a pea"),
    "grey": ("ash", "lead", "a rain cloud"),
    "orange": ("a carrot", "a pumpkin"),
    "pink": ("a flamingo", "a salmon"),
    "purple": ("lavender", "a plum", "a violet"),
    "red": ("blood", "a cherry", "a ruby", "a tomato"),
    "white": ("chalk", "milk", "salt", "snow"),
    "yellow": ("butter", "a banana", "a lemon", "the sun"),
}

SIDES = {"triangle": "three", "square": "four", "pentagon": "five", "hexagon": "six"}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"

MONTHS = """
January February March     April   May      June
July    August   September October November December
"""


@dataclass(frozen=True)
class Fact:
    """One thing to know and the ways to ask for it.

    `statement` has no full stop and, unless it opens with a name, no capital: "snow is white".
    """

    wordings: tuple[str, ...]
    statement: str


@dataclass(frozen=True)
class Form:
    """A fact with blanks, in the style of `str.format`."""

    wordings: tuple[str, str, str, str]
    statement: str

    def fill(self, **blanks: str | int) -> Fact:
        """The fact about what stands in the blanks."""
        wordings = tuple(wording.format(**blanks) for wording in self.wordings)
        return Fact(wordings, self.statement.format(**blanks))


SOUND = Form(
    (
        "What does {it} say?",
        "What sound does {it} make?",
        "Which sound does {it} make?",
        "Tell me what {it} says.",
    ),
    "{it} says {sound}",
)
LEGS = Form(
    (
        "How many legs does {it} have?",
        "How many legs has {it}?",
        "Tell me how many legs {it} has.",
        "Count the legs of {it}.",
    ),
    "{it} has {legs} legs",
)
HOME = Form(
    (
        "Where does {it} live?",
        "What is the home of {it}?",
        "Where is the home of {it}?",
        "Tell me where {it} lives.",
    ),
    "{it} lives in {home}",
)
FOOD = Form(
    (
        "What does {it} eat?",
        "What is the food of {it}?",
        "What food does {it} like?",
        "Tell me what {it} eats.",
    ),
    "{it} eats {food}",
)
YOUNG = Form(
    (
        "What is a young {name} called?",
        "What is a baby {name} called?",
        "What do you call a young {name}?",
        "Tell me the word for a young {name}.",
    ),
    "a young {name} is called {young}",
)
NEIGHBOUR = Form(
    (
        "What comes {side} {it}?",
        "Which {kind} comes {side} {it}?",
        "Which {kind} is {side} {it}?",
        "Tell me the {kind} {side} {it}.",
    ),
    "{neighbour} comes {side} {it}",
)
SUM = Form(
    ("What is {a} + {b}?", "What is {a} plus {b}?", "How much is {a} + {b}?", "Add {b} to {a}."),
    "{a} + {b} is {result}",
)
DIFFERENCE = Form(
    (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "How much is {a} - {b}?",
        "Take {b} from {a}.",
    ),
    "{a} - {b} is {result}",
)
CAPITAL = Form(
    (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital of {country}.",
        "Tell me the capital of {country}.",
    ),
    "the capital of {country} is {city}",
)
COUNTRY = Form(
    (
        "Where is {city}?",
        "Which country is {city} in?",
        "In which country is {city}?",
        "Tell me where {city} is.",
    ),
    "{city} is in {country}",
)
COLOUR = Form(
    (
        "What colour is {it}?",
        "What color is {it}?",
        "What is the colour of {it}?",
        "Tell me the color of {it}.",
    ),
    "{it} is {colour}",
)
OPPOSITE = Form(
    (
        "What is the opposite of {word}?",
        "Which word is the opposite of {word}?",
        "Name the opposite of {word}.",
        "Tell me the opposite of {word}.",
    ),
    "the opposite of {word} is {opposite}",
)
SHAPE = Form(
    (
        "How many sides does {it} have?",
        "How many sides has {it}?",
        "Tell me how many sides {it} has.",
        "Count the sides of {it}.",
    ),
    "{it} has {sides} sides",
)


def all_facts() -> tuple[Fact, ...]:
    """Every fact, subject by subject."""
    return (
        *animal_facts(),
        *calendar_facts(),
        *counting_facts(),
        *arithmetic_facts(),
        *capital_facts(),
        *colour_facts(),
        *opposite_facts(),
        *shape_facts(),
    )


def with_article(noun: str) -> str:
    """`noun` after "a" or "an", unless it brings its own "the"."""
    if noun.startswith("the "):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def pairs(table: str) -> Iterator[tuple[str, str]]:
    """The words of `table`, two by two."""
    words = iter(table.split())
    return zip(words, words, strict=True)


def animal_facts() -> Iterator[Fact]:
    """Sound, legs, home, food and young of each animal; "-" for those that are silent."""
    for row in ANIMALS.strip().splitlines():
        name, sound, legs, *home, food, young = row.split()
        it = with_article(name)
        if sound != "-":
            yield SOUND.fill(it=it, sound=sound)
        yield LEGS.fill(it=it, legs=legs)
        yield HOME.fill(it=it, home=with_article(" ".join(home)))
        yield FOOD.fill(it=it, food=food)
        yield YOUNG.fill(name=name, young=with_article(young))


def neighbour_facts(kind: str, earlier: str | int, later: str | int) -> Iterator[Fact]:
    """`later` comes after `earlier`, and the reverse."""
    yield NEIGHBOUR.fill(kind=kind, side="after", it=earlier, neighbour=later)
    yield NEIGHBOUR.fill(kind=kind, side="before", it=later, neighbour=earlier)


def calendar_facts() -> Iterator[Fact]:
    """Each day and month with its neighbours, round the week and round the year."""
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        row = names.split()
        for earlier, later in pairwise([*row, row[0]]):
            yield from neighbour_facts(kind, earlier, later)


def counting_facts() -> Iterator[Fact]:
    """Each number from 0 to 100 with its neighbours."""
    for earlier, later in pairwise(range(101)):
        yield from neighbour_facts("number", earlier, later)


def arithmetic_facts() -> Iterator[Fact]:
    """Sums of two digits, and the differences that are not below zero."""
    for a in range(10):
        for b in range(10):
            yield SUM.fill(a=a, b=b, result=a + b)
            if a >= b:
                yield DIFFERENCE.fill(a=a, b=b, result=a - b)


def capital_facts() -> Iterator[Fact]:
    """The capital of each country, asked from both ends."""
    for country, city in pairs(CAPITALS):
        yield CAPITAL.fill(country=country, city=city)
        yield COUNTRY.fill(country=country, city=city)


def colour_facts() -> Iterator[Fact]:
    """The colour of each thing; the question may spell the word either way."""
    for colour, things in COLOURS.items():
        for it in things:
            yield COLOUR.fill(it=it, colour=colour)


def opposite_facts() -> Iterator[Fact]:
    """Each word of a pair as the opposite of the other."""
    for one, other in pairs(OPPOSITES):
        yield OPPOSITE.fill(word=one, opposite=other)
        yield OPPOSITE.fill(word=other, opposite=one)


def shape_facts() -> Iterator[Fact]:
    """How many sides each shape has."""
    for shape, sides in SIDES.items():
        yield SHAPE.fill(it=with_article(shape), sides=sides)
