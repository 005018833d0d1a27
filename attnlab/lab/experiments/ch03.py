"""Experiments of chapter 03: what a factor per channel buys, where it goes, what kernels share.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes
`results/03_squeeze_excitation.NAME.json`.
"""

from torch import nn

from attnlab.lab import data, train

CHAPTER = "03_squeeze_excitation"


def fit_scenes(model: nn.Module, seed: int, device, **options):
    """8,192 photographic scenes of 64 pixels, shifted and mirrored; `options` are `fit`'s."""
    samples = data.load("scenes", "train")
    return train.fit(
        model, samples, batch_size=64, lr=3e-3, seed=seed, device=device,
        augment=train.flip_and_shift, **options,
    )  # fmt: skip


def scenes_accuracy(model: nn.Module, device) -> dict[str, float]:
    """On new scenes of cut-outs that were seen in training, and of cut-outs that were not."""
    return {
        name: train.accuracy(model, data.load("scenes", split), device=device)
        for name, split in (("seen objects", "test_scenes"), ("new objects", "test_unseen"))
    }
