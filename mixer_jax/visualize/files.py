"""Figures as files: PNG or SVG, by the ending."""

import os
import pathlib
from typing import TYPE_CHECKING

from mixer_jax.files import FileError, replace_when_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")


def check_figure_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a figure; call it before the work that the figure needs.

    Raises:
      FileError: it ends in neither .png nor .svg.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise FileError(
            f"{path} ends in neither .png nor .svg, the two kinds of figures."
        )
    return path


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG or SVG, by the ending of `path`.

    A figure that is drawn again gives the same file: it holds no date or random name.

    Raises:
      FileError: `path` has another ending, or is a URL.
    """
    import matplotlib  # over a second to import

    form = check_figure_path(path).suffix.lower().removeprefix(".")
    metadata = {"Date": None} if form == "svg" else {}
    with (
        replace_when_whole(path) as partial,
        matplotlib.rc_context({"svg.hashsalt": "mixer_jax"}),
    ):
        figure.savefig(partial, format=form, dpi=130, metadata=metadata)
