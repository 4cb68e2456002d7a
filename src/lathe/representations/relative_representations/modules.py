"""The relative projection as a module, and the encoder that keeps its anchors up to date while it trains.

Moschella et al. 2022, arXiv 2209.15430, section 3 and appendix (quantisation, subspaces, aggregation by class).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.modes import evaluating
from lathe.core.surgery import get_module, set_module
from lathe.representations.relative_representations.projection import (
    AnchorFrame,
    Similarity,
    anchor_latents,
    average_by_class,
    check_anchors,
    check_index,
    check_quantization,
    check_similarity,
    class_averages,
    quantize,
)

__all__ = ["InsertedProjection", "RelativeEncoder", "RelativeRepresentation"]

POOLS = ("none", "sum", "mean", "max", "linear")
NORMS = (None, "layer", "l2", "batch")


class RelativeRepresentation(nn.Module):
    """`relative` as a module: projection, quantisation, aggregation and normalisation in one place.

    Args:
        anchors: latents of the anchors; None where they are given at each call (an encoder that still trains: see
            `RelativeEncoder`).
        similarity, center, whiten: as in `relative`.
        quantize, bin_size: as in `quantize`; `bin_size` defaults to 0.1.
        quantize_latents: quantise the normalised latents instead of the similarities.
        heads: split the features into as many equal chunks, and project each onto the anchors' chunk.
        pool: how the heads become one: "none" (side by side), "sum", "mean", "max", or "linear" (a learnt map).
        anchor_labels, groups: average the similarities by the class of the anchors; see `average_by_class`.
        norm: "layer" (learnt LayerNorm, the paper's before a decoder), "l2", "batch" (with running statistics) or None.
        num_anchors: how many anchors there will be, where `anchors` is None and a learnt part must know.

    Shape: `(..., features)` -> `(..., out_features)`, where `out_features` is the number of anchors in the plain case.

    Raises:
        ValueError: for any option outside of the above, or anchors that do not fit.

    Example:
        >>> RelativeRepresentation(torch.eye(4)[:3])(torch.ones(2, 4)).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    anchors: Tensor | None
    anchor_labels: Tensor | None

    def __init__(
        self,
        anchors: Float[Tensor, "anchors *features"] | None = None,
        *,
        similarity: Similarity = "cosine",
        center: bool = False,
        whiten: bool = False,
        quantize: str | None = None,
        bin_size: float | None = None,
        quantize_latents: bool = False,
        heads: int = 1,
        pool: str = "none",
        anchor_labels: Int[Tensor, " labelled"] | None = None,
        groups: int = 1,
        norm: str | None = None,
        num_anchors: int | None = None,
    ) -> None:
        super().__init__()
        self._measures = len(check_similarity(similarity))
        if quantize is None and (bin_size is not None or quantize_latents):
            raise ValueError("bin_size and quantize_latents need quantize, which is None")
        if quantize is not None:
            bin_size = 0.1 if bin_size is None else bin_size
            check_quantization(quantize, bin_size)
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be None, layer, l2 or batch, got {norm!r}")
        self.similarity, self.center, self.whiten = similarity, center, whiten
        self.quantize, self.bin_size, self.quantize_latents = quantize, bin_size, quantize_latents
        self.heads, self.pool, self.groups = heads, pool, groups
        self._frames: tuple[AnchorFrame, ...] = ()
        self._frames_of: _Stamp | None = None
        self._num_anchors: int | None = None

        self.register_buffer("anchors", None)
        self.register_buffer("anchor_labels", anchor_labels)
        if anchors is not None:
            self._check(anchors)
            self.anchors = anchors.detach().clone()
            num_anchors = len(anchors)
        elif anchor_labels is not None:
            num_anchors = len(anchor_labels)
        learnt = pool == "linear" or norm in ("layer", "batch")
        if learnt and num_anchors is None:
            raise ValueError(f"pool={pool!r} with norm={norm!r} has learnt weights and needs anchors or num_anchors")
        # Where nothing depends on the number of anchors, set_anchors and forward may bring another one.
        self._num_anchors = num_anchors if learnt or anchor_labels is not None or anchors is None else None
        self._columns: int | None = None
        if anchor_labels is not None and num_anchors is not None:
            self._columns = class_averages(anchor_labels, groups, num_anchors).shape[1]
        self.combine = nn.Linear(self._width(heads), self._width(1)) if pool == "linear" else None
        self.norm: nn.Module | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(self.out_features)
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(self.out_features)
        self.unit_norm = norm == "l2"

    @property
    def num_anchors(self) -> int | None:
        """How many anchors there are; None while that is open."""
        return self._num_anchors if self.anchors is None else len(self.anchors)

    @property
    def out_features(self) -> int:
        """Width of the result.

        Raises:
            ValueError: where the number of anchors is not known yet.
        """
        return self._width(self.heads if self.pool == "none" else 1)

    def _width(self, heads: int) -> int:
        columns = self._columns or self.num_anchors
        if columns is None:
            raise ValueError("the width is the number of anchors, and none are set: give anchors or num_anchors")
        return columns * self._measures * heads

    def set_anchors(self, latents: Float[Tensor, "anchors *features"]) -> None:
        """Replaces the anchors' latents, which are copied.

        Raises:
            ValueError: where they are no non-empty matrix that the heads divide, or another number than learnt weights
                or labels expect.
        """
        self._check(latents)
        self.anchors = latents.detach().clone()

    def _check(self, anchors: Tensor) -> None:
        check_anchors(anchors)
        if anchors.shape[1] % self.heads:
            raise ValueError(f"heads must divide the {anchors.shape[1]} features of anchors, got {self.heads}")
        if self._num_anchors not in (None, len(anchors)):
            raise ValueError(f"anchors must be the {self._num_anchors} that were declared, got {len(anchors)}")

    def forward(
        self, x: Float[Tensor, "*batch features"], anchors: Float[Tensor, "anchors *anchor_features"] | None = None
    ) -> Float[Tensor, "*batch relative_features"]:
        """Coordinates of `x` relative to `anchors`, or to the stored ones.

        Raises:
            ValueError: no anchors, or anchors that do not fit `x` or the module.
        """
        stored = anchors is None
        if anchors is None:
            anchors = self.anchors
        if anchors is None:
            raise ValueError("no anchors: give them at the call, at construction or by set_anchors")
        anchors = anchor_latents(x, anchors)
        if not stored:
            self._check(anchors)
        if self.quantize_latents:
            assert self.quantize is not None and self.bin_size is not None
            x = quantize(F.normalize(x, dim=-1), self.quantize, self.bin_size)

        frames = self._stored_frames(anchors) if stored else self._make_frames(anchors)
        parts = [
            self._after(frame(chunk))
            for frame, chunk in zip(frames, x.chunk(self.heads, -1) if self.heads > 1 else [x])
        ]
        similarities = self._pooled(parts)
        if self.norm is not None:
            flat = similarities.reshape(-1, similarities.shape[-1])  # BatchNorm1d reads a third axis as length
            similarities = self.norm(flat).reshape(similarities.shape)
        return F.normalize(similarities, dim=-1) if self.unit_norm else similarities

    def _after(self, similarities: Tensor) -> Tensor:
        """Quantisation and aggregation of one head's similarities."""
        if self.quantize is not None and not self.quantize_latents:
            assert self.bin_size is not None
            similarities = quantize(similarities, self.quantize, self.bin_size)
        if self.anchor_labels is not None:
            blocks = similarities.unflatten(-1, (self._measures, -1))
            similarities = average_by_class(blocks, self.anchor_labels, self.groups).flatten(-2)
        return similarities

    def _pooled(self, parts: Sequence[Tensor]) -> Tensor:
        if self.combine is not None:
            return self.combine(torch.cat(list(parts), -1))
        if len(parts) == 1:
            return parts[0]
        if self.pool == "none":
            return torch.cat(list(parts), -1)
        stacked = torch.stack(list(parts))
        return stacked.amax(0) if self.pool == "max" else getattr(stacked, self.pool)(0)

    def _make_frames(self, anchors: Tensor) -> tuple[AnchorFrame, ...]:
        if self.quantize_latents:
            assert self.quantize is not None and self.bin_size is not None
            anchors = quantize(F.normalize(anchors, dim=-1), self.quantize, self.bin_size)
        chunks = anchors.chunk(self.heads, -1)
        return tuple(AnchorFrame(chunk, self.similarity, self.center, self.whiten) for chunk in chunks)

    def _stored_frames(self, anchors: Tensor) -> tuple[AnchorFrame, ...]:
        """Those of the stored anchors, made anew when these were written to, moved or replaced."""
        if torch.compiler.is_compiling():
            return self._make_frames(anchors)
        stamp = _Stamp([anchors])
        if self._frames_of != stamp:
            self._frames, self._frames_of = self._make_frames(anchors), stamp
        return self._frames

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frames": (), "_frames_of": None}  # closures neither copy nor pickle

    def extra_repr(self) -> str:
        return f"num_anchors={self.num_anchors}, similarity={self.similarity!r}, heads={self.heads}, pool={self.pool!r}"

    @classmethod
    def insert(
        cls,
        model: nn.Module,
        path: str,
        *,
        anchors: Num[Tensor, "anchors *input"],
        head: nn.Module | None = None,
        refresh: str | int = "always",
        grad_through_anchors: bool = False,
        **options,
    ) -> nn.Module:
        """A copy of `model` in which the latent at `path` is told relative to anchors.

        Args:
            model: any network; it is left as it is.
            path: qualified name of the module whose output (flattened) is the latent.
            anchors: inputs *of the model*. They are run up to `path` whenever the weights have changed.
            head: what follows the projection, `(batch, out_features)` -> what the rest of the model expects; None where
                it takes the similarities as they are.
            refresh, grad_through_anchors: as in `RelativeEncoder`.
            options: of `RelativeRepresentation`.

        Raises:
            ValueError: no anchors, no module at `path`, or one that a run on the anchors does not reach.
        """
        new = deepcopy(model)
        layer = get_module(new, path)
        projection = cls(num_anchors=len(anchors), **options)
        inserted = InsertedProjection(layer, new, anchors, projection, head, refresh, grad_through_anchors)
        set_module(new, path, inserted)
        with torch.no_grad(), evaluating(new):
            inserted.anchor_latents()
        return new


class _AnchoredModule(nn.Module):
    """Keeps the inputs of the anchors and, as long as the weights that embed them stay what they are, their latents."""

    anchor_inputs: Tensor

    def __init__(
        self,
        anchor_inputs: Tensor,
        projection: RelativeRepresentation,
        refresh: str | int,
        grad_through_anchors: bool,
        anchor_batch: int | None = None,
    ) -> None:
        super().__init__()
        count = len(anchor_inputs) if anchor_inputs.ndim else 0
        if count == 0:
            raise ValueError(f"anchor_inputs must hold at least one sample, got shape {tuple(anchor_inputs.shape)}")
        if projection.num_anchors not in (None, count):
            raise ValueError(f"anchor_inputs must hold the {projection.num_anchors} anchors of projection, got {count}")
        number = isinstance(refresh, int) and not isinstance(refresh, bool)
        if not (refresh in ("always", "eval") or (number and int(refresh) >= 1)):
            raise ValueError(f"refresh must be 'always', 'eval' or a number of steps, got {refresh!r}")
        if anchor_batch is not None and not 1 <= anchor_batch <= count:
            raise ValueError(f"anchor_batch must be 1 to the {count} anchors, got {anchor_batch}")
        self.register_buffer("anchor_inputs", anchor_inputs.detach().clone())
        self.projection = projection
        self.refresh_rule, self.grad_through_anchors, self.anchor_batch = refresh, grad_through_anchors, anchor_batch
        self._latents: Tensor | None = None
        self._latents_of: _Stamp | None = None
        self._steps = self._next = 0

    def _embed(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def _embedder(self) -> nn.Module:
        """The module whose weights the latents depend on."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Forgets the anchors' latents; needed only after writes behind autograd's back (`weight.data[...]`)."""
        self._latents = self._latents_of = None

    def anchor_latents(self) -> Tensor:
        """Latents of the anchors `(anchors, features)`, at the current weights (or as fresh as `refresh` asks)."""
        if torch.compiler.is_compiling():
            return self._fresh(self.anchor_inputs)
        if self.training and self.refresh_rule != "eval":
            every = self.refresh_rule if isinstance(self.refresh_rule, int) else 1
            due = self._latents is None or self._steps % every == 0
            self._steps += 1
            return self._fresh_for_step() if due else self._stored()
        if self.grad_through_anchors and torch.is_grad_enabled():
            with evaluating(self._embedder()):
                return self._fresh(self.anchor_inputs)
        # Embedding in evaluation mode writes to nothing, so that the stamp stays what it is.
        embedder = self._embedder()
        now = _Stamp([self.anchor_inputs, *embedder.parameters(), *embedder.buffers()])
        if self._latents is None or self._latents_of != now:
            with evaluating(embedder):
                self._latents, self._latents_of = self._fresh(self.anchor_inputs), now
        return self._stored()

    def _stored(self) -> Tensor:
        assert self._latents is not None
        return self._latents

    def _fresh(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.grad_through_anchors and torch.is_grad_enabled()):
            return self._embed(inputs)

    def _fresh_for_step(self) -> Tensor:
        """All anchors at the current weights; or the next `anchor_batch`, and the others as they were last."""
        if self.anchor_batch is None:
            latents = self._fresh(self.anchor_inputs)
        else:
            if self._latents is None:
                with torch.no_grad():
                    self._latents = self._embed(self.anchor_inputs)
            count, end = len(self.anchor_inputs), self._next + self.anchor_batch
            turn = torch.arange(self._next, end, device=self.anchor_inputs.device) % count
            self._next = end % count
            latents = self._latents.index_copy(0, turn, self._fresh(self.anchor_inputs[turn]))
        self._latents, self._latents_of = latents.detach(), None
        return latents

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_latents": None, "_latents_of": None}


class RelativeEncoder(_AnchoredModule):
    """An encoder followed by the relative projection, which embeds its anchors itself.

    What is stored are the anchors' *inputs*: latents would be stale after the first step of training.

    Args:
        encoder: inputs -> latents; what follows the batch axis is flattened.
        anchor_inputs: `(anchors, ...)`, samples as the encoder takes them; or integers, which index `dataset`.
        refresh: when the anchors are embedded. "always": at every training step, in the mode of the encoder, so that
            anchors share its batch statistics and dropout; in evaluation mode once per change of the weights. A number
            k: at every k-th training step. "eval": also in training in evaluation mode, once per change of the weights
            (a frozen encoder: once).
        grad_through_anchors: let the gradient reach the encoder through the anchors too, as for the paper's graphs; its
            auto-encoders hold the anchors still.
        anchor_batch: embed only so many anchors a training step, in turn, and take the others as they were last.
        projection: the `RelativeRepresentation`; by default the plain cosine.
        dataset: what integer `anchor_inputs` index.

    Raises:
        ValueError: no anchors, an unknown `refresh`, or anchors that do not fit `projection` or `dataset`.

    Example:
        >>> encoder = RelativeEncoder(nn.Linear(8, 4), torch.randn(5, 8))
        >>> encoder(torch.randn(2, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        anchor_inputs: Num[Tensor, "anchors *input"],
        *,
        refresh: str | int = "always",
        grad_through_anchors: bool = False,
        anchor_batch: int | None = None,
        projection: RelativeRepresentation | None = None,
        dataset: Num[Tensor, "samples *sample_shape"] | None = None,
    ) -> None:
        if dataset is not None:
            if anchor_inputs.is_floating_point() or anchor_inputs.ndim != 1:
                raise ValueError("anchor_inputs must be integers along one axis where dataset is given")
            check_index(anchor_inputs, len(dataset), "anchor_inputs", "samples of dataset")
            anchor_inputs = dataset[anchor_inputs]
        super().__init__(
            anchor_inputs, projection or RelativeRepresentation(), refresh, grad_through_anchors, anchor_batch
        )
        self.encoder = encoder

    def forward(self, x: Num[Tensor, "batch *input"]) -> Float[Tensor, "batch relative_features"]:
        """Coordinates of the samples relative to the anchors."""
        return self.projection(self._embed(x), self.anchor_latents())

    def _embed(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs).flatten(1)

    def _embedder(self) -> nn.Module:
        return self.encoder

    def freeze(self) -> nn.Sequential:
        """A plain module for deployment: a copy of the encoder, and the projection with the anchors' latents stored."""
        with torch.no_grad(), evaluating(self):
            latents = self.anchor_latents()
        projection = deepcopy(self.projection)
        projection.set_anchors(latents)
        return nn.Sequential(deepcopy(self.encoder), nn.Flatten(), projection).eval()


class InsertedProjection(_AnchoredModule):
    """What `RelativeRepresentation.insert` puts in a model: a layer, the projection of its output, and a head.

    To embed the anchors it runs its model on them and leaves as soon as the layer is reached.
    """

    def __init__(
        self,
        layer: nn.Module,
        owner: nn.Module,
        anchor_inputs: Tensor,
        projection: RelativeRepresentation,
        head: nn.Module | None,
        refresh: str | int,
        grad_through_anchors: bool,
    ) -> None:
        super().__init__(anchor_inputs, projection, refresh, grad_through_anchors)
        self.layer, self.head = layer, nn.Identity() if head is None else head
        self._owner = (owner,)  # in a tuple: a registered child that contains this module would be a cycle
        self._capturing = False

    def forward(self, *inputs):
        latent = self.layer(*inputs).flatten(1)
        if self._capturing:
            raise _Reached(latent)
        return self.head(self.projection(latent, self.anchor_latents()))

    def _embed(self, inputs: Tensor) -> Tensor:
        self._capturing = True
        try:
            self._owner[0](inputs)
        except _Reached as reached:
            return reached.latent
        finally:
            self._capturing = False
        raise ValueError("path must name a module that the model runs through on its way to the output")

    def _embedder(self) -> nn.Module:
        return self._owner[0]


class _Reached(Exception):
    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


class _Stamp:
    """Tells whether tensors are what they were: equal to a later stamp while none is written to, moved or replaced.

    It keeps the tensors, so that no other can take the place of one of them in memory. Writes are counted by autograd
    (not those of tensors made in inference mode). What was computed in inference mode does not serve outside of it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.state = [
            (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype)
            for tensor in self.tensors
        ]
        self.inference = torch.is_inference_mode_enabled()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stamp) and self.state == other.state and self.inference == other.inference

    __hash__ = None  # type: ignore[assignment]
