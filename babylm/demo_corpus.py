"""The demo corpus: six BabyLM-shaped files and the minimal pairs that go with them.

One small English grammar writes both. Each phenomenon is a *square*: a frame with a licensor hole
and a target hole, two licensors and two targets, where the first target goes with the first
licensor and the second with the second:

                     sleeps     sleep
    the dog  near..    ok         *
    the dogs near..     *        ok

The training text uses the two grammatical cells. The minimal pairs use all four: each square gives
*twin* pairs whose good sentences together hold exactly the words of their bad sentences. So a
unigram model is right about one twin and wrong about the other, and so is every model whose window
does not reach from the target back to the licensor: both stay at 50% by construction, not by luck.

Held out is lexical: a fixed share of the (noun, verb), (noun, adjective) and (name, verb)
combinations (`reserved`, a hash, the same for every seed) never meets inside one training sentence,
and the pairs are built on those combinations only.
"""

import json
import random
import zlib
from bisect import bisect
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

# Share of sentences that show one of the phenomena; the rest is plain talk about the same things.
SQUARES_IN = {
    "bnc_spoken": 0.70,
    "childes": 0.50,
    "gutenberg": 0.75,
    "open_subtitles": 0.65,
    "simple_wiki": 0.70,
    "switchboard": 0.65,
}


# ---------------------------------------------------------------------------------------- lexicon


class Word(NamedTuple):
    """A lexeme: its citation form and its inflected forms, the citation form first."""

    lemma: str
    forms: tuple[str, ...]

    # Nouns: (singular, plural).  Verbs: (base, third person, past, participle).
    sg = property(lambda self: self.forms[0])
    pl = property(lambda self: self.forms[1])
    third = property(lambda self: self.forms[1])
    past = property(lambda self: self.forms[2])
    participle = property(lambda self: self.forms[3])


class Deck:
    """Things of one class to draw from: by the weights given, or Zipfian, 1 / (rank + shift)."""

    def __init__(self, words, shift: float = 20.0, weights=None):
        self.words = list(words)
        ranks = range(1, len(self.words) + 1)
        self.sums = list(accumulate(weights or (1 / (rank + shift) for rank in ranks)))

    def __add__(self, other: "Deck") -> "Deck":
        mixed = [w for pair in zip(self.words, other.words) for w in pair]
        return Deck(dict.fromkeys(mixed + self.words + other.words))

    def draw(self, rng: random.Random):
        return self.words[bisect(self.sums, rng.random() * self.sums[-1])]


