"""Residual quantization and similarity-reweighted attention as PyTorch operators."""

from bbqrec_kernels._version import __version__
from bbqrec_kernels.residual_quantization import (
    ResidualQuantization,
    residual_decode,
    residual_quantize,
    residual_statistics,
)

__all__ = ["ResidualQuantization", "__version__", "residual_decode", "residual_quantize", "residual_statistics"]
