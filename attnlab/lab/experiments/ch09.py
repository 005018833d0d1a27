"""Experiments of chapter 09: what the gates find, what the trees follow, what each part does, Lite.

Each function returns `{row: {metric: value}}` for one seed. All train small networks to name the
object of 32-pixel `parts`. Trees are measured on images of two objects, in which some parts lie
nearer to the other object than to their own.
"""

from functools import cache

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from attnlab.dependency_trace import dependency_saliency, dependency_scores
from attnlab.dependency_trees import dependency_tree
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import cost, data, dependency_metrics, metrics, train
from attnlab.lab.dependency_baselines import color_locality, gated_vit, random_scores

CHAPTER = "09_dependencyvit"
RERUN = ("ablation", "full")
STEPS, FEW_STEPS = 300, 150
TESTED_ON = 500
GRID = (8, 8)
SIZES = {
    "img_size": 32, "patch_size": 4, "num_classes": 8, "embed_dim": 48, "depth": 4, "num_heads": 4,
}  # fmt: skip


class Open(nn.Module):
    """A controller that lets everything pass: the logit of a gate that is 1 to the last digit."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], 1), 40.0)


def small_dependencyvit(kind: str = "full") -> DependencyViT:
    """32-pixel images, 64 patches of 4×4, width 48, 4 blocks of 4 heads.

    kind: "full"; "no selector": P is 1/4 for every head; "no controller": M is 1; "only
        transposed": both; "ViT": ordinary attention, mean of the tokens; "ViT, gated pooling": the
        same, pooled by its gates.
    """
    if kind == "ViT, gated pooling":
        return gated_vit(**SIZES)
    if kind == "ViT":
        model = gated_vit(**SIZES, global_pool="mean")
    else:
        even = kind in ("no selector", "only transposed")
        model = DependencyViT(**SIZES, temperature=1e6 if even else 0.1)
    if kind in ("ViT", "no controller", "only transposed"):
        for block in model.blocks:
            block.attn.controller = Open()
    return model


def train_set():
    """One object an image, as in chapter 01."""
    return data.load("parts", "train", n=10_000, size=32)


def one_object():
    """New images of the same kind."""
    return data.load("parts", "test", n=TESTED_ON, size=32)


def two_objects(size: int = 32):
    """Two objects that lie so that as many parts as possible are nearer to the other's center.

    They are large, so that parts have patches of their own.
    """
    large = {"objects": 2, "scale": (0.5, 0.7), "adjacency": 1.0}
    return data.load("parts", "test", n=TESTED_ON, size=size, **large)


@cache
def trained(kind: str, seed: int, device: torch.device, steps: int) -> DependencyViT:
    """The small network of this kind after `steps` steps; trained once a process."""
    train.seed_everything(seed)
    model = small_dependencyvit(kind)
    train.fit(
        model, train_set(), steps=steps, batch_size=64, lr=2e-3, seed=seed, device=device,
        augment=train.flip_and_shift, progress=False,
    )  # fmt: skip
    return model


# ---- What is measured ---------------------------------------------------------------------------


def on_object(batch: dict[str, Tensor], rows: int) -> Tensor:
    """Whether at least half of a patch shows an object: `(B, rows²)` bool."""
    share = reduce(batch["saliency"], "b (h p) (w q) -> b (h w)", "mean", h=rows, w=rows)
    return share >= 0.5


def tree_scores(scores: Tensor, batch: dict[str, Tensor], images: int = 200) -> dict[str, float]:
    """What the tables say of child-by-parent scores: attachment, parts, and the tree's shape.

    The parts are those of the first `images`, whose best trees are cut into as many pieces as the
    image has regions.
    """
    owner = batch["node_object"]
    regions = dependency_metrics.token_regions(batch["nodes"], GRID, least=0.5)
    right = dependency_metrics.attachment(scores, regions, owner)
    misled = dependency_metrics.nearer_elsewhere(regions, owner, GRID)
    truth = regions[:images].cpu()
    count = torch.tensor([image[image >= 0].unique().numel() for image in truth])
    pieces = dependency_metrics.tree_pieces(dependency_tree(scores[:images].cpu()), count)
    tree = dependency_tree(scores, decode="greedy")
    return {
        "attachment": right.nanmean().item(),
        "where nearness misleads": right[misled].nanmean().item(),
        "part mIoU": dependency_metrics.matched_iou(pieces, truth).mean().item(),
        "star share": tree.star_share.float().mean().item(),
        "depth": tree.depth.amax(-1).float().mean().item(),
    }


def gates_and_trees(model: DependencyViT, device) -> dict[str, float]:
    """What a checkpoint's 64-pixel network found: contrast of its last gates, and its trees."""
    single = data.load("parts", "test", n=100).batch(range(100))
    messages = model.trace(single["image"].to(device)).messages.cpu()
    contrast = dependency_metrics.gate_contrast(messages, on_object(single, GRID[0]))[-1]
    pairs = two_objects(size=64).batch(range(200))
    scores = dependency_scores(model.trace(pairs["image"].to(device))).cpu()
    return {"gate contrast": contrast.item(), **tree_scores(scores, pairs)}


