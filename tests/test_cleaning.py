"""Cleaning removes markup and artefacts, never language, and never the boundary between two documents."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babylm.cleaning import DEFAULT_RULES, DOMAIN_RULES, RULES, Cleaner, domain_of, rules_for

IN_NO_DEFAULT = {"plain_headings", "speaker_labels"}

# For each rule: lines it must clean (None: it drops the line), and lines of language it must leave alone.
CASES = {
    "control_characters": (
        {
            "\ufeffA to\u00adad sat\u200b.": "A toad sat.",
            "It\x92s \x93fine\x94.": "It’s “fine”.",
            "\x00\x1f": None,
        },
        ["naïve café ½ Ａ ﬁ", "می\u200cخواهم", "*CHI:\tyes ."],
    ),
    "collapse_spaces": (
        {"  two \t  owls\u00a0 ": "two owls", " *MOT: \t two  owls ": "*MOT:\ttwo owls"},
        ["*CHI:\towl .", "one owl", "ᚐ\u1680ᚁ"],
    ),
    "sentence_case": (
        {
            "WHERE DID I PUT IT? I'M LOST.": "Where did I put it? I'm lost.",
            "A:\tGOODBYE TO THE MOON": "A:\tGoodbye to the moon",
        },
        [
            "WORlD",
            "HELLO WORlD AND EVERYBODY IN IT",
            "NASA",
            "12:30 - 14:45",
            "!!!",
            "The BBC and NATO agreed.",
            "月 3",
        ],
    ),
    "html_entities": (
        {"salt &amp; sand": "salt & sand", "don&#39;t": "don't", "a&nbsp;b": "a b", "x &lt; y": "x < y"},
        ["AT&T", "R&D; and Q&A", "fish & chips", "&notes; here"],
    ),
    "html_tags": (
        {
            "a <i>grey</i> fox<br/>ran": "a grey fox ran",
            'born in 1901<ref name="x">Some book</ref> there': "born in 1901 there",
            "<onlyinclude></onlyinclude>": None,
        },
        ["x < y and y > z", "if x <b and c> d", "I <3 you"],
    ),
    "reference_marks": (
        {"It rained.[12] Then [citation needed] it froze [3].": "It rained. Then it froze."},
        ["[I]t was late", "the year [1987] UKHL 3", "an [older] fox"],
    ),
    "wiki_markup": (
        {
            "a [[moon|small moon]] of [[Saturn]]": "a small moon of Saturn",
            "[[Category:Made-up rivers]]": None,
            "{{cite web}}a '''bold''' ''river''": "a bold river",
            "see [http://example.org the site]": "see the site",
        },
        ["the dogs' and cats' bowls", "the set {1, 2}", "= = = A River = = ="],
    ),
    "empty_brackets": (
        {
            "Lake Obo () is small": "Lake Obo is small",
            "Mr Obo (; born 1901), a cook": "Mr Obo (born 1901), a cook",
        },
        ["call main() twice", "a lake (small)", "the set (1, 2)"],
    ),
    "bare_urls": ({"https://example.org/a?b=1": None}, ["see https://example.org for more"]),
    "plain_headings": ({"= = = A River = = =": "A River", "== Source ==": "Source"}, ["x = y = z", "= 3"]),
    "gutenberg_boilerplate": (
        {
            "*** START OF THE PROJECT GUTENBERG EBOOK A TOAD ***": None,
            "[Illustration: A TOAD]": None,
            "[Illustration: A TOAD WHO HAS": None,
            "* * * * *": None,
            "- 17 -": None,
            "[Pg 212]": None,
        },
        ["CHAPTER IV", "In 1880", "1880", "17 toads", "*Note the toad.", "He was fond of illustration"],
    ),
    "gutenberg_italics": (
        {
            '"_I_ never--_never_ said so."': '"I never--never said so."',
            "Oh, _come now_!": "Oh, come now!",
            "_this line goes": "this line goes",
        },
        ["snake_case_name", "Fill in ____ here", "a_b __init__ c", "Mr. _ came"],
    ),
    "ptb_escapes": (
        {"a toad -LRB- green -RRB- said `` hop ''": 'a toad ( green ) said " hop "'},
        ["it 's n't", "a -LR- b", "o'clock"],
    ),
    "childes_codes": (
        {
            "*CHI:\txxx .": None,
            "*CHI:\tmore xxx juice [laugh] .": "*CHI:\tmore juice  .",
            "*MOT:\t&=laughs and then +...": "*MOT:\t and then ...",
            "*CHI:\twoof@o (be)cause &-um (.) no .": "*CHI:\twoof because um  no .",
        },
        ["*MOT:\twhat a big dog !", "*MOT:\tgo to www.example.org .", "*MOT:\tsalt & sand .", "*XYZ:\t."],
    ),
    "childes_compounds": (
        {"*MOT:\tdeary_me the choo+choo as_well .": "*MOT:\tdeary me the choo-choo as well ."},
        ["*MOT:\tone + one", "*MOT:\t_ ."],
    ),
    "spoken_markup": (
        {
            "A:\t{F Uh, } [ I, + I ] hear it <laughter>. /": "A:\tUh, I, I hear it.",
            "B:\t((maybe)) so. *listen": "B:\tmaybe so.",
            "[unclear]": None,
        },
        [
            "B:\tabout 3 < 4 [or so]",
            "A:\teither/or, five * six, and *hey* you",
            "A:\twell, a *listening post",
        ],
    ),
    "subtitle_marks": (
        {
            "- Who's there?": "Who's there?",
            ">> It's me. (Laughter)": " It's me. ",
            "♪": None,
            "[door slams]": None,
        },
        ["-5 degrees", "a well-known man - you", "(softly) go"],
    ),
    "subtitle_credits": (
        {
            "Subtitles by A. Nobody": None,
            "Sync and corrections by someone": None,
            "Support us and become VIP member": None,
            "Advertise your product or brand here now": None,
        },
        ["The submarine was sunk by a toad.", "Subtitles are hard to read.", "Sync your watches."],
    ),
    "speaker_labels": ({"*MOT:\thop !": "hop !", "A:\tyes": "yes"}, ["CHAPTER: one", "Note: hop"]),
}

# For each domain, a line that only the domain's own rules turn into the second one.
DOMAIN_SAMPLES = {
    "aochildes": ("*MOT:\tput it as_well .", "*MOT:\tput it as well ."),
    "bnc_spoken": ("oh <laugh> yes", "oh yes"),
    "cbt": ("a toad -LRB- green -RRB- hopped", "a toad ( green ) hopped"),
    "childes": ("*CHI:\tmore xxx juice .", "*CHI:\tmore juice ."),
    "children_stories": ("said the _old_ toad,[2] and hopped", "said the old toad, and hopped"),
    "gutenberg": ("and _never_ came back[3]", "and never came back"),
    "open_subtitles": ("- No. ♪ la la", "No. la la"),
    "qed": ("THE ANGLE IS THEN NINETY DEGREES", "The angle is then ninety degrees"),
    "simple_wiki": ("Obo () is a lake.", "Obo is a lake."),
    "simple_wikipedia": ("Obo () is a lake.", "Obo is a lake."),
    "switchboard": ("A:\twell {F uh, } yes", "A:\twell uh, yes"),
    "wikipedia": ("a river in [[Obo]]", "a river in Obo"),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_removes_its_artefact_and_leaves_language(name):
    cleaned, untouched = CASES[name]
    assert {line: RULES[name].apply(line) or None for line in cleaned} == cleaned
    assert [RULES[name].apply(line) for line in untouched] == untouched


def test_every_rule_states_its_intent_and_is_used():
    assert all(rule.intent and name == rule.name for name, rule in RULES.items())
    assert set(RULES) - IN_NO_DEFAULT == {name for rules in DOMAIN_RULES.values() for name in rules}


def clean_text(text, cleaner):
    """What a caller does: blank lines are its own, the cleaner gets the others."""
    lines = (cleaner.line(line) if line else "" for line in text.split("\n"))
    return "\n".join(line for line in lines if line is not None)


@pytest.mark.parametrize("domain", DOMAIN_RULES)
def test_documents_stay_apart(domain):
    first, second = "One toad  hopped.\nIt slept.", "= = = Newts = = =\nA newt swam."
    cleaned = clean_text(f"{first}\n\n{second}", Cleaner(rules_for(domain)))
    assert [document.splitlines()[0] for document in cleaned.split("\n\n")] == [
        "One toad hopped.",
        "= = = Newts = = =",
    ]


def test_text_of_several_lines_is_refused_rather_than_glued():
    with pytest.raises(ValueError, match="one line"):
        Cleaner(DEFAULT_RULES).line("first document\n\nsecond document")


@pytest.mark.parametrize("domain", DOMAIN_RULES)
def test_mixed_case_is_never_touched(domain):
    line = "HELLO WORlD AND EVERYBODY IN IT"
    assert Cleaner(rules_for(domain)).line(line) == line


@pytest.mark.parametrize("domain", DOMAIN_RULES)
@pytest.mark.parametrize("line", ["1984, 2001.", "?!", "$ 12 + 3 %", "…"])
def test_lines_without_letters_are_safe(domain, line):
    assert Cleaner(rules_for(domain)).line(line) == line


@pytest.mark.parametrize("domain", DOMAIN_SAMPLES)
def test_each_domain_is_cleaned_by_rules_of_its_own(domain):
    sample, cleaned = DOMAIN_SAMPLES[domain]
    assert Cleaner(DEFAULT_RULES).line(sample) == sample
    assert Cleaner(rules_for(f"data/train_10M/{domain}.train")).line(sample) == cleaned


def test_every_domain_has_a_sample():
    assert set(DOMAIN_SAMPLES) == set(DOMAIN_RULES)


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("aochildes.train", "aochildes"),
        ("/data/text_data/train_10M/childes.train", "childes"),
        ("simple_wikipedia.train", "simple_wikipedia"),
        ("simple_wiki.dev", "simple_wiki"),
        ("bnc_spoken.train", "bnc_spoken"),
        ("Open-Subtitles.txt", "open_subtitles"),
        ("cbt", "cbt"),
    ],
)
def test_file_names_lead_to_their_domain(name, domain):
    assert domain_of(name) == domain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rules_for(name) == DOMAIN_RULES[domain]


def test_unknown_domain_is_reported():
    with pytest.warns(UserWarning, match=r"'gutenburg'.*did you mean 'gutenberg'"):
        assert rules_for("gutenburg.train") == DEFAULT_RULES


def test_overrides_replace_the_rules_of_the_domain_they_name():
    overrides = {"childes": ["speaker_labels"], "my_corpus": [], "default": ["html_tags"]}
    assert rules_for("childes.train", overrides) == ("speaker_labels",)
    assert rules_for("my_corpus.train", overrides) == ()
    assert rules_for("qed.train", overrides) == DOMAIN_RULES["qed"]
    with pytest.warns(UserWarning, match="'letters'"):
        assert rules_for("letters.train", overrides) == ("html_tags",)


def test_unknown_rule_is_an_error_whichever_domain_is_asked_for():
    with pytest.raises(ValueError, match=r"'childes_code'; did you mean 'childes_codes'.*collapse_spaces"):
        rules_for("gutenberg", {"childes": ["childes_code"]})
    with pytest.raises(ValueError, match="unknown cleaning rule 'nonsense'"):
        Cleaner(["nonsense"])


def test_counts_say_what_each_rule_did():
    cleaner = Cleaner(rules_for("childes"))
    lines = ["*CHI:\txxx .", "*CHI:\tas_well .", "*CHI:\tno .", "   "]
    assert [cleaner.line(line) for line in lines] == [None, "*CHI:\tas well .", "*CHI:\tno .", None]
    assert cleaner.counts["childes_codes"] == {"changed": 0, "dropped": 1}
    assert cleaner.counts["childes_compounds"] == {"changed": 1, "dropped": 0}


def test_markup_uncovered_by_other_markup_goes_too():
    assert Cleaner(rules_for("wikipedia")).line("[[File:a.png|a [[small]] lake]]the &amp;amp; sign") == "the & sign"


WORDS = [word for line, _ in DOMAIN_SAMPLES.values() for word in line.split()]
WORDS += [word for cleaned, _ in CASES.values() for line in cleaned for word in line.split()]
MARKS = [*"[](){}<>&;#=*_+-'`.,/|@ \t", "\r", "\x0c", "\x85", "\u2028", "İ", "ẞ", "&#10;", "&#8232;"]
pieces = st.sampled_from(WORDS) | st.sampled_from(MARKS) | st.text().filter(lambda text: "\n" not in text)
one_line = st.builds(str.join, st.sampled_from(["", " "]), st.lists(pieces, max_size=12))
rule_sets = st.sampled_from([*DOMAIN_RULES.values(), tuple(RULES), ()])


@settings(max_examples=1000, deadline=None)
@given(one_line, rule_sets)
def test_any_line_stays_one_line_and_cleaning_twice_changes_nothing(line, rules):
    cleaner = Cleaner(rules)
    cleaned = cleaner.line(line)
    if cleaned is not None:
        assert cleaned.strip()
        assert len(cleaned.splitlines()) == 1
        assert Cleaner(rules).line(cleaned) == cleaned


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["", *(line for line, _ in DOMAIN_SAMPLES.values())]), max_size=12).map("\n".join), rule_sets)
def test_cleaning_keeps_every_blank_line(text, rules):
    cleaned = clean_text(text, Cleaner(rules))
    assert cleaned.split("\n").count("") == text.split("\n").count("")
