"""Experiments of chapter 01: what attention buys, what its scale does, what positions add.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/01_attention.NAME.json`.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from attnlab.attention import VisionTransformer, scaled_dot_product_attention, vit_mini
from attnlab.lab import data, train

CHAPTER = "01_attention"
RERUN = ("retrieval", "attention, 1/√d")


class NoMixing(nn.Module):
    """A stand-in for attention that lets no token hear of another."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class MeanMixing(nn.Module):
    """Every token hears the same average: attention with uniform weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.value(x).mean(dim=1, keepdim=True)).expand_as(x)


class LocalMixing(nn.Module):
    """A depthwise 3×3 convolution over the grid of tokens between two linear maps."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.rows = rows
        self.value = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = rearrange(self.value(x), "b (h w) d -> b d h w", h=self.rows)
        return self.proj(rearrange(self.conv(grid), "b d h w -> b (h w) d"))


def small_vit(pos_embed: str = "learn") -> VisionTransformer:
    """32-pixel images, 64 patches of 4×4, width 48: small enough for a minute on two cores."""
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=8, embed_dim=48, depth=3, num_heads=3,
        class_token=False, global_pool="avg", pos_embed=pos_embed,
    )  # fmt: skip


def fit_parts(model: nn.Module, seed: int, device, steps: int = 500) -> None:
    """Train on the 32-pixel parts with the budget that all rows share."""
    samples = data.load("parts", "train", n=10_000, size=32)
    train.fit(
        model, samples, steps=steps, batch_size=64, lr=2e-3, seed=seed, device=device,
        augment=train.flip_and_shift, progress=False,
    )  # fmt: skip


def mixing(seed: int, device) -> dict:
    """What may a token know of the others? Same model and budget, only the mixing differs."""
    test = data.load("parts", "test", n=2_000, size=32)
    rows = {}
    for row in ("nothing", "the mean", "3×3 neighbours", "attention"):
        train.seed_everything(seed)
        model = small_vit()
        for block in model.blocks:
            if row == "nothing":
                block.attn = NoMixing()
            elif row == "the mean":
                block.attn = MeanMixing(48)
            elif row == "3×3 neighbours":
                block.attn = LocalMixing(48, rows=8)
        fit_parts(model, seed, device)
        rows[row] = {"accuracy": train.accuracy(model, test, device=device)}
    return rows


class ShuffledPatches(nn.Module):
    """Feed a model the 4×4 patches of its image in one fixed random order."""

    def __init__(self, model: nn.Module, seed: int):
        super().__init__()
        self.model = model
        self.order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) c p q", p=4, q=4)
        patches = patches[:, self.order.to(images.device)]
        return self.model(rearrange(patches, "b (h w) c p q -> b c (h p) (w q)", h=8))


def positions(seed: int, device) -> dict:
    """Accuracy with learned, fixed and no position embedding, on whole and on shuffled images."""
    test = data.load("parts", "test", n=2_000, size=32)
    rows = {}
    for row, kind in (("none", "none"), ("sine and cosine", "sincos"), ("learned", "learn")):
        train.seed_everything(seed)
        model = small_vit(kind)
        fit_parts(model, seed, device)
        shuffled = ShuffledPatches(model, seed)
        rows[row] = {
            "accuracy": train.accuracy(model, test, device=device),
            "shuffled patches": train.accuracy(shuffled, test, device=device),
        }
    return rows


class Retrieval(nn.Module):
    """One attention layer that looks a symbol up in a list of (key, value) pairs."""

    def __init__(self, symbols: int, values: int, dim: int, scale: float | None):
        super().__init__()
        self.key = nn.Embedding(symbols, dim)
        self.value = nn.Embedding(values, dim)
        self.query = nn.Embedding(symbols, dim)
        self.head = nn.Linear(dim, values)
        self.scale = scale

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        q = rearrange(self.query(query), "b d -> b 1 1 d")
        k = rearrange(self.key(keys), "b n d -> b 1 n d")
        v = rearrange(self.value(values), "b n d -> b 1 n d")
        found = scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.head(rearrange(found, "b 1 1 d -> b d"))


def lookup_lists(n: int, generator: torch.Generator, symbols: int, pairs: int, values: int):
    """`n` lists of distinct keys with random values, the key to look up, and its value."""
    keys = torch.rand(n, symbols, generator=generator).argsort(1)[:, :pairs]
    contents = torch.randint(values, (n, pairs), generator=generator)
    place = torch.randint(pairs, (n, 1), generator=generator)
    return keys, contents, keys.gather(1, place)[:, 0], contents.gather(1, place)[:, 0]


def retrieval(seed: int, device) -> dict:
    """Look up one of 12 pairs in a single layer of width 64: 400 steps, chance 1/8."""
    dim, symbols, pairs, values = 64, 64, 12, 8
    scales = {
        "the mean": 0.0,
        "attention, no scale": 1.0,
        "attention, 1/√d": dim**-0.5,
        "attention, 1/d": 1 / dim,
    }
    rows = {}
    for row, scale in scales.items():
        train.seed_everything(seed)
        generator = torch.Generator().manual_seed(seed)
        model = Retrieval(symbols, values, dim, scale).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        for _ in range(400):
            *batch, target = lookup_lists(128, generator, symbols, pairs, values)
            logits = model(*(tensor.to(device) for tensor in batch))
            loss = nn.functional.cross_entropy(logits, target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        *batch, target = lookup_lists(4_000, generator, symbols, pairs, values)
        with torch.no_grad():
            answers = model(*(tensor.to(device) for tensor in batch)).argmax(1).cpu()
        rows[row] = {"accuracy": (answers == target).float().mean().item()}
    return rows


def parts(seed: int, device) -> dict:
    """`vit_mini` on the default parts task in 1,200 steps: four minutes of two cores at most."""
    train.seed_everything(seed)
    model = vit_mini(num_classes=8)
    fold_normalization(model, mean=0.41, std=0.21)  # of the training images, over all colors
    fit_vit_mini(model, seed, device, steps=1_200, progress=False)
    test = data.load("parts", "test", n=2_000)
    return {"vit_mini": {"accuracy": train.accuracy(model, test, device=device)}}


@torch.no_grad()
def fold_normalization(model: VisionTransformer, mean: float, std: float) -> None:
    """Let a model that is fed images in [0, 1] start as if they were (image − mean) / std."""
    proj = model.patch_embed.proj
    proj.weight.div_(std)
    proj.bias.sub_(mean * reduce(proj.weight, "d c p q -> d", "sum"))


def fit_vit_mini(model: nn.Module, seed: int, device, **options):
    """20,000 images of the default parts task, shifted and mirrored; `options` are `fit`'s."""
    samples = data.load("parts", "train", n=20_000)
    return train.fit(
        model, samples, batch_size=64, lr=1e-3, seed=seed, device=device,
        augment=train.flip_and_shift, **options,
    )  # fmt: skip
