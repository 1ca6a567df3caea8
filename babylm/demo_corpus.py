"""The demo corpus: six files in BabyLM's format, and the minimal pairs that go with them.

One small English grammar writes both. Each phenomenon is a *square*: a frame with two holes, one
for a licensor and one for its target, and two words or phrases for each hole. The first target
goes with the first licensor, the second with the second:

                                     is tired    are tired
    The dog near the old bridges        ok           *
    The dogs near the old bridges       *            ok

The training text shows the two grammatical cells. The pairs use all four: a square gives *twin*
pairs whose good sentences together hold exactly the words of their bad ones. A unigram model is
right about one twin and wrong about the other, and so is every model that looks back from the
target and does not reach the licensor. Both stay at 50% by construction, not by luck.

The hold-out is lexical. A fixed share of the combinations of a noun or name with a verb or
adjective (`reserved`: a hash, the same for every seed) never meets inside a training sentence, and
the pairs are built on just those combinations.
"""

import json
import random
import zlib
from bisect import bisect
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

# Shares of words, after the 10M-word BabyLM corpus.
SHARES = {
    "bnc_spoken": 0.08,
    "childes": 0.28,
    "gutenberg": 0.26,
    "open_subtitles": 0.20,
    "simple_wiki": 0.15,
    "switchboard": 0.03,
}
DOMAINS = tuple(SHARES)


# ---------------------------------------------------------------------------------------- lexicon


class Word(NamedTuple):
    """A lexeme. Nouns have (singular, plural), verbs (base, third person, past, participle)."""

    lemma: str
    forms: tuple[str, ...]

    sg = property(lambda self: self.forms[0])
    pl = property(lambda self: self.forms[1])
    third = property(lambda self: self.forms[1])
    past = property(lambda self: self.forms[2])
    participle = property(lambda self: self.forms[3])


class Deck:
    """Things of one class to draw from: by the weights given, or Zipfian, 1 / (rank + shift)."""

    def __init__(self, words: Iterable, shift: float = 8.0, weights=None):
        self.words = list(words)
        ranks = range(1, len(self.words) + 1)
        self.sums = list(accumulate(weights or (1 / (rank + shift) for rank in ranks)))

    def __add__(self, other: "Deck") -> "Deck":
        alternating = [word for two in zip(self.words, other.words, strict=False) for word in two]
        return Deck(dict.fromkeys(alternating + self.words + other.words))

    def draw(self, rng: random.Random):
        return self.words[bisect(self.sums, rng.random() * self.sums[-1])]


def with_ending(word: str, ending: str) -> str:
    """The regular form of a word with `s` or `ed`."""
    if word[-1] == "y" and word[-2] not in "aeiou":
        return f"{word[:-1]}ie{ending[-1]}"
    if ending == "s":
        return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
    return word + ("d" if word[-1] == "e" else "ed")


def nouns(text: str, shift: float = 8.0) -> Deck:
    """`dog mouse/mice`: regular plurals are made, irregular ones are written out."""
    entries = ((entry.split("/") + [None])[:2] for entry in text.split())
    return Deck((Word(sg, (sg, pl or with_ending(sg, "s"))) for sg, pl in entries), shift)


def verbs(text: str) -> Deck:
    """`laugh find/found take/took/taken`: irregular pasts, and participles that differ from them."""

    def verb(base, past=None, participle=None):
        past = past or with_ending(base, "ed")
        return Word(base, (base, with_ending(base, "s"), past, participle or past))

    return Deck(verb(*entry.split("/")) for entry in text.split())


def plain(text: str, shift: float = 8.0) -> Deck:
    """Words that do not inflect: adjectives and names."""
    return Deck((Word(word, (word,)) for word in text.split()), shift)


