"""kill -9 while checkpoints are saved, at every point of a save and at random times; prints one line of JSON.

    python tests/faults/kill_checkpoints.py [--kills 100]

A child saves small files as a run saves its state. After each kill every checkpoint in place must be whole and the
newest hold, to the byte, what was saved last, or what was being saved: it fails at the first kill where this is not so.
The next child goes on in the same folder.
"""

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fastcorl.runtime.checkpoints import Checkpoints, Position
from fastcorl.runtime.durable import remove_temporary

FILES = ("state.bin", "deepspeed/rank0.bin")
KEEP = 2
AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def content(step: int, name: str) -> bytes:
    return f"{step} {name} ".encode() * 3000


def save(folder: Path, step: int, half_way: Callable[[str], None] = lambda _: None) -> None:
    def write(temporary: Path) -> None:
        for name in FILES:
            data = content(step, name)
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                half_way("write")
                file.write(data[len(data) // 2 :])

    position = Position("unified", step, step, 1, "plain", 0)
    problem = Checkpoints(folder, "").save(position, write, lambda told: [told], main=True, keep=KEEP)
    assert problem is None, problem


def die_at(number: int, folder: Path, report: int) -> Callable[[str], None]:
    """Makes every system call that changes `folder` a point, tells each by its name, and dies at the given one."""
    reached = 0

    def point(name: str) -> None:
        nonlocal reached
        reached += 1
        if reached == number:
            os.write(report, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in AUDITED and str(arguments[0]).startswith(str(folder)):
            point(event)

    def fsync(descriptor: int) -> None:
        point("os.fsync")
        real_fsync(descriptor)

    def write_text(path: Path, text: str, **options: str) -> None:
        with path.open("w", **options) as file:
            file.write(text[: len(text) // 2])
            file.flush()
            point("write")
            file.write(text[len(text) // 2 :])

    real_fsync, os.fsync, Path.write_text = os.fsync, fsync, write_text
    sys.addaudithook(audit)
    return point


def read_back(folder: Path, least: int) -> int:
    """The step a run would go on from; it must be whole, hold what was saved and be at least `least`."""
    found, lines = Checkpoints(folder, "").find("auto")
    assert found is not None and not lines, (least, lines)
    step = found.position.step
    assert all((found.folder / name).read_bytes() == content(step, name) for name in FILES), step
    assert step >= least, (step, least)
    return step


def at_every_point(folder: Path) -> Counter[str]:
    """Kill at the first point of a save, the second, .. until one lives to its end; the points by name."""
    points: Counter[str] = Counter()
    step = 1
    save(folder, step)
    while True:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save(folder, step + 1, die_at(points.total() + 1, folder, writing))
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        name = os.read(reading, 100).decode()
        os.close(reading)
        survived = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        step = read_back(folder, step + survived)
        if survived:
            return points
        assert os.WIFSIGNALED(status), status
        points[name] += 1
        remove_temporary(folder)
        assert all(path.name == "latest" or path.name.startswith("step-") for path in folder.iterdir())


def at_random_times(folder: Path, kills: int, seed: int) -> int:
    """Kill a child that saves on and on; the number of kills that came in the middle of a save."""
    clock, inside, last = random.Random(seed), 0, 0
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            step = last
            while True:
                step += 1
                save(folder, step)
                os.write(writing, struct.pack("q", step))
        os.close(writing)
        time.sleep(clock.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = os.read(reading, 1 << 16)
        os.close(reading)
        done = struct.unpack("q", told[-8:])[0] if told else last
        inside += any(folder.glob("tmp-*"))
        if done or any(folder.glob("step-*")):
            last = read_back(folder, done)
        assert last in (done, done + 1), (last, done)
        remove_temporary(folder)
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills at random times")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        points = at_every_point(Path(first))
        inside = at_random_times(Path(second), arguments.kills, arguments.seed)
    figures = {
        "points": points.total(),
        "by_call": dict(points),
        "random_kills": arguments.kills,
        "inside_a_save": inside,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
