"""A models folder of small run folders with random weights, as the stages write them: what test_generation and test_chat talk to."""

import json
import shutil

import torch

from babylm import models
from babylm.config import ModelSection, MoEPModelSection
from babylm.run_folder import seal

SECTIONS = {
    "gpt2": ModelSection(layers=2, width=24, heads=2, max_positions=64),
    "llama": ModelSection(architecture="llama", layers=2, width=32, heads=2, max_positions=64),
    "moep": MoEPModelSection(layers=4, width=32, heads=2, parallel_width=16, parallel_heads=2, max_positions=64),
}
TEMPLATE = ("{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
            "{{ bos_token }}assistant:")


def make_run(folder, kind, tokenizer, milestones=(), template=None):
    """A run folder: the model at its root (with strong random weights, so that it has opinions), milestones with other weights."""
    for number, name in enumerate(["", *milestones]):
        place = folder / name
        place.mkdir(parents=True)
        model = models.build_model(SECTIONS[kind], tokenizer, seed=number + len(kind))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        models.save_model(model, tokenizer, place)
        if template:
            (place / "chat_template.jinja").write_text(template, encoding="utf-8")
        if name:
            seal(place)
    (folder / "run").mkdir()
    (folder / "run" / "record.json").write_text(json.dumps({"stage": "train_student.py", "name": folder.name}), encoding="utf-8")
    return folder


def make_models_folder(root, tokenizer):
    """root/{gpt2 (with milestones), group/{llama, moep}, tuned (with a chat template), damaged}, and what is no run."""
    make_run(root / "gpt2", "gpt2", tokenizer, milestones=["chck_2K", "chck_10K", "chck_1M"])
    make_run(root / "group" / "llama", "llama", tokenizer)
    make_run(root / "group" / "moep", "moep", tokenizer)
    make_run(root / "tuned", "gpt2", tokenizer, template=TEMPLATE)
    make_run(root / "damaged", "gpt2", tokenizer)
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (root / "gpt2" / "chck_3K").mkdir()  # being written
    shutil.copytree(root / "gpt2" / "chck_2K", root / "gpt2" / "checkpoint-7")
    shutil.copytree(root / "gpt2" / "chck_2K", root / ".hidden")
    (root / "empty").mkdir()
    return root
