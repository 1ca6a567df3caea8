"""What all algorithms of stage 6 share: the run folder, the budget in words generated, milestones, the log line, samples, validation,
resume state, and the end of a run.

An algorithm samples and scores through `RLRun` and reports every step to it; RLRun says when to save, when to stop, and what remains.
"""

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from babylm import models, scoring, training
from babylm.config import RLConfig
from babylm.distillation import Distiller
from babylm.ledger import accounts, read_lines, rl_ledger
from babylm.model_card import model_card
from babylm.plan import accumulation_steps, milestones_between, require_disk, storage_bytes
from babylm.run_folder import (
    Preempted,
    RunFolder,
    StopRequest,
    folder_written_whole,
    is_whole,
    require_finished,
    saving,
    write_json,
    write_text,
)
from babylm.schema import UserError, identity
from custom_dataset import EvalBlocks, TextPart, open_store, tokenizer_fingerprint
from interactive import rehearsal, reward
from interactive.judge import Interrupted
from interactive.prompts import Prompts, load_prompts
from interactive.rollout import Sample, body_and_head, completion_logprobs, sample, seeds_of

WORDLESS_STEPS = 20  # in a row: then the policy has stopped writing, and a budget of words would never be used up
SHOWN = 3  # completions before and after, printed at the end


# ---- Before training ------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What a run reads, before any model is loaded."""

    tokenizer: PreTrainedTokenizerFast
    prompts: Prompts


def load_inputs(config: RLConfig) -> Inputs:
    """The policy's tokenizer and the prompts. UserError for an unfinished student, and for prompts that are not to be had."""
    require_finished(config.model.path, "ppo.py: model.path", "train_student.py")
    training.milestone_sets(config)  # mistakes in it are said before anything is fetched
    tokenizer = models.load_tokenizer(config.model.path)
    return Inputs(tokenizer, load_prompts(config.prompts, tokenizer, config.data.corpus, config.seed,
                                          Path(config.data.corpus) / "prompts_cache", not config.dry_run, _recorded_prompts(config)))


def _recorded_prompts(config: RLConfig) -> dict[str, str] | None:
    """`Prompts.hub` in the record of the run that this one goes on with, or that it is."""
    record = Path(config.output) / config.name / "run" / "record.json"
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # then `fresh` was for the job's first start
    if config.fresh and not requeued or not record.is_file():
        return None
    return json.loads(record.read_text(encoding="utf-8")).get("prompts")


def open_run(config: RLConfig, inputs: Inputs) -> RunFolder | None:
    """Open the run's folder; None if the run is finished already. The run's identity holds the content of what is read."""
    folder = training.open_folder(config, "ppo.py", {
        "val": TextPart(config.data.eval_path or config.data.corpus, "val").sha256, "tokenizer": tokenizer_fingerprint(inputs.tokenizer),
        "base": models.weights_fingerprint(config.model.path), "prompts": inputs.prompts.fingerprint,
        **reward.reward_fingerprints(config.rewards, inputs.tokenizer)})
    if folder and folder.main and inputs.prompts.hub and not config.dry_run:
        record = folder.run / "record.json"
        write_json(record, {**json.loads(record.read_text(encoding="utf-8")), "prompts": inputs.prompts.hub})
    return folder


def load_validation(config: RLConfig, inputs: Inputs) -> EvalBlocks:
    """The fixed validation blocks, in the policy's own tokens."""
    section = config.data
    store = open_store(section.eval_path or section.corpus, "val", inputs.tokenizer, write=not config.dry_run)
    return EvalBlocks(store, section.seq_len, section.eval_blocks)


@dataclass
class Progress:
    """What the next process needs beyond the algorithm's own state; saved as progress.json."""

    step: int = 0
    words: int = 0  # generated to learn from
    excluded: int = 0  # completions that no reward could be given
    wordless: int = 0  # steps in a row with less than a word in ten completions
    validation_due: bool = False  # the one that belongs to the last step was stopped
    seconds: float = 0.0
    window_seconds: float = 0.0  # of these, since the last log line
    window: list[dict[str, float]] = field(default_factory=list)  # of every step since the last log line


