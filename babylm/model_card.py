"""The model card: one function writes it, for every finished run and, with more in it, for what is published. It says what the
records say (run/, the corpus' manifest, results/) and calls everything else unknown.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from babylm import models
from babylm.ledger import ledger_text, read_lines, read_values
from babylm.schema import milestone_words

ARCHITECTURES = {"gpt2": "GPT-2", "llama": "Llama", "gptj": "GPT-J", "moep": "MoE-P"}
ALGORITHMS = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO"}
METRICS = {"accuracy": "accuracy", "spearman": "spearmanr", "reading": "partial-r2"}  # of a set's kind, in the metadata
CURVE = {"ce": "training CE", "kl": "training KL", "reward": "reward"}  # columns of the curve: what training rows may hold
UNKNOWN = "unknown"


def model_card(root: Path, result: dict[str, Any], model: Path, repo: str | None = None, licence: str | None = None,
               datasets: Sequence[str] = (), scores: dict[str, dict[str, dict[str, dict]]] | None = None, gguf: str | None = None) -> str:
    """The README.md of a final model, with metadata that the hub accepts.

    Args:
        root: the run folder; run/config.yaml, record.json and metrics.jsonl are read.
        result: what finished.json holds, or will hold.
        model: the folder of the final model's config.json (or adapter_config.json), the run folder or one not yet moved there.
        repo: its name on the hub; without one, paths stand in the examples.
        licence, datasets: for the metadata, from whoever publishes it; no record holds them.
        scores: what `evaluation` found; None where nobody looked.
        gguf: name of a GGUF file beside the weights.
    """
    config = yaml.safe_load((root / "run" / "config.yaml").read_text(encoding="utf-8"))
    record, rows = read_values(root / "run" / "record.json"), list(read_lines(root / "run" / "metrics.jsonl"))
    shape, adapter = read_values(model / "config.json"), read_values(model / "adapter_config.json")
    own_code = any(model.glob("modeling_*.py"))
    sections = [
        f"# {repo.split('/')[1] if repo else config['name']}",
        _what_it_is(config, record, result, shape, adapter),
        _use(repo or f"path/to/{config['name']}", bool(repo), rows, own_code, shape, bool(adapter), gguf),
        _results(config, result), _curve(rows, scores or {}, "algorithm" in config), _scores(scores),
        _data(config, result["ledger"]),
        "## Word ledger\n\n" + ledger_text(result["ledger"]) + "\n\nThe record that this follows from is `ledger` in `run/finished.json`.\n"
        "Names such as `models/x` are folders of the machine it was trained on.",
        _hyperparameters(config), _how_it_was_made(record, result), _limits(config, shape, licence),
    ]
    metadata = _metadata(config, result, repo, licence, datasets, scores or {}, adapter)
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


# ---- Metadata -------------------------------------------------------------------------------------------------------


def _metadata(config: dict, result: dict, repo: str | None, licence: str | None, datasets: Sequence[str], scores: dict,
              adapter: dict) -> dict[str, Any]:
    name = repo.split("/")[1] if repo else config["name"]
    base = adapter.get("base_model_name_or_path") or (config.get("model", {}).get("path") if _starts_from_weights(config) else None)
    teachers = [one["path"] for one in result["ledger"]["teachers"]]
    tags = ["babylm", *(["distillation"] if teachers else []), *([config["algorithm"]] if "algorithm" in config else [])]
    found = {"language": "en", **({"license": licence} if licence else {}), "library_name": "peft" if adapter else "transformers",
             "pipeline_tag": "text-generation", "tags": tags}
    if base and _is_hub_name(base):
        found |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets:
        found["datasets"] = list(datasets)
    entries = [{"task": {"type": "text-generation"}, "dataset": {"name": "validation text of the run", "type": "babylm-validation"},
                "metrics": [{"type": "perplexity", "value": round(result["perplexity"], 4), "name": "perplexity"},
                            {"type": "cross-entropy", "value": round(result["ce"], 4), "name": "cross-entropy (nats per token)"}]}]
    for suite, revisions in scores.items():
        for one, entry in revisions.get("main", {}).items():
            kind = entry.get("kind", "accuracy")
            entries.append({"task": {"type": "text-generation"}, "dataset": {"name": f"{one} ({suite})", "type": one},
                            "metrics": [{"type": METRICS.get(kind, kind), "value": round(entry["score"], 2),
                                         "name": f"{kind}, standard error {entry['se']:.2f}"}]})
    return {**found, "model-index": [{"name": name, "results": entries}]}


def _is_hub_name(path: str) -> bool:
    return not Path(path).exists() and not path.startswith("models/") and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path))


def _starts_from_weights(config: dict) -> bool:
    """Whether model.path is what training began with; a stage that has no `init` always begins with weights."""
    return bool(config.get("model", {}).get("path")) and config.get("model", {}).get("init", "pretrained") == "pretrained"


# ---- Sections -------------------------------------------------------------------------------------------------------


def _what_it_is(config: dict, record: dict, result: dict, shape: dict, adapter: dict) -> str:
    kind = ARCHITECTURES.get(shape.get("model_type"), shape.get("model_type") or "adapter")
    sizes = {"layers": shape.get("num_hidden_layers") or shape.get("n_layer"), "wide": shape.get("hidden_size") or shape.get("n_embd"),
             "entries in the vocabulary": shape.get("vocab_size"),
             "positions": _positions(shape)}
    sized = ", ".join(f"{value:,} {what}" for what, value in sizes.items() if value)
    start = f"starting from the weights of `{config['model']['path']}`" if _starts_from_weights(config) else "starting from random weights"
    teachers = [one["path"] for one in result["ledger"]["teachers"]]
    if "algorithm" in config:
        how = f"trained further by {ALGORITHMS.get(config['algorithm'], config['algorithm'])} (rewards below)"
    else:
        how = "distilled from " + " and ".join(f"`{path}`" for path in teachers) if teachers else "trained by cross-entropy"
    if config.get("lora", {}).get("mode", "none") != "none":
        how += f" with {'QLoRA' if config['lora']['mode'] == 'qlora' else 'LoRA'} adapters" + (
            f" (this repository holds the adapter alone; its base is `{adapter['base_model_name_or_path']}`)" if adapter else ", merged")
    step = f", weights of step {result['weights_from_step']:,} of {result['steps']:,}" if "weights_from_step" in result else (
        f", {result['steps']:,} steps")
    generated = result["ledger"].get("generated_words")
    return (f"A small English language model of the BabyLM pipeline: {kind} with {result['parameters']:,} parameters"
            + (f" ({sized})" if sized else "") + f". {how[0].upper() + how[1:]}, {start}.\n\n"
            f"Trained by `{record.get('stage', UNKNOWN)}` (seed {config.get('seed', UNKNOWN)}): {result['words_seen']:,} words seen "
            "(repeats counted)" + (f" and {generated:,} words generated by itself" if generated else "") + step + ".")


def _positions(shape: dict) -> int | None:
    return shape.get("max_position_embeddings") or shape.get("n_positions")


def _use(source: str, published: bool, rows: list[dict], own_code: bool, shape: dict, adapter: bool, gguf: str | None) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    names = [row["name"] for row in rows if row.get("kind") == "milestone"]
    imports = ("from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer" if adapter else
               "from transformers import AutoModelForCausalLM, AutoTokenizer")
    tokens = min(30, _positions(shape) // 2) if _positions(shape) else 30  # the prompt has a place beside them
    milestone = ""
    if names:
        where = f'"{source}", revision="{names[0]}"' if published else f'"{source}/{names[0]}"'
        milestone = f"\n\nearlier = {auto}.from_pretrained({where}{trust})  # a milestone"
    code = f"""## Use

