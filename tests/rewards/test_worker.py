"""Workers with functions that behave in every way, in real processes."""

import dataclasses
import gc
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastcorl.errors import UserError
from fastcorl.rewards.users import worker_process
from fastcorl.rewards.users.worker import RewardWorker, Spare, worker_environment
from fastcorl.rewards.users.worker_process import pack_rollout, read_message, unpack_rollout, write_message

NAN = float("nan")
TIMEOUT = 2.0
PACKAGE = Path(worker_process.__file__).parents[1]
ANSWERS = ["<answer>1</answer>", "<answer>B</answer>", "", "é"]


@pytest.fixture(autouse=True)
def user_functions(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def worker():
    sys.path.insert(0, str(Path(__file__).parent))
    worker = RewardWorker("user_functions:by_caption", timeout=TIMEOUT)
    sys.path.pop(0)
    worker.ready()
    yield worker
    worker.close()


@pytest.fixture
def call(make_rollout):
    def call(worker, behaviour="", answers=ANSWERS):
        rollout = make_rollout(answers)
        rollout.prompts[0] = dataclasses.replace(rollout.prompts[0], caption=behaviour)
        worker.start(pack_rollout(rollout), rollout.num_rows)
        return worker.collect()

    return call


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("behaviour", "values"),
    [
        ("list", [1, 0.5, NAN, 1]),
        ("tensor", [0, 1, 2, 3]),
        ("grad", [2, 2, 2, 2]),
        ("array", [1, 2, 3, 4]),
        ("scalars", [1, 1, 2, 3]),
        ("generator", [0, 0.5, 1, 1.5]),
        ("infinite", [NAN] * 4),
        ("print", [1, 1, 1, 1]),
    ],
)
def test_values(worker, call, behaviour, values):
    reply = call(worker, behaviour)
    assert reply.failure is None
    assert reply.values.dtype == torch.float32
    torch.testing.assert_close(reply.values, torch.tensor(values, dtype=torch.float32), equal_nan=True)
    assert 0 < reply.seconds < TIMEOUT


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raise", "IndexError: list index out of range (user_functions.py:"),
        ("deep", "ValueError: cannot reshape array of size 3 into shape (2,2) (user_functions.py:"),
        ("exit", "SystemExit: 3 (user_functions.py:"),
        ("interrupt", "KeyboardInterrupt (user_functions.py:"),
        ("unknown", "KeyError: 'unknown' (user_functions.py:"),
        ("none", "returned None, not a sequence of 4 numbers"),
        ("short", "returned 3 values, 4 were asked for"),
        ("long", "returned 5 values, 4 were asked for"),
        ("column", "returned a list as value 0, not a number or None"),
        ("number", "returned a float, not a sequence of 4 numbers"),
        ("text", "returned a str, not a sequence of 4 numbers"),
        ("texts", "returned a str as value 0, not a number or None"),
        ("mapping", "returned a dict, not a sequence of 4 numbers"),
        ("complex", "returned a complex as value 0, not a number or None"),
        ("huge", "OverflowError: int too large to convert to float"),
    ],
)
def test_a_failed_call_is_all_nan_with_a_reason_and_the_process_stays(worker, call, behaviour, reason):
    process = worker._child.process.pid
    reply = call(worker, behaviour)
    assert reply.failure.startswith(reason)
    assert "\n" not in reply.failure
    assert reply.values.shape == (4,)
    assert reply.values.isnan().all()
    assert call(worker, "list").failure is None
    assert worker._child.process.pid == process


def test_the_place_of_an_error_is_the_users_line(worker, call):
    lines = (Path(__file__).parent / "user_functions.py").read_text().splitlines()
    number = 1 + next(index for index, line in enumerate(lines) if "the place that the log shows" in line)
    assert call(worker, "raise").failure.endswith(f"(user_functions.py:{number}, in _raise)")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("os_exit", "its process ended with exit code 5"),
        ("kill", "its process was ended by SIGKILL, perhaps for lack of memory"),
        ("segfault", "its process was ended by SIGSEGV"),
        ("group", "its process died"),
        ("hang", "not done after 2 s, stopped"),
        ("spin", "not done after 2 s, stopped"),
    ],
)
def test_a_process_that_dies_or_hangs_is_started_anew(worker, call, behaviour, reason):
    process = worker._child.process.pid
    started = time.monotonic()
    reply = call(worker, behaviour)
    assert time.monotonic() - started < TIMEOUT + 1
    assert reply.failure == reason
    assert reply.values.isnan().all()
    assert not is_alive(process)
    again = call(worker, "array")
    assert again.failure is None
    assert again.values.tolist() == [1, 2, 3, 4]


