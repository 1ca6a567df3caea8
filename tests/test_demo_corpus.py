"""The demo corpus is reproducible, looks like BabyLM, and its pairs test what they claim to test."""

import json
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from babylm.demo_corpus import (
    BEINGS,
    COMBINED,
    DOMAINS,
    LONG_DISTANCE,
    PHENOMENA,
    PROPER,
    RESERVED_FORMS,
    UIDS,
    Writer,
    reserved,
    with_ending,
    write_corpus,
    write_minimal_pairs,
)
from babylm.scoring import NgramModel

WORDS, PAIRS = 400_000, 200


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    counts = write_corpus(folder, WORDS, seed=1)
    texts = {domain: (folder / f"{domain}.train").read_text("utf-8") for domain in DOMAINS}
    assert counts == {domain: len(text.split()) for domain, text in texts.items()}
    return texts


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    assert write_minimal_pairs(folder, seed=1, per_phenomenon=PAIRS) == dict.fromkeys(UIDS, PAIRS)
    assert {path.stem for path in folder.iterdir()} == set(UIDS)
    return {uid: [json.loads(line) for line in (folder / f"{uid}.jsonl").read_text().splitlines()] for uid in UIDS}


@pytest.fixture(scope="module")
def sentences(texts):
    """Every training sentence as a list of lower-cased words (names keep their capital)."""
    found = []
    for text in texts.values():
        text = re.sub(r"^\*[A-Z]+:\t|^[AB]:\t[A-Za-z ]+,", "", text, flags=re.MULTILINE)
        for sentence in re.split(r"[.?\n]", text):
            if words := words_of(sentence):
                found.append(words)
    return found


def words_of(sentence: str) -> list[str]:
    words = re.findall(r"[A-Za-z]+", sentence)
    return [word if word in PROPER else word.lower() for word in words]


def all_forms() -> dict[str, tuple[str, ...]]:
    decks = [deck for heads, classes in COMBINED for deck in (heads, *classes)]
    return {word.lemma: word.forms for deck in decks for word in deck.words}


# ------------------------------------------------------------------------------------- the corpus