```python
{imports}

model = {auto}.from_pretrained("{source}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{source}"{trust})  # prepends the start token by itself
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={tokens}, do_sample=True)[0], skip_special_tokens=True)){milestone}
```"""
    if own_code:
        code += "\n\nThe model's code is the one file `modeling_*.py` beside the weights, which is why `trust_remote_code=True` is needed."
    if gguf:
        code += f"\n\nFor llama.cpp: `{gguf}`."
    return code


def _results(config: dict, result: dict) -> str:
    data = config.get("data", {})
    text = f"`{data['eval_path']}`" if data.get("eval_path") else f"the held-out part of `{data.get('corpus', UNKNOWN)}`"
    domains = "\n".join(f"| {name} | {value:.4f} |" for name, value in result.get("ce_by_domain", {}).items())
    return (f"## Validation\n\nValidation cross-entropy {result['ce']:.4f} nats per token, perplexity {result['perplexity']:.2f}, on "
            f"{text}. Both depend on the tokenizer: compare them between models of one vocabulary only."
            + _before(result) + (f"\n\n| domain | CE (nats per token) |\n|---|---|\n{domains}" if domains else ""))


def _before(result: dict) -> str:
    """Stage 6: what its first validation, of the model it started from, gave beside the last."""
    named = {"reward": "reward", "kl": "KL to the start (nats per token)", "ce": "validation CE", "perplexity": "perplexity"}
    rows = [f"| {title} | {result['before'][name]:.4f} | {result[name]:.4f} |" for name, title in named.items()
            if name in result.get("before", {}) and result.get(name) is not None]
    return "\n\n| | before | after |\n|---|---|---|\n" + "\n".join(rows) if rows else ""


def _curve(rows: list[dict], scores: dict, generated: bool = False) -> str:
    """A row per milestone: where it lies, the last logged training figures and the last validation by then, zero-shot scores."""
    milestones = [row for row in rows if row.get("kind") == "milestone"]
    if not milestones:
        return ""
    shown = [name for name in CURVE if any(name in row for row in rows if row.get("kind") == "train")]
    online = {row["name"]: row["tasks"] for row in rows if row.get("kind") == "scores"}
    evaluated = {**online, **max(scores.values(), key=len, default={})}  # of several suites, the one with most milestones
    sets = list(dict.fromkeys(name for row in milestones for name in evaluated.get(row["name"], {})))
    head = ["revision", "words generated" if generated else "words seen", "step", *(CURVE[name] for name in shown),
            "validation CE (at step)", *sets]
    lines = ["## Milestones", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in milestones:
        before = {kind: next((one for one in reversed(rows) if one.get("kind") == kind and one["step"] <= row["step"]), {})
                  for kind in ("train", "eval")}
        cells = [f"`{row['name']}`", f"{row['words']:,}", f"{row['step']:,}",
                 *(f"{before['train'][name]:.4f}" if name in before["train"] else "-" for name in shown),
                 f"{before['eval']['ce']:.4f} ({before['eval']['step']:,})" if "ce" in before["eval"] else "-",
                 *(_score(evaluated.get(row["name"], {}).get(name)) for name in sets)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + ("\n\nTraining figures are means over the last logged steps up to there; the validation is the last one by "
                               "then. Every row is a revision of its own." if shown else "")


def _score(entry: dict | None) -> str:
    return f"{entry['score']:.2f} ± {entry['se']:.2f}" if entry else "-"


def _scores(scores: dict | None) -> str:
    lines = []
    for suite, revisions in (scores or {}).items():
        columns = [name for name in ("main", "untrained") if name in revisions]
        sets = list(dict.fromkeys(name for column in columns for name in revisions[column]))
        if not sets:
            continue
        heads = ["this model" if name == "main" else "same shape, untrained" for name in columns]
        lines += [f"Zero-shot, {suite}: score ± one standard error over items.", "", f"| set | items | {' | '.join(heads)} | chance |",
                  "|---|---|" + "---|" * (len(columns) + 1)]
        for name in sets:
            entries = [revisions[column].get(name) for column in columns]
            one = next(entry for entry in entries if entry)
            ties = [entry["ties"] if entry else 0 for entry in entries]
            cells = [_score(entry) + (f" ({100 * tie:.1f} % ties)" if tie else "") for entry, tie in zip(entries, ties, strict=True)]
            mark = " (not the official set)" if "unlike_official" in one else ""
            cells.append(f"{one['chance']:g}" if "chance" in one else UNKNOWN)
            lines.append(f"| {name}{mark} | {one['n']:,} | {' | '.join(cells)} |")
        lines += ["", *([] if "untrained" in revisions else ["The untrained model was not scored.", ""])]
    if not lines:
        lines = ["Unknown: not scored yet when this card was written." if scores is None else
                 "Unknown: no scores of the official sets are on record for these weights."]
    return "\n".join(["## Evaluation", "", *lines]).rstrip()


def evaluation(root: Path, results: Path) -> tuple[dict[str, dict[str, dict[str, dict]]], list[str]]:
    """What eval.zero_shot found for a run: {"suite 2025, causal backend": {revision: {set: summary}}}, and a note on scores that
    are left out because they belong to other weights of this name.

    Args:
        results: the folder given to --output there; what lies in <results>/<suite>/<name> is of another suite.
    """
    found: dict[str, dict[str, dict[str, dict]]] = {}
    stale: set[str] = set()
    fingerprints: dict[str, str] = {}
    below = f"{root.name}/*/zero_shot/*/summary.json"
    for summary in sorted([*results.glob(below), *results.glob(f"*/{below}")]):
        revision, backend = summary.parents[2].name, summary.parent.name
        folder = root if revision in ("main", "untrained") else root / revision
        if not folder.is_dir():
            continue
        suite = summary.parents[4].name if summary.parents[4] != results else "2025"
        if revision not in fingerprints:
            fingerprints[revision] = ("untrained " if revision == "untrained" else "") + models.checkpoint_fingerprint(
                folder, weights=revision != "untrained")
        for name, entry in read_values(summary).get("tasks", {}).items():
            if entry.get("identity", {}).get("checkpoint") == fingerprints[revision]:
                found.setdefault(f"suite {suite}, {backend} backend", {}).setdefault(revision, {})[name] = entry
            else:
                stale.add(revision)
    notes = [f"{results / root.name}: the scores of {', '.join(sorted(stale))} are of other weights than these, or of an older version: "
             "not in the card; run eval.zero_shot again"] if stale else []
    order = {suite: dict(sorted(revisions.items(), key=lambda pair: milestone_words(pair[0]) or 0)) for suite, revisions in found.items()}
    return order, notes


def _data(config: dict, ledger: dict) -> str:
    corpus = config.get("data", {}).get("corpus")
    if "algorithm" in config:
        return (f"## What it learned from\n\nNo text, but rewards for {ledger['generated_words']:,} words of its own writing: `prompts` "
                "and `rewards` among the hyperparameters below. What its weights had read before is in the word ledger.")
    manifest = read_values(Path(corpus) / "manifest.json") if corpus else {}
    part = manifest.get("parts", {}).get("train", {})
    text = f"## Training text\n\n{ledger['corpus_words']:,} words of text (`{corpus}`, sha256 `{ledger['corpus_sha256'][:16]}`)."
    if part.get("sha256") != ledger["corpus_sha256"]:
        return text + " Its domains are unknown: its manifest was not at hand when this card was written."
    rows = [f"| {name} | {values['documents']:,} | {values['words']:,} |" for name, values in part["domains"].items()]
    return "\n".join([text, "", "| domain | documents | words |", "|---|---|---|", *rows,
                      f"| **in all** | {part['documents']:,} | {part['words']:,} |"])


def _hyperparameters(config: dict) -> str:
    """All keys that have a value, whatever the stage's sections are."""
    def given(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inner for key, one in value.items() if (inner := given(one)) not in (None, {}, [])}
        return value

    kept = {key: value for key, value in given(config).items() if key not in ("name", "output", "fresh", "resume_path")}
    return ("## Hyperparameters\n\nEvery key that has a value; keys that are left out are empty. The whole file is `run/config.yaml`.\n\n"
            f"````yaml\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()}\n````")


