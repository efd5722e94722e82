"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

from hyperprior.codec import load as load  # no __all__: pdoc would leave out the rooms

__version__ = "0.2.0"
