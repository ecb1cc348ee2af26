"""How every chart of this package looks: size, colours, and its bytes as PNG."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette: told apart with any colour vision, and on a grey print.
PALETTE = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#999999")
INK, GRID = "#222222", "#DDDDDD"
DOTS_PER_INCH = 160


def new_figure(height: float) -> Figure:
    """A figure of the usual width, ``height`` inches high."""
    return Figure(figsize=(7.2, height), layout="constrained")


def png(figure: Figure, dots_per_inch: int = DOTS_PER_INCH) -> bytes:
    """The figure as a PNG, without the time and program of its making.

    A chart has few colours, so they are a palette's: about a third of the bytes of true colour.
    """
    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dots_per_inch, facecolor="white")
    colours = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(written, format="PNG", optimize=True)
    return written.getvalue()
