"""Long streaming video that remembers: an object-centric key-value memory for causal video diffusion."""

__version__ = "0.1.0"
