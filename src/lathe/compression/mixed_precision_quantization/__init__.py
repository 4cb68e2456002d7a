"""Mixed-precision quantisation after training: as few bits a layer as an accuracy floor allows, in one call.

`mixed_precision(model, calibration, evaluate, keep=0.999)` orders the layers by how much their rounding hurts, alone
and in company, finds by bisection how many may go to 8 and to 4 bits, and returns a network for integer kernels.

Schaefer, Lambert-Shirzad, Zhang, Chou, Jablin, Li, Guo, Stanton, Joshi, Wang, "Augmenting Hessians with Inter-Layer
Dependencies for Mixed-Precision Post-Training Quantization", 2023, arXiv 2306.04879 (sensitivity augmented by pairs,
bisection), and its companion "Mixed Precision Post Training Quantization of Neural Networks with Sensitivity Guided
Search", 2023, arXiv 2302.01382 (quantiser, noise scores, greedy search).
"""

from lathe.compression.mixed_precision_quantization.calibration import (
    Range,
    Ranges,
    calibrate,
    fold_batch_norms,
    quantizable,
)
from lathe.compression.mixed_precision_quantization.certainty import Top1, floor_confidence
from lathe.compression.mixed_precision_quantization.costs import (
    LatencyTable,
    bops_costs,
    byte_costs,
    layer_macs,
    measure_latency,
    roofline_costs,
)
from lathe.compression.mixed_precision_quantization.interactions import Interactions, pairwise_interactions
from lathe.compression.mixed_precision_quantization.kernels import integer_kernel
from lathe.compression.mixed_precision_quantization.layers import QuantConv2d, QuantLinear, weight_clip
from lathe.compression.mixed_precision_quantization.model import (
    QuantizedModel,
    Report,
    mixed_precision,
    quantize_model,
)
from lathe.compression.mixed_precision_quantization.quantizers import (
    dequantize,
    fake_quantize,
    levels,
    mse_clip,
    quantize,
)
from lathe.compression.mixed_precision_quantization.refinement import refine_scales
from lathe.compression.mixed_precision_quantization.search import allocate, bisect_precision, greedy_precision
from lathe.compression.mixed_precision_quantization.sensitivity import (
    augmented_scores,
    greedy_pairs,
    half_pair_scores,
    hessian_interactions,
    hessian_scores,
    noise_scores,
    quantization_errors,
    sensitivity_order,
)
from lathe.compression.mixed_precision_quantization.simulation import Simulator
from lathe.core.curvature import hessian_trace

__all__ = [
    "Interactions",
    "LatencyTable",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedModel",
    "Range",
    "Ranges",
    "Report",
    "Simulator",
    "Top1",
    "allocate",
    "augmented_scores",
    "bisect_precision",
    "bops_costs",
    "byte_costs",
    "calibrate",
    "dequantize",
    "fake_quantize",
    "floor_confidence",
    "fold_batch_norms",
    "greedy_pairs",
    "greedy_precision",
    "half_pair_scores",
    "hessian_interactions",
    "hessian_scores",
    "hessian_trace",
    "integer_kernel",
    "layer_macs",
    "levels",
    "measure_latency",
    "mixed_precision",
    "mse_clip",
    "noise_scores",
    "pairwise_interactions",
    "quantizable",
    "quantization_errors",
    "quantize",
    "quantize_model",
    "refine_scales",
    "roofline_costs",
    "sensitivity_order",
    "weight_clip",
]
