"""How every chart of this package looks: size, colours, and its bytes as PNG."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and on a grey print.
PALETTE = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#999999")
INK, GRID = "#222222", "#DDDDDD"
DOTS_PER_INCH = 160


def new_figure(height: float) -> Figure:
    """A figure of the usual width, ``height`` inches high."""
    return Figure(figsize=(7.2, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a PNG, without the time and program of its making."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
