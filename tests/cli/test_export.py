"""`guard export --config`: the guard's options get into the archive, or are refused in one line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli.export import _without_guard
from guard import load_profile
from guard.preprocessors import Gym
from guard.profile import TripwireRecord
from handlers.torchserve_gate import Options
from handlers.torchserve_rollout import archive_config
from tests.cli.conftest import Command
from tests.toy import save_toy_profile

CONFIG = """
minWorkers: 2
maxWorkers: 2
batchSize: 8
maxBatchDelay: 2
guard:
  mode: monitor
  latency_budget: 5e-01  # text, by YAML 1.1
  quarantine: /var/lib/guard/quarantine
  quarantine_max_items: 500
  expose_scores: true
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_profile(tmp_path_factory.mktemp("export") / "toy")


def test_the_options_are_in_the_archive(toy: Path, tmp_path: Path, guard: Command) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    run = guard("export", toy, "--out", tmp_path, "--version", "2.0", "--config", tmp_path / "c.yaml")
    assert run.code == 0, run.err
    config = archive_config(tmp_path / "toy.mar")
    assert {key: value for key, value in config.items() if key != "guard"} == {
        "minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 2,
    }  # fmt: skip
    assert Options.read(config) == Options(
        mode="monitor",
        latency_budget=0.5,
        quarantine="/var/lib/guard/quarantine",
        quarantine_max_items=500,
        expose_scores=True,
    )


def test_the_one_in_the_documentation_is_taken_and_names_every_option(toy: Path, tmp_path: Path, guard: Command) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (tmp_path / "c.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert guard("export", toy, "--out", tmp_path, "--config", tmp_path / "c.yaml").code == 0
    section = archive_config(tmp_path / "toy.mar")["guard"]
    assert isinstance(section, dict)
    assert section.keys() == set(Options.__struct_fields__)
    kept = {name: value for name, value in section.items() if name not in ("mode", "on_error", "latency_budget", "quarantine")}
    assert kept == {name: getattr(Options(), name) for name in kept}  # "as above", it says of those that are left out


@pytest.mark.parametrize("option", [("--config", "c.yaml"), ("--version", "2.0")])
def test_what_only_an_archive_has_room_for_is_refused_with_onnx(
    option: tuple[str, str], toy: Path, tmp_path: Path, guard: Command
) -> None:
    run = guard("export", toy, "--format", "onnx", "--out", tmp_path, *option)
    assert f"expected {option[0]} with --format mar, got it with onnx" in run.problem
    assert not list(tmp_path.iterdir())


def test_without_one_an_archive_has_no_config(toy: Path, tmp_path: Path, guard: Command) -> None:
    assert guard("export", toy, "--out", tmp_path).code == 0
    assert archive_config(tmp_path / "toy.mar") == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("guard: {mod: monitor}", "unknown field `mod`"),
        ("guard: {mode: watch}", "expected valid options under `guard:`"),
        ("guard: {quarantine: kept}", "expected an absolute path for quarantine"),
        ("guard: {max_pixels: 0}", "expected valid options under `guard:`"),
        ("guard: {memory_limit: 1}", "expected a memory limit of at least"),
        ("guard: {latency_budget: .nan}", "expected"),
        ("guard: {latency_budget: .inf}", "expected plain values in the model-config"),
        ("guard: [mode]", "expected a model-config in"),
        ("mode: monitor", "unknown field `mode`; the guard's own options go under `guard:`"),
        ("batchsize: 8", "unknown field `batchsize`"),
        ("batchSize: '8'", "Expected `int"),
        ("minWorkers: 2", "expected minWorkers and maxWorkers"),
        ("minWorkers: 2\nmaxWorkers: 1", "expected minWorkers and maxWorkers"),
        ("", "expected a model-config in"),
        ("1: 2", "expected a model-config in"),
        ("guard: [", "expected YAML in"),
        ("day: 2026-02-30", "expected YAML in"),
    ],
)
def test_what_a_worker_would_refuse_or_pass_over(text: str, problem: str, toy: Path, tmp_path: Path, guard: Command) -> None:
    (tmp_path / "c.yaml").write_text(text)
    run = guard("export", toy, "--out", tmp_path / "store", "--config", tmp_path / "c.yaml")
    assert problem in run.problem
    assert len(run.err.strip().splitlines()) == 1
    assert not list((tmp_path / "store").glob("*")), "an archive was made all the same"


def test_other_files_are_told(toy: Path, tmp_path: Path, guard: Command) -> None:
    assert "no such file" in guard("export", toy, "--config", tmp_path / "none.yaml").problem.lower()
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "expected YAML in" in guard("export", toy, "--config", tmp_path / "c.yaml").problem
    problem = guard("export", toy, "--format", "onnx", "--config", tmp_path / "c.yaml").problem
    assert "expected --config with --format mar" in problem


def test_an_onnx_file_is_said_to_be_the_model_alone(toy: Path, tmp_path: Path, guard: Command) -> None:
    run = guard("export", toy, "--format", "onnx", "--out", tmp_path)
    assert run.code == 0, run.err
    assert run.out.strip() == str(tmp_path / "toy.onnx")
    assert "note: this is the model alone, without the guard; it takes NCHW float32" in run.err


def test_what_else_it_lacks_is_said(toy: Path) -> None:
    profile, _ = load_profile(toy)
    spec = msgspec.structs.replace(profile.input, mean=(0.5,), std=(0.25,))
    original = TripwireRecord(model=profile.model, input=profile.input)
    said = _without_guard(msgspec.structs.replace(profile, input=spec, preprocessor=Gym(), tripwire=original))
    assert "the preprocessor that it was tuned for" in said
    assert ", without the original that detects; it takes NCHW float32, less a mean of (0.5,), over (0.25,)" in said
