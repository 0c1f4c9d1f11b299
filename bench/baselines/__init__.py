"""A plain trainer on transformers, as the public CoRL code (mm-vl/ULM-R1) does a step: what a step is compared with.

It shares with fastcorl the records, the reward functions and the maths, and no way of running the model.
"""
