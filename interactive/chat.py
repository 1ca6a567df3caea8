"""Talk to the models: a page in the browser, or a terminal.

    python -m interactive.chat                                        every run in models/, at http://127.0.0.1:7860
    python -m interactive.chat models/A models/B                      these runs alone; B is the one to compare with
    python -m interactive.chat --models models/cpu --terminal         without a browser

Reads   run folders and their milestones; writes nothing.
Needs   gradio for the page; nothing beyond the pipeline's own packages for the terminal.

A text is continued (these are base models), or answered in the tokenizer's chat template where it has one. Under it stands what
the model expects next. The page is for this computer alone unless --host or --share says otherwise.
"""

import argparse
import contextlib
import functools
import html
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from babylm.run_folder import run_stage
from babylm.schema import UserError
from interactive.generation import (
    CODE_RULE,
    MAIN,
    REASONS,
    HubModels,
    Models,
    ModelsFolder,
    NextTokens,
    Settings,
    Step,
    chat_prompt,
    next_tokens,
    stream,
    text_prompt,
    visible,
)

if TYPE_CHECKING:
    import gradio as gr

CONTINUE, CHAT = "Continue a text", "Chat"
EXAMPLES = ("Once upon a time, there was a little", "The children went to the park because", "A: What did you do today?\nB: I")
REDRAW_SECONDS = 0.06  # between two looks of a streaming text: quicker, browsers fall behind
MAX_TURNS = 50  # of a chat that are kept


# ---- One model's answer ---------------------------------------------------------------------------------------------


@dataclass
class Side:
    """What one model was asked and wrote; changed in place while it answers."""

    run: str
    milestone: str
    state: str = "waiting"  # waiting, loading, writing, done
    typed: str = ""
    step: Step | None = None
    notes: list[str] = field(default_factory=list)
    expects: NextTokens | None = None
    error: str = ""

    @property
    def written(self) -> str:
        return self.step.text if self.step else ""

    def summary(self, settings: Settings) -> str:
        """`34 tokens · 51 tokens/s · stopped: … · seed 1`."""
        if not self.step:
            return ""
        parts = [f"{len(self.step.ids)} token{'' if len(self.step.ids) == 1 else 's'}"]
        if self.step.seconds:
            parts.append(f"{len(self.step.ids) / self.step.seconds:,.0f} tokens/s")
        if self.step.reason:
            parts.append(REASONS[self.step.reason])
        return " · ".join([*parts, f"seed {settings.seed}" if settings.temperature else "greedy"])


