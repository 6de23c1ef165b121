"""A repair's figures in words, for tables and pages."""

from __future__ import annotations

from calibration.repair.dhbe_settings import ALIKE
from calibration.repair.record import RepairFigures
from guard.preprocessors import AnyPreprocessor, Gym

_ALARM = 0.5  # a learnt trigger that works less often is none
_KEPT = 0.25  # old answers: more than false alarms explain, of which a calibrated guard makes few


def figure_rows(figures: RepairFigures) -> list[tuple[str, ...]]:
    """What was measured; names and values."""
    rows: list[tuple[str, ...]] = []
    if figures.clean_accuracy_before is not None and figures.clean_accuracy_after is not None:
        rows.append(("clean accuracy before", f"{figures.clean_accuracy_before:.2%}"))
        after = f"{figures.clean_accuracy_after:.2%}"
        if figures.clean_accuracy_interval is not None:
            low, high = figures.clean_accuracy_interval
            after += f" ({100.0 * low:.1f} to {100.0 * high:.1f})"
        rows.append(("clean accuracy after", after))
    if figures.measured:
        rows.append(("agreement with the original", f"{figures.agreement:.2%}"))
    if figures.forgotten_labels:
        rows.append(("labels that the copy hardly gives any more", ", ".join(map(str, figures.forgotten_labels))))
    if figures.generated_agreement is not None:
        rows.append(("agreement on generated samples", f"{figures.generated_agreement:.2%}"))
    if figures.generated_steadiness is not None:
        rows.append(("generated samples that no patch changes", f"{figures.generated_steadiness:.2%}"))
    if figures.generated_foremost is not None:
        rows.append(("generated samples with the original's foremost label", f"{figures.generated_foremost:.2%}"))
    if figures.attack_success_seen_after is not None:
        rows.append(("quarantined images that keep their old answer", f"{figures.attack_success_seen_after:.2%}"))
    if figures.generated_triggers_work is not None:
        what = "learnt trigger works on the original" if figures.rounds else "modelled triggers work on the original, at least"
        rows.append((what, f"{figures.generated_triggers_work:.2%}"))
    if figures.recovered_success_before is not None and figures.recovered_success_after is not None:
        rows.append(("recovered triggers work on the original, at most", f"{figures.recovered_success_before:.2%}"))
        rows.append(("recovered triggers work after, at most", f"{figures.recovered_success_after:.2%}"))
    found = figures.verification
    if found is not None and found.rescan_infected is not None:
        rows.append(("labels that a rescan finds infected, by masks", ", ".join(map(str, found.rescan_infected)) or "none"))
    if found is not None and found.recovered_success is not None:
        shown = ", ".join(f"{share:.2%}" for share in found.recovered_success)
        rows.append(("recovered triggers work, once, 4 and 9 times", shown))
    if found is not None and found.planted_success_before is not None and found.planted_success_after is not None:
        rows.append((f"red team: {found.planted} works, before", f"{found.planted_success_before:.2%}"))
        rows.append(("after the same repair", f"{found.planted_success_after:.2%}"))
    if figures.measured:
        rows.append(("clean images, of which held out", f"{figures.clean_images}, {figures.held_out_clean}"))
    if figures.quarantined_images:
        rows.append(("quarantined, of which held out", f"{figures.quarantined_images}, {figures.held_out_quarantined}"))
    return [*rows, ("seconds", f"{figures.seconds:.0f}")]


