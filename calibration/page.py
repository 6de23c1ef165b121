"""A page to look at, HTML in one file: a title, a sentence, and sections of pictures and tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import cv2
import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from calibration.statistics import Estimate

mpl.use("Agg", force=False)

_TILE, _GAP = 120, 6  # pixels: an image of a montage, its larger side, and between two

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
    """Rows of images with their names, as PNG; each (N, C, H, W), in [0, 1], all of one size."""
    columns = max(len(images) for _, images in rows)
    sheet, height, width = _sheet([images for _, images in rows], columns)
    figure = Figure(figsize=(1.6 + 0.95 * columns, 0.95 * len(rows) * height / width + 0.2 * bool(columns_named)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()  # one for all: an axes for each image takes ten times as long
    axes.imshow(sheet, interpolation="antialiased")
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.set_yticks([row * height + (height - _GAP) / 2 for row in range(len(rows))], [name for name, _ in rows])
    axes.set_xticks([column * width + (width - _GAP) / 2 for column in range(len(columns_named))], columns_named)
    return png(figure)


def _sheet(rows: Sequence[Tensor], columns: int) -> tuple[np.ndarray, int, int]:
    """(R, C, 3), uint8: images side by side on white, and how many pixels each takes with its gap, down and across."""
    high, wide = rows[0].shape[2:]
    scale = _TILE / max(high, wide)
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    how = cv2.INTER_NEAREST if scale > 1.0 else cv2.INTER_AREA
    height, width = size[1] + _GAP, size[0] + _GAP
    sheet = np.full((len(rows) * height - _GAP, columns * width - _GAP, 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images[:columns]):
            pixels = (255.0 * image[:3].clamp(0.0, 1.0)).round().byte().permute(1, 2, 0).numpy()
            if pixels.shape[2] < 3:  # grey; of two channels the first
                pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
            place = slice(row * height, row * height + size[1]), slice(column * width, column * width + size[0])
            sheet[place] = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=how)
    return sheet, height, width
