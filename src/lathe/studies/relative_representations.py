"""Do networks that were trained apart understand each other, once they speak in similarities to the same anchors?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, permutations
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.representations.relative_representations import (
    RelativeEncoder,
    RelativeRepresentation,
    bootstrap_anchors,
    latent_similarity,
    relative,
    retrieval_scores,
    select_anchors,
    stitch,
    translate,
)
from lathe.studies.engine import Measurement, NotAtThisScale, Run, Setting, Study, at_least, at_most, average, compare
from lathe.training import accuracy, evaluate, fit

if TYPE_CHECKING:
    import altair

study = Study(
    "relative-representations",
    title="Relative representations enable zero-shot latent space communication",
    authors="Moschella, Maiorca, Fumero, Norelli, Locatello, Rodolà",
    year=2022,
    arxiv="2209.15430",
    area="representations",
    module="lathe.representations.relative_representations",
    summary="""
    Replaces an embedding by its similarities to a few anchor samples, so that networks trained apart share one space.
    Then an encoder of one training works under the head of another without training, and spaces can be compared.
    """,
    example="""
import torch
from lathe.representations.relative_representations import relative, retrieval_scores, stitch

latents = torch.randn(500, 32)                                  # a network's embeddings
other = 3.0 * latents @ torch.linalg.qr(torch.randn(32, 32)).Q  # the same, trained apart: rotated and scaled
a, b = (relative(z[100:], z[:100]) for z in (latents, other))   # the first 100 samples are the anchors
assert retrieval_scores(a, b)["mrr"] > 0.99 > retrieval_scores(latents, other)["mrr"]
model = stitch(torch.nn.Linear(8, 32), torch.nn.Linear(100, 10), anchors_a=torch.randn(100, 8))
assert model(torch.randn(2, 8)).shape == (2, 10)
""",
    job="read",
    # The first auto-encoders of a scale are judged; the others are recorded beside them.
    scales={
        "smoke": Setting(
            seeds=2,
            autoencoders={"digits": {"taken": (1200, 597), "hidden": 128, "latent": 32, "steps": 60, "loss": "mse"}},
            variational=False,
            anchors=64,
            anchor_counts=(4, 64),
            classify="digits",
            train_images=600,
            classifier_steps=30,
            classifier_anchors=64,
            widths=(8, 16),
            head="small",
            feature_norm="layer",
            graph="digits",
            graph_runs=6,
            graph_anchors=64,
            graph_epochs=(3, 60),
        ),
        "desk": Setting(
            seeds=4,
            autoencoders={
                "digits": {"taken": (1200, 597), "hidden": 128, "latent": 32, "steps": 1500, "loss": "mse"},
                "mnist": {"taken": (10_000, 2000), "hidden": 256, "latent": 128, "steps": 1000, "loss": "sigma"},
            },
            variational=True,
            anchors=128,
            anchor_counts=(4, 16, 64, 256),
            classify="mnist",
            train_images=10_000,
            classifier_steps=500,
            classifier_anchors=128,
            widths=(8, 16),
            head="small",
            feature_norm="layer",
            graph="cora",
            graph_runs=40,
            graph_anchors=300,
            graph_epochs=(1, 100),
        ),
        "full": Setting(
            seeds=5,
            autoencoders={"mnist": {"taken": (60_000, 10_000), "conv": True, "steps": 45_000, "loss": "sigma"}},
            variational=True,
            anchors=500,
            anchor_counts=(10, 50, 100, 250, 500, 1000),
            classify="cifar10",
            train_images=50_000,
            classifier_steps=20_000,
            classifier_anchors=500,
            widths=(64, 128),
            head="paper",
            feature_norm="batch",
            graph="cora",
            graph_runs=2000,
            graph_anchors=300,
            graph_epochs=(1, 500),
        ),
    },
)

ANCHOR_SEED = 7  # every network of a study sees the same anchors in the same order


def images(run: Run, name: str, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images `(n, channels, height, width)` in [0, 1] and their classes, on the run's device."""
    data = run.data(name, split)
    if limit is not None and limit < len(data):
        data = data.subset(limit, run.generator(ANCHOR_SEED))
    return data.float().to(run.device), data.labels.to(run.device)


def reconstructed_images(run: Run, name: str, split: str) -> Tensor:
    """The images of the auto-encoders."""
    return images(run, name, split, run.setting.autoencoders[name]["taken"][split == "test"])[0]


def anchor_images(run: Run, inputs: Tensor, count: int) -> Tensor:
    return inputs[select_anchors(inputs, count, generator=run.generator(ANCHOR_SEED)).to(inputs.device)]


