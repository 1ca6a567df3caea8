"""An instruct model as judge: it grades a completion by a rubric; what it answers is read strictly or not at all.

A language model can be talked into grades, and a reader of its answers can be fooled by digits that are not grades. So:
- the student's text stands between tags that it cannot close, cannot hold special tokens of a chat template, and cannot hold
  the form in which grades are given, so that a judge that only repeats it has not answered (`Rubric.escape`);
- an answer counts only if all of it has the asked-for form (`Rubric.parse`); any other is asked for again, sampled, up to
  `retries` times, and then there is no grade: None, which is excluded and counted, never a middle score;
- a judge that cannot be reached stops the run with an error: that is no grade either.

The judge runs in this process (`LocalJudge`) or behind an OpenAI-compatible address (`ServerJudge`). Grades are kept by content
(`GradeCache`), so that a resumed run does not ask again.
"""

import contextlib
import fcntl
import functools
import hashlib
import html
import http.client
import json
import os
import queue
import re
import socket
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from babylm import models
from babylm.config import JudgeReward
from babylm.run_folder import require_finished
from babylm.schema import UserError

SHIPPED_RUBRIC = Path(__file__).with_name("rubric.txt")
PLACEHOLDERS = ("prompt", "completion", "answer_form")  # each exactly once; {max_grade} at least once
SAMPLE = ("Once upon a time there was a", " little dog. He lost his ball, looked for it all day, and found it under his bed.")
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever a server asks for
LONGEST_RESPONSE = 1_000_000  # bytes
POLL = 0.05  # seconds between two looks at whether a request is late or the run is to stop
LONGEST_FAREWELL = 0.5  # seconds for threads whose requests were cut off to end

Grades = dict[str, int]  # criterion -> grade
weights_fingerprint = functools.cache(models.weights_fingerprint)  # reads all weights: once per process is enough


# ---- The question and the answer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rubric:
    """The question put to the judge and the one form of answer that counts.

    Args:
        template: text with {prompt} and {completion}, each alone between <tags>, {answer_form} and {max_grade}.
        criteria: what is graded, in the order of the answer.
        max_grade: grades are whole numbers 0 ... max_grade.
    """

    template: str
    criteria: tuple[str, ...]
    max_grade: int

    @classmethod
    def read(cls, path: str | Path | None, criteria: Sequence[str], max_grade: int) -> "Rubric":
        """The rubric in a file (None: the shipped one). UserError says what is wrong with it, all at once."""
        path = Path(path) if path else SHIPPED_RUBRIC
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"rubric {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        found = Counter(re.findall(r"\{(\w+)\}", template))
        problems = [f"{{{name}}} stands in it {found[name]} times, not once" for name in PLACEHOLDERS if found[name] != 1]
        problems += ["{max_grade} is not in it: the judge must know the highest grade"] if not found["max_grade"] else []
        problems += [f"unknown placeholder {{{name}}}; known: {{{'}, {'.join((*PLACEHOLDERS, 'max_grade'))}}}"
                     for name in found if name not in (*PLACEHOLDERS, "max_grade")]
        problems += [f"{{{name}}} must stand alone between an opening and a closing tag, <text>{{{name}}}</text>, so that the judge "
                     "sees where the student's text ends" for name in ("prompt", "completion")
                     if found[name] == 1 and not re.search(rf"<([\w-]+)>\s*\{{{name}\}}\s*</\1>", template)]
        problems += [f"the criterion {name!r} is not in it" for name in criteria if name.lower() not in template.lower()]
        if problems:
            raise UserError(f"rubric {path}: " + "; ".join(problems))
        return cls(template, tuple(criteria), max_grade)

    @property
    def answer_form(self) -> str:
        """The line that is asked for, with N in place of each grade."""
        return " | ".join(f"{name}: N" for name in self.criteria)

    def question(self, prompt: str, completion: str, max_characters: int) -> list[tuple[str, bool]]:
        """What the judge is asked, as [(text, whether it is the student's), ...]; joined, it is the whole question.

        The student's text is cut to `max_characters` (a prompt keeps its end, which the completion continues) and escaped.
        """
        texts = {"prompt": self.escape(prompt[-max_characters:]), "completion": self.escape(completion[:max_characters])}
        fixed = {"answer_form": self.answer_form, "max_grade": str(self.max_grade)}
        pieces = []
        for number, part in enumerate(re.split(r"\{(\w+)\}", self.template)):  # text, name, text, name, ...: each is visited once
            if number % 2 and part in texts:
                pieces.append((texts[part], True))
            else:
                pieces.append((fixed[part] if number % 2 else part, False))
        return pieces

    def escape(self, text: str) -> str:
        """The student's text, unable to close its tag, to hold a chat template's special tokens, or to hold an answer.

        <, > and & become entities, which takes </tags> and <|special|> tokens apart; [INST] and its like lose their bracket; a
        criterion followed by a colon loses the colon. Control characters are left out.
        """
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
        text = re.sub(r"\[(?=/?[A-Z_]+\])", "&#91;", html.escape(text, quote=False))
        names = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in self.criteria)
        return re.sub(rf"({names})(\s*):", r"\1\2&#58;", text, flags=re.IGNORECASE)

    def parse(self, answer: str) -> Grades | None:
        """The grades, where the whole answer is the asked-for line: every criterion once and in order, whole numbers in range.

        Anything else is None: digits elsewhere, 8/10, 2.5, a missing or repeated criterion, text before or after.
        """
        form = r"[ \t]*\|[ \t]*".join(rf"{re.escape(name)}[ \t]*:[ \t]*(0|[1-9][0-9]{{0,2}})" for name in self.criteria)
        match = re.fullmatch(form, answer.strip(), flags=re.IGNORECASE | re.ASCII)
        grades = {name: int(digits) for name, digits in zip(self.criteria, match.groups(), strict=True)} if match else {}
        return grades if self.valid(grades) else None

    def valid(self, grades: Any) -> bool:
        """Whether `grades` are a grade in range for each criterion and nothing else."""
        return (isinstance(grades, dict) and grades.keys() == set(self.criteria)
                and all(type(grade) is int and 0 <= grade <= self.max_grade for grade in grades.values()))


