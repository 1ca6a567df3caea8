"""Every YAML key of the pipeline, stage by stage: its type, default, range and meaning. babylm/schema.py reads them from a file."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Tag, field_validator, model_validator

from babylm.schema import Schedule, Section, StageConfig, Temperature, Weight, WordCount, fixed, key

# ---- Stage 1: the corpus --------------------------------------------------------------------------------------------


class CorpusSection(Section):
    input: str = key("train_10M", "folder with one <domain>.train file per domain (or only .dev files)", identity=False)
    output: str = key("corpus_split", "folder to write: text parts, manifest.json, tokenizer, token store", identity=False)
    demo_words: WordCount | None = key(None, "generate the embedded demo corpus of about this many words into `input`")
    demo_pairs: int = key(0, "demo corpus only: held-out minimal pairs per phenomenon, written to <output>/pairs", ge=0)
    max_words: WordCount | None = key(None, "draw whole documents up to this many words, each domain by its share")
    validation_fraction: float = key(
        0.05, "share of each domain's words that goes to validation, by document; 1.0 makes an evaluation-only corpus",
        ge=0.0, le=1.0,
    )
    boundaries: dict[str, str] = key(
        {}, "per domain or `default`: auto | blank | heading | lines:N - what starts a new document"
    )
    chunk_lines: int = key(100, "lines per document where a file marks none (boundary `auto` finds nothing)", ge=1)
    max_document_words: int = key(100_000, "longer documents are cut at a line end, so that memory stays bounded", ge=100)
    clean: bool = key(True, "apply the cleaning rules of babylm/cleaning.py")
    cleaning: dict[str, list[str]] = key({}, "per domain or `default`: names of rules instead of the defaults")
    encoding_errors: Literal["strict", "replace", "ignore"] = key("strict", "what to do with bytes that are not UTF-8")
    drop_duplicates: bool = key(False, "leave documents out of the training part that validation also holds")

    @field_validator("boundaries")
    @classmethod
    def known_boundary(cls, value: dict[str, str]) -> dict[str, str]:
        for domain, rule in value.items():
            if not re.fullmatch(r"auto|blank|heading|lines:[1-9]\d*", rule):
                raise ValueError(f"{domain}: {rule!r} is not one of auto, blank, heading, lines:N")
        return value


class TokenizerSection(Section):
    path: str | None = key(None, "a local folder or hub name, such as gpt2; without it a tokenizer is trained here")
    vocab_size: int = key(16_000, "entries of a tokenizer trained here, special tokens included", ge=300, le=2**31)
    min_frequency: int = key(2, "pairs seen less often are not merged", ge=1)


class DownloadSection(Section):
    strict_small: str = key("BabyLM-community/BabyLM-2026-Strict-Small", "hub dataset of the 10M-word corpus", identity=False)
    strict: str = key("BabyLM-community/BabyLM-2026-Strict", "hub dataset of the 100M-word corpus", identity=False)
    revision: str = key("main", "branch, tag or commit of that dataset", identity=False)


class CorpusConfig(StageConfig):
    """Stage 1, `combine_babylm.py`."""

    seed: int = key(0, "drives which documents are drawn and which are held out", ge=0)
    fresh: bool = key(False, "move an existing output folder made with other settings aside", identity=False)
    corpus: CorpusSection = key(CorpusSection(), "the text")
    tokenizer: TokenizerSection = key(TokenizerSection(), "the vocabulary")
    download: DownloadSection = key(DownloadSection(), "where --download finds the published corpora")

    @model_validator(mode="after")
    def a_tokenizer_needs_text(self) -> "CorpusConfig":
        if self.corpus.validation_fraction == 1 and not self.tokenizer.path:
            raise ValueError("corpus.validation_fraction 1 leaves no text to train a tokenizer on: give tokenizer.path")
        return self


# ---- Stages 2 to 4: one run of training -----------------------------------------------------------------------------


class DataSection(Section):
    corpus: str = key("corpus_split", "folder written by stage 1", identity=False)
    tokenizer: str | None = key(None, "folder or hub name; default: the tokenizer that stage 1 left in the corpus folder",
                                identity=False)
    seq_len: int = key(128, "tokens per block", ge=8)
    random_chunk: bool = key(True, "every epoch cuts the text into blocks at an offset of its own")
    offset_cycle: int | None = key(None, "number of different offsets before they repeat; default: they never do", ge=1)
    offset_seed: int | None = key(None, "draws the offsets; default: seed. Runs of several seeds can share a teacher cache by it", ge=0)
    eval_path: str | None = key(None, "another corpus folder of stage 1 whose validation part is used instead", identity=False)
    eval_blocks: int = key(8192, "validation blocks, drawn once with a fixed seed that all runs share", ge=1)


class ModelSection(Section):
    init: Literal["random", "pretrained"] = key("random", "random weights from the keys below, or those in `path`")
    path: str | None = key(None, "with init: pretrained - a folder or hub name, such as gpt2-large")
    architecture: Literal["gpt2", "llama", "gptj"] = key("gpt2", "with init: random")
    layers: int = key(12, "blocks", ge=1)
    width: int = key(768, "width of the residual stream", ge=8)
    heads: int = key(12, "attention heads", ge=1)
    kv_heads: int | None = key(None, "llama: key/value heads (grouped-query attention); default: as many as heads", ge=1)
    ffn: int | None = key(None, "inner width of the feed-forward; default: 4 x width (llama: 8/3 x width, to a multiple of 8)", ge=8)
    tied: bool | None = key(None, "share input and output embeddings; default: gpt2 yes, llama and gptj no")
    max_positions: int = key(1024, "longest input; the official evaluation needs at least 512", ge=8)
    dropout: float = key(0.0, "on embeddings, attention and residuals (llama: attention only)", ge=0.0, lt=1.0)

    @field_validator("architecture", mode="before")
    @classmethod
    def not_of_stage_5(cls, value: Any) -> Any:
        if value == "moep":
            raise ValueError("moep is the student of stage 5: python train_moep_student.py --config <this file>")
        return value

    @model_validator(mode="after")
    def shapes_fit(self) -> "ModelSection":
        if self.init == "pretrained" and not self.path:
            raise ValueError("init: pretrained needs model.path, a folder or hub name")
        if self.init == "random" and self.path:
            raise ValueError(f"model.path is {self.path!r} but init is random: set init: pretrained, or remove path")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.kv_heads and (self.architecture != "llama" or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads {self.kv_heads} needs architecture llama and must divide heads {self.heads}")
        if self.architecture in ("llama", "gptj") and (self.width // self.heads) % 2:
            raise ValueError("rotary positions need an even width per head")
        return self


class MoEPModelSection(Section):
    """The MoE-P student (modeling_moep.py); the defaults are the published configuration."""

    init: Literal["random", "pretrained"] = key("random", "random weights from the keys below, or those in `path`")
    path: str | None = key(None, "with init: pretrained - a folder with a MoE-P model")
    architecture: Literal["moep"] = key("moep", "says which student this is")
    layers: int = key(12, "the first block, the parallel layers, the last block", ge=2)
    width: int = key(384, "of embeddings, first and last block, and output", ge=8)
    heads: int = key(6, "attention heads of the first and the last block", ge=1)
    ffn: int | None = key(None, "inner width of their feed-forward; default: 4 x width", ge=8)
    parallel_width: int = key(192, "of the parallel layers", ge=8)
    parallel_heads: int = key(3, "attention heads of each of their blocks", ge=1)
    parallel_ffn: int | None = key(None, "inner width of their feed-forward; default: 4 x parallel_width", ge=8)
    experts: int = key(4, "blocks in a parallel layer; linear experts where the width changes", ge=1)
    experts_per_token: int = key(2, "how many of them a token uses", ge=1)
    activation: Literal["gelu_new", "swiglu"] = key("gelu_new", "swiglu has a third matrix of the same inner width")
    sliding_window: int | None = key(None, "tokens that every second parallel layer attends to; default: all", ge=1)
    tied: bool = key(True, "share input and output embeddings")
    max_positions: int = key(512, "longest input; the official evaluation needs at least 512", ge=8)
    dropout: float = key(0.0, "on embeddings, attention and residuals", ge=0.0, lt=1.0)
    expert_path: Literal["auto", "loop", "dense", "grouped"] = key(
        "auto", "how experts are computed: changes speed, not results; auto = what was measured best on the device", identity=False)

    @field_validator("architecture", mode="before")
    @classmethod
    def not_of_stage_4(cls, value: Any) -> Any:
        if value in get_args(ModelSection.model_fields["architecture"].annotation):
            raise ValueError(f"{value} is a student of stage 4: python train_student.py --config <this file>")
        return value

    @model_validator(mode="after")
    def shapes_fit(self) -> "MoEPModelSection":
        problems = [f"{name} {width} is not a multiple of {name.replace('width', 'heads')} {heads}" for name, width, heads in
                    (("width", self.width, self.heads), ("parallel_width", self.parallel_width, self.parallel_heads)) if width % heads]
        if self.experts_per_token > self.experts:
            problems.append(f"experts_per_token {self.experts_per_token} exceeds experts {self.experts}")
        if (self.init == "pretrained") != bool(self.path):
            problems.append("init: pretrained and path go together: give both or neither")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class OptimisationSection(Section):
    """What every stage that trains has in common; the budget and the defaults of its kind of training come on top."""

    batch_size: int = key(32, "sequences per optimizer step, over all processes and accumulation", ge=1)
    per_device_batch_size: int | None = key(None, "sequences that fit at once; default: all of a process's share",
                                            identity=False, ge=1)
    lr: float = key(2.5e-4, "peak learning rate", gt=0, le=10)
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "shape after the warm-up; cosine and linear end at 0")
    warmup_steps: int = key(200, "steps of linear warm-up", ge=0)
    weight_decay: float = key(0.1, "AdamW, on matrices only (not on biases and norms)", ge=0)
    beta1: float = key(0.9, "AdamW", ge=0, lt=1)
    beta2: float = key(0.999, "AdamW", ge=0, lt=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 = no clipping", ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "autocast type of forward and backward; weights stay fp32")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time", identity=False)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto takes a GPU where there is one", identity=False)
    threads: int | None = key(None, "CPU threads per process; default: torch's own choice", identity=False, ge=1)
    eval_tasks: list[str] = key(
        [], "tasks of the suite, such as blimp, scored at every milestone into metrics.jsonl; the run waits, so choose small sets",
        identity=False)
    eval_suite: str = key("2025", "the year whose tasks they are (2025 or 2026), or a file like eval/tasks.yaml", identity=False)
    eval_data: str | None = key(None, "folder of their sets, such as one that holds blimp_fast/", identity=False)

    @model_validator(mode="after")
    def tasks_need_data(self) -> "OptimisationSection":
        if self.eval_tasks and not self.eval_data:
            raise ValueError("eval_tasks needs eval_data, the folder that holds the sets")
        if self.eval_data and not self.eval_tasks:
            raise ValueError("eval_data is given but no eval_tasks: name some, such as [blimp], or remove eval_data")
        if len(set(self.eval_tasks)) < len(self.eval_tasks):
            raise ValueError("eval_tasks names a task twice")
        return self

    @model_validator(mode="after")
    def one_budget(self) -> "OptimisationSection":
        given = [name for name in self.budgets() if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.budgets())} (given: {', '.join(given) or 'none'})")
        per_device = self.per_device_batch_size
        if per_device and self.batch_size % per_device:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of per_device_batch_size {per_device}")
        return self

    @classmethod
    def budgets(cls) -> list[str]:
        """The keys that say when training ends."""
        return [name for name in ("steps", "epochs", "words") if name in cls.model_fields]


class TrainingSection(OptimisationSection):
    steps: int | None = key(None, "optimizer steps; give exactly one of steps, epochs, words", ge=1)
    epochs: float | None = key(None, "passes over the training text", gt=0)
    words: WordCount | None = key(None, "words seen, repeats counted (the step that reaches the budget is the last)")
    compile: bool = key(False, "torch.compile of the student (and teacher)", identity=False)
    fsdp: bool = key(False, "with several processes: each holds a part of every weight, gradient and optimizer state (FSDP2), of teachers "
                            "too; for models that do not fit on one device", identity=False)


class CheckpointsSection(Section):
    save_steps: int = key(1000, "steps between resume checkpoints", identity=False, ge=1)
    keep: int = key(2, "resume checkpoints kept while the run goes on", identity=False, ge=1)
    milestones: bool = key(True, "keep chck_1M...10M, 20...100M, 200...1000M: the revisions of the official evaluation",
                           identity=False)
    extra_words: list[WordCount] = key([], "further milestones, such as 100K for chck_100K", identity=False)
    every_words: WordCount | None = key(None, "further milestones at every multiple of this", identity=False)
    final: Literal["last", "best"] = key("last", "weights at the root: the last, or those of best validation CE")


class LoggingSection(Section):
    logging_steps: int = key(50, "steps between log lines", identity=False, ge=1)
    # Identity: with checkpoints.final: best it decides which weights are kept.
    eval_steps: int = key(500, "steps between validations; there is always one at the end", ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = key([], "experiment trackers to report to", identity=False)


class RunConfig(StageConfig):
    """What every training stage has."""

    name: str = key(..., "the run's folder is <output>/<name>", identity=False, min_length=1)
    output: str = key("models", "folder of all runs", identity=False)
    seed: int = key(0, "weights, data order, dropout", ge=0)
    fresh: bool = key(False, "move an existing run folder aside and start over", identity=False)
    resume_path: str | None = key(None, "resume from this checkpoint-<step> folder instead of the newest whole one", identity=False)
    data: DataSection = key(DataSection(), "what is read")
    model: ModelSection = key(ModelSection(), "what is trained")
    training: TrainingSection = key(..., "how it is trained")
    checkpoints: CheckpointsSection = key(CheckpointsSection(), "what is kept")
    logging: LoggingSection = key(LoggingSection(), "what is reported")

    @field_validator("name")
    @classmethod
    def usable_name(cls, value: str) -> str:
        if "." in value or "/" in value:
            raise ValueError(f"name {value!r} must hold neither dots (the official evaluation files results under the"
                             " part before a dot) nor slashes (use `output` for the folder)")
        return value

    @model_validator(mode="after")
    def fits_together(self) -> "RunConfig":
        if self.model.init == "random" and self.data.seq_len > self.model.max_positions:
            raise ValueError(f"data.seq_len {self.data.seq_len} exceeds model.max_positions {self.model.max_positions}")
        if self.checkpoints.final == "best" and self.training.steps and self.logging.eval_steps > self.training.steps:
            raise ValueError("checkpoints.final: best needs logging.eval_steps <= training.steps")
        return self


class LoraSection(Section):
    mode: Literal["none", "lora", "qlora"] = key("none", "none = full fine-tuning; qlora keeps the base in 4 bits (NF4)")
    rank: int = key(16, "rank of the update", ge=1)
    alpha: float = key(32.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = key(0.05, "on the adapter's input", ge=0, lt=1)
    targets: list[str] = key([], "module names to adapt; default: all projections of attention and feed-forward")
    modules_to_save: list[str] = key([], "modules trained in full beside the adapters, such as wte and lm_head")
    merge_adapter: bool = key(True, "the final model is one plain model; false: it is base + adapter", identity=False)


class TeacherConfig(RunConfig):
    """Stage 2, `train_teacher.py`."""

    lora: LoraSection = key(LoraSection(), "adapters")

    @model_validator(mode="after")
    def adapters_need_a_base(self) -> "TeacherConfig":
        if self.lora.mode != "none" and self.model.init != "pretrained":
            raise ValueError(f"lora.mode: {self.lora.mode} adapts pretrained weights: set model.init: pretrained and model.path")
        return self


class BaselineConfig(RunConfig):
    """Stage 3, `train_baseline.py`: cross-entropy only."""


class TeacherEntry(Section):
    """One teacher of several, or one with settings of its own."""

    path: str = key(..., "run folder, plain checkpoint folder (an adapter on a base too), or hub name", identity=False, min_length=1)
    weight: float = key(1.0, "share in what is taught; the weights of all teachers are divided by their sum", ge=0)
    layers: dict[int, int] = key(
        {}, "for `hidden`: teacher state -> student state it teaches; 0 = embeddings, i = output of block i; the last one is "
            "what the output head reads. Default: last -> last", )
    device: str | None = key(None, "where its body runs, such as cuda:1 or cpu; default: with the student", identity=False)

    @field_validator("layers")
    @classmethod
    def each_student_state_once(cls, value: dict[int, int]) -> dict[int, int]:
        for student in value.values():
            if sources := [theirs for theirs, ours in value.items() if ours == student][1:]:
                raise ValueError(f"student state {student} is mapped twice (also from teacher state {sources[0]}): it would be "
                                 "pulled towards two targets")
        if value and min(*value, *value.values()) < 0:
            raise ValueError("states are numbered from 0 (the embeddings)")
        return value


class HiddenSection(Section):
    """Hidden-state terms: deep supervision with `layers` maps (DSKD), or the last states alone."""

    weight: Weight = key(fixed(0.1), "weight of the term; 0 switches it off")
    loss: Literal["mse", "cosine"] = key("mse", "distance of the projected student state from the teacher's, per token")
    normalise: bool = key(False, "standardise both sides per token first, so that states of large norm do not dominate")


class AuxiliarySection(Section):
    """Classifiers on shallow blocks, trained like the student's own output and left out of the final model."""

    blocks: list[int] = key(..., "student blocks that get a classifier, from 1 to one below the last", min_length=1)
    weight: Weight = key(fixed(0.1), "weight of the sum over classifiers (gamma); 0 switches it off")
    weighting: Literal["fixed", "adaptive"] = key(
        "fixed", "fixed = every classifier 1/number of them; adaptive = by its share in their losses, sequence by sequence")
    share_head: bool = key(False, "the student's own output head after each classifier's hidden layer, instead of one of its own")
    dropout: float = key(0.1, "inside the classifiers", ge=0, lt=1)
    feature_weight: float = key(0.0, "within the term: MSE between projected block output and the teachers' last states", ge=0)

    @field_validator("blocks")
    @classmethod
    def each_block_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 1:
            raise ValueError("blocks are numbered from 1, each at most once")
        return value


