"""Readers of files that a person was given: each returns checked tensors, or raises ValueError with the file's name.

None of them runs anything that stands in a file: no pickles, no executable headers; sizes are checked before memory is
taken.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from lathe.data.download import checked_members
from lathe.data.kinds import Fields, Graph, Graphs, Images, OneShot, Ratings, Text, Views

__all__ = [
    "bundled_digits",
    "burgers_fields",
    "citation_graph",
    "darcy_fields",
    "drawn_characters",
    "graph6_graphs",
    "one_shot_runs",
    "parquet_images",
    "photographs",
    "ratings",
    "running_text",
]

_MEMORY = 4 << 30  # no set here needs more when it is unpacked
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _clearly(read: Callable[_P, _R]) -> Callable[_P, _R]:
    """Whatever a broken file makes a library raise, the caller sees one ValueError that names the file."""

    @wraps(read)
    def reader(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return read(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # libraries raise anything from KeyError to struct.error on broken bytes
            where = ", ".join(str(file) for file in args[0])  # type: ignore[attr-defined]
            lines = str(error).strip().splitlines()
            raise ValueError(f"{where} cannot be read: {lines[0] if lines else type(error).__name__}") from error

    return reader


@_clearly
def parquet_images(files: Sequence[Path], *, names: Sequence[str], shape: tuple[int, int, int]) -> Images:
    """Images in the Hub's layout: a column of encoded images (`image` or `img`) and one of labels, in parquet."""
    import pyarrow.parquet as pq

    inputs, labels = [], []
    for file in files:
        with pq.ParquetFile(file, thrift_string_size_limit=1 << 26, thrift_container_size_limit=1 << 22) as parquet:
            rows = parquet.metadata.num_rows
            sizes = [parquet.metadata.row_group(g).total_byte_size for g in range(parquet.metadata.num_row_groups)]
            if not 0 < rows <= 5_000_000 or not 0 <= sum(sizes) <= _MEMORY:
                raise ValueError(f"it holds {rows:,} rows of {sum(sizes):,} bytes")
            column = next((name for name in ("image", "img") if name in parquet.schema_arrow.names), None)
            if column is None or "label" not in parquet.schema_arrow.names:
                raise ValueError(f"its columns are {parquet.schema_arrow.names}, not an image and a label")
            table = parquet.read(columns=[column, "label"], use_threads=False)
        encoded = (item["bytes"] for item in table[column].combine_chunks())
        inputs.append(_decode((item.as_py() for item in encoded), table.num_rows, shape))
        labels.append(torch.from_numpy(table["label"].to_numpy().astype(np.int64)))
    return _images(torch.cat(inputs), torch.cat(labels), names)


@_clearly
def drawn_characters(files: Sequence[Path]) -> Images:
    """Omniglot's zips of folders alphabet/character: a class for each character, ink 0 on paper 255."""
    encoded: dict[str, bytes] = {}
    for file in files:
        with zipfile.ZipFile(file) as archive:
            for member in checked_members(archive, limit=_MEMORY):
                if member.filename.endswith(".png"):
                    encoded[member.filename] = archive.read(member)
    places = sorted(encoded)
    names = ["/".join(place.split("/")[-3:-1]) for place in places]
    if not places or any(name.count("/") != 1 for name in names):
        raise ValueError("it holds no folders alphabet/character with drawings")
    classes = tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(classes)}
    inputs = _decode((encoded[place] for place in places), len(places), (1, 105, 105))
    return _images(inputs, torch.tensor([numbers[name] for name in names]), classes)


@_clearly
def one_shot_runs(files: Sequence[Path]) -> OneShot:
    """Omniglot's runs of one-shot classification, in the order of their names."""
    (file,) = files
    with zipfile.ZipFile(file) as archive:
        content = {m.filename: archive.read(m) for m in checked_members(archive, limit=_MEMORY)}
    runs = sorted({name.split("/")[0] for name in content if name.endswith("class_labels.txt")})
    support, queries, answers = [], [], []
    for run in runs:
        pairs = [line.split() for line in content[f"{run}/class_labels.txt"].decode("ascii").splitlines() if line]
        known = sorted({answer for _, answer in pairs})
        support.append(_decode((content[name] for name in known), len(known), (1, 105, 105)))
        queries.append(_decode((content[query] for query, _ in pairs), len(pairs), (1, 105, 105)))
        answers.append(torch.tensor([known.index(answer) for _, answer in pairs]))
    if not runs:
        raise ValueError("it holds no runs")
    return OneShot(torch.stack(support), torch.stack(queries), torch.stack(answers))