def answer(place: Models, side: Side, asked: str, turns: Sequence[tuple[str, str]], mode: str, settings: Settings,
           stop: Callable[[], bool], write: bool = True) -> Iterator[None]:
    """Let one model answer, token by token; yields whenever `side` has changed. Whatever fails ends as text in `side.error`.

    Args:
        turns: (asked, answered) of the conversation so far; chat mode only.
        stop: asked before each token.
        write: False: only what the model expects next.
    """
    try:
        side.state = "loading"
        yield
        model = place.load(side.run, side.milestone)
        if mode == CHAT:
            messages = [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
            prompt = chat_prompt(model, [*messages, {"role": "user", "content": asked}], settings.new_tokens)
        else:
            prompt = text_prompt(model, asked, settings.new_tokens)
        side.state, side.typed, side.notes = "writing", prompt.text, [*model.notes, *prompt.notes]
        yield
        ids = list(prompt.ids)
        if write:
            for step in stream(model, prompt.ids, settings, stop):
                side.step = step
                yield
            ids += step.ids[:-1] if step.reason == "end" else step.ids
        side.expects = next_tokens(model, ids)
    except UserError as error:
        side.error = str(error)
    except Exception as error:  # a person waits for an answer: the reason belongs on the page, the trace into the log
        traceback.print_exc()
        side.error = f"Something failed ({type(error).__name__}: {str(error)[:200]}). The log of the program has the details."
    side.state = "done"
    yield


def together(answers: Sequence[Iterator[None]]) -> Iterator[None]:
    """Several answers in turns, one token each, so that they stream side by side."""
    going = list(answers)
    while going:
        for one in list(going):
            try:
                next(one)
            except StopIteration:
                going.remove(one)
            else:
                yield


# ---- The page: what it looks like -----------------------------------------------------------------------------------


CSS = """
.gradio-container { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; --accent: #0f766e;
  --wash: #0f766e1a; --quiet: #57534e; --line: #e7e5e4; --card: #ffffff; --bad: #b42318; --badwash: #b4231812;
  max-width: 1180px !important; margin: 0 auto !important; }
.dark .gradio-container, .gradio-container.dark { --accent: #2dd4bf; --wash: #2dd4bf26; --quiet: #b5aea8; --line: #44403c;
  --card: #1c1917; --bad: #fda29b; --badwash: #fda29b1f; }
:is(#head, #board, #caption, #rule) .html-container { padding: 0; }
#head h1 { font-size: 1.7rem; font-weight: 650; letter-spacing: -0.02em; margin: .6rem 0 .15rem; color: var(--body-text-color); }
#head p { margin: 0; color: var(--quiet); max-width: 46rem; line-height: 1.5; }
#head .where { color: var(--accent); font-weight: 600; }
#caption p, #rule p { color: var(--quiet); font-size: .85rem; line-height: 1.45; margin: 0; }
#caption .error { color: var(--bad); }
#rule { border-top: 1px solid var(--line); padding-top: .8rem !important; margin-top: .8rem; border-radius: 0; }
#models { gap: .7rem; }
#examples { gap: .5rem; }
#examples button { font-weight: 400; white-space: normal; background: transparent; border: 1px solid var(--line); color: var(--quiet);
  border-radius: 99px; }
#examples button:hover { border-color: var(--accent); color: var(--accent); }
#buttons { gap: .6rem; }
#buttons button { padding-left: .4rem; padding-right: .4rem; }
.board { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.board .card { border: 1px solid var(--line); border-radius: 12px; background: var(--card); padding: 1rem 1.15rem; min-width: 0; }
.board header { display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap; margin-bottom: .6rem; }
.board header b { color: var(--body-text-color); overflow-wrap: anywhere; }
.board header span { color: var(--accent); font-size: .85rem; }
.board .text { font-family: Charter, "Iowan Old Style", Georgia, "DejaVu Serif", serif; font-size: 1.08rem; line-height: 1.65;
  white-space: pre-wrap; overflow-wrap: anywhere; color: var(--body-text-color); }
.board .typed { color: var(--quiet); }
.board .written { background: var(--wash); border-radius: 4px; padding: .08em 0; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.board .who { display: block; font: 600 .75rem var(--font); color: var(--quiet); margin: .7rem 0 .1rem; }
.board .caret { display: inline-block; width: .5em; height: 1em; vertical-align: -.12em; background: var(--accent);
  animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .board .caret { animation: none; } }
.board .meta { color: var(--quiet); font-size: .82rem; margin: .6rem 0 0; font-variant-numeric: tabular-nums; }
.board .notes { margin: .6rem 0 0; padding: 0 0 0 .8rem; border-left: 3px solid var(--accent); list-style: none; font-size: .85rem;
  color: var(--body-text-color); }
.board .notes li { margin: 0 0 .2rem; }
.board .error { color: var(--bad); background: var(--badwash); border-radius: 8px; padding: .6rem .8rem; margin: .6rem 0 0;
  overflow-wrap: anywhere; }
.board h2 { font-size: .9rem; font-weight: 600; margin: 1rem 0 .45rem; padding-top: .8rem; border-top: 1px solid var(--line);
  color: var(--body-text-color); }
.board .bar { display: grid; grid-template-columns: minmax(5.5rem, 8.5rem) minmax(0, 1fr) 3.6rem; gap: .6rem; align-items: center;
  font-size: .85rem; line-height: 1.7; color: var(--body-text-color); }
.board .bar code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre; overflow: hidden; text-overflow: ellipsis;
  text-align: right; background: none; padding: 0; color: inherit; font-size: .85rem; }
.board .track { height: .72rem; }
.board .track i { display: block; height: 100%; background: var(--accent); border-radius: 3px; min-width: 2px; }
.board .bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.board .empty { border: 1px dashed var(--line); border-radius: 12px; padding: 2.2rem 1.5rem; text-align: center; color: var(--quiet);
  line-height: 1.6; }
.board .empty b { display: block; color: var(--body-text-color); font-size: 1.05rem; margin-bottom: .3rem; }
@media (max-width: 480px) { .board .bar { grid-template-columns: 5.5rem minmax(0, 1fr) 3.2rem; } }
@media (min-width: 760px) { .board.two { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
"""


def board(sides: Sequence[Side], settings: Settings | None = None, turns: Sequence[dict] = (), mode: str = CONTINUE,
          message: str = "") -> str:
    """The answers as HTML. Everything that a person or a model wrote is escaped here, and control characters are made visible."""
    if message:
        return f'<div class="board"><div class="card"><p class="error" role="alert">{_text(message)}</p></div></div>'
    if not sides:
        return ('<div class="board"><div class="empty"><b>Nothing written yet</b>Choose a run and one of its milestones, type the '
                "beginning of a text,<br>and press <i>Write</i>. <i>Next token</i> shows what the model expects, without writing."
                "</div></div>")
    scale = max([value for side in sides if side.expects for _, value in side.expects.tokens], default=1)
    cards = "".join(_card(side, number, settings, turns, mode, scale) for number, side in enumerate(sides))
    return f'<div class="board {"two" if len(sides) == 2 else ""}">{cards}</div>'


def _card(side: Side, number: int, settings: Settings, turns: Sequence[dict], mode: str, scale: float) -> str:
    caret = '<i class="caret"></i>' if side.state == "writing" else ""
    written = f'<span class="written">{_text(side.written)}</span>{caret}'
    if mode == CHAT:
        said = _said(turns, number)
        who = f'<span class="who">{_text(side.run)}</span>'
        body = "".join(f'<span class="who">You</span><span class="typed">{_text(asked)}</span>{who}<span class="written">{_text(answered)}'
                       "</span>" for asked, answered in said)
        if side.typed:
            body += f'<span class="who">You</span><span class="typed">{_text(side.typed)}</span>{who}{written}'
    else:
        body = f'<span class="typed">{_text(side.typed)}</span>{written}' if side.typed else ""
    parts = [f"<header><b>{_text(side.run)}</b><span>{_text(side.milestone)}</span></header>"]
    if side.state in ("waiting", "loading"):
        parts.append('<p class="meta">Loading the model …</p>')
    if body:
        parts.append(f'<div class="text">{body}</div>')
    if side.step:
        parts.append(f'<p class="meta">{_text(side.summary(settings))}</p>')
    if side.notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_text(note)}</li>" for note in side.notes)}</ul>')
    if side.error:
        parts.append(f'<p class="error" role="alert">{_text(side.error)}</p>')
    if side.expects:
        parts.append(_bars(side.expects, scale))
    return f'<section class="card" aria-busy="{"false" if side.state == "done" else "true"}">{"".join(parts)}</section>'


