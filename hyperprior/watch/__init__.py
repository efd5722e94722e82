"""The output of a run for people: TensorBoard, metrics.jsonl, pictures.

    summaries   TensorBoard events and metrics.jsonl, with the same numbers in both
    pictures    validation images, the bits of their blocks, the run in the R-D plane

It uses model and reference. It does not use training.
"""
