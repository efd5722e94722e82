"""Measures and checks this machine: `hyperprior bench` and `hyperprior doctor`.

    bench         the parts that can be measured, and their order
    bench_step    the training step and its layers
    bench_input   the input alone, beside other ways to read the same patches
    timing        medians of repeats, in turn
    doctor        GPUs or why there are none, memory, disk, sources, the bottleneck

This package knows everything except evaluation.

.. include:: README.md
"""
