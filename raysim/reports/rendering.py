"""From figures and values to a page: what every page of this package is made with, whatever it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from raysim.console.words import clock, human_bytes
from raysim.data.similarity import MEASURE
from raysim.reports import figures
from raysim.results.files import FIGURES

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Panel:
    """A figure with the words around it."""

    name: str
    title: str
    note: str
    figure: Figure
    titles: Sequence[str] = ()
    """What the pointer shows at the figure's marks (see `figures.inline_svg`)."""


@dataclass(frozen=True)
class DrawnPanel:
    """A panel as a page holds it."""

    panel: Panel
    svg: str
    wide: bool
    """Whether it takes the whole width of the page."""


def draw(panels: Sequence[Panel], out_dir: Path) -> list[DrawnPanel]:
    """The panels as a page holds them, each figure also written to `out_dir`/figures for print."""
    drawn = []
    for panel in panels:
        figures.save_png(panel.figure, out_dir / FIGURES / f"{panel.name}.png")
        svg = figures.inline_svg(panel.figure, name=panel.name, title=panel.title, titles=panel.titles)
        drawn.append(DrawnPanel(panel, svg, wide=panel.figure.get_figwidth() > figures.WIDTH))
    return drawn


def render(template: str, **values: Any) -> str:
    """A page from its template: text is escaped, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"measure": MEASURE, "themed": figures.themed_colours(), "human_bytes": human_bytes, "clock": clock}
    return environment.get_template(template).render(shared | values)