MALE = nouns("man/men boy king father uncle brother prince son gentleman/gentlemen husband policeman/policemen waiter")
FEMALE = nouns("woman/women girl queen mother aunt sister princess daughter wife/wives lady policewoman/policewomen waitress")
NEITHER = nouns(
    "child/children dog teacher doctor cat friend farmer horse mouse/mice student soldier wolf/wolves sailor rabbit "
    "goose/geese baker thief/thieves singer ox/oxen guest calf/calves"
)
BEINGS = NEITHER + (MALE + FEMALE)
THINGS = nouns(
    "book box lamp knife/knives letter cup leaf/leaves chair key basket loaf/loaves bottle clock coat ball shelf/shelves picture "
    "ring shirt tooth/teeth candle hammer"
)
PLACES = nouns("house door tree table river garden window bridge road school field hill church gate wall tower market lake shop castle")
HIS = plain("John Tom Peter Jack William Henry Sam George Ben Paul David Frank Simon")
HERS = plain("Mary Anna Lucy Jane Alice Emma Sarah Rose Kate Helen Clara Grace Julia")

ACTING = verbs(
    "sleep/slept laugh sing/sang/sung wait smile cry dance work listen shout whisper pray travel complain wander kneel/knelt swim/swam/swum"
)
HANDLING = verbs(
    "find/found take/took/taken carry see/saw/seen bring/brought buy/bought break/broke/broken make/made wear/wore/worn hold/held "
    "keep/kept throw/threw/thrown steal/stole/stolen repair choose/chose/chosen shake/shook/shaken tear/tore/torn fetch destroy borrow "
    "bite/bit/bitten"
)
TREATING = verbs("wash blame praise hurt/hurt admire dress trust teach/taught describe defend amuse comfort scratch hate")
DECAYING = verbs("crack rust fade melt leak crumble shatter rattle decay")
FEELING = plain("hungry tired happy angry ready afraid proud ill alone clever brave lonely calm polite busy")
LASTING = plain("broken heavy clean dirty cheap empty useless wet dry missing valuable rare")
ANY_LOOK = plain("old little big small strange beautiful ugly tall great new")
THING_LOOK = plain("wooden red white green black blue yellow dusty golden grey round narrow")
KNOWING = plain("knew remembered heard noticed learned understood discovered forgot")

BEINGS_DO, THINGS_DO = ACTING + FEELING, DECAYING + LASTING
IRREGULAR_BEINGS, IRREGULAR_THINGS = (
    Deck(noun for noun in deck.words if noun.pl != with_ending(noun.sg, "s")) for deck in (BEINGS, THINGS)
)
IRREGULAR_HANDLING = Deck(verb for verb in HANDLING.words if verb.past != verb.participle)

DETERMINERS = (("this", "these"), ("that", "those"), ("one", "two"), ("every", "several"))
TITLES = (("Mr", "Mrs"), ("Sir", "Miss"))
NEAR = ("near", "behind", "beside", "opposite", "below")
THEN = ("yesterday", "again", "last night", "in the morning", "at noon", "on Sunday")
LATELY = ("again", "twice", "before", "today", "lately")
NOW = ("every day", "again", "now", "at night", "in the summer")
HOW = ("often", "just", "quickly", "suddenly", "quietly")
FILLERS = ("Yeah", "Well", "You know", "I mean", "Right", "Oh", "So", "Um", "Uh")

# The tail: what one domain alone talks about, in order of frequency. Never in a pair.
TAILS = {
    "bnc_spoken": "meeting council pound budget committee motorway pub pension allotment kettle lorry chemist queue carpet boiler "
    "parish survey invoice tenant chairman/chairmen solicitor garage fence radiator plumber bungalow cheque tribunal "
    "warden roundabout marrow caravan",
    "childes": "doggie bunny truck puzzle cookie crayon teddy blanket spoon train balloon duck puppet banana bib sticker tricycle "
    "bubble kitty mitten sandbox raisin diaper giraffe block tractor pudding noodle whistle button pillow zebra monkey "
    "cracker popsicle",
    "gutenberg": "carriage parlour candlestick lantern mariner chamber estate cottage orchard musket abbey physician widow servant "
    "schooner parson bonnet chimney regiment corridor ravine harpoon shawl magistrate duchess hermit inkstand staircase "
    "monastery vessel squire hearth",
    "open_subtitles": "gun cop phone agent lawyer judge bomb taxi suitcase detective gangster ticket hostage airport passport bodyguard "
    "elevator murderer alibi warrant helicopter witness spaceship sheriff casino motel rifle nightclub zombie robot "
    "parachute",
    "simple_wiki": "city village province actor album mountain battle railway island temple empire planet museum composer glacier "
    "peninsula volcano parliament dynasty reptile physicist cathedral treaty satellite mineral molecule orchid stadium "
    "novelist fossil canal comet enzyme",
    "switchboard": "job tax credit daycare lawn company jury camper hobby vacation mortgage carpool landfill freeway salary nursery "
    "benefit catfish warranty quilt treadmill thermostat dealership cassette",
}
TAILS = {domain: nouns(text, shift=2.0) for domain, text in TAILS.items()}
SYLLABLES = (
    "bal dor fen gar hal kel lin mor nor pel ran sol tar ul ver wes",
    "a an e el i in o or",
    "burg dale den field ford ham la mont nia ra ria stead ton via wick worth",
)