def with_s(word: str) -> str:
    """The regular -s form of a noun or of a verb."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"


def with_ed(word: str) -> str:
    if word[-1] == "e":
        return word + "d"
    return word[:-1] + "ied" if word[-1] == "y" and word[-2] not in "aeiou" else word + "ed"


def nouns(text: str, shift: float = 20.0) -> Deck:
    """`dog mouse/mice`: regular plurals are made, irregular ones are written out."""
    split = (entry.split("/") for entry in text.split())
    return Deck((Word(e[0], (e[0], e[1] if e[1:] else with_s(e[0]))) for e in split), shift)


def verbs(text: str) -> Deck:
    """`laugh find/found take/took/taken`: a past, and a participle where it differs."""

    def verb(base, past=None, participle=None):
        past = past or with_ed(base)
        return Word(base, (base, with_s(base), past, participle or past))

    return Deck(verb(*entry.split("/")) for entry in text.split())


def plain(text: str, shift: float = 20.0) -> Deck:
    """Words without inflection: adjectives and names."""
    return Deck((Word(word, (word,)) for word in text.split()), shift)


MALE = nouns(
    "man/men boy king father uncle brother prince gentleman/gentlemen son husband grandfather "
    "policeman/policemen nephew waiter"
)
FEMALE = nouns(
    "woman/women girl queen mother aunt sister princess lady daughter wife/wives grandmother "
    "policewoman/policewomen niece waitress"
)
OTHERS = nouns(
    "child/children dog teacher doctor cat friend farmer horse mouse/mice student soldier wolf/wolves "
    "sailor rabbit neighbor goose/geese painter baker thief/thieves singer ox/oxen pilot guest "
    "writer calf/calves dancer"
)
BEINGS = OTHERS + (MALE + FEMALE)
THINGS = nouns(
    "book box lamp knife/knives letter cup leaf/leaves chair key basket loaf/loaves bottle clock "
    "coat ball shelf/shelves picture plate ring drum shirt tooth/teeth candle mirror hammer rope"
)
PLACES = nouns(
    "house door tree table river garden window bridge road school field hill church gate wall tower "
    "market lake barn shop boat castle kitchen forest"
)
IRREGULAR_BEINGS, IRREGULAR_THINGS = (
    Deck(w for w in deck.words if w.pl != with_s(w.sg)) for deck in (BEINGS, THINGS)
)

ACTING = verbs(
    "sleep/slept laugh sing/sang/sung wait smile cry dance work listen shout whisper pray travel "
    "complain sneeze cough yawn wander kneel/knelt swim/swam/swum"
)
HANDLING = verbs(
    "find/found take/took/taken carry see/saw/seen bring/brought buy/bought break/broke/broken "
    "make/made wear/wore/worn hold/held keep/kept throw/threw/thrown steal/stole/stolen repair "
    "choose/chose/chosen shake/shook/shaken tear/tore/torn fetch destroy borrow bite/bit/bitten "
    "polish"
)
IRREGULAR_HANDLING = Deck(v for v in HANDLING.words if v.past != v.participle)
TREATING = verbs(
    "wash blame praise hurt/hurt admire dress trust teach/taught describe defend amuse comfort "
    "scratch hate"
)
DECAYING = verbs("crack rust fade melt leak crumble shatter rattle decay")
FEELING = plain(
    "hungry tired happy angry ready afraid proud ill alone clever brave lonely calm polite busy asleep"
)
LASTING = plain("broken heavy clean dirty cheap empty useless wet dry missing valuable rare")
BEINGS_DO, THINGS_DO = ACTING + FEELING, DECAYING + LASTING
ANY_LOOK = plain("old little big small strange beautiful ugly tall great new")
THING_LOOK = plain("wooden red white green black blue yellow dusty golden grey round narrow")
KNOWING = plain("knew remembered heard noticed learned understood discovered forgot")

HIS = plain(
    "John Tom Peter Jack William Henry Sam George Ben Paul David Frank Robert Adam Simon Oscar Mark "
    "Edward Hugo Martin Felix Walter Victor Arthur"
)
HERS = plain(
    "Mary Anna Lucy Jane Alice Emma Sarah Rose Kate Helen Clara Grace Julia Nora Eva Susan Laura Ruth "
    "Ellen Martha Sophie Diana Betty Olive"
)

DETERMINERS = [("this", "these"), ("that", "those"), ("one", "two"), ("every", "several")]
NEAR = ("near", "behind", "beside", "opposite", "below")
THEN = ("yesterday", "again", "last night", "in the morning", "at noon", "on Sunday")
LATELY = ("again", "twice", "before", "today", "lately")
NOW = ("every day", "again", "now", "at night", "in the summer", "on Sundays")
HOW = ("often", "just", "quickly", "suddenly", "quietly")

# The tail: what each domain alone talks about. Drawn with a steeper Zipf curve, never in a pair.
TAIL = {
    "bnc_spoken": "meeting council pound budget committee motorway pub pension allotment rota kettle "
    "lorry chemist queue carpet boiler parish survey invoice tenant chairman solicitor garage fence "
    "radiator plumber bungalow cheque curtain tribunal councillor warden roundabout marrow caravan",
    "childes": "doggie bunny truck puzzle cookie crayon teddy blanket spoon train juice balloon duck "
    "puppet banana bib sticker tricycle bubble pajama kitty mitten sandbox raisin diaper giraffe "
    "block tractor pudding noodle whistle button pillow zebra monkey cracker popsicle",
    "gutenberg": "carriage parlour candlestick captain lantern mariner chamber estate cottage orchard "
    "musket abbey physician widow servant schooner parson bonnet chimney regiment corridor ravine "
    "harpoon shawl magistrate duchess hermit inkstand staircase monastery vessel squire hearth",
    "open_subtitles": "gun cop phone agent lawyer judge bomb taxi suitcase detective gangster boss "
    "ticket hostage airport passport bodyguard elevator murderer alibi warrant helicopter spaceship "
    "captain sheriff casino witness motel rifle nightclub zombie robot spy parachute",
    "simple_wiki": "city village province actor album mountain battle railway island temple "
    "empire planet museum composer glacier peninsula volcano parliament dynasty reptile physicist "
    "cathedral treaty satellite mineral molecule orchid stadium novelist fossil canal comet enzyme",
    "switchboard": "job tax credit daycare recycling lawn company jury camper budget hobby baseball "
    "insurance vacation mortgage garden carpool landfill freeway salary nursery benefit catfish "
    "warranty quilt treadmill thermostat dealership cassette orchestra",
}
SYLLABLES = (
    "bal dor fen gar hal kel lin mor nor pel ran sol tar ul ver wes",
    "a an e el i in o or",
    "burg dale den field ford ham la mont nia ra ria stead ton via wick worth",
)

FILLERS = ("Yeah", "Well", "You know", "I mean", "Right", "Oh", "So", "Um", "Uh")


def invented_names() -> list[str]:
    """Places made of syllables, in a fixed shuffled order: the far tail of the vocabulary."""
    names = ["".join(parts).capitalize() for parts in product(*(s.split() for s in SYLLABLES))]
    random.Random(0).shuffle(names)
    return names[:600]


INVENTED = Deck(invented_names(), shift=3.0)
TAILS = {domain: nouns(text, shift=2.0) for domain, text in TAIL.items()}


# --------------------------------------------------------------------------------------- hold-out

# The classes that the pairs combine.
COMBINED = [
    (BEINGS, (ACTING, HANDLING, TREATING, FEELING)),
    (THINGS, (HANDLING, DECAYING, LASTING)),
    (HIS + HERS, (ACTING,)),
]


@cache
def reserved(one: str, other: str) -> bool:
    """Whether this combination of two lemmas, in either order, is kept out of the training text."""
    return zlib.crc32(" ".join(sorted((one, other))).encode()) % 16 == 0


def _reserved_forms() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for heads, classes in COMBINED:
        for head, partner in product(heads.words, (w for deck in classes for w in deck.words)):
            if reserved(head.lemma, partner.lemma):
                for form in head.forms:
                    table.setdefault(form, set()).update(partner.forms)
    return {form: frozenset(partners) for form, partners in table.items()}


# Every form of a noun or name -> the forms that no training sentence with it contains.
RESERVED_FORMS = _reserved_forms()


def leaks(sentence: str) -> bool:
    """Whether a sentence (without its final punctuation) contains a reserved combination."""
    words = sentence.replace(",", "").split()
    return any(w in RESERVED_FORMS and not RESERVED_FORMS[w].isdisjoint(words) for w in words)


# ---------------------------------------------------------------------------------- words to phrases


class Square(NamedTuple):
    """One frame of a phenomenon: `frame` has two `%s`, for a licensor and for its target."""

    frame: str
    licensors: tuple[str, str]
    targets: tuple[str, str]
    held_out: tuple[tuple[str, str], ...]  # the lemmas whose combinations are reserved
    swap: str = "target"  # what tells the bad sentence from the good one: "target" or "licensor"

    def cell(self, licensor: int, target: int) -> str:
        """The sentence with these two: grammatical where both indices are equal."""
        return " ".join((self.frame % (self.licensors[licensor], self.targets[target])).split())

    def pair(self, twin: int) -> tuple[str, str]:
        """(good, bad) of twin 0 or 1."""
        bad = (twin, 1 - twin) if self.swap == "target" else (1 - twin, twin)
        return self.cell(twin, twin), self.cell(*bad)


class Hero(NamedTuple):
    """Someone or something that a document keeps talking about."""

    name: str
    pronoun: str
    possessive: str
    was: str


class Writer:
    """Draws words and builds phrases.

    For the training text, reserved combinations are avoided, modifiers vary in length, and each
    document has favourite words. With `unseen` (the pairs) the combinations that matter are
    reserved ones, modifiers are always long, and words come from the core lexicon only.
    """

    def __init__(self, seed: str, domain: str = "gutenberg", unseen: bool = False):
        self.rng = random.Random(seed)
        self.unseen = unseen
        self.domain = domain
        self.new_document()

    def new_document(self) -> None:
        """Forget the favourites and choose who and what this document is about."""
        self.favourites: dict[Deck, list] = {}
        self.subject: Hero | None = None
        self.heroes = [
            Hero(self.favourite(HIS).lemma, "he", "his", "was"),
            Hero(self.favourite(HERS).lemma, "she", "her", "was"),
            Hero(f"the {self.favourite(BEINGS).pl}", "they", "their", "were"),
            Hero(f"the {self.favourite(THINGS).sg}", "it", "its", "was"),
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

    def couple(self, deck: Deck, *partner_decks: Deck) -> list[Word]:
        """A word and a partner from each other deck, all of them reserved combinations or none."""
        while True:
            head = self.draw(deck)
            partners = []
            for other in partner_decks:
                fits = [w for w in other.words if reserved(head.lemma, w.lemma)] if self.unseen else 0
                partners.append(self.rng.choice(fits or (None,)) if self.unseen else self.draw(other))
            if all(w and reserved(head.lemma, w.lemma) == self.unseen for w in partners):
                return [head, *partners]

    def form(self, noun: Word) -> str:
        return self.rng.choice(noun.forms)

    def being(self) -> str:
        return self.form(self.draw(BEINGS))

    def looks(self, count: int) -> str:
        return " ".join(self.draw(deck).lemma for deck in (ANY_LOOK, THING_LOOK)[:count])

    def where(self, adjectives: int | None = None) -> str:
        """A prepositional phrase; its noun has a random number, so it attracts either way."""
        if adjectives is None:
            adjectives = 2 if self.unseen else self.rng.randrange(3)
        tail = not self.unseen and self.maybe(0.15)
        noun = self.form(self.draw(TAILS[self.domain] if tail else PLACES))
        return f"{self.rng.choice(NEAR)} the {self.looks(adjectives)} {noun}"

    def relative(self, animate: bool) -> str:
        """A relative clause in the past tense, which does not show its subject's number."""
        other = f"the {self.looks(int(self.unseen or self.maybe(0.5)))} {self.being()}"
        if not animate:
            return f"that {other} {self.draw(HANDLING).past}"
        verb = self.draw(TREATING).past
        return self.rng.choice((f"that {other} {verb}", f"who {verb} {other}"))

    def between(self) -> str:
        return self.where() if self.maybe(0.5) else self.relative(animate=True)

    def then(self) -> str:
        return self.rng.choice(THEN)


