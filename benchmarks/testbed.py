"""A cluster of two hosts on one machine: what takes time there takes time here.

Each host is a process on a core of its own, in a network namespace of its own, joined to the other by a link of a given
bandwidth. Their devices form one JAX cluster over gloo. So computation, waiting and communication are real, unlike on
virtual devices, which share cores and memory.

    with Testbed(bandwidth_bits_per_s=2e9) as bed:
        times = bed.run("my_module:my_function", {"layers": 4}).values

Namespaces need root, and the tools `ip` and `tc`. Without these, the same runs over loopback, with no limit to the
bandwidth; `Testbed.network` and every `Answers` say which it was. Run as a script, this measures the link.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOSTS = 2
ROOT = Path(__file__).parents[1]
HOST_SCRIPT = ROOT / "benchmarks" / "parts" / "testbed_host.py"
NETNS_ETC = Path("/etc/netns")
NAMESPACES, LOOPBACK = "namespaces", "loopback"

_NAME = re.compile(r"^gx(\d+)n\d+[ab]$")
"""Namespaces of a testbed: process, number of its testbed, host. Network devices have the same names (at most 15)."""
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 29771
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"mmap_max": 0, "trim_threshold": 2**40, "top_pad": 2**28, "arena_max": 1, "hugetlb": 1}.items()
)
"""Makes hosts keep the memory that they free, in large pages, as accelerators do. Otherwise each step's arrays are new
pages, which the kernel clears one by one: 0.12 s for 280 MiB, more than many a step computes. Large pages take up to
7 % more off."""
_numbers = itertools.count()


class TestbedError(RuntimeError):
    """A host failed, or did not end in time."""

    __test__ = False


@dataclass(frozen=True)
class Answers:
    """What the hosts returned."""

    values: tuple[Any, ...]
    """Per host."""
    network: str
    """`namespaces` or `loopback`."""


@dataclass
class Testbed:
    """Two hosts and their link, for as long as a `with` block lasts. Whatever ends the block, nothing stays behind."""

    __test__ = False

    bandwidth_bits_per_s: float | None = None
    """Of the link, each way; None leaves it open."""
    devices_per_host: int = 1
    alone: bool = False
    """Whether nothing else runs on the machine: then gloo's thread gives way to computing (`testbed_host` says why). On
    cores that are never free it would hardly run."""
    network: str = field(init=False, default=LOOPBACK)
    why_loopback: str | None = field(init=False, default=None)
    """What was missing for namespaces."""
    _namespaces: tuple[str, ...] = field(init=False, default=())
    _processes: list[subprocess.Popen] = field(init=False, default_factory=list)
    _handlers: dict[int, Any] = field(init=False, default_factory=dict)

    def __enter__(self) -> Testbed:
        remove_stale()
        self.why_loopback = missing()
        if self.why_loopback is not None:
            return self
        name = f"gx{os.getpid()}n{next(_numbers)}"
        self._namespaces = (f"{name}a", f"{name}b")
        atexit.register(self.close)
        self._catch_signals()
        try:
            _make_network(self._namespaces, self.bandwidth_bits_per_s)
            self.network = NAMESPACES
        except subprocess.CalledProcessError as error:
            self.why_loopback = f"{' '.join(error.cmd)}: {error.stderr.strip()}"
            self.close()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs and takes the network down; may be called again."""
        for process in self._processes:
            _end(process)
        self._processes.clear()
        for name in self._namespaces:
            _remove(name)
        self._namespaces = ()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        atexit.unregister(self.close)

    @property
    def description(self) -> str:
        """The network in words."""
        if self.network == LOOPBACK:
            return f"loopback without limit ({self.why_loopback})"
        bits = self.bandwidth_bits_per_s
        return "open link" if bits is None else f"{bits / 1e6:g} Mbit/s"

    def run(
        self, function: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 600.0, flags: str = ""
    ) -> Answers:
        """Runs a function on both hosts at once, `jax.distributed` initialised.

        Args:
            function: `module:function`; modules of `benchmarks/` and of the repository are found.
            arguments: its keywords, and what it returns: whatever JSON can say.
            timeout_s: after this both are ended.
            flags: for XLA, beside those that keep it on one thread.

        Raises:
            TestbedError: with the end of what the host printed.
        """
        with tempfile.TemporaryDirectory(prefix="testbed-") as folder:
            jobs = [self._start(host, function, dict(arguments or {}), Path(folder), flags) for host in range(HOSTS)]
            try:
                _wait(jobs, time.monotonic() + timeout_s)
            finally:
                for job in jobs:
                    _end(job.process)
                    self._processes.remove(job.process)
            return Answers(tuple(json.loads(job.answer.read_text()) for job in jobs), self.network)

    def _start(self, host: int, function: str, arguments: dict[str, Any], folder: Path, flags: str) -> _Job:
        cores = sorted(os.sched_getaffinity(0))
        address = f"127.0.0.1:{_free_port(folder)}" if self.network == LOOPBACK else f"{_ADDRESSES[0]}:{_PORT}"
        job = {
            "address": address,
            "hosts": HOSTS,
            "host": host,
            "core": cores[host % len(cores)],
            "alone": self.alone,
            "parent": os.getpid(),
            "function": function,
            "arguments": arguments,
            "answer": str(folder / f"answer{host}.json"),
        }
        prefix = [] if self.network == LOOPBACK else ["ip", "netns", "exec", self._namespaces[host]]
        log = folder / f"log{host}.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*prefix, sys.executable, str(HOST_SCRIPT), json.dumps(job)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(self.devices_per_host, flags),
                cwd=ROOT,
            )
        self._processes.append(process)
        return _Job(host, process, Path(job["answer"]), log)

    def _catch_signals(self) -> None:
        """Makes a request to end raise, so that the block is left in order; Ctrl-C does so by itself."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, _raise_exit)


@dataclass(frozen=True)
class _Job:
    host: int
    process: subprocess.Popen
    answer: Path
    log: Path

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def missing() -> str | None:
    """What namespaces lack here; None if nothing."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no network namespaces"
    if os.geteuid() != 0:
        return "not root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no `{tool}` (Debian's package iproute2)"
    return None


