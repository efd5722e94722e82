"""The configuration of a run: its keys, how it is read, and how it is written.

Each default is in one field of `schema`, beside its meaning. Everything that can be checked without TensorFlow is
checked here, before anything slow starts. Read in this order:

    schema     the keys, their meaning, and their allowed values
    dialect    YAML with fewer surprises
    reading    a file and `section.key=value` → Config, or an error that names the key
    writing    Config → YAML with comments, JSON schema, the differences between two configs, and no secrets
"""

from hyperprior.config.reading import load_config, validate
from hyperprior.config.schema import (
    DOWNSAMPLING,
    MS_SSIM_MIN_SIDE,
    SOURCES,
    Config,
    Data,
    Distribute,
    Loss,
    Model,
    Summaries,
    Train,
)
from hyperprior.config.writing import Difference, differences, flatten, render, to_model_tree, without_secrets

__all__ = [
    "DOWNSAMPLING",
    "MS_SSIM_MIN_SIDE",
    "SOURCES",
    "Config",
    "Data",
    "Difference",
    "Distribute",
    "Loss",
    "Model",
    "Summaries",
    "Train",
    "differences",
    "flatten",
    "load_config",
    "render",
    "to_model_tree",
    "validate",
    "without_secrets",
]