def test_start_time_does_not_count_as_the_calls(call):
    """A restart may take longer than a call."""
    worker = RewardWorker("user_functions:by_caption", timeout=0.5)
    worker.ready()
    try:
        assert call(worker, "os_exit").failure == "its process ended with exit code 5"
        reply = call(worker, "array")
        assert reply.failure is None
        assert reply.seconds > 0.5
    finally:
        worker.close()


def test_a_spare_takes_the_place_of_a_process_that_dies(call):
    """It has imported torch by then, so that the function is all there is to import."""
    spare = Spare(gpu=False)
    worker = RewardWorker("user_functions:by_caption", spare=spare)
    worker.ready()
    try:
        waiting = spare._child.process.pid
        assert call(worker, "os_exit").failure == "its process ended with exit code 5"
        assert call(worker, "array").values.tolist() == [1, 2, 3, 4]
        assert worker._child.process.pid == waiting
        waiting = spare._child.process
        assert is_alive(waiting.pid) and waiting.pid != worker._child.process.pid
    finally:
        worker.close()
        spare.close()
    assert not is_alive(waiting.pid)


def test_an_import_that_fails_at_the_restart_is_a_failure(call, tmp_path, monkeypatch):
    module = tmp_path / "short_lived.py"
    module.write_text("import os\ndef reward(rollout):\n    os.unlink(__file__)\n    os._exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = RewardWorker("short_lived:reward")
    worker.ready()
    try:
        call(worker)
        assert "cannot import 'short_lived'" in call(worker).failure
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"^rewards\.extra: bad_reward:reward: cannot import 'bad_reward': ModuleNotFoundError"),
        ("1 / 0", r"^rewards\.extra: .*: ZeroDivisionError: division by zero$"),
        ("reward = 3", r"^rewards\.extra: bad_reward:reward is not a function$"),
        ("other = 3", r"^rewards\.extra: bad_reward:reward: 'bad_reward' has no 'reward'$"),
        (
            "import os; os._exit(1)",
            r"^rewards\.extra: bad_reward:reward: importing it: its process ended with exit code 1$",
        ),
        (
            "import time; time.sleep(600)",
            r"^rewards\.extra: bad_reward:reward: importing it: not done after 1 s, stopped$",
        ),
    ],
)
def test_a_bad_import_is_a_user_error_that_names_the_key(tmp_path, monkeypatch, source, message):
    monkeypatch.syspath_prepend(str(tmp_path))
    if source is not None:
        (tmp_path / "bad_reward.py").write_text(source)
    worker = RewardWorker("bad_reward:reward", startup=1.0 if source and "sleep" in source else 60.0)
    process = worker._child.process.pid
    with pytest.raises(UserError, match=message):
        worker.ready()
    assert not is_alive(process)


def test_the_process_is_alone_and_light(monkeypatch, call):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    worker = RewardWorker("user_functions:surroundings")
    worker.ready()
    try:
        assert call(worker).values.tolist() == [1, 1, 1, 1]
    finally:
        worker.close()


@pytest.mark.parametrize(("visible", "device"), [(None, "1"), ("4,6", "6"), ("4", "1")])
def test_a_gpu_if_asked_for_is_the_ranks_own(monkeypatch, visible, device):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert worker_environment(gpu=True)["CUDA_VISIBLE_DEVICES"] == device
    assert worker_environment(gpu=False)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["timeout", "close", "forget", "exit", "kill"])
