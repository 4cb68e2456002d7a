"""Files from the network, whole and checked, or not at all.

A download is resumed where it broke, compared with its checksum, and moved into place in one step. Archives are
unpacked by member: names that leave the folder, links and bombs are refused before a byte is written. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import http.client
import lzma
import os
import shutil
import socket
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

__all__ = ["Checksum", "DownloadError", "checked_members", "download", "extract", "require_reachable"]

Report = Callable[[int, int | None], None]

_CHUNK = 1 << 16
# What zipfile raises on broken bytes, from its own error to those of the decompressors and of seeks to nowhere.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
)
_HEADWAY = 1 << 16  # bytes by which an attempt must have moved on not to count as failed
_SLOWEST = 512  # bytes per second; a connection that gives less over a whole `timeout` has stalled


class DownloadError(RuntimeError):
    """A file cannot be had; the message says which and why, in one line."""


class _Refused(DownloadError):
    """What another attempt cannot mend."""


@dataclass(frozen=True)
class Checksum:
    """What a file must be: its sha256, or the id under which git keeps it (which hashes its length as well)."""

    kind: str
    digest: str

    def __post_init__(self) -> None:
        if self.kind not in ("sha256", "git") or len(self.digest) != {"sha256": 64, "git": 40}[self.kind]:
            raise ValueError(f"checksum must be a sha256 or a git blob id, got {self.kind} {self.digest!r}")

    def of(self, path: Path) -> str:
        if self.kind == "sha256":
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def matches(self, path: Path) -> bool:
        return self.of(path) == self.digest


def download(
    url: str,
    target: Path,
    *,
    checksum: Checksum | None = None,
    limit: int = 2 << 30,
    report: Report | None = None,
    timeout: float = 20.0,
    attempts: int = 5,
    pause: float = 1.0,
) -> Path:
    """Fetch `url` into `target`, which holds the whole checked file or is not touched.

    What has arrived stays in `target.part` and the next attempt, or the next call, goes on from there.

    Args:
        url: https; plain http only on this machine (loopback), and no redirect leads from https to http elsewhere.
        limit: the most bytes that are taken.
        report: called with the bytes there and the bytes in all (None where the server does not say).
        timeout: seconds to wait for the server, each time.
        attempts: tries before giving up; those that make headway do not count.
        pause: seconds before the second attempt, doubled each time.

    Raises:
        DownloadError: where the file cannot be had, is not the right one, is too large or cannot be written.
    """
    _check_address(url)
    part, tag = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.tag")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock"), timeout=600):
            if target.exists() and (checksum is None or checksum.matches(target)):
                return target
            _fetch(url, part, tag, checksum, limit, report, timeout, attempts, pause)
            if checksum is not None and not checksum.matches(part):
                found = checksum.of(part)
                _forget(part, tag)
                raise DownloadError(
                    f"{url} is not the expected file: {checksum.kind} {found[:12]}..., not {checksum.digest[:12]}..."
                )
            _flush(part)
            os.replace(part, target)
            _forget(tag)
    except OSError as error:
        raise DownloadError(f"{target.parent} cannot be written to: {error.strerror or error}") from error
    return target


def require_reachable(url: str, timeout: float = 5.0) -> None:
    """Tell at once, for clients that try for long, where a host cannot be reached.

    Raises:
        DownloadError: where the host has no address or takes no connection; never behind a proxy, which alone knows.
    """
    address = urlsplit(url)
    if not address.hostname or urllib.request.getproxies():
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=timeout).close()
    except OSError as error:
        raise DownloadError(f"{url} cannot be reached: {error}") from error


def _fetch(
    url: str,
    part: Path,
    tag: Path,
    checksum: Checksum | None,
    limit: int,
    report: Report | None,
    timeout: float,
    attempts: int,
    pause: float,
) -> None:
    failed = 0
    mended = False
    while True:
        before = _size(part)
        try:
            complete = _attempt(url, part, tag, checksum is not None, limit, report, timeout)
            if complete and (mended or checksum is None or checksum.matches(part)):
                return
            if complete:  # damaged on the way, or not the rest of what was there before: once more, from nothing
                mended = True
                _forget(part, tag)
                continue
            reason = "the connection closed early"
        except _Refused:
            _forget(part, tag)
            raise
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # no such range: the file is shorter than what is there
                _forget(part, tag)
            elif error.code < 500 and error.code not in (408, 425, 429):
                raise DownloadError(f"{url} cannot be had: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if isinstance(error.reason, (socket.gaierror, ConnectionRefusedError)):
                raise DownloadError(f"{url} cannot be reached: {reason}") from error
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        except ValueError as error:
            raise DownloadError(f"{url} leads to what is no address: {error}") from error
        failed = 0 if _size(part) >= before + _HEADWAY else failed + 1
        if failed >= attempts:
            raise DownloadError(f"{url} cannot be had after {attempts} attempts: {reason}")
        time.sleep(min(30.0, pause * 2**failed))


def _attempt(url: str, part: Path, tag: Path, checked: bool, limit: int, report: Report | None, timeout: float) -> bool:
    """One request; whether the file is complete after it."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "lathe"}
    there = _size(part)
    known = tag.read_text() if tag.exists() else ""
    # Without a checksum, only a tag of the server can tell that the rest belongs to the beginning.
    if there and (checked or known):
        headers["Range"] = f"bytes={there}-"
        if known:
            headers["If-Range"] = known
    opener = urllib.request.build_opener(_SafeRedirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refused(f"{url} came encoded as {response.headers['Content-Encoding']}, which was not asked for")
        resumed = response.status == 206 and _range_start(response.headers.get("Content-Range")) == there
        if response.status == 206 and not resumed:
            _forget(part, tag)
            raise http.client.HTTPException("the server answers with another range than asked for")
        start = there if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        if total is not None and total > limit:
            raise _Refused(f"{url} has {total:,} bytes, more than the {limit:,} expected at most")
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            tag.write_text(etag)
        else:
            _forget(tag)
        done = start
        with part.open("ab" if resumed else "wb") as stream:
            for chunk in _chunks(response, timeout):
                done += len(chunk)
                if done > limit:
                    raise _Refused(f"{url} gives more than the {limit:,} bytes expected at most")
                stream.write(chunk)
                if report is not None:
                    report(done, total)
    return total is None or done == total


def _chunks(response: Any, timeout: float) -> Iterator[bytes]:
    began, arrived = time.monotonic(), 0
    while chunk := response.read1(_CHUNK):
        yield chunk
        arrived += len(chunk)
        if (elapsed := time.monotonic() - began) > timeout:
            if arrived < _SLOWEST * elapsed:
                raise TimeoutError(f"only {arrived} bytes in {elapsed:.0f} s")
            began, arrived = time.monotonic(), 0


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None:
            for name in ("Range", "If-range"):
                if req.has_header(name):
                    redirected.add_header(name, req.get_header(name))
        return redirected


def _check_address(url: str) -> None:
    try:
        address = urlsplit(url)
        host = address.hostname or ""
    except ValueError as error:
        raise _Refused(f"{url!r} is no address: {error}") from error
    if address.scheme == "https" and host:
        return
    if address.scheme != "http" or not _is_loopback(host):
        raise _Refused(f"{url!r} is refused: only https, or http on this machine, is fetched")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _range_start(value: str | None) -> int | None:
    if not value or not value.startswith("bytes "):
        return None
    start = value[len("bytes ") :].split("-")[0]
    return int(start) if start.isdigit() else None


def extract(archive: Path, folder: Path, *, inside: str, limit: int = 4 << 30) -> None:
    """Unpack what is `inside` a zip (a file, or a folder that ends in "/"), wherever it stands there, into `folder`.

    Raises:
        ValueError: where the archive is broken, or has a name, link or size that is refused; nothing is left then.
    """
    draft = folder.with_name(folder.name + f".unpacking-{os.getpid()}")
    try:
        try:
            opened = zipfile.ZipFile(archive)
        except (*_BROKEN, ValueError) as error:
            raise ValueError(f"{archive} is no archive that can be unpacked: {error}") from error
        with opened:
            members = ((member, _below(member.filename, inside)) for member in checked_members(opened, limit=limit))
            found = [(member, name) for member, name in members if name]
            if not found:
                raise ValueError(f"{archive} has no {inside}")
            for member, name in found:
                path = draft / name.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as sink:
                    for chunk in _content(opened, member):
                        sink.write(chunk)
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                final = folder / path.relative_to(draft)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _below(name: str, inside: str) -> str:
    """The name below a folder, or of the file itself; nothing where it is elsewhere."""
    _, found, rest = f"/{name}".partition(f"/{inside}")
    if not found or inside.endswith("/"):
        return rest
    return "" if rest else inside.rpartition("/")[2]


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    done = 0
    try:
        with archive.open(member) as source:
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                if done > member.file_size:
                    raise ValueError("it is larger than the archive says")
                yield chunk
    except (*_BROKEN, ValueError) as error:
        raise ValueError(f"{archive.filename} cannot be unpacked: {member.filename!r}: {error}") from error


def checked_members(archive: zipfile.ZipFile, *, limit: int) -> list[zipfile.ZipInfo]:
    """The files of a zip, after all its names and sizes have been found harmless.

    Raises:
        ValueError: for a name that is absolute or leaves the folder, a link, an encrypted or repeated member, or more
            than `limit` bytes in all.
    """
    name = getattr(archive, "filename", None) or "the archive"
    members, seen, total = [], set(), 0
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if not member.filename:
            raise ValueError(f"{name} is refused: it holds a member without a name")
        # Windows separators and drives too: an archive is checked for every system that may open it.
        if path.is_absolute() or ".." in path.parts or any(sign in member.filename for sign in ("\\", ":", "//")):
            raise ValueError(f"{name} is refused: its member {member.filename!r} leads out of the folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{name} is refused: its member {member.filename!r} is no plain file")
        if member.flag_bits & 1:
            raise ValueError(f"{name} is refused: its member {member.filename!r} is encrypted")
        if member.is_dir():
            continue
        if str(path).casefold() in seen:
            raise ValueError(f"{name} is refused: it holds {member.filename!r} twice")
        seen.add(str(path).casefold())
        total += member.file_size
        if total > limit:
            raise ValueError(f"{name} is refused: it unpacks to more than {limit:,} bytes")
        members.append(member)
    return members


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _forget(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
