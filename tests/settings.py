"""Writes and reads `.hyp` files under one setting, in its own process.

    TF_ENABLE_ONEDNN_OPTS=0 python tests/settings.py MODEL THREADS write IMAGE... FOLDER
    TF_ENABLE_ONEDNN_OPTS=1 python tests/settings.py MODEL THREADS read FILE... OUT.npz

`write` compresses images one by one and in batches of eight; `read` decodes files one by one and in batches,
and stores the latents and the pixels of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(folder: str, threads: str, action: str, *paths: str) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(int(threads))
    import hyperprior
    from hyperprior import images

    codec = hyperprior.load(folder)
    *sources, target = map(Path, paths)
    data = [path.read_bytes() for path in sources]
    if action == "write":
        pictures = [images.decode_photo(each)[0] for each in data]
        Path(target).mkdir()
        for path, picture in zip(sources, pictures):
            (target / f"{path.stem}.single.hyp").write_bytes(codec.compress(picture))
        # Only small images of one size share a batch, so all images are cut to their corners.
        corners = [picture[:64, :64] for picture in pictures]
        for start in range(0, len(corners), 8):
            for path, file in zip(sources[start:], codec.compress_batch(corners[start : start + 8])):
                (target / f"{path.stem}.batch.hyp").write_bytes(file)
        return
    results: dict[str, np.ndarray] = {}
    for path, each in zip(sources, data):
        results[f"{path.name} latents"] = codec.latents(each)
        results[f"{path.name} pixels"] = codec.decompress(each)
    small = [i for i, path in enumerate(sources) if "batch" in path.name]
    for start in range(0, len(small), 8):
        group = small[start : start + 8]
        for i, pixels in zip(group, codec.decompress_batch([data[i] for i in group])):
            results[f"{sources[i].name} pixels in a batch"] = pixels
        for i, y in zip(group, codec.decode([codec.read(data[i]) for i in group])):
            results[f"{sources[i].name} latents in a batch"] = y
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
