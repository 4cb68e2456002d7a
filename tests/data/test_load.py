"""Where data sets come from, in which order, and what is said where they are not to be had."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lathe import data
from lathe.data import formats, store
from lathe.data.registry import SETS, DataSet, Source, Split

MIRROR = Path(os.environ.get("LATHE_DATA") or "/nowhere")


def parquet(colour: int, count: int = 3) -> bytes:
    items = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4), colour + number, dtype=np.uint8)).save(buffer, "PNG")
        items.append({"bytes": buffer.getvalue(), "path": ""})
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": items, "label": list(range(count))}), buffer)
    return buffer.getvalue()


def read(files: list[Path]) -> data.Images:
    read.calls += 1
    return formats.parquet_images(files, names=("a", "b", "c"), shape=(1, 4, 4))


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def tiny(places, site, monkeypatch) -> Source:
    """A set "tiny" of three images, whose official file is served on this machine."""
    read.calls = 0
    content = parquet(50)
    url = site.file("/tiny.parquet", content)
    source = Source("tiny/t.parquet", url, len(content), "sha256:" + hashlib.sha256(content).hexdigest())
    one = DataSet("tiny", "three images", "none", read, {"train": Split((source,), count=3)}, slow=True)
    monkeypatch.setitem(SETS, "tiny", one)
    return source


def change(monkeypatch, source: Source, **options) -> None:
    monkeypatch.setitem(SETS, "tiny", replace(SETS["tiny"], splits={"train": Split((source,), **options)}))


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def colour(images: data.Images) -> int:
    return int(images.inputs[0, 0, 0, 0])


# Where from


def test_the_mirror_comes_before_the_cache_and_the_cache_before_the_network(tiny, places, site):
    assert colour(data.load("tiny")) == 50 and len(site.requests) == 1
    assert data.where("tiny") == places / "cache" / "files" / "tiny" / "t.parquet"
    assert colour(data.load("tiny")) == 50 and len(site.requests) == 1
    put(places / "mirror" / "tiny" / "t.parquet", parquet(90))
    assert colour(data.load("tiny")) == 90 and len(site.requests) == 1
    assert data.where("tiny") == places / "mirror" / "tiny" / "t.parquet"


def test_what_was_read_is_kept_until_the_file_changes(tiny, places):
    path = put(places / "mirror" / "tiny" / "t.parquet", parquet(10))
    first, again = data.load("tiny"), data.load("tiny")
    assert read.calls == 1 and torch.equal(first.inputs, again.inputs) and first.names == again.names == ("a", "b", "c")
    again.inputs.zero_()
    assert colour(data.load("tiny")) == 10, "what was kept is not what was handed out"
    put(path, parquet(20))
    assert colour(data.load("tiny")) == 20 and read.calls == 2
    (kept,) = (places / "cache" / "tensors").iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    assert colour(data.load("tiny")) == 20 and read.calls == 3


def test_a_cache_that_cannot_be_written_to_only_costs_time(tiny, places, monkeypatch):
    put(places / "mirror" / "tiny" / "t.parquet", parquet(10))
    monkeypatch.setenv("LATHE_CACHE", str(put(places / "file", b"") / "cache"))
    assert colour(data.load("tiny")) == colour(data.load("tiny")) == 10 and read.calls == 2


def test_a_mirror_is_held_to_its_own_checksums(tiny, places):
    path = put(places / "mirror" / "tiny" / "t.parquet", parquet(10))
    listed = hashlib.sha256(path.read_bytes()).hexdigest()
    put(places / "mirror" / "SHA256SUMS", f"{listed}  ./tiny/t.parquet\n".encode())
    assert colour(data.load("tiny")) == 10
    put(path, parquet(11))
    with pytest.raises(data.DataUnavailable, match=r"t\.parquet is damaged.*lathe data get tiny"):
        data.load("tiny")


def test_a_file_of_the_wrong_length_is_told(tiny, places):
    put(places / "mirror" / "tiny" / "t.parquet", parquet(10, count=2))
    with pytest.raises(data.DataUnavailable, match="holds 2 samples, not 3"):
        data.load("tiny")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>404</html>"])
def test_a_damaged_file_is_one_line_with_its_name(tiny, places, content):
    path = put(places / "mirror" / "tiny" / "t.parquet", content)
    with pytest.raises(data.DataUnavailable, match="tiny cannot be read") as raised:
        data.load("tiny")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_cached_file_is_found_by_the_official_checksum(tiny, places):
    data.load("tiny")
    put(places / "cache" / "files" / "tiny" / "t.parquet", parquet(60))
    with pytest.raises(data.DataUnavailable, match="damaged"):
        data.load("tiny")


# What is fetched


def test_get_tells_of_its_progress_and_fetches_once(tiny, places, site):
    told = []
    path = data.get("tiny", progress=lambda *state: told.append(state))
    assert path == data.get("tiny") and path.read_bytes() == parquet(50) and len(site.requests) == 1
    assert told[-1] == ("t.parquet", tiny.size, tiny.size)


def test_a_file_with_another_checksum_is_not_taken(tiny, places, site):
    site.file("/tiny.parquet", parquet(51))
    with pytest.raises(data.DataUnavailable, match=r"not the expected file.*") as raised:
        data.load("tiny")
    assert "lathe data get tiny" in str(raised.value) and "\n" not in str(raised.value)
    assert not list((places / "cache").rglob("t.parquet*part*")) and data.listing()[-1]["where"] is None
    asked = len(site.requests)
    with pytest.raises(data.DataUnavailable, match="not the expected file"):
        data.load("tiny")
    assert len(site.requests) == asked, "what failed a moment ago is not tried again by load"
    site.file("/tiny.parquet", parquet(50))
    assert data.get("tiny").exists(), "but by get"


def test_an_archive_is_unpacked_and_thrown_away(tiny, places, site, monkeypatch):
    content = zipped({"top/t.parquet": parquet(70), "top/other": b"x"})
    url = site.file("/a.zip", content)
    check = "sha256:" + hashlib.sha256(content).hexdigest()
    change(monkeypatch, Source("tiny/t.parquet", url, len(content), check, inside="top/t.parquet"))
    assert colour(data.load("tiny")) == 70
    files = [path.name for path in (places / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert "t.parquet" in files and not any(name.endswith((".zip", "other", ".part", ".tag")) for name in files)


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "top/../../evil"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tiny, places, site, monkeypatch, name):
    content = zipped({"top/t.parquet": parquet(70), name: b"x"})
    change(monkeypatch, Source("tiny/", site.file("/a.zip", content), len(content), inside="top/"))
    with pytest.raises(data.DataUnavailable, match="leads out of the folder"):
        data.load("tiny")
    assert not list(places.rglob("evil")) and not Path("/evil").exists() and not list(places.rglob("t.parquet"))


def test_a_scene_is_fetched_where_the_mirror_has_small_views_only(places, site, monkeypatch):
    def scene(size: int) -> dict[str, bytes]:
        frames, files = [], {}
        for number in range(16):
            frames.append({"file_path": f"./train/r_{number}", "transform_matrix": np.eye(4).tolist()})
            buffer = io.BytesIO()
            Image.fromarray(np.full((size, size, 4), number, dtype=np.uint8)).save(buffer, "PNG")
            files[f"train/r_{number}.png"] = buffer.getvalue()
        return files | {"transforms_train.json": json.dumps({"camera_angle_x": 0.7, "frames": frames}).encode()}

    content = zipped({f"wrapped/scenes/lego/{name}": part for name, part in scene(800).items()} | {"other": b""})
    lego = SETS["lego"]
    source = replace(lego.files[0], url=site.file("/l.zip", content), inside="scenes/lego/")
    splits = {name: replace(split, files=(source,), count=None) for name, split in lego.splits.items()}
    monkeypatch.setitem(SETS, "lego", replace(lego, splits=splits))
    for name, part in scene(100).items():
        put(places / "mirror" / "nerf_synthetic" / "lego_100" / name, part)
    assert data.load("lego").images.shape == (14, 4, 100, 100)
    assert data.load("lego", "test", resolution=25).images.shape == (2, 4, 25, 25) and not site.requests
    data.get("lego")
    assert len(site.requests) == 1 and data.load("lego", "test", resolution=400).images.shape == (2, 4, 400, 400)
    assert data.get("lego") and len(site.requests) == 1


@pytest.mark.parametrize("variable", ["LATHE_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("hub", [None, ("someone/tiny", "0" * 40)])
def test_offline_never_touches_the_network(tiny, places, site, monkeypatch, variable, hub):
    monkeypatch.setenv(variable, "1")
    change(monkeypatch, replace(tiny, hub=hub))

    def forbidden(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    for act in (data.load, data.get):
        with pytest.raises(data.DataUnavailable, match=r"lathe data get tiny \(now offline") as raised:
            act("tiny")
        assert "\n" not in str(raised.value)
    assert not site.requests


def test_sets_of_the_hub_come_through_its_client(tiny, places, site, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    content, revision = parquet(80), "1" * 40
    digest = hashlib.sha256(content).hexdigest()
    path = f"/datasets/someone/tiny/resolve/{revision}/t.parquet"
    headers = {"X-Repo-Commit": revision, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
    site.file(path, content, etag=f'"{digest}"', headers=headers)
    good = Source("someone/tiny/t.parquet", "unused", len(content), f"sha256:{digest}", hub=("someone/tiny", revision))
    change(monkeypatch, good)
    assert colour(data.load("tiny")) == 80 and {asked for asked, _ in site.requests} == {path}
    assert revision in str(data.where("tiny"))
    asked = len(site.requests)
    assert colour(data.load("tiny")) == 80 and len(site.requests) == asked
    bad = replace(good, check="sha256:" + "0" * 64, hub=("someone/tiny", "2" * 40))
    site.file(
        path.replace("1" * 40, "2" * 40), content, etag=f'"{digest}"', headers=headers | {"X-Repo-Commit": "2" * 40}
    )
    change(monkeypatch, bad)
    with pytest.raises(data.DataUnavailable, match="not the expected file"):
        data.load("tiny")


def test_a_hub_that_is_not_there_is_told_at_once(tiny, places, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    change(monkeypatch, replace(tiny, hub=("someone/tiny", "3" * 40)))
    began = time.monotonic()
    with pytest.raises(data.DataUnavailable, match=r"lathe data get tiny .*cannot be reached") as raised:
        data.load("tiny")
    assert time.monotonic() - began < 5 and "\n" not in str(raised.value)


# What is asked for


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("mnits",), r"name must be one of digits, mnist.*got 'mnits' \(did you mean 'mnist'\?\)"),
        (("",), "name must be one of"),
        (("mnist", "tset"), "split of mnist must be one of train, test, got 'tset'"),
        (("cora", "test"), "split of cora must be one of train"),
        (("darcy", "train", 32), r"resolution of darcy \(train\) must be one of 16, got 32"),
        (("mnist", "train", 32), "must be left out, got 32"),
        (("lego", "train", 33), "must be one of 25, 50, 100"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(places, arguments, says):
    name, *rest = arguments
    with pytest.raises(ValueError, match=says):
        data.load(name, *rest[:1], **({"resolution": rest[1]} if len(rest) > 1 else {}))


@pytest.mark.parametrize("name", [name for name in SETS if name != "digits"])
def test_every_absent_set_names_the_command_that_gets_it(places, monkeypatch, name):
    monkeypatch.setenv("LATHE_OFFLINE", "1")
    monkeypatch.setattr(store, "_from_hub_cache", lambda source: None)
    split = next(iter(SETS[name].resolutions or SETS[name].splits))
    with pytest.raises(
        data.DataUnavailable, match=rf"{name} \({split}\) is not on this machine.*lathe data get {name}"
    ):
        data.load(name, split)
    with pytest.raises(data.DataUnavailable, match=f"lathe data get {name}"):
        data.where(name)


def test_digits_are_scikit_learns_whatever_else_is_missing(places, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setenv("LATHE_OFFLINE", "1")
    theirs, ours = load_digits(), data.load("digits", "all")
    np.testing.assert_allclose(ours.float()[:, 0].numpy() * 16, theirs.images, atol=16 / 510 + 1e-5)
    assert ours.labels.tolist() == theirs.target.tolist()
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    rows = {bytes(image.flatten().tolist()) for part in (train, test) for image in part.inputs}
    assert rows == {bytes(image.flatten().tolist()) for image in ours.inputs}
    assert data.where("digits").name == "digits.csv.gz"


def test_the_listing_says_what_is_where(tiny, places):
    rows = {row["name"]: row for row in data.listing()}
    assert list(rows) == list(data.names()) and set(rows) >= {"digits", "mnist", "cifar10", "omniglot", "ptb", "lego"}
    assert rows["tiny"]["where"] is None and rows["tiny"]["missing"] == ["train"]
    assert rows["digits"]["where"] and not rows["digits"]["missing"]
    assert all(
        row["size"] > 10_000 and row["licence"] and row["summary"]
        for row in rows.values()
        if row["name"] not in ("digits", "tiny")
    )
    json.dumps(list(rows.values()))


def test_every_official_file_is_pinned_and_stays_in_its_place():
    for data_set in SETS.values():
        for file in data_set.files:
            assert file.url.startswith("https://") and file.size > 0
            assert not file.path.startswith("/") and ".." not in Path(file.path).parts
            if file.inside is None:
                assert file.checksum is not None, f"{file.path} is not pinned"
                assert any(len(part) == 40 for part in file.url.split("/")), f"{file.url} has no revision"


# The real files, where they are at hand


@pytest.mark.parametrize("name", [name for name in SETS if name != "digits"])
def test_the_real_files_read_as_they_should(tmp_path, monkeypatch, name):
    if not (MIRROR / "SHA256SUMS").is_file():
        pytest.skip("no LATHE_DATA")
    if name in ("mnist", "cifar10", "omniglot") and not os.environ.get("LATHE_SLOW_TESTS"):
        splits = ["test" if "test" in SETS[name].splits else "small1"]  # decoding all of them takes long
    else:
        splits = list(SETS[name].resolutions or SETS[name].splits)
    monkeypatch.setenv("LATHE_OFFLINE", "1")
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path))

    def counts(images: data.Images) -> list[int]:
        return images.labels.bincount().tolist()

    facts = {
        ("mnist", "test"): lambda v: (
            v.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        ),
        ("cifar10", "test"): lambda v: (
            v.labels.bincount().tolist() == [1000] * 10 and v.inputs.shape[1:] == (3, 32, 32)
        ),
        ("omniglot", "small1"): lambda v: counts(v) == [20] * 136,
        ("cora", "train"): lambda v: v.edges.shape[1] == 2 * 5278 and v.features.shape[1] == 1433 and len(v.names) == 7,
        ("citeseer", "train"): lambda v: v.features.shape[1] == 3703 and len(v.names) == 6,
        ("movielens-100k", "train"): lambda v: v.shape == (943, 1682) and abs(v.values.mean() - 3.52986) < 1e-5,
        ("movielens-small", "train"): lambda v: v.shape == (610, 9724),
        ("tiny-shakespeare", "all"): lambda v: len(v) == 1_115_394 and len(v.characters()[1]) == 65,
        ("strongly-regular", "sr251256"): lambda v: (
            v.adjacency.long() @ v.adjacency.long() == 6 + 6 * torch.eye(25) - v.adjacency
        ).all(),
        ("ptb", "test"): lambda v: len(v.words()[0]) == 82_430,
        ("wikitext-2", "valid"): lambda v: len(v.words()[0]) == 217_646,
        ("lego", "train"): lambda v: abs(v.focal * 8 - 1111.111) < 0.01 and v.images.shape == (87, 4, 100, 100),
        ("darcy", "train"): lambda v: v.inputs.unique().tolist() == [0.0, 1.0],
        ("omniglot-runs", "test"): lambda v: (v.answers.sort(1).values == torch.arange(20)).all(),
    }
    for split in splits:
        try:
            value = data.load(name, split)
        except data.DataUnavailable:
            assert split == "train" and name in ("ptb", "wikitext-2")  # too large for a mirror
            continue
        assert facts.get((name, split), lambda v: True)(value)
