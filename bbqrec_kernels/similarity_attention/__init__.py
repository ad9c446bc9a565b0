"""Attention whose scores are reweighted by what two tokens have in common. Start with README.md, then api.py."""

from bbqrec_kernels.similarity_attention.api import similarity_attention, similarity_attention_varlen
from bbqrec_kernels.similarity_attention.terms import PackedCodes, Term, cosine, gap, matches, pack, prefix

__all__ = [
    "PackedCodes",
    "Term",
    "cosine",
    "gap",
    "matches",
    "pack",
    "prefix",
    "similarity_attention",
    "similarity_attention_varlen",
]
