"""The chat as people meet it: a page in a real browser, and a terminal as a pipe and as a real one."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small_models import make_models_folder, make_run

from babylm.run_folder import run_stage
from babylm.schema import UserError
from interactive import chat, generation
from interactive.chat import CHAT, CONTINUE, Ongoing, Sessions, Settings, Side, answer, board, together
from interactive.generation import ModelsFolder, NextTokens, Step

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run"]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{value}} </s>"


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    return make_models_folder(tmp_path_factory.mktemp("chat") / "models", tokenizer)


# ---- One answer, without a page -------------------------------------------------------------------------------------


def run_side(place, side, asked="The cat", mode=CONTINUE, turns=(), **knobs):
    for _ in answer(place, side, asked, turns, mode, Settings.of(new_tokens=8, **knobs), lambda: False):
        pass
    return side


def test_whatever_fails_ends_as_text(root, monkeypatch, capsys):
    place = ModelsFolder(root)
    for side, asked, said in ((Side("gpt2", "main"), " ", "no text yet"), (Side("damaged", "main"), "a", "cannot load damaged"),
                              (Side("../x", "main"), "a", "no run"), (Side("gpt2", "../../x"), "a", "no milestone")):
        assert said in run_side(place, side, asked).error and side.state == "done" and side.expects is None
    assert "no chat template" in run_side(place, Side("gpt2", "main"), mode=CHAT).error
    monkeypatch.setattr(generation, "_logits", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in run_side(place, Side("gpt2", "main")).error
    assert "1 / 0" in capsys.readouterr().err  # the log has the trace


def test_two_answers_take_turns(root):
    place, order = ModelsFolder(root), []
    sides = [Side("gpt2", "main"), Side("group/moep", "main")]
    alone = run_side(place, Side("group/moep", "main"), seed=3).written

    def noted(side):
        for _ in answer(place, side, "The cat", (), CONTINUE, Settings(new_tokens=8, seed=3), lambda: False):
            order.append((side.run, len(side.step.ids) if side.step else 0))
            yield

    for _ in together([noted(side) for side in sides]):
        pass
    writing = [run for run, tokens in order if 0 < tokens < 8]
    assert writing[:6] == ["gpt2", "group/moep"] * 3 and sides[1].written == alone  # one's draws do not disturb the other's


def test_what_people_and_models_write_is_escaped():
    side = Side("<b>run", "main", "done", HOSTILE, Step(HOSTILE + "\x1b[2J\u202e", [1], 0.5, "length"), [HOSTILE],
                NextTokens([(HOSTILE, 0.5), ("␣a", 0.0001)], 0.25, 1.0), HOSTILE)
    turns = [{"asked": HOSTILE, "answers": {0: HOSTILE}}]
    for seen in (board([side], Settings()), board([side, side], Settings(), turns, CHAT), board([], message=HOSTILE)):
        assert "<script" not in seen and "<img" not in seen and "<b>run" not in seen and "\x1b" not in seen and "\u202e" not in seen
    assert "&lt;0.1%" in board([side], Settings()) and "␛" in board([side], Settings())


def test_one_page_has_one_answer():
    sessions = Sessions()
    with sessions.answering("a") as first, sessions.answering("b") as other:
        with sessions.answering("a") as second:
            assert (first.ended_by, second.ended_by, other.ended_by) == ("new", "", "")
            sessions.end("a", "stop")
            sessions.end("nobody", "stop")
            assert (second.ended_by, other.ended_by) == ("stop", "")
    assert sessions.ongoing == {} and Ongoing().ended_by == ""


# ---- The terminal ---------------------------------------------------------------------------------------------------


def test_the_terminal_as_a_pipe(root, tmp_path):
    """A real process, without gradio; nothing that acts on a terminal comes out."""
    (tmp_path / "gradio.py").write_text("raise ImportError('not installed')")
    command = [sys.executable, "-m", "interactive.chat", "--models", str(root), str(root / "gpt2"), str(root / "group" / "moep")]
    lines = ["/compare off", "/set new_tokens 6", "The cat", "/set temperature 0", "The </s>\x1b[31m dog", "/retry", "/set seed x",
             "/next", "/on",
             "/compare group/moep", "/model", "The king", "/compare off", "/model ../x", "/model gpt2 chck_9K", "/mode chat", "Hello",
             "/what", "/help", "/clear", "/next", "/quit"]
    done = subprocess.run([*command, "--terminal"], input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=300,
                          cwd=Path(chat.__file__).parent.parent, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "\x1b" not in out and "Traceback" not in done.stderr
    for said in ("models: gpt2 (main), group/moep (main). ",
                 "gpt2 (main): ", "· seed 1]", "temperature 0.0", "note: </s>: read as plain characters", "greedy]",
                 "error: seed:", "on all other tokens, as undecided as among", "gpt2 (main) | group/moep (main)", "group/moep (main): ",
                 "no run '../x'", "gpt2 has these milestones: main, chck_2K", "has no chat template", "no command /what", "/compare [RUN",
                 "/next: there is no text yet"):
        assert said in out, f"{said!r} not in\n{out}"
    assert "█" in out and "1 control character was removed" in out


def test_a_page_without_gradio_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio .or use --terminal"):
        chat.page(ModelsFolder(root))


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(root, monkeypatch):
    """In a terminal of its own: the process that reads it is told by the terminal, as a person's is."""
    compute = generation._logits
    monkeypatch.setattr(generation, "_logits", lambda *given: time.sleep(0.05) or compute(*given))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--models", str(root), "--terminal", str(root / "group" / "moep")])
    child, screen = pty.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
            run_stage(chat.main)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    seen = ""

    def until(text, after=0):
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen[after:]:
            assert time.monotonic() < end and select.select([screen], [], [], 60)[0], seen
            seen += os.read(screen, 4096).decode(errors="replace")
        return seen.index(text, after) + len(text)

    def until_it_waits():
        for _ in range(3):  # an interrupt between the prompt and the wait for input is seen only with the next key
            while Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] != "S":
                time.sleep(0.05)
            time.sleep(0.05)

    until("> ")
    os.write(screen, b"The cat sat\n")
    until("\x1b[36m")  # it writes, in colour
    os.write(screen, b"\x03")
    here = until("> ", until("· stopped ·"))
    os.write(screen, b"/set seed 4\n")  # it goes on: the first one stopped the answer alone
    here = until("> ", until("new_tokens 80", here))
    until_it_waits()
    os.write(screen, b"\x03")
    until("> ", until("once more leaves", here))
    until_it_waits()
    os.write(screen, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(screen)


# ---- The page -------------------------------------------------------------------------------------------------------


class Gate:
    """Lets a number of tokens be computed, one every 10 ms, and counts them; then waits until it is opened."""

    def __init__(self):
        self.calls, self.left = 0, None

    def hold_after(self, tokens):
        self.calls, self.left = 0, threading.Semaphore(tokens)

    def open(self):
        held, self.left = self.left, None
        for _ in range(1000):
            held.release()

    def __call__(self, *given):
        self.calls += 1
        if left := self.left:  # another thread may open it right now
            time.sleep(0.01)
            left.acquire(timeout=60)
        return self.compute(*given)


@pytest.fixture(scope="module")
def gate():
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        gate.compute = generation._logits
        patch.setattr(generation, "_logits", gate)
        yield gate


@pytest.fixture(scope="module")
def address(root, gate, tokenizer):
    """A page that is being served."""
    make_run(root / "gone", "gpt2", tokenizer)
    demo = chat.page(ModelsFolder(root), first=("gpt2", "main"), second=("group/moep", "main"))
    _, address, _ = demo.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield address
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def watched(browser, address):
    """The page, and what it asks for and complains about: (page, addresses, complaints)."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("response", lambda answer: complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
    page.goto(address)
    page.wait_for_selector("#caption p")
    return page, asked, complaints


@pytest.fixture
def page(watched):
    """The page, cleared."""
    page = watched[0]
    page.click("#clear")
    page.wait_for_selector(".board .empty")
    return page


def choose(page, box, option):
    page.click(f"{box} input")
    page.click(f"[role=option]:has-text('{option}')")
    page.wait_for_function("([box, option]) => document.querySelector(box + ' input').value === option", arg=[box, option])


def write(page, text, button="#write"):
    """What was there before is marked, so that `done` waits for what comes."""
    page.evaluate("document.querySelector('.board').dataset.old = 1")
    page.fill("#text textarea", text)
    page.click(button)


def done(page):
    page.wait_for_selector(".board:not([data-old]) .card[aria-busy=false]")
    page.wait_for_selector("#write:not([disabled])")
    return [card.inner_text() for card in page.query_selector_all(".card")]


def test_choose_type_stream_stop_retry_clear(page, gate):
    assert page.title() == "BabyLM models · models" and "base model" in page.inner_text("#caption")
    choose(page, "#run-a", "gpt2")
    choose(page, "#milestone-a", "chck_10K")
    gate.hold_after(20)
    write(page, "The cat sat on the mat")
    page.wait_for_function("document.querySelector('.written')?.innerText.length > 5")  # it streams: the gate is still closed
    early = page.inner_text(".written")
    assert page.inner_text(".typed") == "The cat sat on the mat" and page.inner_text(".card header") == "gpt2\nchck_10K"
    page.wait_for_function("document.querySelector('#stop:not([disabled])')")
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.click("#stop")
    gate.open()
    [card] = done(page)
    assert "stopped" in card and "tokens/s" in card and "seed 1" in card and page.inner_text(".written").startswith(early)
    assert gate.calls <= 22  # the 20, one that was waiting, and the bars: nothing is computed behind one's back
    assert len(page.query_selector_all(".bar")) == 10 and "equally likely" in card

    write(page, "The cat sat on the mat")
    done(page)
    first = page.inner_text(".written")
    page.click("#retry")
    page.wait_for_function("document.querySelector('.card .meta')?.innerText.includes('seed 2')")
    [card] = done(page)
    assert page.input_value("#seed input") == "2" and page.inner_text(".written") != first
    page.fill("#seed input", "1")
    page.click("#write")
    page.wait_for_function("document.querySelector('.card .meta')?.innerText.includes('seed 1')")
    done(page)
    assert page.inner_text(".written") == first  # same seed, same text: same answer
    page.click("#more")
    page.wait_for_function("document.querySelector('#text textarea').value.length > 22")
    done(page)
    assert page.input_value("#text textarea").startswith("The cat sat on the mat") and len(page.inner_text(".typed")) > 22
    page.click("#clear")
    page.wait_for_selector(".board .empty")
    assert page.input_value("#text textarea") == ""
    page.click("#retry")
    page.wait_for_selector(".error:has-text('press Write first')")


def test_clearing_ends_what_is_being_written(page, gate):
    gate.hold_after(12)
    write(page, "The dog")
    page.wait_for_selector(".written:not(:empty)")
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.click("#clear")
    gate.open()
    page.wait_for_selector(".board .empty")
    page.wait_for_selector("#write:not([disabled])")
    assert page.query_selector(".card") is None and gate.calls <= 14


def test_two_models_side_by_side(page, gate):
    page.check("#compare input")
    page.wait_for_selector("#run-b input")
    choose(page, "#run-b", "group/moep")
    gate.hold_after(30)
    write(page, "The king and the queen")
    page.wait_for_function("[...document.querySelectorAll('.written')].filter(one => one.innerText.length > 3).length === 2")  # both stream
    gate.open()
    page.wait_for_function("document.querySelectorAll('.card[aria-busy=false]').length === 2")
    cards = done(page)
    assert len(cards) == 2 and "group/moep" in cards[1] and len(page.query_selector_all(".bars")) == 2
    boxes = [card.bounding_box() for card in page.query_selector_all(".card")]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2 and boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"]
    page.uncheck("#compare input")
    page.wait_for_selector("#run-b", state="hidden")


def test_what_comes_next_without_writing(page):
    write(page, "The cat", "#peek")
    [card] = done(page)
    assert page.query_selector(".written").inner_text() == "" and len(page.query_selector_all(".bar")) == 10
    widths = [bar.bounding_box()["width"] for bar in page.query_selector_all(".bar .track i")]
    assert widths == sorted(widths, reverse=True) and widths[0] > 100


def test_a_tuned_model_chats(page):
    choose(page, "#run-a", "tuned")
    page.wait_for_selector("#mode >> text=Chat")
    page.click(f"#mode label:has-text('{CHAT}')")
    for number, said in enumerate(("Hello there", "And </s> then?"), start=1):
        write(page, said)
        page.wait_for_function("n => document.querySelectorAll('.typed').length === n", arg=number)
        done(page)
    texts = [one.inner_text() for one in page.query_selector_all(".typed")]
    assert texts[0] == "Hello there" and texts[1] == "And < /s> then?" and page.input_value("#text textarea") == ""
    assert "broken up" in page.inner_text(".notes")
    choose(page, "#run-a", "gpt2")  # a base model: chat is no longer offered
    page.wait_for_selector("#caption:has-text('base model')")
    page.wait_for_selector("#mode", state="hidden")
    write(page, "The cat")
    [card] = done(page)
    assert "You" not in card


def test_errors_are_text_on_the_page(page, root, gate):
    """Nothing spins for ever: an empty text, damaged weights, a model that went away, values that are no numbers."""
    write(page, "  ")
    page.wait_for_selector(".error:has-text('no text yet')")
    choose(page, "#run-a", "damaged")
    write(page, "The cat")
    page.wait_for_selector(".error:has-text('damaged or incomplete')")
    choose(page, "#run-a", "gone")
    page.wait_for_selector("#caption:has-text('base model')")
    shutil.rmtree(root / "gone")
    write(page, "The cat")
    page.wait_for_selector(".error:has-text('any more')")
    assert str(root) not in page.inner_text("body")
    choose(page, "#run-a", "group/llama")
    compute = gate.compute
    gate.compute = lambda *given: 1 / 0
    try:
        write(page, "The cat")
        page.wait_for_selector(".error:has-text('ZeroDivisionError')")
    finally:
        gate.compute = compute
    choose(page, "#run-a", "gpt2")
    write(page, "The cat")
    assert "tokens/s" in done(page)[0]


def test_hostile_text_is_shown_and_nothing_else(page, watched):
    for text in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "${alert(3)} {{value}} </s>"):
        write(page, text)
        [card] = done(page)
        assert page.inner_text(".typed") == text and page.query_selector(".board script, .board img") is None
    assert "</s>: read as plain characters" in card and watched[2] == []
    write(page, "word " * 300)
    page.wait_for_selector(".notes:has-text('64 positions')")
    done(page)


def test_a_phone_and_the_dark(browser, address):
    """Nothing to scroll sideways at 390 px, every button in reach; what is written can be read in the dark (WCAG AA: 4.5)."""
    for theme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(120_000)
        page.goto(f"{address}?__theme={theme}")
        page.wait_for_selector("#caption p")
        page.check("#compare input")
        write(page, "Supercalifragilistic" * 5, "#peek")
        page.wait_for_function("document.querySelectorAll('.bars').length === 2")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for button in page.query_selector_all("#buttons button"):
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 32
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 10 and min(contrasts.values()) >= 4.5, contrasts
        page.close()


CONTRAST = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => top[i] * a + under[i] * (1 - a)); };
  const luminance = rgb => { const [r, g, b] = rgb.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = node => { const layers = []; for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor); if ((colour[3] ?? 1) > 0) layers.push(colour);
      if (colour.length === 3) break; }
    return layers.reduceRight((under, top) => over(top, under), [255, 255, 255]); };
  const found = {};
  for (const where of ['h1', '#head p', '#head .where', '#caption p', '#rule p', '.card header b', '.card header span', '.typed',
                       '.written',
                       '.meta', '.bar code', '.bar span:last-child', '.card h2', '#write', '#retry', '#examples button',
                       '#text textarea']) {
    const node = document.querySelector(where), back = behind(node), front = over(numbers(getComputedStyle(node).color), back);
    const [high, low] = [luminance(front), luminance(back)].sort((a, b) => b - a);
    found[where] = (high + .05) / (low + .05);
  }
  return found; }"""


def test_the_api_of_the_page_is_no_way_around_it(address, root):
    """Crafted calls: no path outside the models folder is read, no file is served, nothing can be uploaded."""
    config = json.load(urllib.request.urlopen(f"{address}config"))
    functions = [one["id"] for one in config["dependencies"] if len(one["inputs"]) > 8]
    assert len(functions) == 4  # write, next token, retry, write on
    for function in functions:
        for run, milestone in (("../../etc", "main"), (str(root / "gpt2"), "main"), ("gpt2", "../group/moep"), ("gpt2", "run")):
            data = ["The cat", CONTINUE, run, milestone, False, "gpt2", "main", 0, 0, 1, 1, 5, 1, None]
            answer = call(address, function, data)
            assert "tokens/s" not in answer and ("error" in answer or "no run" in answer), answer
    assert "tokens/s" in call(address, functions[0], ["The cat", CONTINUE, "gpt2", "main", False, "gpt2", "main", 0, 0, 1, 1, 5, 1, None])
    for path in (root / "gpt2" / "config.json", "/etc/passwd", "models", Path(chat.__file__)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.py"\r\n\r\nprint(1)\r\n--x--\r\n'
    upload = urllib.request.Request(f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(upload)
    assert json.load(urllib.request.urlopen(f"{address}gradio_api/info"))["named_endpoints"] == {}


def call(address, function, data):
    """What the page's own server answers to a call of one of its functions, made by hand."""
    session = f"crafted{time.monotonic_ns()}"
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"}))
    except urllib.error.HTTPError as error:
        return f"error {error.code}"
    seen = ""
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events:
            seen += line.decode()
            if "process_completed" in seen or "close_stream" in seen:
                return seen
    return seen


def test_no_request_leaves_this_computer(watched, address):
    """Fonts, scripts, analytics: all local, after everything above was clicked. The console has nothing to complain of."""
    _, asked, complaints = watched
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert complaints == []