# ---- Grades kept by content -----------------------------------------------------------------------------------------


class GradeCache:
    """Grades by a hash of all they follow from: one JSON line each in <folder>/grades.jsonl, which several processes may share.

    A line cut short by a kill is passed over, and what is written after it starts on a line of its own. Without a folder, grades
    are kept in memory only.
    """

    def __init__(self, folder: Path | None):
        self.path = Path(folder) / "grades.jsonl" if folder else None
        self.grades: dict[str, Grades] = {}
        self.read_to = 0  # bytes
        if self.path:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
            except OSError as error:
                raise UserError(f"cannot write the judge's grades to {self.path}: {error.strerror}") from error

    def refresh(self) -> None:
        """Read the whole lines that were added since, by this process or another."""
        if not self.path:
            return
        with open(self.path, "rb") as stream:
            stream.seek(self.read_to)
            added = stream.read()
        whole = added[: added.rfind(b"\n") + 1]
        self.read_to += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill
                row = json.loads(line)
                self.grades[row["key"]] = row["grades"]

    def add(self, key: str, grades: Grades) -> None:
        """Keep one completion's grades."""
        self.grades[key] = grades
        if not self.path:
            return
        line = json.dumps({"key": key, "grades": grades}).encode() + b"\n"
        with open(self.path, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            end = stream.seek(0, os.SEEK_END)
            if end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line
            stream.write(line)


# ---- Where the judge runs -------------------------------------------------------------------------------------------


def never() -> bool:
    """Nothing asks to stop."""
    return False


class Backend(Protocol):
    """Something that answers questions."""

    identity: list[str]  # what its answers follow from, beside the question

    def answers(self, questions: Sequence[list[tuple[str, bool]]], attempt: int, seed: int,
                should_stop: Callable[[], bool]) -> Iterator[tuple[int, str]]:
        """(number of a question, answer) as they come; the first attempt (0) is greedy, later ones are sampled.

        Raises:
            Interrupted: `should_stop` said so while there was nothing but waiting to do.
        """


class LocalJudge:
    """An instruct model in this process: bfloat16 on a GPU, batches padded on the left.

    Raises:
        UserError: the model is missing, unfinished, has no chat template, or has no room for the question.
    """

    def __init__(self, entry: JudgeReward, device: str | torch.device, where: str = "judge"):
        require_finished(entry.model, f"{where}.model")
        self.entry, self.where = entry, where
        self.identity = ["local", weights_fingerprint(entry.model)]
        self.tokenizer = models.load_tokenizer(entry.model)
        if not self.tokenizer.chat_template:
            raise UserError(f"{where}.model: {entry.model} has no chat template: a judge has to be an instruct model")
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = models.load_causal_lm(entry.model, dtype=dtype).eval().requires_grad_(False).to(device)
        own = self.model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else first_end or 0
        # Only where it stops is the model's own: its temperature, penalties and the like would bend a greedy answer.
        self.model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self.pad)
        self.limit = getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, question: list[tuple[str, bool]]) -> list[int]:
        """Token ids of the question in the model's chat template; no piece of the student's text becomes a special token.

        Where the model has too few positions, the student's texts lose their ends.
        """
        marks = [f"STUDENT{hashlib.sha256(text.encode()).hexdigest()}" if student else text for text, student in question]
        message = [{"role": "user", "content": "".join(marks)}]
        rendered = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        pieces = []
        for mark, (text, student) in zip(marks, question, strict=True):
            if student:
                before, found, rendered = rendered.partition(mark)
                if not found:
                    raise UserError(f"{self.where}.model: the chat template of {self.entry.model} leaves out or changes the message")
                pieces += [self.tokenizer(before, add_special_tokens=False).input_ids,
                           self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids]
        pieces.append(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        if self.limit and sum(map(len, pieces)) + self.entry.max_new_tokens > self.limit:
            fixed = sum(map(len, pieces[::2])) + self.entry.max_new_tokens
            room = (self.limit - fixed) // 2  # for each of prompt and completion
            if room < 1:
                raise UserError(f"{self.where}.model: {self.entry.model} has {self.limit} positions, but rubric and answer alone take "
                                f"{fixed} tokens: shorten the rubric, or choose a model with a longer context")
            pieces[1::2] = [ids[:room] for ids in pieces[1::2]]
        return [token for ids in pieces for token in ids]

    @torch.no_grad()
    def answers(self, questions: Sequence[list[tuple[str, bool]]], attempt: int, seed: int,
                should_stop: Callable[[], bool] = never) -> Iterator[tuple[int, str]]:
        rows = [self.encode(question) for question in questions]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        device = self.model.device
        for begin in range(0, len(order), self.entry.batch_size):
            if should_stop():
                raise Interrupted
            chosen = order[begin: begin + self.entry.batch_size]
            longest = len(rows[chosen[-1]])
            ids = torch.tensor([[self.pad] * (longest - len(rows[number])) + rows[number] for number in chosen], device=device)
            mask = torch.tensor([[0] * (longest - len(rows[number])) + [1] * len(rows[number]) for number in chosen], device=device)
            how = {"do_sample": True, "temperature": self.entry.temperature, "top_k": 0} if attempt else {"do_sample": False}
            # The policy's own random numbers stay what they are: a resumed run, which finds grades in the cache, draws the same ones.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + begin)
                out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=self.entry.max_new_tokens, **how)
            texts = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            yield from zip(chosen, texts, strict=True)