# --- auto-encoders: C1, C2, C6 ---------------------------------------------------------------------------------------


def optimal_sigma_loss(output: Tensor | tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Gaussian negative log likelihood a sample, its variance the batch's mean squared error (gradient included); of a
    variational auto-encoder, plus the divergence from N(0, I). The paper's loss.
    """
    image, *code = output if isinstance(output, tuple) else (output,)
    variance = F.mse_loss(image, target)
    loss = ((image - target).square() / (2 * variance) + variance.log() / 2).flatten(1).sum(1).mean()
    if code:
        mean, log_variance = code
        loss = loss + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return loss


class Reconstruction(nn.Module):
    """From coordinates to an image: LayerNorm, for a variational one a sampled code, and a decoder."""

    def __init__(self, width: int, decoder: nn.Module, variational: bool) -> None:
        super().__init__()
        self.norm, self.decoder = nn.LayerNorm(width), decoder
        self.mean: nn.Module | None = nn.Linear(width, width) if variational else None
        self.log_variance: nn.Module | None = nn.Linear(width, width) if variational else None

    def forward(self, coordinates: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        code = self.norm(coordinates)
        if self.mean is None or self.log_variance is None:
            return self.decoder(code)
        mean, log_variance = self.mean(code), self.log_variance(code)
        if not self.training:
            return self.decoder(mean)
        return self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp()), mean, log_variance


class Decoder(nn.Module):
    """Mirror of the paper's convolutional encoder."""

    def __init__(self, width: int, channels: int, size: int) -> None:
        super().__init__()
        sizes = [size]
        for _ in range(4):
            sizes.append((sizes[-1] + 1) // 2)
        self.start = (256, sizes[-1], sizes[-1])
        layers: list[nn.Module] = [nn.Linear(width, math.prod(self.start)), nn.GELU(), nn.Unflatten(1, self.start)]
        for a, b, small, large in zip((256, 128, 64, 32), (128, 64, 32, channels), sizes[:0:-1], sizes[-2::-1]):
            layers.append(nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=large - (2 * small - 1)))
            layers += [nn.BatchNorm2d(b), nn.GELU()] if b != channels else []
        self.layers = nn.Sequential(*layers)

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)


def convolutional_encoder(channels: int) -> nn.Sequential:
    """The paper's: four strided convolutions, the last activation removed."""
    layers: list[nn.Module] = []
    for a, b in zip((channels, 32, 64, 128), (32, 64, 128, 256)):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.GELU()]
    return nn.Sequential(*layers[:-1], nn.Flatten())


def autoencoder(run: Run, name: str, anchors: Tensor | None, variational: bool) -> nn.Sequential:
    """Encoder and reconstruction; absolute where there are no anchors, otherwise the same with r in between."""
    example, told = reconstructed_images(run, name, "test")[:1].cpu(), run.setting.autoencoders[name]
    shape = tuple(example.shape[1:])
    if "conv" in told:
        encoder = convolutional_encoder(shape[0])
        features = encoder(example).shape[1]
    else:
        pixels, hidden, features = math.prod(shape), told["hidden"], told["latent"]
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.GELU(), nn.Linear(hidden, features))
    width = features if anchors is None else len(anchors)
    if "conv" in told:
        decoder: nn.Module = Decoder(width, shape[0], shape[-1])
    else:
        decoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, pixels), nn.Unflatten(1, shape))
    head = Reconstruction(width, decoder, variational)
    return nn.Sequential(encoder if anchors is None else RelativeEncoder(encoder, anchors), head).to(run.device)


def train_autoencoder(
    run: Run, seed: int, name: str, space: str, anchors: int, variational: bool = False
) -> dict[str, Tensor]:
    """Weights of one auto-encoder."""
    x, told = reconstructed_images(run, name, "train"), run.setting.autoencoders[name]
    chosen = anchor_images(run, x, anchors) if space == "relative" else None
    model = autoencoder(run, name, chosen, variational)
    fit(
        model,
        (x, x),
        loss=F.mse_loss if told["loss"] == "mse" and not variational else optimal_sigma_loss,
        optimizer=partial(torch.optim.Adam, lr=1e-3 if "conv" in told else 2e-3),
        steps=told["steps"],
        batch_size=128,
        clip_norm=10.0,
        seed=seed,
        device=run.device,
    )
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def trained_autoencoders(
    run: Run, name: str, space: str, anchors: int, variational: bool = False
) -> tuple[list[Any], Tensor]:
    """The auto-encoders of all seeds, and the anchors."""
    if len(run.seeds) < 2:
        raise NotAtThisScale("stitching takes two networks or more: run with more seeds")
    chosen = anchor_images(run, reconstructed_images(run, name, "train"), anchors)
    models = []
    for weights in run.each_seed(train_autoencoder, name=name, space=space, anchors=anchors, variational=variational):
        model = autoencoder(run, name, chosen if space == "relative" else None, variational)
        model.load_state_dict(weights)
        models.append(model.eval())
    return models, chosen


