"""Does a scan tell backdoored models from clean ones? Its verdicts on victims and clean models.

    python -m benchmarks.inspection measure --name gtsrb-b    # one model, trained if it is not cached
    python -m benchmarks.inspection measure --all
    python -m benchmarks.inspection table                     # the committed results as docs/inspection-figures.md holds them

Scans see 1,500 of the defender's images. How often a recovered trigger works is of the evaluation part. The method as it was
published, on the same models, is in `benchmarks.neural_cleanse`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import nn

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import SCANNED
from benchmarks.scans import scanned
from benchmarks.victims import CACHE, Victim, bars, victim
from calibration.attacks import Attack, MultiTarget, Patch
from calibration.data import ImageSet, Progress
from calibration.inspection.record import LabelFinding, ScanFigures, read_scan
from calibration.inspection.search import Search
from calibration.inspection.triggers import Triggers
from calibration.inspection.triggers_file import read_infected
from calibration.statistics import Estimate, proportion
from guard.predictors import wrap

_MOVED, _STEP = 200, 2  # images, pixels
_PLAIN = Search(steps=1008).plain()


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """How good a recovered trigger is.

    Attributes:
        label_index: Its label.
        source_index: Its source; None for all.
        attack_success: On evaluation images.
        overlap: Share of its mask that lies where the true triggers are.
        by_chance: Share of the image that these cover.
    """

    label_index: int
    source_index: int | None
    attack_success: Estimate
    overlap: float
    by_chance: float


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A label that a scan found infected, and that the attacker did not aim at.

    Attributes:
        label_index: The label.
        success: Share of images that one of the attacker's own patches sends there, from whatever place does so most.
        by_twin: The same of the clean twin.
    """

    label_index: int
    success: float
    by_twin: float

    @property
    def shortcut(self) -> bool:
        """Whether the backdoor is one to this label, too."""
        return self.success >= 0.5 and self.by_twin <= 0.1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        name: Of the model.
        command: That made this.
        plan: What was trained.
        targets: Labels that are infected in truth.
        figures: Of the scan.
        recovered: Triggers of the labels, or pairs, that it found infected.
        beside: Labels that it found infected, and the attacker did not aim at.
        seconds: Of the scan.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    targets: tuple[int, ...]
    figures: ScanFigures
    recovered: tuple[Recovered, ...]
    beside: tuple[Beside, ...] = ()
    seconds: float
    libraries: dict[str, str]

    @property
    def found(self) -> set[int]:
        """Labels that the scan says are infected."""
        return {item.label_index for item in self.figures.everything if item.infected}

    @property
    def infected(self) -> set[int]:
        """The attacker's targets, and such others as his patch leads to, too."""
        return {*self.targets, *(item.label_index for item in self.beside if item.shortcut)}

    @property
    def right(self) -> bool:
        """Whether the scan found these."""
        return self.found == self.infected


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Scan one of the models."""
    plan = SCANNED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        folder = scanned(found, parts, cache, progress, again=True)
        record = read_scan(folder)
        accused = {item.label_index for item in record.everything if item.infected}
        beside = _beside(sorted(accused - set(targets_of(found.attack))), found, parts, cache, progress)
    return Report(
        name=name,
        command=f"python -m benchmarks.inspection measure --name {name}",
        plan=plan,
        targets=targets_of(found.attack),
        figures=ScanFigures(**{field: getattr(record, field) for field in ScanFigures.__struct_fields__}),
        recovered=tuple(_recovered(folder, record, found, parts)),
        beside=beside,
        seconds=record.seconds,
        libraries=versions(),
    )


def targets_of(attack: Attack | None) -> tuple[int, ...]:
    """The labels that an attack infects; none of a clean model."""
    if attack is None:
        return ()
    if isinstance(attack, MultiTarget):
        return attack.target_labels
    label = getattr(attack, "target_label", None)
    return () if label is None else (int(label),)


def _recovered(folder: Path, record: ScanFigures, found: Victim, parts: Parts) -> list[Recovered]:
    attack, images = found.attack, parts.evaluation
    if attack is None or not record.infected:
        return []
    some = images.images(slice(0, 500))
    true = (attack.trigger(some) - some).abs().amax(dim=(0, 1)) > 1e-3
    triggers = read_infected(folder, wrap(found.model), pairs=True)
    return [
        Recovered(
            label_index=item.label_index,
            source_index=item.source_index,
            attack_success=success_of(found.model, triggers, row, images),
            overlap=float(triggers.masks[row][true].sum() / triggers.masks[row].sum()),
            by_chance=float(true.double().mean()),
        )
        for row, item in enumerate(item for item in record.everything if item.infected)
    ]


def _beside(labels: Sequence[int], found: Victim, parts: Parts, cache: Path, progress: Progress) -> tuple[Beside, ...]:
    """What the attacker's patches do elsewhere in an image."""
    own = getattr(found.attack, "patches", ()) or (getattr(found.attack, "patch", None),)
    patches = {replace(patch, bottom=0, right=0) for patch in own if isinstance(patch, Patch)}
    if not labels or not patches:
        return ()
    twin = victim(found.record.plan.twin(), parts, cache, progress)
    images, known = parts.evaluation.images(slice(0, _MOVED)), parts.evaluation.known_labels[:_MOVED]
    height, width = images.shape[2:]
    most = torch.zeros(2, len(labels))
    for patch in patches:
        for bottom in range(0, height - len(patch.drawing) + 1, _STEP):
            for right in range(0, width - len(patch.drawing[0]) + 1, _STEP):
                moved = replace(patch, bottom=bottom, right=right).stamp(images)
                with torch.inference_mode():
                    both = torch.stack([model(moved).argmax(dim=1) for model in (found.model, twin.model)])
                shares = [(both == label)[:, known != label].float().mean(dim=1) for label in labels]
                most = torch.maximum(most, torch.stack(shares, dim=1))
    return tuple(
        Beside(label_index=label, success=float(most[0, row]), by_twin=float(most[1, row])) for row, label in enumerate(labels)
    )


