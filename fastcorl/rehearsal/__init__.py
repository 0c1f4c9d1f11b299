"""Everything that configs/janus_pro_1b asks for, small and without downloads: `python -m fastcorl.rehearsal`.

Files are in the published formats and sizes that matter to the code are Janus-Pro's: 384-pixel images of 24 x 24 codes,
576 image features, a codebook of 16,384. Weights are random. Like the quickstart it is a user; nothing imports it.
"""
