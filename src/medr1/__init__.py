"""Med-R1: reinforcement learning with verifiable rewards for medical vision-language models."""