def reconstruction_errors(
    run: Run, name: str, space: str, anchors: int, variational: bool = False
) -> tuple[list[float], Tensor]:
    """Test error of each auto-encoder, and `[i, j]` of encoder i under decoder j (NaN on the diagonal).

    space: "relative", "absolute", or "translated": the absolute ones, with the linear map of `translate` in between.
    """
    kind = "relative" if space == "relative" else "absolute"
    models, chosen = trained_autoencoders(run, name, kind, anchors, variational)
    x = reconstructed_images(run, name, "test")
    stitched = torch.full((len(models), len(models)), math.nan)
    with torch.no_grad():
        own = [float(F.mse_loss(model(x), x)) for model in models]
        for i, j in permutations(range(len(models)), 2):
            encoder, head = models[i][0], models[j][1]
            if space == "relative":
                mixed: nn.Module = stitch(encoder, head, chosen)
            elif space == "absolute":
                mixed = nn.Sequential(encoder, head)
            else:
                with warnings.catch_warnings():  # of directions left out, which is what the tolerance is for
                    warnings.simplefilter("ignore")
                    across = translate(encoder(chosen), models[j][0](chosen), tolerance=0.1)
                mixed = nn.Sequential(encoder, across, head)
            stitched[i, j] = F.mse_loss(mixed(x), x)
    return own, stitched


def ratios(own: Sequence[float], stitched: Tensor) -> list[float]:
    """Per encoder: mean error under the other decoders, over the mean error of models left whole."""
    return [float(row[~row.isnan()].mean()) / fmean(own) for row in stitched]


@study.claim(
    "C1",
    "Auto-encoders trained apart can exchange encoders without training when the decoder reads similarities to "
    "anchors, and cannot when it reads latents",
    paper="Table 3, MSE x 100, not stitched and stitched: absolute 1.58 and 100.6, relative 2.78 and 8.16 (means over "
    "MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100; as recalled)",
    holds=at_most(4.0),
    unit="stitched error over unstitched",
    also={"absolute: stitched error over unstitched": at_least(20.0)},
)
def stitched_autoencoders(run: Run) -> Measurement:
    judged, *beside = run.setting.autoencoders
    count = run.setting.anchors
    found = {
        space: reconstruction_errors(run, judged, space, count) for space in ("relative", "absolute", "translated")
    }
    if run.setting.variational:
        for space in ("relative", "absolute"):
            found[f"variational, {space}"] = reconstruction_errors(run, judged, space, count, True)
    for name in beside:
        for space in ("relative", "absolute"):
            found[f"{name}, {space}"] = reconstruction_errors(run, name, space, count)
    also, rows = {}, []
    for title, (own, stitched) in found.items():
        also[f"{title}: stitched error over unstitched"] = fmean(ratios(own, stitched))
        also[f"{title}: unstitched MSE x 100"] = 100 * fmean(own)
        also[f"{title}: stitched MSE x 100"] = 100 * float(stitched.nanmean())
        rows += [{"model": title, "pair": "own decoder", "error": 100 * error} for error in own]
        rows += [
            {"model": title, "pair": "another's decoder", "error": 100 * float(stitched[i, j])}
            for i, j in permutations(range(len(own)), 2)
        ]
    run.figure(_strip(rows, "error:Q", "mean squared error × 100 (log)", "model:N", "pair:N", log=True))
    del also["relative: stitched error over unstitched"]
    note = (
        f"{len(run.seeds) * (len(run.seeds) - 1)} ordered pairs of networks; anchors are training images; translated: "
        "absolute networks with one linear map, found from the anchors, between encoder and decoder"
    )
    return average(
        ratios(*found["relative"]),
        baseline=also["absolute: stitched error over unstitched"],
        also=also,
        note=note,
    )


