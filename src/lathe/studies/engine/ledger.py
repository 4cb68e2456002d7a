"""The record of what was measured: one JSON file a study and scale, never half written.

`runs/<paper>/<scale>/result.json` holds what was measured here, `results/<paper>/<scale>.json` what the project
recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lathe.studies.engine.claim import FALLS_SHORT, HOLDS, Claim, Measurement
from lathe.studies.engine.run import Run
from lathe.studies.engine.study import SCALES, Study

__all__ = [
    "LedgerError",
    "best",
    "finding",
    "finish",
    "listing",
    "merged",
    "new_result",
    "read",
    "recorded_folder",
    "result_path",
    "summary",
    "write",
]

FORMAT = 1
Result = dict[str, Any]
Finding = dict[str, Any]


class LedgerError(OSError):
    """A result that cannot be read or written; the message says which file and why."""


def result_path(output: Path, slug: str, scale: str) -> Path:
    """Where a run keeps its result."""
    return output / slug / scale / "result.json"


def recorded_folder() -> Path | None:
    """The project's own record: `results/` of the checkout, or what was installed with the package."""
    package = Path(str(files("lathe")))
    for folder in (package.parents[1] / "results", package / "results"):
        if folder.is_dir():
            return folder
    return None


def read(path: Path) -> Result | None:
    """The result in a file; None where there is no file.

    Raises:
        LedgerError: where the file is not a result of a format that is known here.
    """
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] != FORMAT or not isinstance(result["claims"], list):
            raise ValueError(f"format {result['format']!r} is not {FORMAT}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} is not a readable result: {error}") from None
    return result


def write(path: Path, result: Result) -> None:
    """Writes a result so that a reader, or a power cut, finds the old file or the new one and nothing in between.

    Raises:
        LedgerError: where the folder is read-only, full, or no folder.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".result-", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            json.dump(_finite(result), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise LedgerError(f"cannot write {path}: {error.strerror or error}") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fingerprint(study: Study, scale: str, device: str, seeds: tuple[int, ...]) -> str:
    """Names an experiment: a result may be resumed only by the same study file, setting, device, seeds and torch."""
    claim = next(iter(study.claims.values()))
    source = Path(inspect.getfile(claim.measure)).read_text(encoding="utf-8")
    parts = (source, scale, repr(study.scales[scale]), device, seeds, torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def new_result(run: Run) -> Result:
    """An empty result of a run: what it is, on which machine, with which versions; its claims are yet to come."""
    study = run.study
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if run.device.startswith("cuda") else run.device,
    }
    return {
        "format": FORMAT,
        "slug": study.slug,
        "title": study.title,
        "arxiv": study.arxiv,
        "scale": run.scale,
        "device": run.device,
        "seeds": list(run.seeds),
        "setting": {name: value if _plain(value) else repr(value) for name, value in run.setting.as_dict().items()},
        "fingerprint": fingerprint(study, run.scale, run.device, run.seeds),
        "machine": machine,
        "versions": {
            "lathe": version("torchlathe"),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "numpy": version("numpy"),
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "complete": False,
        "claims": [],
    }


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_plain(part) for part in value.values())
    return value is None or isinstance(value, (str, bool, int, float))


def finding(
    claim: Claim,
    scale: str,
    measurement: Measurement | None = None,
    *,
    verdict: str | None = None,
    seconds: float = 0.0,
    note: str = "",
    error: str | None = None,
    figure: dict[str, Any] | None = None,
) -> Finding:
    """What is recorded of one claim. Without a measurement it has a `verdict` and a `note`, or an `error`."""
    record: Finding = _told(claim) | dict.fromkeys(("verdict", "value", "baseline", "spread", "seeds"))
    if measurement is not None:
        parts = [
            {
                "name": name,
                "value": float(value),
                "holds": str(claim.also[name]) if name in claim.also else None,
                "held": claim.also[name](value) if name in claim.also else None,
            }
            for name, value in measurement.also.items()
        ]
        record |= {k: v for k, v in asdict(measurement).items() if k in ("value", "baseline", "spread", "seeds")}
        record |= {
            "value": float(measurement.value),
            "samples": [float(sample) for sample in measurement.samples],
            "parts": parts,
            "held": claim.holds(measurement.value),
        }
        verdict = claim.verdict(measurement, scale)
    return record | {
        "verdict": verdict,
        "note": note,
        "measured": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds, 3),
        "error": error,
        "figure": figure,
    }


def _told(claim: Claim) -> dict[str, Any]:
    """A claim as its paper's sheet has it, before anything is measured."""
    return {
        "id": claim.id,
        "text": claim.text,
        "paper": claim.paper,
        "kind": claim.kind,
        "unit": claim.unit,
        "holds": str(claim.holds),
        "also": {name: str(bound) for name, bound in claim.also.items()},
    }


