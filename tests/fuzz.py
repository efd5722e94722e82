"""Damaged `.hyp` files. `python tests/fuzz.py MODEL IMAGE COUNT` decodes COUNT of them and prints the outcomes.

Files are damaged as disks, networks and attackers damage them. Half of them get the CRC-32 of their new bytes, so that
the decoder itself is tested. Each file has a limit of time, and the growth of memory is printed.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Mutant(NamedTuple):
    kind: str
    sealed: bool  # it has the CRC-32 of its new bytes
    data: bytes


def mutants(files: Sequence[bytes], count: int, seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(rng.choice(files))
        kind = rng.choice(["flip", "flips", "bytes", "cut", "grown", "swapped", "size", "lengths", "random", "splice"])
        place = rng.randrange(len(data))
        if kind in ("flip", "flips"):
            for _ in range(1 if kind == "flip" else rng.randrange(2, 30)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "bytes":
            data[place : place + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(0, 40))
        elif kind == "cut":
            del data[place:]
        elif kind == "grown":
            data += rng.randbytes(rng.randrange(1, 300))
        elif kind == "swapped":
            half = len(data) // 2
            data = data[:29] + data[half:-4] + data[29:half] + data[-4:]
        elif kind == "size" and len(data) >= 33:
            data[13:17] = struct.pack("<HH", *(rng.choice([0, 1, 64, 333, 5000, 65535]) for _ in range(2)))
        elif kind == "lengths" and len(data) >= 33:
            data[17:25] = struct.pack("<II", *(rng.choice([0, 1, 100, len(data), 2**31, 2**32 - 1]) for _ in range(2)))
        elif kind == "random":
            data[29:-4] = rng.randbytes(rng.randrange(0, 400))
        elif kind == "splice":
            other = rng.choice(files)
            data[place:] = other[place:]
        sealed = bool(number % 2) and len(data) >= 33
        if sealed and kind in ("bytes", "cut", "grown", "random", "splice"):  # these need correct lengths, too
            escapes = min(struct.unpack_from("<I", data, 21)[0], (len(data) - 33) // 2)
            data[17:25] = struct.pack("<II", len(data) - 33 - 2 * escapes, escapes)
        if sealed:
            data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
        yield Mutant(kind, sealed, bytes(data))


def main(model: str, image: str, count: int) -> None:
    import collections
    import re
    import resource
    import signal
    import time

    import numpy as np
    from PIL import Image

    import hyperprior
    from hyperprior.errors import BitstreamError

    codec = hyperprior.load(model)
    pixels = np.asarray(Image.open(image).convert("RGB"))
    files = [codec.compress(pixels[:h, :w]) for h, w in ((64, 64), (200, 130), (90, 300))]
    originals = {codec.decompress(data).tobytes() for data in files}
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest = 0.0
    for mutant in mutants(files, count, seed=1):
        signal.alarm(60)  # a hang ends the process
        began = time.perf_counter()
        try:
            decoded = codec.decompress(mutant.data, max_pixels=2**20)
            assert decoded.shape[:2] == struct.unpack_from("<HH", mutant.data, 13)
            which = "the same image" if decoded.tobytes() in originals else "ANOTHER IMAGE"
            outcome = "unchanged" if mutant.data in files else f"{which}, by `{mutant.kind}`"
        except BitstreamError as error:
            outcome = re.split("[:;]", str(error))[0]
            outcome = re.sub(r"\d+x\d+", "NxN", re.sub("model .*|version .*", "another one", outcome))
        slowest = max(slowest, time.perf_counter() - began)
        outcomes["new CRC" if mutant.sealed else "as is", outcome] += 1
    signal.alarm(0)
    for (sealed, outcome), times in sorted(outcomes.items()):
        print(f"{sealed:9} {outcome:50} {times:6}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage) / 1024
    print(f"slowest {slowest:.2f} s, memory grew by {grown:.0f} MiB")


if __name__ == "__main__":
    import sys

    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
