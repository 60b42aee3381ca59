"""dimo: distil URSA, a discrete video diffusion model, into a generator that needs one pass."""

__version__ = "0.1.0"