def success_of(model: nn.Module, triggers: Triggers, row: int, images: ImageSet) -> Estimate:
    """How often one of the triggers works on images of the labels that it is for."""
    label, source = int(triggers.labels[row]), int(triggers.sources[row])
    known = images.known_labels
    rows = torch.nonzero((known != label) & ((known == source) if source >= 0 else (known >= 0))).squeeze(1)
    with torch.inference_mode():
        answers = [model(triggers.put_on(row, images.images(part))).argmax(dim=1) for part in rows.split(500)]
    return proportion(int((torch.cat(answers) == label).sum()), len(rows))


def load_reports() -> list[Report]:
    """The committed results, in the order of `SCANNED`."""
    return load_results("inspection", list(SCANNED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per model."""
    header = [
        "model",
        "infected in truth",
        "verdict",
        "L1 (of the median; in the reference)",
        "closest clean label",
        "index alone",
        "recovered ASR",
        "mask in place (by chance)",
        "passes, of the plain schedule",
        "seconds",
    ]
    rows = []
    for report in reports:
        findings = report.figures.everything
        infected = [item for item in findings if item.infected]
        plain = len(report.figures.labels) * _PLAIN.steps * _PLAIN.images
        rows.append(
            [
                report.name,
                listed(report.targets),
                _verdict(report),
                "; ".join(map(_size, infected)) or "-",
                _closest(findings, report.infected),
                listed([item.label_index for item in report.figures.labels if item.infected_by_index]),
                "; ".join(percent(item.attack_success) for item in report.recovered) or "-",
                "; ".join(f"{item.overlap:.0%} ({item.by_chance:.0%})" for item in report.recovered) or "-",
                f"{sum(item.passes for item in report.figures.labels) / plain:.0%}",
                f"{report.seconds:.0f}",
            ]
        )
    return markdown(header, rows)


def listed(labels: Sequence[int]) -> str:
    """Of a table's cell."""
    return ", ".join(map(str, labels)) or "none"


def _verdict(report: Report) -> str:
    aimed_at = listed(sorted(report.found - {item.label_index for item in report.beside}))
    others = ", ".join(f"{item.label_index} ({item.success:.0%}; {item.by_twin:.0%})" for item in report.beside)
    return ("" if report.right else "WRONG: ") + aimed_at + (f"; beside {others}" if others else "")


def _size(item: LabelFinding) -> str:
    opinion = item.second_opinion
    if opinion is None or opinion.reference_ratio is None:
        return f"{item.mask_l1:.1f}"
    where = "" if item.source_index is None else f"{item.source_index} to {item.label_index}: "
    return f"{where}{item.mask_l1:.1f} ({opinion.size_ratio:.0%}; {opinion.reference_ratio:.0%})"


def _closest(findings: Sequence[LabelFinding], infected: Set[int]) -> str:
    """The label that is nearest to a false alarm."""
    clean = [item for item in findings if item.label_index not in infected and item.second_opinion is not None]
    return min(((item.mask_l1, _size(item)) for item in clean), default=(0.0, "-"))[1]


def main() -> int:
    """Run from the command line."""
    return run("inspection", __doc__, SCANNED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
