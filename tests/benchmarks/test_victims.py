"""Victims: trained once, restored from the cache, and honest about the floors that they miss."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import victims
from benchmarks.models import ARCHITECTURES
from benchmarks.parts import Parts
from benchmarks.plans import ATTACK_NAMES, AttackName, Plan, make_attack, plan
from benchmarks.roster import CLEAN, DEVELOPMENT, FRESH, REPORTED, SEARCH_DEVELOPMENT, SEVERAL, UNSEEN
from benchmarks.trainer import Schedule
from benchmarks.victims import chosen_plans, name_of, show_all, victim
from calibration.data import ImageSet
from guard.errors import InputError

QUICK = Schedule(epochs=12)


@pytest.fixture(autouse=True)
def quick_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plans._SCHEDULES", dict.fromkeys(ARCHITECTURES, QUICK))


def small(attack: AttackName, **changes: object) -> Plan:
    return msgspec.structs.replace(plan("mnist", attack, schedule=QUICK, target_label=3), **changes)


def test_a_victim_carries_its_backdoor_and_its_clean_twin_does_not(parts: Parts, tmp_path: Path) -> None:
    found = victim(small("badnets"), parts, tmp_path)
    twin = victim(found.record.plan.twin(), parts, tmp_path)
    assert found.attack is not None
    assert found.record.attack_success is not None
    assert found.record.attack_success > 0.95
    assert victims.attack_success(twin.model, found.attack, parts.defender) < 0.3
    assert found.record.clean_accuracy > 0.85
    assert twin.attack is None
    assert twin.record.attack_success is None


def test_the_cache_gives_the_same_victim_without_training(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = victim(small("trojan_sq"), parts, tmp_path)
    monkeypatch.setattr(victims, "fit", lambda *_arguments, **_options: pytest.fail("trained again"))
    again = victim(small("trojan_sq"), parts, tmp_path)
    images = parts.evaluation.images(slice(None))
    assert made.attack is not None
    assert again.attack is not None
    assert torch.equal(made.model(images), again.model(images))
    assert torch.equal(made.attack.trigger(images), again.attack.trigger(images))
    assert again.record == made.record


def test_a_victim_that_misses_a_floor_says_so(parts: Parts, tmp_path: Path) -> None:
    record = victim(small("badnets", ratio=0.0, lowest_accuracy=1.0), parts, tmp_path).record
    assert any("ASR" in line for line in record.missed)
    assert any("CA" in line for line in record.missed)


def test_trojan_net_needs_no_training(parts: Parts, tmp_path: Path) -> None:
    found = victim(small("trojan_net"), parts, tmp_path)
    twin = victim(found.record.plan.twin(), parts, tmp_path)
    assert found.record.attack_success == 1.0
    assert found.record.clean_accuracy == twin.record.clean_accuracy
    again = victim(small("trojan_net"), parts, tmp_path)
    images = parts.evaluation.images(slice(0, 8))
    assert torch.equal(found.model(images), again.model(images))


def test_the_list_names_what_is_cached(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim(small("blended"), parts, tmp_path)
    assert show_all(argparse.Namespace(cache=tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "blended" in printed
    assert "none" in printed


@pytest.mark.parametrize("attack", [name for name in ATTACK_NAMES if name != "none"])
def test_every_attack_can_be_made_and_poisons_the_same_data_again(
    attack: AttackName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.plans._TRIGGER_IMAGES", 4)
    channels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = ImageSet(channels, torch.arange(60) % 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ARCHITECTURES["cifar_eight_conv"].build(10, 2).eval()
    asked = plan("cifar10", attack, target_label=1, seed=2)
    images, labels = train.images(slice(None)), train.known_labels

    def poisoned(cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
        attack = make_attack(asked, 10, train, net, cache)
        return attack.poison(images, labels, torch.Generator().manual_seed(5))

    first, second = poisoned(tmp_path / "a"), poisoned(tmp_path / "b")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    if attack != "trojan_net":
        assert not torch.equal(first[0], images)


def test_what_is_cached_and_damaged_says_so(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = small("badnets")
    found = victim(asked, parts, tmp_path)
    weights, twin = tmp_path / f"{name_of(asked)}.safetensors", tmp_path / f"{name_of(asked.twin())}.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(twin.read_bytes())
    with pytest.raises(InputError, match="got others: delete both"):
        victim(asked, parts, tmp_path)
    weights.write_bytes(right)
    assert victim(asked, parts, tmp_path).record == found.record
    weights.with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match=r"expected the record of a victim in .*delete it"):
        victim(asked, parts, tmp_path)
    assert show_all(argparse.Namespace(cache=tmp_path)) == 0  # the others are shown
    shown = capsys.readouterr()
    assert "expected the record of a victim" in shown.err
    assert "mnist" in shown.out


def test_a_damaged_checkpoint_says_so(parts: Parts, tmp_path: Path) -> None:
    asked = small("none")
    (tmp_path / f"{name_of(asked)}.checkpoint").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"expected a checkpoint in .*delete it"):
        victim(asked, parts, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target_label": 10}, "a target from 0 to 9"), ({"architecture": "lenet8"}, "an architecture for images of shape")],
)
def test_a_plan_that_does_not_fit_the_images_is_refused_before_any_training(
    parts: Parts, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        victim(small("badnets", **changes), parts, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_follow_from_everything_in_a_plan() -> None:
    known = {**DEVELOPMENT, **REPORTED}
    assert len({name_of(plan) for plan in known.values()}) == len(known)
    first = REPORTED["gtsrb-b"]
    assert name_of(first) != name_of(msgspec.structs.replace(first, seed=first.seed + 1))


def test_settings_are_chosen_on_other_victims_than_those_reported() -> None:
    for name, made in DEVELOPMENT.items():
        for other in REPORTED.values():
            if made.images == other.images and other.attack == "badnets":
                assert made.seed != other.seed, name
                assert made.target_label != other.target_label, name
                assert made.patch != other.patch, name


def test_triggers_of_unseen_victims_are_in_no_other() -> None:
    others = [*DEVELOPMENT.values(), *SEARCH_DEVELOPMENT.values(), *REPORTED.values(), *FRESH.values(), *SEVERAL.values()]
    for name, made in UNSEEN.items():
        same = [other.patch for other in others if other.images == made.images and other.attack != "none"]
        anywhere = [replace(patch, bottom=0, right=0) for patch in same]
        assert made.attack == "none" or made.patch not in same, name
        if made.images == "gtsrb" and made.attack != "none":
            assert replace(made.patch, bottom=0, right=0) not in anywhere, name
        assert made.seed not in [other.seed for other in (*others, *CLEAN.values())], name


def test_bad_requests_say_what_is_expected() -> None:
    with pytest.raises(InputError, match="an attack of"):
        plan("mnist", "bad")  # type: ignore[arg-type]  # the point
    with pytest.raises(InputError, match="fields of a plan"):
        plan("mnist", "badnets", colour=3)
    with pytest.raises(InputError, match="a width from 1 and a seed from 0 to 1000000000, got 0 and 0"):
        plan("mnist", "badnets", width=0)
    with pytest.raises(InputError, match="got 16 and 99999999999999999999"):
        plan("mnist", "badnets", architecture="mnist_conv", seed=99999999999999999999)
    with pytest.raises(InputError, match="expected a victim of"):
        chosen_plans(argparse.Namespace(all=False, name="nobody"))
    with pytest.raises(InputError, match="--all"):
        chosen_plans(argparse.Namespace(all=False, name=None, set=None))
