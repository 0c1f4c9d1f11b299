"""Which device a rank takes, and what keeps it from joining the others."""

import socket

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.runtime import distributed


def test_more_ranks_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="GPUs for 1 of 2 ranks: .* CUDA_VISIBLE_DEVICES="):
        distributed.start(threads=1, process_group=False)


def test_a_port_that_another_run_holds_is_told(monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"port {port} of this machine is taken.*--master_port"):
            distributed.start(threads=1, process_group=True)
