"""Experiments of chapter 09: what the gates find, what the trees follow, what each part does, Lite.

Each function returns `{row: {metric: value}}` for one seed. All train small networks on 32-pixel
`parts`, two objects an image, to say which types are in it, and measure them on new images in which
some parts lie nearer to the other object than to their own.
"""

from functools import cache

import torch
from einops import einsum, rearrange, reduce, repeat
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.attention import attention_weights
from attnlab.dependency_pruning import Sending
from attnlab.dependency_trace import dependency_saliency, dependency_scores
from attnlab.dependency_trees import dependency_tree
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import cost, data, metrics, train
from attnlab.layers import Mlp

CHAPTER = "09_dependencyvit"
RERUN = ("ablation", "full")
STEPS, FEW_STEPS = 300, 150
TRAINED_ON, TESTED_ON = 6_000, 500
TWO_OBJECTS = {"objects": 2, "scale": (0.5, 0.7)}  # large ones: parts have patches of their own


class Gathering(nn.Module):
    """Ordinary attention in the place of `ReversedAttention`: each token chooses whom it hears.

    The message controller is the same, but it has no say in the attention: its gates only weigh the
    tokens when the image is read out.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.controller = Mlp(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)

    def init_weights(self) -> None:
        """Nothing more than the model's own initialisation."""

    def forward(self, x: Tensor, messages: Tensor | None = None, observe: bool = False):
        passed = messages * self.controller(x).sigmoid().squeeze(-1)
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        weights = attention_weights(q, k)
        out = self.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
        alike = torch.full_like(weights[..., 0], 1 / self.num_heads)
        return (out, passed, Sending(weights, alike, passed)) if observe else (out, passed)


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
    model = DependencyViT(
        img_size=32, patch_size=4, num_classes=8, embed_dim=48, depth=4, num_heads=4,
        temperature=1e6 if kind in ("no selector", "only transposed") else 0.1,
        global_pool="mean" if kind == "ViT" else "gate_mean",
    )  # fmt: skip
    for block in model.blocks:
        if kind in ("ViT", "ViT, gated pooling"):
            block.attn = Gathering(48, 4)
    model.init_weights()
    for block in model.blocks:
        if kind in ("no controller", "only transposed", "ViT"):
            block.attn.controller = Open()
    return model


def types_present(batch: dict[str, Tensor]) -> Tensor:
    """Which of the 8 types are in each image: `(B, 8)`, 0.0 or 1.0."""
    labels = torch.where(batch["labels"] < 0, 8, batch["labels"])
    return F.one_hot(labels, 9).amax(1)[:, :8].float()


def types_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross entropy of every type."""
    return F.binary_cross_entropy_with_logits(model(batch["image"]), types_present(batch))


def train_set():
    """Images of two objects, in half of them laid out as in `test_set`."""
    return data.load("parts", "train", n=TRAINED_ON, size=32, adjacency=0.5, **TWO_OBJECTS)


def test_set():
    """Images of two objects that lie so that as many parts as possible are nearer to the other."""
    return data.load("parts", "test", n=TESTED_ON, size=32, adjacency=1.0, **TWO_OBJECTS)


@cache
def trained(kind: str, seed: int, device: torch.device, steps: int) -> DependencyViT:
    """The small network of this kind after `steps` steps; trained once a process."""
    train.seed_everything(seed)
    model = small_dependencyvit(kind)
    train.fit(
        model, train_set(), loss=types_loss, steps=steps, batch_size=64, lr=2e-3, seed=seed,
        device=device, augment=train.flip_and_shift, progress=False,
    )  # fmt: skip
    return model


# ---- What is measured ---------------------------------------------------------------------------


@torch.no_grad()
def types_accuracy(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Share of the images whose highest scores, as many as there are types, are its types."""
    present = types_present(batch)
    rank = model(batch["image"]).argsort(1, descending=True).argsort(1)
    named = (rank < present.sum(1, keepdim=True)).float()
    return named.eq(present).all(1).float().mean().item()


def patch_nodes(batch: dict[str, Tensor], rows: int, majority: float = 0.5) -> Tensor:
    """The node of the tree that most of a patch shows, `(B, rows²)`; −1 where none has a majority.

    0 is the scene, 1 … K the objects (no pixel is an object's alone), and then the parts.
    """
    side = batch["nodes"].shape[-1] // rows
    pixels = rearrange(batch["nodes"], "b (h p) (w q) -> b (h w) (p q)", p=side, q=side).long()
    counts = F.one_hot(pixels, batch["tree"].shape[1]).sum(2)
    most, node = counts.max(-1)
    return torch.where(most >= majority * side**2, node, -1)