class ContrastiveSection(Section):
    """InfoNCE between projected last states of student and teacher; negatives: the other positions of the sequence."""

    weight: Weight = key(fixed(0.1), "weight of the term; 0 switches it off")
    temperature: float = key(0.1, "tau, divides the cosine similarity (2.0 was published, and is nearly flat)", gt=0)
    dim: int = key(256, "width of both projections", ge=2)


class DistillationSection(Section):
    teacher: str | None = key(None, "one teacher: run folder (or plain checkpoint folder, or hub name)", identity=False, min_length=1)
    teachers: list[TeacherEntry] = key([], "several teachers, or one with a layer map; instead of `teacher`")
    combine: Literal["logits", "probabilities"] = key("logits", "several teachers teach the weighted mean of these")
    alpha: float | None = key(None, "shorthand for w_ce = alpha, w_kl = 1 - alpha", ge=0, le=1)
    w_ce: Weight | None = key(None, "weight of the cross-entropy")
    w_kl: Weight | None = key(None, "weight of T^2 * divergence between teacher and student")
    temperature: Temperature = key(fixed(1.0), "T, softens both distributions in the divergence")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = key("forward_kl", "forward_kl = KL(teacher || student)")
    jsd_beta: float | None = key(None, "beta of the generalised Jensen-Shannon divergence; default: 0.5", gt=0, lt=1)
    approximate_top_k: int | None = key(None, "approximation: only the teacher's k likeliest entries, renormalised", ge=2)
    approximate_top_p: float | None = key(None, "approximation: only the entries that hold this much of the teacher's mass", gt=0, lt=1)
    label_smoothing: float = key(0.0, "share of each target spread over the vocabulary (the reported CE stays unsmoothed)", ge=0, lt=1)
    kl_reduction: Literal["token_mean", "batchmean"] = key(
        "token_mean", "batchmean multiplies KL by the positions per sequence, as published code did; only to reproduce it"
    )
    hidden: HiddenSection | None = key(None, "match hidden states: DSKD, or the last states alone")
    auxiliary: AuxiliarySection | None = key(None, "classifiers on shallow blocks")
    contrastive: ContrastiveSection | None = key(None, "contrastive term on the last states")
    cache: bool = key(False, "read the teachers' states from a cache made by `python -m babylm.teacher_cache` instead of running them",
                      identity=False)
    cache_path: str | None = key(None, "folder of teacher caches; default: <data.corpus>/teacher_cache", identity=False)
    cache_dtype: Literal["auto", "bf16", "fp16", "fp32"] = key(
        "auto", "how cached states are stored; auto = training.precision, in which the output head reads them anyway")
    offload_teacher: bool = key(False, "teachers' blocks wait in the host's memory and visit the GPU one at a time: less GPU memory, more "
                                       "time, the same loss", identity=False)

    @model_validator(mode="after")
    def terms_fit_together(self) -> "DistillationSection":
        problems = list(self._contradictions())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        explicit = self.w_ce is not None or self.w_kl is not None
        if explicit and self.alpha is not None:
            yield "give either alpha or w_ce and w_kl, not both"
        elif not explicit and self.alpha is None:
            yield "give alpha, or w_ce and w_kl"
        elif explicit and (self.w_ce is None or self.w_kl is None):
            yield "w_ce and w_kl go together: give both"
        else:
            yield from self._contradictory_terms()
        if self.teacher and self.teachers:
            yield "give either teacher or teachers, not both"
        if self.teachers and sum(entry.weight for entry in self.teachers) <= 0:
            yield "the weights of the teachers add up to 0: at least one must be positive"
        if self.approximate_top_k and self.approximate_top_p:
            yield "give either approximate_top_k or approximate_top_p, not both"
        if self.jsd_beta is not None and self.divergence != "jsd":
            yield f"jsd_beta belongs to divergence: jsd, not to {self.divergence}"
        if not self.hidden and any(entry.layers for entry in self.teachers):
            yield "teachers.layers is given but there is no section hidden to use it"
        if self.cache and any(entry.device for entry in self.teachers):
            yield "teachers.device has no meaning with cache: true, which loads no teacher body"

    def _contradictory_terms(self) -> Iterator[str]:
        w_ce, w_kl = self.weights
        terms = {"w_kl": w_kl, **{name: section.weight for name in ("hidden", "contrastive") if (section := getattr(self, name))}}
        if not self.entries:
            needing = [name for name, weight in terms.items() if weight.largest > 0]
            if needing or self.cache:
                yield f"{', '.join(needing) or 'cache'} needs a teacher: give teacher or teachers"
            if self.auxiliary and self.auxiliary.feature_weight:
                yield "auxiliary.feature_weight needs a teacher: give teacher or teachers"
        if not any(weight.largest > 0 for weight in [w_ce, *terms.values()]):
            yield "w_ce and w_kl are both 0, and so is every other term: nothing would be learned"
        if self.label_smoothing and w_ce.largest == 0:
            yield "label_smoothing acts on the cross-entropy, but w_ce is 0"

    @property
    def weights(self) -> tuple[Schedule, Schedule]:
        """(w_ce, w_kl), whichever way they were given."""
        return (fixed(self.alpha), fixed(1.0 - self.alpha)) if self.alpha is not None else (self.w_ce, self.w_kl)

    @property
    def entries(self) -> list[TeacherEntry]:
        """All teachers, whichever way they were given; those of weight 0 left out."""
        given = [TeacherEntry(path=self.teacher)] if self.teacher else self.teachers
        return [entry for entry in given if entry.weight > 0]