def invented_places() -> list[str]:
    """Names made of syllables, in a fixed shuffled order: the far end of the tail."""
    names = ["".join(parts).capitalize() for parts in product(*(s.split() for s in SYLLABLES))]
    random.Random(0).shuffle(names)
    return names


INVENTED = Deck(invented_places(), shift=3.0)
PROPER = frozenset(INVENTED.words) | {name.lemma for name in (HIS + HERS).words}


# --------------------------------------------------------------------------------------- hold-out

# The classes that the pairs combine.
COMBINED = (
    (BEINGS, (ACTING, HANDLING, TREATING, FEELING)),
    (THINGS, (HANDLING, DECAYING, LASTING)),
    (HIS + HERS, (ACTING, FEELING)),
)


@cache
def reserved(one: str, other: str) -> bool:
    """Whether the combination of these two lemmas, in either order, is kept for the pairs."""
    return zlib.crc32(" ".join(sorted((one, other))).encode()) % 12 == 0


def reserved_forms() -> dict[str, set[str]]:
    """Each form of a noun or name -> the forms that no training sentence with it may contain."""
    table: dict[str, set[str]] = {}
    for heads, classes in COMBINED:
        for head, partner in product(heads.words, (word for deck in classes for word in deck.words)):
            if reserved(head.lemma, partner.lemma):
                for form in head.forms:
                    table.setdefault(form, set()).update(partner.forms)
    return table


RESERVED_FORMS = reserved_forms()


def leaks(sentence: str) -> bool:
    """Whether a sentence (without its final punctuation) contains a reserved combination."""
    words = sentence.replace(",", "").split()
    return any(w in RESERVED_FORMS and not RESERVED_FORMS[w].isdisjoint(words) for w in words)


# ---------------------------------------------------------------------------------------- phrases


class Square(NamedTuple):
    """One frame of a phenomenon, with a `%s` for the licensor and then one for the target."""

    frame: str
    licensors: tuple[str, str]
    targets: tuple[str, str]
    held_out: tuple[tuple[str, str], ...]  # the reserved combinations that it uses, as lemmas
    swap: str = "target"  # what makes the good sentence bad: another "target" or "licensor"

    def cell(self, licensor: int, target: int) -> str:
        """One of the four sentences, grammatical if the two indices are equal."""
        return " ".join((self.frame % (self.licensors[licensor], self.targets[target])).split())

    def pair(self, twin: int) -> tuple[str, str]:
        """The good and the bad sentence of twin 0 or 1."""
        bad = (twin, 1 - twin) if self.swap == "target" else (1 - twin, twin)
        return self.cell(twin, twin), self.cell(*bad)


class Hero(NamedTuple):
    """Someone or something that a document keeps talking about."""

    name: str
    pronoun: str
    possessive: str
    oneself: str


