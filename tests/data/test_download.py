"""Downloads from a server that truncates, corrupts, stalls, redirects and lies, and archives that mean harm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import stat
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lathe.data.download import Checksum, DownloadError, download, extract

CONTENT = bytes(range(256)) * 3000  # 768,000 bytes: several reads
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())
fetch = partial(download, timeout=0.4, attempts=3, pause=0.01)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_file_arrives_whole_and_is_told_of(site, tmp_path):
    told = []
    url = site.file("/f", CONTENT)
    target = fetch(url, tmp_path / "deep" / "f", checksum=SHA256, report=lambda *state: told.append(state))
    assert target.read_bytes() == CONTENT and left(tmp_path / "deep") == {"f"}
    assert told[-1] == (len(CONTENT), len(CONTENT)) and told == sorted(told) and len(told) > 3
    fetch(url, target, checksum=SHA256)
    assert len(site.asked("/f")) == 1, "what is there is not fetched again"


@given(cuts=st.lists(st.integers(0, len(CONTENT)), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_connection_cut_anywhere_is_resumed(site, tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("cut")
    site.requests.clear()
    url = site.file("/cut", CONTENT, send=lambda attempt: cuts[attempt] if attempt < len(cuts) else None)
    target = fetch(url, folder / "f", checksum=SHA256, attempts=9)
    assert target.read_bytes() == CONTENT and left(folder) == {"f"}
    asked = [headers.get("Range") for headers in site.asked("/cut")]
    if cuts[0] < len(CONTENT):
        assert asked[1] == (f"bytes={cuts[0]}-" if cuts[0] else None)


def test_a_call_goes_on_where_the_last_one_broke(site, tmp_path):
    url = site.file("/f", CONTENT, send=lambda attempt: 100_000 if attempt < 3 else None, ranges=True)
    site.pages["/broken"] = lambda request, attempt: request.send_error(500)
    (tmp_path / "f.part").write_bytes(CONTENT[:5000])
    with pytest.raises(DownloadError, match="500"):
        fetch(site.url("/broken"), tmp_path / "f", checksum=SHA256)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:5000] and not (tmp_path / "f").exists()
    fetch(url, tmp_path / "f", checksum=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT and site.asked("/f")[0]["Range"] == "bytes=5000-"


@pytest.mark.parametrize("checksum", [SHA256, None])
def test_a_server_that_ignores_ranges_is_read_from_the_start(site, tmp_path, checksum):
    url = site.file("/f", CONTENT, ranges=False, send=lambda attempt: 300_000 if attempt == 0 else None)
    assert fetch(url, tmp_path / "f", checksum=checksum).read_bytes() == CONTENT


def test_a_server_that_answers_with_another_range_spoils_nothing(site, tmp_path):
    url = site.file("/f", CONTENT, shift=7, send=lambda attempt: 300_000 if attempt == 0 else None)
    assert fetch(url, tmp_path / "f", checksum=SHA256).read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_not_pieced_together(site, tmp_path):
    other = CONTENT[::-1]

    def page(request, attempt):
        kind, tag = (CONTENT, '"one"') if attempt == 0 else (other, '"two"')
        site.answer(request, kind, attempt, etag=tag, send=lambda a: 300_000 if a == 0 else None)

    site.pages["/f"] = page
    assert fetch(site.url("/f"), tmp_path / "f").read_bytes() == other
    assert site.asked("/f")[1]["If-Range"] == '"one"'


@pytest.mark.parametrize("there", [b"something else", CONTENT + b"more", b"x" * len(CONTENT)])
def test_a_beginning_of_another_file_is_thrown_away(site, tmp_path, there):
    (tmp_path / "f.part").write_bytes(there)
    assert fetch(site.file("/f", CONTENT), tmp_path / "f", checksum=SHA256).read_bytes() == CONTENT


def test_damage_on_the_way_is_mended_and_a_wrong_file_refused(site, tmp_path):
    wrong = b"!" + CONTENT[1:]

    def page(request, attempt):
        site.answer(request, wrong if attempt == 0 else CONTENT, attempt)

    site.pages["/once"] = page
    assert fetch(site.url("/once"), tmp_path / "f", checksum=SHA256).read_bytes() == CONTENT
    (tmp_path / "f").unlink()
    with pytest.raises(DownloadError, match="not the expected file: sha256") as raised:
        fetch(site.file("/always", wrong), tmp_path / "f", checksum=SHA256)
    assert left(tmp_path) == set() and "\n" not in str(raised.value) and len(site.asked("/always")) == 2


def test_a_stalled_connection_is_dropped_and_resumed(site, tmp_path):
    url = site.file("/f", CONTENT, stall=True, send=lambda attempt: 200_000 if attempt == 0 else None)
    assert fetch(url, tmp_path / "f", checksum=SHA256).read_bytes() == CONTENT
    assert site.asked("/f")[1]["Range"] == "bytes=200000-"


def test_a_server_that_always_stalls_or_drips_is_given_up(site, tmp_path):
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"after 2 attempts: .*timed out"):
        fetch(site.file("/stall", CONTENT, stall=True, send=lambda attempt: 0), tmp_path / "f", attempts=2)

    def drip(request, attempt):
        request.send_response(200)
        request.end_headers()
        while not site.closing.wait(0.02):
            request.wfile.write(b".")
            request.wfile.flush()

    site.pages["/drip"] = drip
    with pytest.raises(DownloadError, match=r"after 2 attempts: only \d+ bytes in"):
        fetch(site.url("/drip"), tmp_path / "g", attempts=2)
    assert time.monotonic() - began < 10


def test_a_server_that_gives_a_little_each_time_is_given_up(site, tmp_path):
    url = site.file("/f", CONTENT, send=lambda attempt: 10)
    with pytest.raises(DownloadError, match="closed early"):
        fetch(url, tmp_path / "f", checksum=SHA256)
    assert len(site.asked("/f")) == 3


def redirect(to: str, code: int = 302):
    def page(request, attempt):
        request.send_response(code)
        request.send_header("Location", to)
        request.end_headers()

    return page


def test_a_redirect_is_followed_and_keeps_the_range(site, tmp_path):
    site.file("/real", CONTENT)
    site.pages["/f"] = redirect("/real", 307)
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    assert fetch(site.url("/f"), tmp_path / "f", checksum=SHA256).read_bytes() == CONTENT
    assert site.asked("/real")[0]["Range"] == "bytes=1000-"


@pytest.mark.parametrize(
    "to",
    [
        "http://192.0.2.1/f",
        "file:///etc/passwd",
        "ftp://127.0.0.1/f",
        "http://127.0.0.1.example.com/f",
        "http://[bad/f",
    ],
)
def test_a_redirect_away_from_https_is_refused(site, tmp_path, to):
    site.pages["/f"] = redirect(to)
    with pytest.raises(DownloadError, match=r"is refused|is no address|is not allowed"):
        fetch(site.url("/f"), tmp_path / "f")
    with pytest.raises(DownloadError, match=r"is refused|is no address"):
        fetch(to, tmp_path / "f")
    assert len(site.requests) == 1 and left(tmp_path) == set()


def test_redirects_in_a_circle_end(site, tmp_path):
    site.pages["/f"] = redirect("/f")
    with pytest.raises(DownloadError, match="302"):
        fetch(site.url("/f"), tmp_path / "f", attempts=1)


@pytest.mark.parametrize("declared", [True, False])
def test_more_bytes_than_expected_are_not_taken(site, tmp_path, declared):
    if declared:
        site.file("/f", CONTENT)
    else:

        def endless(request, attempt):
            request.send_response(200)
            request.end_headers()
            while not site.closing.is_set():
                request.wfile.write(CONTENT)

        site.pages["/f"] = endless
    with pytest.raises(DownloadError, match="500,000"):
        fetch(site.url("/f"), tmp_path / "f", limit=500_000)
    assert left(tmp_path) == set() and len(site.asked("/f")) == 1


def test_a_passing_fault_is_waited_out_and_a_lasting_one_is_not(site, tmp_path):
    good = site.file("/good", CONTENT)
    proper = site.pages["/good"]
    site.pages["/f"] = lambda request, attempt: request.send_error(503) if attempt < 2 else proper(request, attempt)
    assert fetch(site.url("/f"), tmp_path / "f").read_bytes() == CONTENT and good
    with pytest.raises(DownloadError, match="404"):
        fetch(site.url("/absent"), tmp_path / "g")
    assert len(site.asked("/absent")) == 1


def test_an_encoded_answer_is_refused(site, tmp_path):
    url = site.file("/f", CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="encoded as gzip"):
        fetch(url, tmp_path / "f")


def test_a_host_that_is_not_there_is_told_at_once(site, tmp_path):
    began = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/f", tmp_path / "f", attempts=50, pause=1.0)
    assert time.monotonic() - began < 5


def test_a_folder_that_cannot_be_written_to_is_told(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written to"):
        fetch(site.file("/f", CONTENT), tmp_path / "file" / "f")


def test_two_at_once_fetch_one_file(site, tmp_path):
    url = site.file("/f", CONTENT)
    threads = [
        threading.Thread(target=fetch, args=(url, tmp_path / "f"), kwargs={"checksum": SHA256}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_bytes() == CONTENT and len(site.asked("/f")) == 1


def test_git_ids_are_gits(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert Checksum("git", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391").matches(tmp_path / "empty")
    assert Checksum("git", "ce013625030ba8dba906f756967f9e9ca394464a").matches(tmp_path / "hello")
    assert not Checksum("git", "ce013625030ba8dba906f756967f9e9ca394464a").matches(tmp_path / "empty")
    with pytest.raises(ValueError, match="sha256 or a git blob id"):
        Checksum("md5", "0" * 32)


# Archives


def archive(path: Path, members: dict[str, bytes], **attributes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            opened.writestr(info, content)
    return path


def test_a_folder_or_a_file_is_unpacked_without_what_stands_around_it(tmp_path):
    path = archive(tmp_path / "a.zip", {"top/in/a": b"A", "top/in/deep/b": b"B", "top/c": b"C", "top/inner": b"D"})
    extract(path, tmp_path / "folder", inside="top/in/")
    extract(path, tmp_path / "file", inside="top/c")
    found = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != path}
    assert found == {"folder/a": b"A", "folder/deep/b": b"B", "file/c": b"C"}


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "in/../../out",
        "/out",
        "C:/out",
        "..\\out",
        "in\\..\\..\\out",
        "in/..",
        "//host/share",
        "in:stream",
        "in//tmp/out",
    ],
)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    path = archive(tmp_path / "a.zip", {"in/good": b"1", name: b"2"})
    with pytest.raises(ValueError, match="leads out of the folder"):
        extract(path, tmp_path / "to" / "folder", inside="in/")
    assert {p.name for p in tmp_path.rglob("*")} <= {"a.zip", "to"}


def test_links_bombs_and_doubles_are_refused(tmp_path):
    link = archive(tmp_path / "link.zip", {"in/link": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16)
    with pytest.raises(ValueError, match="no plain file"):
        extract(link, tmp_path / "out", inside="in/")
    bomb = archive(tmp_path / "bomb.zip", {"in/zeros": bytes(5_000_000)})
    with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
        extract(bomb, tmp_path / "out", inside="in/", limit=1_000_000)
    with pytest.warns(UserWarning):
        double = archive(tmp_path / "double.zip", {"in/a": b"1"})
        with zipfile.ZipFile(double, "a") as opened:
            opened.writestr("in/a", b"2")
    with pytest.raises(ValueError, match="twice"):
        extract(double, tmp_path / "out", inside="in/")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_lies_about_its_sizes_is_refused(tmp_path):
    content = archive(tmp_path / "a.zip", {"in/zeros": bytes(2_000_000)}).read_bytes()
    size = (2_000_000).to_bytes(4, "little")
    assert content.count(size) == 2
    (tmp_path / "a.zip").write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(ValueError):
        extract(tmp_path / "a.zip", tmp_path / "out", inside="in/", limit=1_000_000)
    assert not (tmp_path / "out").exists()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_broken_archives_are_a_value_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "archives"
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("in/a", b"abc" * 50)
        opened.writestr("in/b", b"d" * 20)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    path = folder / "a.zip"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(ValueError):
        extract(path, folder / "out", inside="in/")
    assert all(p.is_relative_to(folder) for p in folder.rglob("*"))