class StudentConfig(RunConfig):
    """Stage 4, `train_student.py`."""

    distillation: DistillationSection = key(..., "what the teacher teaches")


class BalanceSection(Section):
    """Load balancing: E * sum f_e P_e per sequence, mean over the routers; 1 where every expert is used alike."""

    weight: Weight = key(fixed(0.01), "weight of the term; 0 leaves the routers to themselves")


class MoEPDistillationSection(DistillationSection):
    balance: BalanceSection = key(BalanceSection(), "keeps the routers from sending every token to the same experts")


class MoEPStudentConfig(StudentConfig):
    """Stage 5, `train_moep_student.py`."""

    model: MoEPModelSection = key(MoEPModelSection(), "what is trained")
    distillation: MoEPDistillationSection = key(..., "what the teacher teaches")


def student_schema(values: dict) -> type[StudentConfig]:
    """The schema of a student's YAML, for what serves stages 4 and 5 alike: by its model.architecture."""
    model = values.get("model")
    return MoEPStudentConfig if isinstance(model, dict) and model.get("architecture") == "moep" else StudentConfig


# ---- Stage 6: rewards -----------------------------------------------------------------------------------------------


class RewardSection(Section):
    """What every entry of `rewards` has."""

    weight: float = key(1.0, "factor in the sum of all rewards; 0 only logs it, negative turns it round")


