"""What a module computes from its parameters alone, kept in evaluation for as long as these do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Kept"]


class Kept:
    """Holds one tensor that was made of others, and what must not have changed for it to be true.

    A change is what PyTorch counts as one (in place, by an optimiser, by `load_state_dict`), another tensor in the old
    one's place, or other memory behind it; a write through `.data` into the same memory goes unseen. Copies and pickles
    of a module come without what it kept.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._key: Hashable = None
        self._sources: tuple[Tensor, ...] = ()
        self._storages: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()

    def get(self, sources: Sequence[Tensor], make: Callable[[], Tensor], key: Hashable = None) -> Tensor:
        """`make()`, or what it gave before for the same sources and key.

        Nothing is kept where gradients must flow into the sources, under a compiler or a transform of `torch.func`, and
        where something stands in for a parameter.
        """
        if torch.compiler.is_compiling() or any(_passing(source) for source in sources):
            return make()
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return make()
        if self._tensor is None or not self._holds_for(sources, key):
            with torch.inference_mode(False), torch.no_grad():
                made = make()
            if _passing(made):
                return made
            self._tensor, self._key, self._sources = made, key, tuple(sources)
            self._versions = tuple(source._version for source in sources)
            # Detached aliases keep the storages alive, so that no later tensor can come to lie at the same address.
            self._storages = tuple(source.detach() for source in sources)
        return self._tensor

    def forget(self) -> None:
        """Lets go of what is kept."""
        self.__init__()  # type: ignore[misc]

    def _holds_for(self, sources: Sequence[Tensor], key: Hashable) -> bool:
        return (
            key == self._key
            and len(sources) == len(self._sources)
            and all(
                now is then and now._version == version and now.data_ptr() == storage.data_ptr()
                for now, then, version, storage in zip(sources, self._sources, self._versions, self._storages)
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return Kept().__dict__.copy()


def _passing(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform or to inference mode, and must not outlive the call."""
    return (
        type(tensor) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or tensor.is_inference()
        or tensor.is_meta
    )