def test_nothing_that_a_function_started_outlives_its_call_or_the_trainer(make_rollout, tmp_path, how):
    """`exit` and `kill` end a whole trainer: with a call under way, by sys.exit and by SIGKILL."""
    file = tmp_path / "pids"
    rollout = make_rollout(ANSWERS)
    rollout.prompts[0] = dataclasses.replace(rollout.prompts[0], caption=str(file))
    if how in ("exit", "kill"):
        script = (
            "import sys, time, types; from pathlib import Path\n"
            "package = types.ModuleType('fastcorl.rewards'); package.__path__ = [sys.argv[4]]\n"
            "sys.modules['fastcorl.rewards'] = package  # its own takes seconds to import\n"
            "from fastcorl.rewards.users.worker import RewardWorker\n"
            "from fastcorl.rewards.users.worker_process import read_message\n"
            "worker = RewardWorker('user_functions:hangs_with_a_child', timeout=600); worker.ready()\n"
            "worker.start(read_message(open(sys.argv[1], 'rb', buffering=0)), 4)\n"
            "while not Path(sys.argv[2]).exists(): time.sleep(0.02)\n"
            "time.sleep(0.2); sys.exit() if sys.argv[3] == 'exit' else time.sleep(600)\n"
        )
        rollout = dataclasses.replace(rollout, images=None, texts=None)
        with (tmp_path / "rollout").open("wb", buffering=0) as file_of_rollout:
            write_message(file_of_rollout, pack_rollout(rollout))
        arguments = [sys.executable, "-c", script, str(tmp_path / "rollout"), str(file), how, str(PACKAGE)]
        trainer = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        assert wait_until(lambda: file.exists() and " " in file.read_text(), 60)
        if how == "kill":
            trainer.kill()
        trainer.wait(20)
    else:
        worker = RewardWorker("user_functions:hangs_with_a_child", timeout=1.5 if how == "timeout" else 600)
        worker.ready()
        worker.start(pack_rollout(rollout), rollout.num_rows)
        assert wait_until(lambda: file.exists() and " " in file.read_text(), 60)
        if how == "timeout":
            assert worker.collect().failure == "not done after 1.5 s, stopped"
        if how != "forget":
            worker.close()
        else:
            worker._finalizer()  # what the garbage collector and the interpreter's end call
    pids = file.read_text().split()
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(is_alive, pids)), 3)


def test_a_forgotten_idle_worker_is_collected():
    worker = RewardWorker("user_functions:by_caption")
    worker.ready()
    process = worker._child.process.pid
    assert is_alive(process)
    del worker
    gc.collect()
    assert not is_alive(process)


def test_an_idle_process_may_clean_up(tmp_path, monkeypatch):
    (tmp_path / "tidy.py").write_text(
        "import atexit, pathlib\n"
        "atexit.register(lambda: (pathlib.Path(__file__).parent / 'tidied').touch())\n"
        "def reward(rollout): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = RewardWorker("tidy:reward")
    worker.ready()
    worker.close()
    worker.close()
    assert (tmp_path / "tidied").exists()
    with pytest.raises(RuntimeError, match="open worker"):
        worker.start([], 4)


def test_calls_come_in_turn(worker, make_rollout):
    with pytest.raises(RuntimeError, match="without start"):
        worker.collect()
    rollout = make_rollout(ANSWERS)
    worker.start(pack_rollout(rollout), 4)
    with pytest.raises(RuntimeError, match="under way"):
        worker.start(pack_rollout(rollout), 4)
    worker.collect()


def assert_same(a, b, skip=()):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name in skip:
            continue
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        elif dataclasses.is_dataclass(left):
            assert_same(left, right, skip)
        else:
            assert left == right, field.name


def test_a_rollout_arrives_as_it_was(make_rollout):
    rollout = make_rollout(ANSWERS)
    rollout.images.pixels[2, 1, 3] = NAN
    rollout.vision_features = torch.ones(2, 3, 4)
    stream = io.BytesIO()
    write_message(stream, pack_rollout(rollout))
    stream.seek(0)
    received = unpack_rollout(read_message(stream))
    assert_same(rollout, received, skip=("pixels", "vision_features"))
    assert received.vision_features is None
    assert rollout.vision_features is not None
    pixels = received.images.pixels
    assert pixels.dtype == torch.float32
    assert pixels[2].isnan().all()
    rows = [0, 1, 3]
    torch.testing.assert_close(pixels[rows], rollout.images.pixels[rows], atol=0.5001 / 255, rtol=0)
    pixels += 1  # the function owns it
    assert (rollout.images.pixels[rows] <= 1).all()


def test_bytes_of_pixels_survive_exactly(make_rollout):
    rollout = make_rollout()
    exact = torch.arange(4 * 3 * 32 * 32).remainder(256).view(4, 3, 32, 32) / 255
    rollout.images.pixels = exact
    assert torch.equal(unpack_rollout([bytearray(part) for part in pack_rollout(rollout)]).images.pixels, exact)


@pytest.mark.parametrize(
    "data", [b"", b"FCRW\x01\x00\x00\x00", b"FCRW\x01\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00abc"]
)
def test_a_cut_message_is_an_end_of_file(data):
    with pytest.raises(EOFError):
        read_message(io.BytesIO(data))


def test_garbage_is_told():
    with pytest.raises(ValueError, match="not a message"):
        read_message(io.BytesIO(b"Traceback (most recent call last)"))


def test_signals_for_the_trainers_group_do_not_reach_the_worker(worker):
    assert os.getpgid(worker._child.process.pid) != os.getpgid(0)
