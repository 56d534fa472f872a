"""Pages with and without their figures, which take longer to draw than a tiny model to train: most tests look at neither."""

import contextlib
from collections.abc import Iterator

import pytest

from raysim.reports import figures

SAVE_PNG, INLINE_SVG = figures.save_png, figures.inline_svg


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """While open, pages of this process are written without figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_png", lambda figure, path: None)
        patch.setattr(figures, "inline_svg", lambda figure, **words: "")
        yield


@contextlib.contextmanager
def drawn() -> Iterator[None]:
    """While open, pages of this process are written as they are for a user, within a test too that is otherwise without figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_png", SAVE_PNG)
        patch.setattr(figures, "inline_svg", INLINE_SVG)
        yield
