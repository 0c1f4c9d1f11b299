"""Two hosts on one machine: network namespaces joined by a cable. Needs root and iproute2."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.loop.launching import REPOSITORY, environment

CABLE = "cable"  # the network interface, by the same name on both


@dataclass
class Host:
    name: str
    rank: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.rank + 1}"

    def start(
        self,
        command: list[str],
        log: Path,
        *,
        own: tuple[Path, Path] | None = None,
        variables: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """Start a command, its output in `log`. `own`: folder of all hosts, and what this one has in its place."""
        if own:
            command = ["sh", "-c", 'mount --bind "$1" "$0" && shift && exec "$@"', str(own[0]), str(own[1]), *command]
        with log.open("a") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=REPOSITORY,
                env=environment() | {"GLOO_SOCKET_IFNAME": CABLE, "PYTHONUNBUFFERED": "1"} | (variables or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in listed.stdout.split()]

    def ranks(self) -> list[int]:
        """The processes of ranks, without their launcher."""
        found = []
        for process in self.processes():
            with suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if (
                    b"LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes()
                    and b"torch.distributed.run" not in words
                ):
                    found.append(process)
        return found

    def kill(self, processes: list[int], number: int = signal.SIGKILL) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def plug(self, state: str) -> None:
        """`state` of the cable's end: "down" is a host that is gone without a word."""
        run("ip", "-n", self.name, "link", "set", CABLE, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Made for the block and removed after it, with all that still runs on them."""
    if os.geteuid() != 0:
        raise SystemExit("two hosts are network namespaces, which only root makes")
    signal.signal(signal.SIGTERM, _leave)
    hosts = tuple(Host(f"fastcorl-{os.getpid()}-{rank}", rank) for rank in range(2))
    try:
        for host in hosts:
            run("ip", "netns", "add", host.name)
        first, second = hosts
        ends = ["netns", first.name, "type", "veth", "peer", "name", CABLE, "netns", second.name]
        run("ip", "link", "add", CABLE, *ends)
        for host in hosts:
            run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            run("ip", "-n", host.name, "link", "set", "lo", "up")
            host.plug("up")
        yield hosts
    finally:
        for host in hosts:
            host.kill(host.processes())
            subprocess.run(["ip", "netns", "delete", host.name], check=False)


def torchrun(host: Host, hosts: tuple[Host, ...], per_host: int, restarts: list[str] | None = None) -> list[str]:
    """The command of one host; `restarts` are options for which the launchers must know of one another."""
    common = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(per_host)]
    if len(hosts) == 1:
        return [*common, "--standalone"]
    common += ["--nnodes", str(len(hosts))]
    first = hosts[0].address
    if restarts:
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"{first}:29577"]
        # A host that has no name does not find out by itself that it is the first.
        nameless = ["--local_addr", host.address, "--rdzv_conf", f"is_host={int(host.rank == 0)}"]
        return [*common, *rendezvous, *nameless, *restarts]
    return [*common, "--node_rank", str(host.rank), "--master_addr", first, "--master_port", "29577"]


def deepspeed(host: Host, hosts: tuple[Host, ...], hostfile: Path, *, ssh: bool = False) -> list[str]:
    """The command of one host, or with `ssh` that of the first for all."""
    hostfile.write_text("".join(f"{each.address} slots=1\n" for each in hosts))
    address = ["--hostfile", str(hostfile), "--master_addr", hosts[0].address, "--master_port", "29577"]
    return ["deepspeed", *address, *(["--no_ssh_check"] if ssh else ["--no_ssh", "--node_rank", str(host.rank)])]


@contextmanager
def ssh_servers(hosts: tuple[Host, ...], folder: Path) -> Iterator[dict[str, str]]:
    """Inside the block ssh leads to each host; what the `deepspeed` command needs in its environment for that."""
    Path("/run/sshd").mkdir(exist_ok=True)
    key, variables = folder / "key", folder / "deepspeed_env"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    variables.write_text(f"GLOO_SOCKET_IFNAME={CABLE}\nOMP_NUM_THREADS=1\n")
    options = ["PidFile=none", "StrictModes=no", "PermitRootLogin=yes", f"AuthorizedKeysFile={key}.pub"]
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(key)]
    for option in options:
        command += ["-o", option]
    servers = [host.start(command, folder / f"sshd-{host.rank}.log") for host in hosts]
    try:
        trusting = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        yield {"PDSH_SSH_ARGS_APPEND": trusting, "DS_ENV_FILE": str(variables)}
    finally:
        for server in servers:
            server.terminate()


def _leave(*_: object) -> None:
    """Ends the script so that what it made is removed; another signal does not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def run(*command: str) -> None:
    subprocess.run(command, check=True)
