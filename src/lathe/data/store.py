"""Where data sets are found, fetched and kept.

Searched in this order: the mirror `$LATHE_DATA`, the cache (`$LATHE_CACHE`, or the system's place for caches), what
came with an installed package, the official address. A mirror is trusted by its own `SHA256SUMS`, where it has one, and
by structure; official files by the checksums of the registry. What is slow to read is kept as tensors in the cache.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import platformdirs
from torch import Tensor

from lathe.data.download import Checksum, DownloadError, download, extract, require_reachable
from lathe.data.kinds import Images, OneShot, Views
from lathe.data.registry import SETS, DataSet, Source

__all__ = ["DataUnavailable", "cache_folder", "get", "listing", "load", "names", "where"]

_PARSED = "1"  # raise when a reader's result changes, so that what was kept is read anew
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Images, OneShot, Views)}
_unreachable: dict[str, tuple[float, str]] = {}  # a set that could not be fetched is not tried again for a minute


class DataUnavailable(RuntimeError):
    """A data set cannot be had here; the message is one line and names the command that gets it."""


def names() -> tuple[str, ...]:
    """The names of all data sets."""
    return tuple(SETS)


def load(name: str, split: str = "train", *, resolution: int | None = None, download: bool = True) -> Any:
    """A data set as tensors in memory; fetched first where it is not on this machine.

    Args:
        split: "train", "test" and, of texts, "valid"; see `listing` for the sets.
        resolution: pixels or grid points along a side, of the sets that have several ("darcy", "lego").
        download: False takes only what is on this machine.

    Returns:
        Images, OneShot, Text, Ratings, Graph, Graphs, Fields or Views.

    Raises:
        ValueError: for a name, split or resolution that there is not.
        DataUnavailable: where it is not here and cannot (or must not) be fetched, or a file is damaged.
    """
    data_set = _find_set(name)
    found, resolution = data_set.find(split, resolution)
    options = dict(found.options)
    if resolution is not None and split in data_set.splits:
        options["resolution"] = resolution
    if not found.files:
        return _read(data_set, [_Place(_bundled(data_set), None)], options, f"{split}-all", found.count)
    places = []
    for source in found.files:
        place = _locate(source, resolution)
        if place is None:
            if not download:
                raise DataUnavailable(_absent(data_set, split))
            place = _fetch(data_set, source, split, None)
        places.append(place)
    return _read(data_set, places, options, f"{split}-{resolution or 'all'}", found.count)


def get(name: str, progress: Callable[[str, int, int | None], None] | None = None) -> Path:
    """Fetch what is missing of a data set, whole; returns where it lies.

    Args:
        progress: called with the file's name, the bytes there and the bytes in all (None where that is unknown).

    Raises:
        ValueError: for a name that there is not.
        DataUnavailable: where a file cannot be fetched.
    """
    data_set = _find_set(name)
    _unreachable.pop(name, None)
    # A mirror's small views are not the whole set: what is fetched must serve every resolution.
    finest = max((side for sides in data_set.resolutions.values() for side in sides), default=None)
    for source in data_set.files:
        if _locate(source, finest) is None:
            _fetch(data_set, source, None, progress)
    return where(name)


def where(name: str) -> Path:
    """The folder or file on this machine that holds a data set, or the first file of it.

    Raises:
        ValueError: for a name that there is not.
        DataUnavailable: where nothing of it is here.
    """
    data_set = _find_set(name)
    place = _whereabouts(data_set)
    if place is None:
        raise DataUnavailable(_absent(data_set, None))
    return place


def listing() -> list[dict[str, Any]]:
    """All data sets: name, summary, splits, size in bytes, licence, and where each is now (None where it is not).

    `missing` names the splits that are not on this machine.
    """
    rows = []
    for data_set in SETS.values():
        place = _whereabouts(data_set)
        missing = [
            name for name, split in data_set.splits.items() if any(_locate(s, None) is None for s in split.files)
        ]
        rows.append(
            {
                "name": data_set.name,
                "summary": data_set.summary,
                "splits": list(data_set.resolutions or data_set.splits),
                "size": data_set.size,
                "licence": data_set.licence,
                "where": None if place is None else str(place),
                "missing": missing,
            }
        )
    return rows


def cache_folder() -> Path:
    """Where fetched files and read tensors are kept; `$LATHE_CACHE` moves it."""
    return Path(os.environ.get("LATHE_CACHE") or platformdirs.user_cache_dir("lathe"))


@dataclass(frozen=True)
class _Place:
    """A file (or folder) that was found, and what it must be, where that is known."""

    path: Path
    checksum: Checksum | None


def _find_set(name: str) -> DataSet:
    if name not in SETS:
        close = difflib.get_close_matches(str(name), SETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}{hint}")
    return SETS[name]


def _mirror() -> Path | None:
    folder = os.environ.get("LATHE_DATA")
    return Path(folder).expanduser() if folder else None


def _offline() -> bool:
    return any(
        os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}
        for name in ("LATHE_OFFLINE", "HF_HUB_OFFLINE")
    )


def _locate(source: Source, resolution: int | None) -> _Place | None:
    """The file in the mirror, the cache, or the Hub's own cache."""
    mirror = _mirror()
    if mirror is not None:
        for pattern in (*source.mirrored, source.path):
            relative = pattern.format(resolution=resolution)
            if _holds(mirror / relative, relative, resolution):
                return _Place(mirror / relative, _listed(mirror, relative))
    if _holds(cached := cache_folder() / "files" / source.path, source.path, None):
        return _Place(cached, None if source.inside else source.checksum)
    if source.hub is not None and (found := _from_hub_cache(source)) is not None:
        return _Place(found, source.checksum)
    return None


