"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

from hyperprior.codec import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"