class MarginReward(RewardSection):
    """The learned grammar reward: by how much a stronger teacher likes a completion better than the policy's start does."""

    kind: Literal["margin"] = key(..., "which reward this is")
    teacher: str = key(..., "run folder, plain checkpoint folder or hub name; has the policy's vocabulary", identity=False, min_length=1)
    normalise: Literal["token", "sequence"] = key("token", "token = mean over the completion's tokens; sequence = their sum")
    baseline: Literal["reference", "none"] = key("reference", "whose log-probability is subtracted: the frozen starting policy's, or none")
    batch_size: int = key(32, "completions per forward pass", identity=False, ge=1)
    device: str | None = key(None, "where the teacher runs, such as cuda:1 or cpu; default: with the policy", identity=False)


class LikelihoodReward(RewardSection):
    """Mean log-probability per token of the completion under a given model."""

    kind: Literal["likelihood"] = key(..., "which reward this is")
    model: str = key(..., "folder or hub name; with another vocabulary than the policy's it reads the text with its own tokenizer",
                     min_length=1)
    batch_size: int = key(32, "completions per forward pass", identity=False, ge=1)
    device: str | None = key(None, "where the model runs, such as cuda:1 or cpu; default: with the policy", identity=False)


class JudgeReward(RewardSection):
    """An instruct model grades the completion by a rubric; the reward is the share of the highest possible sum, 0 ... 1."""

    kind: Literal["judge"] = key(..., "which reward this is")
    model: str = key("meta-llama/Llama-3.1-8B-Instruct", "instruct model: folder or hub name; with `server`, its name there", min_length=1)
    server: str | None = key(None, "base address of an OpenAI-compatible server, such as http://localhost:8000/v1; default: in process",
                             identity=False)
    api_key_variable: str = key("OPENAI_API_KEY", "environment variable that holds the server's key; not set: none is sent",
                                identity=False, min_length=1)
    rubric: str | None = key(None, "file with the question to the judge; default: interactive/rubric.txt", identity=False)
    criteria: list[str] = key(["readability", "narrative coherence", "creativity"], "what is graded; the rubric names all", min_length=1)
    max_grade: int = key(3, "grades are 0 ... max_grade", ge=1, le=100)
    retries: int = key(2, "times an answer that is not in the asked-for form is asked for again, sampled, before it is given up", ge=0)
    temperature: float = key(0.7, "of these retries; the first answer is greedy", gt=0)
    max_new_tokens: int = key(64, "longest answer", ge=8)
    max_characters: int = key(4000, "of prompt and of completion that the judge sees; what follows is cut off", ge=1)
    batch_size: int = key(16, "in this process: completions per batch", identity=False, ge=1)
    device: str | None = key(None, "in this process: where it runs, such as cuda:1 or cpu; default: with the policy", identity=False)
    workers: int = key(8, "server: requests at a time", identity=False, ge=1)
    timeout: float = key(60.0, "server: seconds until a request has failed", identity=False, gt=0)
    attempts: int = key(6, "server: times a request is sent in all when it fails (refused, timed out, 429, 5xx)", identity=False, ge=1)
    backoff: float = key(1.0, "server: seconds before the second of them; doubles every time, up to a minute", identity=False, ge=0)

    @field_validator("criteria")
    @classmethod
    def words_each_once(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z]+(?:[ -][A-Za-z]+)*", name):
                raise ValueError(f"{name!r} is not made of words: letters, with single spaces or hyphens between them")
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("each criterion once")
        return value

    @field_validator("server")
    @classmethod
    def an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/?#@]+[^\s?#@]*", value):
            raise ValueError(f"{value!r} is no base address such as http://localhost:8000/v1 (no user name, no query)")
        return value.rstrip("/") if value else value