def merged(result: Result, old: Result | None, study: Study) -> Result:
    """A result that measured some claims only, completed by those that an older one measured and this one did not.

    Raises:
        LedgerError: where the older one comes from another machine, device or torch: their numbers do not mix.
    """
    own = {claim["id"]: claim for claim in result["claims"]}
    if old is None or len(own) == len(study.claims):
        return result
    for part, key in (("machine", "processor"), ("machine", "device"), ("versions", "torch")):
        if old[part][key] != result[part][key]:
            raise LedgerError(
                f"{study.slug}: the other claims were measured with {key} {old[part][key]!r}, these with "
                f"{result[part][key]!r}; measure all claims"
            )
    day = old["started"][:10]
    kept = {
        claim["id"]: {"measured": day} | claim
        for claim in old["claims"]
        if claim["id"] not in own and claim["error"] is None
    }
    claims = [(own | kept)[name] for name in study.claims if name in own or name in kept]
    return result | {"claims": claims, "complete": _complete(claims, study)}


def _complete(claims: list[Finding], study: Study) -> bool:
    return len(claims) == len(study.claims) and all(claim["error"] is None for claim in claims)


def finish(result: Result, study: Study) -> None:
    """Puts the claims in the study's order; the result is complete where all of them were measured."""
    order = list(study.claims)
    result["claims"].sort(key=lambda claim: order.index(claim["id"]))
    result["complete"] = _complete(result["claims"], study)


def best(slug: str, scale: str, output: Path | None) -> Result | None:
    """What is known of a study at a scale: what was measured here, else what the project recorded.

    The result says which under "here".
    """
    if output is not None:
        result = read(result_path(output, slug, scale))
        if result is not None:
            return result | {"here": True}
    recorded = recorded_folder()
    result = None if recorded is None else read(recorded / slug / f"{scale}.json")
    return None if result is None else result | {"here": False}


def listing(studies: list[Study], output: Path | None) -> Iterator[dict[str, Any]]:
    """Every study with its claims and, per scale, what is known of them: what `lathe list --json` prints."""
    for study in studies:
        found = {scale: best(study.slug, scale, output) for scale in SCALES}
        yield summary(study, found)


def summary(study: Study, found: dict[str, Result | None]) -> dict[str, Any]:
    """One study, its claims and, per scale, verdict, value, baseline, spread and seeds (null where not measured)."""
    known = {
        scale: {claim["id"]: claim for claim in result["claims"]} if result else {} for scale, result in found.items()
    }
    keys = ("verdict", "value", "baseline", "spread", "seeds")
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
        "claims": [
            _told(claim) | {"scales": {s: {key: known[s].get(claim.id, {}).get(key) for key in keys} for s in found}}
            for claim in study.claims.values()
        ],
    }


def tally(claims: list[Finding]) -> dict[str, int]:
    """How many claims hold, fall short, and were not judged."""
    held = sum(claim["verdict"] == HOLDS for claim in claims)
    short = sum(claim["verdict"] == FALLS_SHORT for claim in claims)
    return {"holds": held, "short": short, "open": len(claims) - held - short}