class Writer:
    """Draws words and builds phrases.

    In the training text modifiers vary in length and every document has favourite words. In the
    pairs (`unseen`) the combinations that matter are reserved ones, modifiers are always long, and
    all words come from the core lexicon.
    """

    def __init__(self, seed: str, domain: str = "gutenberg", unseen: bool = False):
        self.rng = random.Random(seed)
        self.domain = domain
        self.unseen = unseen
        self.new_document()

    def new_document(self) -> None:
        """Forget the favourites and decide who and what this document is about."""
        self.favourites: dict[Deck, list] = {}
        self.mentioned: Hero | None = None  # whom a pronoun at the start of a sentence means
        he, she, they, it = (self.favourite(deck) for deck in (HIS, HERS, BEINGS, THINGS))
        king, queen = self.favourite(MALE), self.favourite(FEMALE)
        his_name, her_name = self.titled(he, she)
        self.heroes = [
            Hero(his_name, "he", "his", "himself"),
            Hero(her_name, "she", "her", "herself"),
            Hero(f"the {king.sg}", "he", "his", "himself"),
            Hero(f"the {queen.sg}", "she", "her", "herself"),
            Hero(f"the {they.pl}", "they", "their", "themselves"),
            Hero(f"the {it.sg}", "it", "its", "itself"),
        ]

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def favourite(self, deck: Deck):
        if deck not in self.favourites:
            self.favourites[deck] = [deck.draw(self.rng) for _ in range(3)]
        return self.rng.choice(self.favourites[deck])

    def draw(self, deck: Deck):
        known = not self.unseen and self.maybe(0.3)
        return self.favourite(deck) if known else deck.draw(self.rng)

    def couple(self, deck: Deck, *others: Deck) -> list[Word]:
        """A word and a partner for it from each other deck; in the pairs, reserved combinations."""
        if not self.unseen:
            return [self.draw(any_deck) for any_deck in (deck, *others)]
        while True:
            head = self.draw(deck)
            kept = [[word for word in other.words if reserved(head.lemma, word.lemma)] for other in others]
            if all(kept):
                return [head, *(self.rng.choice(words) for words in kept)]

    def determiners(self) -> tuple[str, str]:
        """A singular and a plural determiner. In the text some show the number, in the pairs none."""
        return self.rng.choice(DETERMINERS) if not self.unseen and self.maybe(0.5) else ("the", "the")

    def titled(self, he: Word, she: Word) -> tuple[str, str]:
        """A man's and a woman's name. In the text some have a title that shows which, in the pairs none."""
        his, hers = self.rng.choice(TITLES) if not self.unseen and self.maybe(0.5) else ("", "")
        return f"{his} {he.lemma}".strip(), f"{hers} {she.lemma}".strip()

    def either_number(self, noun: Word) -> tuple[str, str]:
        one, many = self.determiners()
        return f"{one} {noun.sg}", f"{many} {noun.pl}"

    def noun_phrase(self, deck: Deck, looks: int = 0) -> str:
        number = self.rng.randrange(2)
        return f"{self.determiners()[number]} {self.looks(looks)} {self.draw(deck).forms[number]}"

    def looks(self, most: int) -> str:
        """Up to two adjectives: as many as asked for in the pairs, at most so many in the text."""
        count = most if self.unseen else self.rng.randint(0, most)
        return " ".join(self.draw(deck).lemma for deck in (ANY_LOOK, THING_LOOK)[:count])

    def where(self, looks: int = 2) -> str:
        """A prepositional phrase; its noun has either number, so it attracts either way."""
        tail = not self.unseen and self.maybe(0.15)
        noun = self.noun_phrase(TAILS[self.domain] if tail else PLACES, looks)
        return f"{self.rng.choice(NEAR)} {noun}"

    def relative(self, animate: bool) -> str:
        """A relative clause, in the past tense because that does not show any number."""
        other = self.noun_phrase(BEINGS, looks=1)
        if not animate:
            return f"that {other} {self.draw(HANDLING).past}"
        verb = self.draw(TREATING).past
        return self.rng.choice((f"that {other} {verb}", f"who {verb} {other}"))

    def between(self) -> str:
        """What stands between a person and a reflexive's verb."""
        if not self.unseen and self.maybe(0.3):
            return ""
        return self.where() if self.maybe(0.5) else self.relative(animate=True)

    def then(self) -> str:
        return self.rng.choice(THEN)


# -------------------------------------------------------------------------------------- phenomena


