"""A page to look at: what was calibrated or measured, and the distributions behind it."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.calibrate import Calibration
from calibration.detectors import DetectorCalibration
from calibration.evaluation import Evaluation, Judged
from calibration.histograms import Seen, histogram_sections, judged_scores
from calibration.page import Section, montage, render
from calibration.repair.figures import preprocessor_words
from calibration.statistics import Estimate
from calibration.thresholds import joint_rate
from guard import Guard
from guard.detectors import ActivationFilter, FeatureSqueezing, Strip
from guard.readings import reading_of

FIGURES = {
    "clean_accuracy": "Clean accuracy, detectors off",
    "guarded_clean_accuracy": "Clean accuracy, guarded",
    "attack_success_rate": "Attack success, detectors off",
    "guarded_attack_success_rate": "Attack success, guarded",
    "frr": "Clean inputs rejected (FRR)",
    "far": "Triggered inputs accepted (FAR)",
    "far_successful": "FAR among successful attacks",
    "auroc": "AUROC of the score",
}
"""The figures of an evaluation, and what they are called on a page."""

SPEED = ("images at once", "model alone, ms an image", "guarded, ms an image", "times", "passes an image")
"""Above `speed_rows`."""


def calibration_report(calibration: Calibration, further: Sequence[Section] = ()) -> bytes:
    """The page that lies beside a profile, HTML in one file; `further` sections come after the pictures."""
    thresholds, strips = calibration.thresholds, calibration.strips
    seen = [Seen(part.detector.name, part.threshold.value, part.scores) for part in calibration.parts]
    limits = " or whose ".join(_limit(part) for part in calibration.parts)
    lead = (
        f"Inputs whose {limits} are rejected. That was set for a false rejection rate of "
        f"{joint_rate(thresholds).value:.2%} from {thresholds[0].images} clean images."
    )
    overlays = "The first overlays, in the order in which they are tried"
    if len(strips) > 1:
        overlays += f"; a row for each of {', '.join(strip.name for strip in strips)}"
    shown = [Section(overlays, picture=_montage(strips))] if strips else []
    return render(
        "Calibration",
        lead,
        [
            *histogram_sections(seen, "clean images", hints=True),
            *shown,
            *further,
            Section("Settings", rows=_settings_rows(calibration)),
            _threshold_section(calibration),
        ],
    )


def evaluation_report(evaluation: Evaluation, guard: Guard, clean: Judged, triggered: Judged | None) -> bytes:
    """The page of an evaluation, HTML in one file.

    Args:
        evaluation: The figures.
        guard: That was evaluated.
        clean: The clean images, as it judged them.
        triggered: The triggered images.
    """
    rows = [(FIGURES[name], _estimate(getattr(evaluation, name))) for name in FIGURES]
    success, guarded = evaluation.attack_success_rate, evaluation.guarded_attack_success_rate
    lead = f"{evaluation.frr.value:.2%} of clean inputs are rejected."
    if success is not None and guarded is not None:
        lead += (
            f" The attack succeeds on {success.value:.2%} of triggered inputs without the guard, {guarded.value:.2%} with it."
        )
    seen = judged_scores(guard, clean, triggered)
    whose = "clean images" if triggered is None else "clean and triggered images"
    limits = [(item.detector, reading_of(item.detector).text(item.threshold, 6)) for item in seen]
    return render(
        "Evaluation",
        lead,
        [
            *histogram_sections(seen, whose),
            Section("Figures, with 95% intervals", rows=rows),
            Section("Thresholds", rows=limits),
            *([Section("Speed, on this machine", header=SPEED, rows=speed_rows(evaluation))] if evaluation.speed else ()),
        ],
    )


def speed_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """What a guard costs, as a table under `SPEED`."""
    return [
        (
            f"{item.at_once}",
            f"{item.model_ms:.2f}",
            f"{item.guarded_ms:.2f}",
            f"{item.times:.1f}",
            f"{item.passes:.1f}",
        )
        for item in evaluation.speed
    ]


def _limit(part: DetectorCalibration) -> str:
    """What makes this detector reject, after "inputs whose"."""
    detector, limit = part.detector, reading_of(part.detector.name).text(part.threshold.value)
    match detector:
        case Strip():
            superimposed = f"{len(detector.overlays)} clean images superimposed by {detector.blend}"
            if detector.votes is not None:
                return f"entropy is over {limit} under fewer than {detector.votes} of {superimposed}"
            if detector.boundaries is None:
                return f"mean entropy under {superimposed} is at most {limit}"
            return (
                f"soft votes come to fewer than {detector.boundaries.votes}, of {superimposed}: a whole one where the entropy "
                f"is {limit} or more, next to none where it is half as much"
            )
        case FeatureSqueezing():
            return f"answer changes by at least {limit} (L1 distance) when they are squeezed"
        case ActivationFilter():
            return f"mean activation of {len(detector.neurons)} neurons ({detector.name}) is at least {limit}"
    return f"score ({detector.name}) is at least {limit}"


def _stops(strip: Strip) -> str:
    if strip.votes is not None:
        return f"when {strip.votes} of {len(strip.overlays)} overlays have voted for the input"
    return "when its verdict is certain" if strip.boundaries is None else "when the votes so far leave little doubt"


def _montage(strips: Sequence[Strip]) -> bytes:
    """The first overlays: two rows of a lone detector's, a row of each of several."""
    if len(strips) > 1:
        return montage([(strip.name, strip.overlays[:10]) for strip in strips])
    overlays = strips[0].overlays
    return montage([("", part) for part in overlays[:20].split(10)])