@study.claim(
    "C2",
    "Similarities to anchors, computed after training from ordinary latents, let items of one network find themselves "
    "in another; the latents do not",
    paper="Table 1: FastText to Word2Vec, MRR .94 and Jaccard .34 relative, 0 and 0 absolute",
    holds=at_least(0.8),
    unit="mean reciprocal rank",
    also={"absolute: MRR": at_most(0.1)},
)
def retrieval_after_training(run: Run) -> Measurement:
    judged = next(iter(run.setting.autoencoders))
    models, chosen = trained_autoencoders(run, judged, "absolute", run.setting.anchors)
    x, train = (reconstructed_images(run, judged, split) for split in ("test", "train"))
    with torch.no_grad():
        latents = [model[0](x) for model in models]
        anchors = {"uniform": [model[0](chosen) for model in models]}
        first = models[0][0](train)  # anchors are chosen by the latents of one network, and are the same for all
        for method in ("fps", "kmeans"):
            index = select_anchors(first, len(chosen), method=method, generator=run.generator(ANCHOR_SEED))
            anchors[method] = [model[0](train[index.to(train.device)]) for model in models]
    spaces = {"absolute": latents}
    spaces |= {name: [relative(z, a) for z, a in zip(latents, chosen_as)] for name, chosen_as in anchors.items()}
    pairs = list(permutations(range(len(models)), 2))
    scores = {name: [retrieval_scores(zs[i], zs[j], k=5) for i, j in pairs] for name, zs in spaces.items()}
    also, rows = {}, []
    for name, found in scores.items():
        label = "absolute" if name == "absolute" else f"relative, {name} anchors"
        for measure, title in (("mrr", "MRR"), ("jaccard", "Jaccard"), ("cosine", "cosine")):
            also[f"{label}: {title}"] = fmean(score[measure] for score in found)
            rows += [{"space": label, "measure": title, "score": round(score[measure], 4)} for score in found]
    run.figure(_strip([row for row in rows if row["measure"] != "cosine"], "score:Q", "score", "space:N", "measure:N"))
    del also["relative, uniform anchors: MRR"]
    also |= bootstrap(run, latents, pairs)
    by_encoder = [
        fmean(score["mrr"] for (i, _), score in zip(pairs, scores["uniform"]) if i == own) for own in range(len(models))
    ]
    return average(by_encoder, baseline=also["absolute: MRR"], also=also, note="k = 5; test images, none an anchor")


def bootstrap(run: Run, latents: list[Tensor], pairs: list[tuple[int, int]]) -> dict[str, float]:
    """How many pairs of test items grow from ten known ones, and which share of them is right."""
    known, wanted = torch.arange(10, device=latents[0].device), min(100, len(latents[0]))
    found = [bootstrap_anchors(latents[i], latents[j], known, known, n=wanted) for i, j in pairs]
    share = fmean(float((pair.a[10:] == pair.b[10:]).float().mean()) for pair in found)
    return {
        "pairs grown from 10 known ones": fmean(len(pair.a) for pair in found),
        "share of right ones among the new": share,
    }


@study.claim(
    "C2a",
    "Similarities to anchors do not change when the latent space is rotated and scaled",
    paper="Section 3: exact for cosine similarity",
    holds=at_most(1e-12),
    kind="exact",
    unit="largest change",
)
def invariance(run: Run) -> Measurement:
    generator = run.generator(0)
    latents = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    before, moved = relative(latents, latents[:100]), 7.3 * latents @ rotation
    change = float((relative(moved, moved[:100]) - before).abs().max())
    shifted = relative(moved + 1.0, moved[:100] + 1.0)
    return Measurement(
        change, also={"change under a translation, which is not covered": float((shifted - before).abs().max())}
    )


@study.claim(
    "C6",
    "More anchors make stitching better, with diminishing returns",
    paper="Appendix, figure on the number of anchors",
    holds=at_least(1.5),
    unit="stitched error with fewest anchors over that with most",
    also={"largest ratio of one error to that with fewer anchors": at_most(1.1)},
)
def more_anchors(run: Run) -> Measurement:
    counts = run.setting.anchor_counts
    judged = next(iter(run.setting.autoencoders))
    found = [reconstruction_errors(run, judged, "relative", count) for count in counts]
    errors = [float(stitched.nanmean()) for _, stitched in found]
    rows = []
    for count, (own, stitched) in zip(counts, found):
        rows += [{"anchors": count, "pair": "own decoder", "error": 100 * error} for error in own]
        rows += [{"anchors": count, "pair": "another's decoder", "error": 100 * float(e)} for e in stitched.nanmean(1)]
    run.figure(_lines(rows))
    first, last = found[0][1].nanmean(1), found[-1][1].nanmean(1)
    also = {f"stitched MSE x 100 with {count} anchors": 100 * error for count, error in zip(counts, errors)}
    also["largest ratio of one error to that with fewer anchors"] = max(b / a for a, b in pairwise(errors))
    note = (
        "with the mean squared error as loss; with the paper's (optimal sigma) as many steps on 1,200 digits end with "
        "larger latents, and the stitched error rises again beyond 64 anchors (MSE x 100: 3.8, 4.1, 2.0, 3.2)"
    )
    return compare(first.tolist(), last.tolist(), how="ratio", also=also, note=note if run.scale == "desk" else "")