def remove_stale() -> list[str]:
    """Takes down what testbeds of processes left that are no more.

    Returns:
        Names of the namespaces removed.
    """
    if missing() is not None:
        return []
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    names |= {path.name for path in NETNS_ETC.glob("gx*")} if NETNS_ETC.is_dir() else set()
    stale = [name for name in sorted(names) if (match := _NAME.match(name)) and not _alive(int(match[1]))]
    for name in stale:
        _remove(name)
    return stale


def _make_network(names: Sequence[str], bandwidth_bits_per_s: float | None) -> None:
    hostname = socket.gethostname()
    for name, address in zip(names, _ADDRESSES, strict=True):
        _ip("netns", "add", name)
        etc = NETNS_ETC / name
        etc.mkdir(parents=True)
        # gloo listens where the host's name leads.
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {hostname}\n")
    _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
    for name, address in zip(names, _ADDRESSES, strict=True):
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", name, "up")
        if bandwidth_bits_per_s is not None:
            _call(["tc", "-n", name, "qdisc", "add", "dev", name, "root", *limit(bandwidth_bits_per_s)])


def limit(bits_per_s: float) -> list[str]:
    """A token bucket: what it lets through at once is small beside messages that bandwidth matters to.

    The queue is long enough that no packet of the two connections is ever dropped.
    """
    burst_bytes = max(64 * 1024, int(bits_per_s / 8 * 250e-6))
    return ["tbf", "rate", f"{bits_per_s:.0f}bit", "burst", str(burst_bytes), "latency", "400ms"]


def _remove(name: str) -> None:
    """Removes a namespace with its network device, and ends what still runs in it; its peer's device goes as well."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in pids.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "-n", name, "link", "del", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    shutil.rmtree(NETNS_ETC / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        NETNS_ETC.rmdir()  # if it was ours alone


def _wait(jobs: Sequence[_Job], deadline: float) -> None:
    """Returns when all have answered; raises as soon as one has ended without an answer."""
    waiting = list(jobs)
    while waiting:
        for job in list(waiting):
            code = job.process.poll()  # before the answer is looked for: an answer may come in between
            if job.answer.exists():
                waiting.remove(job)
            elif code is not None:
                raise TestbedError(f"Host {job.host} ended with {code}. The end of what it printed:\n{job.tail()}")
        if waiting and time.monotonic() > deadline:
            job = waiting[0]
            raise TestbedError(f"Host {job.host} did not end in time. The end of what it printed:\n{job.tail()}")
        time.sleep(0.05)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _environment(devices: int, flags: str) -> dict[str, str]:
    known = [ROOT, ROOT / "benchmarks", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    single = "--xla_cpu_multi_thread_eigen=false"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{single} --xla_force_host_platform_device_count={devices} {flags}".strip(),
        "PYTHONPATH": os.pathsep.join(str(path) for path in known),
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": _KEEP_MEMORY,
    }


def _free_port(folder: Path) -> int:
    """One port for all hosts of a run."""
    path = folder / "port"
    if not path.exists():
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            path.write_text(str(bound.getsockname()[1]))
    return int(path.read_text())


def _raise_exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _ip(*arguments: str) -> None:
    _call(["ip", *arguments])


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    """Prints what the link does at a few bandwidths."""
    for bandwidth in (None, 2e9, 500e6):
        with Testbed(bandwidth_bits_per_s=bandwidth, alone=True) as bed:
            found = bed.run("parts.testbed_host:measure_link").values[0]
            print(f"{bed.description}: " + ", ".join(f"{size} bytes {s * 1e3:.3f} ms" for size, s in found.items()))


if __name__ == "__main__":
    main()