def _bars(expects: NextTokens, scale: float) -> str:
    rows = "".join(f'<div class="bar"><code title="{_text(label)}">{_text(label)}</code><span class="track"><i style="width:'
                   f'{100 * value / scale:.1f}%"></i></span><span>{_percent(value)}</span></div>' for label, value in expects.tokens)
    return (f'<h2>What it expects next</h2><div class="bars" role="group" aria-label="Probabilities of the next token">{rows}</div>'
            f'<p class="meta">{_percent(expects.others)} on all other tokens · {_undecided(expects)}</p>')


def _text(text: str) -> str:
    return html.escape(visible(text))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value >= 0.001 else "<0.1%".replace("<", "&lt;")


def _undecided(expects: NextTokens) -> str:
    return f"as undecided as among {max(1, round(math.exp(expects.entropy))):,} equally likely tokens"


# ---- The page: what it does -----------------------------------------------------------------------------------------


@dataclass
class Ongoing:
    """An answer that streams into a page, and whether it has to end."""

    ended_by: str = ""  # stop: what there is stays; clear, or a new answer: it goes, and nothing more is drawn


class Sessions:
    """Who is being answered right now. One page, one answer: a new one ends the one before."""

    def __init__(self) -> None:
        self.ongoing: dict[str, Ongoing] = {}

    @contextlib.contextmanager
    def answering(self, session: str) -> Iterator[Ongoing]:
        self.end(session, "new")
        mine = self.ongoing[session] = Ongoing()
        try:
            yield mine
        finally:  # also when the page is closed in the middle
            if self.ongoing.get(session) is mine:
                del self.ongoing[session]

    def end(self, session: str, by: str) -> None:
        if one := self.ongoing.get(session):
            one.ended_by = by


