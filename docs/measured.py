"""Fills the marked parts of docs/: the example of each study, its table of what was measured, the table of layers.

python docs/measured.py            write them
python docs/measured.py --check    say which are out of date, and exit 1
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import layers

from lathe import studies
from lathe.gallery import bound, number
from lathe.studies.engine import SCALES, Study, ledger

HERE = Path(__file__).parent
SIGNS = {"holds": "holds", "falls short": "**falls short**", "not at this scale": "not judged", None: "–"}


def measured(study: Study) -> str:
    """The table of a study's claims at the scales that the project recorded."""
    found = {scale: ledger.best(study.slug, scale, None) for scale in SCALES}
    shown = [scale for scale in SCALES if found[scale] is not None]
    rows = ledger.summary(study, found)["claims"]
    lines = [
        f"| | claim | must be | {' | '.join(shown)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in shown)} |",
    ]
    for claim in rows:
        cells = []
        for scale in shown:
            at = claim["scales"][scale]
            spread = f" ± {number(at['spread'])}" if at["spread"] is not None else ""
            value = "" if at["value"] is None else f"{number(at['value'])}{spread}, "
            cells.append(f"{value}{SIGNS[at['verdict']]}")
        also = "".join(f"; {name} {bound(limit)}" for name, limit in claim["also"].items())
        unit = f" {claim['unit']}" if claim["unit"] else ""
        text, must = (part.replace("|", "\\|") for part in (claim["text"], f"{bound(claim['holds'])}{unit}{also}"))
        lines.append(f"| {claim['id']} | {text} | {must} | {' | '.join(cells)} |")
    for scale in shown[-1:]:
        result = found[scale]
        assert result is not None
        machine = result["machine"]
        where = f"{machine['processor']} ({machine['device']}), torch {result['versions']['torch']}"
        days = {claim["id"]: claim.get("measured", result["started"][:10]) for claim in result["claims"]}
        first = min(days.values())
        later = "".join(f", {name} on {day}" for name, day in days.items() if day != first)
        figures = f"figures: `lathe show {study.slug}` and the gallery"
        lines += ["", f"Measured {first}{later} on {where}; {figures}."]
        lines += [f"- {claim['id']}: {claim['note']}" for claim in result["claims"] if claim["note"]]
    return "\n".join(lines)


def filled(page: str, name: str, content: str) -> str:
    """The page with the part between its `name` markers replaced."""
    pattern = re.compile(rf"(<!-- {name}:begin -->).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no <!-- {name}:begin --> ... <!-- {name}:end -->")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", page)


def main() -> int:
    stale = []
    parts: dict[Path, dict[str, str]] = {HERE / "replace-a-layer.md": {"layers": layers.table()}}
    for slug in studies.slugs():
        study = studies.load(slug)
        example = f"```python\n{study.example}\n```"
        parts[HERE / "papers" / f"{slug}.md"] = {"example": example, "measured": measured(study)}
    for path, contents in parts.items():
        page = new = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            new = filled(new, name, content)
        if new != page:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"out of date, run `make docs`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
