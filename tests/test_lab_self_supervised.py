"""Self-distillation against its formulas, its teacher and centers by hand; the views' geometry."""

import math

import battery
import pytest
import torch
import torch.nn.functional as F

from attnlab.attention import VisionTransformer
from attnlab.dependencyvit import dependencyvit_mini
from attnlab.lab.multi_crop import multi_crop
from attnlab.lab.self_supervised import SelfDistillation, features, pretrain

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HEAD = {"prototypes": 16, "hidden": 12, "bottleneck": 8}
LITE = {"prune_layers": (2,), "keep_rates": (0.5,)}


pytestmark = pytest.mark.usefixtures("one_thread")


def vit():
    return VisionTransformer(**SIZES, num_classes=5)


def dependency(**options):
    return dependencyvit_mini(**SIZES, **options)


def learner(model=None, steps=20, seed=0, **options):
    torch.manual_seed(seed)
    return SelfDistillation(vit() if model is None else model, steps, **HEAD | options)


def images(n=4, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def views(large=2, small=2):
    return [images(3, i) for i in range(large)] + [images(3, 9 + i)[..., :16, :16]
                                                   for i in range(small)]  # fmt: skip


def cosines(head, x):
    """The projection head, written out."""
    z = head.mlp(x)
    z = z / z.norm(dim=-1, keepdim=True)
    return z @ (head.prototypes / head.prototypes.norm(dim=-1, keepdim=True)).mT


def cross_entropy(answer, target):
    return -(target * (answer / 0.1).softmax(-1).log()).sum(-1)


def test_without_hidden_patches_it_is_dinos_loss():
    model = learner(masked=0.0).double().eval()
    model.center.normal_()
    large_and_small = [view.double() for view in views()]
    targets, answers = [], []
    for i, view in enumerate(large_and_small):
        answers.append(cosines(model.student_head, model.student(view)))
        if i < 2:
            scores = cosines(model.teacher_head, model.teacher(view))
            targets.append(((scores - model.center) / 0.04).softmax(-1).detach())
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    expected = sum(cross_entropy(answers[j], targets[i]).mean() for i, j in pairs) / len(pairs)
    torch.testing.assert_close(model(large_and_small), expected, atol=1e-6, rtol=0)


def test_hidden_patches_add_ibots_loss(monkeypatch):
    model = learner(masked=0.5, patch_weight=0.7).double().eval()
    model.patch_center.normal_()
    torch.nn.init.normal_(model.mask_token)
    pair = [view.double() for view in views(small=0)]
    torch.manual_seed(5)
    hidden = model._hidden(6, 16, torch.device("cpu"))
    assert (hidden.sum(1) == 8).all()
    torch.manual_seed(5)
    got = model(pair)

    scores = cosines(model.teacher_head, features(model.teacher, torch.cat(pair))[1])
    targets = ((scores - model.patch_center) / 0.04).softmax(-1)
    embed = model.student.patch_embed
    rows = embed(torch.cat(pair)).masked_scatter(
        hidden[..., None].expand(-1, -1, 24), model.mask_token.repeat(int(hidden.sum()))
    )
    monkeypatch.setattr(embed, "forward", lambda x: rows)
    _, patches = features(model.student, torch.cat(pair))
    ibot = cross_entropy(cosines(model.student_head, patches)[hidden], targets[hidden]).mean()
    pooled = features(model.student, torch.cat(pair))[0]
    answers = cosines(model.student_head, pooled).chunk(2)
    teacher = [((cosines(model.teacher_head, model.teacher(view)) - model.center) / 0.04)
               .softmax(-1) for view in pair]  # fmt: skip
    dino = (cross_entropy(answers[0], teacher[1]) + cross_entropy(answers[1], teacher[0])).mean()
    torch.testing.assert_close(got, dino / 2 + 0.7 * ibot, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [vit, dependency, lambda: dependency(**LITE)])
def test_gradients_reach_all_of_the_student_and_none_of_the_teacher(make):
    model = learner(make())
    model(views()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
    used = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"mask_token", "student.patch_embed.proj.weight", "student_head.prototypes"} <= used
    assert isinstance(model.student.head, torch.nn.Identity)


def test_the_teacher_follows_and_the_centers_move():
    model = learner(momentum=0.9, center_momentum=0.8, steps=4)
    name = "patch_embed.proj.weight"
    teacher = model.teacher.get_parameter(name)
    expected, center = teacher.clone(), model.center.clone()
    for step in range(6):
        with torch.no_grad():
            model.student.get_parameter(name).add_(0.1 * (step + 1))
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * min(1, step / 4))) / 2
        expected = momentum * expected + (1 - momentum) * model.student.get_parameter(name)
        pair = views(small=0)
        model(pair)
        torch.testing.assert_close(teacher, expected)
        scores = cosines(model.teacher_head, model.teacher(torch.cat(pair)))
        center = 0.8 * center + 0.2 * scores.mean(0).detach()
        torch.testing.assert_close(model.center, center)
    assert model.step == 6
    model.eval()
    model(views(small=0))
    assert model.step == 6
    torch.testing.assert_close(model.center, center)