# -------------------------------------------------------------------------------------- phenomena


class Phenomenon(NamedTuple):
    make: object  # Writer -> Square
    field: str
    term: str
    far: bool
    weight: float


PHENOMENA: dict[str, Phenomenon] = {}


def phenomenon(field: str, term: str, far: bool = False, weight: float = 1.0):
    """Register a function as the phenomenon of its name; `weight`: its share in the text."""

    def register(make):
        PHENOMENA[make.__name__] = Phenomenon(make, field, term, far, weight)
        return make

    return register


def agreement(w: Writer, middle: str, heads: Deck, predicates: Deck) -> Square:
    """Subject and verb agree in number across `middle`."""
    head, word = w.couple(heads, predicates)
    if len(word.forms) == 1:
        targets, rest = w.rng.choice((("is", "are"), ("was", "were"))), word.lemma
    elif w.maybe(0.5):
        targets, rest = ("has", "have"), f"{word.participle} {w.rng.choice(LATELY)}"
    else:
        targets, rest = (word.third, word.lemma), w.rng.choice(NOW)
    return Square(f"the %s {middle} %s {rest}", head.forms, targets, ((head.lemma, word.lemma),))


def subject(w: Writer, beings: Deck = BEINGS, things: Deck = THINGS) -> tuple[Deck, Deck]:
    return (beings, BEINGS_DO) if w.maybe(0.6) else (things, THINGS_DO)


