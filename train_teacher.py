"""Stage 2: make a teacher: fine-tune a pretrained model (in full, with LoRA or with 4-bit QLoRA), or train one from scratch.

Reads    <data.corpus>/ (stage 1), model.path (a folder or hub name) unless model.init is random
Writes   models/<name>/ : the final model (adapters merged into it, or as an adapter), milestones chck_<N>M/, run/
Command  python train_teacher.py --config configs/demo/teacher.yaml
         python train_teacher.py --config configs/10M/teacher.yaml --use_lora
         torchrun --nproc_per_node 4 train_teacher.py --config configs/10M/teacher.yaml
Expect   demo: about two minutes on two CPU cores. The same command resumes a run that was stopped.
"""

from babylm import models, training
from babylm.config import TeacherConfig
from babylm.distillation import Distiller
from babylm.run_folder import run_stage
from babylm.schema import load


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, _ = load(TeacherConfig, "configs/10M/teacher.yaml", __doc__, flags={
        **training.RUN_FLAGS,
        "--use_lora": {"action": "store_true", "key": "lora.mode", "value": "lora", "help": "train adapters only"},
        "--use_qlora": {"action": "store_true", "key": "lora.mode", "value": "qlora", "help": "adapters on a 4-bit base"}})
    models.require_adapter_packages(config.lora.mode)
    device = training.start_process(config)

    # ---- 2. Open the run folder -------------------------------------------------------------------------------------
    folder = training.open_run(config, "train_teacher.py")
    if folder is None:
        return

    # ---- 3. Load the data -------------------------------------------------------------------------------------------
    data = training.load_data(config)

    # ---- 4. Build the models ----------------------------------------------------------------------------------------
    if config.lora.mode == "none":
        model = models.build_model(config.model, data.tokenizer, config.seed)
    else:
        model = models.build_adapted_model(config.model, config.lora, config.training, data.tokenizer, config.seed)
    distiller = Distiller(model, compiled=config.training.compile)

    # ---- 5. Train and save ------------------------------------------------------------------------------------------
    training.train(config, folder, data, distiller, device)


if __name__ == "__main__":
    run_stage(main)