@_clearly
def bundled_digits(files: Sequence[Path], *, split: str) -> Images:
    """scikit-learn's digits, 0..16 stretched to 0..255; 360 of them, drawn once and for all, are the split "test"."""
    (file,) = files
    with gzip.open(file, "rt", encoding="ascii") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    if rows.shape != (1797, 65) or rows[:, :64].min() < 0 or rows[:, :64].max() > 16:
        raise ValueError(f"it holds an array of shape {rows.shape}, not 1797 rows of 64 pixels in 0..16 and a label")
    pixels = torch.from_numpy(np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(rows[:, 64].copy())
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    chosen = {"train": order[360:], "test": order[:360], "all": torch.arange(1797)}[split]
    return _images(pixels[chosen], labels[chosen], "0123456789")


@_clearly
def running_text(files: Sequence[Path], *, part: tuple[float, float] = (0.0, 1.0)) -> Text:
    """UTF-8 text, one file after the other, or a part of it; the ends of lines as in the files."""
    content = "".join(file.read_bytes().decode("utf-8") for file in files)
    if not content:
        raise ValueError("it is empty")
    begin, end = (round(share * len(content)) for share in part)
    return Text(content[begin:end])


@_clearly
def ratings(
    files: Sequence[Path], *, separator: str, header: str | None, best: float, last_user: int | None = None
) -> Ratings:
    """Rows of user, item, rating and time, without those of users beyond `last_user`."""
    (file,) = files
    head, _, body = file.read_text("ascii").partition("\n") if header is not None else ("", "", file.read_text("ascii"))
    if header is not None and head != header:
        raise ValueError(f"its first line is {head[:40]!r}, not {header!r}")
    if not body.strip():
        raise ValueError("it holds no rows")
    rows = np.loadtxt(io.StringIO(body), delimiter=separator, dtype=np.float64, ndmin=2, comments=None)
    if rows.shape[1:] != (4,) or not len(rows):
        raise ValueError(f"it holds {rows.shape[0]} rows of {rows.shape[-1]} columns, not of 4")
    numbers = rows[:, [0, 1, 3]]
    if not (np.isfinite(rows).all() and (numbers == np.floor(numbers)).all() and (np.abs(numbers) < 2**53).all()):
        raise ValueError("users, items and times are not all whole numbers")
    if not ((rows[:, 2] > 0) & (rows[:, 2] <= best)).all():
        raise ValueError(f"ratings are not all above 0 and at most {best}")
    if last_user is not None:
        rows = rows[rows[:, 0] <= last_user]
    user_ids, users = np.unique(rows[:, 0].astype(np.int64), return_inverse=True)
    item_ids, items = np.unique(rows[:, 1].astype(np.int64), return_inverse=True)
    return Ratings(
        users=torch.from_numpy(users.astype(np.int64)),
        items=torch.from_numpy(items.astype(np.int64)),
        values=torch.from_numpy(rows[:, 2].astype(np.float32)),
        times=torch.from_numpy(rows[:, 3].astype(np.int64)),
        user_ids=torch.from_numpy(user_ids),
        item_ids=torch.from_numpy(item_ids),
    )


@_clearly
def citation_graph(files: Sequence[Path]) -> Graph:
    """A citation network as sparse matrices (adjacency and word counts) in one npz; links lose their direction."""
    from scipy.sparse import csr_matrix

    (file,) = files
    with zipfile.ZipFile(file) as archive:
        checked_members(archive, limit=_MEMORY)
    with np.load(file, allow_pickle=False) as arrays:
        adjacency = _sparse(csr_matrix, arrays, "adj")
        words = _sparse(csr_matrix, arrays, "attr")
        labels = arrays["labels"].astype(np.int64)
        names = tuple(str(name) for name in arrays["class_names"])
    count = len(labels)
    if adjacency.shape != (count, count) or words.shape[0] != count:
        raise ValueError(f"it has {count} labels for {adjacency.shape[0]} nodes and {words.shape[0]} rows of words")
    if count == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"its labels are not all in 0..{len(names) - 1}")
    if count * words.shape[1] * 4 > _MEMORY:
        raise ValueError(f"its features of shape {words.shape} are too large")
    links = (adjacency + adjacency.T).tocoo()
    keep = (links.row != links.col) & (links.data != 0)
    order = np.lexsort((links.col[keep], links.row[keep]))
    edges = np.stack([links.row[keep][order], links.col[keep][order]]).astype(np.int64)
    features = np.ascontiguousarray(words.toarray(), dtype=np.float32)
    return Graph(torch.from_numpy(features), torch.from_numpy(edges), torch.from_numpy(labels), names)


