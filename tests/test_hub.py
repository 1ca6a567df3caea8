"""Publishing a run: what is sent, in which order, what a second call sends, what is refused; against a stub of the hub's HTTP API
that the hub's own client talks to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from stub_hub import TOKEN, StubHub
from transformers import AutoModelForCausalLM

from babylm import export, hub, models
from babylm.export import Options, export_run, milestone_folders, without_private
from babylm.model_card import evaluation, model_card
from babylm.schema import UserError

ROOT = Path(hub.__file__).parent.parent
KEYS = {"model": {"layers": 3, "width": 16, "heads": 2, "max_positions": 32},
        "training": {"steps": 3, "batch_size": 4, "warmup_steps": 1, "lr": 0.05},
        "logging": {"logging_steps": 1, "eval_steps": 3}, "checkpoints": {"extra_words": [8, 50]}}
KEY = "models/org/tiny"
HEX = "0123456789abcdef0123456789abcdef01234567"  # as long as a commit's name, and as a tracker's key
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_yaml, in_process, small):
    """runs("plain" | "moep" | "adapter") -> a finished run of three steps, with milestones chck_8 and chck_50. Read only."""
    home = tmp_path_factory.mktemp("publish")
    config = write_yaml(home / "run.yaml", {"output": str(home / "models"), **KEYS,
                                            "data": {"corpus": str(small), "seq_len": 16, "eval_blocks": 4}})
    made = {"plain": ("train_baseline", ["model.architecture=llama"]),
            "moep": ("train_moep_student", ["model.parallel_width=8", "model.parallel_heads=2", "distillation.w_ce=1",
                                            "distillation.w_kl=0"]),
            "adapter": ("train_teacher", ["model.init=pretrained", f"model.path={home / 'models/plain'}", "lora.mode=lora", "lora.rank=2",
                                          "lora.merge_adapter=false"])}

    def run(name):
        if not (home / "models" / name).exists():
            script, overrides = made[name]
            if name == "adapter":
                run("plain")
            in_process(script, "--config", config, f"name={name}", *overrides)
        return home / "models" / name

    return run


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A StubHub that the client in this process talks to, with a valid token."""
    started = StubHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", started.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", started.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "WAIT", 0.01)
    yield started
    started.close()