def test_the_teacher_never_drops_and_its_temperature_rises():
    model = learner(dependency(proj_drop_rate=0.5), steps=100).train()
    assert model.student.training
    assert not model.teacher.training
    peaks = []
    for step in (0, 5, 10, 50):
        model.step.fill_(step)
        peaks.append(model._sharpened(torch.tensor([0.0, 1.0]), torch.zeros(2))[0].item())
    expected = [1 / (1 + math.exp(1 / t)) for t in (0.04, 0.055, 0.07, 0.07)]
    assert peaks == pytest.approx(expected, rel=1e-4)


def test_what_a_model_says_of_image_and_patches():
    model = vit().eval()
    model.reset_classifier(0)
    pooled, patches = features(model, images())
    torch.testing.assert_close(pooled, model(images()))
    torch.testing.assert_close(patches, model.forward_features(images())[:, 1:])
    lite = dependency(**LITE, num_classes=0).eval()
    pooled, patches = features(lite, images())
    torch.testing.assert_close(pooled, lite(images()))
    assert patches.shape == (4, 16, 24)


def test_names_without_weight_decay_are_those_of_parameters():
    model = learner()
    names = {name for name, _ in model.named_parameters()}
    assert {"mask_token", "student.pos_embed", "student.cls_token"} <= model.no_weight_decay()
    assert model.no_weight_decay() - {"student.dist_token"} <= names


class Stops:
    """Data that fails at a step, as a run that is killed."""

    def __init__(self, at=None):
        self.data, self.calls, self.at = images(8), 0, at

    def __len__(self):
        return 8

    def batch(self, indices):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return {"image": self.data[indices]}


def run(data, seed=0, steps=4, **options):
    torch.manual_seed(0)
    model = dependency()
    crops = {"local_crops": 1, "local_size": 16}
    history = pretrain(
        model, data, steps, crops=crops, distillation=HEAD, seed=seed, batch_size=4,
        progress=False, device="cpu", **options,
    )  # fmt: skip
    return model, history


def test_pretraining_is_reproduced_and_resumed_to_the_last_bit(tmp_path):
    whole, history = run(Stops())
    assert len(history.loss) == 4
    assert not whole.training
    assert isinstance(whole.head, torch.nn.Identity)
    with pytest.raises(KeyboardInterrupt):
        run(Stops(at=4), run_dir=tmp_path, save_every=1)
    resumed, _ = run(Stops(), run_dir=tmp_path, save_every=1)
    other, _ = run(Stops(), seed=1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.pos_embed, other.pos_embed)


