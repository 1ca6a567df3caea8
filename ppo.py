"""Stage 6: improve a student by what its own writing earns: PPO, GRPO, RLOO or online DPO.

Reads    model.path (a finished student), prompts (by default openings of <data.corpus>'s validation documents), rewards
Writes   models/<name>/ : the final model, milestones chck_<N> by words *generated*, run/ (config, metrics.jsonl, samples.jsonl, ...)
Command  python ppo.py --config configs/demo/ppo.yaml
         python ppo.py --config configs/10M/grpo.yaml
Expect   demo: about a minute on two CPU cores. The same command resumes a run that was stopped.

Every run starts and ends with a validation: cross-entropy on held-out text, and reward and KL of completions that were not learned from.
"""

from babylm import models, training
from babylm.config import RLConfig
from babylm.run_folder import run_stage
from babylm.schema import load
from interactive import reward, rl_run


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, _ = load(RLConfig, "configs/10M/ppo.yaml", __doc__, flags=training.RUN_FLAGS)
    device = training.start_process(config)

    # ---- 2. Open the run folder -------------------------------------------------------------------------------------
    inputs = rl_run.load_inputs(config)
    folder = rl_run.open_run(config, inputs)
    if folder is None:
        return

    # ---- 3. Load the data -------------------------------------------------------------------------------------------
    val = rl_run.load_validation(config, inputs)

    # ---- 4. Build the models ----------------------------------------------------------------------------------------
    policy = models.load_causal_lm(config.model.path).to(device)
    reference = models.load_causal_lm(config.model.path).to(device).requires_grad_(False).eval()
    longest = 1 + inputs.prompts.longest + config.generation.max_new_tokens
    rewards = reward.build_rewards(config.rewards, inputs.tokenizer, reference, device, config.seed, folder.keep("judge"), longest)

    # ---- 5. Train and save ------------------------------------------------------------------------------------------
    run = rl_run.RLRun(config, folder, inputs, val, reference, rewards, device)
    if config.algorithm == "ppo":
        from interactive.ppotrainer import PPOTrainer

        PPOTrainer(config, run, policy).train()
    else:
        from interactive import trltrainer  # here, because it needs trl

        trltrainer.train(config, run, policy)


if __name__ == "__main__":
    run_stage(main)