@phenomenon("syntax", "subject_verb_agreement", far=True, weight=2)
def agreement_across_pp(w):
    return agreement(w, w.where(), *subject(w))


@phenomenon("syntax", "subject_verb_agreement", far=True, weight=2)
def agreement_across_relative(w):
    heads, predicates = subject(w)
    return agreement(w, w.relative(animate=heads is BEINGS), heads, predicates)


@phenomenon("syntax", "subject_verb_agreement", far=True, weight=2)
def agreement_two_attractors(w):
    adjectives = 1 if w.unseen else w.rng.randrange(2)
    return agreement(w, f"{w.where(adjectives)} {w.where(adjectives)}", *subject(w))


@phenomenon("morphology", "irregular_forms", weight=1.5)
def irregular_plural_agreement(w):
    return agreement(w, w.where(adjectives=0), *subject(w, IRREGULAR_BEINGS, IRREGULAR_THINGS))


@phenomenon("morphology", "irregular_forms", weight=0.6)
def irregular_past_participle(w):
    thing, verb = w.couple(THINGS, IRREGULAR_HANDLING)
    how = w.rng.choice(HOW)
    frame = f"the {w.being()} %s %s the {w.looks(1)} {w.form(thing)} {w.then()}"
    held_out = ((thing.lemma, verb.lemma),)
    return Square(frame, (f"had {how}", how), (verb.participle, verb.past), held_out)


