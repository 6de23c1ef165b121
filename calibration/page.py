"""A page to look at, HTML in one file: a title, a sentence, and sections of pictures and tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from calibration.statistics import Estimate

mpl.use("Agg", force=False)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } th { font-weight: 600; }
tr.marked { background: #f3efe2; font-weight: 600; } img { max-width: 100%; }
p.lead { font-size: 1.05rem; } .muted { color: #666; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}<h2>{{ section.heading }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}{% if section.picture %}<img alt="{{ section.heading }}" src="data:image/png;base64,{{ section.encoded }}">
{% if section.caption %}<p class="muted">{{ section.caption }}</p>{% endif %}{% endif %}
{% if section.rows %}<table>
{% if section.header %}<tr>
{%- for cell in section.header %}<th{% if not loop.first %} class="number"{% endif %}>{{ cell | trim }}</th>
{% endfor %}</tr>{% endif %}
{% for row in section.rows %}<tr{% if loop.index0 == section.marked %} class="marked"{% endif %}>
{%- for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell | trim }}</td>
{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% endfor %}</body></html>
"""


@final
@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Its title.
        texts: Paragraphs.
        picture: PNG.
        caption: Under the picture.
        header: Of the table.
        rows: Of the table; the first column names, the others are figures.
        marked: The row that stands out.
    """

    heading: str
    texts: Sequence[str] = ()
    picture: bytes = b""
    caption: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    marked: int | None = None

    @property
    def encoded(self) -> str:
        """The picture in base 64."""
        return base64.b64encode(self.picture).decode()


def render(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """The page."""
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return page.render(title=title, lead=lead, sections=sections).encode()


def png(figure: Figure) -> bytes:
    """A figure as PNG; what is written in it, such as class names, stands as it is: `$` begins no formula."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def percent(estimate: Estimate) -> str:
    """A share with its interval, in percent; where a cell is narrow it breaks between the two."""
    return f"{estimate.value:.1%} {100 * estimate.low:.1f}-{100 * estimate.high:.1f}"


def montage(rows: Sequence[tuple[str, Tensor]], columns_named: Sequence[str] = ()) -> bytes:
    """Rows of images with their names, as PNG; each (N, C, H, W), in [0, 1]."""
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(1.6 + 0.95 * columns, 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows, panels, strict=True):
        for number, axes in enumerate(line):
            axes.set_axis_off()
            if number < len(images):
                pixels = images[number].permute(1, 2, 0).numpy()
                axes.imshow(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3], vmin=0.0, vmax=1.0)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for name, axes in zip(columns_named, panels[0], strict=bool(columns_named)):
        axes.set_title(name, fontsize=9)
    return png(figure)
