"""Stage 4: distil a teacher into a student: w_ce * CE + w_kl * T^2 * KL(teacher || student), means over tokens.

Reads    <data.corpus>/ (stage 1), distillation.teacher (a finished run of stage 2)
Writes   models/<name>/ : the final model, milestones chck_<N>M/, run/ (config, metrics.jsonl, record, status)
Command  python train_student.py --config configs/demo/student.yaml
         torchrun --nproc_per_node 4 train_student.py --config configs/10M/student.yaml
Expect   demo: about a minute on two CPU cores. The same command resumes a run that was stopped.

With the same data, seed, steps and student as a baseline of stage 3, the student starts from the same weights and sees
the same blocks in the same order: the two differ in the loss alone.
"""

from babylm import models, teacher_cache, training
from babylm.config import StudentConfig
from babylm.distillation import Distiller
from babylm.run_folder import run_stage
from babylm.schema import load


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, _ = load(StudentConfig, "configs/10M/student.yaml", __doc__, flags=training.RUN_FLAGS)
    device = training.start_process(config)

    # ---- 2. Open the run folder -------------------------------------------------------------------------------------
    folder = training.open_run(config, "train_student.py", teachers=[entry.path for entry in config.distillation.entries])
    if folder is None:
        return

    # ---- 3. Load the data -------------------------------------------------------------------------------------------
    data = training.load_data(config)

    # ---- 4. Build the models ----------------------------------------------------------------------------------------
    teachers = teacher_cache.open_teachers(config, data)
    student = models.build_model(config.model, data.tokenizer, config.seed)
    distiller = Distiller(student, teachers, config.distillation, compiled=config.training.compile)

    # ---- 5. Train and save ------------------------------------------------------------------------------------------
    training.train(config, folder, data, distiller, device)


if __name__ == "__main__":
    run_stage(main)
