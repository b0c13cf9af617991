"""One look for all figures and pages of the report: palette, spots, ranges, the "simulated" stamp, saving."""

import html
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import EllipseCollection
from matplotlib.colors import ListedColormap
from scipy.spatial import cKDTree

MODEL, CONTROL, ACCENT = "#D55E00", "#0072B2", "#CC3311"  # of Okabe and Ito, apart in any kind of colour vision
UNOBSERVED = "#E8E8E8"
COUNTS, EXPRESSION = "cividis", "viridis"
# Domains: Okabe and Ito first, then the light half of Tol's muted scheme.
DOMAINS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
    "#999999", "#882255", "#44AA99", "#DDCC77", "#332288", "#AA4499", "#117733", "#88CCEE",
]  # fmt: skip
DPI = 110

STYLE = {
    "figure.dpi": DPI,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "svg.hashsalt": "stpatch",
}


def new_figure(*args, **kwargs):
    """`plt.subplots` in the report's style."""
    mpl.rcParams.update(STYLE)
    return plt.subplots(*args, **kwargs)


def empty_figure(text: str):
    """A figure that says why there is nothing to draw."""
    figure, axes = new_figure(figsize=(8, 2))
    axes.set_axis_off()
    axes.text(0, 0.5, text)
    return figure


def headline(figure, text: str) -> None:
    """The figure's title, top left; the stamp of simulated data stands top right of it."""
    figure.suptitle(text, x=0.005, ha="left", fontweight="bold", fontsize=12)


def save(figure, path: str | Path, simulated: bool = False) -> None:
    """Write a PNG, stamped if it shows simulated data; the same figure gives the same bytes."""
    if simulated:
        stamp = {"boxstyle": "round,pad=0.3", "facecolor": "#FFF3C4", "edgecolor": "#B58900"}
        height = figure.get_figheight()
        place = {"x": 1 - 0.1 / figure.get_figwidth(), "y": 1 - 0.08 / height, "ha": "right", "va": "top"}
        figure.text(s="SIMULATED DATA", fontsize=9, color="#7A5C00", bbox=stamp, **place)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def spacing(xy: np.ndarray) -> float:
    """Median distance of a spot to its nearest neighbour, in the unit of `xy`; 1 for a single spot."""
    if len(xy) < 2:
        return 1.0
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) or 1.0


def draw_spots(axes, xy: np.ndarray, values: np.ndarray, **kwargs) -> EllipseCollection:
    """Spots as discs that nearly touch, y downwards as in the image; `values` go to the colour map."""
    size = np.full(len(xy), spacing(xy))
    discs = EllipseCollection(
        size, size, np.zeros(len(xy)), units="xy", offsets=xy, offset_transform=axes.transData, linewidths=0, **kwargs
    )
    discs.set_array(values)
    axes.add_collection(discs)
    low, high = xy.min(axis=0) - size[0], xy.max(axis=0) + size[0]
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    return discs


def draw_cells(axes, values: np.ndarray, mask: np.ndarray, **kwargs):
    """A grid as an image; unobserved cells grey."""
    image = np.ma.masked_array(values, ~mask)
    colours = mpl.colormaps[kwargs.pop("cmap", COUNTS)].with_extremes(bad=UNOBSERVED)
    return axes.imshow(image, cmap=colours, interpolation="nearest", **kwargs)


def draw_ranges(axes, samples: list[np.ndarray], colours: list[str]) -> None:
    """One row each: 5-95% as a line, 25-75% as a bar, the median as a dot."""
    for row, (values, colour) in enumerate(zip(samples, colours, strict=True)):
        if len(values):
            low, lower, median, upper, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([low, high], [row, row], color=colour, linewidth=1)
            axes.plot([lower, upper], [row, row], color=colour, linewidth=5, solid_capstyle="butt", alpha=0.6)
            axes.plot(median, row, "o", color="white", markeredgecolor=colour, markersize=5)


def list_rows(axes, names: list[str]) -> None:
    """Names down the y axis, the first on top."""
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))


def domain_colours(n: int) -> ListedColormap:
    """Colours of n domains, repeating after sixteen."""
    return ListedColormap([DOMAINS[index % len(DOMAINS)] for index in range(n)])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1.1em; margin-top: 1.6em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
thead th {{ border-bottom: 2px solid #888; }}
.number {{ text-align: right; white-space: nowrap; }}
.model {{ background: #FDEBDD; }} .best {{ font-weight: bold; }}
.simulated {{ background: #FFF3C4; border: 1px solid #B58900; padding: .4em .8em; }}
.alarm {{ background: #CC3311; color: #fff; font-weight: bold; padding: .5em .8em; }}
.small {{ color: #666; font-size: .9em; }}
.scores, .verdicts {{ font-size: 12.5px; }} .scores {{ display: inline-table; vertical-align: top; margin: .6em 1em .6em 0; }}
 .scores th, .scores td {{ padding: .15em .5em; }}
.scores i {{ display: block; font-style: normal; font-weight: normal; font-size: .8em; color: #777; }}
.paper {{ background: #F1F1F1; font-style: italic; }}
.beats {{ color: #00734F; font-weight: bold; }} .does-not-beat {{ color: #CC3311; }} .undecided {{ color: #666; }}
summary {{ cursor: pointer; margin: .6em 0; color: #0072B2; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, body: str) -> str:
    """A page that needs nothing from outside itself."""
    return PAGE.format(title=html.escape(title), body=body)


def table(rows: pd.DataFrame, empty: str) -> str:
    """The rows as an HTML table, everything escaped; a sentence in their place if there are none."""
    if not len(rows):
        return f"<p>{html.escape(empty)}</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>\n"
        for row in rows.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