def on_object(batch: dict[str, Tensor], rows: int) -> Tensor:
    """Whether at least half of a patch shows an object: `(B, rows²)` bool."""
    share = reduce(batch["saliency"], "b (h p) (w q) -> b (h w)", "mean", h=rows, w=rows)
    return share >= 0.5


def attachments(scores: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Does a part send to its own object? `(parts,)` bool; and was nearness misleading? the same.

    A part's score for a candidate (each object without the part itself, and the background) is what
    its patches send to the candidate's patches, divided by how many these are; the highest wins.
    Misleading: the center of another object is nearer to the part's than that of its own. Parts
    without a patch of their own, or whose object has no other, do not count.

    Args:
        scores: `(B, N, N)`, child by parent, with N = rows².
    """
    rows = round(scores.shape[-1] ** 0.5)
    node = patch_nodes(batch, rows).to(scores.device)
    K, nodes = batch["labels"].shape[1], batch["tree"].shape[1]
    shares = scores - torch.diag_embed(scores.diagonal(dim1=1, dim2=2))
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)

    member = F.one_hot(node.clamp_min(0), nodes) * (node >= 0)[..., None]  # (B, N, nodes)
    member = member.to(scores.dtype)
    part = member[..., 1 + K :]  # (B, N, parts)
    owner = torch.arange(part.shape[-1], device=scores.device) // (part.shape[-1] // K)
    is_own = F.one_hot(owner, K).to(scores.dtype)  # (parts, K)
    whole = part @ is_own  # (B, N, K): all patches of each object
    sends = einsum(part, shares, "b i r, b i j -> b r j")
    to_object = sends @ whole - einsum(sends, part, "b r j, b j r -> b r")[..., None] * is_own
    size = reduce(part, "b n r -> b r", "sum")
    room = reduce(whole, "b n k -> b 1 k", "sum") - size[..., None] * is_own
    to_object = to_object / room.clamp_min(1)
    background = member[..., :1]
    to_scene = sends @ background / reduce(background, "b n o -> b 1 o", "sum").clamp_min(1)
    best = torch.cat([to_object, to_scene], -1).argmax(-1)

    place = torch.cartesian_prod(*[torch.arange(rows, dtype=scores.dtype)] * 2).to(scores.device)
    centers = [
        einsum(mask, place, "b n m, n c -> b m c")
        / reduce(mask, "b n m -> b m 1", "sum").clamp_min(1)
        for mask in (part, whole)
    ]
    distance = torch.cdist(*centers)
    distance = distance.masked_fill(reduce(whole, "b n k -> b 1 k", "sum") == 0, torch.inf)
    counted = (size > 0) & (einsum(room, is_own, "b r k, r k -> b r") > 0)
    return (best == owner)[counted], (distance.argmin(-1) != owner)[counted]


def part_iou(pieces: Tensor, nodes: Tensor) -> float:
    """Mean over the true regions of one image of the IoU with their piece, matched one to one.

    pieces, nodes: `(N,)`; patches of node −1 do not count; a region without a piece scores 0.
    """
    known = nodes >= 0
    piece = F.one_hot(pieces[known].unique(return_inverse=True)[1]).float()
    region = F.one_hot(nodes[known].unique(return_inverse=True)[1]).float()
    both = region.T @ piece
    iou = both / (region.sum(0)[:, None] + piece.sum(0) - both)
    return iou[linear_sum_assignment(iou.numpy(), maximize=True)].sum().item() / len(iou)


def part_miou(scores: Tensor, batch: dict[str, Tensor]) -> float:
    """Cut each image's best tree into as many pieces as it has regions: the mean `part_iou`."""
    nodes = patch_nodes(batch, round(scores.shape[-1] ** 0.5))
    trees = dependency_tree(scores.cpu())
    values = []
    for image, truth in enumerate(nodes):
        regions = truth[truth >= 0].unique().numel()
        values.append(part_iou(trees[image].cut(regions), truth))
    return sum(values) / len(values)


def tree_scores(scores: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """What the tables say of child-by-parent scores: attachment, parts, and the tree's shape."""
    right, misled = attachments(scores, batch)
    tree = dependency_tree(scores.cpu(), decode="greedy")
    return {
        "attachment": right.float().mean().item(),
        "where nearness misleads": right[misled].float().mean().item(),
        "part mIoU": part_miou(scores[:200], {key: value[:200] for key, value in batch.items()}),
        "star share": tree.star_share.mean().item(),
        "depth": tree.depth.amax(-1).float().mean().item(),
    }


def contrast(messages: Tensor, foreground: Tensor) -> float:
    """Mean message on the objects over mean message on the background."""
    return (messages[foreground].mean() / messages[~foreground].mean()).item()


# ---- The tables ---------------------------------------------------------------------------------


def _test_batch(device) -> dict[str, Tensor]:
    samples = test_set()
    return {key: value.to(device) for key, value in samples.batch(range(len(samples))).items()}


def gate(seed: int, device) -> dict:
    """Do the gates find the objects? Against a ViT whose gates only weigh its pooling."""
    batch = _test_batch(device)
    foreground = on_object(batch, 8)
    rows = {}
    for row, kind in (("DependencyViT", "full"), ("ViT, gated pooling",) * 2):
        model = trained(kind, seed, device, STEPS)
        trace = model.trace(batch["image"])
        last = trace.messages[-1]
        masks = batch["saliency"]
        rows[row] = {
            "accuracy": types_accuracy(model, batch),
            **{f"contrast {i}": contrast(m, foreground) for i, m in enumerate(trace.messages, 1)},
            "AUROC": metrics.auroc(last, foreground),
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
    batch = _test_batch(device)
    masks = {kind: trained(kind, seed, device, STEPS).trace(batch["image"])
             for kind in ("full", "ViT", "ViT, gated pooling")}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    near = metrics.gaussian_locality((8, 8), sigma=1.5, device=device)
    reads = masks["ViT"].masks.sum(0).mT  # child i's weights on j: whom it reads
    scores = {
        "random": torch.rand(TESTED_ON, 64, 64, generator=generator).to(device),
        "nearest": repeat(near, "i j -> b i j", b=TESTED_ON),
        "nearest color": color_scores(batch["image"]),
        "ViT: whom it reads": reads,
        "ViT, transposed": reads.mT,
        "ViT, gated pooling": dependency_scores(masks["ViT, gated pooling"], "mean_norm"),
        "DependencyViT, sum": dependency_scores(masks["full"]),
        "DependencyViT, mean_norm": dependency_scores(masks["full"], "mean_norm"),
        "DependencyViT, last": dependency_scores(masks["full"], "last"),
    }
    return {row: tree_scores(values, batch) for row, values in scores.items()}


def color_scores(images: Tensor, rows: int = 8) -> Tensor:
    """Scores that only know how alike the mean colors of two patches are: `(B, rows², rows²)`."""
    mean = reduce(images, "b c (h p) (w q) -> b (h w) c", "mean", h=rows, w=rows)
    return (-torch.cdist(mean, mean).square() / 0.02).softmax(-1)


def ablation(seed: int, device, rows=None) -> dict:
    """What selector and controller do, after a shorter training."""
    batch = _test_batch(device)
    foreground = on_object(batch, 8)
    found = {}
    for row in rows or ("full", "no selector", "no controller", "only transposed"):
        model = trained(row, seed, device, FEW_STEPS)
        trace = model.trace(batch["image"])
        numbers = tree_scores(dependency_scores(trace), batch)
        found[row] = {
            "accuracy": types_accuracy(model, batch),
            "contrast": contrast(trace.messages[-1], foreground),
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
    batch = _test_batch(device)
    trained_model = trained("full", seed, device, STEPS)
    image = torch.rand(1, 3, 32, 32, device=device)
    rows = {"nothing pruned": {"accuracy": types_accuracy(trained_model, batch)}}
    rows["nothing pruned"]["M MACs"] = cost.macs(trained_model, image) / 1e6
    for score in ("received_sum", "received", "gate", "random"):
        model = DependencyViT(
            img_size=32, patch_size=4, num_classes=8, embed_dim=48, depth=4, num_heads=4,
            prune_layers=(2, 3, 4), keep_rates=(0.76, 0.56, 0.36), prune_score=score,
        ).to(device).eval()  # fmt: skip
        model.load_state_dict(trained_model.state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            accuracy = types_accuracy(model, batch)
        rows[f"by {score}"] = {"accuracy": accuracy, "M MACs": cost.macs(model, image) / 1e6}
    return rows
