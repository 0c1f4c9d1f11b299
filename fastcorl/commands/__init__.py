"""What the `fastcorl` console script runs, a command per file. Torch is imported when one runs, not before."""
