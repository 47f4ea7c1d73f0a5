"""Reinforcement learning by rule: policy losses, rollouts on the device, and the trainer that joins them."""
