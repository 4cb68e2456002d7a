"""How charts look: one Vega configuration for light pages and one for dark, and the export of a figure to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CONFIGS", "export"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def _config(ink: str, muted: str, grid: str, category: list[str], ramp: list[str]) -> dict[str, Any]:
    return {
        "background": "transparent",
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "axis": {
            "domainColor": muted,
            "gridColor": grid,
            "gridDash": [1, 3],
            "labelColor": muted,
            "labelFontSize": 11,
            "labelOverlap": True,
            "tickColor": muted,
            "tickSize": 4,
            "titleColor": ink,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
        },
        "legend": {
            "labelColor": ink,
            "labelFontSize": 11.5,
            "labelLimit": 220,
            "orient": "bottom",
            "columns": 4,
            "symbolStrokeWidth": 2.5,
            "titleColor": muted,
            "titleFontSize": 11.5,
            "titleFontWeight": "normal",
        },
        "header": {"labelColor": ink, "labelFontSize": 12, "titleColor": ink, "titleFontWeight": "normal"},
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "subtitleColor": muted},
        "range": {"category": category, "ramp": ramp, "heatmap": ramp},
        "mark": {"color": category[0]},
        "bar": {"color": category[0], "cornerRadiusEnd": 2},
        "line": {"color": category[0], "strokeWidth": 2.2},
        "point": {"color": category[0], "filled": True, "size": 55},
        "circle": {"color": category[0], "size": 55},
        "area": {"color": category[0], "opacity": 0.25},
        "errorbar": {"color": ink},
        "tick": {"color": category[0]},
        "text": {"color": ink, "font": FONT, "fontSize": 11.5},
        "rule": {"color": muted, "strokeDash": [5, 4], "strokeWidth": 1.4},
    }


# Brass first, then hues that stay apart for colour-blind readers (after Okabe and Ito, darkened or lifted to the page).
CONFIGS: dict[str, dict[str, Any]] = {
    "light": _config(
        "#23211d",
        "#6b665c",
        "#ddd8cc",
        ["#b0711a", "#2b6c99", "#2e8b6f", "#a8497a", "#7a6fb5", "#c9533c", "#6f7d2c", "#57534a"],
        ["#f5ead6", "#dfb873", "#b0711a", "#6e4410", "#331f06"],
    ),
    "dark": _config(
        "#ece7dc",
        "#a39c8d",
        "#3d3a33",
        ["#e3ab5b", "#6db3e3", "#5cc9a7", "#e08ab8", "#b0a6ee", "#f0907c", "#b9c96b", "#b5afa2"],
        ["#2a2116", "#6e4a1b", "#b0711a", "#e3ab5b", "#fbe9c8"],
    ),
}


def export(chart: dict[str, Any], path: Path) -> None:
    """Writes a chart (a Vega-Lite spec with its data) as .png, .svg, .pdf or .html, in the light theme on white."""
    import vl_convert

    config = {**CONFIGS["light"], "background": "white"}
    spec = json.loads(json.dumps(chart))
    if spec.get("width") == "container":
        spec["width"] = 520
    # The chart's own configuration is Altair's default view size, which the page sizes otherwise.
    spec.pop("config", None)
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(spec, config=config), encoding="utf-8")
    elif path.suffix == ".pdf":
        path.write_bytes(vl_convert.vegalite_to_pdf(spec, config=config))
    elif path.suffix == ".html":
        path.write_text(vl_convert.vegalite_to_html(spec, bundle=True, config=config), encoding="utf-8")
    else:
        path.write_bytes(vl_convert.vegalite_to_png(spec, config=config, scale=2))
