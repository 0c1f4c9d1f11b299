"""The process behind a `RewardWorker`: it imports a user's function once and calls it with rollouts that it is sent.

`worker.py` starts this file as a script, so that nothing else of this package is imported. What is started is a guard
without torch, which forks the process that does the work. The guard reports that process's death, and when the
trainer is gone, however that ended, it ends everything that the user's function may have started.

A message is a list of byte strings: first JSON, then a rollout's or the reply's bytes.
"""

import contextlib
import dataclasses
import json
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastcorl.records import Rollout

GRACE_SECONDS = 1.0  # for the function's own clean-up, once the trainer has closed the pipe
_MAGIC = b"FCRW"
_MOST_PARTS = 100_000


class BadReturn(Exception):
    """A reward function returned something other than one number or None per row."""


def write_message(stream: BinaryIO, parts: Sequence[Any]) -> None:
    """Write buffers to an unbuffered stream."""
    views = [memoryview(part).cast("B") for part in parts]
    header = struct.pack(f"<4sI{len(views)}Q", _MAGIC, len(views), *map(len, views))
    for view in (memoryview(header), *views):
        while view:
            view = view[stream.write(view) :]


def read_message(stream: BinaryIO) -> list[bytearray]:
    """Read one message from an unbuffered stream. EOFError where the stream ends, ValueError where it is garbage."""
    magic, count = struct.unpack("<4sI", _read(stream, 8))
    if magic != _MAGIC or count > _MOST_PARTS:
        raise ValueError("not a message")
    return [_read(stream, size) for size in struct.unpack(f"<{count}Q", _read(stream, 8 * count))]