def _from_hub_cache(source: Source) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    assert source.hub is not None
    repository, revision = source.hub
    file = source.path.removeprefix(f"{repository}/")
    found = try_to_load_from_cache(
        repository, file, cache_dir=constants.HF_HUB_CACHE, revision=revision, repo_type="dataset"
    )
    return Path(found) if isinstance(found, str) else None


def _holds(path: Path, relative: str, resolution: int | None) -> bool:
    try:
        if not relative.endswith("/"):
            return path.is_file()
        if not (path / "transforms_train.json").is_file():
            return False
        side = path.name.rpartition("_")[2]
        return resolution is None or not side.isdigit() or int(side) % resolution == 0
    except OSError:
        return False


def _listed(mirror: Path, relative: str) -> Checksum | None:
    """What the mirror's own SHA256SUMS says of a file."""
    try:
        lines = (mirror / "SHA256SUMS").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        digest, _, name = line.partition(" ")
        if name.strip().removeprefix("*").removeprefix("./") == relative and len(digest) == 64:
            return Checksum("sha256", digest.lower())
    return None


def _fetch(
    data_set: DataSet, source: Source, split: str | None, progress: Callable[[str, int, int | None], None] | None
) -> _Place:
    """The file from its official address, into the cache."""
    if _offline():
        raise DataUnavailable(_absent(data_set, split) + " (now offline: LATHE_OFFLINE or HF_HUB_OFFLINE is set)")
    failed_at, reason = _unreachable.get(data_set.name, (-1e9, ""))
    if time.monotonic() - failed_at > 60:
        try:
            return _download(source, progress)
        except (DownloadError, ValueError) as error:
            reason = str(error)
            _unreachable[data_set.name] = (time.monotonic(), reason)
    raise DataUnavailable(f"{_absent(data_set, split)} ({reason})")


def _download(source: Source, progress: Callable[[str, int, int | None], None] | None) -> _Place:
    target = cache_folder() / "files" / source.path
    label = source.path.rstrip("/").rpartition("/")[2]

    def report(done: int, total: int | None) -> None:
        if progress is not None:
            progress(label, done, total)

    if source.hub is not None:
        return _Place(_from_hub(source, report), source.checksum)
    limit = 2 * source.size + (1 << 20)
    if source.inside is None:
        download(source.url, target, checksum=source.checksum, limit=limit, report=report)
        return _Place(target, source.checksum)
    archive = cache_folder() / "archives" / source.url.rpartition("/")[2]
    download(source.url, archive, checksum=source.checksum, limit=limit, report=report)
    try:
        extract(archive, target if source.path.endswith("/") else target.parent, inside=source.inside)
    except OSError as error:
        raise DownloadError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            archive.unlink()  # unpacked, or not what it should be: of no more use
    return _Place(target, None)


