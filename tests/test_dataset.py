"""The token store holds the text and nothing else, and the blocks cut from it are the same for everybody who asks."""

import functools
import hashlib
import json
import multiprocessing
import re
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from babylm import models
from custom_dataset import DataError, EvalBlocks, TokenBlocks, WordMarkingEncoder, open_store, tokenizer_fingerprint

PARTS = ("train", "val")


# ---- Tokenizers of several kinds ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpt2(shared):
    """GPT-2's own: one token ends a document and begins the next."""
    return models.load_tokenizer(shared / "data" / "gpt2_tokenizer")


@pytest.fixture(scope="session")
def word_level():
    """Whole words, with one entry for all others; its tokens do not spell the text."""
    backend = Tokenizer(token_models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def metaspace(corpus):
    """A SentencePiece-like Unigram: spaces become part of the following token."""
    backend = Tokenizer(token_models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    text = (corpus / "val_babylm.txt").read_text(encoding="utf-8")
    backend.train_from_iterator([text], trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>",
                                                                show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def several(tokenizer, word_level, metaspace):
    return {"byte_level": tokenizer, "word_level": word_level, "metaspace": metaspace}


@functools.cache
def encoder(tokenizer):
    return WordMarkingEncoder(tokenizer)


def encode(tokenizer, text):
    """(ids, word marks) of one document."""
    ((_, ids, marks),) = encoder(tokenizer).stream(iter([(0, text)]))
    return ids.tolist(), marks.tolist()


def documents(corpus, part):
    """(domain index, text) of every document, read by nothing but the index of stage 1."""
    data = (corpus / f"{part}_babylm.txt").read_bytes()
    return [(int(row["domain"]), data[row["start"] : row["stop"]].decode("utf-8")) for row in np.load(corpus / f"{part}_documents.npy")]


@pytest.fixture
def own(corpus, tmp_path):
    """A copy of the corpus folder, to be damaged."""
    return shutil.copytree(corpus, tmp_path / "own")


@pytest.fixture(scope="session")
def train(corpus, tokenizer):
    return open_store(corpus, "train", tokenizer)


@pytest.fixture(scope="session")
def val(corpus, tokenizer):
    return open_store(corpus, "val", tokenizer)


# ---- What the store holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_the_store_is_every_document_between_its_start_and_end_token(corpus, part, tokenizer):
    expected = []
    for _, text in documents(corpus, part):
        expected += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert open_store(corpus, part, tokenizer).ids.tolist() == expected


@pytest.mark.parametrize("part", PARTS)
def test_gpt2_has_one_token_before_between_and_after_documents(corpus, part, gpt2):
    end = gpt2.convert_tokens_to_ids("<|endoftext|>")
    expected = [end]
    for _, text in documents(corpus, part):
        expected += [*gpt2(text, add_special_tokens=False).input_ids, end]
    assert open_store(corpus, part, gpt2).ids.tolist() == expected


def text_of_loader(store, tokenizer):
    """What a whole epoch of batches says, put back into text order, with the tail that no block holds."""
    blocks = TokenBlocks(store, 32, seed=5, random_chunk=False)
    batches = [batch["input_ids"] for batch in torch.utils.data.DataLoader(blocks, batch_size=7)]
    rows = dict(zip((blocks.locate(item)[2] for item in range(len(blocks))), torch.cat(batches), strict=True))
    ids = torch.cat([rows[block] for block in sorted(rows)]).tolist() + store.ids[len(rows) * 32 :].tolist()
    return tokenizer.decode(ids)


def test_decoding_what_the_loader_yields_gives_the_text(corpus, tokenizer, train):
    assert text_of_loader(train, tokenizer) == "".join(f"<s>{text}</s>" for _, text in documents(corpus, "train"))


def test_decoding_what_the_loader_yields_gives_the_text_with_gpt2(corpus, gpt2):
    expected = "<|endoftext|>" + "".join(f"{text}<|endoftext|>" for _, text in documents(corpus, "train"))
    assert text_of_loader(open_store(corpus, "train", gpt2), gpt2) == expected


def test_line_breaks_and_paragraphs_survive(make):
    article = "= = = Ant = = =\nAnts walk.\n\nThey bite."
    folder = make({"simple_wiki.train": f"{article}\n= = = Bee = = =\nBees fly.\n"}, boundaries={"default": "heading"})
    store = open_store(folder, "train", models.load_tokenizer(folder / "tokenizer"))
    assert models.load_tokenizer(folder / "tokenizer").decode(store.ids) == f"<s>{article}</s><s>= = = Bee = = =\nBees fly.</s>"


SPECIAL_LOOKING = "a <s> b</s><pad> c <|endoftext|>d"


def test_text_that_looks_like_a_special_token_is_text(make):
    folder = make({"qed.train": f"{SPECIAL_LOOKING}\n\nanother\n"})
    tokenizer = models.load_tokenizer(folder / "tokenizer")
    store = open_store(folder, "train", tokenizer)
    ids = store.ids[: store.documents["start"][1]].tolist()
    assert [place for place, token in enumerate(ids) if token in tokenizer.all_special_ids] == [0, len(ids) - 1]
    assert tokenizer.decode(ids) == f"<s>{SPECIAL_LOOKING}</s>"


def test_text_that_looks_like_the_end_token_of_gpt2_is_text(gpt2):
    ids, _ = encode(gpt2, SPECIAL_LOOKING)
    assert gpt2.eos_token_id not in ids and gpt2.decode(ids) == SPECIAL_LOOKING


def test_the_store_knows_the_domain_of_every_document(corpus, train):
    assert train.domains == json.loads((corpus / "manifest.json").read_text())["domains"]
    assert train.documents["domain"].tolist() == [domain for domain, _ in documents(corpus, "train")]


def wide(entries):
    """A word-level tokenizer whose last entry is the word "zebra"."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, entries - 1)}, "zebra": entries - 1}
    backend = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("entries", "dtype", "size"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(make, entries, dtype, size):
    store = open_store(make({"qed.train": "w7 zebra\n\nw9\n"}), "train", wide(entries))
    assert (store.ids.dtype.name, (store.folder / "ids.bin").stat().st_size) == (dtype, size * len(store))
    assert store.ids.tolist() == [1, 7, entries - 1, 1, 9, 1]


# ---- Words ------------------------------------------------------------------------------------------------------------

EXOTIC = st.text(st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(" \n\t\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u202f\u3000\u200b\u200d\ufeff"),  # spaces, and what only looks so
    st.sampled_from("aéΩ語🙂👩🏽e\u0301\u0327'’.,▁Ġ"),
))


@pytest.mark.parametrize("kind", ["byte_level", "word_level", "metaspace"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=EXOTIC)
def test_every_word_is_marked_once(several, kind, text):
    assert sum(encode(several[kind], text)[1]) == len(text.split())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=EXOTIC)
def test_every_word_is_marked_once_with_gpt2(gpt2, text):
    ids, marks = encode(gpt2, text)
    assert sum(marks) == len(text.split()) and gpt2.decode(ids) == text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("abtheé. \n"))
def test_a_word_is_marked_where_it_begins(tokenizer, text):
    ids, marks = encode(tokenizer, text)
    begun = [len(tokenizer.decode(ids[:count]).split()) for count in range(len(ids) + 1)]
    assert np.cumsum([0, *marks]).tolist() == begun


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("abthe. "))
def test_a_word_is_marked_where_it_begins_by_a_tokenizer_of_characters(metaspace, text):
    ids, marks = encode(metaspace, text)
    begun = [len(metaspace.decode(ids[:count]).split()) for count in range(len(ids) + 1)]
    assert np.cumsum([0, *marks]).tolist() == begun


def test_a_word_is_marked_where_it_begins_by_a_tokenizer_of_words(word_level):
    assert encode(word_level, "the  cat's\n\na hat.")[1] == [1, 1, 0, 0, 1, 1, 0]  # the cat ' s a hat .


@pytest.mark.parametrize("part", PARTS)
def test_words_are_counted_per_document_and_in_all(corpus, part, tokenizer):
    store = open_store(corpus, part, tokenizer)
    counted = np.add.reduceat(store.word_starts, store.documents["start"], dtype=np.int64)
    assert counted.tolist() == [len(text.split()) for _, text in documents(corpus, part)]
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert store.meta["words"] == counted.sum() == manifest["parts"][part]["words"]


def test_start_and_end_tokens_are_no_words(train, tokenizer):
    ids = np.asarray(train.ids)
    assert not train.word_starts[(ids == tokenizer.bos_token_id) | (ids == tokenizer.eos_token_id)].any()


PIECES = st.text(st.sampled_from("ab's'l \n\t\r\x1c\u00a0\u2003é🙂1.,"), max_size=300)


def whole_and_in_pieces(tokenizer, text):
    whole = encode(tokenizer, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WordMarkingEncoder, "PIECE_CHARACTERS", 12)
        return whole, encode(tokenizer, text), len(encoder(tokenizer)._pieces(text))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=PIECES)
def test_a_long_document_encoded_in_pieces_gives_the_same_ids(tokenizer, text):
    whole, pieces, _ = whole_and_in_pieces(tokenizer, text)
    assert pieces == whole


def test_a_long_document_is_encoded_in_pieces(corpus, tokenizer):
    text = max((text for _, text in documents(corpus, "train")), key=len)
    whole, pieces, count = whole_and_in_pieces(tokenizer, text)
    assert pieces == whole and count > len(text) / 30


def test_a_long_document_encoded_in_pieces_gives_the_same_ids_with_gpt2(corpus, gpt2):
    for _, text in documents(corpus, "val"):
        whole, pieces, _ = whole_and_in_pieces(gpt2, text)
        assert pieces == whole


def test_the_size_of_a_batch_makes_no_difference(corpus, tokenizer, monkeypatch):
    texts = documents(corpus, "val")
    at_once = [(domain, ids.tolist(), marks.tolist()) for domain, ids, marks in encoder(tokenizer).stream(iter(texts))]
    monkeypatch.setattr(WordMarkingEncoder, "BATCH_CHARACTERS", 1)
    assert [(domain, *encode(tokenizer, text)) for domain, text in texts] == at_once


# ---- Tokenizers that do not do ----------------------------------------------------------------------------------------


def test_a_tokenizer_without_an_end_token_is_refused(own, word_level):
    endless = PreTrainedTokenizerFast(tokenizer_object=word_level.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        open_store(own, "train", endless)


def test_a_tokenizer_that_loses_bytes_is_refused(own, tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    content = json.loads(backend.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "the"}, "content": "e"}
    lossy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>")
    with pytest.raises(DataError, match="do not spell its text"):
        open_store(own, "train", lossy)
    assert [path.name for path in (own / "tokens").iterdir() if "tmp" in path.name] == []


def test_a_fingerprint_tells_apart_what_splits_text_apart(tokenizer):
    with_words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
                                         bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert tokenizer_fingerprint(with_words) == tokenizer_fingerprint(tokenizer)
    with_words.add_tokens(["he"])  # an entry before: now it is also cut out of "the"
    assert encode(with_words, "the")[0] != encode(tokenizer, "the")[0]
    assert tokenizer_fingerprint(with_words) != tokenizer_fingerprint(tokenizer)


# ---- Built once, never read when damaged --------------------------------------------------------------------------------


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_whole_store_is_opened_and_not_built_again(own, tokenizer, capsys):
    before = snapshot(open_store(own, "train", tokenizer).folder)
    capsys.readouterr()
    assert snapshot(open_store(own, "train", tokenizer).folder) == before and capsys.readouterr().out == ""


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "damage", "reason"), [
    ("ids.bin", cut, "ids.bin is cut short or changed"), ("ids.bin", change, "ids.bin is cut short or changed"),
    ("words.bin", change, "words.bin is cut short or changed"), ("documents.npy", cut, "documents.npy is cut short or changed"),
    ("words.bin", lambda path: path.unlink(), "words.bin is missing"),
    ("meta.json", lambda path: path.unlink(), "meta.json is missing or unreadable"),
    ("meta.json", lambda path: path.write_text("{"), "meta.json is missing or unreadable"),
    ("meta.json", lambda path: path.write_text("[]"), "meta.json is missing or unreadable"),
])
def test_a_damaged_store_is_built_again_and_the_user_told(own, tokenizer, capsys, name, damage, reason):
    folder = open_store(own, "train", tokenizer).folder
    before = {file: data for file, (_, data) in snapshot(folder).items()}
    damage(folder / name)
    capsys.readouterr()
    rebuilt = open_store(own, "train", tokenizer)
    assert f"is damaged ({reason}): building it again" in capsys.readouterr().out
    assert {file: data for file, (_, data) in snapshot(folder).items()} == before
    assert rebuilt.ids.tobytes() == before["ids.bin"]


def test_another_tokenizer_gets_a_store_of_its_own(own, tokenizer, word_level):
    ours = open_store(own, "val", tokenizer)
    before = snapshot(ours.folder)
    theirs = open_store(own, "val", word_level)
    assert theirs.folder != ours.folder and snapshot(ours.folder) == before


def test_a_tokenizer_that_only_decorates_otherwise_shares_the_store(own, tokenizer, tmp_path):
    models.save_tokenizer(tokenizer, tmp_path, max_length=77)
    assert open_store(own, "val", models.load_tokenizer(tmp_path)).folder == open_store(own, "val", tokenizer).folder


@pytest.mark.parametrize("edit", [cut, change, lambda path: path.write_text(path.read_text() + "more")])
def test_text_edited_after_stage_1_is_refused(own, tokenizer, edit):
    edit(own / "train_babylm.txt")
    with pytest.raises(DataError, match=r"train_babylm\.txt is not the file that manifest\.json describes.*combine_babylm\.py"):
        open_store(own, "train", tokenizer)


def test_an_index_damaged_after_stage_1_is_refused(own, tokenizer):
    cut(own / "train_documents.npy")
    with pytest.raises(DataError, match=r"train_documents\.npy.*combine_babylm\.py"):
        open_store(own, "train", tokenizer)


def test_a_folder_without_a_corpus_names_the_command_that_makes_it(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"manifest\.json is missing.*python combine_babylm\.py --output"):
        open_store(tmp_path, "train", tokenizer)


# ---- Several processes, and a full disk ---------------------------------------------------------------------------------


def digest(store):
    return hashlib.sha256(store.ids.tobytes()).hexdigest()


def test_two_processes_build_one_store(own, tokenizer):
    shutil.rmtree(own / "tokens")
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(2), context.Queue()

    def work():
        lines = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
            together.wait()
            try:
                built = digest(open_store(own, "train", tokenizer))
            except Exception as error:
                built = repr(error)
        results.put((built, sum(line.startswith("tokenised") for line in lines)))

    processes = [context.Process(target=work, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    (first, first_built), (second, second_built) = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(60)
    assert first == second == digest(open_store(own, "train", tokenizer))
    assert first_built + second_built == 1


def test_a_second_process_waits_for_the_first(own, tokenizer, tmp_path, in_child):
    folder = open_store(own, "train", tokenizer).folder
    shutil.rmtree(folder)
    said = tmp_path / "child.out"  # what the waiting process prints
    context = multiprocessing.get_context("fork")
    holding, over = context.Event(), context.Event()

    def hold():
        with FileLock(f"{folder}.lock"):
            holding.set()
            while not over.is_set() and not (said.exists() and "waiting for it" in said.read_text()):
                time.sleep(0.01)

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    assert holding.wait(60)
    ended = in_child(lambda: open_store(own, "train", tokenizer))
    over.set()
    holder.join(60)
    assert ended.returncode == 0 and re.search(r"another process is building .*: waiting for it\ntokenised", ended.stdout)


def test_waiting_ends_when_it_is_asked_to(own, tokenizer):
    folder = open_store(own, "train", tokenizer).folder
    with FileLock(f"{folder}.lock"), pytest.raises(DataError, match="still being built by another process"):
        open_store(own, "train", tokenizer, wait_s=0.01)


def test_what_a_killed_build_left_is_not_used(own, tokenizer):
    folder = open_store(own, "train", tokenizer).folder
    before = {name: data for name, (_, data) in snapshot(folder).items()}
    folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (folder.with_name(f".{folder.name}.tmp") / "ids.bin").write_bytes(b"half")
    open_store(own, "train", tokenizer)
    assert {name: data for name, (_, data) in snapshot(folder).items()} == before
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_a_full_disk_is_named_and_leaves_the_other_stores_whole(own, tokenizer, word_level, in_child):
    ours = open_store(own, "train", tokenizer).folder
    before = snapshot(ours)
    names = {path.name for path in (own / "tokens").iterdir() if path.is_dir()}

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        open_store(own, "train", word_level)

    ended = in_child(work)
    assert ended.returncode == 1 and re.match(r"error: cannot write the token store .*: File too large; free some space", ended.stderr)
    assert {path.name for path in (own / "tokens").iterdir() if path.is_dir()} == names and snapshot(ours) == before


# ---- Training blocks ----------------------------------------------------------------------------------------------------


def rows(blocks, items):
    return [tuple(blocks[item]["input_ids"].tolist()) for item in items]


def test_a_block_is_a_row_of_ids(train):
    block = TokenBlocks(train, 32, seed=1)[0]
    assert set(block) == {"input_ids"} and block["input_ids"].dtype == torch.int64 and block["input_ids"].shape == (32,)


@pytest.mark.parametrize("random_chunk", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_holds_every_block_of_its_layout_once(val, random_chunk, epoch):
    blocks = TokenBlocks(val, 32, seed=1, random_chunk=random_chunk, items=10**6)
    offset, count = blocks.offset(blocks.layout(epoch)), blocks.blocks_per_epoch
    expected = [tuple(val.ids[start : start + 32].tolist()) for start in range(offset, offset + count * 32, 32)]
    got = rows(blocks, range(epoch * count, (epoch + 1) * count))
    assert sorted(got) == sorted(expected) and got != expected


def test_at_most_two_blocks_of_tokens_are_left_out_of_an_epoch(val):
    blocks = TokenBlocks(val, 32, seed=1)
    assert 0 <= len(val) - blocks.blocks_per_epoch * 32 < 2 * 32


def test_every_epoch_has_an_offset_of_its_own(val):
    blocks = TokenBlocks(val, 32, seed=1)
    offsets = [blocks.offset(blocks.layout(epoch)) for epoch in range(200)]
    assert set(offsets) == set(range(32)), "every place in a block serves as an offset"


def test_offsets_repeat_after_their_cycle(val):
    blocks = TokenBlocks(val, 32, seed=1, offset_cycle=3)
    offsets = [blocks.offset(blocks.layout(epoch)) for epoch in range(9)]
    assert offsets == offsets[:3] * 3 and len(set(offsets)) == 3


def test_epochs_of_the_same_layout_have_another_order(val):
    blocks = TokenBlocks(val, 32, seed=1, offset_cycle=1, items=10**6)
    first, second = (rows(blocks, range(epoch * blocks.blocks_per_epoch, (epoch + 1) * blocks.blocks_per_epoch)) for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_without_random_chunks_every_epoch_begins_at_the_first_token(val):
    blocks = TokenBlocks(val, 32, seed=1, random_chunk=False)
    assert {blocks.offset(blocks.layout(epoch)) for epoch in range(20)} == {0}


def test_offsets_drawn_from_a_seed_of_their_own_are_shared_by_runs_whose_order_differs(val):
    first, second, alone = (TokenBlocks(val, 32, seed=seed, offset_seed=offset_seed) for seed, offset_seed in ((1, 9), (2, 9), (2, None)))
    assert [first.offset(layout) for layout in range(5)] == [second.offset(layout) for layout in range(5)]
    assert [alone.offset(layout) for layout in range(5)] == [TokenBlocks(val, 32, seed=2).offset(layout) for layout in range(5)]
    assert [alone.offset(layout) for layout in range(5)] != [second.offset(layout) for layout in range(5)]
    assert [second.locate(item)[2] for item in range(50)] == [alone.locate(item)[2] for item in range(50)], "the order is the seed's"
    assert [first.locate(item)[2] for item in range(50)] != [second.locate(item)[2] for item in range(50)]


@pytest.mark.parametrize("offset_cycle, expected", [(None, [0, 1, 2]), (2, [0, 1]), (1, [0])])
def test_the_layouts_of_a_run_are_those_that_its_items_come_from(val, offset_cycle, expected):
    blocks = TokenBlocks(val, 32, seed=1, offset_cycle=offset_cycle)
    blocks.items = 2 * blocks.blocks_per_epoch + 1
    assert blocks.layouts() == sorted({blocks.locate(item)[1] for item in range(blocks.items)}) == expected
    blocks.items -= 1
    assert blocks.layouts() == expected[:2], "an epoch that is reached to its end, and not beyond"


def test_a_block_is_read_by_its_layout_and_its_place_in_it(val):
    blocks = TokenBlocks(val, 32, seed=1, offset_cycle=3)
    for layout, block in [(0, 0), (2, 5), (1, blocks.blocks_per_epoch - 1)]:
        start = blocks.offset(layout) + 32 * block
        assert blocks.block(layout, block).tolist() == val.ids[start : start + 32].tolist()


def test_extras_of_an_item_are_those_of_its_layout_and_block(val):
    blocks = TokenBlocks(val, 32, seed=1, offset_cycle=2, items=10**4)
    assert blocks[0].keys() == {"input_ids"}
    blocks.extras = lambda layout, block: {"place": torch.tensor([layout, block])}
    for item in (0, 1, blocks.blocks_per_epoch, 3 * blocks.blocks_per_epoch + 2):
        row, (_, layout, block) = blocks[item], blocks.locate(item)
        assert row["place"].tolist() == [layout, block] != [0, item]
        assert torch.equal(row["input_ids"], blocks.block(layout, block))


def test_extras_of_a_validation_block_are_those_of_its_number_in_the_sample(val):
    blocks = EvalBlocks(val, 32, 10)
    assert blocks[3].keys() == {"input_ids", "domains"}
    blocks.extras = lambda item: {"place": torch.tensor(item)}
    assert int(blocks[3]["place"]) == 3 != blocks.blocks[3]
    assert torch.equal(blocks[3]["input_ids"], blocks.block(3))
    assert blocks.block(3).tolist() == val.ids[32 * blocks.blocks[3] :][:32].tolist()


@pytest.mark.parametrize("offset_cycle", [None, 2])
def test_an_item_depends_on_nothing_that_was_read_before(val, offset_cycle):
    def new():
        return TokenBlocks(val, 32, seed=1, offset_cycle=offset_cycle, items=700)

    in_order, order = rows(new(), range(700)), np.random.default_rng(0).permutation(700)[:80]
    jumping = new()
    np.random.seed(5)
    torch.manual_seed(5)
    assert rows(jumping, map(int, order)) == [in_order[item] for item in order]
    assert [rows(new(), [item])[0] for item in (650, 3)] == [in_order[650], in_order[3]]


def test_another_seed_gives_another_order(val):
    assert rows(TokenBlocks(val, 32, seed=1), range(20)) != rows(TokenBlocks(val, 32, seed=2), range(20))


def test_a_run_is_as_long_as_it_is_asked_to_be(val):
    blocks = TokenBlocks(val, 32, seed=1, items=500)
    assert len(blocks) == 500 > blocks.blocks_per_epoch
    for item in (500, -1):
        with pytest.raises(IndexError):
            blocks[item]


@pytest.mark.parametrize(("random_chunk", "message"), [(True, "at every offset"), (False, "use more text or shorter blocks")])
def test_a_store_shorter_than_one_block_is_named(val, random_chunk, message):
    with pytest.raises(DataError, match=rf"val-\w+ holds {len(val):,} tokens, fewer than one block of data\.seq_len=6000.*{message}"):
        TokenBlocks(val, 6000, seed=1, random_chunk=random_chunk)


def test_one_block_is_enough(val):
    assert len(TokenBlocks(val, len(val), seed=1, random_chunk=False)) == 1


# ---- The word ledger ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def brute_force(val, tokenizer):
    """brute_force(blocks, count): words that begin in the first `count` items, by decoding them token by token."""
    spelled = [" " if token in tokenizer.all_special_ids else tokenizer.decode([token]) for token in range(len(tokenizer))]

    def words_in(start, length):
        before = spelled[val.ids[start - 1]] if start else " "
        text = "".join(spelled[token] for token in val.ids[start : start + length])
        continues = not before[-1].isspace() and not text[0].isspace()
        return len(text.split()) - continues

    def count(blocks, items):
        total = 0
        for item in range(items):
            _, layout, block = blocks.locate(item)
            total += words_in(blocks.offset(layout) + block * blocks.seq_len, blocks.seq_len)
        return total

    return count


@pytest.mark.parametrize("options", [{}, {"random_chunk": False}, {"offset_cycle": 2}])
def test_words_seen_are_the_words_in_the_items(val, brute_force, options):
    blocks = TokenBlocks(val, 32, seed=1, items=10**6, **options)
    epoch = blocks.blocks_per_epoch
    places = [0, 1, 50, epoch - 1, epoch, epoch + 1, 2 * epoch, 2 * epoch + 17, 3 * epoch + 5]
    assert [blocks.words_through(place) for place in places] == [brute_force(blocks, place) for place in places]


def test_an_epoch_at_offset_0_sees_nearly_all_words(val):
    blocks = TokenBlocks(val, 8, seed=1, random_chunk=False)
    assert val.meta["words"] - 8 <= blocks.words_through(blocks.blocks_per_epoch) <= val.meta["words"]


def test_a_resumed_run_counts_the_same_words(val):
    steady = TokenBlocks(val, 32, seed=1, items=10**6)
    counted = {place: steady.words_through(place) for place in range(0, 700, 23)}
    assert {place: TokenBlocks(val, 32, seed=1, items=10**6).words_through(place) for place in reversed(counted)} == counted


@pytest.mark.parametrize("words", [1, 10, 777, 2_000, 2_335, 5_000, 9_999])
def test_a_word_budget_takes_the_fewest_items(val, words):
    blocks = TokenBlocks(val, 32, seed=1, items=10**6)
    items = blocks.items_for_words(words)
    assert blocks.words_through(items - 1) < words <= blocks.words_through(items)


def test_no_words_take_no_items(val):
    assert TokenBlocks(val, 32, seed=1).items_for_words(0) == 0


# ---- Validation blocks --------------------------------------------------------------------------------------------------


def test_validation_blocks_are_the_same_for_every_run(val):
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        drawn.append(EvalBlocks(val, 32, 40).blocks.tolist())
    assert drawn[0] == drawn[1]


def test_validation_blocks_are_drawn_from_all_over_the_part(val):
    blocks = EvalBlocks(val, 32, 40).blocks.tolist()
    available = len(val) // 32
    assert len(blocks) == len(set(blocks)) == 40 and blocks == sorted(blocks)
    assert blocks[0] < available / 4 and blocks[-1] > available * 3 / 4
    assert len({int(domain) for block in EvalBlocks(val, 32, 40) for domain in block["domains"]}) >= 5


def test_all_validation_blocks_are_taken_where_there_are_fewer(val):
    blocks = EvalBlocks(val, 32, 10**6)
    assert len(blocks) == len(val) // 32
    assert torch.cat([block["input_ids"] for block in blocks]).tolist() == val.ids[: len(val) // 32 * 32].tolist()


def test_every_validation_token_knows_its_domain(corpus, val, tokenizer):
    expected = [domain for domain, text in documents(corpus, "val")
                for _ in range(len(tokenizer(text, add_special_tokens=False).input_ids) + 2)]
    blocks = EvalBlocks(val, 32, 10**6)
    assert torch.cat([block["domains"] for block in blocks]).tolist() == expected[: len(blocks) * 32]


def test_every_validation_token_knows_its_domain_with_gpt2(corpus, gpt2):
    texts = documents(corpus, "val")
    expected = [texts[0][0]] + [domain for domain, text in texts for _ in range(len(gpt2(text, add_special_tokens=False).input_ids) + 1)]
    blocks = EvalBlocks(open_store(corpus, "val", gpt2), 32, 10**6)
    assert torch.cat([block["domains"] for block in blocks]).tolist() == expected[: len(blocks) * 32]


def test_a_validation_part_shorter_than_one_block_is_named(val):
    with pytest.raises(DataError, match=r"fewer than one block of data\.seq_len=6000: hold out more text"):
        EvalBlocks(val, 6000, 1)