# --- classifiers: C3, C4, C7 -----------------------------------------------------------------------------------------

LATENT = 32
ENCODERS = ("mlp-64", "mlp-128", "conv-narrow", "conv-wide")


def image_encoder(kind: str, shape: tuple[int, ...], widths: Sequence[int]) -> nn.Sequential:
    """One of four encoders to 32 latent features; none ends in an activation, which would crowd the cosines."""
    pixels = math.prod(shape)
    if kind == "mlp-64":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.GELU(), nn.Linear(64, LATENT))
    if kind == "mlp-128":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.Tanh(), nn.Linear(128, LATENT))
    width = widths[0] if kind == "conv-narrow" else widths[1]
    size = (shape[-1] + 1) // 2
    stride = 1
    if size > 4:  # larger images than digits: halve once more
        size, stride = (size + 1) // 2, 2
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(2 * width * size * size, LATENT),
    )


class BatchStatistics(nn.Module):
    """The authors' feature norm: over the batch at hand, at test time too, so that predictions depend on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x.mT[None])[0].mT


def feature_norm(kind: str, width: int) -> nn.Module:
    if kind == "transductive":
        return BatchStatistics()
    return nn.LayerNorm(width) if kind == "layer" else nn.BatchNorm1d(width)


def classification_head(run: Run, width: int, classes: int) -> nn.Sequential:
    """The desk's small head, or the paper's for frozen encoders."""
    if run.setting.head == "small":
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, classes))
    norm = partial(feature_norm, run.setting.feature_norm, width)
    block = (nn.Linear(width, width), nn.SiLU(), norm(), nn.Linear(width, width), nn.SiLU(), norm())
    return nn.Sequential(nn.LayerNorm(width), *block, nn.Linear(width, classes))


def classifier(
    run: Run, seed: int, kind: str, data: tuple[Tensor, Tensor], anchors: Tensor | None, classes: int
) -> nn.Sequential:
    """A trained encoder and head; relative where there are anchors, through which the gradient flows."""
    torch.manual_seed(seed)
    encoder: nn.Module = image_encoder(kind, tuple(data[0].shape[1:]), run.setting.widths)
    head = classification_head(run, LATENT if anchors is None else len(anchors), classes)
    if anchors is not None:
        encoder = RelativeEncoder(encoder, anchors, grad_through_anchors=True)
    model = nn.Sequential(encoder, head)
    fit(
        model,
        data,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=2e-3 if run.setting.head == "small" else 1e-4),
        steps=run.setting.classifier_steps,
        batch_size=64,
        seed=seed,
        device=run.device,
    )
    return model


def score(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return 100 * evaluate(model, data, {"accuracy": accuracy}, batch_size=1000)["accuracy"]


def exchange_encoders(run: Run, seed: int, data: str) -> dict[str, dict[str, float]]:
    """Accuracy of four encoders with their own head ("a") and with each other's ("a > b"), relative and absolute."""
    train = images(run, data, "train", run.setting.train_images)
    test = images(run, data, "test")
    anchors, classes = anchor_images(run, train[0], run.setting.classifier_anchors), int(train[1].max()) + 1
    found: dict[str, dict[str, float]] = {}
    for space in ("relative", "absolute"):
        chosen = anchors if space == "relative" else None
        # Nothing is shared between the four: neither initialisation nor the order of the data.
        models = {
            kind: classifier(run, 100 * seed + i, kind, train, chosen, classes) for i, kind in enumerate(ENCODERS)
        }
        found[space] = {kind: score(model, test) for kind, model in models.items()}
        for a, b in permutations(ENCODERS, 2):
            encoder, head = models[a][0], models[b][1]
            mixed = stitch(encoder, head, anchors) if space == "relative" else nn.Sequential(encoder, head)
            found[space][f"{a} > {b}"] = score(mixed, test)
    return found


def _own(scores: dict[str, float]) -> float:
    return fmean(value for name, value in scores.items() if ">" not in name)


def _exchanged(scores: dict[str, float]) -> float:
    return fmean(value for name, value in scores.items() if ">" in name)