class LengthReward(RewardSection):
    """1 for a completion of min_words ... max_words, falling in a straight line to 0 outside: no bonus grows without end."""

    kind: Literal["length"] = key(..., "which reward this is")
    min_words: int = key(..., "fewest words (split at whitespace) for the full reward", ge=0)
    max_words: int = key(..., "most words for the full reward", ge=1)
    slack: int = key(10, "words outside the window at which the reward is 0", ge=1)

    @model_validator(mode="after")
    def a_window(self) -> "LengthReward":
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} exceeds max_words {self.max_words}")
        return self


class RepetitionReward(RewardSection):
    """Minus the share of n-grams of words that occurred before within the completion: -1 ... 0."""

    kind: Literal["repetition"] = key(..., "which reward this is")
    n: int = key(3, "words per n-gram; punctuation counts as words", ge=1)


class RandomReward(RewardSection):
    """Uniform in 0 ... 1 and worth nothing: what training does without a signal."""

    kind: Literal["random"] = key(..., "which reward this is")


def _kind(entry: Any) -> Any:
    return entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)


# A function picks the section: pydantic's own choice by a field does not go with Section's validators, which run before its checks.
RewardEntry = Annotated[
    Annotated[MarginReward, Tag("margin")] | Annotated[LikelihoodReward, Tag("likelihood")] | Annotated[JudgeReward, Tag("judge")]
    | Annotated[LengthReward, Tag("length")] | Annotated[RepetitionReward, Tag("repetition")] | Annotated[RandomReward, Tag("random")],
    Discriminator(_kind),
]


