"""Build, load and save models and tokenizers; adapters; what the hardware can do; whose vocabularies agree.

A saved model folder is what the official evaluation expects: safetensors in fp32, a config that says outright whether
embeddings are tied, and a fast tokenizer that prepends the start token by itself and loads in transformers 4.51 and 5.
"""

import copy
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from babylm import parallel
from babylm.config import LoraSection, ModelSection, MoEPModelSection, TrainingSection
from babylm.schema import UserError, content_hash
from custom_dataset import file_sha256, tokenizer_fingerprint
from modeling_moep import MoEPConfig, MoEPForCausalLM

if TYPE_CHECKING:
    from peft import PeftModel

PAD, START, END = "<pad>", "<s>", "</s>"  # special tokens of tokenizers trained here: ids 0, 1, 2


transformers.AutoConfig.register("moep", MoEPConfig)  # so that a MoE-P folder's tokenizer loads without its code, and no warning
AutoModelForCausalLM.register(MoEPConfig, MoEPForCausalLM)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns, on import, of an optional kernel package
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()  # a log file is no place for moving bars


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; every entry, special tokens included, lies below `vocab_size`.

    Deterministic: the same texts give the same tokenizer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[PAD, START, END],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=PAD)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a folder or on the hub. UserError if there is none, or if it is empty or slow."""
    if not Path(path).exists() and (str(path).count("/") > 1 or str(path).startswith(("models/", "/", "."))):
        # Said here because the hub, asked for such a name, is tried for a minute.
        raise UserError(f"no tokenizer at {path}: it does not exist, nor is it a name on the hub; check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {path}: {_first_line(error)}; give a folder with tokenizer.json (or vocab.json "
                        "and merges.txt), or a hub name that this machine can reach") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"the tokenizer at {path} has no fast (Rust) implementation, which the token store needs")
    if len(tokenizer) < 257 or not tokenizer("a", add_special_tokens=False).input_ids:
        raise UserError(f"the tokenizer at {path} is empty ({len(tokenizer)} entries): its files did not load")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int = 1024) -> None:
    """Write tokenizer.json and tokenizer_config.json as the official evaluation needs them.

    The saved tokenizer prepends the start token itself (the evaluation adds none, and without it a sentence's first word
    is never scored), separates pairs, names a class that every transformers version knows, and pads with its own pad
    token, or with the end token where the vocabulary has no other (GPT-2: it stays at 50,257 entries).
    """
    start = tokenizer.bos_token or tokenizer.eos_token
    end = tokenizer.eos_token or start
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {end} $B",
        special_tokens=[(token, backend.token_to_id(token)) for token in {start, end}])
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end,
                "pad_token": tokenizer.pad_token or end, "model_max_length": max_length, "padding_side": "right",
                "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def require_same_vocabulary(path: str, tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    """Refuse a model (teacher, or base to fine-tune) whose tokenizer does not give the ids that the data holds.

    Compared by content, because two vocabularies of equal size can mean different words by every id.
    """
    theirs = load_tokenizer(path)
    if tokenizer_fingerprint(theirs) == tokenizer_fingerprint(tokenizer):
        return
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    shared = sum(other.get(token) == index for token, index in ours.items())
    raise UserError(f"the {role} {path} has another vocabulary than the data: {len(other):,} entries against {len(ours):,}, "
                    f"{shared:,} with the same id. Tokenise the corpus with the {role}'s tokenizer (stage 1: "
                    f"tokenizer.path={path}), or take a {role} trained on this one")


# ---- Models ---------------------------------------------------------------------------------------------------------


def build_model(section: ModelSection | MoEPModelSection, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A causal language model: random weights drawn from `seed` (set here, before the first weight), or pretrained ones.

    Raises:
        UserError: pretrained weights are missing, of another architecture, or made with another tokenizer than `tokenizer`.
    """
    torch.manual_seed(seed)
    if section.init == "pretrained":
        require_same_vocabulary(section.path, tokenizer, "pretrained model")
        model = load_causal_lm(section.path)
        if section.architecture == "moep" and model.config.model_type != "moep":
            raise UserError(f"model.path: {section.path} holds a {model.config.model_type}, not a MoE-P model: train it in stage 4")
        return model
    config = model_config(section, tokenizer)
    return MoEPForCausalLM(config) if section.architecture == "moep" else AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def model_config(section: ModelSection | MoEPModelSection, tokenizer: PreTrainedTokenizerFast) -> transformers.PretrainedConfig:
    """The transformers config of a random-init model: GPT-2, Llama, GPT-J or MoE-P."""
    shared = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
              "tie_word_embeddings": section.architecture == "gpt2" if section.tied is None else section.tied}
    if section.architecture == "moep":
        return MoEPConfig(hidden_size=section.width, num_attention_heads=section.heads, intermediate_size=section.ffn,
                          num_hidden_layers=section.layers, parallel_hidden_size=section.parallel_width,
                          parallel_attention_heads=section.parallel_heads, parallel_intermediate_size=section.parallel_ffn,
                          num_experts=section.experts, num_experts_per_tok=section.experts_per_token, hidden_act=section.activation,
                          max_position_embeddings=section.max_positions, sliding_window=section.sliding_window,
                          dropout=section.dropout, attention_dropout=section.dropout, expert_path=section.expert_path, **shared)
    if section.architecture == "llama":
        if shared["pad_token_id"] in (shared["bos_token_id"], shared["eos_token_id"]):
            shared["pad_token_id"] = None  # Llama's embedding never trains the row of its pad token: here, the start token's
        return LlamaConfig(hidden_size=section.width, num_hidden_layers=section.layers, num_attention_heads=section.heads,
                           num_key_value_heads=section.kv_heads or section.heads,
                           intermediate_size=section.ffn or -(-section.width * 8 // 3 // 8) * 8,
                           max_position_embeddings=section.max_positions, attention_dropout=section.dropout, **shared)
    shape = {"n_embd": section.width, "n_layer": section.layers, "n_head": section.heads, "n_inner": section.ffn,
             "n_positions": section.max_positions, "resid_pdrop": section.dropout, "embd_pdrop": section.dropout,
             "attn_pdrop": section.dropout}
    if section.architecture == "gptj":
        return GPTJConfig(rotary_dim=min(64, section.width // section.heads), **shape, **shared)
    return GPT2Config(**shape, **shared)


def load_causal_lm(path: str, **options: object) -> PreTrainedModel:
    """A pretrained causal model from a folder or the hub; in fp32, unless `options` name another dtype.

    A folder is trusted: all code that its config names runs, even where that is another repository's. Code of a hub name is refused,
    and never asked about.
    """
    options = {"dtype": torch.float32, **options}
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=Path(path).exists(), **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model {path}: {_first_line(error)}") from error


def load_config(path: str) -> transformers.PretrainedConfig:
    """The config of a model folder or hub name; of the base, where the folder holds an adapter."""
    if adapter := _adapter_settings(path):
        path = adapter["base_model_name_or_path"]
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=Path(path).exists())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {path}: {_first_line(error)}") from error


def weights_fingerprint(path: str) -> str:
    """A hash of a model folder's weights, of adapter and base where it holds an adapter; a hub name stands for itself."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    own = "-".join(file_sha256(file)[:16] for file in files) or path
    adapter = _adapter_settings(path)
    return f"{own}+{weights_fingerprint(adapter['base_model_name_or_path'])}" if adapter else own


def checkpoint_files(folder: Path) -> list[Path]:
    """What belongs to a checkpoint: the files right in its folder (the run's record and milestones are folders of their own).

    Not the model card, in which results may be entered after they were made.
    """
    return sorted(file for file in folder.iterdir()
                  if file.is_file() and not file.name.startswith(".") and file.name not in ("README.md", "complete.json"))


def checkpoint_fingerprint(folder: Path, weights: bool = True) -> str:
    """A hash of all that a checkpoint's answers follow from: weights (or not), config, code, tokenizer, and an adapter's base."""
    files = [file for file in checkpoint_files(folder) if weights or file.suffix not in (".safetensors", ".bin")]
    return content_hash({file.name: file_sha256(file) for file in files}
                        | ({"base": weights_fingerprint(str(folder))} if _adapter_settings(str(folder)) else {}))


def _adapter_settings(path: str) -> dict | None:
    file = Path(path) / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_teacher(path: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A teacher with the vocabulary of the data, checked before its weights are read; an adapter is merged into its base."""
    require_same_vocabulary(path, tokenizer, "teacher")
    if _adapter_settings(path):
        require_adapter_packages("lora")
        from peft import AutoPeftModelForCausalLM

        try:  # without an answer, transformers would ask at the terminal whether code of the base may run
            teacher = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).merge_and_unload()
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load the teacher {path}: {_first_line(error)}") from error
    else:
        teacher = load_causal_lm(path)
    rows = teacher.get_output_embeddings().weight.shape[0]
    if rows != len(tokenizer):
        raise UserError(f"the teacher {path} predicts {rows} entries but the tokenizer has {len(tokenizer)}: its embedding was "
                        "resized; resize it back or train a teacher on this tokenizer")
    return teacher


def body_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """A causal model's two halves: ids -> last hidden state, and the linear layer that makes logits of it.

    The head is None where it is no plain linear layer (adapted or quantised), or where the logits are not its output alone
    (scaled or capped): then only the whole model computes them. Probed with four tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # what peft wraps
    body, head = base.base_model, base.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft: a head trained in full beside the adapters
        head = head.modules_to_save[head.active_adapter] if isinstance(head.active_adapter, str) else None
    if type(head) is not nn.Linear or body is base:
        return body, None
    with torch.no_grad(), mode(model, training=False):
        ids = torch.arange(4, device=head.weight.device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        whole, halves = model(**inputs).logits, head(body(**inputs).last_hidden_state)
    return body, head if torch.allclose(whole, halves, rtol=1e-4, atol=1e-5) else None


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into `folder` (which exists)."""
    for settings in getattr(model, "peft_config", {}).values():  # an unmerged adapter must find its base from any folder
        if Path(settings.base_model_name_or_path).exists():
            settings.base_model_name_or_path = str(Path(settings.base_model_name_or_path).resolve())
    model.save_pretrained(folder)
    config_path = folder / "config.json"
    if config_path.is_file():  # an unmerged adapter has none
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["tie_word_embeddings"] = bool(model.config.tie_word_embeddings)  # left out, versions read it differently
        config_path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_tokenizer(tokenizer, folder, max_length=getattr(model.config, "max_position_embeddings", 1024))


def state_widths(config: transformers.PretrainedConfig) -> list[int]:
    """Width of each hidden state of a model, from the embeddings to what the head reads; MoE-P's differ."""
    return getattr(config, "hidden_state_sizes", [config.hidden_size] * (config.num_hidden_layers + 1))


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """With a module in training mode, or in that of evaluation; afterwards each of its parts is as it was."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, was_training in before:
            part.training = was_training


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once, 4-bit ones by their number and not by their bytes."""
    return sum(_numel(parameter) for parameter in model.parameters())


def _numel(parameter: nn.Parameter) -> int:
    quantised = getattr(parameter, "quant_state", None)
    return quantised.shape.numel() if quantised is not None else parameter.numel()


def forward_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Multiply-adds of a forward pass, times 2, per token: 2 per weight of every matrix (the head included; embeddings, which
    are looked up, not) and 2*2*T*width per block for attention to all T places (Kaplan et al. 2020, appendix)."""
    if hasattr(model, "forward_flops_per_token"):
        return model.forward_flops_per_token(seq_len)
    head = model.get_output_embeddings().weight
    apart = {id(head), *(id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding))}
    matrices = sum(_numel(p) for p in model.parameters() if p.dim() >= 2 and id(p) not in apart) + head.numel()
    return 2.0 * matrices + _attention_flops(model, seq_len, model.config.num_hidden_layers)


def training_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """FLOPs of a forward and a backward pass, per token.

    To each product of `forward_flops_per_token` comes one of the same size for the gradient of the matrix, where that is trained,
    and one for the gradient of what it is multiplied with, where anything below is trained; attention costs twice as much
    again in a block whose output needs a gradient. Which these are is seen in a forward pass of four tokens, unless all is
    trained (or the model has a count of its own, which knows no frozen parts). What training.gradient_checkpointing computes
    again is not counted: it is no part of what the gradient needs.
    """
    if hasattr(model, "forward_flops_per_token") or all(parameter.requires_grad for parameter in model.parameters()):
        return 3.0 * forward_flops_per_token(model, seq_len)
    products, passes = 0.0, 0

    def count(layer: nn.Module, inputs: tuple, _output: object) -> None:
        nonlocal products
        products += 2.0 * _numel(layer.weight) * (1 + layer.weight.requires_grad + inputs[0].requires_grad)

    def attend(_block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        nonlocal passes
        passes += 3 if (output if isinstance(output, torch.Tensor) else output[0]).requires_grad else 1

    # Only layers whose matrix is their own: an adapter shows that of the layer which it wraps.
    matrices = [layer for layer in model.modules() if getattr(layer._parameters.get("weight"), "ndim", 0) == 2
                and not isinstance(layer, nn.Embedding)]
    hooks = [layer.register_forward_hook(count) for layer in matrices]
    hooks += [block.register_forward_hook(attend) for block in parallel.blocks_of(model)]
    try:
        with torch.enable_grad(), mode(model, training=False):
            ids = torch.arange(4, device=next(model.parameters()).device)[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return products + _attention_flops(model, seq_len, passes)


def _attention_flops(model: nn.Module, seq_len: int, passes: int) -> float:
    return 4.0 * seq_len * model.config.hidden_size * passes


# ---- Hardware -------------------------------------------------------------------------------------------------------


def choose_device(training: TrainingSection) -> torch.device:
    """The device of a run. UserError names what the hardware lacks, before anything is loaded."""
    cuda = torch.cuda.is_available()
    if training.device == "cuda" and not cuda:
        raise UserError("training.device: cuda, but torch sees no CUDA GPU here; use device: auto or cpu")
    on_gpu = cuda and training.device != "cpu"
    if training.precision == "fp16" and not on_gpu:
        raise UserError("training.precision: fp16 needs a CUDA GPU (its gradients are scaled there); on a CPU use bf16 or fp32")
    if training.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"training.precision: bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 or fp32")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def require_adapter_packages(mode: str) -> None:
    """UserError unless the packages that LoRA or QLoRA needs are installed; called before anything is loaded."""
    needed = {"none": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}[mode]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"lora.mode: {mode} needs {' and '.join(missing)}: pip install -r requirements.txt")


# ---- Adapters -------------------------------------------------------------------------------------------------------


def build_adapted_model(section: ModelSection, lora: LoraSection, training: TrainingSection,
                        tokenizer: PreTrainedTokenizerFast, seed: int) -> "PeftModel":
    """Pretrained weights with trainable LoRA matrices (Hu et al. 2021), the base in 4-bit NF4 for QLoRA (Dettmers et al. 2023)."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    require_same_vocabulary(section.path, tokenizer, "pretrained model")
    torch.manual_seed(seed)
    if lora.mode == "qlora":
        base = prepare_model_for_kbit_training(_load_in_4_bits(section.path, training.precision),
                                               use_gradient_checkpointing=training.gradient_checkpointing)
    else:
        base = load_causal_lm(section.path)
    names = {name.split(".")[-1] for name, _ in base.named_modules()}
    if unknown := [name for name in [*lora.targets, *lora.modules_to_save] if name not in names]:
        raise UserError(f"lora: {section.path} has no module named {', '.join(unknown)}; it has {', '.join(sorted(names - {''}))}")
    settings = LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                          target_modules=lora.targets or "all-linear", modules_to_save=lora.modules_to_save or None)
    return get_peft_model(base, settings)


def _load_in_4_bits(path: str, precision: str) -> PreTrainedModel:
    """A base in NF4, as QLoRA has it, that computes in `precision`."""
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    quantisation = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                   bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
    base = load_causal_lm(path, quantization_config=quantisation)
    for module in base.modules():
        # In eval mode on some CPUs (AVX512-BF16), bitsandbytes repacks 4-bit weights for an inference-only kernel: the next
        # training step would have no gradient through them, and merging would misread them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def load_adapted_model(path: Path, mode: str, precision: str) -> "PeftModel":
    """Base and adapter as they were trained together, from the folder of an unmerged adapter: what `merge_adapters` takes.

    Args:
        mode: lora.mode of its run; an adapter of qlora was trained on the base's 4-bit weights, and fits no others.
        precision: training.precision of its run.

    Raises:
        UserError: the packages or the base are missing.
    """
    require_adapter_packages(mode)
    from peft import PeftModel

    base = _adapter_settings(str(path))["base_model_name_or_path"]
    return PeftModel.from_pretrained(_load_in_4_bits(base, precision) if mode == "qlora" else load_causal_lm(base), str(path)).eval()


@torch.no_grad()
def merge_adapters(model: "PeftModel") -> PreTrainedModel:
    """A plain fp32 model on the CPU that computes what base and adapters compute together; `model` is left as it is.

    A 4-bit base is first written out in fp32 and only then merged: merging into 4 bits would round the update away.
    Embeddings that training has made differ from the output head are declared untied, so that no reader re-ties them.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    settings = copy.deepcopy(model.peft_config["default"])
    quantised = {name.removesuffix(".base_layer"): module.weight for name, module in model.get_base_model().named_modules()
                 if hasattr(getattr(module, "weight", None), "quant_state")}
    if quantised:
        from bitsandbytes.functional import dequantize_4bit

        base = load_causal_lm(settings.base_model_name_or_path)
        for name, weight in quantised.items():
            plain = base.get_submodule(name)
            values = dequantize_4bit(weight.data, weight.quant_state).float().cpu()
            # bitsandbytes stores [out, in]; GPT-2's Conv1D stores [in, out]
            plain.weight.copy_(values.T if isinstance(plain, transformers.pytorch_utils.Conv1D) else values)
        merged = get_peft_model(base, settings)
        set_peft_model_state_dict(merged, get_peft_model_state_dict(model))
    else:
        merged = copy.deepcopy(model).to("cpu")
    plain = merged.merge_and_unload().float().eval()
    embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    plain.config.tie_word_embeddings = embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)
    for config in (plain.config, plain.generation_config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return plain


@torch.no_grad()
def largest_logit_difference(first: nn.Module, second: nn.Module, input_ids: torch.Tensor) -> float:
    """Largest |difference| between two models' logits on `input_ids` [B, T], relative to the largest |logit|."""
    outputs = []
    for model in (first, second):
        with mode(model, training=False):
            outputs.append(model(input_ids=input_ids.to(next(model.parameters()).device)).logits.float().cpu())
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp(min=1e-30))


def require_saved_equals(model: PreTrainedModel, folder: Path, input_ids: torch.Tensor) -> None:
    """Load `folder` again and compare logits with the model in memory; RuntimeError if anything was lost or re-tied."""
    saved = load_causal_lm(str(folder)).to(next(model.parameters()).device)
    difference = largest_logit_difference(model, saved, input_ids)
    if not difference < 1e-5:
        raise RuntimeError(f"the model saved in {folder} differs from the one in memory by {difference:.2g} of the largest logit")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
