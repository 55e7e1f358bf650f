"""Multi-head latent attention over a paged cache of latents."""

from pallas_kernels.mla_attention.api import mla_attention

__all__ = ["mla_attention"]
