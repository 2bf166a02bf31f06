"""SFT, reward modelling, DPO, PPO and GRPO as `Method`s."""