def determiner_noun(w: Writer, adjectives: int) -> Square:
    thing, verb = w.couple(THINGS, HANDLING)
    frame = f"the {w.being()} {verb.past} %s {w.looks(adjectives)} %s {w.then()}"
    return Square(frame, w.rng.choice(DETERMINERS), thing.forms, ((thing.lemma, verb.lemma),))


@phenomenon("morphology", "determiner_noun_agreement", weight=0.7)
def determiner_noun_agreement(w):
    return determiner_noun(w, adjectives=0)


@phenomenon("morphology", "determiner_noun_agreement", weight=1.5)
def determiner_noun_agreement_adjectives(w):
    return determiner_noun(w, adjectives=2)


@phenomenon("syntax_semantics", "anaphor_agreement", far=True, weight=1.5)
def reflexive_number(w):
    deck, singular = w.rng.choice(((MALE, "himself"), (FEMALE, "herself")))
    head, verb = w.couple(deck, TREATING)
    frame = f"the %s {w.between()} {verb.past} %s {w.then()}"
    return Square(frame, head.forms, (singular, "themselves"), ((head.lemma, verb.lemma),))


@phenomenon("syntax_semantics", "anaphor_agreement", far=True, weight=2)
def reflexive_gender(w):
    verb, he, she = w.couple(TREATING, MALE, FEMALE)
    frame = f"the %s {w.between()} {verb.past} %s {w.then()}"
    held_out = ((he.lemma, verb.lemma), (she.lemma, verb.lemma))
    return Square(frame, (he.sg, she.sg), ("himself", "herself"), held_out)


@phenomenon("syntax_semantics", "pronoun_anaphora", far=True, weight=2.5)
def pronoun_gender(w):
    verb, he, she = w.couple(ACTING, HIS, HERS)
    when, came = w.rng.choice(("when", "after", "before")), w.rng.choice(("came", "went", "walked"))
    frame = f"{when} %s {came} to the house {w.where()}, %s {verb.past} {w.then()}"
    held_out = ((he.lemma, verb.lemma), (she.lemma, verb.lemma))
    return Square(frame, (he.lemma, she.lemma), ("he", "she"), held_out)


@phenomenon("semantics", "npi_licensing", far=True, weight=0.5)
def npi_ever_scope(w):
    """`ever` needs `no` above it, `already` shuns it: a `no` inside the relative does not count."""
    head, verb = w.couple(BEINGS, ACTING)
    number = w.rng.randrange(2)
    looks, other = w.looks(int(w.unseen or w.maybe(0.5))), w.draw(BEINGS).pl
    rest = f"{looks} {other} {w.draw(TREATING).past}"
    noun = head.forms[number]
    licensors = (f"no {noun} that the {rest}", f"the {noun} that no {rest}")
    frame = f"%s {('has', 'have')[number]} %s {verb.participle}"
    return Square(frame, licensors, ("ever", "already"), ((head.lemma, verb.lemma),))


@phenomenon("semantics", "npi_licensing", far=True, weight=0.5)
def npi_either(w):
    head, verb = w.couple(BEINGS, ACTING)
    could = w.rng.choice(("could", "would", "should", "will"))
    frame = f"the {w.form(head)} {could} %s {verb.lemma} {w.where()} %s"
    return Square(frame, ("not", ""), ("either", "too"), ((head.lemma, verb.lemma),))


@phenomenon("syntax", "filler_gap_dependency", far=True, weight=0.7)
def wh_that_gap(w):
    """`what` needs a missing object and `that` a full one."""
    head, verb = w.couple(BEINGS, HANDLING)
    knower = f"the {w.looks(int(w.maybe(0.3)))} {w.being()} {w.draw(KNOWING).lemma}"
    frame = f"{knower} %s the {w.form(head)} {w.where()} {verb.past} %s {w.then()}"
    targets = ("", f"the {w.looks(int(w.maybe(0.3)))} {w.form(w.draw(THINGS))}")
    return Square(frame, ("what", "that"), targets, ((head.lemma, verb.lemma),), "licensor")


