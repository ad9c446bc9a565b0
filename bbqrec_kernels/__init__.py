"""Residual quantization and similarity-reweighted attention as PyTorch operators."""

from bbqrec_kernels._version import __version__
from bbqrec_kernels.modules import (
    CodebookUsage,
    ResidualQuantizer,
    SimilarityAttention,
    codebook_usage,
    residual_kmeans,
)
from bbqrec_kernels.residual_quantization import (
    ResidualQuantization,
    residual_decode,
    residual_quantize,
    residual_statistics,
)
from bbqrec_kernels.similarity_attention import (
    PackedCodes,
    Term,
    cosine,
    gap,
    matches,
    pack,
    prefix,
    similarity_attention,
    similarity_attention_varlen,
)

__all__ = [
    "CodebookUsage",
    "PackedCodes",
    "ResidualQuantization",
    "ResidualQuantizer",
    "SimilarityAttention",
    "Term",
    "__version__",
    "codebook_usage",
    "cosine",
    "gap",
    "matches",
    "pack",
    "prefix",
    "residual_decode",
    "residual_kmeans",
    "residual_quantize",
    "residual_statistics",
    "similarity_attention",
    "similarity_attention_varlen",
]
