"""Linear operators between grid functions as one learned multigrid cycle, and the network that is made of them.

For maps such as coefficient -> solution of an elliptic or multi-scale equation with boundaries, where a Fourier layer
assumes periodicity: O(n) work, O(log n) parameters, and every output point sees every input point.
He, Liu, Xu, "MgNO: Efficient Parameterization of Linear Operators via Multigrid", 2023, arXiv 2310.19809.

    v_l = sigma(W_l v_{l-1} + B_l v_{l-1} + b_l)       the network; B_l is 1x1, there is no lifting
    u <- u + S (f - A u)                               a smoothing step inside W: f -> u, on every level
    f' = R (f - A u),  u' = Pi u,  u <- u + P u''      to the next coarser level, and back with its result u''
"""

from lathe.operators.multigrid_operator.cycle import REFERENCE, MultigridConv1d, MultigridConv2d, MultigridConv3d
from lathe.operators.multigrid_operator.network import MgNO, rollout
from lathe.operators.multigrid_operator.solving import Solved, fit_linear_operator, flexible_cg, plant

__all__ = [
    "REFERENCE",
    "MgNO",
    "MultigridConv1d",
    "MultigridConv2d",
    "MultigridConv3d",
    "Solved",
    "fit_linear_operator",
    "flexible_cg",
    "plant",
    "rollout",
]