def _how_it_was_made(record: dict, result: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
    commit = f"`{record['git_commit']}`" if record.get("git_commit") else UNKNOWN
    if record.get("git_diff"):
        commit += f", with changes that were not committed ({len(record['git_diff'].splitlines())} lines of diff)"
    seconds = result.get("seconds")
    rows = {"command": f"`{record['command']}`" if record.get("command") else UNKNOWN, "git commit": commit,
            "hardware": f"{record.get('device') or UNKNOWN}, CPU cores: {record.get('cpus') or UNKNOWN}, processes: "
                        f"{record.get('processes') or UNKNOWN}",
            "training time": f"{seconds:,.0f} s" if seconds is not None else UNKNOWN, "started": record.get("started") or UNKNOWN,
            "software": f"Python {record.get('python') or UNKNOWN}, {packages or UNKNOWN}"}
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _limits(config: dict, shape: dict, licence: str | None) -> str:
    block, positions = config.get("data", {}).get("seq_len"), _positions(shape)
    lines = ["- Made for research on language models that see about as much text as a child does: comparisons of training methods, "
             "evaluation at milestones. It is not meant for use in products, nor as a source of facts.",
             "- It continues text. It was not taught to follow instructions or to converse, and nothing was done to keep harmful, false or "
             "biased text of its training data out of what it writes.",
             "- English only, of the domains of its training text; its knowledge is thin, and its scores differ from seed to seed."]
    if "algorithm" in config:
        lines.append("- It was trained on rewards: what the reward does not measure may have become worse, and text may please the reward "
                     "without being good.")
    if block and positions and positions > block and "algorithm" not in config:  # there, seq_len is that of validation
        lines.append(f"- Trained on blocks of {block} tokens; it accepts up to {positions}, but beyond {block} it was not trained.")
    lines.append((f"- Licence: {licence}." if licence else "- Licence: unknown, none was named when this card was written.")
                 + " The training text has licences of its own.")
    return "\n".join(["## Limits and intended use", "", *lines])

