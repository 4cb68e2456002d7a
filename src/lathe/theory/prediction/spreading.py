"""Rules of steps that normalise, or mix positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lathe.theory.prediction import windows
from lathe.theory.prediction.reading import Step
from lathe.theory.prediction.signals import (
    Geometry,
    constant,
    gaussian,
)
from lathe.theory.prediction.walk import (
    Flow,
    Walk,
    average,
    row_average,
)

__all__ = ["Spreading"]


class Spreading(Walk):
    """Norms, pooling, means, attention, selection, padding."""

    # --- normalisation ----------------------------------------------------------------------------------------------

    def _norm(self, step: Step, geometry: Geometry) -> Flow:
        options, source = step.options, self._source(step)
        gain, eps = options["gain"], options["eps"]
        bias = torch.full(geometry.shape, options["bias_variance"], dtype=torch.float64) * geometry.inside
        if options["over"] == "features":
            single = source.geometry.single()
            mean = source.mixed(lambda signal: signal.mean(single)) if options["centred"] else None
            square = single.sites(source.on(single))
            variance = square if mean is None else square - mean * mean
            step.options["factor"] = factor = gain * (variance + eps).rsqrt()
            parts = []
            for units, signal in source.parts:
                moved = signal if mean is None or not mean.any() else signal.plus(constant(-mean))
                moved = moved.scaled(factor)
                parts.append((units, moved.plus(gaussian(bias, geometry)) if options["bias_variance"] else moved))
            kept = eps / (variance + eps)  # what is left of a difference in norm
            growth = (factor.square() * kept).mean(1, keepdim=True)
            return Flow(
                tuple(parts), geometry, source.shift * growth, source.across * factor.square().mean(1), source.share
            )
        kernel, variance = self._whitened(step, source, geometry)
        scale = gain**2 / (variance + eps)
        step.options["variance"], step.options["kernel"] = variance, kernel / (variance + eps)
        freedom = step.options["freedom"]
        # The mean of one over a variance is larger than one over its mean: by this, in so many degrees of freedom.
        step.options["inverse"] = inverse = freedom / (freedom - 2) if freedom > 4 else 2.0
        flow = self._from_kernel(step, source, scale * kernel + bias, geometry)
        kept = 1.0 if options["over"] == "batch" else 0.0
        shift = torch.zeros_like(source.shift)
        shift[:, :1] = kept * source.shift[:, :1] * scale.mean()
        across = (
            inverse * source.across * (scale.mean() if options["over"] == "batch" else scale[: self.inputs].reshape(-1))
        )
        return Flow(flow.parts, geometry, shift, across, source.share)

    def _whitened(self, step: Step, source: Flow, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """The kernel less the means over a set of units, positions and inputs, and the variance in that set."""
        whole, members = source.geometry, step.options["members"]
        K = source.kernel
        mean = source.mixed(lambda signal: signal.mean(whole))
        outer = (whole.near(mean) * whole.far(mean)).expand(whole.shape)
        averages = average(whole, (K - outer) * whole.inside)
        rows, cross = row_average(whole, (K - outer) * whole.inside)
        n, P = whole.inputs, whole.positions
        overall = mean.mean(1, keepdim=True)
        if step.options["over"] == "batch":
            N = step.options["batch"]
            grand = overall.mean()
            row = mean * grand + rows / N + (1 - 1 / N) * cross
            total = grand**2 + (averages[:n] / N + (1 - 1 / N) * cross.mean(1)).mean()
            variance = whole.sites(K).mean() - total
            if N * P <= 16:
                self.notes.append(
                    f"{step.name!r} normalises over {N * P} values a unit, too few for theory to be sharp"
                )
            kernel = K - whole.near(row) - whole.far(row) + total
        else:
            row = mean * overall + rows / members
            total_i = overall**2 + (averages[:n] / members).unsqueeze(1)
            variance_i = whole.sites(K).mean(1, keepdim=True) - total_i
            if members * P <= 16:
                self.notes.append(f"{step.name!r} normalises over {members * P} values, too few for theory to be sharp")
            same = (whole.first == whole.second).reshape(-1, 1, 1)
            # Of different inputs the means differ too; units of one group share them.
            kernel = torch.where(same, K - whole.near(row) - whole.far(row) + whole.near(total_i), K - outer)
            root = (variance_i.clamp_min(0) + 1e-300).sqrt()
            variance = whole.near(root) * whole.far(root)
        # Means over sampled positions are not exact; what they leave must still be a covariance.
        size = whole.sites(kernel)
        size = size.clamp_min(1e-6 * float(size.mean()))
        bound = (whole.near(size) * whole.far(size)).sqrt()
        kernel = torch.maximum(torch.minimum(kernel, bound), -bound) * whole.inside
        kernel[:n, 0] = size
        squares = average(whole, kernel.square() / bound.square())
        share = step.options.get("batch", 1)
        alike = squares[:n].mean() / share + (1 - 1 / share) * (squares[n:].mean() if n > 1 else 0)
        step.options["freedom"] = step.options["members"] / max(float(alike), 1e-12)
        columns = [whole.index[offset] for offset in geometry.offsets]
        return kernel[:, columns], variance if variance.ndim == 0 else variance[:, :1]

    def _norm_back(self, step: Step, gradient: Tensor) -> None:
        options, geometry = step.options, self.geometries[step.index]
        if options["over"] == "features":
            factor = options["factor"]
            both = (geometry.near(factor) * geometry.far(factor)).expand(geometry.shape)[: self.inputs]
            lost = (1 + options["centred"]) / options["members"]
            self._give(step.inputs[0], gradient * both * max(0.0, 1 - lost), geometry)
            return
        variance = options["variance"] if options["variance"].ndim == 0 else options["variance"][: self.inputs]
        scale = options["gain"] ** 2 / (variance + options["eps"])
        K = options["kernel"][: self.inputs]
        # What the means of g and of g z over the set take away.
        times = geometry.positions**2 * (options["batch"] if options["over"] == "batch" else options["members"])
        plain, along = (value.sum((1, 2)).reshape(-1, 1, 1) / times for value in (gradient, gradient * K))
        if options["over"] == "batch":
            plain, along = plain.mean(), along.mean()
        left = (gradient - plain - along * K) * geometry.inside
        left[:, 0] = left[:, 0].clamp_min(0)
        self._give(step.inputs[0], options["inverse"] * scale * left, geometry)

    # --- positions --------------------------------------------------------------------------------------------------

    def _mean(self, step: Step, geometry: Geometry) -> Flow:
        source, times = self._source(step), step.options["times"]
        whole = source.geometry
        kernel = times**2 * average(whole, source.kernel).reshape(geometry.shape)
        mean = times * source.mixed(lambda signal: signal.mean(whole)).mean(1, keepdim=True)
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _mean_back(self, step: Step, gradient: Tensor) -> None:
        whole = self.geometries[step.inputs[0]]
        each = gradient[:, :1] * (step.options["times"] / whole.positions) ** 2
        self._give(step.inputs[0], each * whole.inside, whole)

    def _pool(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        kernel = windows.pooled(source.kernel, source.geometry, geometry, step.options)
        mean = windows.pooled_mean(
            source.mixed(lambda signal: signal.mean(source.geometry)), source.geometry, step.options
        )
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _pool_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        spread = windows.unpooled(gradient, self.geometries[step.index], target, step.options)
        self._give(step.inputs[0], spread, target)

    def _max_pool(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        moments = [windows.largest(signal, source.geometry, geometry, step.options) for _, signal in source.parts]
        total = sum(units for units, _ in source.parts)
        kernel, mean, slopes = (
            sum(units / total * value for (units, _), value in zip(source.parts, values)) for values in zip(*moments)
        )
        step.options["slopes"] = slopes[: self.inputs]
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _max_pool_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        gradient = gradient * step.options["slopes"]
        spread = windows.unpooled(gradient, self.geometries[step.index], target, step.options, one=True)
        # The slopes at the largest are in already, so that this is the gradient before the activation.
        self._give(self.roots[step.inputs[0]][0], spread, target)

    def _attention(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        query, key = (self.flows[number].size.mean().item() for number in step.inputs[1:])
        logit = math.sqrt(query * key * step.options["sharpness"])
        self.notes.append(f"attention logits of {step.name!r} have a standard deviation of about {logit:.2g}")
        matrix = windows.matrix(source.kernel, source.geometry)
        length, causal = source.geometry.positions, step.options["causal"]
        if logit > 0.05 and len(matrix) * length**4 <= 2e8:
            query_matrix, key_matrix = (
                windows.matrix(self.flows[number].kernel, self.geometries[number]) for number in step.inputs[1:]
            )
            matrix = windows.attended(
                matrix, query_matrix, key_matrix, source.geometry, causal, step.options["sharpness"]
            )
        elif causal:
            count = torch.arange(1, length + 1, dtype=torch.float64)
            matrix = matrix.cumsum(-1).cumsum(-2) / (count.unsqueeze(-1) * count)
        else:
            matrix = matrix.mean((-1, -2), keepdim=True).expand_as(matrix)
        return self._from_kernel(step, source, windows.from_matrix(matrix, geometry), geometry)

    def _attention_back(self, step: Step, gradient: Tensor) -> None:
        geometry, target = self.geometries[step.index], self.geometries[step.inputs[0]]
        matrix = windows.matrix(gradient, geometry)
        length = target.positions
        if step.options["causal"]:
            count = torch.arange(1, length + 1, dtype=torch.float64)
            matrix = (matrix / (count.unsqueeze(-1) * count)).flip(-1, -2).cumsum(-1).cumsum(-2).flip(-1, -2)
        else:
            matrix = matrix.sum((-1, -2), keepdim=True).expand(-1, length, length) / length**2
        self._give(step.inputs[0], windows.from_matrix(matrix, target), target)

    def _select(self, step: Step, geometry: Geometry) -> Flow:
        source, place = self._source(step), step.options["position"]
        kernel = source.kernel[:, :1, place : place + 1]
        mean = source.mixed(lambda signal: signal.mean(source.geometry))[:, place : place + 1]
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _select_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        spread = torch.zeros(self.inputs, 1, target.positions, dtype=torch.float64)
        spread[:, :, step.options["position"]] = gradient[:, :, 0]
        self._give(step.inputs[0], spread, target.single())

    def _pad(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        columns = [source.geometry.index.get(offset, -1) for offset in geometry.offsets]
        margins = [side for pair in reversed(step.options["margins"]) for side in pair]
        known = source.kernel.unflatten(-1, source.geometry.grid)[:, columns]
        known = known * torch.tensor([c >= 0 for c in columns]).reshape(1, -1, *[1] * len(source.geometry.grid))
        mean = source.mixed(lambda signal: signal.mean(source.geometry)).unflatten(-1, source.geometry.grid)
        padded = F.pad(known, margins).flatten(2)
        return self._from_kernel(step, source, padded, geometry, F.pad(mean, margins).flatten(1))

    def _pad_back(self, step: Step, gradient: Tensor) -> None:
        target, geometry = self.geometries[step.inputs[0]], self.geometries[step.index]
        inner = gradient.unflatten(-1, geometry.grid)
        for axis, ((before, _), size) in enumerate(zip(step.options["margins"], target.grid)):
            inner = inner.narrow(2 + axis, before, size)
        kept = [number for number, offset in enumerate(geometry.offsets) if offset in target.index]
        moved = Geometry(self.inputs, target.grid, [geometry.offsets[number] for number in kept])
        self._give(step.inputs[0], inner.flatten(2)[:, kept] * moved.inside, moved)
