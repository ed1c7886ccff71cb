"""Pipelines over two processes, joined by gloo, give what one device gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.integration.two_processes import STAGES_ACROSS, STAGES_INSIDE
from tests.runtime.reference import reference

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 540


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def run(case: str) -> list[dict]:
    """What both processes print; both are ended whatever happens."""
    address = f"127.0.0.1:{free_port()}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.integration.two_processes", address]
    processes = [
        subprocess.Popen([*command, str(rank), case], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    # The collectives' library writes lines of its own, at any time.
    return [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for output in outputs]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", [STAGES_ACROSS, pytest.param(STAGES_INSIDE, marks=pytest.mark.slow)])
def test_stages_over_two_processes_train_as_one_device_does(case: str) -> None:
    first, second = run(case)
    assert first["losses"] == second["losses"]
    assert first["norms"] == second["norms"]
    with jax.default_matmul_precision("highest"):
        wanted = reference("gpt2", "sgd", 4)
    np.testing.assert_allclose(first["losses"], wanted.losses, rtol=1e-5)
    assert set(first["norms"]) == set(wanted.parameters)
    for path, parameter in wanted.parameters.items():
        np.testing.assert_allclose(first["norms"][path], np.linalg.norm(parameter), rtol=1e-5, err_msg=path)