class Interrupted(Exception):
    """The run was asked to stop while it waited for answers."""


class _Temporary(Exception):
    """A request failed in a way that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Stopped(Exception):
    """A request was not sent, or was cut off, because another one has failed for good or the run stops."""


class _Call:
    """One request on its way, which another thread can cut off: a socket's own timeout is for each read alone, so that a server
    which sends a byte now and then, or one preliminary answer after the other, would never run into it.

    Args:
        seconds: until its time is over.
    """

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.is_cut = False
        self._handles: list[socket.socket] = []
        self._lock = threading.Lock()

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """As socket.create_connection; the connection can be cut off from before it stands."""
        failure: OSError = OSError("no address")
        for family, kind, protocol, _name, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            found = socket.socket(family, kind, protocol)
            try:
                with self._lock:
                    if self.is_cut or (left := self.deadline - time.monotonic()) <= 0:
                        raise TimeoutError("timed out")
                    self._handles.append(found.dup())  # a descriptor of our own: the other may be closed, and its number used anew
                found.settimeout(left)
                found.connect(place)
                return found
            except OSError as error:
                failure = error
                found.close()
        raise failure

    def cut(self) -> None:
        """Whoever reads from the connection, or writes to it, finds that it has ended."""
        with self._lock:
            self.is_cut = True
            for handle in self._handles:
                with contextlib.suppress(OSError):  # it was not connected, or is not any more
                    handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nothing of it is left open."""
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles = []


class _Requests:
    """The requests for one list of questions.

    Attributes:
        stop: set when no further one is to be sent.
        open: those on their way.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.open: set[_Call] = set()

    @contextlib.contextmanager
    def call(self, seconds: float) -> Iterator[_Call]:
        """A request that is watched."""
        made = _Call(seconds)
        self.open.add(made)
        try:
            if self.stop.is_set():  # looked at now that cut_all would find it
                raise _Stopped
            yield made
        finally:
            self.open.discard(made)
            made.close()

    def cut_late(self) -> None:
        """Cut off those whose time is over."""
        for one in list(self.open):
            if time.monotonic() > one.deadline:
                one.cut()

    def cut_all(self) -> None:
        """Send none any more and cut off the others."""
        self.stop.set()
        for one in list(self.open):
            one.cut()


class _Connects:
    """urllib's handlers, with connections that the request's _Call has made."""

    def do_open(self, http_class: Any, request: urllib.request.Request, **settings: Any) -> Any:
        def connection(host: str, **given: Any) -> http.client.HTTPConnection:
            made = http_class(host, **given)
            made._create_connection = request.call.connect
            return made

        return super().do_open(connection, request, **settings)


class _HTTP(_Connects, urllib.request.HTTPHandler):
    pass


class _HTTPS(_Connects, urllib.request.HTTPSHandler):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # urllib would send the key along to whatever address the server names


class ServerJudge:
    """A model behind an OpenAI-compatible server (vLLM, llama.cpp, TGI, ...): POST <server>/chat/completions.

    The key comes from the environment variable that the config names and goes nowhere but into the request's header. What may
    pass (no connection, no whole answer in time, status 408, 425, 429 or 5xx) is tried `attempts` times in all with growing pauses.

    Raises:
        UserError: the server cannot be reached, refuses the request, or failed for good: never a grade.
    """

    def __init__(self, entry: JudgeReward, where: str = "judge"):
        self.entry, self.where = entry, where
        self.url = f"{entry.server}/chat/completions"
        self.identity = ["server", entry.server, entry.model]
        self.key = os.environ.get(entry.api_key_variable, "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise UserError(f"{where}: the environment variable {entry.api_key_variable} holds characters that no key has")
        self.opener = urllib.request.build_opener(_NoRedirect, _HTTP, _HTTPS)

    def answers(self, questions: Sequence[list[tuple[str, bool]]], attempt: int, seed: int,
                should_stop: Callable[[], bool] = never) -> Iterator[tuple[int, str]]:
        requests = _Requests()
        waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
        for number, question in enumerate(questions):
            waiting.put((number, "".join(text for text, _ in question)))

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    number, text = waiting.get_nowait()
                    try:
                        done.put((number, self.ask(text, attempt, seed + number, requests)))
                    except BaseException as error:
                        done.put((number, error))

        # Not a ThreadPoolExecutor, whose threads Python waits for when it ends: one may hang in the system's look-up of a name.
        threads = [threading.Thread(target=work, name=f"judge-{number}", daemon=True)
                   for number in range(min(self.entry.workers, len(questions)))]
        try:
            for thread in threads:
                thread.start()
            failures = []
            for _ in questions:  # when one fails for good, what others have got by then is still handed out
                number, result = self._next(done, requests, should_stop)
                if isinstance(result, BaseException):
                    failures.append(result)
                else:
                    yield number, result
            if failures:
                raise next(error for error in failures if not isinstance(error, _Stopped))
        finally:
            requests.cut_all()  # the run was told to stop: nobody waits for an answer or a next attempt
            until = time.monotonic() + LONGEST_FAREWELL
            for thread in threads:
                if thread.ident:
                    thread.join(max(0.0, until - time.monotonic()))

    @staticmethod
    def _next(done: queue.SimpleQueue, requests: _Requests, should_stop: Callable[[], bool]) -> Any:
        """What the next thread has got; meanwhile requests whose time is over are cut off. Interrupted where the run is to stop."""
        while True:
            if should_stop():
                raise Interrupted
            requests.cut_late()
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=POLL)

    def ask(self, question: str, attempt: int, seed: int, requests: _Requests) -> str:
        """One question, sent up to `attempts` times; "" where the model said nothing."""
        body = {"model": self.entry.model, "messages": [{"role": "user", "content": question}], "max_tokens": self.entry.max_new_tokens,
                "temperature": self.entry.temperature if attempt else 0.0, "seed": seed % 2**31}
        data = json.dumps(body).encode()
        if requests.stop.is_set():
            raise _Stopped
        number = 0
        try:
            while number < self.entry.attempts and not (number and requests.stop.is_set()):
                number += 1
                try:
                    return self._send(data, requests)
                except _Temporary as error:
                    failure, asked = str(error), error.wait
                if number < self.entry.attempts:
                    requests.stop.wait(min(LONGEST_WAIT, max(asked, self.entry.backoff * 2 ** (number - 1))))
            raise UserError(f"{self.where}: the judge at {self.url} gave no answer in {number} attempt(s): {failure}. Start the server (or "
                            "mend `server`, `timeout`) and run the same command again: grades it gave so far are kept")
        except UserError:
            requests.stop.set()
            raise

    def _send(self, data: bytes, requests: _Requests) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, data=data, headers=headers)
        late = f"no answer within {self.entry.timeout:g} seconds"
        with requests.call(self.entry.timeout) as request.call:
            try:
                with self.opener.open(request, timeout=self.entry.timeout) as response:
                    late = f"the response did not end within {self.entry.timeout:g} seconds"
                    payload = b""
                    while chunk := response.read1(65536):
                        payload += chunk
                        if len(payload) > LONGEST_RESPONSE:
                            raise _Temporary(f"the response has more than {LONGEST_RESPONSE:,} bytes")
                if request.call.is_cut:  # what came until then may look whole
                    raise TimeoutError
            except urllib.error.HTTPError as error:
                with error:
                    self._refused(error)
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                if request.call.is_cut or isinstance(error, TimeoutError):
                    raise _Temporary(late) from None
                raise _Temporary(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None
        try:
            content = json.loads(payload)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Temporary(f"the response is no chat completion: {self._shown(payload)}") from None
        return content if isinstance(content, str) else ""

    def _refused(self, error: urllib.error.HTTPError) -> None:
        try:
            said = self._shown(error.read(2000))
        except (OSError, http.client.HTTPException):
            said = ""
        status = f"status {error.code} {error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            asked = error.headers.get("Retry-After", "")
            raise _Temporary(f"{status}: {said}", float(asked) if re.fullmatch(r"[0-9]{1,6}", asked) else 0.0) from None
        variable = self.entry.api_key_variable
        hint = {401: f"set the environment variable {variable} to a valid key (it is {'not set' if not self.key else 'set'})",
                404: "is `server` the base address, often one that ends in /v1, and `model` a name that the server knows?"}
        hint[403] = hint[401]
        raise UserError(f"{self.where}: {self.url} refused the request, {status}: {hint.get(error.code, 'see what it says')}"
                        + (f" ({said})" if said else "")) from None

    def _shown(self, payload: bytes) -> str:
        text = " ".join(payload[:300].decode("utf-8", "replace").split())
        return text.replace(self.key, "***") if self.key else text  # servers have been seen to repeat a wrong key


# ---- The judge ------------------------------------------------------------------------------------------------------


class Judge:
    """Grades completions by a rubric; see the head of this file.

    Args:
        entry: its settings.
        rubric: the question.
        backend: where the model runs.
        cache: grades that are known already.
        seed: draws what retries sample.

    Attributes:
        should_stop: asked while answers are waited for; when it says True, `grade` raises Interrupted.
        counts: since it was made: `calls` (answers given), `retries` (those of them asked for again), `parse_failures` (those not
            in the asked-for form), `cache_hits` (completions graded without a call), `ungraded` (completions left without a grade).
    """

    def __init__(self, entry: JudgeReward, rubric: Rubric, backend: Backend, cache: GradeCache, seed: int = 0):
        self.entry, self.rubric, self.backend, self.cache, self.seed = entry, rubric, backend, cache, seed
        self.counts: Counter[str] = Counter(calls=0, retries=0, parse_failures=0, cache_hits=0, ungraded=0)
        self.told = False
        self.should_stop: Callable[[], bool] = never

    def check(self) -> None:
        """Ask about a sample text, so that a judge that cannot be reached is known before training. Not counted, not kept."""
        for _, answer in self.backend.answers([self._question(*SAMPLE)], 0, self.seed, self.should_stop):
            if self.rubric.parse(answer) is None:
                self._tell(answer)

    def grade(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Grades | None]:
        """Grades of each completion, or None where the judge gave no answer in the asked-for form.

        Raises:
            UserError: the judge could not be reached.
            Interrupted: the run is to stop; grades that came by then are kept.
        """
        pairs = {self.key(prompt, completion): (prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)}
        keys = [self.key(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        self.cache.refresh()
        graded = {key: held for key in pairs if self.rubric.valid(held := self.cache.grades.get(key))}
        pending = [key for key in pairs if key not in graded]
        asked = len(pending)
        for attempt in range(self.entry.retries + 1):
            if not pending:
                break
            seed = int(hashlib.sha256(json.dumps([self.seed, attempt, pending]).encode()).hexdigest()[:12], 16)
            questions = [self._question(*pairs[key]) for key in pending]
            for number, answer in self.backend.answers(questions, attempt, seed, self.should_stop):
                self.counts["calls"] += 1
                self.counts["retries"] += attempt > 0
                grades = self.rubric.parse(answer)
                if grades is None:
                    self.counts["parse_failures"] += 1
                    self._tell(answer)
                else:
                    graded[pending[number]] = grades
                    self.cache.add(pending[number], grades)
            pending = [key for key in pending if key not in graded]
        found = [graded.get(key) for key in keys]
        ungraded = found.count(None)
        self.counts["ungraded"] += ungraded
        self.counts["cache_hits"] += len(keys) - ungraded - (asked - len(pending))  # one that stands twice in the batch is asked about once
        return found

    def key(self, prompt: str, completion: str) -> str:
        """A hash of everything that a grade follows from: judge, rubric, what is shown of the texts."""
        rubric, entry = self.rubric, self.entry
        content = [self.backend.identity, rubric.template, rubric.criteria, rubric.max_grade, entry.max_characters, entry.max_new_tokens,
                   prompt, completion]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _question(self, prompt: str, completion: str) -> list[tuple[str, bool]]:
        return self.rubric.question(prompt, completion, self.entry.max_characters)

    def _tell(self, answer: str) -> None:
        if not self.told:
            print(f"warning: the judge {self.entry.model} gave an answer that is not in the asked-for form ({self.rubric.answer_form!r}); "
                  f"such answers are asked for again, then left out and counted. The first: {answer[:200]!r}", flush=True)
            self.told = True


def open_judge(entry: JudgeReward, device: str | torch.device, seed: int, cache_dir: str | Path | None, where: str = "judge") -> Judge:
    """A judge that has answered once. `where` is what error messages call its place in the config, such as rewards.0.

    Raises:
        UserError: what is wrong with rubric, model or server, before any training.
    """
    rubric = Rubric.read(entry.rubric, entry.criteria, entry.max_grade)
    cache = GradeCache(Path(cache_dir) if cache_dir else None)
    judge = Judge(entry, rubric, ServerJudge(entry, where) if entry.server else LocalJudge(entry, device, where), cache, seed)
    judge.check()
    return judge