@study.claim(
    "C3",
    "Training on similarities instead of latents costs little accuracy",
    paper="Table 2: MNIST 97.91 against 97.95, CIFAR-10 87.70 against 87.85, CIFAR-100 66.72 against 68.88 (recalled)",
    holds=at_least(-1.5),
    unit="percentage points",
)
def accuracy_of_relative_classifiers(run: Run) -> Measurement:
    found = run.each_seed(exchange_encoders, data=run.setting.classify)
    rows = [
        {"encoder": kind, "space": space, "accuracy": round(scores[space][kind], 3)}
        for scores in found
        for space in ("relative", "absolute")
        for kind in ENCODERS
    ]
    run.figure(_strip(rows, "accuracy:Q", "test accuracy, %", "encoder:N", "space:N", zero=False))
    relative_scores, absolute_scores = ([_own(scores[space]) for scores in found] for space in ("relative", "absolute"))
    also = {"relative accuracy": fmean(relative_scores)}
    return compare(relative_scores, absolute_scores, also=also, note=f"mean over {len(ENCODERS)} encoders")


@study.claim(
    "C4",
    "A classifier's head works under encoders of other architectures, trained apart, without training",
    paper="Tables 4-6: text TREC, stitched, 75.9 relative against 21.5 absolute (88.1 and 91.7 not stitched; recalled)",
    holds=at_least(85.0),
    unit="% accuracy",
    also={"absolute": at_most(30.0)},
)
def exchanged_encoders(run: Run) -> Measurement:
    found = run.each_seed(exchange_encoders, data="digits" if run.scale != "full" else run.setting.classify)
    rows = [
        {
            "space": space,
            "encoder": a,
            "head": b,
            "accuracy": round(fmean(scores[space][a if a == b else f"{a} > {b}"] for scores in found), 2),
        }
        for space in ("relative", "absolute")
        for a in ENCODERS
        for b in ENCODERS
    ]
    run.figure(_matrix(rows))
    absolute = [_exchanged(scores["absolute"]) for scores in found]
    names = [name for name in found[0]["relative"] if ">" in name]
    also = {
        "absolute": fmean(absolute),
        "worst pair": min(fmean(scores["relative"][name] for scores in found) for name in names),
        "relative, own head": fmean(_own(scores["relative"]) for scores in found),
        "absolute, own head": fmean(_own(scores["absolute"]) for scores in found),
    }
    return average(
        [_exchanged(scores["relative"]) for scores in found],
        baseline=also["absolute"],
        also=also,
        note=f"{len(names)} ordered pairs a seed; anchors: {run.setting.classifier_anchors} training images",
    )


def two_domains(run: Run, seed: int) -> dict[str, float]:
    """Accuracy of A's encoder under B's head, where B sees every image with its pixels permuted and inverted."""
    x, y = images(run, "digits", "train", run.setting.train_images)
    test_x, test_y = images(run, "digits", "test")
    order = torch.randperm(x[0].numel(), generator=run.generator(1000)).to(x.device)

    def other(inputs: Tensor) -> Tensor:
        return 1 - inputs.flatten(1)[:, order].reshape(inputs.shape)

    count = run.setting.classifier_anchors
    anchors_a = anchor_images(run, x, count)
    anchors_b = other(anchors_a)
    found = {}
    for space in ("relative", "absolute"):
        use = space == "relative"
        a = classifier(run, 2 * seed, "mlp-64", (x, y), anchors_a if use else None, 10)
        b = classifier(run, 2 * seed + 1, "mlp-64", (other(x), y), anchors_b if use else None, 10)
        mixed = stitch(a[0], b[1], anchors_a, anchors_b) if use else nn.Sequential(a[0], b[1])
        found[space] = score(mixed, (test_x, test_y))
        found[f"{space}, B alone"] = score(b, (other(test_x), test_y))
    return found


@study.claim(
    "C7",
    "With parallel anchors, an encoder of one domain works under the classifier of another",
    paper="Amazon reviews in four languages: relative F1 close to the monolingual one, absolute near chance",
    holds=at_least(70.0),
    unit="% accuracy",
    also={"absolute": at_most(30.0)},
)
def parallel_domains(run: Run) -> Measurement:
    found = run.each_seed(two_domains)
    rows = [
        {"space": name, "accuracy": round(scores[name], 2)}
        for scores in found
        for name in ("relative", "absolute", "relative, B alone")
    ]
    run.figure(_strip(rows, "accuracy:Q", "test accuracy, %", "space:N", "space:N"))
    names = ("absolute", "relative, B alone", "absolute, B alone")
    also = {name: fmean(scores[name] for scores in found) for name in names}
    note = "domain B is domain A with its pixels permuted and inverted; the anchors are the same images in both"
    return average([scores["relative"] for scores in found], baseline=also["absolute"], also=also, note=note)


# --- graphs: C5 ------------------------------------------------------------------------------------------------------