class Phenomenon(NamedTuple):
    make: Callable[[Writer], Square]
    field: str
    term: str
    weight: float  # its share among the phenomena in the training text
    far: bool  # whether a 5-gram's window never reaches from the target to the licensor


PHENOMENA: dict[str, Phenomenon] = {}


def phenomenon(field: str, term: str, weight: float, far: bool = False):
    """Register a function that writes squares; its name is the UID."""

    def register(make):
        PHENOMENA[make.__name__] = Phenomenon(make, field, term, weight, far)
        return make

    return register


def lemmas(head: Word, *partners: Word) -> tuple[tuple[str, str], ...]:
    return tuple((head.lemma, partner.lemma) for partner in partners)


def subject(w: Writer, beings: Deck = BEINGS, things: Deck = THINGS) -> tuple[Deck, Deck]:
    return (beings, BEINGS_DO) if w.maybe(0.6) else (things, THINGS_DO)


def agreement(w: Writer, middle: str, heads: Deck, predicates: Deck) -> Square:
    """Subject and verb agree in number across `middle`, or side by side in some of the text."""
    head, word = w.couple(heads, predicates)
    middle = "" if not w.unseen and w.maybe(0.3) else middle
    if len(word.forms) == 1:
        targets, rest = w.rng.choice((("is", "are"), ("was", "were"))), word.lemma
    elif w.maybe(0.35):
        targets, rest = ("has", "have"), f"{word.participle} {w.rng.choice(LATELY)}"
    else:
        targets, rest = (word.third, word.lemma), w.rng.choice(NOW)
    return Square(f"%s {middle} %s {rest}", w.either_number(head), targets, lemmas(head, word))


@phenomenon("syntax", "subject_verb_agreement", weight=1.7, far=True)
def agreement_across_pp(w):
    return agreement(w, w.where(), *subject(w))


@phenomenon("syntax", "subject_verb_agreement", weight=1.7, far=True)
def agreement_across_relative(w):
    heads, predicates = subject(w)
    return agreement(w, w.relative(animate=heads is BEINGS), heads, predicates)


@phenomenon("syntax", "subject_verb_agreement", weight=1.2, far=True)
def agreement_two_attractors(w):
    return agreement(w, f"{w.where(looks=1)} {w.where(looks=1)}", *subject(w))


@phenomenon("morphology", "irregular_forms", weight=1.2)
def irregular_plural_agreement(w):
    return agreement(w, w.where(looks=0), *subject(w, IRREGULAR_BEINGS, IRREGULAR_THINGS))


@phenomenon("morphology", "irregular_forms", weight=0.4)
def irregular_past_participle(w):
    thing, verb = w.couple(THINGS, IRREGULAR_HANDLING)
    how, number = w.rng.choice(HOW), w.rng.randrange(2)
    frame = f"{w.noun_phrase(BEINGS)} %s %s the {w.looks(1)} {thing.forms[number]} {w.then()}"
    return Square(frame, (f"had {how}", how), (verb.participle, verb.past), lemmas(thing, verb))


def determiner_noun(w: Writer, looks: int) -> Square:
    thing, verb = w.couple(THINGS, HANDLING)
    frame = f"{w.noun_phrase(BEINGS)} {verb.past} %s {w.looks(looks)} %s {w.then()}"
    return Square(frame, w.rng.choice(DETERMINERS), thing.forms, lemmas(thing, verb))


@phenomenon("morphology", "determiner_noun_agreement", weight=1)
def determiner_noun_agreement(w):
    return determiner_noun(w, looks=0)


@phenomenon("morphology", "determiner_noun_agreement", weight=1.5)
def determiner_noun_agreement_adjectives(w):
    return determiner_noun(w, looks=2)


@phenomenon("syntax_semantics", "anaphor_agreement", weight=1.2, far=True)
def reflexive_number(w):
    deck, oneself = w.rng.choice(((MALE, "himself"), (FEMALE, "herself")))
    head, verb = w.couple(deck, TREATING)
    frame = f"%s {w.between()} {verb.past} %s {w.then()}"
    return Square(frame, w.either_number(head), (oneself, "themselves"), lemmas(head, verb))


