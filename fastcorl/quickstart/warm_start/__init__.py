"""Makes the quickstart's starting point: tokenizer, VQ model, half-trained Janus and captioner.

Run once with `python -m fastcorl.quickstart.warm_start`; the result is shipped in `fastcorl/quickstart/weights/`.
"""
