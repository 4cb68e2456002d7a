"""Results as a web site: a reading list that runs. Static files, nothing loaded from a network.

`build` writes `index.html` (papers as cards), a page a paper (each claim beside what was measured), and the assets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lathe.gallery.theme import CONFIGS
from lathe.studies.engine import FALLS_SHORT, HOLDS, NOT_AT_THIS_SCALE, SCALES, Study, ledger

__all__ = ["bound", "build", "number"]

JOBS = {
    "predict": "Predict what a network will do",
    "build": "Build it from better parts",
    "reshape": "Reshape a trained network",
    "read": "Read what it learnt",
    "train": "Train it another way",
}
AREAS = {
    "theory": "Theory",
    "nn": "Layers",
    "operators": "Operators",
    "compression": "Compression",
    "morphing": "Morphing",
    "representations": "Representations",
    "training": "Training",
}
SNIPPET = "window.vegaEmbed = vegaEmbed;"
VERDICTS = {
    HOLDS: ("holds", "Holds"),
    FALLS_SHORT: ("short", "Falls short"),
    NOT_AT_THIS_SCALE: ("open", "Not judged at this scale"),
    None: ("open", "Not measured"),
}


def build(site: Path, studies: Sequence[Study], output: Path | None) -> Path:
    """Writes the gallery of these studies into the folder `site` and returns its index page.

    Each study shows the largest scale that was measured, in `output` or, failing that, in the project's own record.

    Raises:
        LedgerError: where a result cannot be read.
        OSError: where `site` cannot be written.
    """
    pages = [_page(study, output) for study in studies]
    pages.sort(key=lambda page: (list(JOBS).index(page["job"]), page["title"].lower()))
    for page, previous, following in zip(pages, [None, *pages], [*pages[1:], None]):
        page["previous"], page["following"] = previous, following
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lathe.gallery"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, bound=bound, sentence=_sentence)
    environment.globals.update(jobs=JOBS, areas=AREAS, verdicts=VERDICTS, strip=_strip)
    (site / "papers").mkdir(parents=True, exist_ok=True)
    (site / "assets").mkdir(exist_ok=True)
    for asset in files("lathe.gallery").joinpath("assets").iterdir():
        (site / "assets" / asset.name).write_bytes(asset.read_bytes())
    (site / "assets" / "vega.js").write_text(_vega_bundle(), encoding="utf-8")
    (site / "assets" / "themes.js").write_text(f"window.latheThemes = {json.dumps(CONFIGS)};\n", encoding="utf-8")
    counts = ledger.tally([claim for page in pages for claim in page["claims"]])
    here = _measured_here(pages)
    present = [area for area in AREAS if any(page["area"] == area for page in pages)]
    index = site / "index.html"
    _write(index, environment, "index.html", pages=pages, counts=counts, here=here, present=present, root="")
    for page in pages:
        _write(site / "papers" / f"{page['slug']}.html", environment, "paper.html", page=page, root="../")
    return index


def _write(path: Path, environment: jinja2.Environment, template: str, **values: Any) -> None:
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8")


@cache
def _vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    import vl_convert

    return f"(function () {{\n{vl_convert.javascript_bundle(SNIPPET)}\n}})();\n"


def _page(study: Study, output: Path | None) -> dict[str, Any]:
    """What the templates say of a study: its claims joined with the findings of the largest scale measured."""
    found = {scale: ledger.best(study.slug, scale, output) for scale in SCALES}
    measured = [scale for scale in SCALES if found[scale] is not None]
    shown = measured[-1] if measured else None
    result = found[shown] if shown else None
    findings = {claim["id"]: claim for claim in result["claims"]} if result else {}
    unmeasured = {claim["id"]: claim for claim in ledger.summary(study, {})["claims"]}
    blank: dict[str, Any] = {
        "verdict": None,
        "value": None,
        "baseline": None,
        "spread": None,
        "seeds": None,
        "samples": [],
        "parts": [],
    }
    blank |= {"note": "", "error": None, "figure": None, "seconds": 0.0}
    claims = [blank | told | findings.get(id, {}) for id, told in unmeasured.items()]
    for claim in claims:
        claim["at"] = {scale: at for scale in measured if (at := _finding(found[scale], claim["id"])) is not None}
    return {
        "slug": study.slug,
        "title": study.title,
        "authors": study.authors,
        "year": study.year,
        "arxiv": study.arxiv,
        "area": study.area,
        "job": study.job,
        "module": study.module,
        "summary": study.summary,
        "example": study.example,
        "claims": claims,
        "scale": shown,
        "result": result,
        "here": {scale: found[scale] for scale in measured if found[scale]["here"]},  # type: ignore[index]
        "counts": ledger.tally(claims),
        "headline": _headline(claims),
        "words": " ".join([study.title, study.authors, study.summary, *(claim["text"] for claim in claims)]).lower(),
    }


def _finding(result: ledger.Result | None, claim_id: str) -> dict[str, Any] | None:
    claims = result["claims"] if result else []
    return next((claim | {"here": result["here"]} for claim in claims if claim["id"] == claim_id), None)  # type: ignore[index]


def _measured_here(pages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was measured on this machine, summed up: papers, scales and verdicts; None where nothing was."""
    results = [result for page in pages for result in page["here"].values()]
    if not results:
        return None
    scales = [scale for scale in SCALES if any(result["scale"] == scale for result in results)]
    counts = ledger.tally([claim for result in results for claim in result["claims"]])
    papers = sum(bool(page["here"]) for page in pages)
    return {"papers": papers, "scales": scales, "machine": results[0]["machine"], **counts}