class GraphEncoder(nn.Module):
    """Linear, L graph convolutions, Linear: one sparse matrix product a convolution.

    kind "gcn": H' = act(S H W). "gcn2": H' = act(((1 - alpha) S H + alpha H_0) ((1 - beta) I + beta W)) with
    beta = log(theta / l + 1) at the l-th convolution. S is the normalised adjacency with self-loops.
    """

    def __init__(self, features: int, width: int, depth: int, kind: str, dropout: float, activation: str) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.empty(features, width)), nn.Linear(width, width)
        nn.init.xavier_uniform_(self.first)
        self.weights = nn.ParameterList([nn.init.xavier_uniform_(torch.empty(width, width)) for _ in range(depth)])
        self.kind, self.dropout, self.activation = kind, dropout, getattr(F, activation)

    def forward(self, features: Tensor, propagation: Tensor) -> Tensor:
        first = hidden = self.activation(torch.sparse.mm(features, self.first))
        for depth, weight in enumerate(self.weights, 1):
            hidden = torch.sparse.mm(propagation, F.dropout(hidden, self.dropout, self.training))
            if self.kind == "gcn2":
                beta = math.log(0.5 / depth + 1)
                hidden = 0.9 * hidden + 0.1 * first
                hidden = (1 - beta) * hidden + beta * (hidden @ weight)
            else:
                hidden = hidden @ weight
            hidden = self.activation(hidden)
        return self.last(hidden)


def normalised_adjacency(edges: Tensor, nodes: int) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 as a sparse matrix, of the undirected graph without multiple edges."""
    both = torch.cat([edges, edges.flip(0), torch.arange(nodes).expand(2, -1)], 1).unique(dim=1)
    degree = torch.bincount(both[0], minlength=nodes).float()
    values = (degree[both[0]] * degree[both[1]]).rsqrt()
    return torch.sparse_coo_tensor(both, values, (nodes, nodes), check_invariants=True).coalesce()


def graph_models(run: Run, seed: int) -> list[tuple[float, float]]:
    """Random models on a citation graph: (similarity to the best of them, validation accuracy), the best left out."""
    graph = run.data(run.setting.graph)
    nodes = len(graph.labels)
    dense = graph.features.float()
    features = (dense / dense.sum(1, keepdim=True).clamp_min(1e-12)).to_sparse().to(run.device)
    propagation = normalised_adjacency(graph.edges.long(), nodes).to(run.device)
    labels = graph.labels.long().to(run.device)
    order = torch.randperm(nodes, generator=run.generator(ANCHOR_SEED)).to(run.device)
    held_out, train = order[: nodes // 10], order[nodes // 10 :]
    anchors = train[: run.setting.graph_anchors]
    choose = _chooser(run.generator(seed))
    found = []
    for number in range(run.setting.graph_runs):
        run.progress(f"graph network, seed {seed}", number, run.setting.graph_runs)
        encoder = GraphEncoder(
            features.shape[1],
            width=choose.of((16, 32, 64)),
            depth=choose.of((1, 2, 3)),
            kind=choose.of(("gcn", "gcn2")),
            dropout=choose.between(0.0, 0.6),
            activation=choose.of(("relu", "elu", "tanh")),
        ).to(run.device)
        projection = RelativeRepresentation(num_anchors=len(anchors), norm="l2")
        head = nn.Linear(len(anchors), int(labels.max()) + 1).to(run.device)
        parameters = [*encoder.parameters(), *head.parameters()]
        optimizer = choose.of((torch.optim.Adam, torch.optim.RMSprop))(parameters, lr=choose.log_between(1e-3, 2e-2))
        for _ in range(round(choose.log_between(*run.setting.graph_epochs))):
            latents = encoder(features, propagation)
            loss = F.cross_entropy(head(projection(latents[train], latents[anchors])), labels[train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        encoder.eval()
        with torch.no_grad():
            latents = encoder(features, propagation)
            coordinates = relative(latents, latents[anchors])
            right = head(F.normalize(coordinates[held_out], dim=-1)).argmax(1) == labels[held_out]
        found.append((coordinates.half().cpu(), float(right.float().mean())))
    return _against_best(found)


def digit_models(run: Run, seed: int) -> list[tuple[float, float]]:
    """As `graph_models`, with random classifiers of digits: the quick variant."""
    x, y = images(run, "digits", "train", run.setting.train_images)
    test_x, test_y = images(run, "digits", "test")
    anchors = anchor_images(run, x, run.setting.graph_anchors)
    choose = _chooser(run.generator(seed))
    found = []
    for number in range(run.setting.graph_runs):
        torch.manual_seed(100 * seed + number)
        encoder = image_encoder(choose.of(ENCODERS), tuple(x.shape[1:]), run.setting.widths)
        told = RelativeEncoder(encoder, anchors, grad_through_anchors=True)
        model = nn.Sequential(told, classification_head(run, len(anchors), 10))
        rate, steps = choose.log_between(3e-4, 1e-2), round(choose.log_between(*run.setting.graph_epochs))
        optimizer = partial(torch.optim.Adam, lr=rate)
        fit(model, (x, y), loss=F.cross_entropy, optimizer=optimizer, steps=steps, batch_size=64, device=run.device)
        with torch.no_grad():
            found.append((told(test_x).cpu(), score(model, (test_x, test_y)) / 100))
    return _against_best(found)


def _against_best(found: list[tuple[Tensor, float]]) -> list[tuple[float, float]]:
    best = max(range(len(found)), key=lambda i: found[i][1])
    reference = found[best][0].float()
    return [
        (latent_similarity(coordinates.float(), reference), right)
        for i, (coordinates, right) in enumerate(found)
        if i != best
    ]


class _chooser:
    """Random settings out of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=self.generator))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=self.generator))

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self.between(math.log(low), math.log(high)))