@phenomenon("syntax", "argument_structure", weight=0.5)
def transitivity(w):
    head, handling, acting = w.couple(BEINGS, HANDLING, ACTING)
    thing = f"the {w.looks(1)} {w.form(w.draw(THINGS))}"
    held_out = ((head.lemma, handling.lemma), (head.lemma, acting.lemma))
    frame = f"the {w.form(head)} %s %s {w.then()}"
    targets = (thing, f"{w.rng.choice(NEAR)} {thing}")
    return Square(frame, (handling.past, acting.past), targets, held_out, "licensor")


@phenomenon("semantics", "argument_structure", far=True, weight=0.6)
def animate_subject(w):
    (being, acting), (thing, decaying) = w.couple(BEINGS, ACTING), w.couple(THINGS, DECAYING)
    number = w.rng.randrange(2)
    held_out = ((being.lemma, acting.lemma), (thing.lemma, decaying.lemma))
    licensors = (being.forms[number], thing.forms[number])
    return Square(f"the %s {w.where()} %s {w.then()}", licensors, (acting.past, decaying.past), held_out)


@phenomenon("syntax", "coordination", far=True, weight=0.6)
def correlative(w):
    head, verb = w.couple(BEINGS, ACTING)
    frame = f"%s the {w.being()} {w.where()} %s the {w.form(head)} {verb.past} {w.then()}"
    return Square(frame, ("either", "neither"), ("or", "nor"), ((head.lemma, verb.lemma),))


UIDS = tuple(PHENOMENA)
LONG_DISTANCE = frozenset(uid for uid, p in PHENOMENA.items() if p.far)
CONSTRUCTIONS = Deck(PHENOMENA.values(), weights=[p.weight for p in PHENOMENA.values()])


# ------------------------------------------------------------------------------------- plain talk


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def story(w: Writer) -> str:
    """A sentence about one of the document's heroes, by pronoun if it was just mentioned."""
    hero = w.rng.choice(w.heroes)
    if w.subject is not None and w.maybe(0.6):
        hero = w.subject
    who = hero.pronoun if hero is w.subject and w.maybe(0.7) else hero.name
    w.subject = hero
    own = f"{hero.possessive} {w.form(w.draw(THINGS))}"
    if hero.pronoun == "it":
        what = (f"{w.draw(DECAYING).past} {w.then()}", f"stood {w.where(1)}", f"was {w.draw(LASTING).lemma}")
    else:
        what = (
            f"{w.draw(ACTING).past} {w.where()}",
            f"{w.draw(HANDLING).past} {own} {w.where(0)}",
            f"{w.draw(TREATING).past} the {w.being()} and {hero.pronoun} {w.draw(ACTING).past} {w.then()}",
            f"{hero.was} {w.draw(FEELING).lemma} because {hero.pronoun} {w.draw(HANDLING).past} {own}",
        )
    return f"{who} {w.rng.choice(what)}"


def question(w: Writer) -> str:
    w.subject = None
    noun = w.draw(BEINGS if w.maybe(0.5) else THINGS)
    number = w.rng.randrange(2)
    doer = w.being()
    asked = (
        f"where {('is', 'are')[number]} the {noun.forms[number]}",
        f"what did the {doer} {w.draw(HANDLING).lemma} {w.where(0)}",
        f"did the {doer} {w.draw(HANDLING).lemma} the {w.form(w.draw(THINGS))}",
        f"who {w.draw(HANDLING).past} {w.rng.choice(DETERMINERS)[number]} {w.draw(THINGS).forms[number]}",
    )
    return w.rng.choice(asked)


def statement(w: Writer) -> str:
    """Short sentences: the nouns of the domain's tail, and agreement without anything between."""
    w.subject = None
    tail = w.draw(TAILS[w.domain])
    number = w.rng.randrange(2)
    doer = w.draw(w.rng.choice((HIS, HERS))).lemma
    said = (
        agreement(w, "", *subject(w)).cell(number, number),
        f"there {(f'is {a(tail.sg)}', f'are some {tail.pl}')[number]} {w.where()}",
        f"{doer} {w.draw(HANDLING).past} {w.rng.choice(DETERMINERS)[number]} {tail.forms[number]}",
        f"the {tail.forms[number]} of {w.draw(INVENTED)} {('was', 'were')[number]} {w.draw(ANY_LOOK).lemma}",
    )
    return w.rng.choice(said)


