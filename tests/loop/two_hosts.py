"""Runs on two hosts, which are network namespaces of this machine (hosts.py); prints a line of JSON per case.

    python -m tests.loop.two_hosts [CASE ..]    # as root, with iproute2

A run of two ranks on one host is what the others must equal bit for bit: in figures, checkpoints and exports. The exit
code is 1 if a case is not as it must be.
"""

import argparse
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.loop.hosts import Host, deepspeed, ssh_servers, torchrun, two_hosts
from tests.loop.launching import SMALL_RUN, read_metrics

SETTINGS = f"""
extends: {SMALL_RUN}
optimizer: {{warmup_steps: 2, schedule: cosine, learning_rate: 1e-3}}
stages:
  unified: {{task: unified, steps: 4, prompts_per_step: 4}}
  t2i: {{task: t2i, init: unified, steps: 2, prompts_per_step: 4, beta: 0.02}}
"""
TIMES = ("seconds", "step_seconds", "memory_gib")
END = 150  # seconds in which a host ends after the other is gone


class Trials:
    """The cases, in a folder that both hosts see."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host]):
        self.folder, self.hosts, self.failed = folder, hosts, False
        self.file = folder / "settings.yaml"
        self.file.write_text(SETTINGS)

    def equal(self) -> None:
        """Two hosts of one rank."""
        for launcher, zero_stage in (("torchrun", 1), ("deepspeed", 1), ("torchrun", 3)):
            name = f"{launcher}-{zero_stage}"
            codes = self._ended(self._start(launcher, name, zero_stage))
            self._tell("equal", codes == [0, 0], name, zero_stage, launcher=launcher, exit=codes)

    def ssh(self) -> None:
        """The `deepspeed` command, typed on the first host alone; needs pdsh and sshd."""
        run = self._options("ssh", 1, self.file)
        with ssh_servers(self.hosts, self.folder) as variables:
            command = [*deepspeed(self.hosts[0], self.hosts, self.folder / "hostfile", ssh=True), *run]
            codes = self._ended([self.hosts[0].start(command, self.folder / "ssh-0.log", variables=variables)])
        self._tell("ssh", codes == [0], "ssh", 1, launcher="deepspeed", exit=codes)

    def killed(self) -> None:
        """All processes of a host killed, its launcher too; the other ends by itself, and the run is resumed."""
        for launcher, lost in (("torchrun", 1), ("torchrun", 0), ("deepspeed", 1)):
            self._lose("killed", launcher, lost, lambda host: host.kill(host.processes()))

    def unplugged(self) -> None:
        """A host that is gone without a word in the middle of a step: what is sent to it is not answered."""
        self._lose("unplugged", "torchrun", 1, lambda host: host.plug("down"), "--checkpoint.every=2", steps=3)

    def terminated(self) -> None:
        """SIGTERM to the launcher of one host: all ranks save, and end."""

        def terminate(host: Host) -> None:
            launcher = set(host.processes()) - set(host.ranks())
            host.kill(list(launcher), signal.SIGTERM)

        self._lose("terminated", "torchrun", 1, terminate, "--checkpoint.every=2")

    def restarted(self) -> None:
        """A rank killed under `torchrun --max_restarts`, which starts all of them again."""
        options = ["--max_restarts", "2"]
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/multi_node.md says why
        processes = self._start("torchrun", "restarted", 1, "--resume=auto", launch=options, variables=variables)
        self._wait_for_steps("restarted", 2)
        self.hosts[1].kill(self.hosts[1].ranks())
        begin = time.perf_counter()
        codes = self._ended(processes)
        seconds = round(time.perf_counter() - begin, 1)
        good = codes == [0, 0] and self._went_on("restarted")
        self._tell("restarted", good, "restarted", 1, exit=codes, seconds=seconds)

    def apart(self) -> None:
        """Each host has a folder of its own under the name of `output_dir`."""
        (self.folder / "own").mkdir()
        own = (self.folder / "runs" / "apart", self.folder / "own")
        own[0].mkdir(parents=True)
        codes = self._ended(self._start("torchrun", "apart", 1, own=own))
        told = [line for line in self._log("apart", 0).splitlines() if line.startswith("fastcorl:")]
        good = 0 not in codes and len(told) == 1 and "output_dir" in told[0] and not (own[0] / "run").exists()
        self._print("apart", good, exit=codes, told=told)

    def different(self) -> None:
        """The second host has another configuration."""
        other = self.folder / "other.yaml"
        other.write_text(SETTINGS + "algorithm: {group_size: 4}\n")
        codes = self._ended(self._start("torchrun", "different", 1, files=[self.file, other]))
        told = [line for line in self._log("different", 0).splitlines() if line.startswith("fastcorl:")]
        good = 0 not in codes and len(told) == 1 and "algorithm.group_size is 2" in told[0]
        self._print("different", good, exit=codes, told=told)

    def _lose(
        self, case: str, launcher: str, lost: int, lose: Callable[[Host], None], *options: str, steps: int = 2
    ) -> None:
        name = f"{case}-{launcher}-{lost}"
        processes = self._start(launcher, name, 1, *options)
        self._wait_for_steps(name, steps)
        lose(self.hosts[lost])
        seconds = self._seconds_to_end()
        for host in self.hosts:
            host.kill(host.processes())
            host.plug("up")
        codes = self._ended(processes)
        resumed = self._ended(self._start(launcher, name, 1, "--resume=auto", *options))
        good = 0 not in codes and max(seconds) < END and resumed == [0, 0] and self._went_on(name)
        self._tell(case, good, name, 1, launcher=launcher, lost=lost, exit=codes, seconds=seconds, resumed=resumed)

    def _seconds_to_end(self) -> list[float]:
        """Until each host has no process any more; of one that still has some after twice END, that."""
        begin = time.perf_counter()
        seconds = [2.0 * END] * 2
        while (passed := time.perf_counter() - begin) < 2 * END and max(seconds) == 2 * END:
            for host in self.hosts:
                if seconds[host.rank] == 2 * END and not host.processes():
                    seconds[host.rank] = round(passed, 1)
            time.sleep(0.2)
        return seconds

    def _start(
        self,
        launcher: str,
        name: str,
        zero_stage: int,
        *options: str,
        per_host: int = 1,
        launch: list[str] | None = None,
        own: tuple[Path, Path] | None = None,
        files: list[Path] | None = None,
        variables: dict[str, str] | None = None,
    ) -> list[subprocess.Popen]:
        """The run `name` on both hosts, or with two ranks per host on the first; `own` and `files` as they say."""
        hosts = self.hosts[: 2 // per_host]
        started = []
        for host in hosts:
            if launcher == "torchrun":
                command = torchrun(host, hosts, per_host, launch)
            else:
                command = deepspeed(host, hosts, self.folder / "hostfile")
            command += [*self._options(name, zero_stage, (files or [self.file] * 2)[host.rank]), *options]
            mounts = own if own and host.rank else None
            started.append(
                host.start(command, self.folder / f"{name}-{host.rank}.log", own=mounts, variables=variables)
            )
        return started

    def _options(self, name: str, zero_stage: int, file: Path) -> list[str]:
        run = [f"--output_dir={self.folder / 'runs' / name}", f"--deepspeed.zero_stage={zero_stage}"]
        return ["fastcorl/train.py", "--config", str(file), *run]

    def _ended(self, processes: list[subprocess.Popen]) -> list[int]:
        return [process.wait(600) for process in processes]

    def _log(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}-{rank}.log").read_text()

    def _went_on(self, name: str) -> bool:
        return "unified: resumed at step" in self._log(name, 0)

    def _wait_for_steps(self, name: str, count: int) -> None:
        path = self.folder / "runs" / name / "run" / "metrics.jsonl"
        until = time.monotonic() + 300
        while not (path.exists() and path.read_text().count("\n") >= count):
            if time.monotonic() > until:
                raise SystemExit(f"{name}: no step in 300 s\n{self._log(name, 0)}\n{self._log(name, 1)}")
            time.sleep(0.05)

    def _on_one_host(self, zero_stage: int) -> Path:
        """The run that the others must equal."""
        name = f"one-host-{zero_stage}"
        folder = self.folder / "runs" / name / "run"
        if not folder.exists():
            codes = self._ended(self._start("torchrun", name, zero_stage, per_host=2))
            assert codes == [0], self._log(name, 0)
        return folder

    def _tell(self, case: str, good: bool, name: str, zero_stage: int, **facts: object) -> None:
        compared = differences(self._on_one_host(zero_stage), self.folder / "runs" / name / "run") if good else {}
        self._print(case, good and not compared["differ"], **facts, zero_stage=zero_stage, **compared)
        if not good:
            for log in sorted(self.folder.glob(f"{name}-?.log")):
                print(log.read_text(), file=sys.stderr)

    def _print(self, case: str, good: bool, **facts: object) -> None:
        self.failed |= not good
        print(json.dumps({"case": case, "good": good, **facts}), flush=True)


def differences(expected: Path, got: Path) -> dict[str, object]:
    """What was compared of two runs, and what is not the same to the bit; the second may save less often."""
    files, there = hashes(expected), hashes(got)
    for folder in (expected / "checkpoints").glob("step-*"):
        if not (got / "checkpoints" / folder.name).exists():
            files = {name: file for name, file in files.items() if not name.startswith(f"checkpoints/{folder.name}/")}
    numbers = figures(expected)
    first, second = numbers | files, figures(got) | there
    differ = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return {"figures": len(numbers), "files": len(files), "differ": differ}


def figures(run: Path) -> dict[str, object]:
    """Every figure of every step that is no time."""
    found: dict[str, object] = {"scores": json.loads((run / "scores.json").read_text())}
    for number, line in enumerate(read_metrics(run)):
        for name, value in line.items():
            if name not in TIMES:
                values = value if isinstance(value, dict) else {"": value}
                found |= {f"{number} {name} {key}": each for key, each in values.items() if "seconds" not in key}
    return found


def hashes(run: Path) -> dict[str, str]:
    """sha256 of each file of checkpoints and exports, without manifests, which are such themselves, and cards, which
    have the run's own settings."""
    files = [path for part in ("checkpoints", "export") for path in (run / part).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(run)): hashlib.sha256(content(path)).hexdigest()
        for path in files
        if path.name not in ("README.md", "manifest.json")
    }


def content(path: Path) -> bytes:
    """The bytes of a file, without what ZeRO 3 pads frozen weights with to divide by the ranks: memory as it was."""
    if "_model_states" not in path.name:
        return path.read_bytes()
    state = torch.load(path, weights_only=False)  # DeepSpeed's, of a run of our own
    rank = int(re.search(r"rank_(\d+)", path.name)[1])
    fragments = state.get("frozen_param_fragments") or {}
    for name, fragment in fragments.items():
        filled = state["frozen_param_shapes"][name].numel() - rank * len(fragment)
        if filled < len(fragment):
            fragments[name] = fragment[: max(filled, 0)].clone()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def main() -> None:
    cases = ["equal", "ssh", "killed", "unplugged", "terminated", "restarted", "apart", "different"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(cases))
    chosen = parser.parse_args().cases or cases
    if unknown := set(chosen).difference(cases):
        parser.error(f"no case {' '.join(unknown)}; there are {', '.join(cases)}")
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        trials = Trials(Path(folder), hosts)
        for case in chosen:
            getattr(trials, case)()
    raise SystemExit(int(trials.failed))


if __name__ == "__main__":
    main()
