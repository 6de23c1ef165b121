"""Checkpoints: what is written is read back, other work's are left alone, and damage is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.checkpoints import Checkpoints
from guard.errors import CheckpointError


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return net, optimizer


def test_weights_optimizer_arrays_and_facts_come_back(tmp_path: Path) -> None:
    net, optimizer = trained()
    checkpoints = Checkpoints(tmp_path / "c", ["key", 1])
    checkpoints.save("a", 7, {"net": net}, {"adam": optimizer}, {"history": torch.arange(3)}, {"best": 0.5})
    other, other_optimizer = trained(seed=1)
    found = Checkpoints(tmp_path / "c", ["key", 1]).load("a", {"net": other}, {"adam": other_optimizer})
    assert found is not None
    step, arrays, facts = found
    assert (step, arrays["history"].tolist(), facts) == (7, [0, 1, 2], {"best": 0.5})
    for model, optim in ((net, optimizer), (other, other_optimizer)):  # they go on alike
        optim.zero_grad()
        model(torch.full((1, 3), 2.0)).sum().backward()
        optim.step()
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True))


def test_other_work_is_not_gone_on_with(tmp_path: Path) -> None:
    net, _ = trained()
    Checkpoints(tmp_path / "c", "one").save("a", 1, {"net": net})
    assert Checkpoints(tmp_path / "c", "two").load("a", {"net": net}) is None
    assert Checkpoints(tmp_path / "c", "one").load("b", {"net": net}) is None
    assert Checkpoints(tmp_path / "nowhere", "one").load("a") is None


@pytest.mark.parametrize("damage", [b"", b"junk", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_one_is_told_and_not_half_read(tmp_path: Path, damage: bytes) -> None:
    net, _ = trained()
    checkpoints = Checkpoints(tmp_path / "c", "one")
    checkpoints.save("a", 1, {"net": net})
    file = tmp_path / "c" / "a.safetensors"
    file.write_bytes(damage or file.read_bytes()[:40])
    before = [value.clone() for value in net.parameters()]
    if damage.endswith(b"{}      "):  # a valid file of other work
        assert checkpoints.load("a", {"net": net}) is None
    else:
        with pytest.raises(CheckpointError, match="got a damaged one: delete"):
            checkpoints.load("a", {"net": net})
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def test_processes_that_do_not_lead_write_and_remove_nothing(tmp_path: Path) -> None:
    net, _ = trained()
    silent = Checkpoints(tmp_path / "c", "one", writes=False)
    silent.save("a", 1, {"net": net})
    assert not (tmp_path / "c").exists()
    Checkpoints(tmp_path / "c", "one").save("a", 1, {"net": net})
    silent.remove()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock", "a.safetensors"]
    Checkpoints(tmp_path / "c", "one").remove()
    assert not (tmp_path / "c").exists()


def test_time_before_an_interruption_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("calibration.checkpoints.time.monotonic", lambda: now)
    first = Checkpoints(tmp_path, "work")
    assert not first.found()
    now = 130.0
    first.save("tuning", 1)
    now = 500.0  # interrupted, and taken up much later
    again = Checkpoints(tmp_path, "work")
    assert again.found()
    now = 512.0
    assert again.seconds == pytest.approx(42.0)
    other = Checkpoints(tmp_path, "other work")
    assert not other.found()
    assert other.seconds == 0.0


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux to see what is mapped")
def test_what_is_loaded_does_not_hold_the_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", 1)
    checkpoints.save("a", 1, arrays={"large": torch.ones(1 << 18)})
    found = checkpoints.load("a")
    assert found is not None
    assert "a.safetensors" not in Path("/proc/self/maps").read_text(encoding="utf-8")  # its pages would count as ours
    assert float(found[1]["large"].sum()) == float(1 << 18)


def test_what_can_not_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "work", "key")
    (tmp_path / "work" / ".net.partial").mkdir(parents=True)  # stands in for a full disk
    with pytest.raises(CheckpointError, match=r"expected room for checkpoints in .*work, got: "):
        checkpoints.save("net", 1, arrays={"weights": torch.ones(2)})


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    net, _ = trained()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("precious")
    checkpoints = Checkpoints(tmp_path / "c", "one")
    checkpoints.save("a", 1, {"net": net})
    checkpoints.remove()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["notes.txt"]


def test_two_works_do_not_share_a_folder(tmp_path: Path) -> None:
    """Each would go on from the other's checkpoints, or delete them under its hands."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from calibration.checkpoints import Checkpoints\n"
        "Checkpoints(Path(sys.argv[1]), 'other').save('a', 1, {'net': torch.nn.Linear(2, 2)})\n"
        "print('there', flush=True)\n"
        "time.sleep(60)\n"
    )
    net, _ = trained()
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "c"], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"there\n"
            mine = Checkpoints(tmp_path / "c", "mine")
            with pytest.raises(CheckpointError, match="another process that works there: wait until it has ended"):
                mine.save("a", 1, {"net": net})
            mine.remove()
            assert (tmp_path / "c" / "a.safetensors").is_file()
        finally:
            other.kill()
    for _ in range(2):  # once more is locked once more
        mine.save("a", 1, {"net": net})
        assert (tmp_path / "c" / ".lock").is_file()
        mine.remove()
        assert not (tmp_path / "c").exists()


def test_parts_of_a_work_keep_theirs_apart_and_end_with_it(tmp_path: Path) -> None:
    net, _ = trained()
    whole = Checkpoints(tmp_path / "c", "one")
    part = whole.within("scan", "of these weights")
    whole.save("a", 1, {"net": net})
    part.save("a", 2, {"net": net})
    part.within("again").save("a", 3, {"net": net})
    resumed = Checkpoints(tmp_path / "c", "one")
    stages = [resumed, resumed.within("scan", "of these weights"), resumed.within("scan", "of these weights").within("again")]
    found = [item.load("a") for item in stages]
    assert [None if item is None else item[0] for item in found] == [1, 2, 3]
    assert resumed.found()
    assert resumed.within("scan", "of other weights").load("a") is None
    assert Checkpoints(tmp_path / "c", "two").within("scan", "of these weights").load("a") is None
    whole.remove()
    assert not (tmp_path / "c").exists()


def test_what_is_there_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    net, _ = trained()
    Checkpoints(tmp_path / "c", "one").tell(lambda what, *_: told.append(what))
    Checkpoints(tmp_path / "c", "one").within("scan").save("a", 1, {"net": net})
    Checkpoints(tmp_path / "c", "one").tell(lambda what, *_: told.append(what))
    Checkpoints(tmp_path / "c", "two").tell(lambda what, *_: told.append(what))
    assert told == ["going on from c", "beginning anew: c is of another model, other images or other options"]