@_clearly
def graph6_graphs(files: Sequence[Path]) -> Graphs:
    """Graphs in McKay's graph6 format, one a line, each of as many nodes as the first; headers are passed over."""
    (file,) = files
    lines = [line.removeprefix(b">>graph6<<") for line in file.read_bytes().splitlines() if line]
    if not lines:
        raise ValueError("it holds no graphs")
    nodes, start = lines[0][0] - 63, 1
    if nodes == 63:  # more than 62 nodes: their number stands in the next 18 bits
        if len(lines[0]) < 4 or lines[0][1] == 126:
            raise ValueError("its first graph has more than 258,047 nodes, or is cut off")
        nodes, start = sum((lines[0][1 + i] - 63) << (12 - 6 * i) for i in range(3)), 4
    bits = nodes * (nodes - 1) // 2
    length = start + -(-bits // 6)
    if nodes < 1 or len(lines) * nodes * nodes > _MEMORY:
        raise ValueError(f"it holds {len(lines)} graphs of {nodes} nodes")
    if any(len(line) != length or line[:start] != lines[0][:start] for line in lines):
        raise ValueError(f"its graphs are not all of {nodes} nodes and {length} bytes")
    codes = np.frombuffer(b"".join(lines), dtype=np.uint8).reshape(len(lines), length)[:, start:]
    if codes.size and not (codes.min() >= 63 and codes.max() <= 126):
        raise ValueError("it holds bytes that are no graph6")
    # Six bits a byte, the upper triangle column by column; padded with zeros.
    entries = np.unpackbits((codes - 63)[..., None], axis=2)[..., 2:].reshape(len(lines), -1)
    columns, rows = np.tril_indices(nodes, -1)
    adjacency = np.zeros((len(lines), nodes, nodes), dtype=np.uint8)
    adjacency[:, rows, columns] = adjacency[:, columns, rows] = entries[:, :bits]
    return Graphs(torch.from_numpy(adjacency))


@_clearly
def darcy_fields(files: Sequence[Path]) -> Fields:
    """Darcy flow: permeability in, pressure out, each with one channel."""
    arrays = _named_tensors(files, {"a": "x", "u": "y"})
    a, u = arrays["a"], arrays["u"]
    if a.ndim != 3 or a.shape != u.shape:
        raise ValueError(f"a and u have shapes {tuple(a.shape)} and {tuple(u.shape)}, not (count, height, width) both")
    return _fields(a.unsqueeze(1), u.unsqueeze(1))


@_clearly
def burgers_fields(files: Sequence[Path]) -> Fields:
    """Burgers' equation: the initial state in (one channel), all times out (channels are times)."""
    arrays = _named_tensors(files, {"x": "x", "y": "y"})
    x, y = arrays["x"], arrays["y"]
    if x.ndim != 2 or y.ndim != 3 or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}, which do not belong together")
    return _fields(x.unsqueeze(1), y)