def page(place: Models, first: tuple[str, str] | None = None, second: tuple[str, str] | None = None) -> "gr.Blocks":
    """The page for a place with models, as gradio Blocks; its `launch()` has the look and the safe options as defaults.

    Args:
        first: (run, milestone) that is chosen at the beginning; without, the first run's first milestone.
        second: the one to compare with; without, the run after the first, or the first run's last milestone.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the page needs gradio: pip install gradio (or use --terminal, which does without)") from error

    runs, sessions, defaults = place.runs(), Sessions(), Settings()
    first = first or (runs[0], place.milestones(runs[0])[0])
    if second is None:
        other = runs[(runs.index(first[0]) + 1) % len(runs)]
        second = (other, place.milestones(other)[-1 if other == first[0] else 0])

    # -- what the buttons do

    def buttons(writing: bool) -> list[Any]:
        """Write, Write on, Next token, Retry; Stop."""
        return [gr.update(interactive=not writing)] * 4 + [gr.update(interactive=writing)]

    def respond(request: gr.Request, inputs: Sequence[Any], write: bool = True, of_last: str = "") -> Iterator[list[Any]]:
        """Yield values for [board, state, text, seed, *buttons] until all sides are done.

        Args:
            of_last: "retry" asks the last text again, with the next seed; "more" goes on from what was written to it.
        """
        asked, mode, run_a, milestone_a, compare, run_b, milestone_b, *values, state = inputs
        knobs, asked, turns = dict(zip(Settings.model_fields, values, strict=True)), str(asked or ""), state["turns"]
        try:
            settings = Settings.of(**knobs)
            if of_last and not turns:
                raise UserError("There is no answer yet: press Write first.")
            if of_last == "more" and mode == CHAT:
                raise UserError("In a chat, the next word is yours: type a message, or choose “Continue a text”.")
        except UserError as error:
            yield [board([], message=str(error)), state, gr.skip(), gr.skip(), *buttons(False)]
            return
        if of_last == "retry":
            settings = settings.model_copy(update={"seed": (settings.seed + 1) % 2**31})
        if of_last:
            asked = turns[-1]["asked"] + (turns[-1]["answers"].get(0, "") if of_last == "more" else "")
            turns = turns[:-1]
        turns = turns if mode == CHAT else []
        sides = [Side(str(run_a), str(milestone_a))] + ([Side(str(run_b), str(milestone_b))] if compare else [])

        def shown() -> str:
            return board(sides, settings, turns, mode)

        with sessions.answering(request.session_hash) as mine:
            answers = [answer(place, side, asked, _said(turns, number), mode, settings, lambda: bool(mine.ended_by), write)
                       for number, side in enumerate(sides)]
            yield [shown(), gr.skip(), asked if of_last == "more" else gr.skip(), settings.seed, *buttons(True)]
            drawn = time.monotonic()
            for _ in together(answers):
                if time.monotonic() - drawn > REDRAW_SECONDS:
                    yield [shown(), *[gr.skip()] * 8]
                    drawn = time.monotonic()
        if mine.ended_by == "new":
            return
        if mine.ended_by == "clear":
            yield [*cleared(), gr.skip(), *buttons(False)]
            return
        answered = {number: side.written for number, side in enumerate(sides) if side.step and not side.error}
        if answered:
            state = {"turns": [*turns, {"asked": asked, "answers": answered}][-MAX_TURNS:]}
        yield [shown(), state, "" if answered and mode == CHAT else gr.skip(), gr.skip(), *buttons(False)]

    def on_write(request: gr.Request, *inputs: Any) -> Iterator[list[Any]]:
        yield from respond(request, inputs)

    def on_next(request: gr.Request, *inputs: Any) -> Iterator[list[Any]]:
        yield from respond(request, inputs, write=False)

    def on_retry(request: gr.Request, *inputs: Any) -> Iterator[list[Any]]:
        yield from respond(request, inputs, of_last="retry")

    def on_more(request: gr.Request, *inputs: Any) -> Iterator[list[Any]]:
        yield from respond(request, inputs, of_last="more")

    def on_stop(request: gr.Request) -> None:
        sessions.end(request.session_hash, "stop")

    def on_clear(request: gr.Request) -> list[Any]:
        sessions.end(request.session_hash, "clear")
        return cleared()

    def cleared() -> list[Any]:
        return [board([]), {"turns": []}, ""]

    # -- what the choices do

    def offer(run: str, milestone: str) -> Any:
        """The milestones of a run that was chosen; the same one stays where the run has it."""
        with contextlib.suppress(UserError):  # it went away: Write says so
            found = place.milestones(run)
            return gr.update(choices=found, value=milestone if milestone in found else found[0])
        return gr.skip()

    def offer_and_look(run: str, milestone: str, mode: str) -> list[Any]:
        """[milestone, mode, caption] of a run that was chosen, in one answer: apart, they would cross."""
        offered = offer(run, milestone)
        return [offered, *look(run, offered.get("value", milestone), mode)]

    def look(run: str, milestone: str, mode: str) -> list[Any]:
        """[mode, caption]: chat is offered where there is a template."""
        try:
            template = place.has_chat_template(run, milestone)
        except UserError as error:
            return [gr.update(visible=False, value=CONTINUE), f'<p class="error" role="alert">{_text(str(error))}</p>']
        if template:
            return [gr.update(visible=True, value=mode), "<p>This model has a chat template: it can answer, or continue a text.</p>"]
        return [gr.update(visible=False, value=CONTINUE), "<p>A base model: it continues your text. (Chat is offered for models whose "
                "tokenizer has a chat template.)</p>"]

    def refresh(run_a: str, run_b: str) -> list[Any]:
        """What a page that is opened or opened again offers: training goes on meanwhile."""
        now = place.runs()
        return [gr.update(choices=now, value=run if run in now else (now or [None])[0]) for run in (run_a, run_b)]

    # -- the page

    many = len(runs) > 1
    with gr.Blocks(title=f"BabyLM models · {place.title}", analytics_enabled=False) as demo:
        state = gr.State({"turns": []}, time_to_live=3600)
        gr.HTML(f"<h1>BabyLM models</h1><p>Small language models that learned from as many words as a child hears. They go on from what "
                f"you write, and show what they expect next. <span class=\"where\">{_text(place.title)} · "
                f"{f'{len(runs)} runs' if many else runs[0].split('/')[-1]}</span></p>", elem_id="head", js_on_load=None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    run_a = gr.Dropdown(runs, value=first[0], label="Model", interactive=many, elem_id="run-a", min_width=150)
                    milestone_a = gr.Dropdown(place.milestones(first[0]), value=first[1], label="Milestone", elem_id="milestone-a",
                                              interactive=True, min_width=120)
                caption = gr.HTML("", elem_id="caption", js_on_load=None)
                compare = gr.Checkbox(label="Compare with a second model", elem_id="compare", container=False)
                with gr.Row(visible=False, elem_id="second") as second_row:
                    run_b = gr.Dropdown(runs, value=second[0], label="Second model", interactive=many, elem_id="run-b", min_width=150)
                    milestone_b = gr.Dropdown(place.milestones(second[0]), value=second[1], label="Its milestone", elem_id="milestone-b",
                                              interactive=True, min_width=120)
                mode = gr.Radio([CONTINUE, CHAT], value=CONTINUE, show_label=False, visible=False, elem_id="mode", container=False)
                text = gr.Textbox(label="Your text", lines=4, max_lines=14, elem_id="text",
                                  placeholder="Type the beginning of a text. Shift+Enter writes on.")
                with gr.Row(elem_id="examples"):
                    examples = [gr.Button(example, size="sm", variant="secondary", min_width=120) for example in EXAMPLES]
                with gr.Row(elem_id="buttons"):
                    write = gr.Button("Write", variant="primary", elem_id="write", min_width=90)
                    more = gr.Button("Write on", elem_id="more", min_width=90)
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=70)
                    retry = gr.Button("Retry", elem_id="retry", min_width=70)
                    peek = gr.Button("Next token", elem_id="peek", min_width=100)
                    clear = gr.Button("Clear", elem_id="clear", min_width=70)
                answers = gr.HTML(board([]), elem_id="board", js_on_load=None, apply_default_css=False)
            with gr.Column(scale=1, min_width=260):
                knobs = [
                    gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: always the likeliest token",
                              elem_id="temperature"),
                    gr.Slider(0, 200, defaults.top_k, step=1, label="Top-k", info="draw from the k likeliest; 0: from all",
                              elem_id="top-k"),
                    gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="draw from the likeliest that hold this share",
                              elem_id="top-p"),
                    gr.Slider(1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1: none",
                              elem_id="penalty"),
                    gr.Slider(1, 512, defaults.new_tokens, step=1, label="New tokens", info="at most", elem_id="new-tokens"),
                    gr.Number(defaults.seed, precision=0, minimum=0, maximum=2**31 - 1, label="Seed", elem_id="seed",
                              info="same seed, same text, same answer; Retry takes the next one"),
                ]
        gr.HTML(f"<p>Whose code runs: {_text(place.code_rule)}</p>", elem_id="rule", js_on_load=None)

        inputs = [text, mode, run_a, milestone_a, compare, run_b, milestone_b, *knobs, state]
        outputs = [answers, state, text, knobs[-1], write, more, peek, retry, stop]
        # An answer may stream for long: several people's run side by side, and Stop does not wait in their queue.
        streaming = {"concurrency_limit": 8, "concurrency_id": "answers", "show_progress": "hidden", "api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([write.click, text.submit], on_write, inputs, outputs, **streaming)
        peek.click(on_next, inputs, outputs, **streaming)
        retry.click(on_retry, inputs, outputs, **streaming)
        more.click(on_more, inputs, outputs, **streaming)
        stop.click(on_stop, None, None, **at_once)
        clear.click(on_clear, None, [answers, state, text], **at_once)
        compare.change(lambda on: gr.update(visible=on), compare, second_row, **at_once)
        # As they come, without gradio's own check, which knows the choices of a moment ago; `place` checks every name itself.
        choosing = {**at_once, "preprocess": False}
        run_a.change(offer_and_look, [run_a, milestone_a, mode], [milestone_a, mode, caption], **choosing)
        run_b.change(offer, [run_b, milestone_b], milestone_b, **choosing)
        gr.on([milestone_a.change, demo.load], look, [run_a, milestone_a, mode], [mode, caption], **choosing)
        demo.load(refresh, [run_a, run_b], [run_a, run_b], **choosing)
        for button, example in zip(examples, EXAMPLES, strict=True):
            button.click(functools.partial(str, example), None, text, **at_once)
        demo.unload(on_stop)
    demo.queue(api_open=False, max_size=64)
    theme = gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="stone", radius_size="md", text_size="md",
                           font=["sans-serif"], font_mono=["monospace"]).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
        body_background_fill="#faf9f7", body_background_fill_dark="#12100e",
        slider_color="*primary_700", slider_color_dark="*primary_500", block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300", block_label_text_color="*neutral_700", checkbox_background_color_selected="*primary_700",
        checkbox_border_color_selected="*primary_700", input_placeholder_color="*neutral_500", button_large_text_weight="500")
    demo.launch = functools.partial(demo.launch, theme=theme, css=CSS, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
                                    max_file_size=1, enable_monitoring=False, state_session_capacity=500, show_error=True)
    return demo


def _said(turns: Sequence[dict], number: int) -> list[tuple[str, str]]:
    """(asked, answered) of the turns in which the model at this side of the page took part."""
    return [(turn["asked"], turn["answers"][number]) for turn in turns if number in turn["answers"]]


def space(repo: str, revision: str = MAIN) -> "gr.Blocks":
    """The page for one repository of the Hugging Face hub: its revisions chck_* are the milestones, its code never runs.

    In a Space, `space("org/name").launch()` is the whole app.

    Raises:
        UserError: there is no such repository, or the hub does not answer.
    """
    torch.set_num_threads(1)  # of the two slow ones that a free Space has
    place = HubModels(repo, revision)
    return page(place, first=(repo, place.milestones(repo)[0]))


# ---- The terminal ---------------------------------------------------------------------------------------------------


HELP = """Type the beginning of a text: the model goes on from there. Commands:
  /model [RUN [MILESTONE]]      choose a model; without a name: what there is
  /compare [RUN [MILESTONE]]    a second model on the same texts; /compare off
  /set [KNOB VALUE]             temperature, top_k, top_p, repetition_penalty, new_tokens, seed; alone: as they are
  /mode text|chat               continue texts, or chat (models with a chat template)
  /retry                        the last text again, with the next seed
  /on                           the last text, with what the (first) model wrote, goes on
  /next                         what the model expects after what now stands there
  /clear                        forget the conversation
  /quit                         leave, as Ctrl-D does
