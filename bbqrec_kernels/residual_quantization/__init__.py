"""Residual quantization: nearest codewords level by level. Start with README.md, then api.py."""

from bbqrec_kernels.residual_quantization.api import (
    ResidualQuantization,
    residual_decode,
    residual_quantize,
    residual_statistics,
)

__all__ = ["ResidualQuantization", "residual_decode", "residual_quantize", "residual_statistics"]