def test_a_student_that_forgot_learns_what_its_teacher_says():
    """Of images, and of patches that it does not see. (Teacher and centers all but stand still.)"""
    model = learner(momentum=0.999999, center_momentum=0.999999, masked=0.25, steps=1000)
    model.student.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)  # the same patches are hidden
        losses.append(model(views()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def geometry(view):
    """Width and height of views of `ruler` as shares of the image, `(B,)`; width < 0: mirrored."""
    _, _, height, width = view.shape
    x, y = view[:, 0].mean(1), view[:, 1].mean(2)
    step_x, step_y = (z[:, -2] - z[:, 1] for z in (x, y))
    return step_x * width / (width - 3), step_y * height / (height - 3)


def ruler(batch=200, height=64, width=96):
    """Red is the share of the way to the right, green of that to the bottom."""
    x, y = ((torch.arange(n) + 0.5) / n for n in (width, height))
    red, green = x.expand(height, -1), y[:, None].expand(-1, width)
    return torch.stack([red, green, torch.zeros_like(red)]).expand(batch, -1, -1, -1)


def test_what_part_of_the_image_a_view_shows():
    plain = {"jitter": 0.0, "gray": 0.0}
    got = multi_crop(
        ruler(), torch.Generator().manual_seed(0), local_crops=3,
        global_scale=(0.4, 0.7), local_scale=(0.1, 0.3), **plain,
    )  # fmt: skip
    assert [tuple(view.shape[2:]) for view in got] == [(64, 96)] * 2 + [(32, 32)] * 3
    for view, (low, high) in zip(got, [(0.4, 0.7)] * 2 + [(0.1, 0.3)] * 3, strict=True):
        width, height = geometry(view)
        area, ratio = width.abs() * height, width.abs() / height
        assert low - 0.01 < area.min() < low + 0.05
        assert high - 0.05 < area.max() < high + 0.01
        assert 0.74 < ratio.min() < 0.8
        assert 1.25 < ratio.max() < 1.35
        assert 0.35 < (width < 0).float().mean() < 0.65  # mirrored
        assert (height > 0).all()
        assert view[:, 0].min() < 0.05  # crops lie everywhere
        assert view[:, 0].max() > 0.95


def test_colors_of_a_view():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(
        300, -1, -1, -1
    )
    draws = torch.Generator().manual_seed(0)
    fixed = {"global_scale": (1.0, 1.0), "local_crops": 0}
    view, _ = multi_crop(image, draws, jitter=0.4, gray=0.25, **fixed)
    assert view.min() >= 0
    assert view.max() <= 1
    colorless = (view.amax(1) - view.amin(1)).amax((1, 2)) < 1e-6
    assert 0.15 < colorless.float().mean() < 0.35
    dim = multi_crop(0.5 * torch.ones(300, 3, 8, 8), draws, jitter=0.4, gray=0.0, **fixed)[0]
    brightness = dim.mean((1, 2, 3)) / 0.5  # a gray image has nothing else to change
    assert 0.6 <= brightness.min() < 0.65
    assert 1.35 < brightness.max() <= 1.4


def test_views_are_drawn_from_the_generator_alone():
    one = multi_crop(images(), torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    two = multi_crop(images(), torch.Generator().manual_seed(1))
    other = multi_crop(images(), torch.Generator().manual_seed(2))
    assert len(one) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_bad_input():
    draws = torch.Generator()
    battery.check_errors([
        (lambda: learner(steps=0), "steps=0: expected an integer ≥ 1"),
        (lambda: learner(masked=1.0), "masked=1.0: expected a number in [0, 1)"),
        (lambda: learner(momentum=1.0), "momentum=1.0: expected a number in [0, 1)"),
        (lambda: learner(patch_weight=-1), "patch_weight=-1: expected a number in [0, inf)"),
        (lambda: learner(student_temp=0), "student_temp=0: expected a number in (0, inf)"),
        (lambda: learner()([images()]), "views='1 of them': expected two large ones at least"),
        (lambda: multi_crop(images()[0], draws), "images=(3, 32, 32): expected (B, 3, H, W)"),
        (lambda: multi_crop(images(), draws, local_crops=-1), "local_crops=-1: expected an"),
        (lambda: multi_crop(images(), draws, gray=2), "gray=2: expected a number in [0, 1]"),
        (lambda: multi_crop(images(), draws, global_scale=(0.5, 0.4)), "0 < least ≤ most ≤ 1"),
        (lambda: multi_crop(images(), draws, local_scale=(0, 1)), "local_scale=(0, 1): expected"),
    ])  # fmt: skip


def test_half_precision_is_finite(device):
    model = learner().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model([view.to(device) for view in views()])
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert F.softmax(model.center, 0).isfinite().all()