@phenomenon("syntax_semantics", "anaphor_agreement", weight=2.5, far=True)
def reflexive_gender(w):
    verb, he, she = w.couple(TREATING, MALE, FEMALE)
    frame = f"the %s {w.between()} {verb.past} %s {w.then()}"
    return Square(frame, (he.sg, she.sg), ("himself", "herself"), lemmas(verb, he, she))


@phenomenon("syntax_semantics", "pronoun_anaphora", weight=2.5, far=True)
def pronoun_gender(w):
    word, he, she = w.couple(BEINGS_DO, HIS, HERS)
    when, came = w.rng.choice(("when", "after", "before")), w.rng.choice(("came", "went", "walked"))
    way = f"to the house {w.where()}" if w.unseen or w.maybe(0.5) else "home"
    did = word.past if len(word.forms) > 1 else f"was {word.lemma}"
    frame = f"{when} %s {came} {way}, %s {did} {w.then()}"
    return Square(frame, w.titled(he, she), ("he", "she"), lemmas(word, he, she))


@phenomenon("semantics", "npi_licensing", weight=0.4, far=True)
def npi_ever_scope(w):
    """`ever` needs a `no` above it and `already` shuns one; a `no` in the relative is not above."""
    head, verb = w.couple(BEINGS, ACTING)
    number = w.rng.randrange(2)
    clause = f"{w.looks(1)} {w.draw(BEINGS).pl} {w.draw(TREATING).past}"
    noun = head.forms[number]
    licensors = (f"no {noun} that the {clause}", f"the {noun} that no {clause}")
    frame = f"%s {('has', 'have')[number]} %s {verb.participle}"
    return Square(frame, licensors, ("ever", "already"), lemmas(head, verb))


@phenomenon("semantics", "npi_licensing", weight=0.4, far=True)
def npi_either(w):
    head, verb = w.couple(BEINGS, ACTING)
    noun, could = w.rng.choice(head.forms), w.rng.choice(("could", "would", "should", "will"))
    frame = f"the {noun} {could} %s {verb.lemma} {w.where()} %s"
    return Square(frame, ("not", ""), ("either", "too"), lemmas(head, verb))


@phenomenon("syntax", "filler_gap_dependency", weight=0.3, far=True)
def wh_that_gap(w):
    """`what` needs an object to be missing, `that` needs it to be there."""
    head, verb = w.couple(BEINGS, HANDLING)
    knower = f"{w.noun_phrase(BEINGS)} {w.draw(KNOWING).lemma}"
    frame = f"{knower} %s the {w.rng.choice(head.forms)} {w.where()} {verb.past} %s {w.then()}"
    targets = ("", f"{w.noun_phrase(THINGS, looks=1)}")
    return Square(frame, ("what", "that"), targets, lemmas(head, verb), swap="licensor")


@phenomenon("syntax", "argument_structure", weight=0.3)
def transitivity(w):
    head, handling, acting = w.couple(BEINGS, HANDLING, ACTING)
    thing = f"{w.noun_phrase(THINGS, looks=1)}"
    frame = f"the {w.rng.choice(head.forms)} %s %s {w.then()}"
    targets, held_out = (thing, f"{w.rng.choice(NEAR)} {thing}"), lemmas(head, handling, acting)
    return Square(frame, (handling.past, acting.past), targets, held_out, swap="licensor")


@phenomenon("semantics", "argument_structure", weight=0.3, far=True)
def animate_subject(w):
    (being, acting), (thing, decaying) = w.couple(BEINGS, ACTING), w.couple(THINGS, DECAYING)
    number = w.rng.randrange(2)
    nouns, held_out = (being.forms[number], thing.forms[number]), lemmas(being, acting)
    frame = f"the %s {w.where()} %s {w.then()}"
    return Square(frame, nouns, (acting.past, decaying.past), held_out + lemmas(thing, decaying))


@phenomenon("syntax", "coordination", weight=0.6, far=True)
def correlative(w):
    head, verb = w.couple(BEINGS, ACTING)
    second = f"the {w.rng.choice(head.forms)} {verb.past} {w.then()}"
    frame = f"%s {w.noun_phrase(BEINGS)} {w.where()} %s {second}"
    return Square(frame, ("either", "neither"), ("or", "nor"), lemmas(head, verb))