Ctrl-C stops an answer; a second one leaves."""


class Terminal:
    """The conversation on standard input and output, a terminal or a pipe."""

    def __init__(self, place: Models, first: tuple[str, str], second: tuple[str, str] | None = None):
        self.place, self.chosen, self.settings, self.mode = place, [first] + ([second] if second else []), Settings(), CONTINUE
        self.turns: list[dict] = []
        self.interrupted = False  # by Ctrl-C, since the last line was typed
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def run(self) -> None:
        """Until /quit, the end of the input, or a second Ctrl-C."""
        sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (arrow keys and history in input())
        print(f"{self.place.title}: {', '.join(self._name(one) for one in self.chosen)}. /help for the commands.", flush=True)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                if self.interrupted:
                    return
                self.interrupted = True
                print("(Ctrl-C once more leaves)", flush=True)
                continue
            self.interrupted = False
            try:
                if line.strip() in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self._command(*line.split())
                elif line.strip():
                    self._answer(line)
            except UserError as error:
                print(f"error: {visible(str(error))}", flush=True)
            except KeyboardInterrupt:  # the second one while an answer was being stopped
                print()
                return

    def _name(self, chosen: tuple[str, str]) -> str:
        return f"{chosen[0]} ({chosen[1]})"

    def _style(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def _command(self, name: str, *words: str) -> None:
        if name == "/help":
            print(HELP)
        elif name == "/model":
            if not words:
                for run in self.place.runs():
                    print(f"  {run}: {', '.join(self.place.milestones(run))}")
            else:
                self.chosen[0] = self._choose(*words)
                print(self._name(self.chosen[0]))
        elif name == "/compare":
            self.chosen[1:] = [] if words in ((), ("off",)) else [self._choose(*words)]
            print(" | ".join(map(self._name, self.chosen)))
        elif name == "/set":
            if words:
                if len(words) != 2 or words[0] not in Settings.model_fields:
                    raise UserError(f"/set KNOB VALUE, where KNOB is one of {', '.join(Settings.model_fields)}")
                self.settings = Settings.of(**{**self.settings.model_dump(), words[0]: words[1]})
            print("  ".join(f"{knob} {value}" for knob, value in self.settings.model_dump().items()))
        elif name == "/mode":
            if words not in (("text",), ("chat",)):
                raise UserError("/mode text, or /mode chat")
            self.mode, self.turns = (CHAT if words == ("chat",) else CONTINUE), []
            print(self.mode)
        elif name in ("/retry", "/next"):
            if not self.turns:
                raise UserError(f"{name}: there is no text yet; type one first")
            if name == "/next":
                return self._next()
            self.settings = Settings.of(**{**self.settings.model_dump(), "seed": (self.settings.seed + 1) % 2**31})
            before, self.turns = self.turns, self.turns[:-1]
            if not self._answer(before[-1]["asked"]):
                self.turns = before
        elif name == "/on":
            if not self.turns or self.mode == CHAT:
                raise UserError("/on: there is no text to go on from; type the beginning of one")
            last = self.turns[-1]
            self._answer(last["asked"] + last["answers"].get(0, ""))
        elif name == "/clear":
            self.turns = []
            print("forgotten")
        else:
            raise UserError(f"there is no command {name}; /help lists them (to begin a text with a slash, put a space before it)")
        sys.stdout.flush()

    def _choose(self, run: str, milestone: str | None = None, *more: str) -> tuple[str, str]:
        found = self.place.milestones(run)
        if more or (milestone and milestone not in found):
            raise UserError(f"{run} has these milestones: {', '.join(found)}")
        return run, milestone or found[0]

    def _answer(self, asked: str) -> bool:
        """Every chosen model in turn: a terminal has one place to write. Whether one answered."""
        turn, turns = {"asked": asked, "answers": {}}, self.turns if self.mode == CHAT else []
        for number, chosen in enumerate(self.chosen):
            side, printed = Side(*chosen), 0
            print(self._style(1, f"{self._name(chosen)}:"), end=" ", flush=True)
            with self._stoppable() as stopped:
                for _ in answer(self.place, side, asked, _said(turns, number), self.mode, self.settings, stopped):
                    print(self._style(36, visible(side.written[printed:])) if len(side.written) > printed else "", end="", flush=True)
                    printed = len(side.written)
            print()
            for note in side.notes:
                print(f"  note: {visible(note)}")
            if side.error:
                print(f"error: {visible(side.error)}")
            elif side.step:
                turn["answers"][number] = side.written
                print(self._style(2, f"  [{side.summary(self.settings)}]"))
            sys.stdout.flush()
            if side.step and side.step.reason == "stopped":
                break
        if turn["answers"]:
            self.turns = [*self.turns, turn][-MAX_TURNS:]
        return bool(turn["answers"])

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[Callable[[], bool]]:
        """Ctrl-C asks the answer to stop (yielded: whether it did); a second one is not waited for."""

        def stop(_number: int, _frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield lambda: self.interrupted
        finally:
            signal.signal(signal.SIGINT, before)

    def _next(self) -> None:
        """Bars of the next token after the last text and what was written to it."""
        last = self.turns[-1]
        for number, chosen in enumerate(self.chosen):
            side = Side(*chosen)
            written = last["answers"].get(number, "")
            # In a chat, what comes next is the first token of an answer to the last message; a text goes on from all of it.
            asked = last["asked"] if self.mode == CHAT else last["asked"] + written
            turns = _said(self.turns[:-1], number) if self.mode == CHAT else []
            for _ in answer(self.place, side, asked, turns, self.mode, self.settings, lambda: False, write=False):
                pass
            print(self._style(1, f"{self._name(chosen)}:"))
            if side.error:
                print(f"error: {visible(side.error)}")
                continue
            scale = side.expects.tokens[0][1]
            for label, value in side.expects.tokens:
                print(f"  {label:>16} {self._style(36, '█' * max(1, round(30 * value / scale)))} {100 * value:.1f}%")
            print(f"  {100 * side.expects.others:.1f}% on all other tokens, {_undecided(side.expects)}")


# ---- The command line -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders inside the models folder, to offer these alone; the second is compared with")
    parser.add_argument("--models", default="models", help="the models folder: run folders, or groups of them one level deeper")
    parser.add_argument("--terminal", action="store_true", help="without a browser, on standard input and output")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, help="port to listen on; without, a free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers, for anyone who has it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a computation; small models write fastest with one")
    parser.add_argument("--trust_remote_code", action="store_true", help=f"{CODE_RULE}; this flag lifts the last condition")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(max(1, arguments.threads))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to save: no code 75, which would have a scheduler start it again
    place = ModelsFolder(arguments.models, arguments.trust_remote_code, arguments.runs)
    chosen = [(run, place.milestones(run)[0]) for run in (place.only or place.runs()[:1])]
    if arguments.terminal:
        Terminal(place, chosen[0], chosen[1] if len(chosen) > 1 else None).run()
        return
    demo = page(place, chosen[0], chosen[1] if len(chosen) > 1 else None)
    if arguments.share or arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print("note: whoever reaches this address can use these models; there is no login", flush=True)
    try:
        _, address, _ = demo.launch(server_name=arguments.host, server_port=arguments.port, share=arguments.share, quiet=True,
                                    prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"cannot listen on {arguments.host}, port {arguments.port or '7860 to 7959'}: taken, or not allowed; choose "
                        "another --port or --host") from error
    print(f"chat with {place.title}: {demo.share_url or address} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        demo.block_thread()


if __name__ == "__main__":
    run_stage(main)
