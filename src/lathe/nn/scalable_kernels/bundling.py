"""Networks, or the last layers of one, as a readout of fixed features: all hidden parameters go into one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn.scalable_kernels.features import Features, feature_map
from lathe.nn.scalable_kernels.layers import balanced
from lathe.nn.scalable_kernels.readout import Loss, NormalEquations, check_loss, fit_bundled, one_hot
from lathe.nn.scalable_kernels.spectra import Activation

__all__ = ["BundledNetwork", "bundle", "linear_chain"]

_NAMES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
_SKIPPED = (nn.Identity, nn.Dropout)


class BundledNetwork(nn.Module):
    """phi_L(... phi_1(x)) weight^T + bias: linear in its only parameters.

    Args:
        features: phi_1 to phi_L.
        weight: A, (out_features, features of phi_L).
        bias: of the outputs.

    Shape: `(*, in_features)` -> `(*, out_features)`.

    Source: section on bundling.
    """

    bias: nn.Parameter | None

    def __init__(self, features: Iterable[Features], weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """The readout of the features of x.

        Raises:
            ValueError: where x has another number of features than phi_1.
        """
        return functional.linear(self.features(x), self.weight, self.bias)

    @torch.no_grad()
    def fit(
        self,
        inputs: Float[Tensor, "samples in_features"],
        targets: Shaped[Tensor, "samples *outputs"],
        ridge: float = 1e-4,
        *,
        loss: Loss = "mse",
        batch_size: int = 4096,
    ) -> BundledNetwork:
        """Sets weight and bias to the closed-form optimum of `fit_bundled`, in place, batch by batch.

        Raises:
            ValueError: where the targets have not as many columns (or classes) as the network has outputs, and as
                `fit_bundled` does.
        """
        with_bias = self.bias is not None
        check_loss(loss, targets, with_bias)
        if len(inputs) != len(targets) or not len(inputs):
            raise ValueError(f"inputs and targets must pair up, got {tuple(inputs.shape)} and {tuple(targets.shape)}")
        columns = one_hot(targets)
        if columns.shape[1] != len(self.weight):
            raise ValueError(f"targets must have {len(self.weight)} columns or classes, got {tuple(columns.shape)}")
        equations = NormalEquations(intercept=with_bias, classes=loss == "fisher")
        for x, y in zip(inputs.split(batch_size), columns.split(batch_size)):
            equations.add(self.features(x), y)
        A = equations.solve(ridge)
        self.weight.copy_(A[:, : self.weight.shape[1]])
        if self.bias is not None:
            self.bias.copy_(A[:, -1])
        return self


@torch.no_grad()
def bundle(
    network: nn.Module,
    num_features: int | Sequence[int],
    data: Float[Tensor, "samples in_features"] | None = None,
    *,
    relu: Literal["arc-cosine", "urf"] = "arc-cosine",
    refit: bool = True,
    ridge: float = 1e-4,
    **options: Any,
) -> BundledNetwork:
    """A chain of linear layers and activations with all hidden parameters bundled into one matrix A.

    Layer by layer W_i' = W_i Psi_(i-1) and Psi_i = psi(W_i', b_i); the network becomes A phi_L(... phi_1(x)) with
    A = W_out Psi_L. With data, each Psi_i is refitted to the true outputs of its layer instead. Errors grow with each
    layer bundled, see `bundling_report`.

    Args:
        network: `nn.Sequential` of [linear, activation]* linear; nested ones, Dropout and Identity are seen through.
            To bundle the last layers only, such as a pooler and the classifier on it, give `network[k:]`.
        num_features: m of every hidden layer, or of each.
        data: inputs, for the scales and windows, and for the refit; without data, inputs of zero mean and unit variance
            are assumed.
        relu: ReLUs as arc-cosine features, well-behaved but an approximation of the network only after a refit; or as
            universal random features within a window, an unbiased approximation of one layer of high variance.
        refit: False keeps psi(W, b), also where there is data.
        ridge: see `fit_bundled`.
        options: of the feature maps: M ("auto" by default), orthogonal, floor, and a seed for the first layer (the next
            get the next ones).

    Raises:
        ValueError: naming the first layer that breaks the pattern; for another number of `num_features` than there are
            hidden layers; for data of another shape.
    """
    chain, last = linear_chain(network)
    counts = [num_features] * len(chain) if isinstance(num_features, int) else list(num_features)
    if len(counts) != len(chain):
        raise ValueError(f"num_features must have one entry a hidden layer, {len(chain)}, got {len(counts)}")
    if relu not in ("arc-cosine", "urf"):
        raise ValueError(f"relu must be 'arc-cosine' or 'urf', got {relu!r}")
    inputs = chain[0][0].in_features
    if data is not None and (data.ndim != 2 or data.shape[1] != inputs or not len(data)):
        raise ValueError(f"data must be (samples, {inputs}), got {tuple(data.shape)}")
    options = {"M": "auto"} | options | {"device": last.weight.device, "dtype": last.weight.dtype}
    seed: int | None = options.pop("seed", None)

    refit = refit and data is not None
    maps: list[Features] = []
    tower: Tensor | None = None  # Psi of the layer before, and what it leaves for the bias of the next
    offset: Tensor | None = None
    hidden: Tensor | None = data  # what the feature maps make of the data, and what the network makes of it
    truth: Tensor | None = data
    squares: float | None = None
    for depth, ((linear, activation), count) in enumerate(zip(chain, counts)):
        weight, bias = _read_from(linear, tower, offset)
        before = None if truth is None else linear(truth)
        act: Activation = _NAMES.get(type(activation), cast(Callable[[Tensor], Tensor], activation))
        if act == "relu" and relu == "urf":
            act = functional.relu
        settings = balanced(weight, bias, inputs=hidden, preactivations=before, refit=refit, squares=squares)
        if seed is not None:
            settings["seed"] = seed + depth
        made = feature_map(act, weight.shape[1], count, bias=bias is not None, **settings | options)
        if hidden is None:
            squares = float(made.mean_squared_norm(float(made.scale) ** 2 * (squares or weight.shape[1])))
        elif refit or depth + 1 < len(chain):
            hidden = torch.cat([made.phi(part) for part in hidden.split(4096)])
        if before is not None:
            truth = activation(before)
        if refit and hidden is not None and truth is not None:
            A = fit_bundled(hidden, truth, ridge, intercept=True)
            tower, offset = A[:, :-1], A[:, -1]
        else:
            tower, offset = made.psi(weight, bias), None
        maps.append(made)
    weight, bias = _read_from(last, tower, offset)
    return BundledNetwork(maps, weight, bias).train(network.training)


def _read_from(linear: nn.Linear, tower: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer as it reads from features."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach().clone()
    if offset is not None:
        bias = weight @ offset + (0 if bias is None else bias)
    return (weight if tower is None else weight @ tower), bias


def linear_chain(network: nn.Module) -> tuple[list[tuple[nn.Linear, nn.Module]], nn.Linear]:
    """The hidden layers of a network, each with its activation, and its last linear layer.

    Raises:
        ValueError: naming the first layer that breaks the pattern [linear, activation]* linear.
    """
    layers = [(name, module) for name, module in _leaves(network) if not isinstance(module, _SKIPPED)]
    pairs: list[tuple[nn.Linear, nn.Module]] = []
    for index, (name, module) in enumerate(layers):
        wants_linear = index % 2 == 0
        if wants_linear != isinstance(module, nn.Linear) or (not wants_linear and not _elementwise(module)):
            wanted = "a linear layer" if wants_linear else "an elementwise activation without parameters"
            raise ValueError(f"network must be [linear, activation]* linear: {name!r} must be {wanted}, got {module}")
        if not wants_linear:
            pairs.append((cast(nn.Linear, layers[index - 1][1]), module))
    if len(layers) < 3 or len(layers) % 2 == 0:
        raise ValueError(
            f"network must be [linear, activation]* linear with a hidden layer, got {len(layers)} layers, "
            f"the last {layers[-1][1] if layers else None}"
        )
    return pairs, cast(nn.Linear, layers[-1][1])


def _leaves(module: nn.Module, name: str = "") -> Iterable[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for key, child in module.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name or "network", module


def _elementwise(module: nn.Module) -> bool:
    """Whether a module without parameters acts on each number alone."""
    if any(True for _ in module.parameters()):
        return False
    z = torch.linspace(-2, 2, 12, device="cpu").view(1, 12)
    try:
        return torch.equal(module(z.flip(1)).flip(1), module(z)) and torch.allclose(module(z[:, :5]), module(z)[:, :5])
    except (RuntimeError, ValueError, IndexError):
        return False
