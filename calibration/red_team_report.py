"""What the red team found, for people: sentences, tables, a picture, a page."""

from __future__ import annotations

from matplotlib.figure import Figure

from calibration.page import Section, percent, png, render
from calibration.red_team import BLIND, RedTeam
from calibration.settings import named
from calibration.trials import Figures, Planted, Setting

_CHOSEN, _OTHER = "#c8553d", "#3b6ea8"

TITLE = "Red team: planted triggers accepted (FAR), with 95% intervals in percent"
"""Of the table of settings."""


def red_team_report(found: RedTeam) -> bytes:
    """The page of `guard red-team`, HTML in one file."""
    lead = (
        f"{len(found.planted)} known triggers were planted in copies of the model, and every setting was compared on them at a "
        f"false rejection rate of {found.frr:.2%}. Recommended: {found.chosen}."
    )
    return render("Red team", lead, red_team_sections(found))


def red_team_sections(found: RedTeam) -> list[Section]:
    """The same as parts of another page."""
    header, rows = far_table(found)
    chosen = next((number for number, row in enumerate(rows) if row[0].startswith("*")), None)
    plants_header, plants = plants_table(found)
    caption = (
        "Share of triggered inputs that would be accepted, with 95% intervals; left is better. Red: the chosen setting. "
        "Where there is no dot, the setting was not tried on that trigger."
    )
    return [
        Section(
            "Red team: triggered inputs accepted, by setting and planted trigger", remarks(found), far_figure(found), caption
        ),
        Section(TITLE, header=header, rows=rows, marked=chosen),
        Section("Red team: the copies", header=plants_header, rows=plants),
    ]


def remarks(found: RedTeam) -> list[str]:
    """What must be said with the figures."""
    said = [
        f"These are estimates for the planted attacks ({found.tuning_images} clean images planted them, "
        f"{found.choosing_images} set the thresholds): "
        "no guarantee for other attacks, nor for one that is already in the model."
    ]
    expected = [(plant.name, _figures(plant, found.chosen)) for plant in found.planted]
    blind = [f"{name} ({item.far.value:.0%} accepted)" for name, item in expected if item and item.far.value >= BLIND]
    if blind:
        said.append(f"STRIP is blind here, even with the chosen setting, to: {'; '.join(blind)}.")
    if found.left_out:
        said.append(f"Left out, for want of clean images: {', '.join(named(*item) for item in found.left_out)}.")
    silent = [f"{plant.name} ({plant.attack_success.value:.0%})" for plant in found.planted if not plant.figures]
    if silent:
        said.append(f"The copies did not learn, so that nothing is known about: {'; '.join(silent)}.")
    return said


def far_table(found: RedTeam) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header, and a row per setting with a column per planted trigger; `*` marks the chosen setting."""
    rows = []
    for setting in _settings(found):
        mark = "* " if setting == found.chosen else "  "
        rows.append((f"{mark}{setting}", *(_rate(plant, setting) for plant in found.planted)))
    return ("  setting", *(plant.name for plant in found.planted)), rows


def plants_table(found: RedTeam) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header, and a row per planted trigger: how well the copy learned it."""
    header = ("planted trigger", "target label", "attack success", "clean accuracy of the copy", "say in the choice")
    return header, [
        (
            plant.name,
            "all" if plant.target_label is None else str(plant.target_label),
            percent(plant.attack_success),
            f"{plant.clean_accuracy:.1%}",
            plant.say if plant.figures else "none",
        )
        for plant in found.planted
    ]


def far_figure(found: RedTeam) -> bytes:
    """A panel per planted trigger, a dot with its interval per setting, as PNG."""
    settings = _settings(found)
    figure = Figure(figsize=(1.6 + 1.5 * len(found.planted), 1.1 + 0.3 * max(1, len(settings))), layout="constrained")
    panels = figure.subplots(1, len(found.planted), sharex=True, sharey=True, squeeze=False)[0]
    for axes, plant in zip(panels, found.planted, strict=True):
        axes.set_title(plant.name, fontsize=10)
        axes.set_xlim(-4.0, 104.0)
        axes.set_xticks([0.0, 50.0, 100.0])
        axes.set_yticks(range(len(settings)), [str(setting) for setting in settings])
        axes.set_ylim(len(settings) - 0.5, -0.5)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        for row, setting in enumerate(settings):
            figures, colour = _figures(plant, setting), _CHOSEN if setting == found.chosen else _OTHER
            if figures is not None:
                ends = [100.0 * figures.far.low, 100.0 * figures.far.high]
                axes.plot(ends, [row, row], color=colour, linewidth=1.6, solid_capstyle="round", clip_on=False)
                axes.plot([100.0 * figures.far.value], [row], "o", color=colour, markersize=5, clip_on=False)
        if not plant.figures:
            axes.text(0.5, 0.5, "not learned", transform=axes.transAxes, ha="center", va="center", color="#666666")
    figure.supxlabel("triggered inputs accepted (FAR, %)", fontsize=10)
    return png(figure)


def _settings(found: RedTeam) -> list[Setting]:
    """All that were tried, blends in the order in which they came."""
    tried = list(dict.fromkeys(item.setting for plant in found.planted for item in plant.figures))
    blends = list(dict.fromkeys((setting.blend, setting.alpha) for setting in tried))
    return sorted(tried, key=lambda setting: (blends.index((setting.blend, setting.alpha)), setting.overlays))


def _rate(plant: Planted, setting: Setting) -> str:
    figures = _figures(plant, setting)
    if figures is None:
        return "not tried" if plant.figures else "not learned"
    return percent(figures.far)


def _figures(plant: Planted, setting: Setting) -> Figures | None:
    return next((item for item in plant.figures if item.setting == setting), None)
