"""What `guard calibrate` shows in the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec
import typer

from cli.display import show_rows
from cli.inputs import tell_skipped
from cli.red_team import show_red_team
from cli.repaired import show_repaired
from guard.detectors import ActivationFilter, Strip
from guard.readings import reading_of
from guard.verdict import method_of

if TYPE_CHECKING:
    from calibration import Calibration, RedTeam
    from calibration.detectors import DetectorCalibration
    from calibration.repair.record import RepairRecord


_LOW = 0.7  # clean accuracy at which a wrong normalisation or order of labels is worth a word
_NEARLY_ALL = 1.9  # of an L1 distance of two distributions, which is 2 at most


@final
@dataclass(frozen=True)
class Calibrated:
    """A profile that was written, and what led to it.

    Attributes:
        calibration: What it holds.
        out: Its folder.
        skipped: Files that could not be read, each with the reason.
        repaired: What is known of the model where it is a repaired one.
        repaired_now: Whether that was done on the way.
        learnt: Clean images that it learnt from, and that flattered nothing.
        red_team: What chose the setting.
    """

    calibration: Calibration
    out: Path
    skipped: tuple[tuple[str, str], ...]
    repaired: RepairRecord | None
    repaired_now: bool
    learnt: int
    red_team: RedTeam | None


def show_calibrated(made: Calibrated, as_json: bool) -> None:
    """Print it."""
    out, found = made.out, made.red_team
    if as_json:
        typer.echo(msgspec.json.encode(_summary(made)).decode())
        return
    tell_skipped(made.skipped)
    if made.repaired is not None and made.repaired_now:
        show_repaired(made.repaired, "Repaired model", ("report", str(out / "repair.html")))
        typer.echo()
    show_rows(f"Profile {out}", _rows(made))
    if found is not None:
        show_red_team(found)
    _show_remarks(made)


def _rows(made: Calibrated) -> list[tuple[str, str]]:
    from calibration.repair.figures import preprocessor_words
    from calibration.thresholds import joint_rate

    calibration, profile = made.calibration, made.calibration.profile
    spec, model = profile.input, profile.model
    rate = joint_rate(calibration.thresholds)
    interval = "95% interval" if len(calibration.parts) == 1 else "bounds"
    rows = [
        (
            "model",
            f"{model.kind}, {model.num_classes} classes, takes {spec.container} {spec.layout} {spec.dtype}, {model.output}",
        ),
        *([("PyTorch runs it", calibration.runs)] if calibration.runs else []),
        ("clean accuracy", _accuracy(made)),
    ]
    if made.red_team is not None:
        rows.append(("setting", f"{made.red_team.chosen}, chosen by the red team"))
    if profile.tripwire is not None:
        rows.append(("tripwire", "the original detects, the repaired model answers"))
    if profile.preprocessor is not None:
        rows.append(("answers through", preprocessor_words(profile.preprocessor)))
    return [
        *rows,
        *(_threshold_row(part) for part in calibration.parts),
        ("false rejections", f"{rate.value:.2%} asked for; {interval} {rate.low:.2%} to {rate.high:.2%}"),
        ("passes, clean input", f"{calibration.mean_passes:.1f} of {calibration.most_passes} on average{_stops(calibration)}"),
        ("report", str(made.out / "report.html")),
    ]


def _stops(calibration: Calibration) -> str:
    for strip in calibration.strips:
        if strip.passes != "exact":
            return ", by boundaries" if strip.votes is None else f", by {strip.votes} votes of {len(strip.overlays)}"
    return ""


def _threshold_row(part: DetectorCalibration) -> tuple[str, str]:
    """`entropy threshold, logit` of several blends; `mean activation threshold, 7` of the filter for label 7."""
    name, limit, reading = part.detector.name, part.threshold, reading_of(part.detector.name)
    which = name.removeprefix(method_of(name)).replace("-", ", ")
    return f"{reading.quantity} threshold{which}", f"{reading.text(limit.value)} ({limit.method}, {limit.images} clean images)"


def _accuracy(made: Calibrated) -> str:
    accuracy = made.calibration.profile.clean_accuracy
    if accuracy is None:
        return "unknown" if made.learnt else "unknown, no labels"
    seen = f", {made.learnt} images left out, which the repair has seen" if made.learnt else ""
    return f"{accuracy:.2%} of {made.calibration.measured}{seen}"


def _show_remarks(made: Calibrated) -> None:
    from calibration.accuracy import NEAR_CHANCE, near_chance
    from guard.records import FeatureSqueezingRecord

    profile = made.calibration.profile
    model, accuracy = profile.model, profile.clean_accuracy
    if made.repaired is not None and profile.tripwire is None:
        typer.echo(
            "note: detectors look at the repaired model, where what may be left of a backdoor is hard to see; with --tripwire "
            "ORIGINAL the original goes on detecting",
            err=True,
        )
    for detector in profile.detectors:
        if isinstance(detector, FeatureSqueezingRecord) and detector.threshold.value >= _NEARLY_ALL:
            typer.echo(
                f"warning: feature squeezing turns the answers to many clean images round, so that its threshold is "
                f"{detector.threshold.value:.2f} of at most 2: it will hardly reject any, and takes its share of the rate",
                err=True,
            )
    for limit in (detector.threshold for detector in profile.detectors):
        if limit.method == "normal" and not limit.frr_low <= limit.frr <= limit.frr_high:
            typer.echo(
                f"warning: {limit.frr:.2%} false rejections are asked for, {limit.frr_low:.2%} to {limit.frr_high:.2%} seen: "
                "clean scores are not normally distributed; --method conformal keeps to the rate",
                err=True,
            )
    if model.output == "labels":
        typer.echo("warning: the model returns labels only, which tells triggers less well apart than probabilities", err=True)
    if accuracy is not None and near_chance(accuracy, model.num_classes):
        typer.echo(f"warning: clean accuracy is near chance: {NEAR_CHANCE}", err=True)
        return
    if accuracy is not None and accuracy < _LOW:
        typer.echo(
            f"note: if the model is known to be right on more than {accuracy:.0%} of such images, {NEAR_CHANCE}", err=True
        )
    typer.echo(f"next: guard check {made.out} IMAGE, guard serve {made.out}")
    if made.red_team is None and not any(isinstance(part.detector, ActivationFilter) for part in made.calibration.parts):
        typer.echo(
            "Which triggers it finds, clean images don't tell: guard red-team estimates it, guard scan looks for one.", err=True
        )


def _summary(made: Calibrated) -> dict[str, object]:
    """What `--json` prints.

    `entropy_threshold` is the first STRIP's, `detectors` has each detector's. `frr`, `overlays` and `mean_passes` are of all
    together; `frr_low` and `frr_high` are the 95% interval for one detector, and bounds for several, see `joint_rate`.
    """
    from calibration.thresholds import joint_rate

    calibration, found = made.calibration, made.red_team
    rate = joint_rate(calibration.thresholds)
    detectors = [_detector(part) for part in calibration.parts]
    return {
        "profile": str(made.out),
        "entropy_threshold": next((item["entropy_threshold"] for item in detectors if "entropy_threshold" in item), None),
        "detectors": detectors,
        "frr": rate.value,
        "frr_low": rate.low,
        "frr_high": rate.high,
        "images": calibration.thresholds[0].images,
        "overlays": sum(len(strip.overlays) for strip in calibration.strips),
        "mean_passes": calibration.mean_passes,
        "memory_format": calibration.execution.memory_format,
        "precision": calibration.execution.precision,
        "turned_verdicts": calibration.turned,
        "clean_accuracy": calibration.profile.clean_accuracy,
        "tripwire": calibration.profile.tripwire is not None,
        "learnt_images": made.learnt,
        "skipped": [{"file": name, "reason": reason} for name, reason in made.skipped],
        **({"repair": msgspec.to_builtins(made.repaired)} if made.repaired is not None and made.repaired_now else {}),
        **({"red_team": _red_teamed(found)} if found is not None else {}),
    }


def _detector(part: DetectorCalibration) -> dict[str, object]:
    """STRIP's threshold is on an entropy in bits, the others' are on their scores."""
    detector, limit = part.detector, part.threshold
    rate = {"frr": limit.frr, "frr_low": limit.frr_low, "frr_high": limit.frr_high}
    own: dict[str, object]
    match detector:
        case Strip(blend=blend, alpha=alpha, overlays=overlays, passes=passes, votes=votes):
            own = {
                "blend": blend,
                "alpha": alpha,
                "entropy_threshold": -limit.value,
                "overlays": len(overlays),
                "passes": passes,
                "votes": votes,
            }
        case ActivationFilter(neurons=neurons):
            own = {"threshold": limit.value, "neurons": neurons.tolist()}
        case _:
            own = {"threshold": limit.value}
    return {"name": detector.name, **own, **rate}


def _red_teamed(found: RedTeam) -> dict[str, object]:
    """The chosen setting, and what to expect of it on each planted trigger; null where the copy did not learn it."""
    planted: list[dict[str, object]] = []
    for plant in found.planted:
        far = next((item.far for item in plant.figures if item.setting == found.chosen), None)
        low, high = (None, None) if far is None else (far.low, far.high)
        planted.append({"name": plant.name, "far": far and far.value, "far_low": low, "far_high": high})
    chosen = found.chosen
    return {"blend": chosen.blend, "alpha": chosen.alpha, "overlays": chosen.overlays, "planted": planted}
