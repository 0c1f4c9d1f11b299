"""Reward functions as users write them, good and bad; run by worker processes, which find this folder on the path."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch


def first_pixel(rollout):
    return rollout.images.pixels[:, 0, 0, 0]


def answer_length(rollout):
    return [float(len(answer)) for answer in rollout.texts.answers]


def surroundings(rollout):
    """Four facts about the process, all 1 where they are as they should be."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    return [
        float(torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"),
        float(not launcher & set(os.environ)),
        float(os.environ["CUDA_VISIBLE_DEVICES"] == ""),
        float(not {"transformers", "fastcorl.rewards", "fastcorl.config"} & set(sys.modules)),
    ]


def sleeps(rollout):
    time.sleep(2)
    return [1.0] * rollout.num_rows


def sleeps_too(rollout):
    return sleeps(rollout)


def fails(rollout):
    raise RuntimeError("no judge today")


def hangs_with_a_child(rollout):
    """Leaves its own and its child's number in the file that the first caption names."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(rollout.prompts[0].caption, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def brighter(rollout, pairs):
    """1, 0 or one half by the first pixel; pairs with row 1 are not judged."""
    pixels = rollout.images.pixels[:, 0, 0, 0]
    return [None if 1 in pair else float((pixels[pair[0]] - pixels[pair[1]]).sign() + 1) / 2 for pair in pairs]


def over_sure(rollout, pairs):
    return [1.5] * len(pairs)


def _raise(rollout):
    values = [1.0] * rollout.num_rows
    return values[rollout.num_rows]  # the place that the log shows


def _deep(rollout):
    return np.zeros(3).reshape(2, 2)


def _segmentation_fault(rollout):
    ctypes.string_at(0)


def _print(rollout):
    print("from the reward", flush=True)
    os.system("echo from its child")
    return [sys.stdin.read() == ""] * rollout.num_rows


BEHAVIOURS = {
    "list": lambda r: [1, 0.5, None, True],
    "tensor": lambda r: torch.arange(4, dtype=torch.bfloat16, requires_grad=False),
    "grad": lambda r: torch.ones(4, requires_grad=True) * 2,
    "array": lambda r: np.array([1, 2, 3, 4], np.int8),
    "scalars": lambda r: (np.float32(1), np.bool_(True), torch.tensor(2.0), np.int64(3)),
    "generator": lambda r: (row / 2 for row in range(4)),
    "infinite": lambda r: [float("inf"), -float("inf"), 1e300, float("nan")],
    "raise": _raise,
    "deep": _deep,
    "exit": lambda r: sys.exit(3),
    "interrupt": lambda r: signal.raise_signal(signal.SIGINT),
    "none": lambda r: None,
    "short": lambda r: [1.0] * 3,
    "long": lambda r: torch.ones(5),
    "column": lambda r: torch.ones(4, 1),
    "number": lambda r: 1.0,
    "text": lambda r: "1234",
    "texts": lambda r: ["1", "2", "3", "4"],
    "mapping": lambda r: {row: 1.0 for row in range(4)},
    "complex": lambda r: [1j] * 4,
    "huge": lambda r: [10**400] * 4,
    "print": _print,
    "hang": lambda r: time.sleep(600),
    "spin": lambda r: pow(7, 10**10),  # one bytecode: no signal handler of Python's ever runs
    "os_exit": lambda r: os._exit(5),
    "kill": lambda r: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": _segmentation_fault,
    "group": lambda r: os.killpg(0, signal.SIGKILL),
}


def by_caption(rollout):
    """What the first prompt's caption asks for."""
    return BEHAVIOURS[rollout.prompts[0].caption](rollout)
