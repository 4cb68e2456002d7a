"""Fine-tuning with a frozen backbone: small residual modules behind chosen layers of any network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lathe.core.example import call
from lathe.core.modes import evaluating
from lathe.nn.scalable_kernels.features import check_features, feature_map
from lathe.nn.scalable_kernels.spectra import Activation

__all__ = ["BottleneckAdapter", "SNNKAdapter", "add_adapters", "merge", "trainable_parameters"]


class SNNKAdapter(nn.Module):
    """x + v * (phi(x) weight^T): starts as the identity, since v is zero, with d m + d parameters for d features.

    Args:
        features: d.
        num_features: m; with an activation other than "relu", "step" and "relu2" there are twice as many features (and
            one more for a constant part).
        activation: as in `SNNKLinear`.
        bottleneck: r; phi(x) weight^T then has r entries and an `nn.Linear(r, d)` that starts at zero takes the place
            of v.
        norm: a LayerNorm "before" the features or "after" the sum; the latter is not the identity at the start.
            Two features less pay for "before", whose gain is worth much more: it steers what the fixed directions see.
        init: of `weight`: "matched" gives phi(x) weight^T the variance 1/3 for inputs of unit variance; "bert" is
            N(0, 0.02^2); "kaiming" is the start of `nn.Linear` (the last two are the reference's).
        input_scale: by default 1 / sqrt(d): hidden states have a norm of about sqrt(d).
        options: of the feature map: M, orthogonal, window, floor, seed.

    Shape: `(*, d)` -> `(*, d)`.

    Raises:
        ValueError: for sizes below 1, or a norm or init that there is not.

    Example:
        >>> adapter = SNNKAdapter(768, num_features=16)
        >>> sum(p.numel() for p in adapter.parameters())
        13056

    Source: section on fine-tuning with SNNK adapters.
    """

    modulation: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        *,
        num_features: int = 16,
        activation: Activation = "relu",
        bottleneck: int | None = None,
        norm: Literal["before", "after"] | None = None,
        init: Literal["matched", "bert", "kaiming"] = "matched",
        input_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_width(features, bottleneck)
        if norm not in (None, "before", "after"):
            raise ValueError(f"norm must be 'before', 'after' or None, got {norm!r}")
        if init not in ("matched", "bert", "kaiming"):
            raise ValueError(f"init must be 'matched', 'bert' or 'kaiming', got {init!r}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        scale = features**-0.5 if input_scale is None else float(input_scale)
        options = {"M": "auto"} | options
        self.width, self.init, self._scale = features, init, scale
        self.features = feature_map(activation, features, num_features, input_scale=scale, **options, **made)
        self.norm_before = nn.LayerNorm(features, **made) if norm == "before" else None
        self.norm_after = nn.LayerNorm(features, **made) if norm == "after" else None
        self.weight = nn.Parameter(torch.empty(bottleneck or features, self.features.feature_dim, **made))
        self.up = nn.Linear(bottleneck, features, **made) if bottleneck else None
        self.modulation = None if bottleneck else nn.Parameter(torch.empty(features, **made))
        self.register_parameter("bias", None)  # `merge` makes one of the bias of `up`
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws `weight` anew and sets to zero what it is multiplied by."""
        if self.init == "bert":
            self.weight.normal_(std=0.02, generator=generator)
        else:
            bound = self.weight.shape[1] ** -0.5
            if self.init == "matched" and not self.weight.is_meta:
                bound = float(self.features.mean_squared_norm(self._scale**2 * self.width)) ** -0.5
            self.weight.uniform_(-bound, bound, generator=generator)
        if self.modulation is not None:
            self.modulation.zero_()
        if self.up is not None:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The input and what was learnt on top of it.

        Raises:
            ValueError: where the last dimension of x is not `features`.
        """
        check_features(x, self.width, "x")
        phi = self.features.phi(x if self.norm_before is None else self.norm_before(x))
        if self.up is not None:
            y = x + self.up(functional.linear(phi, self.weight))
        else:
            # v scales the small matrix, not the activations, and the sum goes into the matrix product.
            weight = self.weight if self.modulation is None else self.modulation[:, None] * self.weight
            y = torch.addmm(x.flatten(0, -2) if x.ndim > 1 else x[None], phi.reshape(-1, phi.shape[-1]), weight.T)
            y = y.view(x.shape) if self.bias is None else y.view(x.shape) + self.bias
        return y if self.norm_after is None else self.norm_after(y)

    @torch.no_grad()
    def merge(self) -> SNNKAdapter:
        """Multiplies out what stands behind the features, in place: one matrix (d x features) is left, and a bias."""
        if self.modulation is not None:
            self.weight.mul_(self.modulation[:, None])
            self.modulation = None
        elif self.up is not None:
            self.weight = nn.Parameter(self.up.weight @ self.weight, self.weight.requires_grad)
            self.bias = nn.Parameter(self.up.bias.clone(), self.up.bias.requires_grad)
            self.up = None
        return self

    def extra_repr(self) -> str:
        """Its width."""
        return f"features={self.width}"


class BottleneckAdapter(nn.Module):
    """x + up(act(down(x))), the ordinary adapter: 2 d r + r + d parameters; `up` starts at zero.

    The baseline of `SNNKAdapter`, and at an equal number of parameters often the better one: its directions are learnt.

    Args:
        features: d.
        bottleneck: r.
        activation: between the two layers.

    Source: Houlsby et al. 2019, arXiv 1902.00751.
    """

    def __init__(
        self,
        features: int,
        *,
        bottleneck: int = 48,
        activation: Callable[[Tensor], Tensor] = functional.relu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_width(features, bottleneck)
        self.width, self.activation = features, activation
        self.down = nn.Linear(features, bottleneck, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, features, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The input and what was learnt on top of it.

        Raises:
            ValueError: where the last dimension of x is not `features`.
        """
        check_features(x, self.width, "x")
        return x + self.up(self.activation(self.down(x)))


def add_adapters(
    model: nn.Module,
    *,
    where: Callable[[str], bool],
    adapter: Callable[..., nn.Module] = SNNKAdapter,
    train: Callable[[str], bool] | None = None,
    example_input: Any = None,
) -> nn.Module:
    """A copy of `model` with an adapter behind each chosen module, everything else frozen.

    An adapter becomes the child `adapter` of its module and acts on the module's output (the first entry, where that is
    a tuple) by a forward hook: names, types and checkpoints of the network itself stay as they were. To load a
    checkpoint of the adapted network, add the adapters first.

    Args:
        where: `where(name)`, true for modules to adapt. In Hugging Face's BERT, `name.endswith("output.dense")` is
            Houlsby's choice, and without those of the attention Pfeiffer's.
        adapter: called with the number of features, such as `partial(SNNKAdapter, num_features=16)`.
        train: `train(name)`, true for parameters that stay trainable, such as those of the classifier.
        example_input: for modules that do not say how many features they put out; a tensor, a tuple of arguments or
            a dict of keyword arguments of the model.

    Raises:
        ValueError: where no module is chosen, one has an adapter already, one cannot have one, or the width of one is
            not known without `example_input`.
    """
    model = copy.deepcopy(model)
    chosen = {name: module for name, module in model.named_modules() if name and where(name)}
    if not chosen:
        raise ValueError("where must choose at least one module, got none")
    for name, module in chosen.items():
        if "adapter" in module._modules:
            raise ValueError(f"{name!r} has an adapter already")
        # Containers are never called; attention reads the weight of its projection and does not call it either.
        if type(module).__name__ == "NonDynamicallyQuantizableLinear" or isinstance(
            module, (nn.ModuleList, nn.ModuleDict)
        ):
            raise ValueError(f"{name!r} is a {type(module).__name__}, which is not called: choose the module around it")
    widths = {module: _width(module) for module in chosen.values()}
    if example_input is not None and None in widths.values():
        widths |= _recorded_widths(model, [module for module, width in widths.items() if width is None], example_input)
    unknown = [name for name, module in chosen.items() if widths[module] is None]
    if unknown:
        raise ValueError(f"example_input is needed to tell the number of features that {unknown[0]!r} puts out")

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(train and train(name)))
    for module in chosen.values():
        like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), torch.empty(0))
        made = adapter(widths[module]).to(like.device, like.dtype).train(module.training)
        module.add_module("adapter", made)
        if type(module).forward is not nn.Sequential.forward:  # which calls its new child by itself
            module.register_forward_hook(_adapt)
    return model


def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every `SNNKAdapter` is one matrix behind its features; the same function."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SNNKAdapter):
            module.merge()
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser is to be given: the parameters that require gradients, shared ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adapt(module: nn.Module, arguments: Any, output: Any) -> Any:
    adapter = cast(nn.Module, module.adapter)
    if isinstance(output, Tensor):
        return adapter(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (adapter(output[0]), *output[1:])
    raise TypeError(f"{type(module).__name__} puts out {type(output).__name__}; adapters take tensors and tuples")


def _width(module: nn.Module) -> int | None:
    for name in ("out_features", "embedding_dim", "nf"):  # nf is of Conv1D, the linear layer of GPT-2
        if isinstance(getattr(module, name, None), int):
            return cast(int, getattr(module, name))
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else None


def _recorded_widths(model: nn.Module, modules: list[nn.Module], example_input: Any) -> dict[nn.Module, int | None]:
    found: dict[nn.Module, int | None] = {}

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        found[module] = int(first.shape[-1]) if isinstance(first, Tensor) and first.ndim else None

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _check_width(features: int, bottleneck: int | None) -> None:
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    if bottleneck is not None and bottleneck < 1:
        raise ValueError(f"bottleneck must be at least 1, got {bottleneck}")
