"""How the pictures of examples and tutorials look, so that a phone shows them readably.

A phone shows a picture 360 pixels wide. So a picture is 6.4 inches wide, its panels stand one below
the other, and its letters are large. Colour-blind readers tell the colours apart, which are Paul
Tol's "vibrant" ones.
"""

from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

BLUE, ORANGE, TEAL, RED, MAGENTA = "#0077BB", "#EE7733", "#009988", "#CC3311", "#EE3377"

STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 4.2),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 120,
    "font.size": 13,
    "figure.titlesize": 14,
    "axes.titlesize": 14,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, TEAL, RED, MAGENTA]),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "legend.fontsize": 12,
}


def figure(height: float) -> Figure:
    """An empty picture of this height in inches. What is drawn afterwards has the style too."""
    mpl.rcParams.update(STYLE)
    return Figure(figsize=(6.4, height))
