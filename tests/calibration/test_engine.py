"""The engine: what one process does, and that two of them train like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from calibration.engine import Engine
from guard.errors import CalibrationError

TRAIN = """
import os
import sys
import torch
from safetensors.torch import save_file
from calibration.engine import Engine

with Engine(int(sys.argv[1])) as engine:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    module, wrapped = engine.setup(net, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        batch = torch.rand(8, 4, generator=generator)
        wrapped.zero_grad()
        engine.backward(module(engine.share(batch)).square().mean())
        wrapped.step()
    assert engine.agree(3.0) == 3.0
    if engine.leads:
        save_file(net.state_dict(), sys.argv[2])
os._exit(0)
"""


def test_one_process_takes_the_whole_batch_and_leads() -> None:
    engine = Engine()
    batch = torch.arange(5)
    assert engine.leads
    assert torch.equal(engine.share(batch), batch)
    assert engine.agree(0.25) == 0.25
    net = nn.Linear(2, 1)
    module, optimizer = engine.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    before = net.weight.detach().clone()
    engine.backward(module(torch.ones(1, 2)).sum())
    optimizer.step()
    assert not torch.equal(net.weight, before)  # the module's own weights


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    root = str(Path(__file__).parent.parent.parent)
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices, str(tmp_path / f"{devices}.safetensors")]
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{devices}.safetensors") for devices in ("1", "2"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-2, rtol=0)  # mixed precision, in other batches
        assert float((two[name] - nn.Linear(4, 3).state_dict()[name]).abs().max()) > 1e-3


@pytest.mark.parametrize("devices", [0, -1])
def test_no_devices(devices: int) -> None:
    with pytest.raises(CalibrationError, match="expected at least one device"):
        Engine(devices)
