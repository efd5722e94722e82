"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

__version__ = "0.1.0"
