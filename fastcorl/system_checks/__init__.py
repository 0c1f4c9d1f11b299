"""What of a machine works for training, found without training.

Nothing here imports torch or transformers into this process: what may crash or hang is tried in another one.
"""