@_clearly
def photographs(files: Sequence[Path], *, split: str, resolution: int) -> Views:
    """A scene in the layout of NeRF-Synthetic: every 8th training view is held out as the split "test".

    Views larger than `resolution` are averaged down over boxes of pixels.
    """
    from PIL import Image

    (folder,) = files
    described = json.loads((folder / "transforms_train.json").read_text("utf-8"))
    angle = float(described["camera_angle_x"])
    if not 0 < angle < math.pi:
        raise ValueError(f"camera_angle_x is {angle}, not an angle between 0 and pi")
    images, poses = [], []
    for number, frame in enumerate(described["frames"]):
        if (number % 8 == 0) != (split == "test"):
            continue
        pose = np.asarray(frame["transform_matrix"], dtype=np.float32)
        if pose.shape != (4, 4) or not np.isfinite(pose).all():
            raise ValueError(f"frame {number} has no matrix of 4 by 4 finite numbers")
        path = (folder / (str(frame["file_path"]) + ".png")).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"frame {number} names the file {frame['file_path']!r} outside of the folder")
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if width != height or width > 4096 or width < resolution or width % resolution:
                raise ValueError(f"frame {number} has {width} x {height} pixels, no multiple of {resolution} each")
            view = image.convert("RGBA")
            if width != resolution:
                view = view.resize((resolution, resolution), Image.Resampling.BOX)
            images.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
        poses.append(torch.from_numpy(pose))
    if not images:
        raise ValueError(f"it has no views for the split {split!r}")
    return Views(torch.stack(images), torch.stack(poses), resolution / (2 * math.tan(angle / 2)))


def _decode(encoded: Iterable[bytes], count: int, shape: tuple[int, int, int]) -> Tensor:
    """PNG or JPEG bytes as one tensor; an image of another size is refused before its pixels are unpacked."""
    from PIL import Image

    channels, height, width = shape
    pixels = np.empty((count, height, width, channels), dtype=np.uint8)
    number = 0
    for number, content in enumerate(encoded, start=1):
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            if image.size != (width, height):
                raise ValueError(f"image {number} has {image.size[0]} x {image.size[1]} pixels, not {width} x {height}")
            mode = "L" if channels == 1 else "RGB"
            plain = image if image.mode == mode else image.convert(mode)
            pixels[number - 1] = np.asarray(plain).reshape(height, width, channels)
    if number != count:
        raise ValueError(f"it holds {number} images, not {count}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _images(inputs: Tensor, labels: Tensor, names: Sequence[str]) -> Images:
    if len(inputs) != len(labels) or not len(labels):
        raise ValueError(f"it holds {len(inputs)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"its labels are not all in 0..{len(names) - 1}")
    return Images(inputs, labels, tuple(names))


def _sparse(make: Any, arrays: Any, name: str) -> Any:
    rows, columns = (int(size) for size in arrays[f"{name}_shape"])
    parts = (arrays[f"{name}_data"], arrays[f"{name}_indices"], arrays[f"{name}_indptr"])
    if rows < 0 or columns < 0 or any(part.dtype.kind not in "fiu" or part.ndim != 1 for part in parts):
        raise ValueError(f"{name} is no sparse matrix of numbers")
    matrix = make(parts, shape=(rows, columns))
    matrix.check_format(full_check=True)
    return matrix


def _named_tensors(files: Sequence[Path], names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of an official `.pt`, where they have other names.

    A `.pt` only gets here after its checksum was right, and is read by PyTorch's reader that runs no code.
    """
    (file,) = files
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        arrays = load_file(file)
        names = {name: name for name in names}
    else:
        try:
            arrays = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError("it holds more than tensors") from error
    missing = [name for name in names.values() if not isinstance(arrays.get(name), Tensor)]
    if missing:
        raise ValueError(f"it holds no tensor {missing[0]!r}")
    return {ours: arrays[theirs] for ours, theirs in names.items()}


def _fields(inputs: Tensor, outputs: Tensor) -> Fields:
    inputs, outputs = inputs.float().contiguous(), outputs.float().contiguous()
    if not len(inputs) or not (inputs.isfinite().all() and outputs.isfinite().all()):
        raise ValueError("it holds no pairs of finite numbers")
    return Fields(inputs, outputs)