def call(*arguments):
    """`python -m babylm.hub <arguments>`, in this process; errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hub", *map(str, arguments)])
        hub.main()


def local(folder):
    return {name: (folder / name).read_bytes() for name in MODEL | {file.name for file in folder.glob("modeling_*.py")}}


def commits(stub):
    return [path.rsplit("/", 1)[1] for _, path in stub.writes if "/commit/" in path]


# ---- What is sent -----------------------------------------------------------------------------------------------------


def test_every_revision_holds_the_files_of_its_folder_and_main_comes_last(runs, stub, capsys):
    run = runs("plain")
    call(run, "--repo", "org/tiny", "--license", "mit", "--dataset", "org/text", "--private")
    assert commits(stub) == ["chck_8", "chck_50", "main"]  # by words, not by name
    assert stub.repositories[KEY]["private"]
    assert stub.files(KEY, "chck_8") == local(run / "chck_8") != stub.files(KEY, "chck_50") == local(run / "chck_50")
    main = stub.files(KEY, "main")
    assert {name: main[name] for name in MODEL} == local(run)
    assert main.keys() - MODEL == {"README.md", *(f"run/{name}" for name in export.RECORD)}
    assert main["run/metrics.jsonl"] == (run / "run/metrics.jsonl").read_bytes()

    card = ModelCard(main["README.md"].decode())
    assert card.data.license == "mit" and card.data.datasets == ["org/text"] and card.data.model_name == "tiny"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    finished = json.loads((run / "run/finished.json").read_text())
    assert values == {"perplexity": round(finished["perplexity"], 4), "cross-entropy": round(finished["ce"], 4)}
    assert 'revision="chck_8"' in card.text and "trust_remote_code" not in card.text

    before = list(stub.writes)
    call(run, "--repo", "org/tiny", "--license", "mit", "--dataset", "org/text", "--private")
    assert stub.writes == before and capsys.readouterr().out.count("is there already") == 3


CHAT = '''
from babylm.models import load_tokenizer


def space(repo, revision="main"):
    from babylm.run_folder import is_whole

    class Page:
        def launch(self):
            print("page of", repo, load_tokenizer(repo)("a").input_ids, is_whole.__name__)

        def build(self):
            import gradio

    return Page()
'''


def test_the_card_s_own_example_loads_what_was_published_and_so_does_a_space(runs, stub, tmp_path, monkeypatch):
    """In a process that has never seen this project, as a reader would: weights of main and of a milestone, own code, app.py."""
    project = tmp_path / "project"
    for name in ("babylm", "interactive"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("custom_dataset.py", "modeling_moep.py", "requirements.txt"):
        shutil.copyfile(ROOT / name, project / name)
    (project / "interactive/chat.py").write_text(CHAT)
    monkeypatch.setattr(export, "PROJECT", project)
    call(runs("plain"), "--repo", "org/tiny")
    call(runs("moep"), "--repo", "org/moep", "--space", "org/moep-chat", "--license", "mit")
    page = stub.files("spaces/org/moep-chat", "main")
    assert yaml.safe_load(page["README.md"].decode().split("---")[1])["models"] == ["org/moep"]
    assert {"app.py", "requirements.txt", "interactive/chat.py", "interactive/__init__.py", "babylm/models.py", "babylm/run_folder.py",
            "babylm/config.py", "custom_dataset.py", "modeling_moep.py"} <= page.keys()
    assert "babylm/training.py" not in page and "babylm/demo_corpus.py" not in page
    pins = page["requirements.txt"].decode()
    assert re.search(r"^gradio==", pins, re.M) and re.search(r"^torch==", pins, re.M) and "trl" not in pins and "bitsandbytes" not in pins
    call(runs("moep"), "--repo", "org/moep", "--space_dir", tmp_path / "space", "--license", "mit", "--space", "org/moep-chat")
    written = [file for file in (tmp_path / "space").rglob("*") if file.is_file()]
    assert {str(file.relative_to(tmp_path / "space")): file.read_bytes() for file in written} == page

    examples = [re.search(r"```python\n(.*?)```", stub.files(f"models/org/{name}", "main")["README.md"].decode(), re.S)[1]
                for name in ("tiny", "moep")]
    assert "trust_remote_code=True" in examples[1]
    program = """
import runpy, sys, torch
from huggingface_hub import snapshot_download
out = sys.argv[1]
for name, code in zip(("tiny", "moep"), sys.argv[3:]):
    known = {}
    exec(code, known)
    torch.save([known["model"].state_dict(), known["earlier"].state_dict()], f"{out}/{name}.pt")
    assert known["tokenizer"]("a").input_ids[0] == known["tokenizer"].bos_token_id