class RLRun:
    """One run of stage 6.

    Args:
        folder: as `open_run` opened it; with `folder.resume_from`, the run goes on there.
        val: from `load_validation`.
        reference: the frozen starting policy, on `device`.
        rewards: as `reward.build_rewards` made them.
    """

    def __init__(self, config: RLConfig, folder: RunFolder, inputs: Inputs, val: EvalBlocks, reference: PreTrainedModel,
                 rewards: Sequence[Any], device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        self.tokenizer, self.prompts = inputs.tokenizer, inputs.prompts
        self.val, self.reference, self.rewards = val, reference, rewards
        self.sets = training.milestone_sets(config)
        training.require_positions("student", reference, config.data.seq_len)
        training.require_sets_fit(self.sets, self.tokenizer, reference)
        self.stop, self.state = None if config.dry_run else StopRequest(), PartialState()
        self.progress = Progress()
        if folder.resume_from:
            self.progress = Progress(**json.loads((folder.resume_from / "progress.json").read_text(encoding="utf-8")))
            if not config.dry_run:
                self._forget_samples_after(self.step)
        self.ledger = rl_ledger(config, tokenizer_fingerprint(self.tokenizer))
        limit = getattr(reference.config, "max_position_embeddings", None)
        if limit and self.longest > limit:
            raise UserError(f"model.path: {config.model.path} has {limit} positions, but prompts and completions have up to {self.longest} "
                            "tokens: lower generation.max_new_tokens, or cut the prompts (prompts.cut, prompts.max_tokens)")
        self._began = self._window_began = time.monotonic()
        self._stats: dict[str, float] = {}
        self._save: Callable[[Path], None] | None = None  # what `save_or_stop` was given last
        self._interrupted = ""  # signal that came while rewards were waited for
        for judge in (one.judge for one in self.rewards if hasattr(one, "judge")):
            judge.should_stop = lambda: bool(self.stop)

    # -- where the run stands

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def longest(self) -> int:
        """Most tokens that a prompt and its completion have."""
        return 1 + self.prompts.longest + self.config.generation.max_new_tokens  # the start token is the first

    @property
    def share(self) -> float:
        """Of the budget that is used up, 0 ... 1."""
        budget = self.config.training
        return min(1.0, self.progress.words / budget.words if budget.words else self.step / budget.steps)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.share >= 1

    def learning_rate_share(self) -> float:
        """What the next step multiplies the peak learning rate with: warm-up by steps, then the schedule over the budget."""
        section = self.config.training
        warm = min(1.0, (self.step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
        shape = {"constant": 1.0, "linear": 1 - self.share, "cosine": (1 + math.cos(math.pi * self.share)) / 2}
        return warm * shape[section.schedule]

    def seed_of(self, purpose: str) -> int:
        """A seed for the next step's `purpose`."""
        return seeds_of(self.config.seed, self.step, range(1), purpose)[0]

    # -- completions

    def sample(self, model: PreTrainedModel, rows: range) -> list[Sample]:
        """Complete these rows of the next step's batch of prompts."""
        section = self.config.generation
        batch = self.prompts.batch(self.step, self.config.training.batch_size)
        return sample(model, self.tokenizer, [batch[row] for row in rows], seeds_of(self.config.seed, self.step, rows),
                      max_new_tokens=section.max_new_tokens, temperature=section.temperature,
                      batch_size=self.config.training.per_device_batch_size)

    def score(self, samples: Sequence[Sample]) -> None:
        """Give every sample its reward and the parts of it.

        Raises:
            Preempted: a signal asked the run to stop while a judge was waited for, which may be for minutes. With several processes
                `gather` raises it, in all of them.
        """
        try:
            scores = reward.combine(self.rewards, [s.prompt for s in samples], [s.completion for s in samples],
                                    completion_ids=[s.completion_ids for s in samples], prompt_ids=[s.prompt_ids for s in samples])
        except Interrupted:
            self._interrupted = self.stop.signal_name
            if self.state.num_processes == 1:
                self._stop_within_step(self._interrupted)
            return
        for index, scored in enumerate(samples):
            scored.reward = scores.total[index]
            scored.parts = {name: part[index] for name, part in scores.parts.items()}
        self._stats = {name: value for name, value in scores.stats.items() if "judge" in name and not name.endswith(("mean", "std"))}

    def gather(self, rows: range, samples: Sequence[Sample]) -> list[Sample]:
        """The whole batch, in every process, in the order of its rows.

        Raises:
            UserError: not one completion could be scored.
            Preempted: a signal asked the run to stop while a process waited for a judge.
        """
        pairs = list(zip(rows, samples, strict=True))
        if self.state.num_processes > 1:
            if asked := max(gather_object([self._interrupted])):
                self._stop_within_step(asked)
            pairs = gather_object(pairs)
            self._stats = _summed(gather_object([self._stats]))
        gathered = sorted(pairs, key=lambda pair: pair[0])
        everyone = [scored for _, scored in gathered]
        self.require_scored(everyone)
        return everyone

    def require_scored(self, samples: Sequence[Sample]) -> None:
        """UserError if not one of a batch's completions has a reward: the step could teach nothing."""
        if all(scored.reward is None for scored in samples):
            parts = sorted({name for scored in samples for name, value in scored.parts.items() if value is None})
            raise UserError(f"step {self.step + 1}: none of the {len(samples)} completions could be given a reward ({', '.join(parts)}): "
                            "nothing can be learned. Look at what the judge answers (its model, its rubric); the same command goes on from "
                            f"{self.folder.newest_whole() or 'the start'}")

    # -- the end of a step

    def needed(self, model: PreTrainedModel, trained: torch.nn.Module, words: int) -> list[tuple[str, Path, int]]:
        """(what, where to, bytes) of the files that are still to be written, if `words` are generated in all."""
        root, size = self.folder.root, 4 * models.count_parameters(model)
        milestones = len(milestones_between(self.config, self.progress.words, words))
        there = len(self.folder.checkpoints()) if self.folder.resume_from else 0
        resume = max(0, self.config.checkpoints.keep + 1 - there)  # one more while it is written
        return [(f"{milestones} milestone(s)", root, milestones * size),
                (f"{resume} resume checkpoint(s)", root, resume * 3 * storage_bytes(trained.parameters())), ("final model", root, size)]

    def start(self, model: PreTrainedModel, trained: torch.nn.Module | None = None) -> None:
        """Say what will be done and, where the run is new, validate what it starts from.

        Args:
            trained: all that the optimizer changes; default: the policy.

        Raises:
            UserError: what is to be written does not fit on the disk (milestones are counted where the budget is one of words).
        """
        require_disk(self.needed(model, trained or model, self.config.training.words or 0))
        self._began = time.monotonic()
        self._window_began = self._began - self.progress.window_seconds
        self.folder.set_status("running")
        self.print_plan(model, trained or model)
        if self.stop:
            raise Preempted(f"{self.stop.signal_name} before the first step; the same command starts again")
        if self.step == 0:
            for file in (self.folder.metrics, self._samples_file) if self.folder.main else ():
                write_text(file, "")
            self.validate(model)
        elif self.progress.validation_due:
            self.validate(model)
            self.progress.validation_due = False

    def end_step(self, model: PreTrainedModel, samples: Sequence[Sample], terms: dict[str, float]) -> dict[str, Any] | None:
        """Count what was written, keep milestones, log and validate when it is time.

        Args:
            samples: the whole batch, those without a reward included.
            terms: what the algorithm reports of the step, by name.

        Returns:
            The row that was logged, if one was.
        """
        progress, before = self.progress, self.progress.words
        progress.step += 1
        words = sum(scored.words for scored in samples)
        progress.words += words
        progress.excluded += sum(scored.reward is None for scored in samples)
        progress.wordless = 0 if words * 10 >= len(samples) else progress.wordless + 1
        progress.window.append({**_means(samples), **terms, **self._stats, "tokens": sum(len(s.completion_ids) for s in samples)})
        if self.config.training.words and progress.wordless >= WORDLESS_STEPS:
            raise UserError(f"step {self.step}: in {WORDLESS_STEPS} steps the policy has written less than a word in ten completions, so "
                            "its budget of words would never be used up. A length reward, a larger ppo.kl.coefficient or a lower "
                            "training.lr keeps it writing")
        self._save_milestones(model, before)
        row = None
        if self.step % self.config.logging.logging_steps == 0 or self.step == 1 or self.done:
            row = self._log(samples)
        if self.step % self.config.logging.eval_steps == 0 or self.done:
            progress.validation_due = True
            self.validate(model)
            progress.validation_due = False
        return row

    def save_or_stop(self, save: Callable[[Path], None]) -> None:
        """Write a resume checkpoint when it is time or a signal asks for it; in the latter case stop.

        Args:
            save: writes the algorithm's state into a folder.
        """
        self._save = save
        asked = any(gather_object([self.stop.signal_name])) if self.state.num_processes > 1 else bool(self.stop)
        if self.done or not (asked or self.step % self.config.checkpoints.save_steps == 0):
            return
        self._write_checkpoint()
        if asked:
            signal_name = self.stop.signal_name or "a signal to another process"
            raise Preempted(f"{signal_name} at step {self.step}; {self._again()} continues there")

    def _stop_within_step(self, signal_name: str) -> None:
        """Stop while completions wait for their rewards: nothing was learned from them yet, so the state is that of the last step."""
        if self._save:
            self._write_checkpoint()
        newest = self.folder.newest_whole()
        raise Preempted(f"{signal_name} while a judge was waited for; {self._again()} "
                        + (f"continues from {newest}" if newest else "starts again"))

    def _write_checkpoint(self) -> None:
        target = self.folder.root / f"checkpoint-{self.step}"
        if self.folder.main and not is_whole(target):
            with saving(target), folder_written_whole(target) as folder:
                self._save(folder)
                write_json(folder / "progress.json", asdict(self.progress) | {
                    "seconds": self.seconds(), "window_seconds": time.monotonic() - self._window_began})
            self.folder.rotate()
        self.state.wait_for_everyone()

    def _again(self) -> str:
        keys = [key for key in ("resume_path", "fresh") if getattr(self.config, key)]
        return "the same command" + (f" without {' and '.join(keys)}" if keys else "")

    def seconds(self) -> float:
        """Seconds of this run so far, over all its processes one after the other."""
        return self.progress.seconds + time.monotonic() - self._began

    def _where(self) -> dict[str, Any]:
        return {"step": self.step, "words": self.progress.words, "seconds": round(self.seconds(), 2)}

    def _log(self, samples: Sequence[Sample]) -> dict[str, Any]:
        window, now = self.progress.window, time.monotonic()
        names = dict.fromkeys(name for step in window for name in step)
        means = {name: _mean([step[name] for step in window if step.get(name) is not None]) for name in names}
        tokens = sum(step["tokens"] for step in window)
        rate = tokens / max(now - self._window_began, 1e-9)
        row = {"kind": "train", **self._where(), "share": self.share, **{name: value for name, value in means.items() if name != "tokens"},
               "excluded": self.progress.excluded, "tokens_per_s": rate}
        self._window_began = now
        self.progress.window = []
        self.folder.append_metrics(row)
        self._write_samples("train", samples[:self.config.logging.samples])
        left = datetime.timedelta(seconds=round(self.seconds() / max(self.share, 1e-9) * (1 - self.share)))
        budget = self.config.training
        goal = f"words {self.progress.words / 1000:,.1f}K" + (f"/{budget.words / 1000:,.0f}K" if budget.words else "")
        shown = [f"{name} {row[name]:.4f}" for name in ("reward", *(n for n in row if n.startswith("reward/")), "kl", "entropy")
                 if row.get(name) is not None]
        shown += [f"excluded {self.progress.excluded:,}"] if self.progress.excluded else []
        shown += [f"{row['completion_words']:.1f} words each"]
        shown += [f"lr {row['lr']:.1e}"] if "lr" in row else []
        shown += [f"grad {row['grad_norm']:.2f}"] if "grad_norm" in row else []
        self.say(f"step {self.step:>5,}{f'/{budget.steps:,}' if budget.steps else ''} | {goal} | {' | '.join(shown)} | "
                 f"{rate / 1000:,.2f}K tok/s | {left} left")
        return row

    def validate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Mean CE over the validation blocks, in nats, and reward and KL of completions that are not learned from.

        The same prompts with the same noise every time, so that a difference between two validations is one of the policies.
        """
        began, config = time.monotonic(), self.config
        batch = config.training.per_device_batch_size or config.training.batch_size
        with self.autocast():
            row = {**self._where(), **scoring.validate(Distiller(model), self.val, batch, self.device)}
        if count := config.logging.eval_prompts:
            section = config.generation
            rows = range(count)[self.state.process_index::self.state.num_processes]
            prompts = self.prompts.batch(0, count)
            with self.autocast():
                samples = sample(model, self.tokenizer, [prompts[r] for r in rows], seeds_of(config.seed, 0, rows, "validation"),
                                 max_new_tokens=section.max_new_tokens, temperature=section.temperature, batch_size=batch)
                for name, which in (("logprobs", model), ("reference_logprobs", self.reference)):
                    found = completion_logprobs(body_and_head(which, "policy"), samples, temperature=section.temperature, batch_size=batch)
                    for scored, values in zip(samples, found, strict=True):
                        setattr(scored, name, values)
            self.score(samples)
            samples = self.gather(rows, samples)
            ratio = torch.cat([s.logprobs - s.reference_logprobs for s in samples])
            row |= {**_means(samples), "kl": float(ratio.mean()), "rewards": [s.reward for s in samples]}
            self._write_samples("validation", samples[:config.logging.samples])
        self.folder.append_metrics({"kind": "eval", **row})
        self._window_began += time.monotonic() - began  # validation is not part of the training speed
        shown = [f"{name} {row[name]:.4f}" for name in ("ce", "reward", "kl") if row.get(name) is not None]
        self.say(f"  validation at step {self.step:,}: {' | '.join(shown)} | perplexity {row['perplexity']:.2f}")
        return row

    def autocast(self) -> torch.autocast:
        """Within it, every model computes in the run's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.training.precision == "bf16")

    # -- files

    @property
    def _samples_file(self) -> Path:
        return self.folder.run / "samples.jsonl"

    def _write_samples(self, kind: str, samples: Sequence[Sample]) -> None:
        if self.folder.main:
            with open(self._samples_file, "a", encoding="utf-8") as stream:
                for s in samples:
                    stream.write(json.dumps({"kind": kind, **self._where(), "prompt": s.prompt, "completion": s.completion,
                                             "finished": s.finished, "reward": s.reward, "parts": s.parts}, ensure_ascii=False) + "\n")

    def _forget_samples_after(self, step: int) -> None:
        if self.folder.main and self._samples_file.is_file():
            rows = [row for row in read_lines(self._samples_file) if row["step"] <= step]
            write_text(self._samples_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _save_milestones(self, model: PreTrainedModel, before: int) -> None:
        reached = milestones_between(self.config, before, self.progress.words)
        if not reached:
            return
        began = time.monotonic()
        for name in reached:
            if self.folder.main:
                with saving(self.folder.root / name), folder_written_whole(self.folder.root / name) as target:
                    models.save_model(model, self.tokenizer, target)
            self.folder.append_metrics({"kind": "milestone", **self._where(), "name": name})
            self.say(f"  milestone {name} at step {self.step:,} ({self.progress.words:,} words generated)")
        if self.sets and self.folder.main:
            self.say(training.score_milestones(self.folder, reached, self._where(), model, self.tokenizer, self.sets))
        self.state.wait_for_everyone()
        self._window_began += time.monotonic() - began

    def finish(self, model: PreTrainedModel) -> None:
        """The budget is used up: the final model goes to the root, then finished.json says so."""
        if self.folder.main:
            rows = list(read_lines(self.folder.metrics))
            first, last = ([row for row in rows if row["kind"] == "eval"][place] for place in (0, -1))
            kept = ("ce", "perplexity", "ce_by_domain", "reward", "kl")
            ledger = {**self.ledger, "generated_words": self.progress.words}
            result = {"steps": self.step, "weights_from_step": self.step,
                      "words_seen": sum(row.seen for row in accounts(ledger) if row.role != "generated"),  # of text, before this run
                      "generated_words": self.progress.words, "seconds": round(self.seconds(), 1),
                      "parameters": models.count_parameters(model), **{name: last[name] for name in kept if name in last},
                      "excluded": self.progress.excluded, "ledger": ledger}
            if first["step"] == 0:  # not where it began with the checkpoint of another run (resume_path)
                result |= {"before": {name: first[name] for name in kept if name in first}, "reward_gain": paired_gain(first, last)}

            def write(target: Path) -> None:
                models.save_model(model, self.tokenizer, target)
                models.require_saved_equals(model, target, self.val[0]["input_ids"][None, :64])
                (target / "README.md").write_text(model_card(self.folder.root, result, model=target), encoding="utf-8")

            with saving(self.folder.root):
                self.folder.install_final(write)
            self.folder.finish(result)
            if first["step"] == 0:
                self._show_samples(first["step"], last["step"])
            if gain := result.get("reward_gain"):
                self.say(f"  reward of the same prompts with the same noise: {gain['mean']:+.4f} ± {1.96 * gain['se']:.4f} "
                         f"(95 %, {gain['n']} pairs)")
            self.say(f"finished {self.folder.root}: step {self.step:,} | {self.progress.words:,} words generated | "
                     + " | ".join(f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in ("reward", "kl", "ce") if name in last)
                     + f" | {result['seconds']:.0f} s")
        self.state.wait_for_everyone()

    # -- words for the user

    def _show_samples(self, first: int, last: int) -> None:
        """The first validation's completions beside the last one's: the same prompts and noise, another policy."""
        rows = [row for row in read_lines(self._samples_file) if row["kind"] == "validation"]
        before, after = ([row for row in rows if row["step"] == step] for step in (first, last))
        for old, new in list(zip(before, after, strict=False))[:SHOWN]:
            self.say(f"  prompt  {old['prompt']!r}")
            for name, row in (("before", old), ("after", new)):
                earned = "no reward" if row["reward"] is None else f"reward {row['reward']:+.3f}"
                self.say(f"  {name:<7} {row['completion']!r} ({earned})")

    def say(self, line: str) -> None:
        """Print a line, once."""
        if self.folder.main:
            print(line, file=sys.stdout, flush=True)

    def print_plan(self, model: PreTrainedModel, trained: torch.nn.Module) -> None:
        """What the run will be, and what it costs.

        Args:
            trained: all that the optimizer changes.
        """
        config = self.config
        budget = config.training
        flops = {name: value / 1e6 for name, value in rehearsal.flops_per_token(self, model, trained).items()}
        self.say(f"model      {models.count_parameters(model):,} parameters, from {config.model.path}; {sum(flops.values()):,.1f} MFLOP "
                 "per token of prompts and completions: " + " + ".join(f"{name} {value:,.1f}" for name, value in flops.items()))
        self.say(f"prompts    {len(self.prompts.texts):,}: {self.prompts.source}")
        self.say("rewards    " + " + ".join(f"{r.weight:g} x {r.__name__}" for r in self.rewards))
        per_device, accumulation = accumulation_steps(config, self.state.num_processes)
        self.say(f"batch      {budget.batch_size} completions of up to {config.generation.max_new_tokens} tokens = "
                 f"{self.state.num_processes} process(es) x {per_device} x {accumulation} accumulation")
        self.say("budget     " + (f"{budget.words:,} words generated" if budget.words else f"{budget.steps:,} steps"))
        self.say(f"device     {self.device}, {budget.precision}, {torch.get_num_threads()} CPU threads")
        if self.folder.main:
            self.say(f"memory     {rehearsal.memory(self, model, trained)}")
        if self.folder.resume_from and not config.dry_run:
            self.say(f"resuming from {self.folder.resume_from}")


def save_state(folder: Path, trained: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what is trained, and its optimizer, into a resume checkpoint."""
    save_file({name: p.detach().contiguous() for name, p in trained.named_parameters()}, folder / "trained.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def load_state(folder: Path, trained: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put back what `save_state` wrote. UserError where the checkpoint holds other parameters."""
    saved, mine = load_file(folder / "trained.safetensors"), dict(trained.named_parameters())
    if saved.keys() != mine.keys():
        raise UserError(f"{folder} holds other parameters than this run trains: {', '.join(sorted(saved.keys() ^ mine.keys())[:5])}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))


def tracked(config: RLConfig) -> dict[str, Any]:
    """The config as experiment trackers take it: {"training.lr": 1e-4, ...}, plain values only."""
    return {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in identity(config).items()}


def _summed(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """A judge's counts over all processes, and the rate that follows from them."""
    names = {name for one in stats for name in one}
    found = {name: sum(one.get(name, 0.0) for one in stats) for name in names if not name.endswith("/parse_failure_rate")}
    return found | {name: found[name.replace("parse_failure_rate", "parse_failures")] / calls for name in names
                    if name.endswith("/parse_failure_rate") and (calls := found[name.replace("parse_failure_rate", "calls")])}


def paired_gain(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float] | None:
    """{"mean", "se", "n"} of the differences in reward between two validations, completion by completion; None without two pairs."""
    pairs = zip(first.get("rewards", ()), last.get("rewards", ()), strict=True)
    gains = [new - old for old, new in pairs if old is not None and new is not None]
    if len(gains) < 2:
        return None
    mean = _mean(gains)
    return {"mean": mean, "se": math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains)), "n": len(gains)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _means(samples: Sequence[Sample]) -> dict[str, float | None]:
    """What a batch of samples comes to: mean reward and parts (over those that have one), length, share that ended by itself."""
    names = dict.fromkeys(name for s in samples for name in s.parts)
    scored = [s.reward for s in samples if s.reward is not None]
    mean = _mean(scored)
    return {"reward": mean, "reward_sd": math.sqrt(_mean([(value - mean) ** 2 for value in scored])) if scored else None,
            **({f"reward/{name}": _mean([s.parts[name] for s in samples if s.parts.get(name) is not None]) for name in names}
               if len(names) > 1 else {}),
            "completion_words": _mean([s.words for s in samples]), "completion_tokens": _mean([len(s.completion_ids) for s in samples]),
            "finished": _mean([s.finished for s in samples])}
