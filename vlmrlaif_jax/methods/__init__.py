"""SFT, reward modelling, DPO, PPO, GRPO and pretraining as `Method`s."""