def _from_hub(source: Source, report: Callable[[int, int | None], None]) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    assert source.hub is not None
    repository, revision = source.hub
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    require_reachable(endpoint)
    disable_progress_bars()
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        found = hf_hub_download(
            repository,
            source.path.removeprefix(f"{repository}/"),
            repo_type="dataset",
            revision=revision,
            cache_dir=constants.HF_HUB_CACHE,
            endpoint=endpoint,
        )
    except Exception as error:  # the Hub's client lets through what its transports raise
        lines = str(error).strip().splitlines()
        raise DownloadError(f"{source.url} cannot be had: {lines[0] if lines else type(error).__name__}") from error
    finally:
        log.setLevel(level)
    path = Path(found)
    if source.checksum is not None and not source.checksum.matches(path):
        with suppress(OSError):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise DownloadError(f"{source.url} is not the expected file: its sha256 is another")
    report(path.stat().st_size, path.stat().st_size)
    return path


def _read(data_set: DataSet, places: list[_Place], options: dict[str, Any], label: str, count: int | None) -> Any:
    kept = None
    if data_set.slow:
        kept = cache_folder() / "tensors" / f"{data_set.name}-{label}-{_fingerprint(places)}.safetensors"
        with suppress(Exception):  # whatever ails what was kept, the files themselves are still there
            return _recall(kept)
    try:
        for place in places:
            if place.checksum is not None and not place.checksum.matches(place.path):
                raise ValueError(f"{place.path} is damaged: its checksum is not {place.checksum.digest[:12]}...")
        value = data_set.read([place.path for place in places], **options)
        if count is not None and len(value) != count:
            raise ValueError(f"{places[0].path} holds {len(value):,} samples, not {count:,}")
    except (ValueError, OSError) as error:
        raise DataUnavailable(
            f"{data_set.name} cannot be read: {error}; remove the file and get it again with: "
            f"lathe data get {data_set.name}"
        ) from error
    if kept is not None:
        with suppress(Exception):  # a cache that cannot be written to only costs time
            _keep(kept, value, f"{data_set.name}-{label}-")
    return value


def _fingerprint(places: list[_Place]) -> str:
    digest = hashlib.sha256(_PARSED.encode())
    for place in places:
        files = sorted(place.path.rglob("*")) if place.path.is_dir() else [place.path]
        for file in files:
            state = file.stat()
            digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _keep(path: Path, value: Any, prefix: str) -> None:
    from safetensors.torch import save_file

    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    tensors = {name: part.contiguous() for name, part in parts.items() if isinstance(part, Tensor)}
    rest = {name: part for name, part in parts.items() if name not in tensors}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        save_file(tensors, draft, {"kind": type(value).__name__, "rest": json.dumps(rest)})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    for old in path.parent.glob(f"{prefix}*.safetensors"):
        if old != path:
            old.unlink()


def _recall(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata["rest"]).items()}
    return _KINDS[metadata["kind"]](**tensors, **rest)


def _bundled(data_set: DataSet) -> Path:
    # Found without importing scikit-learn, which takes as long as PyTorch.
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "datasets" / "data" / f"{data_set.name}.csv.gz"
        if file.is_file():
            return file
    raise DataUnavailable(f"{data_set.name} comes with scikit-learn, which is not here: pip install scikit-learn")


def _whereabouts(data_set: DataSet) -> Path | None:
    if not data_set.files:
        with suppress(DataUnavailable):
            return _bundled(data_set)
        return None
    places = [place.path for source in data_set.files if (place := _locate(source, None)) is not None]
    if not places:
        return None
    parents = {place.parent for place in places}
    return places[0] if len(places) == 1 else parents.pop() if len(parents) == 1 else places[0]


def _absent(data_set: DataSet, split: str | None) -> str:
    what = data_set.name if split is None else f"{data_set.name} ({split})"
    mirror = _mirror()
    places = [str(cache_folder())] if mirror is None else [f"LATHE_DATA={mirror}", str(cache_folder())]
    return f"{what} is not on this machine ({', '.join(places)}); get it with: lathe data get {data_set.name}"
