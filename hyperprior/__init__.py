"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

# No __all__: pdoc would leave out the rooms.
from hyperprior.codec import load as load
from hyperprior.training import train as train

__version__ = "0.2.0"
