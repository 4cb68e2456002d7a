"""Times Lathe and the peer that a user would pick otherwise, side by side in one process on the same inputs.

Each file of this folder has `pairs() -> list[Pair]`. The harness checks that both sides give the same answer, warms up,
interleaves the timings (so that a drift of the machine hits both), and reports the ratio of medians with its spread.

    python benchmarks/harness.py [NAME ...] [--json FILE] [--threads 2] [--seconds 2]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

__all__ = ["Pair", "PeerMissing", "measure"]


class PeerMissing(ImportError):
    """The peer is not installed; the message is the command that installs it."""


@dataclass(frozen=True)
class Pair:
    """Two ways to the same answer.

    Args:
        title: what is done, on which shapes.
        ours, peer: take nothing, return what both must agree on (tensors, numbers, or tuples, lists and dicts of them).
        peer_name: name and version of the peer.
        target: the peer's median time over ours must be at least this.
        tolerance: largest difference of the answers over their largest value; None where they are not comparable.
        saved_memory: also compare the bytes that autograd keeps for the backward pass.
        memory_target: our saved bytes over the peer's must be at most this.
        timed: time ours and peer themselves (True), or take what they return as their seconds (False), for a peer that
            runs in another process.
    """

    title: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    peer_name: str
    target: float = 1.0
    tolerance: float | None = 1e-4
    saved_memory: bool = False
    memory_target: float | None = None
    timed: bool = True


def _numbers(answer: Any) -> list[Any]:
    """Every tensor of an answer, flat, in float64."""
    import torch

    if answer is None:
        return []
    if isinstance(answer, dict):
        answer = [answer[key] for key in sorted(answer)]
    if isinstance(answer, (list, tuple)):
        return [number for part in answer for number in _numbers(part)]
    tensor = torch.as_tensor(answer).detach()
    return [tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).flatten()]


def _difference(ours: Any, peer: Any) -> float:
    """The largest difference between two answers, relative to the largest value of the peer's part."""
    a, b = _numbers(ours), _numbers(peer)
    if [len(part) for part in a] != [len(part) for part in b]:
        raise ValueError(f"answers differ in shape: {[len(part) for part in a]} against {[len(part) for part in b]}")
    return max(
        (float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in zip(a, b) if len(x)), default=0.0
    )


def measure(pair: Pair, seconds: float = 2.0) -> dict[str, Any]:
    """Times one pair: at least 5 and at most 200 interleaved rounds within about `seconds` a side."""
    record: dict[str, Any] = {"title": pair.title, "peer": pair.peer_name, "target": pair.target}
    if pair.tolerance is not None and pair.timed:
        record["difference"] = _difference(pair.ours(), pair.peer())
        record["agrees"] = record["difference"] <= pair.tolerance
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    if pair.timed:
        for _ in range(3):
            pair.ours()
            pair.peer()
    began = time.perf_counter()
    while len(times["ours"]) < 5 or (time.perf_counter() - began < 2 * seconds and len(times["ours"]) < 200):
        for side, function in (("ours", pair.ours), ("peer", pair.peer)):
            start = time.perf_counter()
            answer = function()
            times[side].append(time.perf_counter() - start if pair.timed else float(answer))
    ratios = sorted(b / a for a, b in zip(times["ours"], times["peer"]))
    record |= {
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "peer_ms": 1e3 * statistics.median(times["peer"]),
        "rounds": len(ratios),
        "ratio": statistics.median(times["peer"]) / statistics.median(times["ours"]),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
    }
    record["reached"] = record["ratio"] >= pair.target and record.get("agrees", True)
    if pair.saved_memory:
        from lathe.core.size import saved_bytes

        ours, peer = saved_bytes(pair.ours), saved_bytes(pair.peer)
        record |= {
            "ours_saved_bytes": ours,
            "peer_saved_bytes": peer,
            "memory_ratio": ours / peer,
            "memory_target": pair.memory_target,
        }
        if pair.memory_target is not None:
            record["reached"] = record["reached"] and record["memory_ratio"] <= pair.memory_target
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of this folder, without .py; all where none is named")
    parser.add_argument("--json", type=Path, help="merge the ratios into this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="timing budget a pair and side")
    options = parser.parse_args()
    known = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in {"harness"})
    unknown = {name.replace("-", "_") for name in options.names} - set(known)
    if unknown:
        print(f"no benchmark named {', '.join(sorted(unknown))}; known are {', '.join(known)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(HERE))
    import torch
    from rich.console import Console

    # A file imports `harness`: let it be this very module, so that its Pair and PeerMissing are ours.
    sys.modules["harness"] = sys.modules["__main__"]
    torch.set_num_threads(options.threads)
    console, report, missed = Console(highlight=False), {}, False
    for name in [name.replace("-", "_") for name in options.names] or known:
        try:
            pairs = importlib.import_module(name).pairs()
        except PeerMissing as missing:
            console.print(f"[yellow]{name}: peer missing[/] ({missing})")
            continue
        report[name] = []
        for pair in pairs:
            record = measure(pair, options.seconds)
            report[name].append(record)
            missed |= not record["reached"]
            memory = f", saved memory {record['memory_ratio']:.2f} of the peer's" if "memory_ratio" in record else ""
            disagrees = "" if record.get("agrees", True) else f" [red]answers differ by {record['difference']:.1e}[/]"
            colour = "green" if record["reached"] else "red"
            times = f"{record['ours_ms']:.3g} ms against {record['peer_ms']:.3g} ms"
            console.print(
                f"[{colour}]{record['ratio']:6.2f}x[/] (target {pair.target:.3g}x)  {name}: {pair.title}, "
                f"against {pair.peer_name}: {times}{memory}{disagrees}",
                soft_wrap=True,
            )
    if options.json:
        old = json.loads(options.json.read_text()) if options.json.exists() else {}
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": options.threads,
        }
        stamp = {"torch": torch.__version__, "date": datetime.date.today().isoformat(), **machine}
        old.setdefault("benchmarks", {}).update(
            {name: {"measured": stamp, "pairs": pairs} for name, pairs in report.items()}
        )
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(old, indent=1) + "\n")
        temporary.replace(options.json)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
