"""Pointer networks: sequences of positions of their own input, for dictionaries that grow with what is given.

For whoever has a network choose among the items that it reads: order them, outline them, copy some or mark a stretch.
Attention weights are the output distribution; what is trained on few items runs on many.
Vinyals, Fortunato, Jaitly, "Pointer Networks", 2015, NIPS 2015, arXiv 1506.03134, equations 1-3.
"""

from lathe.nn.pointer_networks.attention import PointerAttention, SpanPointer, additive_scores, pointer_generator
from lathe.nn.pointer_networks.baselines import Seq2SeqAttention, Seq2SeqFixed
from lathe.nn.pointer_networks.constraints import Constraint, DecodingState, Hull, Permutation, Triangles
from lathe.nn.pointer_networks.decoding import Decoded
from lathe.nn.pointer_networks.learning import TeacherForced, pointer_loss, reinforce_loss
from lathe.nn.pointer_networks.metrics import DelaunayMetrics, HullMetrics, delaunay_metrics, hull_metrics, is_tour
from lathe.nn.pointer_networks.network import PointerNetwork, PointSequenceModel

__all__ = [
    "Constraint",
    "Decoded",
    "DecodingState",
    "DelaunayMetrics",
    "Hull",
    "HullMetrics",
    "Permutation",
    "PointSequenceModel",
    "PointerAttention",
    "PointerNetwork",
    "Seq2SeqAttention",
    "Seq2SeqFixed",
    "SpanPointer",
    "TeacherForced",
    "Triangles",
    "additive_scores",
    "delaunay_metrics",
    "hull_metrics",
    "is_tour",
    "pointer_generator",
    "pointer_loss",
    "reinforce_loss",
]