def _headline(claims: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The claim that a card pictures: the first judged one with several samples, else the first with a value."""
    valued = [claim for claim in claims if claim["value"] is not None]
    sampled = [claim for claim in valued if len(claim["samples"]) > 1 and claim["verdict"] in (HOLDS, FALLS_SHORT)]
    return next(iter(sampled or valued), None)


def number(value: float | None) -> str:
    """A measured number as people write it: three or four figures, thousands apart, powers of ten where it is tiny."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        digits, _, power = f"{value:.2e}".partition("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{digits.rstrip('0').rstrip('.').replace('-', '−')}×10{raised}"
    if size >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.{4 if 1 <= size < 10 else 3}g}".replace("-", "−")  # ratios near 1 need the fourth


def bound(text: str) -> str:
    """A bound as people write it: its numbers as measured ones."""
    numbers = re.sub(r"-?\d[\d.]*(?:e[-+]\d+)?", lambda match: number(float(match[0])), text)
    return re.sub("([≤≥=]) ", "\\1\u00a0", numbers)  # a sign stays with its number


def _sentence(text: str) -> str:
    """Upper case for the first letter, and for no other."""
    return text[:1].upper() + text[1:]


def _strip(claim: dict[str, Any]) -> Markup:
    """A sparkline: the seeds' values as dots on a line, the bound as a tick."""
    samples = [sample for sample in claim["samples"] or [claim["value"]] if sample is not None]
    limits = [float(part) for part in claim["holds"].replace("≥", "").replace("≤", "").replace("=", "").split(" to ")]
    points = [*samples, *limits]
    low, high = min(points), max(points)
    span = (high - low) or abs(high) or 1.0

    def x(value: float) -> float:
        return round(6 + 108 * (value - low) / span, 1)

    told = f"{number(claim['value'])} {claim['unit']}, must be {bound(claim['holds'])}"
    dots = "".join(f'<circle cx="{x(sample)}" cy="10" r="3.2"/>' for sample in samples)
    ticks = "".join(f'<path d="M{x(limit)} 3V17"/>' for limit in limits)
    return Markup('<svg class="strip" viewBox="0 0 120 20" role="img"><title>{}</title>').format(told) + Markup(
        f'<path class="axis" d="M2 10H118"/>{ticks}{dots}</svg>'
    )