# ---- Stage 6: prompts -----------------------------------------------------------------------------------------------


class PromptsSection(Section):
    """Where the beginnings come from that the policy continues (interactive/prompts.py)."""

    source: Literal["corpus", "tinystories", "writingprompts", "imdb", "file", "fixed"] = key(
        "corpus", "corpus = openings of the corpus' validation documents; the three data sets come from the hub; file = your own; "
        "fixed = one prompt, always")
    dataset: str | None = key(None, "hub name or local folder of parquet or JSON files, instead of the source's own data set",
                              identity=False, min_length=1)
    revision: str = key("main", "branch, tag or commit of a data set on the hub")
    split: str = key("train", "part of the data set", min_length=1)
    path: str | None = key(None, "with source: file - a .txt with a prompt per line, or a .jsonl", identity=False, min_length=1)
    column: str | None = key(None, "field that holds the text; default: text (writingprompts and .jsonl files: prompt)", min_length=1)
    text: str | None = key(None, "with source: fixed - the prompt")
    cut: bool | None = key(None, "cut each text to its first tokens; default: corpus, tinystories and imdb yes, file no; "
                                 "writingprompts and fixed are never cut")
    min_tokens: int = key(1, "shortest prompt that is cut, in the policy's tokens", ge=1)
    max_tokens: int = key(7, "longest prompt that is cut; a length is drawn uniformly from min_tokens to this for every text", ge=1)
    max_words: int = key(49, "writingprompts: longer ones are left out (published: those under 50 words are kept)", ge=1)
    count: int = key(1000, "prompts to keep", ge=1)

    @model_validator(mode="after")
    def keys_fit_the_source(self) -> "PromptsSection":
        problems = list(self._contradictions())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        for name, owner in (("path", "file"), ("text", "fixed")):
            given = getattr(self, name)
            if self.source == owner and (given is None or not given.strip()):
                yield f"source: {owner} needs {name}"
            if self.source != owner and given is not None:
                yield f"{name} belongs to source: {owner}, not to {self.source}"
        if self.path is not None and not self.path.endswith((".txt", ".jsonl")):
            yield f"path {self.path!r} must end in .txt (a prompt per line) or .jsonl (an object per line)"
        if self.dataset is not None and not self.from_dataset:
            yield f"dataset belongs to source: tinystories, writingprompts or imdb, not to {self.source}"
        if self.column is not None and not (self.from_dataset or (self.path or "").endswith(".jsonl")):
            yield "column belongs to a data set or a .jsonl file"
        if self.cut and self.source in ("writingprompts", "fixed"):
            yield f"cut: {self.source} is never cut"
        if self.cut is False and self.source == "corpus":
            yield "cut: false would make whole documents of the corpus prompts"
        if self.min_tokens > self.max_tokens:
            yield f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}"

    @property
    def from_dataset(self) -> bool:
        """Whether the texts come through the library `datasets`."""
        return self.source in ("tinystories", "writingprompts", "imdb")

    @property
    def cuts(self) -> bool:
        """Whether texts are cut to their first tokens."""
        return self.source in ("corpus", "tinystories", "imdb") if self.cut is None else self.cut