def remarks(figures: RepairFigures, preprocessor: AnyPreprocessor | None) -> list[str]:
    """What must be said with them.

    Args:
        figures: Of a repair.
        preprocessor: That the model was tuned for.
    """
    said = list(figures.said)
    if preprocessor is not None:
        said.append(
            f"Accuracy after is through the preprocessor that the model was tuned for ({preprocessor_words(preprocessor)}); "
            "profiles made of this folder use it."
        )
    if not figures.measured:
        said.append(
            "No accuracy was measured, as there were no clean images. Agreement is of generated samples, which need not look "
            "like the model's images, and says little: measure the model before you use it, or repair again with --data."
        )
    elif figures.generated_agreement is not None:
        said.append("The clean images were not learnt from: all of them measured the repair.")
    if figures.measured and figures.clean_accuracy_before is None:
        said.append("The clean images have no labels: the original's own answers to them stood in for these.")
    recovered = figures.recovered_success_after
    if figures.attack_success_seen_after is None and recovered is None:
        said.append(
            "Nothing was quarantined, so that what became of the attack was not measured."
            if figures.measured
            else "Whether a backdoor is gone was not measured, and no figure here tells: scan the copy once you have images."
        )
    elif figures.attack_success_seen_after is None:
        said.append("The attack was measured by the triggers that a scan recovered; the attacker's own may differ.")
    elif 0.0 < figures.attack_success_seen_after <= _KEPT:
        said.append("False alarms among the quarantined images keep their old answer, and should.")
    if figures.rounds and figures.generated_triggers_work is None:
        said.append(
            "The quarantined images got all of the model's labels, so that whether the learnt trigger works can't be told."
        )
    reasons = doubts(figures)
    return [*said, *reasons[:-1], *(f"{reason} Don't rely on this repair." for reason in reasons[-1:])]


def doubts(figures: RepairFigures) -> list[str]:
    """Why a repair is not to be relied on, in sentences; none where nothing speaks against it."""
    said: list[str] = []
    recovered = figures.recovered_success_after
    if figures.forgotten_labels:
        labels = ", ".join(map(str, figures.forgotten_labels))
        said.append(
            f"The copy hardly gives label {labels} any more, on clean images of it either: that a trigger to it fails proves "
            "nothing."
        )
    if _learnt_none(figures) and not figures.rounds:
        said.append(
            "The triggers that were modelled hardly work on the original, so that hardly any was unlearnt: there may be "
            "no backdoor for that label, or not in that place."
        )
    elif _learnt_none(figures):
        said.append(
            "The trigger that was learnt hardly works on the original: either the quarantined images are mostly false alarms, "
            "or their trigger is one that was not learnt."
        )
    elif recovered is not None and recovered > _KEPT:
        said.append("A recovered trigger still works on too many held-out images.")
    elif figures.attack_success_seen_after is not None and figures.attack_success_seen_after > _KEPT:
        said.append(
            "Too many of the held-out quarantined images keep their old answer: either the attack still works, or most of them "
            "are false alarms."
        )
    return said


def is_reliable(figures: RepairFigures) -> bool:
    """Whether the figures give no reason to doubt that the attack is gone."""
    said_little = figures.generated_foremost is not None and figures.generated_foremost >= ALIKE
    return not said_little and not doubts(figures)


def next_steps(figures: RepairFigures) -> tuple[str, ...]:
    """What to do with the copy, or about it: sentences and commands."""
    if not is_reliable(figures):
        return (
            "The figures speak against this copy: keep the original behind its guard, and try another method (--method auto "
            "tries several), more clean images, or more of what was rejected.",
        )
    if not figures.measured:
        return (
            "Nothing has measured this copy. As soon as there are clean images, look for what is left:",
            "guard scan DIR --data CLEAN --out SCAN",
        )
    return (
        "A repair is measured by the triggers that are known: those of a quarantine, of a scan or of a red team. So let the "
        "original go on detecting, as a tripwire, while this copy answers:",
        "guard calibrate DIR --tripwire ORIGINAL --data CLEAN --out PROFILE",
        "guard serve PROFILE then answers over HTTP; guard export PROFILE and guard roll-out bring it to a TorchServe that is "
        "running. Keep the original: a further repair starts from it, not from this copy.",
    )


def _learnt_none(figures: RepairFigures) -> bool:
    return figures.generated_triggers_work is not None and figures.generated_triggers_work < _ALARM


def preprocessor_words(preprocessor: AnyPreprocessor | None) -> str:
    """`gym, medians 5x5, 4 views`."""
    if preprocessor is None:
        return "none"
    name = type(preprocessor).__struct_config__.tag
    if not isinstance(preprocessor, Gym):
        return str(name)
    kernel, views = preprocessor.kernel, preprocessor.views
    median = "no median" if kernel == 1 else f"medians {kernel}x{kernel}"
    return f"{name}, {median}" + (f", {views} views" if views > 1 else "")