def test_same_seed_same_bytes_other_seed_other_text(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_corpus(tmp_path / name, 6_000, seed)
        write_minimal_pairs(tmp_path / name, seed, 20)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == len(DOMAINS) + len(UIDS)
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_about_as_many_words_as_asked_for_in_unequal_shares(texts):
    counts = {domain: len(text.split()) for domain, text in texts.items()}
    assert sum(counts.values()) == pytest.approx(WORDS, rel=0.01)
    assert counts["childes"] > counts["gutenberg"] > counts["bnc_spoken"] > counts["switchboard"]


@pytest.mark.parametrize(
    ("domain", "first", "line"),
    [
        ("childes", r"\*MOT:\t", r"\*(MOT|CHI):\t\S.* [.?]"),
        ("switchboard", r"A:\t", r"[AB]:\t[A-Z].*[.?]"),
        ("simple_wiki", r"= = = \w+ = = =\n[A-Z]", r"= = = \w+ = = =|[A-Z].*\."),
        ("gutenberg", r"[A-Z]", r"[A-Z].*\."),
        ("open_subtitles", r"[A-Z]", r"[A-Z][^.?]*[.?]"),
        ("bnc_spoken", r"[A-Z]", r"[A-Z].*[.?]"),
    ],
)
def test_format_of_each_domain(texts, domain, first, line):
    text = texts[domain]
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert "\n\n\n" not in text and "  " not in text and "%" not in text
    documents = text.rstrip("\n").split("\n\n")
    assert len(documents) > 30
    for document in documents:
        assert re.match(first, document)
        for one in document.split("\n"):
            assert re.fullmatch(line, one), one


def test_documents_keep_talking_about_the_same_words(texts):
    """A noun that occurs in a document is much likelier than elsewhere to occur in it again."""
    documents = texts["gutenberg"].split("\n\n")
    nouns = {form for word in BEINGS.words for form in word.forms}
    halves = [document.split("\n", 2) for document in documents]
    sets = [[nouns & set(words_of(half)) for half in parts[:2]] for parts in halves]
    inside = np.mean([len(a & b) for a, b in sets])
    across = np.mean([len(a & c) for (a, _), (_, c) in pairwise(sets)])
    assert inside > 1.3 * across


def test_vocabulary_has_a_zipfian_tail(sentences):
    counts = sorted(Counter(w for words in sentences for w in words).values(), reverse=True)
    assert len(counts) > 1_500
    assert sum(count <= 5 for count in counts) > 500
    assert sum(count == 1 for count in counts) > 100
    assert sum(counts[:100]) > 0.5 * sum(counts)


def test_english_morphology():
    plurals = {"box": "boxes", "church": "churches", "baby": "babies", "boy": "boys", "dog": "dogs"}
    pasts = {"bake": "baked", "cry": "cried", "pray": "prayed", "wait": "waited"}
    assert {word: with_ending(word, "s") for word in plurals} == plurals
    assert {word: with_ending(word, "ed") for word in pasts} == pasts


NUMBER = {
    "singular": {form for lemma in BEINGS.words for form in lemma.forms[:1]},
    "plural": {form for lemma in BEINGS.words for form in lemma.forms[1:]},
}


def test_training_sentences_are_grammatical(sentences):
    """No determiner, copula or reflexive next to a noun of the other number, no stray licensee."""
    singular, plural = NUMBER["singular"], NUMBER["plural"]
    agreeing = 0
    for words in sentences:
        for one, two in pairwise(words):
            assert not (one in ("this", "every", "one", "a") and two in plural), words
            assert not (one in ("these", "those", "several", "two") and two in singular), words
            assert not (one == "a" and two[0] in "aeiou"), words
        if words[0] == "the" and words[1] in singular | plural and words[2] in ("is", "are"):
            agreeing += 1
            assert (words[2] == "is") == (words[1] in singular), words
        assert "ever" not in words or words[0] == "no", words
        assert "either" not in words[1:] or "not" in words, words
        assert "nor" not in words or words[0] == "neither", words
        if words[0] == "the" and words[1] in singular and "themselves" in words:
            raise AssertionError(words)
    assert agreeing > 200


# -------------------------------------------------------------------------------------- the pairs


def test_rows_are_blimp_rows(pairs):
    assert len(UIDS) >= 12
    assert set(UIDS) > LONG_DISTANCE and len(LONG_DISTANCE) >= 8
    for uid, rows in pairs.items():
        assert [row["pairID"] for row in rows] == [str(i) for i in range(PAIRS)]
        for row in rows:
            assert row["UID"] == uid
            assert row["sentence_good"] != row["sentence_bad"]
            assert row["long_distance"] == (uid in LONG_DISTANCE)
            assert {"field", "linguistics_term", "simple_LM_method"} < row.keys()
        assert len({row["sentence_good"] for row in rows}) > 0.95 * PAIRS


def test_odd_numbers_of_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even"):
        write_minimal_pairs(tmp_path, 1, 3)


def test_twins_have_the_same_words_on_both_sides(pairs):
    for rows in pairs.values():
        for one, two in zip(rows[::2], rows[1::2], strict=True):
            good, bad = (Counter(words_of(one[side]) + words_of(two[side])) for side in ("sentence_good", "sentence_bad"))
            assert good == bad


def test_unigram_model_is_at_chance(pairs, sentences):
    counts = Counter(word for sentence in sentences for word in sentence)
    total = math.log(counts.total())

    def score(sentence):
        return sum(math.log(counts[word]) - total for word in words_of(sentence))

    for uid, rows in pairs.items():
        gaps = [score(row["sentence_good"]) - score(row["sentence_bad"]) for row in rows]
        accuracy = np.mean([0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps])
        assert accuracy == pytest.approx(0.5), uid


def test_long_distance_means_that_five_words_do_not_reach_the_licensor(pairs):
    """The target and the four words before it look the same whether they are good or bad."""
    for uid in LONG_DISTANCE:
        for one, two in zip(pairs[uid][::2], pairs[uid][1::2], strict=True):

            def windows(side, one=one, two=two):
                found = Counter()
                for row in (one, two):
                    words = ["", "", "", "", *words_of(row[side]), ""]
                    found.update(tuple(words[i : i + 5]) for i in range(len(words) - 4))
                return found

            assert windows("sentence_good") == windows("sentence_bad"), one


def test_held_out_combinations_never_meet_in_a_training_sentence(pairs, sentences):
    forms = all_forms()
    promised = {tuple(combo) for rows in pairs.values() for r in rows for combo in r["held_out"]}
    assert len(promised) > 100
    assert all(reserved(*combo) for combo in promised)
    forbidden = {}
    for noun, partner in promised:
        for form in forms[noun]:
            forbidden.setdefault(form, set()).update(forms[partner])
    for words in sentences:
        for word in words:
            assert forbidden.get(word, set()).isdisjoint(words), words


def test_held_out_combinations_are_in_the_pairs(pairs):
    forms = all_forms()
    for rows in pairs.values():
        for one, two in zip(rows[::2], rows[1::2], strict=True):
            words = set(words_of(one["sentence_good"]) + words_of(two["sentence_good"]))
            for combo in one["held_out"]:
                assert all(words & set(forms[lemma]) for lemma in combo), (one, combo)


def test_no_pair_is_a_training_sentence(pairs, sentences):
    seen = {" ".join(words) for words in sentences}
    for rows in pairs.values():
        for row in rows:
            for side in ("sentence_good", "sentence_bad"):
                assert " ".join(words_of(row[side])) not in seen


def test_words_of_the_pairs_are_frequent_in_the_text_in_both_numbers(pairs, sentences):
    counts = Counter(word for sentence in sentences for word in sentence)
    used = {w for rows in pairs.values() for row in rows for w in words_of(row["sentence_good"])}
    rare = {word: counts[word] for word in used if counts[word] < 30}
    assert not rare
    for deck, _ in COMBINED[:2]:
        for word in deck.words:
            assert min(counts[form] for form in word.forms) >= 30, word


def test_every_word_still_has_most_of_its_combinations():
    """The hold-out is a small share, so no word is known from the pairs alone."""
    partners = len({f for _, classes in COMBINED for d in classes for w in d.words for f in w.forms})
    assert max(len(forms) for forms in RESERVED_FORMS.values()) < partners / 3


def test_pairs_of_each_phenomenon_contrast_in_one_place_only(pairs):
    for uid, rows in pairs.items():
        row = rows[0]
        square = PHENOMENA[uid].make(Writer("1", unseen=True))
        assert square.cell(0, 0) != square.cell(1, 1)
        words = [words_of(row[side]) for side in ("sentence_good", "sentence_bad")]
        assert sum((Counter(words[0]) - Counter(words[1])).values()) <= 3


# ------------------------------------------------------------------------------- the n-gram model


@pytest.fixture(scope="module")
def stream(texts):
    """The text of one domain as word ids."""
    words = texts["gutenberg"].split()
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return np.array([ids[word] for word in words]), len(ids)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_probabilities_sum_to_one(order):
    rng = np.random.default_rng(order)
    vocabulary = 40
    ids = np.minimum(rng.zipf(1.5, 4_000), 30)  # tokens 0 and 31..39 never occur
    model = NgramModel(order, vocabulary).fit(ids)
    contexts = [[], [1], ids[:4], ids[-4:], ids[100:104], [1, 1, 1, 1], [39, 2], [2, 39], [0] * 7]
    for context in contexts:
        rows = [model.logprobs(np.array([*context, w]))[-1] for w in range(vocabulary)]
        assert np.exp(rows).sum() == pytest.approx(1.0, abs=1e-9)


def test_ngram_matches_the_formula_by_hand():
    """Bigrams of a b a b b: one bigram seen twice, so the discounts fall back to 0.75."""
    model = NgramModel(2, 3).fit(np.array([0, 1, 0, 1, 1]))
    # Continuation counts: a follows {b}, b follows {a, b}; 2 * 0.75 / 3 goes to the uniform 1/3.
    b = (2 - 0.75) / 3 + 0.5 / 3
    # After a: b twice out of two.
    assert np.exp(model.logprobs(np.array([0, 1]))[1]) == pytest.approx((2 - 0.75) / 2 + 0.375 * b)


def test_ngram_learns_context(stream):
    ids, vocabulary = stream
    train, held_out = ids[:-10_000], ids[-10_000:]
    loss = {order: -NgramModel(order, vocabulary).fit(train).logprobs(held_out).mean() for order in (1, 2, 3, 5)}
    assert loss[1] > loss[2] + 0.5 > loss[3] + 0.5
    assert loss[5] < loss[2]
    assert loss[1] < math.log(vocabulary)


def test_ngram_scores_do_not_depend_on_what_follows(stream):
    ids, vocabulary = stream
    model = NgramModel(3, vocabulary).fit(ids[:20_000])
    whole = model.logprobs(ids[30_000:30_100])
    assert np.array_equal(whole[:50], model.logprobs(ids[30_000:30_050]))
    assert np.allclose(whole[10:], model.logprobs(ids[30_008:30_100])[2:])
    assert np.isfinite(whole).all()


def test_ngram_refuses_what_it_cannot_score():
    model = NgramModel(2, 10)
    with pytest.raises(RuntimeError, match="fit"):
        model.logprobs(np.array([1]))
    with pytest.raises(ValueError, match="empty"):
        model.fit(np.array([], dtype=int))
    with pytest.raises(ValueError, match="lie in"):
        model.fit(np.array([1, 10]))
    assert NgramModel(5, 10).fit(np.array([3])).logprobs(np.array([3, 4])).shape == (2,)
