"""Stage 3: train a student-sized model on the text alone (cross-entropy): the control that a distilled student must beat.

Reads    <data.corpus>/ (stage 1)
Writes   models/<name>/ : the final model, milestones chck_<N>M/, run/ (config, metrics.jsonl, record, status)
Command  python train_baseline.py --config configs/demo/baseline.yaml
         torchrun --nproc_per_node 4 train_baseline.py --config configs/10M/baseline.yaml
Expect   demo: under a minute on two CPU cores. The same command resumes a run that was stopped.
"""

from babylm import models, training
from babylm.config import BaselineConfig
from babylm.distillation import Distiller
from babylm.run_folder import run_stage
from babylm.schema import load


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, _ = load(BaselineConfig, "configs/10M/baseline.yaml", __doc__, flags=training.RUN_FLAGS)
    device = training.start_process(config)

    # ---- 2. Open the run folder -------------------------------------------------------------------------------------
    folder = training.open_run(config, "train_baseline.py")
    if folder is None:
        return

    # ---- 3. Load the data -------------------------------------------------------------------------------------------
    data = training.load_data(config)

    # ---- 4. Build the models ----------------------------------------------------------------------------------------
    student = models.build_model(config.model, data.tokenizer, config.seed)
    distiller = Distiller(student, compiled=config.training.compile)

    # ---- 5. Train and save ------------------------------------------------------------------------------------------
    training.train(config, folder, data, distiller, device)


if __name__ == "__main__":
    run_stage(main)
