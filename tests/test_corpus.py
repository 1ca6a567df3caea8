"""Stage 1 on small raw files: what becomes a document, who is held out, what the manifest says, and what is refused."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import combine_babylm
from babylm import corpus as raw_text
from babylm import models
from babylm.config import CorpusSection
from babylm.schema import UserError
from custom_dataset import DataError, TextPart

ROOT = Path(combine_babylm.__file__).parent
PARTS = ("train", "val")


def tale(number, lines=3):
    """A document of `lines` lines of eight words, unlike any other number's."""
    return "\n".join(f"tale {number} line {line} was told by somebody{number}" for line in range(lines))


def tales(*numbers, lines=3):
    """A raw file of several documents, separated by blank lines."""
    return "\n\n".join(tale(number, lines) for number in numbers) + "\n"


def texts(folder, part, domain=None):
    """The documents of a part, read from the files by nothing but their index."""
    data = (folder / f"{part}_babylm.txt").read_bytes()
    domains = manifest(folder)["domains"]
    return [data[row["start"] : row["stop"]].decode("utf-8") for row in np.load(folder / f"{part}_documents.npy")
            if domain in (None, domains[row["domain"]])]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def contents(folder):
    """{relative path: bytes} of all files that are not locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"}


# ---- What is read -----------------------------------------------------------------------------------------------------


def test_files_of_any_name_are_read(make):
    folder = make({"Our_Letters-2.train": tales(1, 2), "childes.train": tales(3, 4)})
    assert {name: texts(folder, "train", name) for name in manifest(folder)["domains"]} == {
        "Our_Letters-2": [tale(1), tale(2)], "childes": [tale(3), tale(4)]}


def test_a_dev_set_is_read_where_there_is_no_train_file(make):
    assert manifest(make({"qed.dev": tales(1, 2)}))["domains"] == ["qed"]


def test_the_dev_set_is_left_alone_where_there_are_train_files(make):
    assert manifest(make({"qed.dev": tales(1, 2), "cbt.train": tales(3, 4)}))["domains"] == ["cbt"]


def test_a_domain_without_rules_is_pointed_out(make, capsys):
    make({"chilldes.train": tales(1, 2)}, clean=True)
    assert "note: no cleaning rules are meant for the domain 'chilldes'" in (said := capsys.readouterr().out)
    assert "did you mean 'childes'" in said


@pytest.mark.parametrize("section", [{"boundaries": {"chides": "blank"}}, {"cleaning": {"chides": ["collapse_spaces"]}}])
def test_settings_for_a_domain_that_is_not_there_are_refused(make, section):
    with pytest.raises(UserError, match=r"there is no file for chides; the files are childes\.train"):
        make({"childes.train": tales(1, 2)}, **section)


def test_a_domain_is_cleaned_by_its_own_rules(make):
    childes, wiki = "*MOT:\tlook xxx a dog_house .\n\n*CHI:\tyes .\n", "A [[dog|hound]] and xxx .\n\nB .\n"
    folder = make({"childes.train": childes, "simple_wiki.train": wiki}, clean=True)
    assert texts(folder, "train") == ["*MOT:\tlook a dog house .", "*CHI:\tyes .", "A hound and xxx .", "B ."]


def test_the_manifest_counts_what_cleaning_changed(make):
    folder = make({"childes.train": "*MOT:\tlook xxx .\n\n*CHI:\txxx .\n\n*CHI:\tyes .\n"}, clean=True)
    assert manifest(folder)["files"]["childes"]["rules"]["childes_codes"] == {"changed": 1, "dropped": 1}


# ---- What is a document -----------------------------------------------------------------------------------------------

WIKI = "= = = Ant = = =\nAnts walk.\n\n\nThey bite.\n= = = Bee = = =\n\nBees fly.\n"
ANT, BEE = "= = = Ant = = =\nAnts walk.\n\nThey bite.", "= = = Bee = = =\n\nBees fly."


@pytest.mark.parametrize(("text", "boundary", "documents"), [
    (WIKI, "heading", [ANT, BEE]),
    ("Preface.\n" + WIKI, "heading", ["Preface.", ANT, BEE]),
    ("a\nb\n\n\n\nc\n \nd", "blank", ["a\nb", "c", "d"]),
    ("a\nb\n\nc\nd\ne\n", "lines:2", ["a\nb", "c\nd", "e"]),
    ("a\n\nb\n\nc\n", "lines:2", ["a\n\nb", "c"]),
    (WIKI, "auto", [ANT, BEE]),
    ("a\nb\n\nc\n", "auto", ["a\nb", "c"]),
    ("= = = Ant = = =\nAnts.\n\nThey bite.\n", "auto", ["= = = Ant = = =\nAnts.", "They bite."]),  # one heading parts nothing
    ("\n\na\nb\nc\nd\n", "auto", ["a\nb\nc", "d"]),  # nothing to go by: chunk_lines
])
def test_a_boundary_rule_says_what_a_document_is(make, text, boundary, documents):
    assert texts(make({"qed.train": text}, chunk_lines=3, boundaries={"qed": boundary}), "train") == documents


def test_each_domain_may_have_its_own_boundary(make):
    files = {"qed.train": "a\n\nb\n", "cbt.train": "a\nb\n", "childes.train": "a\n\nb\n"}
    folder = make(files, boundaries={"qed": "lines:9", "default": "lines:1"})
    assert {name: len(texts(folder, "train", name)) for name in ("qed", "cbt", "childes")} == {"qed": 1, "cbt": 2, "childes": 2}


def test_the_manifest_names_the_boundary_that_was_found(make):
    folder = make({"qed.train": WIKI, "cbt.train": "a\n\nb", "childes.train": "a\nb"}, chunk_lines=7)
    assert {name: entry["boundary"] for name, entry in manifest(folder)["files"].items()} == {
        "qed": "heading", "cbt": "blank", "childes": "lines:7"}


def test_paragraphs_of_an_article_stay_apart_in_the_written_text(make):
    text = (make({"simple_wiki.train": WIKI}, clean=True) / "train_babylm.txt").read_text(encoding="utf-8")
    assert text == f"{ANT}\n\n{BEE}\n\n"


def test_a_long_document_is_cut_at_line_ends(make):
    folder = make({"qed.train": tales(1, 2, lines=40)}, max_document_words=100)
    assert [len(text.split()) for text in texts(folder, "train")] == [96, 96, 96, 32] * 2
    assert "\n".join(texts(folder, "train")) == tale(1, 40) + "\n" + tale(2, 40)
    assert manifest(folder)["files"]["qed"]["long_documents_cut"] == 6


def test_a_line_longer_than_a_document_may_be_is_kept_whole(make):
    line = " ".join(f"w{number}" for number in range(150))
    assert texts(make({"qed.train": f"a\n{line}\nb\n"}, max_document_words=100), "train") == ["a", line, "b"]


# ---- Who is held out --------------------------------------------------------------------------------------------------

SPLIT = {"childes.train": tales(*range(100)), "cbt.train": tales(*range(100, 160), lines=5), "qed.train": tales(200, 201)}


@pytest.mark.parametrize("part", PARTS)
def test_every_domain_of_the_corpus_is_in_both_parts(corpus, part):
    assert set(np.load(corpus / f"{part}_documents.npy")["domain"].tolist()) == set(range(6))


def test_validation_is_five_percent_of_every_domain(make):
    folder = make(SPLIT, validation_fraction=0.05)
    assert {name: len(texts(folder, "val", name)) for name in ("childes", "cbt", "qed")} == {"childes": 5, "cbt": 3, "qed": 1}


def test_the_share_is_one_of_words_not_of_documents(make):
    folder = make({"cbt.train": tales(*range(90)) + "\n" + tales(*range(90, 100), lines=90)}, validation_fraction=0.25)
    held_out, rest = (sum(len(text.split()) for text in texts(folder, part)) for part in ("val", "train"))
    assert abs(held_out / (held_out + rest) - 0.25) < 0.1


def test_a_document_is_never_torn_between_the_parts(make):
    folder = make(SPLIT, validation_fraction=0.3)
    whole = sorted(tale(number, lines) for numbers, lines in ((range(100), 3), (range(100, 160), 5), ((200, 201), 3)) for number in numbers)
    assert sorted(texts(folder, "train") + texts(folder, "val")) == whole


def test_held_out_documents_are_drawn_from_all_over_a_file(make):
    numbers = [int(text.split()[1]) for text in texts(make(SPLIT, validation_fraction=0.1), "val", "childes")]
    assert min(numbers) < 50 <= max(numbers)


def test_the_same_seed_writes_the_same_bytes(make, tmp_path):
    first, second = make(SPLIT, validation_fraction=0.1), make(SPLIT, f"corpus.output={tmp_path / 'again'}", validation_fraction=0.1)
    again = tmp_path / "again"
    assert first != again and second == first and contents(first) == contents(again)


def test_another_seed_holds_out_other_documents(make, tmp_path):
    first = make(SPLIT, validation_fraction=0.1)
    make(SPLIT, "seed=4", f"corpus.output={tmp_path / 'other'}", validation_fraction=0.1)
    assert set(texts(first, "val", "childes")) != set(texts(tmp_path / "other", "val", "childes"))


def test_without_validation_every_document_is_for_training(make):
    folder = make(SPLIT, validation_fraction=0)
    assert len(texts(folder, "train")) == 162 and texts(folder, "val") == []


def test_an_empty_part_says_how_it_came_to_be_empty(make):
    with pytest.raises(DataError, match=r"holds no documents.*validation_fraction.*0\.0"):
        TextPart(make(SPLIT, validation_fraction=0), "val")


def test_an_evaluation_corpus_holds_out_everything(make, corpus):
    folder = make(SPLIT, f"tokenizer.path={corpus / 'tokenizer'}", validation_fraction=1)
    assert len(texts(folder, "val")) == 162 and texts(folder, "train") == []


def test_a_domain_of_one_document_is_named(make):
    with pytest.raises(UserError, match=r"cbt.*single document"):
        make({"qed.train": tales(1, 2), "cbt.train": tales(3)}, validation_fraction=0.1)


def test_a_smaller_corpus_draws_from_every_domain_by_its_share(make):
    folder = make(SPLIT, max_words=1000, validation_fraction=0.1)
    words = {name: sum(len(text.split()) for part in PARTS for text in texts(folder, part, name)) for name in ("childes", "cbt")}
    assert words["childes"] + words["cbt"] <= 1000 and abs(words["childes"] - words["cbt"]) < 100  # they are equally long
    assert all(texts(folder, part, "childes") for part in PARTS)


def test_a_smaller_corpus_takes_whole_documents(make):
    drawn = texts(make(SPLIT, max_words=500), "train")
    assert set(drawn) < {tale(number) for number in range(202)} | {tale(number, 5) for number in range(202)}


# ---- Duplicates -------------------------------------------------------------------------------------------------------

LONG = "once upon a time there was a very old and very tired king"  # 13 words: a long line
REPEATED = {"qed.train": f"{LONG}\n\n" * 20 + tales(1, 2, 3)}


def test_documents_that_stand_in_both_parts_are_counted(make):
    folder = make(REPEATED, validation_fraction=0.3)
    assert LONG in texts(folder, "val") and LONG in texts(folder, "train")
    assert manifest(folder)["duplicates"] == {"documents": 1, "long_lines": 1, "long_lines_in_validation": 1, "dropped_from_train": 0}


def test_documents_that_validation_holds_are_left_out_of_training_on_request(make):
    folder = make(REPEATED, validation_fraction=0.3, drop_duplicates=True)
    assert LONG in texts(folder, "val") and LONG not in texts(folder, "train") and texts(folder, "train")
    counted = texts(folder, "val").count(LONG) + manifest(folder)["duplicates"]["dropped_from_train"]
    assert counted == 20


def test_distinct_documents_are_no_duplicates(make):
    assert manifest(make(SPLIT, validation_fraction=0.2))["duplicates"]["documents"] == 0


# ---- The manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_the_manifest_counts_what_is_in_the_files(corpus, part):
    entry, path = manifest(corpus)["parts"][part], corpus / f"{part}_babylm.txt"
    documents = texts(corpus, part)
    assert entry["file"] == path.name
    assert entry["documents"] == len(documents) and entry["words"] == sum(len(text.split()) for text in documents)
    assert entry["words"] == len(path.read_text(encoding="utf-8").split()), "nothing stands between the documents"
    assert entry["bytes"] == path.stat().st_size
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("part", PARTS)
def test_the_manifest_counts_every_domain(corpus, part):
    for name, entry in manifest(corpus)["parts"][part]["domains"].items():
        documents = texts(corpus, part, name)
        assert entry == {"documents": len(documents), "words": sum(len(text.split()) for text in documents),
                         "bytes": sum(len(text.encode()) for text in documents)}


@pytest.mark.parametrize("part", PARTS)
def test_the_index_counts_the_words_of_every_document(corpus, part):
    assert [len(text.split()) for text in texts(corpus, part)] == np.load(corpus / f"{part}_documents.npy")["words"].tolist()


def test_the_manifest_identifies_the_raw_files(corpus, raw):
    for name, entry in manifest(corpus)["files"].items():
        data = (raw / f"{name}.train").read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))


# ---- The tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def words_of_their_own(make):
    """A corpus in which every document repeats one word that no other document has."""
    names = ["".join(pair) + "u" for pair in zip("bdfgklmnpr" * 5, "aeiou" * 10, strict=True)]
    names = sorted({name + tail for name in names for tail in ("zzy", "xxo", "qqi", "vvw")})[:40]
    raw = "\n\n".join(" ".join([name] * 60) for name in names)
    return make({"qed.train": raw}, "tokenizer.vocab_size=600", validation_fraction=0.3)


def test_the_tokenizer_is_trained_on_training_text_only(words_of_their_own):
    vocabulary = models.load_tokenizer(words_of_their_own / "tokenizer").get_vocab()
    known = {part: [text for text in texts(words_of_their_own, part) if f"Ġ{text.split()[0]}" in vocabulary] for part in PARTS}
    assert known["train"] == texts(words_of_their_own, "train") and known["val"] == []


def test_the_manifest_says_how_much_text_the_tokenizer_saw(corpus):
    entry = manifest(corpus)["tokenizer"]
    assert (entry["source"], entry["trained_on_words"]) == ("trained here", manifest(corpus)["parts"]["train"]["words"])


def test_every_entry_lies_within_the_vocabulary_size(tokenizer):
    ids = tokenizer.get_vocab().values()
    assert len(tokenizer) == 512 and sorted(ids) == list(range(512))


def test_special_tokens_lie_within_the_vocabulary(tokenizer):
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(specials) == 3 and max(specials) < 512


def test_the_saved_tokenizer_prepends_the_start_token(tokenizer):
    assert tokenizer("a dog").input_ids == [tokenizer.bos_token_id, *tokenizer("a dog", add_special_tokens=False).input_ids]


def test_gpt2_from_a_local_folder_keeps_its_ids(make, shared):
    folder = make(SPLIT, f"tokenizer.path={shared / 'data' / 'gpt2_tokenizer'}", validation_fraction=0.1)
    saved = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert saved("Hello world", add_special_tokens=False).input_ids == [15496, 995] and len(saved) == 50257
    assert manifest(folder)["tokenizer"]["trained_on_words"] == 0


def test_an_empty_tokenizer_is_refused(make, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (empty / "vocab.json").write_text("{}")
    (empty / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=rf"tokenizer at {re.escape(str(empty))}"):
        make(SPLIT, f"tokenizer.path={empty}")


def test_a_missing_tokenizer_is_named_before_any_work(make, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*nowhere"):
        make(SPLIT, f"tokenizer.path={tmp_path / 'nowhere'}")
    assert not (tmp_path / "corpus").exists()


# ---- Running it again -------------------------------------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(make, capsys):
    before = contents(make(SPLIT, validation_fraction=0.1))
    capsys.readouterr()
    folder = make({}, validation_fraction=0.1)
    assert "already holds this corpus: nothing to do" in capsys.readouterr().out and contents(folder) == before


def test_raw_files_may_move(make, tmp_path, capsys):
    make(SPLIT)
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    make({}, f"corpus.input={tmp_path / 'elsewhere'}")
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("files", "override", "difference"), [
    ({}, "seed=4", "seed"), ({}, "corpus.validation_fraction=0.2", "corpus.validation_fraction"),
    ({}, "tokenizer.vocab_size=301", "tokenizer.vocab_size"), ({"qed.train": tales(7, 8)}, "seed=3", "files"),
])
def test_a_corpus_made_otherwise_is_refused_and_untouched(make, files, override, difference):
    folder = make(SPLIT)
    before = contents(folder)
    with pytest.raises(UserError, match=rf"made with other settings or files \({difference}\)"):
        make(files, override)
    assert contents(folder) == before


def test_a_corpus_made_with_another_tokenizer_of_the_same_path_is_refused(make, corpus, tmp_path):
    ours = tmp_path / "tokenizer"
    shutil.copytree(corpus / "tokenizer", ours)
    make(SPLIT, f"tokenizer.path={ours}")
    models.save_tokenizer(models.train_tokenizer(["other words"] * 9, 300, 2), ours)
    with pytest.raises(UserError, match="made with other settings or files"):
        make({}, f"tokenizer.path={ours}")


def test_fresh_moves_the_old_corpus_aside(make, tmp_path):
    before = contents(make(SPLIT))
    make({}, "seed=4", "fresh=true", validation_fraction=0.1)
    make({}, "seed=5", "fresh=true")
    assert contents(tmp_path / "corpus-old1") == before and manifest(tmp_path / "corpus-old2")["seed"] == 4
    assert manifest(tmp_path / "corpus")["seed"] == 5


def test_a_folder_of_other_files_is_refused_and_untouched(make, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not a corpus \(thesis.txt\)"):
        make(SPLIT)
    assert contents(tmp_path / "corpus") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("damaged", ["train_babylm.txt", "val_babylm.txt", "train_documents.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_corpus_is_made_again(make, damaged, damage):
    folder = make(SPLIT, validation_fraction=0.1)
    before = contents(folder)
    if damage == "gone":
        (folder / damaged).unlink()
    else:
        (folder / damaged).write_bytes(before[damaged][:-20])
    make({}, validation_fraction=0.1)
    assert contents(folder) == before


def test_a_corpus_that_was_not_finished_is_made_again(make):
    folder = make(SPLIT)
    before = contents(folder)
    (folder / "manifest.json").unlink()
    (folder / "train_babylm.txt").write_text("half a sent")
    assert contents(make({})) == before


def test_the_demo_corpus_never_overwrites_the_users_files(make, tmp_path):
    with pytest.raises(UserError, match="childes.train"):
        make({"childes.train": tales(1, 2)}, demo_words="1K")
    assert (tmp_path / "raw" / "childes.train").read_text() == tales(1, 2)


def test_the_demo_corpus_can_be_asked_for_twice(make, capsys):
    make({}, demo_words="1K")
    make({}, demo_words="1K")
    assert "nothing to do" in capsys.readouterr().out


# ---- Bad input --------------------------------------------------------------------------------------------------------


def test_a_folder_without_corpus_files_is_refused(make):
    with pytest.raises(UserError, match=r"raw holds no \*\.train files.*--download"):
        make({"notes.txt": "hello"})


def test_an_empty_file_is_refused(make):
    with pytest.raises(UserError, match="qed.train is empty"):
        make({"qed.train": b"", "cbt.train": tales(1, 2)})


def test_a_file_of_blank_lines_is_refused(make):
    with pytest.raises(UserError, match="qed.train holds no text"):
        make({"qed.train": "\n \n\t\n"})


LATIN = tale(1).encode() + b"\n\ncaf\xe9 au lait\n"


def test_bytes_that_are_not_utf8_are_located(make):
    with pytest.raises(DataError, match=rf"qed\.train: byte 0xe9 at offset {LATIN.index(0xE9)} is not UTF-8.*encoding_errors"):
        make({"qed.train": LATIN})


@pytest.mark.parametrize(("policy", "expected"), [("replace", "caf\ufffd au lait"), ("ignore", "caf au lait")])
def test_bytes_that_are_not_utf8_are_treated_as_asked(make, policy, expected):
    folder = make({"qed.train": LATIN}, encoding_errors=policy)
    assert texts(folder, "train") == [tale(1), expected]
    assert manifest(folder)["files"]["qed"]["undecodable_lines"] == 1


def test_windows_line_ends_make_no_difference_and_are_counted(make):
    folder = make({"qed.train": WIKI.replace("\n", "\r\n")})
    assert texts(folder, "train") == [ANT, BEE]
    assert manifest(folder)["files"]["qed"]["windows_line_ends"] == WIKI.count("\n")


@pytest.mark.parametrize(("text", "documents"), [(WIKI, [ANT, BEE]), (tales(1, 2), [tale(1), tale(2)])])
def test_a_byte_order_mark_makes_no_difference_and_is_counted(make, text, documents):
    folder = make({"qed.train": text.encode("utf-8-sig")})
    assert texts(folder, "train") == documents
    assert manifest(folder)["files"]["qed"]["byte_order_marks"] == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"]) | st.sampled_from(" é語🙂"), min_size=1),
       limit=st.integers(8, 40))
def test_a_line_longer_than_memory_allows_loses_nothing(tmp_path, text, limit):
    path, counts = tmp_path / "long.train", Counter()
    path.write_bytes(text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_text, "LONGEST_LINE", limit)
        pieces = list(raw_text.decoded_lines(path, "strict", counts))
    assert "".join(pieces) == text and len(pieces) == counts["long_lines_cut"] + 1
    assert all(len(piece.encode()) < 2 * limit for piece in pieces)


def test_a_long_line_is_cut_between_words(make, monkeypatch):
    monkeypatch.setattr(raw_text, "LONGEST_LINE", 64)
    line = " ".join(f"wörd{number}" for number in range(100))
    (text,) = texts(make({"qed.train": line}, chunk_lines=1000), "train")
    assert text.split() == line.split()


# ---- Where it cannot write ----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_named(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=rf"cannot write to {re.escape(str(tmp_path / 'file' / 'corpus'))}: .*choose another --output"):
        make(SPLIT, f"corpus.output={tmp_path / 'file' / 'corpus'}")


@pytest.mark.parametrize("room", [1_000, 12_000])  # bytes per file: the cleaned text does not fit, or its index or token store
def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(make, tmp_path, in_child, room):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        make({}, validation_fraction=0.1)

    (tmp_path / "raw").mkdir()
    for name, text in SPLIT.items():
        (tmp_path / "raw" / name).write_text(text)
    ended = in_child(work)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert re.match(r"error: .*File too large", ended.stderr)
    assert [path.name for path in (tmp_path / "corpus").rglob("*") if path.suffix == ".tmp"] == []
    assert contents(make({}, validation_fraction=0.1)) == contents(make({}, "fresh=true", validation_fraction=0.1))


# ---- The hub ----------------------------------------------------------------------------------------------------------


class StubHub(ThreadingHTTPServer):
    """Just enough of the hub's dataset endpoints, over plain HTTP; `broken` files break off in the middle."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files, broken=()):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.files, self.broken, self.sent, self.whole = files, set(broken), [], threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            hub, path = self.server, self.path.split("?")[0]
            if path.startswith("/api/datasets/org/tiny/revision/"):
                self.reply(json.dumps({"id": "org/tiny", "sha": hub.COMMIT, "siblings": []}).encode())
            elif path.startswith("/api/datasets/org/tiny/tree/"):
                self.reply(json.dumps([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                                       for name, data in hub.files.items()]).encode())
            elif (name := path.removeprefix(f"/datasets/org/tiny/resolve/{hub.COMMIT}/")) in hub.files:
                self.file(name, hub.files[name], body)
            else:
                self.reply(b"", 404)

        def file(self, name, data, body):
            hub = self.server
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            if not body:
                return self.reply(data, etag=data, body=False)
            hub.sent.append(name)
            if name in hub.broken:
                hub.whole.wait(20)  # until another file has arrived whole
                if hub.sent.count(name) > 1:
                    return self.reply(b"", 503)
                self.reply(data, etag=data, upto=len(data) // 2)
                self.close_connection = True
            else:
                self.reply(data[start:], 206 if start else 200, etag=data)
                hub.whole.set()

        def reply(self, data, status=200, etag=None, body=True, upto=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if etag is not None:
                self.send_header("ETag", f'"{hashlib.sha1(etag).hexdigest()}"')
                self.send_header("X-Repo-Commit", self.server.COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data[:upto])


@pytest.fixture
def download(tmp_path, warm_python):
    """download(endpoint) fetches org/tiny into <tmp>/raw in a process of its own: (what happened, that folder). The hub's client waits
    a fiftieth of its time between its attempts."""
    program = """
import sys, time
from pathlib import Path
from babylm import hub
from babylm.config import DownloadSection
from babylm.schema import UserError
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)
try:
    hub.download_corpus(DownloadSection(strict_small="org/tiny"), "strict-small", Path(sys.argv[1]))
except UserError as error:
    sys.exit(f"error: {error}")
"""

    def run(endpoint):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run([warm_python, "-c", program, str(tmp_path / "raw")], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=120), tmp_path / "raw"

    return run


@pytest.fixture
def stub():
    """stub(files, broken=...) -> a StubHub that answers until the test ends."""
    started = []

    def start(files, broken=()):
        started.append(StubHub({name: text.encode() for name, text in files.items()}, broken))
        return started[-1]

    yield start
    for hub in started:
        hub.shutdown()
        hub.server_close()


NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


def corpus_files(folder):
    return {path.name: path.read_text() for path in folder.glob("*.train")}


def test_a_download_that_broke_off_is_continued(stub, download):
    files = {"cbt.train": tales(1, 2), "qed.train": tales(*range(50)), "README.md": "a card"}
    hub = stub(files, broken={"qed.train"})
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    broken, folder = download(endpoint)
    assert broken.returncode == 1 and re.search(r"error: could not download org/tiny.*run the same command again", broken.stderr)
    assert corpus_files(folder) == {"cbt.train": files["cbt.train"]}

    offline, _ = download(NOWHERE)
    assert offline.returncode == 1, "half of a corpus was taken for the whole of it"

    hub.broken, hub.sent = set(), []
    continued, _ = download(endpoint)
    assert continued.returncode == 0, continued.stderr
    assert corpus_files(folder) == {name: files[name] for name in ("cbt.train", "qed.train")}
    assert hub.sent == ["qed.train"], "what had arrived was fetched again"
    assert not (folder / "README.md").exists()


def test_files_in_a_sub_folder_are_fetched_once(stub, download):
    files = {"data/cbt.train": tales(1, 2), "qed.train.txt": tales(3)}
    hub = stub(files)
    first, folder = download(f"http://127.0.0.1:{hub.server_port}")
    assert first.returncode == 0, first.stderr
    assert corpus_files(folder) == {"cbt.train": tales(1, 2), "qed.train": tales(3)}
    hub.sent = []
    again, _ = download(f"http://127.0.0.1:{hub.server_port}")
    assert (again.returncode, hub.sent) == (0, [])


def test_a_repository_that_does_not_exist_is_named(stub, download):
    hub = stub({})
    ended, _ = download(f"http://127.0.0.1:{hub.server_port}/elsewhere")
    assert ended.returncode == 1 and "org/tiny" in ended.stderr and "Traceback" not in ended.stderr


def test_download_without_a_network_ends_with_a_clear_error(run_script, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cbt.train").write_text(tales(1, 2))  # of another corpus: not what was asked for
    ended = run_script("combine_babylm.py", "--config", "configs/10M/corpus.yaml", "--download", "strict-small", "--input",
                       tmp_path / "raw", "--output", tmp_path / "corpus", check=False, env={"HF_ENDPOINT": NOWHERE})
    assert ended.returncode == 1
    assert re.search(r"^error: could not download \S+ \(revision main\): no network", ended.stderr, re.MULTILINE)
    assert "Traceback" not in ended.stderr and not (tmp_path / "corpus").exists()


def test_the_saved_tokenizer_is_the_one_that_was_trained(corpus, tokenizer):
    backend = models.train_tokenizer(texts(corpus, "train"), 512, 2).backend_tokenizer
    saved = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    assert backend.get_vocab() == saved.get_vocab() == tokenizer.get_vocab()


def test_a_stray_blank_line_does_not_make_two_documents_of_a_long_file(tmp_path):
    file = tmp_path / "talk.train"
    file.write_text("yes .\n" * 15_000 + "\n" + "no .\n" * 15_000)
    assert raw_text.find_boundary(file, 100) == "lines:100"


def test_one_long_document_does_not_fill_the_validation_part():
    """8 documents of 1,000 words among 30 of 30: 5 % are 445 words, so no long one is held out, whichever is drawn first."""
    for seed in range(30):
        documents = np.zeros(38, raw_text.CLEAN)
        documents["words"] = [1000] * 8 + [30] * 30
        domain = raw_text.Domain("tales", Path("tales"), documents, {})
        raw_text.assign_parts(domain, CorpusSection(validation_fraction=0.05), 1.0, [seed])
        held_out = documents["words"][documents["part"] == 1]
        assert held_out.max() == 30 and held_out.sum() == 450
