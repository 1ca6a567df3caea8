"""Prompts are what was asked for, in the policy's tokens; the same arguments give the same ones, from a cache or without."""

import json
from collections import Counter

import datasets
import pytest
from huggingface_hub.utils import httpx
from stub_hub import StubHub

from babylm import run_folder
from babylm.config import PromptsSection, RLConfig
from babylm.run_folder import write_json
from babylm.schema import UserError, check
from custom_dataset import TextPart
from interactive import prompts as prompts_module
from interactive import rl_run
from interactive.prompts import Prompts, load_prompts

OPENINGS = ("Once upon a time there was a", "Tomorrow the mother saw a", "“Oh!” said the")
STORIES = [f"{opening} {animal} who lived in the {place}." for opening in OPENINGS
           for animal in ("cat", "dog", "horse") for place in ("garden", "old house", "school")]


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture
def load(tokenizer, corpus, tmp_path):
    """load(source="file", ..., seed=0) -> Prompts; caches in tmp_path/cache."""

    def prompts(seed=0, tokenizer=tokenizer, **section):
        return load_prompts(check(PromptsSection, section, "x.yaml"), tokenizer, str(corpus), seed, tmp_path / "cache")

    return prompts


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """data_set([{"text": ...}, ...], kind="parquet") -> a local folder that `datasets` loads."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else 5 s after every shuffled stream

    def write(rows, kind="parquet", name="data"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        else:
            (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(folder)

    return write


# ---- The corpus -----------------------------------------------------------------------------------------------------


def test_corpus_prompts_open_validation_documents_and_tokenise_as_they_were_cut(load, corpus, tokenizer):
    found = load(source="corpus", count=40)
    documents = [text for _, text in TextPart(corpus, "val")]
    assert len(found) == 40 == len(set(found.texts))
    for text in found.texts:
        opened = [document for document in documents if document.startswith(text)]
        assert opened and 1 <= len(tokens(tokenizer, text)) <= 7 and text.strip()
        assert any(tokens(tokenizer, document[:500])[: len(tokens(tokenizer, text))] == tokens(tokenizer, text) for document in opened)
    assert {len(tokens(tokenizer, text)) for text in found.texts} == set(range(1, 8))
    assert found.longest == 7


def test_domains_take_part_by_their_share_of_words(load, corpus):
    part = TextPart(corpus, "val")
    few = load(source="corpus", count=12)
    words = Counter()
    for document in part.documents:
        words[part.domains[document["domain"]]] += int(document["words"])
    assert sum(few.by_domain.values()) == 12
    for domain, count in few.by_domain.items():
        assert abs(count - 12 * words[domain] / sum(words.values())) < 1, (domain, few.by_domain, words)


def test_more_prompts_than_a_small_corpus_gives_are_as_many_as_there_are(load):
    found = load(source="corpus", count=100_000, min_tokens=2, max_tokens=3)
    assert len(found) == len(set(found.texts)) <= 2 * 17 and found.dropped["seen before"] > 0
    assert "seen before" in found.describe()


def test_the_seed_alone_changes_what_is_drawn(load):
    first, again, other = (load(seed=seed, source="corpus", count=15) for seed in (1, 1, 2))
    assert first == again and first.fingerprint == again.fingerprint != other.fingerprint


# ---- The order of a run ---------------------------------------------------------------------------------------------


def test_each_epoch_deals_every_prompt_once_in_an_order_of_its_own():
    found = Prompts([f"p{i}" for i in range(10)], "test", seed=5, longest=1)
    dealt = [text for step in range(10) for text in found.batch(step, 4)]  # batches cross from one epoch into the next
    epochs = [dealt[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(found.texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_resumed_run_sees_the_same_prompts_and_another_seed_others():
    texts = [f"p{i}" for i in range(50)]
    whole = [Prompts(texts, "test", 3, 1).batch(step, 8) for step in range(20)]
    assert [Prompts(texts, "test", 3, 1).batch(step, 8) for step in range(13, 20)] == whole[13:]
    assert Prompts(texts, "test", 4, 1).batch(0, 8) != whole[0]


def test_a_fixed_prompt_is_repeated(load, tokenizer):
    found = load(source="fixed", text="The cat saw the dog and then")
    assert found.batch(3, 4) == ["The cat saw the dog and then"] * 4 and found.longest == len(tokens(tokenizer, found.texts[0]))


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_a_text_file_gives_a_prompt_per_line_uncut_unless_asked(load, tmp_path, tokenizer):
    lines = ["The old dog slept under the table until the evening came", "", "  A cat  ", "Rain\u2028fell"]
    (tmp_path / "p.txt").write_text("\r\n".join(lines), encoding="utf-8")
    assert sorted(load(source="file", path=str(tmp_path / "p.txt")).texts) == ["A cat", "Rain\u2028fell", lines[0]]
    cut = load(source="file", path=str(tmp_path / "p.txt"), cut=True, min_tokens=2, max_tokens=2)
    assert all(len(tokens(tokenizer, text)) == 2 for text in cut.texts)


def test_a_jsonl_file_gives_one_field_of_each_object(load, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "story": "One night"}\n\n{"prompt": "b", "story": "Two\\nmen"}\n', encoding="utf-8")
    assert sorted(load(source="file", path=str(tmp_path / "p.jsonl"), column="story").texts) == ["One night", "Two\nmen"]
    assert sorted(load(source="file", path=str(tmp_path / "p.jsonl")).texts) == ["a", "b"]


@pytest.mark.parametrize("name, content, said", [
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 has no text in the field 'prompt'"),
    ("p.jsonl", b'{"prompt": "a"}\n{"promp', "line 2 is not JSON"),
    ("p.jsonl", b'{"text": "a"}\n', "it has: text"),
    ("p.txt", b"\n  \n", "it holds no text"),
    ("p.txt", b"caf\xe9", "cannot be read as UTF-8"),
    ("p.txt", None, "does not exist"),
])
def test_mistakes_in_a_file_are_named_with_their_line(load, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(source="file", path=str(tmp_path / name))


# ---- Round trips ----------------------------------------------------------------------------------------------------


def test_a_cut_within_a_character_moves_left(load, tmp_path, tokenizer):
    text = "a日本"  # bytes of a vocabulary that never saw these characters: three tokens each
    assert len(tokens(tokenizer, text)) == 7
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    made = {length: load(source="file", path=str(tmp_path / "p.txt"), cut=True, min_tokens=1, max_tokens=length, seed=seed)
            for length in (2, 3, 5) for seed in range(3)}
    assert {found.texts[0] for found in made.values()} <= {"a", "a日"}
    assert any(found.shortened for found in made.values())
    with pytest.raises(UserError, match="1 that tokenise otherwise once they are cut"):
        load(source="file", path=str(tmp_path / "p.txt"), cut=True, min_tokens=2, max_tokens=3)


def test_text_that_names_a_special_token_never_becomes_that_token(load, tmp_path, tokenizer):
    assert tokenizer.eos_token == "</s>"
    (tmp_path / "p.txt").write_text("</s>The cat\nThe cat</s> sat\nThe dog\n", encoding="utf-8")
    whole = load(source="file", path=str(tmp_path / "p.txt"))
    assert whole.texts == ["The dog"] and whole.dropped == {"with the name of a special token in their text": 2}
    cut = load(source="file", path=str(tmp_path / "p.txt"), cut=True, min_tokens=1, max_tokens=6)
    assert all(tokenizer.eos_token_id not in tokens(tokenizer, text) for text in cut.texts)


# ---- Data sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tinystories", "imdb"])
def test_stories_are_cut_to_their_first_tokens(load, data_set, tokenizer, source):
    folder = data_set([{"text": story, "label": 0} for story in STORIES])
    found = load(source=source, dataset=folder, count=15)
    assert len(found) == 15
    assert all(any(story.startswith(text) for story in STORIES) and len(tokens(tokenizer, text)) <= 7 for text in found.texts)
    assert len({text[0] for text in found.texts}) == 3, "drawn from all of the data, not from its first rows"
    lengths = Counter(len(tokens(tokenizer, text)) for text in found.texts)
    assert len(lengths) >= 5, lengths


def test_writing_prompts_follow_the_published_rules(load, data_set):
    rows = [{"prompt": "[WP] You find a door."}, {"prompt": "[EU] A dragon\n sleeps."}, {"prompt": "w " * 49}, {"prompt": "w " * 50},
            {"prompt": None}, {"prompt": " "}]
    found = load(source="writingprompts", dataset=data_set(rows, kind="jsonl"))
    assert sorted(found.texts) == sorted(["Story idea: You find a door. Story:", "[EU] A dragon sleeps. Story:", "w " * 49 + "Story:"])
    assert found.dropped == {"of more than 49 words": 1, "empty": 2}


def test_a_cache_spares_the_data_set_and_is_keyed_by_all_that_matters(load, data_set, tokenizer, tmp_path, monkeypatch):
    rows = [{"text": story, "other": story[::-1]} for story in STORIES]
    section = {"source": "tinystories", "dataset": data_set(rows), "count": 5}
    read = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: read.append(args) or real(*args, **keys))
    first = load(**section)
    assert load(**section) == first and len(read) == 1
    assert load(**section, column="other") != first
    for number, other in enumerate([{"seed": 1}, {"count": 6}, {"max_tokens": 3}, {"min_tokens": 2}, {"cut": False}], 3):
        load(**{**section, **other})
        assert len(read) == number, other
    larger = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    larger.add_tokens(["upon a"])
    load(**section, tokenizer=larger)
    data_set([{"text": "Another text entirely, in the same file"}])
    assert load(**section).texts != first.texts and len(read) == 9
    monkeypatch.setattr(prompts_module, "RULES", 99)
    load(**section)
    assert len(read) == 10
    assert not [file for file in (tmp_path / "cache").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("damage", ["cut", "edited", "stale"])
def test_a_damaged_or_stale_cache_is_made_again(load, data_set, tmp_path, capsys, damage):
    section = {"source": "tinystories", "dataset": data_set([{"text": story} for story in STORIES]), "count": 5}
    first = load(**section)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_text(encoding="utf-8")
    held = json.loads(whole)
    if damage == "cut":
        cache.write_text(whole[: len(whole) // 2], encoding="utf-8")
    elif damage == "edited":
        held["prompts"]["texts"][0] = "Something else"
        write_json(cache, held)
    else:
        held["key"]["rules"] = 0
        write_json(cache, held)
    assert load(**section) == first
    assert "damaged or stale" in capsys.readouterr().out
    assert cache.read_text(encoding="utf-8") == whole


def test_a_data_set_that_cannot_be_used_is_named(load, data_set, tmp_path, monkeypatch):
    folder = data_set([{"text": "The cat"}])
    with pytest.raises(UserError, match="no column 'story'; it has: text"):
        load(source="tinystories", dataset=folder, column="story")
    with pytest.raises(UserError, match="part 'test', cannot be read"):
        load(source="tinystories", dataset=folder, split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load(source="imdb", dataset=str(tmp_path / "empty"))
    (tmp_path / "data" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        load(source="imdb", dataset=folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"roneneldan/TinyStories .*cannot be fetched from the hub .*prompts.source: corpus"):
        load(source="tinystories")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def hub(data_set, monkeypatch):
    """A hub with a data set org/stories; hub.push(texts) makes a commit on main. Its files are local: only commits are asked for."""
    stub = StubHub()
    stub.create("datasets/org/stories")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stub.url)
    folders, real = {}, datasets.load_dataset
    stub.fetched = []

    def load(name, revision, **keys):
        stub.fetched.append(revision)
        return real(folders[revision], **keys)

    def push(texts):
        commit = stub.commit("datasets/org/stories", "main", "more", {})["id"]
        folders[commit] = data_set([{"text": text} for text in texts], name=commit)
        return commit

    monkeypatch.setattr(datasets, "load_dataset", load)
    stub.push = push
    yield stub
    stub.close()


STORIES_ON_THE_HUB = {"source": "tinystories", "dataset": "org/stories", "count": 5}


def test_a_branch_that_moved_on_is_fetched_anew_and_a_run_keeps_to_its_commit(hub, load, tokenizer, corpus, tmp_path):
    first = hub.push(STORIES)
    held = load(**STORIES_ON_THE_HUB)
    assert held.hub == {"dataset": "org/stories", "revision": "main", "commit": first} and first[:12] in held.describe()
    assert load(**STORIES_ON_THE_HUB) == held and hub.fetched == [first]
    second = hub.push(["Another text entirely, on the same branch"] * 9)
    moved = load(**STORIES_ON_THE_HUB)
    assert moved.hub["commit"] == second and moved.texts != held.texts and hub.fetched == [first, second]
    hub.close()  # neither of these asks
    section = check(PromptsSection, STORIES_ON_THE_HUB, "x.yaml")
    assert load_prompts(section, tokenizer, str(corpus), 0, tmp_path / "cache", recorded=held.hub) == held
    assert load_prompts(section, tokenizer, str(corpus), 0, None, recorded=held.hub) == held
    assert load(**STORIES_ON_THE_HUB, revision=first).texts == held.texts and hub.fetched == [first, second, first, first]


def test_without_a_network_the_newest_kept_commit_is_taken_and_named(hub, load, capsys, monkeypatch):
    commits = [hub.push(STORIES), hub.push([story.upper() for story in STORIES])]
    load(**STORIES_ON_THE_HUB, revision=commits[0])
    newest = load(**STORIES_ON_THE_HUB)
    capsys.readouterr()
    for trouble in (lambda *_: 503, lambda *_: "drop"):
        hub.hook = trouble
        assert load(**STORIES_ON_THE_HUB) == newest and len(hub.fetched) == 2
        said = capsys.readouterr().out
        assert f"taking the prompts of commit {commits[1]}, kept in " in said and "org/stories, revision main" in said
    with pytest.raises(UserError, match="org/stories .*cannot be fetched from the hub"):
        load(**{**STORIES_ON_THE_HUB, "count": 6})  # of these none are kept
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: httpx.get("http://127.0.0.1:1"))
    with pytest.raises(UserError, match="org/stories .*cannot be fetched from the hub .ConnectError"):
        load(**{**STORIES_ON_THE_HUB, "count": 6, "revision": commits[0]})
    hub.hook = lambda *_: 404
    with pytest.raises(UserError, match="org/stories .*cannot be fetched from the hub"):
        load(**STORIES_ON_THE_HUB)


def test_a_run_records_the_commit_and_goes_on_with_it(hub, corpus, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_opened", [])
    config = {"name": "rl", "output": str(tmp_path), "algorithm": "ppo", "model": {"path": str(teachers("llama")[0])},
              "data": {"corpus": str(corpus)}, "prompts": STORIES_ON_THE_HUB, "rewards": [{"kind": "random"}],
              "training": {"steps": 1, "batch_size": 8, "device": "cpu"}}
    monkeypatch.setattr(rl_run, "load_prompts", lambda section, tokenizer, folder, seed, cache, write, recorded: load_prompts(
        section, tokenizer, folder, seed, tmp_path / "cache", write, recorded))  # the corpus' own folder is shared by tests
    first = hub.push(STORIES)
    opened = check(RLConfig, config, "x.yaml")
    folder = rl_run.open_run(opened, rl_run.load_inputs(opened))
    folder.append_metrics({"kind": "train", "step": 0})  # from now on the folder holds a run, which must stay the same
    assert json.loads((folder.run / "record.json").read_text())["prompts"]["commit"] == first
    second = hub.push(["Another text entirely, on the same branch"] * 9)
    again = rl_run.load_inputs(opened)
    assert again.prompts.hub["commit"] == first and rl_run.open_run(opened, again)
    assert json.loads((folder.run / "record.json").read_text())["prompts"]["commit"] == first
    assert rl_run.load_inputs(check(RLConfig, {**config, "fresh": True}, "x.yaml")).prompts.hub["commit"] == second
    other = {**config, "prompts": {**STORIES_ON_THE_HUB, "revision": second}}
    assert rl_run.load_inputs(check(RLConfig, other, "x.yaml")).prompts.hub["commit"] == second


# ---- The section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, said", [
    ({"source": "file"}, "source: file needs path"),
    ({"source": "fixed", "text": " "}, "source: fixed needs text"),
    ({"path": "p.txt"}, "path belongs to source: file, not to corpus"),
    ({"source": "file", "path": "p.csv"}, "must end in .txt"),
    ({"source": "file", "path": "p.txt", "column": "x"}, "column belongs to a data set or a .jsonl file"),
    ({"source": "imdb", "text": "x"}, "text belongs to source: fixed, not to imdb"),
    ({"dataset": "x"}, "dataset belongs to source: tinystories, writingprompts or imdb, not to corpus"),
    ({"source": "writingprompts", "cut": True}, "writingprompts is never cut"),
    ({"cut": False}, "whole documents"),
    ({"min_tokens": 8}, "min_tokens 8 exceeds max_tokens 7"),
    ({"source": "tinystory"}, "source"),
])
def test_keys_that_contradict_the_source_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        check(PromptsSection, values, "x.yaml")
