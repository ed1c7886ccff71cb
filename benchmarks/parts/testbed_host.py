"""One host of the testbed: a process on one core that joins the cluster, runs a function, writes what it returns and
waits to be ended."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(job: dict[str, Any]) -> None:
    """Runs a job as `testbed.Testbed` describes it."""
    _die_with_parent(job["parent"])
    os.sched_setaffinity(0, {job["core"]})  # before JAX counts the cores that it may use
    try:
        _work(job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for the other host


def _die_with_parent(parent: int) -> None:
    """Ends this process when the testbed's is killed without a chance to end it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(job: dict[str, Any]) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(job["address"], num_processes=job["hosts"], process_id=job["host"])
    earlier = set(_threads())
    jax.devices()  # makes gloo's connections
    if job["alone"]:
        _yield_core([thread for thread in _threads() if thread not in earlier])
    module, _, name = job["function"].partition(":")
    value = getattr(importlib.import_module(module), name)(**job["arguments"])
    answer = Path(job["answer"])
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(answer)
    signal.pause()  # The testbed ends all hosts once it has every answer: leaving the cluster in order may hang.


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _yield_core(threads: list[int]) -> None:
    """Lets gloo's thread, the one of these that waits for sockets, run only while the host's core has nothing to do.

    A message may come before the buffer that it is for. Then that thread asks for events over and over, until the other
    one has made the buffer (gloo, `transport/tcp/pair.cc`), which on a single core waits for the next tick of the
    kernel's clock: most all-reduces and all-gathers, whatever their size, took 4 ms. Those of 4 KiB take 0.2 ms so.
    """
    for thread in threads:
        try:
            if "epoll" in Path(f"/proc/self/task/{thread}/wchan").read_text():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            continue  # It has ended, or one may not look.


def describe_host(**arguments: Any) -> dict[str, Any]:
    """What a host is, and the sum of all hosts' numbers plus one: needs the others."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    ranks = multihost_utils.process_allgather(np.float32(jax.process_index() + 1))
    return {
        "rank": jax.process_index(),
        "cores": sorted(os.sched_getaffinity(0)),
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
        "sum": float(ranks.sum()),
        "arguments": arguments,
    }


def fail_on(host: int) -> None:
    """Fails on one host; the other waits for it."""
    import jax

    if jax.process_index() == host:
        raise ValueError("meant to fail")
    time.sleep(600)


def measure_link(sizes: tuple[int, ...] = (4096, 131072, 1 << 20, 1 << 24), repeats: int = 9) -> dict[int, float]:
    """Median seconds for one host to send float32 values of so many bytes to the other."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(jax.devices()[:: jax.local_device_count()], ("host",))
    rows = NamedSharding(mesh, PartitionSpec("host"))
    found = {}
    for size in sizes:
        send = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.ppermute(x, "host", [(0, 1)]),
                mesh=mesh,
                in_specs=PartitionSpec("host"),
                out_specs=PartitionSpec("host"),
            )
        )
        x = jax.jit(lambda n=size: jnp.zeros((2, n // 4)), out_shardings=rows)()
        times = []
        for _ in range(repeats + 2):
            jax.block_until_ready(send(x))
            begin = time.perf_counter()
            x = jax.block_until_ready(send(x))
            times.append(time.perf_counter() - begin)
        found[size] = statistics.median(times[2:])
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
