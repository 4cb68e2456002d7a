"""The memory itself: energy, exact local fields, recall and Monte Carlo, without ever building the P-index tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lathe.theory.dense_hebbian.chains import Chains, averaged
from lathe.theory.dense_hebbian.dynamics import mean_field, sequential_sweep, tap_step
from lathe.theory.dense_hebbian.patterns import check_signs, load

__all__ = ["DenseHebbian"]

#: Values that one block of fields may hold at a time (128 MiB in float64).
_BLOCK = 1 << 24


class DenseHebbian(nn.Module):
    """P-spin Hebbian memory of K patterns of N entries, each seen clean or as the average of M noisy examples.

    `E(s) = -N^{1-P} sum_mu R_mu^{-P/2} sum_{i_1 < ... < i_P} x_{mu,i_1} s_{i_1} ... x_{mu,i_P} s_{i_P}`, for states
    `s` of +-1. The local field h_i of spin i says what flipping it would change: E grows by `2 s_i h_i`.
    Everything is computed in float64. Patterns of signs are kept in a byte an entry.

    Args:
        patterns: (K, N) patterns or averages; or (K, M, N), M examples of each pattern.
        P: order of the interaction, at least 2.
        second_moment: R, for all patterns or one each; by default each pattern's own `mean_i x_i^2`. For patterns from
            the data model it is `r^2 + (1 - r^2) / M`.
        self_interaction: let indices coincide, `E = -(N/P!) sum_mu R_mu^{-P/2} n_mu^P` with `n_mu = mean_i x_i s_i`.
            Same signal, more noise: 2.5 times its variance at P = 4, so that 2.5 times fewer patterns fit.
        mode: "supervised" multiplies averages; "unsupervised" averages the products of single examples instead, and
            needs them: (K, M, N).
        couplings: a further symmetric tensor of P indices, zero where indices coincide, that is added to the Hebbian
            one (which is never built): noise on it, say.

    Shape: states are (B, N), of any dtype.

    Raises:
        ValueError: for P < 2 or P > N, no pattern, examples other than +-1, an R that is not positive, or couplings of
            another shape, not symmetric, or not zero where indices coincide.
    """

    patterns: Tensor
    weights: Tensor
    second_moment: Tensor
    classes: Tensor
    couplings: Tensor | None

    def __init__(
        self,
        patterns: Num[Tensor, "K N"] | Num[Tensor, "K M N"],
        P: int = 4,
        *,
        second_moment: float | Num[Tensor, " K"] | None = None,
        self_interaction: bool = False,
        mode: Literal["supervised", "unsupervised"] = "supervised",
        couplings: Float[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("supervised", "unsupervised"):
            raise ValueError(f"mode must be 'supervised' or 'unsupervised', got {mode!r}")
        if patterns.ndim not in (2, 3) or (mode == "unsupervised" and patterns.ndim == 2):
            wanted = "(K, M, N)" if mode == "unsupervised" else "(K, N) or (K, M, N)"
            raise ValueError(f"patterns must have the shape {wanted} in mode {mode!r}, got {tuple(patterns.shape)}")
        K, N = patterns.shape[0], patterns.shape[-1]
        if not 2 <= P <= N:
            raise ValueError(f"P must be an order from 2 to the number of spins N = {N}, got {P}")
        if 0 in patterns.shape[:-1] and couplings is None:
            raise ValueError(
                f"patterns must hold at least one pattern (and one example of it), got {tuple(patterns.shape)}"
            )
        if not torch.isfinite(patterns).all():
            raise ValueError("patterns must be finite, got infinite or NaN entries")
        examples = patterns.shape[1] if patterns.ndim == 3 else 1
        averages = patterns.double() if patterns.ndim == 2 else patterns.double().mean(1)
        if patterns.ndim == 3:
            check_signs(patterns, "patterns, given as examples,")
        if second_moment is None:
            R = averages.square().mean(1)
        else:
            R = torch.as_tensor(second_moment, dtype=torch.float64, device=patterns.device).expand(K).clone()
        if not (torch.isfinite(R) & (R > 0)).all():
            raise ValueError(f"second_moment must be positive, got {R.min().item():g} (a pattern of zeros?)")
        classes = torch.arange(K, device=patterns.device)
        if mode == "unsupervised":
            averages = patterns.double().flatten(0, 1)
            R, classes = R.repeat_interleave(examples), classes.repeat_interleave(examples)
        if couplings is not None:
            _check_couplings(couplings, N, P)
        signs = bool((averages.abs() == 1).all())
        self.P, self.self_interaction, self.signs = P, self_interaction, signs
        self.register_buffer("patterns", averages.to(torch.int8) if signs else averages)
        self.register_buffer("weights", torch.full_like(R, 1 / examples if mode == "unsupervised" else 1.0))
        self.register_buffer("second_moment", R)
        self.register_buffer("classes", classes)
        self.register_buffer("couplings", couplings)

    @classmethod
    def from_examples(
        cls,
        X: Num[Tensor, "B N"],
        y: Int[Tensor, " B"],
        P: int = 4,
        *,
        mode: Literal["supervised", "unsupervised"] = "supervised",
        recentre: bool = False,
        self_interaction: bool = False,
    ) -> DenseHebbian:
        """One pattern a class, from labelled examples of +-1, as many of each class as there are.

        Args:
            recentre: subtract from the averages what all classes share, so that images with a common background need
                no large P (supervised only).

        Raises:
            ValueError: for examples other than +-1, labels that are negative or skip a class, or numbers that differ.
        """
        check_signs(X, "X")
        if len(X) != len(y) or len(X) == 0:
            raise ValueError(f"X and y must hold as many examples as labels, at least one, got {len(X)} and {len(y)}")
        if y.min() < 0:
            raise ValueError(f"y must hold labels from 0, got {y.min().item()}")
        counts = y.bincount()
        if (counts == 0).any():
            empty = (counts == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"y must have examples of every class from 0 to {len(counts) - 1}, got none of {empty}")
        averages = torch.zeros(len(counts), X.shape[1], dtype=torch.float64, device=X.device)
        averages = averages.index_add(0, y, X.double()) / counts.unsqueeze(1)
        if mode == "unsupervised":
            if recentre:
                raise ValueError("recentre=True needs mode='supervised', whose averages it centres")
            order = y.argsort(stable=True)
            R = averages.square().mean(1)[y[order]]
            memory = cls(X[order], P, second_moment=R, self_interaction=self_interaction)
            memory.classes, memory.weights = y[order], 1 / counts[y[order]].double()
            return memory
        if recentre:
            averages = averages - averages.mean(0)
        return cls(averages, P, mode=mode, self_interaction=self_interaction)

    @classmethod
    def from_tensor(cls, J: Float[Tensor, "..."]) -> DenseHebbian:
        """From explicit couplings of P indices, `E = -sum_{i_1 < ... < i_P} J_{i_1 .. i_P} s_{i_1} ... s_{i_P}`.

        Each field costs N^{P-1}: for small networks, and to compare with.
        """
        if J.ndim < 2:
            raise ValueError(f"J must be a tensor of at least 2 indices, got shape {tuple(J.shape)}")
        return cls(J.new_zeros(0, J.shape[-1]), J.ndim, couplings=J)

    @property
    def N(self) -> int:
        """Number of spins."""
        return self.patterns.shape[1]

    @property
    def K(self) -> int:
        """Number of patterns; in mode "unsupervised", of examples."""
        return len(self.patterns)

    def energy(self, s: Num[Tensor, "B N"], *, real: bool = False) -> Float[Tensor, " B"]:
        """E of each state: low in a memory, near 0 for what was never seen (an outlier score).

        With `real`, states are averages of independent spins, and so is the energy.
        """
        self._check(s, real)
        if real:
            return averaged(self, s.double())[0]
        return torch.cat([Chains(self, part).energy() for part in self._parts(s)]).to(s.device)

    def field(self, s: Num[Tensor, "B N"], *, real: bool = False) -> Float[Tensor, "B N"]:
        """The local fields of all spins, exactly: no spin acts on itself. O(K N P) a state.

        With `real`, states are averages of independent spins, and so are the fields.
        """
        self._check(s, real)
        if real:
            return averaged(self, s.double())[1]
        fields = []
        step = max(1, _BLOCK // (self.P * max(1, self.K)))
        for part in self._parts(s):
            chains = Chains(self, part)
            blocks = []
            for start in range(0, self.N, step):
                chains.open(slice(start, start + step))
                blocks.append(chains.field())
            fields.append(torch.cat(blocks, 1))
        return torch.cat(fields)

    def mean_field(self, s: Num[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The field at first order of Plefka's expansion, `sum_mu R_mu^{-P/2} x_mu n_mu^{P-1} / (P-1)!`.

        A function of the overlaps alone: two matrix products. Coincident indices are not taken out.
        """
        self._check(s, True)
        scale = self.weights.double() * self.second_moment.double() ** (-self.P / 2)
        return mean_field(self.patterns.double(), scale, self.P, s.double())

    def overlaps(self, s: Num[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """`mean_i x_{mu,i} s_i / sqrt(R_mu)`: 1 for a clean pattern in its own state.

        The order parameter n of the theory is this over `sqrt(1 + rho)`.
        """
        self._check(s, True)
        return s.double() @ self.patterns.double().T / (self.N * self.second_moment.double().sqrt())

    def classify(self, s: Num[Tensor, "B N"]) -> Int[Tensor, " B"]:
        """The class of the pattern with the largest overlap; recall first, if the dynamics is to decide."""
        return self.classes[self.overlaps(s).argmax(1)]

    def forward(
        self, s: Num[Tensor, "B N"], steps: int = 10, *, field: Literal["exact", "plefka1"] = "exact"
    ) -> Num[Tensor, "B N"]:
        """Recall without noise: spins align with their fields, first all even sites, then all odd ones, `steps` times.

        Half of the sites at a time, since updates of all sites at once may cycle. A spin without field stays. Stops
        where no state changes.
        """
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if field not in ("exact", "plefka1"):
            raise ValueError(f"field must be 'exact' or 'plefka1' in recall, got {field!r}")
        self._check(s)
        chains = self._chains(s.double().clone(), field)
        for _ in range(steps):
            before = chains.s.clone()
            for half in (slice(0, None, 2), slice(1, None, 2)):
                chains.open(half)
                chains.flip_open(chains.s[:, half] * chains.field() < 0)
            if torch.equal(before, chains.s):
                break
        return chains.s.to(s.dtype)

    def sample(
        self,
        s: Num[Tensor, "B N"],
        beta: float,
        sweeps: int,
        *,
        update: Literal["sequential", "parallel"] = "sequential",
        field: Literal["exact", "plefka1", "plefka2"] = "exact",
        rule: Literal["glauber", "metropolis"] = "glauber",
        generator: torch.Generator | None = None,
        observe: Callable[[Tensor], None] | None = None,
    ) -> Num[Tensor, "B N"]:
        """Markov chains at inverse temperature `beta` (physical; `math.inf` for none), one a state of the batch.

        Args:
            sweeps: each visits every spin once.
            update: "sequential" visits one spin after the other and leaves the Gibbs measure invariant; "parallel"
                visits a random half, then the other half.
            field: "exact"; "plefka1", the mean field (parallel only); or "plefka2", the TAP equations for the spins'
                averages, iterated `sweeps` times, from which the spins are drawn at the end (parallel only).
            rule: a spin flips with probability `1 / (1 + exp(2 beta s h))`, or `min(1, exp(-2 beta s h))`.
            observe: called after each sweep with the spins (B, N), float64; with "plefka2", with their averages. It is
                the sampler's own tensor: copy what is to be kept.

        Raises:
            ValueError: for states other than +-1, a negative beta or sweeps, or options that exclude each other.
        """
        self._check(s)
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        if sweeps < 0:
            raise ValueError(f"sweeps must not be negative, got {sweeps}")
        choices = {"update": ("sequential", "parallel"), "field": ("exact", "plefka1", "plefka2")}
        choices["rule"] = ("glauber", "metropolis")
        for name, value in (("update", update), ("field", field), ("rule", rule)):
            if value not in choices[name]:
                raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {value!r}")
        if update == "sequential" and field != "exact":
            raise ValueError(f"update 'sequential' needs field 'exact', got {field!r}: use update 'parallel' with it")
        if field == "plefka2":
            return self._sample_tap(s, beta, sweeps, generator, observe)
        chains = self._chains(s.double().clone(), field)
        block = 16
        for _ in range(sweeps):
            thresholds = _thresholds(chains.s, beta, rule, generator)
            if update == "sequential":
                block = sequential_sweep(chains, thresholds, block)
            else:
                order = torch.randperm(self.N, generator=generator, device=s.device)
                for half in order.chunk(2):
                    chains.open(half)
                    chains.flip_open(chains.s[:, half] * chains.field() < thresholds[:, half])
            if observe is not None:
                observe(chains.s)
        return chains.s.to(s.dtype)

    def _sample_tap(
        self,
        s: Tensor,
        beta: float,
        sweeps: int,
        generator: torch.Generator | None,
        observe: Callable[[Tensor], None] | None,
    ) -> Tensor:
        if math.isinf(beta) or self.self_interaction or self.couplings is not None or self.K == 0:
            raise ValueError(
                "field 'plefka2' needs a finite beta, and a memory of patterns without self-interaction or couplings"
            )
        gamma = load(self.K, self.N, self.P)
        m, lagged = s.double(), torch.zeros_like(s, dtype=torch.float64)
        for _ in range(sweeps):
            m, lagged = tap_step(self, m, lagged, beta, gamma), m
            if observe is not None:
                observe(m)
        up = torch.rand(m.shape, dtype=torch.float64, generator=generator, device=m.device) < (1 + m) / 2
        return (2.0 * up - 1.0).to(s.dtype)

    def _chains(self, state: Tensor, field: str) -> Chains:
        return Chains(self, state, mean=field == "plefka1")

    def _parts(self, s: Tensor) -> tuple[Tensor, ...]:
        return s.double().split(max(1, _BLOCK // (self.P * max(1, self.K))))

    def _check(self, s: Tensor, real: bool = False) -> None:
        if s.ndim != 2 or s.shape[1] != self.N:
            raise ValueError(f"s must have the shape (B, {self.N}), got {tuple(s.shape)}")
        if not real:
            check_signs(s, "s", hint="; averages are taken with real=True")

    def extra_repr(self) -> str:
        return f"K={self.K}, N={self.N}, P={self.P}, self_interaction={self.self_interaction}"


def _thresholds(state: Tensor, beta: float, rule: str, generator: torch.Generator | None) -> Tensor:
    """A spin flips where `s h` is below its threshold."""
    if math.isinf(beta):
        return torch.zeros_like(state)
    # Kept off 0, whose logarithm is infinite; at beta = 0 a threshold is infinite or, for Glauber, of either sign.
    u = torch.rand(state.shape, dtype=state.dtype, generator=generator, device=state.device).clamp_min(1e-300)
    odds = -u.log() if rule == "metropolis" else (1 - u).log() - u.log()
    return odds / (2 * beta) if beta else torch.copysign(torch.full_like(odds, math.inf), odds)


def _check_couplings(J: Tensor, N: int, P: int) -> None:
    if J.shape != (N,) * P:
        raise ValueError(f"couplings must have the shape {(N,) * P}, got {tuple(J.shape)}")
    for axis in range(P - 1):
        if not torch.equal(J, J.transpose(axis, axis + 1)):
            raise ValueError(f"couplings must be symmetric, got one that is not in its indices {axis} and {axis + 1}")
    if J.diagonal(dim1=0, dim2=1).any():
        raise ValueError("couplings must be zero where indices coincide: no spin acts on itself")
