"""Names in any script in figures: drawn where a font of the machine has the letters, written into the page whatever fonts there are."""

import logging
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font

from raysim.reports.figures import inline_svg, partition, save_png

pytestmark = pytest.mark.pictures

LABELS = ["内科", "جراحة", "ศัลยกรรม", "plain"]


def bars() -> Figure:
    return partition([(f"client {n}", dict.fromkeys(LABELS, n + 1)) for n in range(2)])


def test_what_no_font_draws_is_said_in_one_line_and_nothing_else_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fonts = {font.fname for font in fontManager.ttflist if not font.name.startswith("Last Resort")}
    drawn = {chr(code) for path in fonts for code in get_font(path).get_charmap()}
    lacking = {char for text in LABELS for char in text} - drawn
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="raysim.reports.figures"):
        warnings.simplefilter("error")
        save_png(bars(), tmp_path / "bars.png")
        inline_svg(bars(), name="bars", title="Bars")
    said = [record.getMessage() for record in caplog.records if record.name == "raysim.reports.figures"]
    assert len(said) == bool(lacking)
    assert all(set("".join(sorted(lacking))) <= set(line) and "plain" not in line for line in said)
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_the_page_has_the_names_as_text_in_its_own_font(tmp_path: Path) -> None:
    figure = bars()
    save_png(figure, tmp_path / "bars.png")
    svg = inline_svg(figure, name="bars", title="Bars")
    assert all(f">{label}<" in svg for label in LABELS)
    assert "DejaVu" not in svg
