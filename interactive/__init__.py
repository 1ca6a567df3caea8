"""Stage 6 and what comes after training: rewards, prompts, reinforcement learning, a conversation."""
