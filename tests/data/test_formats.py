"""Readers against values known beforehand, and against files that are broken or mean harm."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.sparse import csr_matrix

from lathe.data import formats
from lathe.data.kinds import Images, Text, Views

NAMES = ("cat", "dog", "eel")


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int = 5, shape: tuple[int, ...] = (6, 4, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_parquet(path: Path, column: str = "image") -> Path:
    items = [{"bytes": png(pixels), "path": "x.png"} for pixels in pictures()]
    pq.write_table(pa.table({column: items, "label": [0, 2, 1, 1, 0]}), path, row_group_size=2)
    return path


def write_drawings(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/", "")
        for name, dot in [("B/character01", 3), ("A/character02", 2), ("A/character01", 1)]:
            for number in range(2):
                pixels = np.full((105, 105), 255, dtype=np.uint8)
                pixels[dot, number] = 0
                archive.writestr(f"top/{name}/0{number}.png", png(pixels, "1"))
    return path


def write_runs(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for run in ("run01", "run02"):
            for number in range(3):
                for part, value in (("test/item", 10), ("training/class", 100)):
                    pixels = np.full((105, 105), value + number, dtype=np.uint8)
                    archive.writestr(f"{run}/{part}{number}.png", png(pixels))
            pairs = [f"{run}/test/item{q}.png {run}/training/class{(q + 1) % 3}.png" for q in range(3)]
            archive.writestr(f"{run}/class_labels.txt", "\n".join(pairs) + "\n")
    return path


def write_graph(path: Path, **changes) -> Path:
    adjacency = csr_matrix(np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=np.float32))
    words = csr_matrix(np.array([[1, 0], [0, 2], [0, 0], [3, 4]], dtype=np.float32))
    arrays = {"labels": np.array([0, 1, 1, 0], dtype=np.int8), "class_names": np.array(["p", "q"])}
    for name, matrix in (("adj", adjacency), ("attr", words)):
        arrays |= {f"{name}_data": matrix.data, f"{name}_indices": matrix.indices, f"{name}_indptr": matrix.indptr}
        arrays[f"{name}_shape"] = np.array(matrix.shape)
    np.savez(path, **(arrays | changes))
    return path


def write_graph6(path: Path) -> Path:
    graphs = [nx.gnp_random_graph(9, 0.4, seed=seed) for seed in range(3)]
    path.write_bytes(b"".join(nx.to_graph6_bytes(graph, header=seed == 1) for seed, graph in enumerate(graphs)))
    return path


def write_darcy(path: Path) -> Path:
    save_file({"a": torch.eye(4).byte().expand(3, 4, 4).contiguous(), "u": torch.ones(3, 4, 4)}, path)
    return path


def write_ratings(path: Path) -> Path:
    path.write_text("7\t30\t4\t881250949\n5\t10\t1\t891717742\n7\t10\t5\t878887116\n")
    return path


def write_scene(folder: Path, count: int = 9, size: int = 8, **frame) -> Path:
    (folder / "train").mkdir(parents=True)
    frames = []
    for number in range(count):
        pixels = np.zeros((size, size, 4), dtype=np.uint8)
        pixels[: size // 2] = (200, 100, 50, 255)
        pixels[0, 0, 0] = number
        (folder / "train" / f"r_{number}.png").write_bytes(png(pixels))
        pose = (np.eye(4) + number).tolist()
        frames.append({"file_path": f"./train/r_{number}", "transform_matrix": pose} | frame)
    (folder / "transforms_train.json").write_text(json.dumps({"camera_angle_x": math.pi / 2, "frames": frames}))
    return folder


read_images = partial(formats.parquet_images, names=NAMES, shape=(3, 6, 4))
read_ratings = partial(formats.ratings, separator="\t", header=None, best=5.0)

READERS: dict[str, tuple[Callable[[Path], Path], Callable]] = {
    "images.parquet": (write_parquet, read_images),
    "drawings.zip": (write_drawings, formats.drawn_characters),
    "runs.zip": (write_runs, formats.one_shot_runs),
    "graph.npz": (write_graph, formats.citation_graph),
    "graphs.g6": (write_graph6, formats.graph6_graphs),
    "darcy.safetensors": (write_darcy, formats.darcy_fields),
    "u.data": (write_ratings, read_ratings),
}


# What they read


@pytest.mark.parametrize("column", ["image", "img"])
def test_images_in_the_hubs_layout(tmp_path, column):
    images = read_images([write_parquet(tmp_path / "f.parquet", column)])
    assert torch.equal(images.inputs, torch.from_numpy(pictures()).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [0, 2, 1, 1, 0] and images.names == NAMES and len(images) == 5
    assert images.float().max() <= 1 and torch.equal((images.float() * 255).round().byte(), images.inputs)


def test_drawn_characters_are_classes_by_alphabet_and_character(tmp_path):
    images = formats.drawn_characters([write_drawings(tmp_path / "f.zip")])
    assert images.names == ("A/character01", "A/character02", "B/character01")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    ink = (images.inputs[:, 0] == 0).nonzero().tolist()
    assert ink == [[0, 1, 0], [1, 1, 1], [2, 2, 0], [3, 2, 1], [4, 3, 0], [5, 3, 1]]


def test_one_shot_runs_know_their_answers(tmp_path):
    runs = formats.one_shot_runs([write_runs(tmp_path / "f.zip")])
    assert runs.support.shape == runs.queries.shape == (2, 3, 1, 105, 105)
    for run in range(2):
        for query in range(3):
            shown = runs.queries[run, query].max().item() - 10
            assert runs.support[run, runs.answers[run, query]].max().item() - 100 == (shown + 1) % 3


def test_a_graph_has_both_directions_and_no_loops(tmp_path):
    graph = formats.citation_graph([write_graph(tmp_path / "f.npz")])
    assert graph.edges.tolist() == [[0, 1, 1, 3], [1, 0, 3, 1]]
    assert graph.features.tolist() == [[1, 0], [0, 2], [0, 0], [3, 4]]
    assert graph.labels.tolist() == [0, 1, 1, 0] and graph.names == ("p", "q")


@pytest.mark.parametrize("nodes", [1, 2, 9, 62, 63, 100])
def test_graph6_is_read_as_networkx_reads_it(tmp_path, nodes):
    graphs = [nx.gnp_random_graph(nodes, 0.4, seed=seed) for seed in range(4)]
    path = tmp_path / "f.g6"
    path.write_bytes(b"".join(nx.to_graph6_bytes(graph, header=seed % 2 == 0) for seed, graph in enumerate(graphs)))
    read = formats.graph6_graphs([path])
    assert len(read) == 4
    for graph, adjacency in zip(nx.read_graph6(path), read.adjacency):
        np.testing.assert_array_equal(adjacency, nx.to_numpy_array(graph))
    path.write_bytes(nx.to_graph6_bytes(graphs[0]) + nx.to_graph6_bytes(nx.path_graph(nodes + 6)))
    with pytest.raises(ValueError, match=f"not all of {nodes} nodes"):
        formats.graph6_graphs([path])


def test_ratings_are_counted_from_zero(tmp_path):
    ratings = read_ratings([write_ratings(tmp_path / "u.data")])
    assert ratings.user_ids.tolist() == [5, 7] and ratings.item_ids.tolist() == [10, 30] and ratings.shape == (2, 2)
    assert ratings.users.tolist() == [1, 0, 1] and ratings.items.tolist() == [1, 0, 0]
    assert ratings.values.tolist() == [4, 1, 5] and ratings.times.tolist() == [881250949, 891717742, 878887116]
    (tmp_path / "r.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.5,10\n999,999999,5.0,11")
    read = partial(formats.ratings, separator=",", header="userId,movieId,rating,timestamp", best=5.0)
    assert len(read([tmp_path / "r.csv"])) == 2 and len(read([tmp_path / "r.csv"], last_user=610)) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_darcy_reads_alike_in_both_formats(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    if suffix == ".pt":
        torch.save({"x": torch.eye(4).bool().expand(3, 4, 4).clone(), "y": torch.ones(3, 4, 4)}, path)
    else:
        write_darcy(path)
    fields = formats.darcy_fields([path])
    assert torch.equal(fields.inputs, torch.eye(4).expand(3, 1, 4, 4)) and torch.equal(
        fields.outputs, torch.ones(3, 1, 4, 4)
    )


def test_views_are_averaged_down_and_every_eighth_is_held_out(tmp_path):
    folder = write_scene(tmp_path / "scene")
    train = formats.photographs([folder], split="train", resolution=8)
    test = formats.photographs([folder], split="test", resolution=8)
    assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7] and test.images[:, 0, 0, 0].tolist() == [0, 8]
    assert train.poses[2].tolist() == (np.eye(4) + 3).tolist() and train.focal == pytest.approx(4.0)
    small = formats.photographs([folder], split="test", resolution=2)
    assert small.focal == pytest.approx(1.0) and small.images[1, :, 0, 1].tolist() == [200, 100, 50, 255]
    assert small.images[1, :, 1, 0].tolist()[3] == 0
    over = small.over()
    assert over[0, :, 1, 0].tolist() == [1, 1, 1] and over[0, 0, 0, 1].item() == pytest.approx(200 / 255)


def test_text_in_part(tmp_path):
    (tmp_path / "t").write_bytes("añb\r\ncd\n".encode())
    assert formats.running_text([tmp_path / "t"]).content == "añb\r\ncd\n"
    parts = [formats.running_text([tmp_path / "t"], part=part).content for part in [(0, 0.5), (0.5, 0.75), (0.75, 1)]]
    assert "".join(parts) == "añb\r\ncd\n"


@given(st.text(min_size=1))
def test_characters_spell_the_text(content):
    numbers, vocabulary = Text(content).characters()
    assert "".join(vocabulary[number] for number in numbers.tolist()) == content
    assert list(vocabulary) == sorted(set(content))


def test_words_are_counted_and_strange_ones_unknown():
    text = Text("a b a\nb a <unk>\n")
    numbers, vocabulary = text.words()
    assert vocabulary == ("a", "<eos>", "b", "<unk>")
    assert numbers.tolist() == [0, 2, 0, 1, 2, 0, 3, 1]
    assert Text("a z").words(vocabulary)[0].tolist() == [0, 3, 1]
    with pytest.raises(ValueError, match="none for 'z'"):
        Text("z").words(("a", "<eos>"))
    with pytest.raises(ValueError, match="none for 'z'"):
        Text("z").characters(("a",))
    with pytest.raises(ValueError, match="once"):
        Text("a").characters(("a", "a"))


def test_a_subset_is_drawn_by_its_generator(rng):
    images = Images(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), torch.arange(10) % 2, ("a", "b"))
    drawn = images.subset(6, rng)
    assert len(set(drawn.inputs.flatten().tolist())) == 6
    assert torch.equal(drawn.inputs.flatten() % 2, drawn.labels) and images.subset(3).inputs.flatten().tolist() == [
        0,
        1,
        2,
    ]
    with pytest.raises(ValueError, match="between 1 and 10, got 11"):
        images.subset(11)


# What they refuse


@pytest.mark.timeout(60)  # none of them hangs
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_bytes_are_a_value_error_that_names_the_file(tmp_path_factory, name, data):
    write, read = READERS[name]
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    path = folder / name
    original = folder / f"original-{name}"
    if not original.exists():
        write(original)
    content = bytearray(original.read_bytes())
    kind = data.draw(st.sampled_from(["change", "cut", "noise", "insert", "empty"]))
    if kind == "change":
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            content[place] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        content = bytearray(data.draw(st.binary(max_size=200)) if kind == "noise" else b"")
    path.write_bytes(content)
    try:
        read([path])
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickles_are_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "arrays.npz", labels=np.array([Trap()], dtype=object))
    good = dict(np.load(write_graph(tmp_path / "good.npz")))
    np.savez(tmp_path / "names.npz", **(good | {"class_names": np.array(["p", Trap()], dtype=object)}))
    torch.save({"x": Trap(), "y": torch.ones(1)}, tmp_path / "darcy.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("arrays.npz", "names.npz", "plain.npz"):
        with pytest.raises(ValueError, match=name):
            formats.citation_graph([tmp_path / name])
    for name in ("darcy.pt", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            formats.darcy_fields([tmp_path / name])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labels": np.array([0, 1, 2, 0])}, r"labels are not all in 0\.\.1"),
        ({"labels": np.array([0, 1])}, "2 labels for 4 nodes"),
        ({"adj_indices": np.array([1, 3, 99, 1])}, "indices"),
        ({"adj_indptr": np.array([0, 1, 2, 3])}, "index pointer"),
        ({"adj_shape": np.array([2**40, 2**40])}, "."),
        ({"attr_shape": np.array([4, 2**40])}, "too large"),
        ({"adj_data": np.array(["a", "b", "c", "d"])}, "no sparse matrix of numbers"),
    ],
)
def test_a_graph_that_does_not_fit_together_is_refused(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        formats.citation_graph([write_graph(tmp_path / "f.npz", **changes)])


def test_images_that_do_not_fit_are_refused(tmp_path):
    path = write_parquet(tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=r"labels are not all in 0\.\.1"):
        formats.parquet_images([path], names=NAMES[:2], shape=(3, 6, 4))
    with pytest.raises(ValueError, match="4 x 6 pixels, not 5 x 6"):
        formats.parquet_images([path], names=NAMES, shape=(3, 6, 5))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [0]}), path)
    with pytest.raises(ValueError, match=r"f\.parquet"):
        read_images([path])
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(ValueError, match="not an image and a label"):
        read_images([path])
    bomb = png(np.zeros((6000, 6000), dtype=np.uint8))
    pq.write_table(pa.table({"image": [{"bytes": bomb, "path": ""}], "label": [0]}), path)
    with pytest.raises(ValueError, match="6000 x 6000 pixels"):
        read_images([path])


@pytest.mark.parametrize(
    "lines, says",
    [
        ("1\t2\t6\t0\n", "at most 5"),
        ("1\t2\t0\t0\n", "above 0"),
        ("1\t2\tnan\t0\n", "whole numbers"),
        ("1.5\t2\t3\t0\n", "whole numbers"),
        ("1\t2\t3\n", "3 columns"),
        ("1\t2\t3\t4\n1\t2\n", "."),
        ("a\tb\tc\td\n", "."),
        ("1\t2\té\t4\n", "."),
        ("", "."),
    ],
)
@pytest.mark.filterwarnings("ignore:.*input contained no data.*")
def test_rows_that_are_no_ratings_are_refused(tmp_path, lines, says):
    (tmp_path / "u.data").write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"u\.data cannot be read: .*{says}"):
        read_ratings([tmp_path / "u.data"])


@pytest.mark.parametrize(
    "frame, says",
    [
        ({"file_path": "../../secret"}, "outside of the folder"),
        ({"file_path": "/etc/secret"}, "outside of the folder"),
        ({"transform_matrix": [[1.0]]}, "4 by 4"),
        ({"transform_matrix": [[math.nan] * 4] * 4}, "4 by 4 finite"),
    ],
)
def test_scenes_that_lead_elsewhere_are_refused(tmp_path, frame, says):
    with pytest.raises(ValueError, match=says):
        formats.photographs([write_scene(tmp_path / "scene", **frame)], split="train", resolution=8)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"camera_angle_x": 9, "frames": []}', b"[" * 100_000, b"\xff"])
def test_scenes_without_a_description_are_refused(tmp_path, content):
    folder = write_scene(tmp_path / "scene")
    (folder / "transforms_train.json").write_bytes(content)
    with pytest.raises(ValueError, match="scene cannot be read"):
        formats.photographs([folder], split="train", resolution=8)


def test_a_resolution_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no multiple of 3"):
        formats.photographs([write_scene(tmp_path / "scene")], split="train", resolution=3)
    assert isinstance(formats.photographs([tmp_path / "scene"], split="train", resolution=4), Views)


def test_zips_that_lead_out_are_refused_by_readers_too(tmp_path):
    path = write_drawings(tmp_path / "f.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../A/character03/01.png", b"")
    for read in (formats.drawn_characters, formats.one_shot_runs):
        with pytest.raises(ValueError, match="leads out of the folder"):
            read([path])