def _settings_rows(calibration: Calibration) -> list[tuple[str, str]]:
    profile, spec = calibration.profile, calibration.profile.input
    strips = calibration.strips
    rows = [
        ("Model", f"{profile.model.kind}, {profile.model.num_classes} classes, returns {profile.model.output}"),
        *([("PyTorch runs it", calibration.runs)] if calibration.runs else []),
        ("Input", f"{'x'.join(map(str, spec.shape))} (C, H, W), {spec.layout}, {spec.dtype}"),
        ("Detectors", ", ".join(part.detector.name for part in calibration.parts)),
        *([("Blend", " or ".join(f"{strip.blend}, alpha {strip.alpha:g}" for strip in strips))] if strips else []),
        *([("Overlays", str(sum(len(strip.overlays) for strip in strips)))] if strips else []),
        ("Preprocessor", preprocessor_words(profile.preprocessor)),
        ("Detectors look at", "the model" if profile.tripwire is None else "the original of the repaired model (tripwire)"),
        ("Seed", str(profile.seed)),
    ]
    if profile.clean_accuracy is not None:
        rows.append(("Clean accuracy of the model", f"{profile.clean_accuracy:.2%}"))
    rows.append(("Mean forward passes of a clean input", f"{calibration.mean_passes:.1f} of {calibration.most_passes}"))
    if strips:
        rows.append(("STRIP stops early", " or ".join(dict.fromkeys(_stops(strip) for strip in strips))))
    return rows + [(f"Version of {name}", version) for name, version in profile.libraries.items()]


def _threshold_section(calibration: Calibration) -> Section:
    """A column per detector, and one for the guard as a whole where there are several."""
    records, names = calibration.thresholds, [part.detector.name for part in calibration.parts]
    joint = joint_rate(records)
    rows: list[tuple[str, ...]] = [
        (
            "Entropy threshold" if len(calibration.strips) == len(names) else "Threshold",
            *(reading_of(name).text(item.value, 6) for name, item in zip(names, records, strict=True)),
            "",
        ),
        ("Method", *(item.method if item.rank is None else f"{item.method}, rank {item.rank}" for item in records), ""),
        ("False rejection rate asked for", *(f"{item.frr:.2%}" for item in records), f"{joint.value:.2%}"),
        (
            "95% interval of the rate",
            *(f"{item.frr_low:.2%} to {item.frr_high:.2%}" for item in records),
            f"bounds {joint.low:.2%} to {joint.high:.2%}",
        ),
        ("Clean images that set it", *(str(item.images) for item in records), ""),
    ]
    sure = [item.confidence for item in records if item.confidence is not None]
    if sure:
        together = 1.0 - sum(1.0 - item for item in sure)
        rows.append(("Confidence asked for", *(f"{item:.4g}" for item in sure), f"{together:.4g}"))
    if len(names) > 1:
        header = ("", *names, "either of them" if len(names) == 2 else "any of them")
        return Section("Thresholds", header=header, rows=rows)
    return Section("Threshold", rows=[row[:2] for row in rows])


def _estimate(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]"
