"""A fault of one of two ranks, on a small module: nothing is applied on either, and nobody waits."""

import json
import math
import subprocess
import sys

import pytest
import torch

from fastcorl.runtime.distributed import Distributed
from tests.faults.two_ranks import FAULTS, refusals
from tests.loop.launching import REPOSITORY, environment

ALONE = Distributed(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "tests/faults/two_ranks.py", str(tmp_path_factory.mktemp("ranks"))],
        cwd=REPOSITORY,
        env=environment() | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"},
        text=True,
        capture_output=True,
        timeout=400,  # the first time DeepSpeed compiles its collectives
        check=False,
    )
    lines = [json.loads(line.removeprefix("CASE ")) for line in result.stdout.splitlines() if line.startswith("CASE ")]
    assert lines, result.stdout + result.stderr
    return {line["case"]: line for line in lines}


def check_refused(norms, same):
    assert len(norms) == len(FAULTS)
    assert not any(math.isfinite(norm) for norm in norms)
    assert all(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_applies_nothing_that_is_not_finite(dtype, monkeypatch):
    monkeypatch.setitem(FAULTS, "loss nan on one rank", ("loss", [0], math.nan))
    monkeypatch.setitem(FAULTS, "gradient nan on one rank", ("gradient", [0], math.nan))
    told = refusals(0, dtype, ALONE)
    check_refused(told["norms"][0], told["same"][0])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_two_ranks_apply_nothing_that_is_not_finite_on_one(cases, zero_stage, dtype):
    case = cases[f"{dtype} ZeRO {zero_stage}"]
    for norms, same in zip(case["norms"], case["same"], strict=True):
        check_refused(norms, same)
    assert len(case["norms"]) == 2


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_full_disk_of_one_rank_is_known_to_both(cases, zero_stage):
    case = cases[f"full disk ZeRO {zero_stage}"]
    first, second = case["problems"]
    assert first == second == [None, "[Errno 28] No space left on device", None]
    assert case["left"] == ["latest", "step-1", "step-3"]


def test_a_rank_that_is_silent_is_given_up(cases):
    assert cases["silence"]["error"]
    assert 2 < cases["silence"]["seconds"] < 8
