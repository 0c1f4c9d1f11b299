"""Rewards of a user that fail in every way; `count_reward_faults.py` trains with each."""

import os
import resource
import signal
import sys
import threading
import time


def fine(rollout):
    return [float(row % 2) for row in range(rollout.num_rows)]


def raises(rollout):
    raise RuntimeError("no judge today")


def exits(rollout):
    sys.exit(3)


def hangs(rollout):
    time.sleep(600)


def spins(rollout):
    return pow(7, 10**10)  # one bytecode: no signal handler of Python's ever runs


def is_killed(rollout):
    os.kill(os.getpid(), signal.SIGKILL)


def exits_at_once(rollout):
    os._exit(5)


def aborts(rollout):
    os.abort()


def crashes(rollout):
    import ctypes

    ctypes.string_at(0)


def lacks_memory(rollout):
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    return [len(bytearray(2**34))] * rollout.num_rows


def hangs_in_a_thread(rollout):
    threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep(600)


def nothing_finite(rollout):
    return [float("nan")] * rollout.num_rows


def infinite(rollout):
    return [float("inf")] * rollout.num_rows


def none_for_all(rollout):
    return [None] * rollout.num_rows


def nothing(rollout):
    return None


def too_few(rollout):
    return [1.0] * (rollout.num_rows - 1)


def too_many(rollout):
    return [1.0] * (rollout.num_rows + 1)


def words(rollout):
    return ["good"] * rollout.num_rows


def a_number(rollout):
    return 1.0


def now_and_then(rollout, calls=[]):  # noqa: B006, a count of this process's calls
    calls.append(None)
    if len(calls) == 2:
        raise RuntimeError("only this once")
    return fine(rollout)


def closes_all_files(rollout):
    os.closerange(0, 1024)
    return fine(rollout)
