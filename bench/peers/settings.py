"""The settings of the GRPO loss that every provider runs: clip, KL and mean over sequences."""

BETA = 0.04
EPS = 0.2
LOSS_TYPE = "grpo"
