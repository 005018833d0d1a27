"""Bundled data: samples a second when generated and when read from the cache.

    python benchmarks/data.py [--machine NAME] [--threads 2] [--quick]

Prints a Markdown table, with ratios within this run, and writes benchmarks/results/data-NAME.json.
"From the cache" is everything that a training script waits for: opening and hashing the file,
and one pass over all batches as floats. Run it on a quiet machine.
"""

import os
import statistics
import tempfile
import time

import torch
from _common import arguments, table, write

from attnlab.lab import data

BATCH = 256
SETS = {  # row → (name, samples, options); the first is what the others are compared with
    "scenes, one object": ("scenes", 4096, {}),
    "scenes, three objects": ("scenes", 4096, {"objects": 3}),
    "scenes, one object, 96 px": ("scenes", 2048, {"size": 96}),
    "parts": ("parts", 2048, {}),
    "clips, 8 frames": ("clips", 512, {}),
}


def rates(name: str, n: int, options: dict, repeats: int) -> tuple[float, float]:
    """Samples a second generated, and read from the cache: the median of several runs."""
    data.load(name, n=64, **options, cache=False)  # reads the pictures
    generated, cached = [], []
    for seed in range(repeats):
        start = time.perf_counter()
        data.load(name, n=n, seed=seed, **options, cache=False)
        generated.append(n / (time.perf_counter() - start))
        data.load(name, n=n, seed=seed, **options)
        start = time.perf_counter()
        samples = data.load(name, n=n, seed=seed, **options)
        for first in range(0, n, BATCH):
            samples.batch(slice(first, first + BATCH))
        cached.append(n / (time.perf_counter() - start))
    return statistics.median(generated), statistics.median(cached)


def main() -> None:
    args = arguments(__doc__, quick="an eighth of the samples, one run").parse_args()
    torch.set_num_threads(args.threads)

    results = {"samples_a_second": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTNLAB_CACHE"] = folder
        for row, (name, n, options) in SETS.items():
            share, repeats = (8, 1) if args.quick else (1, 5)
            generated, cached = rates(name, n // share, options, repeats)
            results["samples_a_second"][row] = {
                "generated": round(generated),
                "from_cache": round(cached),
            }
    measured = results["samples_a_second"]
    one = measured["scenes, one object"]["generated"]
    print(table(["64 px", "generated a second", "ratio", "from the cache a second", "ratio"], [
        [row, rate["generated"], f"{rate['generated'] / one:.2f}",
         rate["from_cache"], f"{rate['from_cache'] / one:.1f}"]
        for row, rate in measured.items()
    ]))  # fmt: skip
    write("data", args, results)


if __name__ == "__main__":
    main()