UIDS = tuple(PHENOMENA)
LONG_DISTANCE = frozenset(uid for uid, entry in PHENOMENA.items() if entry.far)
CONSTRUCTIONS = Deck(PHENOMENA.values(), weights=[entry.weight for entry in PHENOMENA.values()])


# -------------------------------------------------------------------------------------- sentences


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def story(w: Writer) -> str:
    """A sentence about a hero of the document, by pronoun where the last one was too."""
    hero = w.mentioned if w.mentioned and w.maybe(0.6) else w.rng.choice(w.heroes)
    who = hero.pronoun if hero is w.mentioned and w.maybe(0.7) else hero.name
    w.mentioned = hero
    was = "were" if hero.pronoun == "they" else "was"
    if hero.pronoun == "it":
        happened = (
            f"{w.draw(DECAYING).past} {w.then()}",
            f"stood {w.where(looks=1)}",
            f"was {w.draw(LASTING).lemma}",
        )
    else:
        own = f"{hero.possessive} {w.rng.choice(w.draw(THINGS).forms)}"
        did = f"{hero.pronoun} {w.draw(ACTING).past}"
        happened = (
            f"{w.draw(ACTING).past} {w.where()}",
            f"{w.draw(HANDLING).past} {own} {w.where(looks=0)}",
            f"had {w.draw(IRREGULAR_HANDLING).participle} {own}",
            f"{w.draw(TREATING).past} {hero.oneself} {w.then()}",
            f"{w.draw(TREATING).past} {w.noun_phrase(BEINGS)} and {did} {w.then()}",
            f"{was} {w.draw(FEELING).lemma} because {did}",
        )
    return f"{who} {w.rng.choice(happened)}"


def statement(w: Writer) -> str:
    """Agreement with nothing in between, and the nouns of the domain's tail."""
    w.mentioned = None
    number = w.rng.randrange(2)
    if w.maybe(0.5):
        return agreement(w, "", *subject(w)).cell(number, number)
    tail, who = w.draw(TAILS[w.domain]), w.draw(w.rng.choice((HIS, HERS))).lemma
    noun = tail.forms[number]
    said = (
        f"there {(f'is {a(noun)}', f'are some {noun}')[number]} {w.where()}",
        f"{who} {w.draw(HANDLING).past} {w.rng.choice(DETERMINERS)[number]} {noun} {w.then()}",
        f"the {noun} of {w.draw(INVENTED)} {('was', 'were')[number]} {w.draw(ANY_LOOK).lemma}",
    )
    return w.rng.choice(said)


def question(w: Writer) -> str:
    w.mentioned = None
    number = w.rng.randrange(2)
    noun, who = w.draw(w.rng.choice((BEINGS, THINGS))).forms[number], w.noun_phrase(BEINGS)
    asked = (
        f"where {('is', 'are')[number]} the {noun}",
        f"what did {who} {w.draw(HANDLING).lemma} {w.where(looks=0)}",
        f"did {who} {w.draw(HANDLING).lemma} {w.noun_phrase(THINGS)}",
        f"who {w.draw(TREATING).past} {who}",
    )
    return w.rng.choice(asked)


def sentence(w: Writer, kinds=(story, story, statement)) -> str:
    """One training sentence, without its capital and its full stop."""
    mentioned = w.mentioned
    while True:
        w.mentioned = mentioned  # a sentence that leaks was never said
        if w.maybe(0.65):
            w.mentioned, twin = None, w.rng.randrange(2)
            text = CONSTRUCTIONS.draw(w.rng).make(w).cell(twin, twin)
        else:
            text = " ".join(w.rng.choice(kinds)(w).split())
        if not leaks(text):
            return text


def finish(text: str) -> str:
    """A capital, and a full stop or a question mark."""
    asks = text.startswith(("where ", "what ", "did ", "who "))
    return f"{text[0].upper()}{text[1:]}{'?' if asks else '.'}"


# -------------------------------------------------------------------------------------- documents


