"""Several inputs at order 1/n: the four-point tensors V, D, F, A, B of (z, NTK), and P, Q of the NTK's differential.

Contractions with the inverse kernel are turned into derivatives of two-point expectations, so that only the moments
of the two inputs concerned enter and nothing is inverted for smooth activations. Four-point expectations are done by
product quadrature on the subsets of (at most four) inputs, all quadruples of a subset by matrix products.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import Activation, ActivationLike, activation, gaussian_nodes, kernel_moments
from lathe.theory.deep_learning_theory.kernels import first_kernel
from lathe.theory.deep_learning_theory.single import check_widths

__all__ = ["finite_width"]

_TENSORS = ("V", "D", "F", "A", "B", "P", "Q")
#: What each tensor's recursion reads.
_NEEDS = {"V": "V", "D": "VD", "F": "F", "A": "VDA", "B": "B", "P": "BP", "Q": "FQ"}
#: And which expectations over four inputs enter it.
_FOUR_POINTS = {
    "V": {"ssss"},
    "D": {"ssss", "ssdd"},
    "F": {"ssdd"},
    "A": {"ssss", "ssdd", "dddd"},
    "B": {"dddd"},
    "P": {"bent"},
    "Q": {"bent", "ssdd"},
}
#: Gauss-Hermite nodes a dimension for expectations over 1 to 4 inputs, and panel nodes for kinked activations.
_ORDER = {1: 300, 2: 160, 3: 48, 4: 24}
_KINKED_ORDER = {1: 40, 2: 24, 3: 16, 4: 9}
#: Weights of nodes that even a tenth power of the farthest leaves without effect.
_NOTHING = 1e-26
_MOST_INPUTS = 8


def finite_width(
    x: Float[Tensor, "n features"],
    widths: Sequence[int],
    act: ActivationLike,
    C_b: float,
    C_W: float,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
    *,
    tensors: Sequence[str] = _TENSORS,
    most_inputs: int = _MOST_INPUTS,
    order: int | None = None,
) -> dict[str, Float[Tensor, "layers n n *more"]]:
    """K and Theta (layers, N, N), and the order-1/n tensors asked for (layers, N, N, N, N), at layers 1 .. L.

    Tensors of layer `l` are per `1 / n_{l-1}`; index order is the book's:

    - `V[a,b,c,d]`: `E[z_a z_b z_c z_d]` connected, neurons paired (ab)(cd).
    - `D[a,b,c,d]`: `E[z_a z_b dH_cd]`, paired (ab)(cd). `F[a,c,b,d]`: paired (ac)(bd), with `c, d` of the NTK.
    - `A[a,b,c,d]`: `E[dH_ab dH_cd]`, paired (ab)(cd). `B[a,c,b,d]`: paired (ac)(bd).
    - `P[0,1,2,3]`, `Q[0,1,2,3]`: `E[dNTK_012 z_3]`, paired (03)(12) and (01)(23).

    Args:
        x: inputs, as rows.
        widths: `n_0 .. n_L`.
        tensors: which of "V", "D", "F", "A", "B", "P", "Q".
        most_inputs: refuse more inputs than this: quadruples and their four-dimensional integrals grow as N^4.
        order: quadrature nodes per dimension, in place of the default for the number of inputs.

    Raises:
        ValueError: for more than `most_inputs` inputs (with the estimate), bad hyperparameters, widths or tensor names.

    Warns:
        UserWarning: where inputs repeat, or where a kinked activation's kernel is singular (a pseudo-inverse is used).
    """
    check_widths(widths)
    first_kernel(x, C_b, C_W)
    unknown = set(tensors) - set(_TENSORS)
    if unknown:
        raise ValueError(f"tensors must be among {', '.join(_TENSORS)}, got {', '.join(sorted(unknown))}")
    if widths[0] != x.shape[1]:
        raise ValueError(f"widths must start with the inputs' {x.shape[1]} features, got {widths[0]}")
    n, layers = len(x), len(widths) - 1
    if n > most_inputs:
        size = len(tensors) * layers * n**4 * x.element_size()
        raise ValueError(f"x must have at most {most_inputs} rows, got {n}: the tensors would take {size / 1e6:.0f} MB")
    unique, back = torch.unique(x, dim=0, return_inverse=True)
    if len(unique) < n:
        warnings.warn("x has repeated rows; each is computed once", UserWarning, stacklevel=2)
        x = unique
    else:
        back = torch.arange(n, device=x.device)

    s = activation(act)
    wanted = {need for name in tensors for need in _NEEDS[name]}
    K = first_kernel(x, C_b, C_W)
    theta = lambda_b + lambda_W * (x @ x.mT) / x.shape[1]
    state = {name: x.new_zeros(*[len(x)] * 4) for name in wanted}
    rows = [{"K": K, "Theta": theta, **state}]
    for layer in range(1, layers):
        four = _four_points(s, K, order, set().union(*(_FOUR_POINTS[name] for name in wanted)))
        step = _Layer(s, K, theta, C_W, lambda_W, widths[layer] / widths[layer - 1], four)
        state = {name: getattr(step, name)(state) for name in wanted}
        kernel, slope = kernel_moments(s, K)
        assert slope is not None
        K, theta = C_b + C_W * kernel, lambda_b + lambda_W * kernel + C_W * slope * theta
        rows.append({"K": K, "Theta": theta, **state})
    result = {}
    for name in ("K", "Theta", *tensors):
        value = torch.stack([row[name] for row in rows])
        for axis in range(1, value.ndim):
            value = value.index_select(axis, back)
        result[name] = value
    return result


class _Layer:
    """One step of the recursions, from the moments of layer l to the tensors of layer l + 1.

    Letters in einsums are input indices; `R` is the ratio of widths `n_l / n_{l-1}`.
    """

    def __init__(
        self, act: Activation, K: Tensor, theta: Tensor, C_W: float, lambda_W: float, R: float, four: dict[str, Tensor]
    ) -> None:
        self.theta, self.C, self.lam, self.R, self.four = theta, C_W, lambda_W, R, four
        self.k, self.b, a, c, e = _pair_tables(act, K)
        self.a = a
        n = len(K)
        one = torch.eye(n, dtype=K.dtype, device=K.device)
        # d<s_i s_j> and d<s'_i s'_j>, twice by z_b and z_c; d<s'_i s_j> and d<s''_i s'_j> once by z_c.
        self.S = _second_derivative(one, a, self.b)
        self.S1 = _second_derivative(one, c, e)
        self.T = torch.einsum("ci,ij->cij", one, a) + torch.einsum("cj,ij->cij", one, self.b)
        self.U = torch.einsum("ci,ij->cij", one, c) + torch.einsum("cj,ij->cij", one, e)
        self.O = lambda_W * self.S + C_W * theta * self.S1
        self.om = lambda_W * self.k + C_W * theta * self.b

    def V(self, old: dict[str, Tensor]) -> Tensor:
        local = self.four["ssss"] - _outer(self.k, self.k)
        return self.C**2 * (local + self.R / 4 * self._between(self.S, old["V"], self.S))

    def D(self, old: dict[str, Tensor]) -> Tensor:
        local = self.lam * self.four["ssss"] + self.C * self.theta * self.four["ssdd"] - _outer(self.k, self.om)
        carried = self.C / 4 * self._between(self.S, old["V"], self.O)
        moved = self.C**2 / 2 * torch.einsum("bcij,bckl,kl->ijkl", self.S, old["D"], self.b)
        return self.C * local + self.R * (carried + moved)

    def F(self, old: dict[str, Tensor]) -> Tensor:
        """Stored as F[1, 3, 2, 4]."""
        local = torch.einsum("ijkl,kl->ikjl", self.four["ssdd"], self.theta)
        moved = torch.einsum("bki,clj,bkcl->ikjl", self.T, self.T, old["F"])
        return self.C**2 * (local + self.R * moved)

    def A(self, old: dict[str, Tensor]) -> Tensor:
        theta, lam, C = self.theta, self.lam, self.C
        cross = torch.einsum("ijkl,kl->ijkl", self.four["ssdd"], theta)
        local = lam**2 * self.four["ssss"] + lam * C * (cross + cross.permute(2, 3, 0, 1))
        local = local + C**2 * _outer(theta, theta) * self.four["dddd"] - _outer(self.om, self.om)
        half = torch.einsum("bcij,bckl,kl->ijkl", self.O, old["D"], self.b)
        moved = C**2 * _outer(self.b, self.b) * old["A"] + C / 2 * (half + half.permute(2, 3, 0, 1))
        return local + self.R * (self._between(self.O, old["V"], self.O) / 4 + moved)

    def B(self, old: dict[str, Tensor]) -> Tensor:
        """Stored as B[1, 3, 2, 4]."""
        local = torch.einsum("ijkl,ij,kl->ikjl", self.four["dddd"], self.theta, self.theta)
        return self.C**2 * (local + self.R * _outer(self.b, self.b) * old["B"])

    def P(self, old: dict[str, Tensor]) -> Tensor:
        local = torch.einsum("oijk,oi,oj->oijk", self.four["bent"], self.theta, self.theta)
        from_b = torch.einsum("ok,ij,ooij->oijk", self.a, self.b, old["B"])
        moved = torch.einsum("ij,bok,oijb->oijk", self.b, self.T, old["P"])
        return self.C**2 * (local + self.R * (from_b + moved))

    def Q(self, old: dict[str, Tensor]) -> Tensor:
        local = self.C**2 * torch.einsum("oijk,oi,oj->oijk", self.four["bent"], self.theta, self.theta)
        # <s'_0 s_1 s'_2 s_3> is <s_1 s_3 s'_0 s'_2>.
        local = local + self.lam * self.C * torch.einsum("ikoj,oj->oijk", self.four["ssdd"], self.theta)
        lead = self.lam * self.C * self.T + self.C**2 * self.theta * self.U
        from_f = torch.einsum("boi,cjk,bocj->oijk", lead, self.T, old["F"])
        moved = self.C**2 * torch.einsum("oi,bjk,oijb->oijk", self.b, self.T, old["Q"])
        return local + self.R * (from_f + moved)

    @staticmethod
    def _between(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("bcij,bcde,dekl->ijkl", left, middle, right)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("ij,kl->ijkl", left, right)


def _second_derivative(one: Tensor, twice: Tensor, once: Tensor) -> Tensor:
    """`[b, c, i, j]`: `<d_b d_c (f_i g_j)>` from `twice = <f''_i g_j>` and `once = <f'_i g'_j>`, for f = g."""
    same = torch.einsum("bi,ci,ij->bcij", one, one, twice)
    mixed = torch.einsum("bi,cj,ij->bcij", one, one, once)
    return same + same.transpose(2, 3) + mixed + mixed.transpose(0, 1)


def _pair_tables(act: Activation, K: Tensor) -> tuple[Tensor, ...]:
    """`<s_i s_j>`, `<s'_i s'_j>`, `<s''_i s_j>`, `<s'''_i s'_j>`, `<s''_i s''_j>` for all pairs of inputs.

    For kinked activations the last three are integrated by parts; on the diagonal the last two, which are needed only
    as their sum, are given as `(sum, 0)`.
    """
    n = len(K)
    i, j = torch.triu_indices(n, n, offset=1, device=K.device)
    result = K.new_zeros(5, n, n)
    if len(i):
        pairs = torch.stack([K[i, i], K[i, j], K[i, j], K[j, j]], -1).reshape(-1, 2, 2)
        z, w = _nodes(act, pairs)
        s, d = act(z), act.derivative(z)
        s0, s1, d0, d1 = s[..., 0], s[..., 1], d[..., 0], d[..., 1]
        if act.kinks:
            inverse = _inverse(pairs)
            score = z @ inverse
            q0, q1 = score.unbind(-1)
            terms = [
                s0 * s1,
                d0 * d1,
                # <z_i s'_i s_j> = K_ii <s''_i s_j> + K_ij <s'_i s'_j>: no inverse, so good for nearly equal inputs.
                (z[..., 0] * d0 * s1 - pairs[:, 0, 1, None] * d0 * d1) / pairs[:, 0, 0, None],
                d0 * d1 * (q0 * q0 - inverse[:, 0, 0, None]),
                d0 * d1 * (q0 * q1 - inverse[:, 0, 1, None]),
            ]
            mirrored = [
                terms[0],
                terms[1],
                (z[..., 1] * d1 * s0 - pairs[:, 0, 1, None] * d0 * d1) / pairs[:, 1, 1, None],
                d0 * d1 * (q1 * q1 - inverse[:, 1, 1, None]),
                terms[4],
            ]
        else:
            dd, ddd = act.derivative(z, 2), act.derivative(z, 3)
            terms = [s0 * s1, d0 * d1, dd[..., 0] * s1, ddd[..., 0] * d1, dd[..., 0] * dd[..., 1]]
            mirrored = [terms[0], terms[1], s0 * dd[..., 1], d0 * ddd[..., 1], terms[4]]
        result[:, i, j] = _means(terms, w)
        result[:, j, i] = _means(mirrored, w)
    variance = K.diagonal()
    z, w = _nodes(act, variance.reshape(n, 1, 1))
    z = z[..., 0]
    s, d = act(z), act.derivative(z)
    v = variance.unsqueeze(-1)
    terms = [s * s, d * d, z * s * d / v - d * d, d * d * (z * z / v - 1) / (2 * v), torch.zeros_like(z)]
    result.diagonal(dim1=1, dim2=2).copy_(_means(terms, w))
    return tuple(result)


def _nodes(act: Activation, K: Tensor, order: int | None = None) -> tuple[Tensor, Tensor]:
    z, w = gaussian_nodes(K, order or (_KINKED_ORDER if act.kinks else _ORDER)[K.shape[-1]], act.kinks)
    if w.ndim > 1:
        return z, w
    # The corners of a product rule weigh nothing, and are most of it.
    matter = w > _NOTHING
    return z[..., matter, :], w[matter]


def _means(terms: Sequence[Tensor], w: Tensor) -> Tensor:
    """Weighted sums over nodes, for weights that all pairs share and for those that differ."""
    return torch.stack([term @ w if w.ndim == 1 else torch.linalg.vecdot(term, w) for term in terms])


def _four_points(act: Activation, K: Tensor, order: int | None, wanted: set[str]) -> dict[str, Tensor]:
    """Those wanted of `<s_i s_j s_k s_l>` ("ssss"), `<s_i s_j s'_k s'_l>` ("ssdd"), `<s'_i s'_j s'_k s'_l>` ("dddd")
    and `<s''_i s'_j s'_k s_l>` ("bent")."""
    n = len(K)
    tables = {name: K.new_zeros(n, n, n, n) for name in wanted}
    # Largest subsets first: entries with repeated indices are then overwritten by integrals over fewer inputs, which
    # are cheaper and sharper.
    for subset in itertools.chain.from_iterable(itertools.combinations(range(n), d) for d in range(min(n, 4), 0, -1)):
        d = len(subset)
        index = torch.tensor(subset, device=K.device)
        block = K[index][:, index]
        z, w = _nodes(act, block, order)
        s = act(z)
        slope = s if wanted == {"ssss"} else act.derivative(z)
        ss = _products(s, s)
        dd = ss if slope is s else _products(slope, slope)
        where = torch.meshgrid(index, index, index, index, indexing="ij")
        for name, table in tables.items():
            if name == "bent":
                value = _bent(act, z, w, s, slope, dd, block)
            else:
                left, right = {"ssss": (ss, ss), "ssdd": (ss, dd), "dddd": (dd, dd)}[name]
                value = (left * w.unsqueeze(-1)).mT @ right
            table[where] = value.reshape(d, d, d, d)
    return tables


def _bent(act: Activation, z: Tensor, w: Tensor, s: Tensor, slope: Tensor, dd: Tensor, block: Tensor) -> Tensor:
    if act.kinks:
        return _bent_by_parts(z, w, s, slope, _inverse(block), dd)
    d = z.shape[-1]
    # [i, l, j, k] -> [i, j, k, l]
    ends = (_products(act.derivative(z, 2), s) * w.unsqueeze(-1)).mT
    return (ends @ dd).reshape(d, d, d, d).permute(0, 2, 3, 1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)


def _bent_by_parts(z: Tensor, w: Tensor, s: Tensor, slope: Tensor, inverse: Tensor, dd: Tensor) -> Tensor:
    """`<s''_i s'_j s'_k s_l>` as `<d_i (s'_i^m) G> / m`, where m counts the slopes at `z_i`, with no second derivative.

    `<d_i f> = <f (K^-1 z)_i>`; where `l = i` the product rule takes the slope of `s_l` away again.
    """
    d = z.shape[-1]
    score = z @ inverse
    indices = torch.arange(d, device=z.device)
    same = (indices.unsqueeze(-1) == indices).to(z)
    # all[i, j, k, l] = <s'_i s'_j s'_k s_l q_i>
    whole = torch.einsum("ti,tjk,tl,t->ijkl", slope * score, dd.reshape(-1, d, d), s, w)
    lost = torch.einsum("ti,tjk,tl,t->ijkl", slope, dd.reshape(-1, d, d), slope, w)
    count = 1 + same.reshape(d, d, 1, 1) + same.reshape(d, 1, d, 1)
    return (whole - same.reshape(d, 1, 1, d) * lost) / count


def _inverse(K: Tensor) -> Tensor:
    root = K.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = root.unsqueeze(-1) * root.unsqueeze(-2)
    eigenvalues = torch.linalg.eigvalsh(K / scale)
    if (eigenvalues[..., 0] < 1e-10).any():
        warnings.warn("the kernel of some inputs is singular; a pseudo-inverse is used", UserWarning, stacklevel=5)
        return torch.linalg.pinv(K / scale, rtol=1e-9, hermitian=True) / scale
    return torch.linalg.inv(K / scale) / scale