# ---- The tables ---------------------------------------------------------------------------------


def _all(samples, device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in samples.batch(range(len(samples))).items()}


def gate(seed: int, device) -> dict:
    """Do the gates find the objects? Against a ViT whose gates only weigh its pooling."""
    batch = _all(one_object(), device)
    foreground, masks = on_object(batch, 8), batch["saliency"]
    rows = {}
    for row, kind in (("DependencyViT", "full"), ("ViT, gated pooling",) * 2):
        model = trained(kind, seed, device, STEPS)
        trace = model.trace(batch["image"])
        contrasts = dependency_metrics.gate_contrast(trace.messages, foreground).tolist()
        rows[row] = {
            "accuracy": train.accuracy(model, one_object(), device=device),
            **{f"contrast {layer}": value for layer, value in enumerate(contrasts, 1)},
            "AUROC": metrics.auroc(trace.messages[-1], foreground),
            "max F": metrics.max_fbeta(dependency_saliency(trace, "gate"), masks),
        }
    for row, maps in {
        "center prior": metrics.center_prior((TESTED_ON, 32, 32), device=device),
        "color contrast": metrics.color_contrast(batch["image"]),
    }.items():
        patches = reduce(maps, "b (h p) (w q) -> b (h w)", "mean", h=8, w=8)
        rows[row] = {
            "AUROC": metrics.auroc(patches, foreground),
            "max F": metrics.max_fbeta(rearrange(patches, "b (h w) -> b h w", h=8), masks),
        }
    return rows


def attachment(seed: int, device) -> dict:
    """Do the trees follow the parts? Against a ViT, and scores that only know places or colors."""
    batch = _all(two_objects(), device)
    traces = {kind: trained(kind, seed, device, STEPS).trace(batch["image"])
              for kind in ("full", "ViT", "ViT, gated pooling")}  # fmt: skip
    near = metrics.gaussian_locality(GRID, sigma=1.5, device=device)
    reads = dependency_scores(traces["ViT"])  # what query i reads at key j
    scores = {
        "random": random_scores(TESTED_ON, 64, seed).to(device),
        "nearest": repeat(near, "i j -> b i j", b=TESTED_ON),
        "near and of its color": color_locality(batch["image"], GRID),
        "ViT: whom it reads": reads,
        "ViT, transposed": reads.mT,
        "ViT, gated pooling": dependency_scores(traces["ViT, gated pooling"], "mean_norm"),
        "DependencyViT, sum": dependency_scores(traces["full"]),
        "DependencyViT, mean_norm": dependency_scores(traces["full"], "mean_norm"),
        "DependencyViT, last": dependency_scores(traces["full"], "last"),
    }
    return {row: tree_scores(values, batch) for row, values in scores.items()}


def ablation(seed: int, device, rows=None) -> dict:
    """What selector and controller do, after a shorter training."""
    batch, single = _all(two_objects(), device), _all(one_object(), device)
    foreground = on_object(single, 8)
    found = {}
    for row in rows or ("full", "no selector", "no controller", "only transposed"):
        model = trained(row, seed, device, FEW_STEPS)
        trace = model.trace(single["image"])
        numbers = tree_scores(dependency_scores(model.trace(batch["image"])), batch)
        contrasts = dependency_metrics.gate_contrast(trace.messages, foreground)
        found[row] = {
            "accuracy": train.accuracy(model, one_object(), device=device),
            "contrast": contrasts[-1].item(),
            "heads in use": heads_in_use(trace.head_probs),
            **{name: numbers[name] for name in ("attachment", "part mIoU", "star share")},
        }
    return found


def heads_in_use(head_probs: Tensor) -> float:
    """e to the entropy of P over the heads, averaged over layers, images and tokens."""
    entropy = -torch.special.xlogy(head_probs, head_probs).sum(-2)
    return entropy.exp().mean().item()


def lite(seed: int, device) -> dict:
    """Drop patches of a trained network without training it further: 36 % are left at the end."""
    full = trained("full", seed, device, STEPS)
    image = torch.rand(1, 3, 32, 32, device=device)
    rows = {
        "nothing pruned": {
            "accuracy": train.accuracy(full, one_object(), device=device),
            "M MACs": cost.macs(full, image) / 1e6,
        }
    }
    for score in ("received_sum", "received", "gate", "random"):
        stages = {"prune_layers": (2, 3, 4), "keep_rates": (0.76, 0.56, 0.36)}
        model = DependencyViT(**SIZES, **stages, prune_score=score).to(device).eval()
        model.load_state_dict(full.state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            accuracy = train.accuracy(model, one_object(), device=device)
        rows[f"by {score}"] = {"accuracy": accuracy, "M MACs": cost.macs(model, image) / 1e6}
    return rows
