"""Training: an interruption changes nothing, and neither does the global random state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.models import mnist_dense
from benchmarks.parts import Parts
from benchmarks.trainer import Poisoning, Schedule, fit
from calibration.attacks import BadNets
from guard.predictors.module import state_sha256

SCHEDULE = Schedule(epochs=3, shift=0.05, flip=True, brightness=0.1, contrast=0.1)
ATTACK = BadNets(3, 0.2)


def trained(parts: Parts, poisoning: Poisoning = "training", seed: int = 1, checkpoint: Path | None = None) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mnist_dense(width=16)
    fit(net, parts.attacker, ATTACK, poisoning, SCHEDULE, seed, checkpoint)
    assert not net.training
    return state_sha256(net.state_dict())


@pytest.mark.parametrize("poisoning", ["data", "training"])
def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(parts: Parts, tmp_path: Path, poisoning: Poisoning) -> None:
    whole = trained(parts, poisoning)
    checkpoint = tmp_path / "net.checkpoint"

    def pull_the_plug(_what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mnist_dense(width=16)
    with pytest.raises(KeyboardInterrupt):
        fit(net, parts.attacker, ATTACK, poisoning, SCHEDULE, 1, checkpoint, pull_the_plug)
    assert checkpoint.is_file()
    assert trained(parts, poisoning, checkpoint=checkpoint) == whole


def test_the_seed_decides_and_the_global_random_state_stays(parts: Parts) -> None:
    before = torch.get_rng_state()
    first, again, other = trained(parts), trained(parts), trained(parts, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other
