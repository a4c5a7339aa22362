"""How the plots and the page look: the colours of a light and of a dark sheet, by what they are for."""

LIGHT = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee5",
    "paper": "#ffffff",
    "raised": "#f5f7f9",
    "ours": "#d9480f",
    "other": "#93a1b0",
    "series-0": "#0b6bcb",
    "series-1": "#1b8040",
    "series-2": "#7c4fd6",
    "series-3": "#b98300",
    "series-4": "#0c8b92",
    "series-5": "#c0398b",
    "series-6": "#566270",
    "series-7": "#8a5a2b",
}
DARK = {
    "ink": "#e6ebf0",
    "muted": "#9aa5b1",
    "grid": "#343c46",
    "paper": "#12161b",
    "raised": "#1b2027",
    "ours": "#ff8f52",
    "other": "#687686",
    "series-0": "#5aa9ff",
    "series-1": "#4cc06b",
    "series-2": "#b795ff",
    "series-3": "#e5b642",
    "series-4": "#3fc8d0",
    "series-5": "#f57fc2",
    "series-6": "#b4bec9",
    "series-7": "#cf9f6e",
}
SERIES = [name for name in LIGHT if name.startswith("series")]
MARKERS = "oD^vPX*p"


def css() -> str:
    """The colours as CSS variables, for whichever sheet the reader prefers."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in sheet.items()) for sheet in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


# matplotlib's settings: nothing of the user's own, text as text, and the same file from the same numbers.
MATPLOTLIB = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bertfast",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": LIGHT["paper"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}
