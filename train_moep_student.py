"""Stage 5: train a mixture-of-experts student, MoE-P, on the text alone or with teachers.

Reads    <data.corpus>/ (stage 1), distillation.teacher or .teachers (finished runs of stage 2; none with w_kl: 0)
Writes   models/<name>/ : the final model with modeling_moep.py inside, milestones chck_<N>M/, run/
Command  python train_moep_student.py --config configs/demo/moep.yaml
         torchrun --nproc_per_node 4 train_moep_student.py --config configs/10M/moep.yaml
Expect   demo: about a minute on two CPU cores. The same command resumes a run that was stopped.

The loss is that of stage 4 plus w_balance * the load-balancing loss of the routers, which is logged apart and never part of
the reported cross-entropy. Load the result anywhere with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).
"""

from babylm import models, teacher_cache, training
from babylm.config import MoEPStudentConfig
from babylm.distillation import Distiller
from babylm.run_folder import run_stage
from babylm.schema import load


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, _ = load(MoEPStudentConfig, "configs/10M/moep.yaml", __doc__, flags=training.RUN_FLAGS)
    device = training.start_process(config)

    # ---- 2. Open the run folder -------------------------------------------------------------------------------------
    folder = training.open_run(config, "train_moep_student.py", teachers=[entry.path for entry in config.distillation.entries])
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