# ---- Stage 6: learning from rewards ---------------------------------------------------------------------------------


class RLDataSection(Section):
    corpus: str = key("corpus_split", "folder written by stage 1: validation text, and prompts where they come from it", identity=False)
    eval_path: str | None = key(None, "another corpus folder of stage 1 whose validation part is used instead", identity=False)
    seq_len: int = key(128, "tokens per validation block", ge=8)
    eval_blocks: int = key(1024, "validation blocks, drawn once with a fixed seed that all runs share", ge=1)


class RLModelSection(Section):
    path: str = key(..., "the student to start from, which is also the frozen reference: run folder, milestone, or hub name", min_length=1)


class GenerationSection(Section):
    max_new_tokens: int = key(90, "longest completion, in tokens; shorter ones end with an end token", ge=1)
    temperature: float = key(1.0, "divides the logits, in sampling and in every log-probability of the objective", gt=0)


class RLTrainingSection(OptimisationSection):
    """Sequences are completions here."""

    steps: int | None = key(None, "optimizer batches; give exactly one of steps, words", ge=1)
    words: WordCount | None = key(None, "words generated to learn from (the step that reaches the budget is the last)")
    lr: float = key(1e-6, "peak learning rate", gt=0, le=10)
    schedule: Literal["cosine", "linear", "constant"] = key("constant", "over the budget, after the warm-up; cosine and linear end at 0")
    warmup_steps: int = key(0, "steps of linear warm-up", ge=0)
    weight_decay: float = key(0.0, "AdamW, on matrices only (not on biases and norms)", ge=0)
    precision: Literal["fp32", "bf16"] = key("fp32", "autocast type of sampling, forward and backward; weights stay fp32")


class KLSection(Section):
    """What keeps the policy near the model it started from."""

    where: Literal["reward", "loss"] = key("reward", "reward: taken off every token's reward; loss: a term of the loss")
    coefficient: float = key(0.05, "nats of KL against units of reward; 0 lets go of the reference", ge=0)
    control: Literal["fixed", "adaptive"] = key("fixed", "adaptive steers the coefficient until KL is at `target`")
    target: float = key(0.05, "with control: adaptive - KL(policy || reference) in nats per token", gt=0)
    horizon: int = key(10_000, "with control: adaptive - completions in which the coefficient changes by a fifth at most", ge=1)

    @model_validator(mode="after")
    def something_to_adapt(self) -> "KLSection":
        if self.control == "adaptive" and not self.coefficient:
            raise ValueError("control: adaptive multiplies the coefficient, and coefficient is 0: start it above 0")
        return self