print(snapshot_download("org/tiny", revision="chck_50"))
sys.path.insert(0, sys.argv[2])
runpy.run_path(sys.argv[2] + "/app.py")
"""
    env = {**os.environ, "HF_ENDPOINT": stub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "space", *examples], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, run in (("tiny", runs("plain")), ("moep", runs("moep"))):
        for weights, folder in zip(torch.load(tmp_path / f"{name}.pt"), (run, run / "chck_8"), strict=True):
            ours = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()
            assert weights.keys() == ours.keys() and all(torch.equal(weights[key], ours[key]) for key in ours)
    *_, fetched, said = done.stdout.strip().splitlines()
    assert {path.name: path.read_bytes() for path in Path(fetched).iterdir() if path.name in MODEL} == local(runs("plain") / "chck_50")
    assert said.startswith("page of org/moep [1,")


def test_a_killed_upload_is_finished_by_the_same_command(runs, stub):
    run, arguments = runs("plain"), (runs("plain"), "--repo", "org/tiny")
    child = []

    def kill(method, path, body):
        if path.endswith("/commit/main") or (path.endswith("/commit/chck_50") and len(commits(stub)) == 2):
            os.kill(child[0], signal.SIGKILL)
            return "drop"
        return None

    stub.hook = kill
    reading, writing = os.pipe()
    child.append(os.fork())
    if child[0] == 0:
        try:
            os.read(reading, 1)
            call(*arguments)
        finally:
            os._exit(7)
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == -signal.SIGKILL
    for end in (reading, writing):
        os.close(end)
    stub.hook = None
    assert commits(stub) == ["chck_8", "chck_50"] and stub.files(KEY, "main") == {} and stub.files(KEY, "chck_50") == {}
    stub.writes.clear()
    call(*arguments)
    assert commits(stub) == ["chck_50", "main"]
    assert not any(path.endswith(("/create", "/branch/chck_50", "/branch/chck_8")) for _, path in stub.writes)
    for name in ("chck_8", "chck_50"):
        assert stub.files(KEY, name) == local(run / name)
    assert {name: stub.files(KEY, "main")[name] for name in MODEL} == local(run)


def test_broken_connections_are_tried_again_and_nothing_is_sent_twice(runs, stub, capsys):
    told = iter([None, "drop after", 503, "drop", None])  # one for each commit that is asked for
    stub.hook = lambda method, path, body: next(told) if "/commit/" in path else None
    call(runs("plain"), "--repo", "org/tiny")
    made = stub.repositories[KEY]["branches"]
    assert {name: [commit["title"].split()[0] for commit in made[name]] for name in made} == {
        name: [name, "initial"] for name in ("chck_8", "chck_50", "main")}
    assert capsys.readouterr().out.count("trying again") == 3
    assert {name: stub.files(KEY, "main")[name] for name in MODEL} == local(runs("plain"))


def test_a_network_that_stays_broken_ends_after_a_few_attempts(runs, stub):
    stub.hook = lambda method, path, body: "drop" if path.endswith("/commit/chck_50") else None
    with pytest.raises(UserError, match=r"sending chck_50 to .*: no network, or .* did not answer.*run the same command again"):
        call(runs("plain"), "--repo", "org/tiny")
    assert commits(stub) == ["chck_8", *["chck_50"] * hub.ATTEMPTS]


# ---- What is there already ----------------------------------------------------------------------------------------------


def test_what_others_put_there_is_refused_before_anything_is_sent(runs, stub, capsys):
    stub.create(KEY)
    stub.commit(KEY, "chck_50", "my own", {"model.safetensors": (b"theirs", True), "notes.txt": (b"x", False)})
    with pytest.raises(UserError, match=r"revision chck_50: there with other content: model.safetensors; .*--overwrite"):
        call(runs("plain"), "--repo", "org/tiny")
    assert stub.writes == []
    call(runs("plain"), "--repo", "org/tiny", "--dry_run")
    assert "NOT of this run: refused without --overwrite" in capsys.readouterr().out and stub.writes == []
    call(runs("plain"), "--repo", "org/tiny", "--overwrite")
    assert stub.files(KEY, "chck_50") == local(runs("plain") / "chck_50")


def test_a_card_that_was_edited_on_the_hub_is_not_lost(runs, stub):
    call(runs("plain"), "--repo", "org/tiny")
    files = dict(stub.repositories[KEY]["branches"]["main"][0]["files"])
    stub.commit(KEY, "main", "Update README.md", {**files, "README.md": (b"better words", False)})
    with pytest.raises(UserError, match=r"revision main: there with other content: README.md"):
        call(runs("plain"), "--repo", "org/tiny")
    assert stub.files(KEY, "main")["README.md"] == b"better words"


def test_what_this_run_sent_itself_may_change(runs, stub):
    """A licence is added: only the card is sent. A left-over adapter would be loaded instead of the weights: it goes."""
    call(runs("plain"), "--repo", "org/tiny")
    newest = stub.repositories[KEY]["branches"]["main"][0]
    newest["files"]["adapter_config.json"] = (b"{}", False)
    before = {name: stub.files(KEY, "main")[name] for name in MODEL}
    stub.writes.clear()
    call(runs("plain"), "--repo", "org/tiny", "--license", "mit")
    assert commits(stub) == ["main"] and not any(method == "PUT" for method, _ in stub.writes)
    after = stub.files(KEY, "main")
    assert {name: after[name] for name in MODEL} == before and b"license: mit" in after["README.md"] and "adapter_config.json" not in after


def test_a_milestone_that_comes_later_does_not_inherit_the_files_of_main(runs, stub):
    call(runs("plain"), "--repo", "org/tiny")
    del stub.repositories[KEY]["branches"]["chck_8"]
    call(runs("plain"), "--repo", "org/tiny")
    assert stub.files(KEY, "chck_8") == local(runs("plain") / "chck_8")


# ---- What is refused ------------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_else_is_looked_at(stub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token .*HF_TOKEN or run: hf auth login"):
        call(tmp_path / "nowhere", "--repo", "org/tiny")


@pytest.mark.parametrize(("told", "message"), [
    ({"token": "hf_" + "b" * 24}, r"logging in: the token is not valid: .*hf auth login \(the hub answered 401: Invalid"),
    ({"repo": "others/tiny"}, r"creating .*/others/tiny as tester: this token may not do that: .*answered 403: You don't have the rights"),
    ({"status": 404}, r"sending chck_8 to .*: no such repository.*answered 404"),
    ({"status": 409}, r"sending chck_8 to .*: something else changed it at the same time: run the same command again"),
    ({"more": ["--license", "nonsense"]}, r'sending main to .*: the hub refuses it: .*"license" must be one of .*Check --license'),
    ({"network": False}, r"logging in: no network, or http://127.0.0.1:9 did not answer"),
])
def test_what_the_hub_refuses_is_said_clearly(runs, stub, monkeypatch, told, message):
    monkeypatch.setenv("HF_TOKEN", told.get("token", TOKEN))
    if told.get("network") is False:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    stub.hook = lambda method, path, body: told.get("status") if "/commit/" in path else None
    with pytest.raises(UserError, match=re.compile(message, re.S)):
        call(runs("plain"), "--repo", told.get("repo", "org/tiny"), *told.get("more", []))
    assert "main" not in commits(stub)
    assert len(set(commits(stub))) == len(commits(stub)), "what will not change was tried again"


def test_a_public_repository_is_not_taken_for_a_private_one(runs, stub):
    stub.create(KEY)
    with pytest.raises(UserError, match="there already and is public: --private cannot hide it"):
        call(runs("plain"), "--repo", "org/tiny", "--private")
    assert stub.writes == []


@pytest.fixture
def copy(runs, tmp_path):
    """copy("plain") -> a run folder that may be damaged."""
    return lambda name: Path(shutil.copytree(runs(name), tmp_path / name))


def test_unfinished_and_damaged_runs_are_refused_by_name(copy, stub):
    run = copy("plain")
    with (run / "chck_50/model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match="chck_50 is not whole"):
        call(run, "--repo", "org/tiny")
    shutil.rmtree(run / "chck_50")
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="its weights are damaged"):
        call(run, "--repo", "org/tiny")
    (run / "model.safetensors").write_bytes(whole)
    (run / "run/finished.json").unlink()
    with pytest.raises(UserError, match="is an unfinished run; finish it first"):
        call(run, "--repo", "org/tiny")
    assert stub.writes == [] and list(milestone_folders(run)) == ["chck_8"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--private", "--license", "mit"], "--private, --license: only with --repo org/name"),
    (["--repo", "tiny"], "--repo tiny: it needs the form org/name"),
    (["--repo", "org/a b"], "--repo org/a b: "),
    (["again", "--repo", "org/tiny"], "--repo takes one run"),
])
def test_options_that_do_not_fit(runs, stub, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(runs("plain"), *arguments)


# ---- Dry run and privacy --------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_everything_and_sends_nothing(copy, stub, monkeypatch, capsys):
    run = copy("plain")
    record = json.loads((run / "run/record.json").read_text())
    record |= {"git_diff": f"+key = '{TOKEN}'\n+more", "command": f"python train_baseline.py --config {run}/a.yaml judge_api_key=abcdefgh1"}
    (run / "run/record.json").write_text(json.dumps(record))
    (run / "private.txt").write_text("a diary")
    call(run, "--repo", "org/tiny", "--dry_run")
    told = capsys.readouterr().out
    assert "model org/tiny: would be created" in told and stub.writes == [] and stub.repositories == {}
    for line in ("revision chck_8: 5 files", "revision chck_50: 5 files", "revision main: 10 files", "model.safetensors  ",
                 "run/record.json: its git_diff (2 lines) is not sent", "run/record.json: 1 secret and ",
                 "plain: private.txt is no part of a model: not sent"):
        assert line in told, line
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    call(run, "--repo", "org/tiny", "--dry_run")
    told = capsys.readouterr().out
    assert "what the hub has is unknown (ConnectError" in told and "revision main: 10 files" in told and "no token was found" in told

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    call(run, "--repo", "org/tiny")
    sent = b"".join(content for branch in ("chck_8", "chck_50", "main") for name, content in stub.files(KEY, branch).items())
    for secret in (TOKEN, "abcdefgh1", "a diary", str(run.parent), str(Path.home()) + "/"):
        assert secret.encode() not in sent, secret
    said = json.loads(stub.files(KEY, "main")["run/record.json"])["git_diff"]
    assert said.startswith("left out when this was published: 2 lines, sha256")
    call(run, "--repo", "org/tiny", "--dry_run")
    assert capsys.readouterr().out.count("is there already") == 3


@pytest.mark.parametrize(("text", "cleaned"), [
    ("path: /home/ann/data/corpus", "path: …/corpus"),
    ("/data/ann/models/teacher/chck_1M", "…/teacher/chck_1M"),
    (f'"output": "{ROOT}/models/cpu"', '"output": "models/cpu"'),
    (f"x={Path.home()}/secret plans/run", "x=…/secret plans/run"),
    ("models/cpu/teacher and/or ./a/b https://huggingface.co/org/name 1/2/3 </s>", None),
    ("key hf_abcdefghijklmnopqrst sk-abcdefghijklmnopqrst", "key <left out> <left out>"),
    ("https://ann:pass@host/x", "https://<left out>@host/x"),
    ("OPENAI_API_KEY=abcdefghij python", "OPENAI_API_KEY=<left out> python"),
    ("password: correcthorse", "password: <left out>"),
    ('{"tokens_per_s": 123456789.5, "max_token": 123456789} bos_token: </s> tokenizer: corpus/tokenizer', None),
    ("path:/home/alice/secret/x", "path:…/x"),
    ("PATH=/a/bin:/c/bin cp ann@host:/home/ann/x .", "PATH=…/bin:…/bin cp ann@host:…/x ."),
    ("file:///home/alice/x file://host/home/alice/y", "…/x …/y"),
    ("~alice/secret/x", "…/x"),
    ("corpus: /home/al ice/My Texts/x", "corpus: …/x"),
    ('"/home/al ice/My Texts/x" \'a=\\"/home/alice (old)/x\\"\'', '"…/x" \'a=\\"…/x\\"\''),
    (f"/mnt{ROOT}/models", "…/models"),
    ("https://token123@host/x https://ann:p@ss@host:80/x", "https://<left out>@host/x https://<left out>@<left out>/x"),
    ("ssh://git@github.com/org/x git@github.com:org/x", None),
    ("https://x.org/y?access_token=abcdefgh1&page=2", "https://x.org/y?access_token=<left out>&page=2"),
    ("password: 12345678", "password: <left out>"),
    ("db_password: correct horse 'battery'", "db_password: <left out>"),
    ("--password x --api-key abcdefgh1 --lr 1e-4", "--password <left out> --api-key <left out> --lr 1e-4"),
    ('"command": "python \\"password\\": \\"a b, c\\" lr=1"', '"command": "python \\"password\\": \\"<left out>\\" lr=1"'),
    ("api_key: 1234567890\npassword:\nnext: a\npassword: null", "api_key: <left out>\npassword:\nnext: a\npassword: null"),
    ("Authorization: Bearer abcdefgh12\n-H 'x: bearer abc.DEF-12'", "Authorization: <left out>\n-H 'x: bearer <left out>'"),
    ("Basic YWxhZGRpbjpvcGVu, basic understanding of bearer certificates", "Basic <left out>, basic understanding of bearer certificates"),
    (f"WANDB_KEY={HEX} wandb login {HEX} key: {HEX}", "WANDB_KEY=<left out> wandb login <left out> key: <left out>"),
    ("glpat-abcdefghijklmnopqrst xoxb-123456789012-abc eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "<left out> <left out> <left out>"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<left out>"),
    (f'"git_commit": "{HEX}", "corpus_sha256": "{HEX * 2}"[:64], commit `{HEX}` sha256:{HEX}', None),
    ("  server: http://node17:8000/v1\n  server: null", "  server: <left out>\n  server: null"),
    ("ppo.py rewards.0.server=https://judge.example.org/v1 'rewards.1.server=\"http://10.0.0.5/v1\"'",
     "ppo.py rewards.0.server=<left out> 'rewards.1.server=\"<left out>\"'"),
    ("http://node17/v1 ws://10.0.0.5:80/x https://gpu.corp.internal/ 10.1.2.3:8000",
     "http://<left out>/v1 ws://<left out>/x https://<left out>/ <left out>"),
    ("http://localhost:8000/v1 http://127.0.0.1/ https://api.openai.com/v1 s3://bucket/key numpy 10.4.3.29", None),
    ("loss per token: 3.4512345678 eos_token: <|endoftext|> api_key_variable: OPENAI_API_KEY kl_reduction: token_mean", None),
])
def test_secrets_and_folders_are_taken_out_and_nothing_else(text, cleaned):
    found, changed = without_private(text)
    assert found == (text if cleaned is None else cleaned) and bool(changed) == (found != text and f'"{ROOT}' not in text)
    assert without_private(found) == (found, [])  # what was taken out is not taken out again


@pytest.mark.parametrize("text", ["a-" * 20_000, "a_" * 20_000, "/a" * 20_000, "://" + "a" * 40_000, 'password="' * 4000, "/" * 40_000])
def test_long_texts_are_cleaned_in_time(text):
    began = time.monotonic()
    without_private(text)
    assert time.monotonic() - began < 20


def test_a_whole_record_keeps_what_it_needs_and_loses_what_is_private(copy, tmp_path):
    """Every file of run/ and the card can still be read, with all fingerprints, and as they were but for what was planted."""
    def sent(run):
        main = export_run(run, Options("org/tiny"), tmp_path / "work").revisions[-1]
        return {name: content.decode() for name, content in main.files.items() if isinstance(content, bytes)}

    run = copy("plain")
    plain = {name: text for name in ("config.yaml", "record.json", "metrics.jsonl", "finished.json")
             if (text := (run / "run" / name).read_text())}
    before = sent(run)
    hashes = set(re.findall('"([0-9a-f]{16,})"', re.sub('"git_diff": .*', "", "".join(plain.values()))))
    assert len(hashes) > 3 and all(one in "".join(before.values()) for one in hashes)
    assert before["run/metrics.jsonl"] == plain["metrics.jsonl"]
    record, config = json.loads(plain["record.json"]), yaml.safe_load(plain["config.yaml"])
    private = {"server": "http://10.0.0.5:8000/v1", "path": "/home/alice/secret plans/x", "password": "12345678", "token": "token123",
               "key": HEX, "bearer": "abcdefgh12"}
    record["command"] += (f" rewards.0.server={private['server']} a:{private['path'].replace(' ', '_')} --password {private['password']} "
                          f"url=https://{private['token']}@host/x 'wandb_key=\"{HEX}\"' 'Authorization: Bearer {private['bearer']}'")
    config["rewards"] = [{"kind": "judge", "server": private["server"], "rubric": private["path"]}]
    (run / "run/record.json").write_text(json.dumps({**record, "git_commit": HEX[::-1]}, indent=1))
    (run / "run/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    after = sent(run)
    for value in (*private.values(), "alice", "10.0.0.5", "secret_plans"):
        assert not [name for name, text in after.items() if value in text], value
    read = json.loads(after["run/record.json"])
    assert read["git_commit"] == HEX[::-1] and {**read, "command": "", "git_commit": ""} == {
        **json.loads(before["run/record.json"]), "command": "", "git_commit": ""}
    assert yaml.safe_load(after["run/config.yaml"]) == {**yaml.safe_load(before["run/config.yaml"]), "rewards": [
        {"kind": "judge", "server": "<left out>", "rubric": "…/x"}]}
    assert "server: <left out>" in after["README.md"] and HEX[::-1] in after["README.md"]
    assert all(one in "".join(after.values()) for one in hashes - {record["git_commit"]})
    assert after["run/finished.json"] == before["run/finished.json"] and after["run/metrics.jsonl"] == before["run/metrics.jsonl"]


# ---- Adapters and GGUF ------------------------------------------------------------------------------------------------------


def test_an_adapter_is_merged_before_it_is_sent(runs, stub, tmp_path):
    run = runs("adapter")
    assert (run / "adapter_config.json").is_file() and not (run / "config.json").is_file()
    with pytest.raises(UserError, match="--keep_adapter: the base of .* which nobody else has"):
        call(run, "--repo", "org/tiny", "--keep_adapter")
    call(run, "--repo", "org/tiny")
    ids = torch.arange(12)[None]
    for name, folder in (("main", run), ("chck_50", run / "chck_50")):
        files = stub.files(KEY, name)
        assert "adapter_config.json" not in files and files.keys() >= MODEL
        for file in MODEL:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(files[file])
        assert str(tmp_path.parent).encode() not in b"".join(files[file] for file in MODEL if file.endswith(".json"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        adapted = models.load_adapted_model(folder, "lora", "fp32")
        assert models.largest_logit_difference(merged, adapted, ids) < 1e-5
        assert models.largest_logit_difference(merged, models.load_causal_lm(str(runs("plain"))), ids) > 1e-5
    stub.writes.clear()
    call(run, "--repo", "org/tiny")
    assert stub.writes == []  # merged anew, with the same bytes


CONVERTER = '''
import argparse, json, sys
from pathlib import Path

class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
    args = parser.parse_args()
    config = json.loads(Path(args.model, "config.json").read_text())
    if config["model_type"] == "gpt2":
        config["n_ctx"]  # the real one asks for it
    args.outfile.write_text(f"GGUF {args.outtype} {TextModel().get_vocab_base_pre(None)}")

if __name__ == "__main__":
    main()
'''


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder with a stand-in for llama.cpp's converter: same command line, and it too knows no vocabulary that is trained here."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").write_text(CONVERTER)
    return tmp_path / "llama.cpp"


def test_a_gguf_file_is_made_by_the_converter_and_sent_with_main(runs, stub, llama_cpp, capsys):
    call(runs("plain"), "--repo", "org/tiny", "--gguf", "f16", "--llama_cpp", llama_cpp, "--dry_run")
    assert "plain-f16.gguf  is made when it is sent" in capsys.readouterr().out
    call(runs("plain"), "--repo", "org/tiny", "--gguf", "f16", "--llama_cpp", llama_cpp)
    assert stub.files(KEY, "main")["plain-f16.gguf"] == b"GGUF f16 gpt-2" and b"plain-f16.gguf" in stub.files(KEY, "main")["README.md"]
    assert "plain-f16.gguf" not in stub.files(KEY, "chck_8")


def test_gguf_is_refused_where_the_converter_would_not_or_wrongly_do_it(runs, teachers, llama_cpp, tmp_path):
    options = Options("org/tiny", gguf="f16", llama_cpp=llama_cpp)
    with pytest.raises(UserError, match="does not know the architecture moep"):
        export_run(runs("moep"), options, tmp_path)
    with pytest.raises(UserError, match="does not know the architecture gptj"):
        export.require_gguf(teachers("gptj")[0], options)
    with pytest.raises(UserError, match="--gguf needs --llama_cpp.*none was given"):
        export_run(runs("plain"), Options("org/tiny", gguf="f16"), tmp_path)
    gpt2 = Path(shutil.copytree(teachers("gpt2")[0], tmp_path / "gpt2"))
    export.require_gguf(gpt2, options)
    assert export.convert_to_gguf(gpt2, tmp_path / "x.gguf", options).read_text() == "GGUF f16 gpt-2"
    tokenizer = json.loads((gpt2 / "tokenizer.json").read_text())
    (gpt2 / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(UserError, match=r"failed:\n.*(?s:.*)pre-tokenizer was not recognized"):  # never called GPT-2's where it is not
        export.convert_to_gguf(gpt2, tmp_path / "y.gguf", options)
    shape = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**shape, "n_inner": 50}))
    with pytest.raises(UserError, match="4 x 24 wide; that of .* is 50 wide, and the file would be wrong"):
        export.require_gguf(gpt2, options)


# ---- The card ------------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_records_say_and_calls_the_rest_unknown(copy, small):
    run = copy("plain")
    result = json.loads((run / "run/finished.json").read_text())
    card = model_card(run, result, run)
    assert (run / "README.md").read_text() == card  # the one that every finished run carries
    words = json.loads((small / "manifest.json").read_text())["parts"]["train"]
    assert all(f"| {name} | {part['documents']:,} | {part['words']:,} |" in card for name, part in words["domains"].items())
    record, rows = json.loads((run / "run/record.json").read_text()), [json.loads(row) for row in (run / "run/metrics.jsonl").open()]
    for text in (record["git_commit"], record["command"], f"torch {record['packages']['torch']}", f"{result['parameters']:,} parameters",
                 "architecture: llama", "batch_size: 4", "Verdict: **legal for strict-small**", "Licence: unknown",
                 "Unknown: not scored yet"):
        assert text in card, text
    milestone = next(row for row in rows if row["kind"] == "milestone")
    trained = next(row for row in rows if row["kind"] == "train" and row["step"] == milestone["step"])
    assert f"| `chck_8` | {milestone['words']:,} | {milestone['step']} | {trained['ce']:.4f} |" in card
    (run / "run/record.json").unlink()
    other = model_card(run, {**result, "ledger": {**result["ledger"], "corpus_sha256": "0" * 64}}, run)
    assert "Its domains are unknown" in other and "| git commit | unknown |" in other and "| command | unknown |" in other
    assert not any(f"| {part['documents']:,} | {part['words']:,} |" in other for part in words["domains"].values())


def test_scores_of_these_weights_are_in_the_card_with_errors_and_those_of_others_are_not(copy, tmp_path):
    run, results = copy("plain"), tmp_path / "results"

    def write(home, checkpoint, score):
        (results / home).mkdir(parents=True)
        entry = {"task": "blimp", "score": score, "se": 1.25, "n": 1400, "ties": 0.02, "kind": "accuracy", "chance": 50.0,
                 "identity": {"checkpoint": checkpoint}}
        (results / home / "summary.json").write_text(json.dumps({"tasks": {"blimp_fast": entry}}))

    mine = models.checkpoint_fingerprint(run)
    write("plain/main/zero_shot/causal", mine, 61.5)
    write("plain/untrained/zero_shot/causal", "untrained " + models.checkpoint_fingerprint(run, weights=False), 49.5)
    write("plain/chck_8/zero_shot/causal", models.checkpoint_fingerprint(run / "chck_8"), 55.5)
    write("plain/chck_50/zero_shot/causal", "another", 77.7)
    write("plain/gone/zero_shot/causal", mine, 88.8)
    write("2026/plain/main/zero_shot/causal", mine, 44.4)
    scores, notes = evaluation(run, results)
    card = model_card(run, json.loads((run / "run/finished.json").read_text()), run, "org/tiny", scores=scores)
    assert "| blimp_fast | 1,400 | 61.50 ± 1.25 (2.0 % ties) | 49.50 ± 1.25 (2.0 % ties) | 50 |" in card
    assert re.search(r"\| `chck_8` .* \| 55.50 ± 1.25 \|", card) and re.search(r"\| `chck_50` .* \| - \|", card)
    assert "suite 2026" in card and "44.40 ± 1.25" in card and "77.7" not in card and "88.8" not in card
    assert len(notes) == 1 and "the scores of chck_50 are of other weights" in notes[0]
    values = [(result.dataset_type, result.metric_type, result.metric_value) for result in ModelCard(card).data.eval_results]
    assert ("blimp_fast", "accuracy", 61.5) in values


def test_the_card_of_a_run_that_learned_from_rewards(copy):
    """Other sections in the config, words generated, rewards in the curve, what it was before."""
    run = copy("plain")
    config = {"name": "rl", "output": "models", "seed": 2, "algorithm": "ppo", "model": {"path": "models/student"},
              "data": {"corpus": "corpus_split"}, "prompts": {"source": "corpus", "words": 8, "column": None},
              "rewards": [{"kind": "grammar", "weight": 1.0, "teacher": "models/teacher"}], "ppo": {"kl": {"target": 6.0}, "epochs": 4}}
    (run / "run/config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"kind": "train", "step": 5, "words": 4000, "reward": 1.5, "kl": 0.25}, {"kind": "eval", "step": 5, "ce": 2.125, "words": 4000},
            {"kind": "milestone", "step": 6, "name": "chck_5K", "words": 5120}]
    (run / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((run / "run/finished.json").read_text())
    del result["weights_from_step"]
    result["ledger"] |= {"generated_words": 9000, "corpus_words": 0, "corpus_sha256": None}
    result |= {"reward": 0.5, "before": {"reward": 0.25, "ce": 2.0}}
    card = model_card(run, result, run)
    assert "Trained further by PPO (rewards below), starting from the weights of `models/student`" in card
    assert "9,000 words generated by itself" in card and "- ppo" in card.split("---")[1]
    assert "| `chck_5K` | 5,120 | 6 | 0.2500 | 1.5000 | 2.1250 (5) |" in card and "| revision | words generated |" in card
    assert "| reward | 0.2500 | 0.5000 |" in card and "rewards for 9,000 words of its own writing" in card
    assert "kind: grammar" in card and "target: 6.0" in card and "column" not in card and "What it says" not in card
    assert "what the reward does not measure" in card
