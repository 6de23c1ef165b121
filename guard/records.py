"""What a profile holds of each detector: how it is set, and the threshold that calibration set for it."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from guard.detectors import Blend, Boundaries, Squeezer

OVERLAYS = "strip.overlays"
"""Array of a lone STRIP's overlays, and of the first one's of several."""

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Neuron = Annotated[int, msgspec.Meta(ge=0)]


class ThresholdRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A threshold, and how it was set.

    Attributes:
        value: On the detector's score; at or over it is suspicious. STRIP's score is minus the entropy in bits.
        method: `conformal` or `normal`.
        frr: The false rejection rate asked for.
        images: Clean images that set it, disjoint from the overlays.
        rank: k: the k-th most suspicious clean score set it; None for `normal`.
        frr_low: Lower end of the 95% interval of the FRR on exchangeable clean inputs.
        frr_high: Upper end.
        confidence: Probability that the FRR is at most `frr`, where that was asked for.
    """

    value: float
    method: Literal["conformal", "normal"]
    frr: Share
    images: int
    rank: int | None
    frr_low: Share
    frr_high: Share
    confidence: float | None = None


class StripRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="strip", tag_field="name"):
    """STRIP's parameters.

    Attributes:
        title: The detector's name in verdicts, metrics and logs: `strip`, or `strip-BLEND` where there are several.
        threshold: Where it rejects.
        blend: How overlays are superimposed.
        alpha: Their weight.
        mean_passes: Mean forward passes on the clean calibration images, one image at a time.
        array: Name of its overlays among the profile's arrays.
        boundaries: Where it may stop before all passes; None where only as soon as their verdict is certain.
        votes: Overlays that must have made the model unsure. Left out where their entropies are added up, so that versions
            that know no votes read it.
        stage_rows: Blends in the first stage's batch, at least; left out where that is the default.
    """

    threshold: ThresholdRecord
    blend: Blend
    alpha: float
    mean_passes: float | None = None
    array: str = OVERLAYS
    boundaries: Boundaries | None = None
    votes: int | msgspec.UnsetType = msgspec.UNSET
    stage_rows: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType = msgspec.UNSET
    title: Annotated[str, msgspec.Meta(pattern=r"^strip(-[a-z]+)?\Z")] = "strip"


class FeatureSqueezingRecord(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="feature-squeezing", tag_field="name"
):
    """Feature squeezing's parameters.

    Attributes:
        title: The detector's name in verdicts, metrics and logs.
        threshold: Where it rejects.
        squeezers: Which.
        bits: Of the squeezer `bit-depth`; None for what the images' channels ask for.
    """

    threshold: ThresholdRecord
    squeezers: tuple[Squeezer, ...]
    bits: int | None = None
    title: Literal["feature-squeezing"] = "feature-squeezing"


class ActivationFilterRecord(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="activation-filter", tag_field="name"
):
    """The activation filter's parameters.

    Attributes:
        title: The detector's name in verdicts, metrics and logs: `activation-filter-LABEL`, of a label's further triggers with
            a number after it.
        threshold: Where it rejects.
        neurons: Of the second-to-last layer, those that the trigger for that label excites.
    """

    threshold: ThresholdRecord
    neurons: Annotated[tuple[_Neuron, ...], msgspec.Meta(min_length=1)]
    title: Annotated[str, msgspec.Meta(pattern=r"^activation-filter(-[0-9]+){0,2}\Z")]


DetectorRecord: TypeAlias = StripRecord | FeatureSqueezingRecord | ActivationFilterRecord