def _read(stream: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def pack_rollout(rollout: "Rollout") -> list[Any]:
    """A rollout as buffers, without vision features, pixels as bytes (that is to the nearest 1/255): first JSON, then
    the content of each tensor and image."""
    import torch

    images, broken = rollout.images, []
    if images is not None:
        broken = (~images.pixels.flatten(1).sum(dim=1, dtype=torch.float32).isfinite()).nonzero().flatten().tolist()
        images = dataclasses.replace(images, pixels=_to_bytes(images.pixels))
    slim = dataclasses.replace(rollout, images=images, vision_features=None)
    buffers: list[Any] = []
    head = {"rollout": _to_plain(slim, buffers), "broken": broken}
    return [json.dumps(head).encode(), *buffers]


def _to_plain(value: Any, buffers: list[Any]) -> Any:
    """`value` as JSON has it; the content of tensors and images goes to `buffers`."""
    import torch
    from PIL import Image

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        tensor = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous()
        buffers.append(tensor.flatten().numpy().view("uint8"))
        return {"tensor": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if isinstance(value, Image.Image):
        buffers.append(value.tobytes())
        return {"image": value.mode, "size": value.size}
    if isinstance(value, list):
        return [_to_plain(each, buffers) for each in value]
    if dataclasses.is_dataclass(value):
        fields = {each.name: _to_plain(getattr(value, each.name), buffers) for each in dataclasses.fields(value)}
        return {"record": type(value).__name__, "fields": fields}
    return value


def _to_bytes(pixels: "torch.Tensor") -> "torch.Tensor":
    import torch

    result = torch.empty(pixels.shape, dtype=torch.uint8, device=pixels.device)
    # a few rows at a time: on a CPU the temporaries then stay in the cache
    for row, target in zip(pixels.split(2), result.split(2), strict=True):
        target.copy_(row.float().nan_to_num().clamp(0, 1).mul_(255).round_())
    return result


def unpack_rollout(parts: Sequence[bytearray]) -> "Rollout":
    """The rollout of `pack_rollout`, on the CPU: pixels float32 in [0, 1], NaN in rows that were not finite."""
    import torch

    head, buffers = json.loads(bytes(parts[0])), iter(parts[1:])
    rollout = _from_plain(head["rollout"], buffers)
    if rollout.images is not None:
        pixels = rollout.images.pixels.to(torch.float32).div_(255)
        pixels[head["broken"]] = torch.nan
        rollout.images.pixels = pixels
    return rollout


def _from_plain(value: Any, buffers: Iterator[bytearray]) -> Any:
    """The value that `_to_plain` took apart."""
    import torch
    from PIL import Image

    from fastcorl import records

    if isinstance(value, list):
        return [_from_plain(each, buffers) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        content, dtype = next(buffers), getattr(torch, value["tensor"])
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.view(value["shape"])
    if "image" in value:
        return Image.frombytes(value["image"], value["size"], bytes(next(buffers)))
    fields = {name: _from_plain(each, buffers) for name, each in value["fields"].items()}
    return getattr(records, value["record"])(**fields)


def to_floats(values: Any, count: int) -> "np.ndarray":
    """What a reward function returned as (count,) float32, None and infinities as NaN; BadReturn says what is wrong."""
    import numpy as np
    import torch

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().tolist()
    try:
        rows = None if isinstance(values, str | bytes | Mapping | AbstractSet) else list(values)
    except TypeError:
        rows = None
    if rows is None:
        raise BadReturn(f"returned {_kind(values)}, not a sequence of {count} numbers")
    if len(rows) != count:
        raise BadReturn(f"returned {len(rows)} values, {count} were asked for")
    numbers = np.empty(count, np.float64)
    for index, value in enumerate(rows):
        if hasattr(value, "item") and getattr(value, "size", None) != 0 and getattr(value, "shape", None) == ():
            value = value.item()
        if value is not None and not isinstance(value, int | float):
            raise BadReturn(f"returned {_kind(value)} as value {index}, not a number or None")
        numbers[index] = np.nan if value is None else value
    with np.errstate(over="ignore"):
        result = numbers.astype(np.float32)
    result[~np.isfinite(result)] = np.nan
    return result


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def describe(error: BaseException, file: str | None) -> str:
    """The error's last line and where it came from, in `file` if it passed there."""
    if isinstance(error, BadReturn):
        return str(error)
    line = " ".join(str(error).split())[:300]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if frame.filename == file] or frames
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}{f': {line}' if line else ''}{place}"


def _call(function: Callable, file: str | None, parts: Sequence[bytearray]) -> list[Any]:
    import numpy as np
    import torch

    request = json.loads(bytes(parts[0]))
    failure, applies, values = None, True, np.full(request["count"], np.nan, np.float32)
    try:
        rollout = unpack_rollout(parts[1:])
        pairs = request["pairs"]
        with torch.no_grad():
            returned = function(rollout) if pairs is None else function(rollout, [tuple(pair) for pair in pairs])
            applies = returned is not NotImplemented
            values = to_floats(returned, request["count"]) if applies else values
    except BaseException as error:  # also SystemExit: whatever the function does, the next step calls it again
        failure = describe(error, file)
    return [json.dumps({"failure": failure, "applies": applies}).encode(), values.data]


def _serve(inbox: BinaryIO, outbox: BinaryIO) -> None:
    with contextlib.suppress(ImportError):  # before the function is known, so that a spare process has it
        import torch  # noqa: F401
    try:
        setup = json.loads(bytes(read_message(inbox)[0]))
    except EOFError:  # a spare that was never needed
        return
    sys.path[:] = setup["path"]
    from fastcorl.errors import UserError
    from fastcorl.plugins import load_object

    try:
        function = load_object(setup["spec"], setup["key"])
        if not callable(function):
            raise UserError(f"{setup['key']}: {setup['spec']} is not a function")
    except UserError as error:
        write_message(outbox, [json.dumps({"error": str(error)}).encode()])
        return
    import torch

    torch.set_num_threads(1)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    write_message(outbox, [json.dumps({"error": None}).encode()])
    while True:
        try:
            parts = read_message(inbox)
        except EOFError:
            return
        write_message(outbox, _call(function, file, parts))


def _guard(inbox: int, outbox: BinaryIO) -> None:
    """Fork, return in the new process, and stay behind as its guard."""
    import select

    trainer, worker = os.getppid(), os.fork()
    if worker == 0:
        return
    pipe = select.poll()
    pipe.register(inbox, 0)  # only the hang-up is reported, which is the trainer's end
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if deadline is not None:
            time.sleep(0.02)
        elif pipe.poll(100) or os.getppid() != trainer:
            deadline = time.monotonic() + GRACE_SECONDS
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                write_message(outbox, [json.dumps({"died": os.waitstatus_to_exitcode(status)}).encode()])
            break
    os.kill(0, signal.SIGKILL)  # the whole process group, this process too


def main() -> None:
    # The pipes move away from 0 and 1, so that a function may print, and read nothing.
    inbox, outbox = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if hasattr(os, "fork"):
        _guard(inbox.fileno(), outbox)
    _serve(inbox, outbox)


if __name__ == "__main__":
    main()