def paragraph(w: Writer, least: int, most: int, kinds=(story, story, statement)) -> str:
    return " ".join(finish(sentence(w, kinds)) for _ in range(w.rng.randint(least, most)))


TALK = (story, statement, question)


def utterance(w: Writer) -> str:
    """Child-directed speech as CHILDES writes it: no capital, a space before the full stop."""
    text = sentence(w, TALK)
    return f"{text} {finish(text)[-1]}"


def turn(w: Writer) -> str:
    return f"{w.rng.choice(FILLERS)}, {sentence(w)}. {paragraph(w, 0, 2, TALK)}".rstrip()


def article(w: Writer) -> list[str]:
    title, kind = w.draw(INVENTED), f"{w.draw(ANY_LOOK).lemma} {w.draw(TAILS[w.domain]).sg}"
    first = f"{title} is {a(kind)} in {w.draw(INVENTED)}. It was named in {w.rng.randint(1500, 1999)}."
    body = [paragraph(w, 3, 6, (statement, statement, story)) for _ in range(w.rng.randint(1, 3))]
    return [f"= = = {title} = = =", f"{first} {body[0]}", *body[1:]]


LINES: dict[str, Callable[[Writer], list[str]]] = {
    "bnc_spoken": lambda w: [paragraph(w, 1, 3, TALK) for _ in range(12)],
    "childes": lambda w: [f"*{'CHI' if i % 2 else 'MOT'}:\t{utterance(w)}" for i in range(20)],
    "gutenberg": lambda w: [paragraph(w, 4, 8) for _ in range(w.rng.randint(3, 6))],
    "open_subtitles": lambda w: [finish(sentence(w, TALK)) for _ in range(w.rng.randint(8, 24))],
    "simple_wiki": article,
    "switchboard": lambda w: [f"{'AB'[i % 2]}:\t{turn(w)}" for i in range(12)],
}


def write_corpus(folder: str | Path, words: int, seed: int) -> dict[str, int]:
    """Write `<domain>.train` for each domain, about `words` whitespace words in all.

    Returns the words written per domain. The same seed writes the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for domain, share in SHARES.items():
        writer, documents, count = Writer(f"{seed} {domain}", domain), [], 0
        while count < share * words:
            writer.new_document()
            documents.append("\n".join(LINES[domain](writer)) + "\n")
            count += len(documents[-1].split())
        (folder / f"{domain}.train").write_text("\n".join(documents), encoding="utf-8")
        written[domain] = count
    return written


def minimal_pairs(uid: str, seed: int, count: int) -> list[dict]:
    """`count` rows of one phenomenon in BLiMP's format; twins follow each other."""
    entry, writer = PHENOMENA[uid], Writer(f"{seed} {uid}", unseen=True)
    squares: dict[Square, None] = {}
    while 2 * len(squares) < count:
        squares[entry.make(writer)] = None
    rows = []
    for square, twin in product(squares, range(2)):
        good, bad = square.pair(twin)
        rows.append(
            {
                "sentence_good": finish(good),
                "sentence_bad": finish(bad),
                "field": entry.field,
                "linguistics_term": entry.term,
                "UID": uid,
                "simple_LM_method": True,
                "one_prefix_method": square.swap == "target",
                "two_prefix_method": square.swap == "licensor",
                "lexically_identical": False,
                "pairID": str(len(rows)),
                "long_distance": entry.far,
                "held_out": square.held_out,
            }
        )
    return rows


def write_minimal_pairs(folder: str | Path, seed: int, per_phenomenon: int) -> dict[str, int]:
    """Write `<UID>.jsonl` for each phenomenon; returns the rows written per UID.

    `per_phenomenon` must be even, because pairs come in twins.
    """
    if per_phenomenon < 2 or per_phenomenon % 2:
        raise ValueError(f"per_phenomenon must be even (pairs come in twins), not {per_phenomenon}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for uid in UIDS:
        lines = (json.dumps(row) + "\n" for row in minimal_pairs(uid, seed, per_phenomenon))
        (folder / f"{uid}.jsonl").write_text("".join(lines), encoding="utf-8")
    return dict.fromkeys(UIDS, per_phenomenon)