def sentence(w: Writer, kinds=(story, statement, question)) -> str:
    """One training sentence, without its capital and its full stop."""
    mentioned = w.subject
    while True:
        w.subject = mentioned  # a sentence that leaked was never said
        if w.maybe(SQUARES_IN[w.domain]):
            twin = w.rng.randrange(2)
            text = CONSTRUCTIONS.draw(w.rng).make(w).cell(twin, twin)
            w.subject = None
        else:
            text = w.rng.choice(kinds)(w)
        if not leaks(text):
            return " ".join(text.split())


# ---------------------------------------------------------------------------- domains and documents


def finish(text: str) -> str:
    """A capital and a full stop, or a question mark."""
    end = "?" if text.startswith(("where ", "what ", "did ", "who ")) else "."
    return text[0].upper() + text[1:] + end


def paragraph(w: Writer, least: int, most: int, **how) -> str:
    return " ".join(finish(sentence(w, **how)) for _ in range(w.rng.randint(least, most)))


def dialogue(w: Writer, speakers: str, turn) -> list[str]:
    return [f"{speakers.split()[i % 2]}:\t{turn()}" for i in range(w.rng.randint(10, 24))]


def document(w: Writer) -> list[str]:
    """The lines of one document of the writer's domain."""
    w.new_document()
    lines = range(w.rng.randint(8, 20))
    if w.domain == "childes":

        def utterance():
            text = finish(sentence(w))
            return f"{text[0].lower() if text.split()[0] not in PROPER else text[0]}{text[1:-1]} {text[-1]}"

        return dialogue(w, "*MOT *CHI", utterance)
    if w.domain == "switchboard":
        return dialogue(w, "A B", lambda: f"{w.rng.choice(FILLERS)}, {sentence(w)}. {paragraph(w, 0, 2)}".strip())
    if w.domain == "simple_wiki":
        title, region = w.draw(INVENTED), w.draw(INVENTED)
        kind = w.draw(TAILS[w.domain]).sg
        first = f"{title} is {a(w.draw(ANY_LOOK).lemma)} {kind} in {region}. It was named in {w.rng.randint(1500, 1999)}."
        body = [paragraph(w, 3, 6, kinds=(statement, statement, story)) for _ in range(w.rng.randint(1, 3))]
        return [f"= = = {title} = = =", f"{first} {body[0]}", *body[1:]]
    if w.domain == "gutenberg":
        return [paragraph(w, 4, 8, kinds=(story, story, statement)) for _ in range(w.rng.randint(3, 6))]
    if w.domain == "bnc_spoken":
        return [paragraph(w, 1, 3) for _ in lines]
    return [finish(sentence(w)) for _ in lines]


PROPER = frozenset(word.lemma for word in (HIS + HERS).words) | frozenset(INVENTED.words)


def write_corpus(folder, words: int, seed: int) -> dict[str, int]:
    """Write `<domain>.train` for every domain, about `words` whitespace words in all.

    Returns the words written per domain. The same seed gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for domain, share in SHARES.items():
        writer, documents, count = Writer(f"{seed} {domain}", domain), [], 0
        while count < share * words:
            text = "\n".join(document(writer)) + "\n"
            documents.append(text)
            count += len(text.split())
        (folder / f"{domain}.train").write_text("\n".join(documents), encoding="utf-8")
        written[domain] = count
    return written


def minimal_pairs(uid: str, seed: int, count: int) -> list[dict]:
    """`count` rows of one phenomenon, in BLiMP's format: twins stand next to each other."""
    entry, writer, rows, seen = PHENOMENA[uid], Writer(f"{seed} {uid}", unseen=True), [], set()
    while len(rows) < count:
        square = entry.make(writer)
        if square in seen:
            continue
        seen.add(square)
        for twin in range(2):
            good, bad = (finish(text) for text in square.pair(twin))
            rows.append(
                {
                    "sentence_good": good,
                    "sentence_bad": bad,
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
    return rows[:count]


def write_minimal_pairs(folder, seed: int, per_phenomenon: int) -> dict[str, int]:
    """Write `<UID>.jsonl` for every phenomenon; returns the rows written per UID.

    `per_phenomenon` must be even, because pairs come in twins.
    """
    if per_phenomenon % 2:
        raise ValueError(f"per_phenomenon must be even (pairs come in twins), not {per_phenomenon}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for uid in UIDS:
        rows = minimal_pairs(uid, seed, per_phenomenon)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{uid}.jsonl").write_text(text, encoding="utf-8")
    return dict.fromkeys(UIDS, per_phenomenon)
