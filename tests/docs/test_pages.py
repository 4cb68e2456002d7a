"""What the documentation says runs, and what it reports is what was recorded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lathe import studies

ROOT = Path(__file__).parents[2]
PAPERS = [slug for slug in studies.slugs() if slug != "toy-paper"]


def run(code: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("slug", PAPERS)
def test_the_example_of_a_paper_runs_as_pasted(slug, tmp_path):
    run(studies.load(slug).example, tmp_path)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_every_python_block_of_a_page_runs_as_pasted(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?) *```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks or page != "README.md"
    for block in blocks:
        run(textwrap.dedent(block), tmp_path)  # a block inside a list is indented


def test_every_paper_has_a_page_with_the_parts_that_readers_expect():
    parts = ["## Use it", "## When not to use it", "## What we measured", "## How it works", "## Source"]
    for slug in PAPERS:
        page = (ROOT / "docs" / "papers" / f"{slug}.md").read_text()
        places = [page.find(part) for part in parts]
        assert min(places) > 0 and places == sorted(places), (slug, dict(zip(parts, places)))


def test_pages_report_what_is_recorded():
    done = subprocess.run([sys.executable, "docs/measured.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recorded_results_are_small_complete_and_measured_by_the_present_studies():
    from lathe.studies.engine import ledger

    for slug in PAPERS:
        study = studies.load(slug)
        for scale in ("smoke", "desk"):
            path = ROOT / "results" / slug / f"{scale}.json"
            result = ledger.read(path)
            assert result is not None and result["complete"], path
            assert path.stat().st_size < 300_000, path
            bounds = {claim["id"]: (claim["holds"], claim["also"]) for claim in result["claims"]}
            assert bounds == {
                claim.id: (str(claim.holds), {name: str(bound) for name, bound in claim.also.items()})
                for claim in study.claims.values()
            }, path