class PPOSection(Section):
    value: Literal["head", "model"] = key("head", "head: a linear layer on the policy's last states; model: a network of its own")
    value_lr: float | None = key(None, "learning rate of the value head (and value model); default: training.lr", gt=0, le=10)
    value_coefficient: float = key(0.5, "weight of the value loss", ge=0)
    value_clip: float | None = key(0.2, "largest change of a value that is rewarded; null: not clipped", gt=0)
    clip: float = key(0.2, "the ratio of new to old probability counts within 1 +- this", gt=0, lt=1)
    gamma: float = key(1.0, "discount per token", ge=0, le=1)
    gae_lambda: float = key(0.95, "GAE: 0 trusts the values, 1 the returns", ge=0, le=1)
    epochs: int = key(4, "passes over every batch of completions", ge=1)
    minibatches: int = key(1, "optimizer steps per pass", ge=1)
    whiten: bool = key(True, "standardise advantages over the tokens of the batch")
    entropy_coefficient: float = key(0.0, "weight of the entropy bonus, in nats per token", ge=0)
    kl: KLSection = key(KLSection(), "distance from the reference")


class GRPOSection(Section):
    group: int = key(4, "completions per prompt, which are compared with each other", ge=2)
    beta: float = key(0.04, "weight of KL to the reference, in the loss", ge=0)
    clip: float = key(0.2, "the ratio of new to old probability counts within 1 +- this", gt=0, lt=1)
    epochs: int = key(1, "optimizer steps on every batch of completions", ge=1)


class RLOOSection(Section):
    group: int = key(4, "completions per prompt; each one's baseline is the mean of the others", ge=2)
    beta: float = key(0.05, "weight of KL to the reference, in the reward", ge=0)
    clip: float = key(0.2, "the ratio of new to old probability counts within 1 +- this", gt=0, lt=1)
    epochs: int = key(1, "optimizer steps on every batch of completions", ge=1)


class DPOSection(Section):
    """Online: every round samples two completions per prompt from the present policy and learns from the better one."""

    beta: float = key(0.1, "how far preferences may move the policy from the reference", gt=0)
    prompts_per_round: int = key(128, "prompts sampled, two completions each, before each round of training", ge=1)
    epochs: int = key(1, "passes over the pairs of a round", ge=1)
    reference: Literal["start", "round"] = key("start", "start: the model the run began with; round: the policy before the round")


class RLLoggingSection(Section):
    logging_steps: int = key(10, "steps between log lines", identity=False, ge=1)
    eval_steps: int = key(100, "steps between validations; there is one before the first step and one at the end", ge=1)
    eval_prompts: int = key(64, "completions that a validation samples, always with the same noise, and scores; not learned from", ge=0)
    samples: int = key(4, "completions that every log line and validation writes to run/samples.jsonl", identity=False, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = key([], "experiment trackers to report to", identity=False)


class RLConfig(RunConfig):
    """Stage 6, `ppo.py`."""

    algorithm: Literal["ppo", "grpo", "rloo", "dpo"] = key("ppo", "how it learns")
    data: RLDataSection = key(RLDataSection(), "what is read")
    model: RLModelSection = key(..., "what is trained")
    prompts: PromptsSection = key(PromptsSection(), "what is completed")
    generation: GenerationSection = key(GenerationSection(), "how it is completed")
    rewards: list[RewardEntry] = key(..., "what a completion earns: the weighted sum of these", min_length=1)
    training: RLTrainingSection = key(..., "how it is trained")
    ppo: PPOSection = key(PPOSection(), "with algorithm: ppo")
    grpo: GRPOSection = key(GRPOSection(), "with algorithm: grpo")
    rloo: RLOOSection = key(RLOOSection(), "with algorithm: rloo")
    dpo: DPOSection = key(DPOSection(), "with algorithm: dpo")
    logging: RLLoggingSection = key(RLLoggingSection(), "what is reported")

    @model_validator(mode="after")
    def fits_together(self) -> "RLConfig":
        problems = []
        size = self.training.batch_size
        if self.algorithm == "ppo" and size % self.ppo.minibatches:
            problems.append(f"training.batch_size {size} is not a multiple of ppo.minibatches {self.ppo.minibatches}")
        if self.algorithm in ("grpo", "rloo") and size % (group := getattr(self, self.algorithm).group):
            problems.append(f"training.batch_size {size} is not a multiple of {self.algorithm}.group {group}")
        if given := [name for name in ("ppo", "grpo", "rloo", "dpo") if name != self.algorithm and name in self.model_fields_set]:
            problems.append(f"section {given[0]} is given, but algorithm is {self.algorithm}: remove the one or change the other")
        if self.checkpoints.final == "best":
            problems.append("checkpoints.final: best goes by validation CE, which learning from rewards does not lower: use last")
        if not any(entry.weight for entry in self.rewards):
            problems.append("all rewards have weight 0: nothing would be learned")
        if problems:
            raise ValueError("; ".join(problems))
        return self


# ---- The scripts ----------------------------------------------------------------------------------------------------

STAGES: dict[str, type[StageConfig]] = {
    "combine_babylm.py": CorpusConfig, "train_teacher.py": TeacherConfig, "train_baseline.py": BaselineConfig,
    "train_student.py": StudentConfig, "train_moep_student.py": MoEPStudentConfig, "ppo.py": RLConfig}
