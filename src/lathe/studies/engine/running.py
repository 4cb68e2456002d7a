"""Runs studies: on this machine's cores by processes, or on a Ray cluster; keeps every finished claim as it comes.

Workers emit events and write nothing. Only this process writes the ledger, after each claim, so that a run that is
killed at any moment has lost no finished claim and can be resumed.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lathe import studies
from lathe.studies.engine import ledger
from lathe.studies.engine.measuring import Event, measure_seed, measure_study
from lathe.studies.engine.run import Run, SeedResult, SeedTask

__all__ = ["ClusterUnreachable", "WorkerLost", "run_studies"]

Plan = tuple[str, tuple[str, ...]]  # a study and the claims that are done already


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the address."""


class WorkerLost(RuntimeError):
    """A worker process died (killed, or out of memory); what it had finished is kept."""


def run_studies(
    slugs: Sequence[str],
    scale: str,
    *,
    output: Path,
    device: str = "cpu",
    seeds: int | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    fresh: bool = False,
    claims: Collection[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[dict[str, ledger.Result], set[str]]:
    """Runs studies and returns their results by slug, and the kinds of failure met ("data", "error").

    Args:
        slugs: the studies.
        scale: "smoke", "desk" or "full".
        output: folder of the results; a result that was interrupted there is resumed.
        device: "cpu", "cuda", ...
        seeds: how many seeds; by default what the scale's setting says.
        jobs: how many processes, one thread each.
        cluster: address of a Ray cluster that takes the place of local processes.
        fresh: measure everything anew.
        claims: measure these anew and no others; what was measured of the others here is kept. All where empty.
        on_event: told everything that happens.

    Raises:
        UnknownPaper, UnknownClaim, LedgerError, ClusterUnreachable, WorkerLost.
    """
    results, plans, failures = {}, [], set()
    for slug in slugs:
        study = studies.load(slug)
        if not set(claims) <= set(study.claims):
            strange = ", ".join(sorted(set(claims) - set(study.claims)))
            raise studies.UnknownClaim(f"{slug} has no claim {strange}; it has {', '.join(study.claims)}")
        run = Run(study, scale, device=device, seeds=None if seeds is None else range(seeds))
        path = ledger.result_path(output, slug, scale)
        result, old = ledger.new_result(run), None
        with contextlib.suppress(ledger.LedgerError):  # an unreadable old result is replaced
            old = None if fresh else ledger.read(path)
        if claims:
            if old is not None:
                old["claims"] = [claim for claim in old["claims"] if claim["id"] not in claims]
            result = ledger.merged(result, old, study)
        elif old is not None and not old["complete"] and old["fingerprint"] == result["fingerprint"]:
            result["claims"] = [claim for claim in old["claims"] if claim["error"] is None]
            result["seconds"] = old["seconds"]
        ledger.write(path, result)  # finds out at once whether the folder can be written
        results[slug] = result
        done = {claim["id"] for claim in result["claims"]}
        if claims:
            done |= set(study.claims) - set(claims)
        plans.append((slug, tuple(done)))

    began = dict.fromkeys(results, time.perf_counter())

    def keep(event: Event) -> None:
        result, path = results[event.slug], ledger.result_path(output, event.slug, scale)
        now = time.perf_counter()
        if event.kind in ("measured", "finished"):
            result["seconds"] = round(result["seconds"] + now - began[event.slug], 3)
            began[event.slug] = now
        if event.kind == "started" and not result["claims"]:
            began[event.slug] = now
        if event.kind == "measured":
            result["claims"].append(event.finding)
            if event.failure:
                failures.add(event.failure)
            if event.details:
                with contextlib.suppress(OSError):
                    (path.parent / "errors.txt").write_text(event.details)
            ledger.write(path, result)
        elif event.kind == "finished":
            ledger.finish(result, studies.load(event.slug))
            ledger.write(path, result)
        on_event(event)

    seed_range = {slug: tuple(results[slug]["seeds"]) for slug in results}
    if cluster is not None:
        _on_ray(plans, scale, device, seed_range, cluster, keep)
    else:
        _on_processes(plans, scale, device, seed_range, jobs, keep)
    return results, failures


# --- on this machine -------------------------------------------------------------------------------------------------

_events: Any = None  # a worker's way to the main process


def _start_worker(events: Any, parent: int) -> None:
    """One thread a process, and no orphans: a worker ends when the process that started it is gone."""
    global _events
    _events = events
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _study_in_worker(plan: Plan, scale: str, device: str, seeds: Sequence[int], seed_jobs: int) -> None:
    slug, done = plan
    if seed_jobs == 1:
        measure_study(slug, scale, device, seeds, done, _events.put)
        return
    with _pool(seed_jobs, _events) as pool:

        def map_seeds(run: Run, tasks: list[SeedTask]) -> list[SeedResult]:
            futures = [
                pool.submit(measure_seed, slug, scale, device, seeds, function.__qualname__, seed, options)
                for function, seed, options in tasks
            ]
            return [future.result() for future in futures]

        measure_study(slug, scale, device, seeds, done, _events.put, map_seeds)


def _pool(jobs: int, events: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(events, os.getpid()),
    )


def _on_processes(
    plans: Sequence[Plan],
    scale: str,
    device: str,
    seeds: dict[str, tuple[int, ...]],
    jobs: int,
    keep: Callable[[Event], None],
) -> None:
    """Studies side by side; where there are more jobs than studies, a study's seeds go side by side too."""
    study_jobs = min(jobs, len(plans))
    events: Any = multiprocessing.get_context("spawn").Queue()
    with _interrupt_kills(_pool(study_jobs, events)) as pool:
        futures = [
            pool.submit(_study_in_worker, plan, scale, device, seeds[plan[0]], max(1, jobs // study_jobs))
            for plan in plans
        ]
        open_studies = {slug for slug, _ in plans}
        while open_studies:
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                _raise_lost(futures)
                continue
            keep(event)
            if event.kind == "finished":
                open_studies.discard(event.slug)
        _raise_lost(futures)


def _raise_lost(futures: list[Future[None]]) -> None:
    for future in futures:
        if future.done() and future.exception() is not None:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise WorkerLost("a worker process was killed (out of memory?); run again to resume") from None
            raise error  # type: ignore[misc]


@contextlib.contextmanager
def _interrupt_kills(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers do not outlive an error or Ctrl-C here, however busy they are."""
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise


# --- on a cluster ----------------------------------------------------------------------------------------------------


def _reachable(address: str) -> None:
    """Raises `ClusterUnreachable` within seconds where nobody listens, which Ray itself finds out after minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterUnreachable(f"cluster address {address!r} is not auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error.strerror or error}") from None


def _on_ray(
    plans: Sequence[Plan],
    scale: str,
    device: str,
    seeds: dict[str, tuple[int, ...]],
    address: str,
    keep: Callable[[Event], None],
) -> None:
    """A task a study, and from within it a task a seed; events come back through a queue of the cluster."""
    try:
        import ray
        from ray.util.queue import Empty, Queue
    except ImportError:
        raise ClusterUnreachable("--cluster needs Ray: pip install 'torchlathe[cluster]'") from None
    if address != "auto":
        _reachable(address)
    environment = {
        name: os.environ[name] for name in ("LATHE_DATA", "LATHE_OFFLINE", "LATHE_STUDIES") if name in os.environ
    }
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        ray.init(address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {' '.join(str(error).split())}") from None
    # A study on a GPU holds it, and trains its seeds one after the other there.
    gpus = 1 if device.startswith("cuda") else 0
    try:
        events = Queue(actor_options={"num_cpus": 0})
        study_task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_study_on_ray)
        tasks = [study_task.remote(plan, scale, device, seeds[plan[0]], gpus == 0, events) for plan in plans]
        open_studies = {slug for slug, _ in plans}
        while open_studies:
            try:
                event = events.get(timeout=0.5)
            except Empty:
                done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
                ray.get(done)  # raises what a task raised
                continue
            keep(event)
            if event.kind == "finished":
                open_studies.discard(event.slug)
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"the cluster lost a study: {' '.join(str(error).split())[:300]}") from None
    finally:
        ray.shutdown()


def _study_on_ray(plan: Plan, scale: str, device: str, seeds: Sequence[int], spread_seeds: bool, events: Any) -> None:
    import ray

    slug, done = plan
    seed_task = ray.remote(num_cpus=1)(measure_seed)

    def map_seeds(run: Run, tasks: list[SeedTask]) -> list[SeedResult]:
        return list(
            ray.get(
                [
                    seed_task.remote(slug, scale, device, seeds, function.__qualname__, seed, options)
                    for function, seed, options in tasks
                ]
            )
        )

    measure_study(slug, scale, device, seeds, done, events.put, map_seeds if spread_seeds else None)
