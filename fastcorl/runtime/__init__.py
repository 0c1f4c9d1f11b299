"""What a run stands on: ranks, training engines, checkpoints, telemetry, samples and reports."""