def pearson(points: Sequence[tuple[float, float]]) -> float:
    return float(torch.corrcoef(torch.tensor(points, dtype=torch.float64).T)[0, 1])


@study.claim(
    "C5",
    "How similar a model's relative space is to that of a good one tells its accuracy, without a label",
    paper="Figure 4: Pearson correlation .955 on average over about 2,000 graph networks on Cora",
    holds=at_least(0.8),
    unit="Pearson correlation",
)
def similarity_predicts_accuracy(run: Run) -> Measurement:
    models: Callable = digit_models if run.setting.graph == "digits" else graph_models
    found = run.each_seed(models)
    rows = [
        {"similarity": round(similarity, 4), "accuracy": round(100 * right, 2), "seed": str(seed)}
        for seed, points in zip(run.seeds, found)
        for similarity, right in points[:100]
    ]
    run.figure(_scatter(rows))
    accuracies = [right for points in found for _, right in points]
    return average(
        [pearson(points) for points in found],
        also={"lowest accuracy": min(accuracies), "highest accuracy": max(accuracies)},
        note=f"{run.setting.graph_runs} random models a seed on {run.setting.graph}; reference: the best, left out",
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def _strip(
    rows: list[dict[str, Any]], value: str, title: str, row: str, colour: str, *, log: bool = False, zero: bool = True
) -> altair.Chart:
    import altair as alt

    scale = alt.Scale(type="log") if log else alt.Scale(zero=zero)
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, size=60, opacity=0.6)
        .encode(
            x=alt.X(value, title=title, scale=scale),
            y=alt.Y(row, title=None),
            color=alt.Color(colour, title=None),
        )
        .properties(width="container", height=260)
    )


def _lines(rows: list[dict[str, Any]]) -> altair.LayerChart | altair.FacetChart:
    import altair as alt

    told = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("anchors:Q", title="anchors (log)", scale=alt.Scale(type="log", base=2)),
        y=alt.Y("error:Q", title="mean squared error × 100 (log)", scale=alt.Scale(type="log")),
        color=alt.Color("pair:N", title=None),
    )
    line = told.mark_line().encode(y=alt.Y("mean(error):Q", scale=alt.Scale(type="log")))
    return alt.layer(line, told.mark_point(filled=True, opacity=0.6)).properties(width="container", height=260)


def _matrix(rows: list[dict[str, Any]]) -> altair.FacetChart | altair.LayerChart:
    import altair as alt

    order = list(ENCODERS)
    told = alt.Chart().encode(
        x=alt.X("head:N", sort=order, title="head trained with"), y=alt.Y("encoder:N", sort=order, title="encoder")
    )
    cells = told.mark_rect(opacity=0.6).encode(
        color=alt.Color("accuracy:Q", title="accuracy, %", scale=alt.Scale(domain=[0, 100]))
    )
    text = told.mark_text().encode(text=alt.Text("accuracy:Q", format=".0f"))
    layers = alt.layer(cells, text, data=alt.InlineData(values=rows)).properties(width=200, height=200)
    return layers.facet(column=alt.Column("space:N", title=None))


def _scatter(rows: list[dict[str, Any]]) -> altair.Chart:
    import altair as alt

    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, opacity=0.6)
        .encode(
            x=alt.X("similarity:Q", title="similarity to the reference model", scale=alt.Scale(zero=False)),
            y=alt.Y("accuracy:Q", title="accuracy, %"),
            color=alt.Color("seed:N", title="seed"),
        )
        .properties(width="container", height=260)
    )
