"""Decoders against brute force, networkx and a plain loop; what is read off a trace, by hand."""

import itertools
import math

import battery
import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.tree.branchings import maximum_spanning_arborescence

from attnlab.dependency_trace import (
    DependencyTrace,
    dependency_saliency,
    dependency_scores,
    normalized_cut,
)
from attnlab.dependency_trees import DependencyTree, dependency_tree


def scores(N=6, B=None, seed=0):
    """Positive scores, child by parent, as skewed as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, N) if B is None else (B, N, N)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def shares(matrix):
    """What the decoders see: no self-loops, rows that sum to 1."""
    others = matrix - matrix.diag().diag()
    return others / others.sum(1, keepdim=True)


def is_tree(parents):
    """Whether following parents always ends, at a −1."""
    for token in range(len(parents)):
        seen = set()
        while token >= 0 and token not in seen:
            seen.add(token)
            token = int(parents[token])
        if token >= 0:
            return False
    return True


def brute_force(matrix, root):
    """Largest sum of logarithms over all trees with this root."""
    N, logs = len(matrix), shares(matrix).log()
    choices = [[-1] if i == root else [j for j in range(N) if j != i] for i in range(N)]
    return max(
        sum(float(logs[i, j]) for i, j in enumerate(parents) if j >= 0)
        for parents in itertools.product(*choices)
        if is_tree(parents)
    )


def total(tree):
    return float(tree.scores[tree.parents >= 0].log().sum())


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_mst_equals_brute_force(N):
    for seed in range(15):
        matrix = scores(N, seed=seed)
        for root in range(N):
            tree = dependency_tree(matrix, root=root)
            assert is_tree(tree.parents)
            assert (tree.parents < 0).nonzero().flatten().tolist() == [root]
            assert total(tree) == pytest.approx(brute_force(matrix, root), abs=1e-9)
        best = dependency_tree(matrix, root="best")
        expected = max(brute_force(matrix, root) for root in range(N))
        assert total(best) == pytest.approx(expected, abs=1e-9)


def test_mst_equals_brute_force_with_five_tokens_and_many_ties():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        matrix = torch.randint(1, 3, (5, 5), generator=generator).double()
        assert total(dependency_tree(matrix, root=2)) == pytest.approx(brute_force(matrix, 2))


@pytest.mark.parametrize("N", [12, 40])
def test_mst_equals_networkx(N):
    for seed in range(4):
        matrix = scores(N, seed=seed)
        logs, graph = shares(matrix).log(), networkx.DiGraph()
        for i, j in itertools.product(range(N), range(N)):
            if i not in (j, 3):
                graph.add_edge(j, i, weight=float(logs[i, j]))
        theirs = maximum_spanning_arborescence(graph)
        tree = dependency_tree(matrix, root=3)
        assert {(int(j), i) for i, j in enumerate(tree.parents) if j >= 0} == set(theirs.edges)


def test_the_best_forest_equals_brute_force():
    for seed in range(10):
        matrix = scores(4, seed=seed)
        logs = (matrix / matrix.sum(1, keepdim=True)).log()
        best = max(
            sum(float(logs[i, i if j < 0 else j]) for i, j in enumerate(parents))
            for parents in itertools.product(
                *([j for j in range(-1, 4) if j != i] for i in range(4))
            )
            if is_tree(parents)
        )
        tree = dependency_tree(matrix, decode="forest")
        assert is_tree(tree.parents)
        assert float(tree.scores.log().sum()) == pytest.approx(best, abs=1e-9)


def greedy_loop(matrix, root):
    """Edges from the largest down, with the pieces in a list."""
    N = len(matrix)
    piece, parents = list(range(N)), [-1] * N
    edges = sorted(itertools.permutations(range(N), 2), key=lambda e: -float(matrix[e]))
    for i, j in edges:
        if i != root and parents[i] < 0 and piece[i] != piece[j]:
            parents[i], gone, stays = j, piece[i], piece[j]
            piece = [stays if p == gone else p for p in piece]
    return parents


@pytest.mark.parametrize("root", [2, "best"])
def test_greedy_equals_the_loop_for_a_whole_batch(root):
    batch = scores(9, B=5)
    tree = dependency_tree(batch, decode="greedy", root=root)
    for image in range(5):
        expected = greedy_loop(shares(batch[image]), root)
        assert tree[image].parents.tolist() == expected


@given(seed=st.integers(0, 10**6), N=st.integers(2, 12), score=st.sampled_from(["plain", "pmi"]))
@settings(max_examples=10, deadline=None)
def test_every_decoder_gives_what_it_says(seed, N, score):
    batch = scores(N, B=3, seed=seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(N))
    shuffled = batch[:, order][:, :, order]
    for decode in ("mst", "greedy", "forest", "argmax"):
        tree = dependency_tree(batch, decode=decode, score=score)
        again = dependency_tree(shuffled, decode=decode, score=score)
        moved = torch.where(again.parents < 0, -1, order[again.parents.clamp_min(0)])
        assert torch.equal(moved, tree.parents[:, order])  # whatever the order of the tokens
        for image in range(3):
            one = tree[image]
            if decode == "argmax":
                assert one.cycles()
                assert not is_tree(one.parents)
                assert (one.depth == -1).any()
                continue
            assert not one.cycles()
            assert is_tree(one.parents)
            roots = (one.parents < 0).nonzero().flatten().tolist()
            assert decode == "forest" or len(roots) == 1
            assert sum(one.sizes[roots]) == N
            assert one.depth.max() <= N - 1
            for token in range(N):
                path = one.path(token)
                assert len(path) == one.depth[token] + 1
                assert path[-1] == one.tops[token]
                assert len(one.subtree(token)) == one.sizes[token]
                below = sum(int(one.sizes[child]) for child in one.children(token))
                assert one.sizes[token] == 1 + below


def test_one_image_is_the_first_of_its_batch():
    batch = scores(7, B=2)
    for decode in ("mst", "greedy", "forest", "argmax"):
        tree, one = dependency_tree(batch, decode), dependency_tree(batch[0], decode)
        assert torch.equal(tree[0].parents, one.parents)
        assert torch.equal(tree[0].scores, one.scores)


def test_who_is_the_root():
    matrix = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.1, 0.7], [0.3, 0.3, 0.4]])
    by_rule = {"received": 2, "self": 0, 1: 1}  # columns without self: 0.5, 0.35, 0.75
    for rule, root in by_rule.items():
        assert dependency_tree(matrix, root=rule).parents[root] == -1
    places = torch.tensor([0, 1])
    assert (dependency_tree(matrix.expand(2, 3, 3), root=places).parents.gather(1, places[:, None])
            == -1).all()  # fmt: skip


def test_pmi_takes_popularity_away():
    matrix = torch.tensor([[0.0, 0.2, 0.8], [0.1, 0.0, 0.9], [0.5, 0.5, 0.0]])
    assert dependency_tree(matrix, "argmax").parents.tolist() == [2, 2, 0]
    corrected = matrix / matrix.sum(0)
    tree = dependency_tree(matrix, "argmax", score="pmi")
    assert tree.parents.tolist() == corrected.argmax(1).tolist()
    assert tree.scores.tolist() == pytest.approx([0.8, 0.9, 0.5])  # still shares of what is sent


def test_tokens_that_send_nothing_still_get_a_parent():
    matrix = torch.zeros(5, 5)
    matrix[0, 1] = 1.0
    for decode in ("mst", "greedy"):
        tree = dependency_tree(matrix, decode)
        assert tree.parents.tolist() == [1, -1, 0, 0, 0] or is_tree(tree.parents)
        assert tree.parents[0] == 1


#       0
#     1   2
#   3 4   5
#         6
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, 5])


def test_reading_a_tree():
    tree = DependencyTree(PARENTS, torch.tensor([0, 0.5, 0.1, 0.4, 0.6, 0.2, 0.9]))
    assert tree.depth.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.sizes.tolist() == [7, 3, 3, 1, 1, 2, 1]
    assert tree.tops.tolist() == [0] * 7
    assert tree.path(6) == [6, 5, 2, 0]
    assert tree.children(1) == [3, 4]
    assert tree.subtree(2) == [2, 5, 6]
    assert float(tree.star_share) == pytest.approx(2 / 6)
    assert tree.cycles() == []
    assert tree.cut(1).tolist() == [0] * 7
    assert tree.cut(2).tolist() == [0, 0, 1, 0, 0, 1, 1]
    # 2→0 is cut first; 5→2 would leave 2 alone; 3→1 would leave 3 alone; 1→0 would leave 0 alone.
    assert tree.cut(4).tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert tree.cut(3, min_size=1).tolist() == [0, 0, 1, 0, 0, 2, 2]
    star = DependencyTree(torch.tensor([-1, 0, 0, 0]), torch.ones(4))
    assert float(star.star_share) == 1.0
    batch = DependencyTree(torch.stack([PARENTS, PARENTS.flip(0).clamp_max(-1)]), torch.zeros(2, 7))
    assert batch[0].depth.tolist() == batch.depth[0].tolist()


def test_argmax_reports_its_cycles():
    tree = DependencyTree(torch.tensor([1, 2, 0, 0, 5, 4]), torch.ones(6))
    assert tree.cycles() == [[0, 1, 2], [4, 5]]
    assert tree.depth.tolist() == [-1] * 6
    assert tree.path(3) == [3, 0, 1, 2]
    assert tree.subtree(0) == [0, 1, 2, 3]


def trace(L=3, B=2, heads=2, N=4, seed=0):
    """What a model of L layers on a 2×2 grid might have sent, with gates that close."""
    generator = torch.Generator().manual_seed(seed)
    forward = torch.rand(L, B, N, N, generator=generator).double().softmax(-1)
    messages = torch.rand(L, B, N, generator=generator).double().cumprod(0)
    head_probs = torch.full((L, B, heads, N), 1 / heads).double()
    masks = (forward * messages[..., None]).mT
    return DependencyTrace(masks, messages, head_probs, messages > 0, (), (2, 2))


def test_how_layers_are_combined():
    t = trace()
    sent = t.masks.mT
    torch.testing.assert_close(t.received, sent.sum(-2))
    torch.testing.assert_close(dependency_scores(t), sent[0] + sent[1] + sent[2])
    for name, layer in (("last", 2), ("layer:1", 0), ("layer:3", 2)):
        torch.testing.assert_close(dependency_scores(t, name), sent[layer])
    forward = sent / t.messages[..., None]
    torch.testing.assert_close(dependency_scores(t, "mean_norm"), forward.mean(0))
    flow = dependency_scores(t, "flow")
    torch.testing.assert_close(flow.sum(-1), torch.ones(2, 4).double())
    expected = torch.eye(4).double()
    for layer in range(3):
        expected = expected @ (sent[layer, 0] + (1 - t.messages[layer, 0]).diag())
    torch.testing.assert_close(flow[0], expected)


def test_combining_when_tokens_were_pruned():
    t = trace()
    alive = t.alive.clone()
    alive[1:, :, 3] = False
    here = alive[..., None] & alive[..., None, :]
    masks = t.masks * here
    masks = (
        masks / masks.sum(-2, keepdim=True).clamp_min(1e-12) * (t.messages * alive)[..., None, :]
    )
    pruned = DependencyTrace(masks, t.messages * alive, t.head_probs, alive, (), (2, 2))
    first = dependency_scores(pruned, "layer:1")[:, 3]
    torch.testing.assert_close(dependency_scores(pruned)[:, 3], first)
    norm = dependency_scores(pruned, "mean_norm")
    torch.testing.assert_close(norm.sum(-1), torch.ones(2, 4).double())
    flow = dependency_scores(pruned, "flow")
    torch.testing.assert_close(flow.sum(-1), torch.ones(2, 4).double())


def test_maps_of_saliency():
    t = trace()
    scores_ = dependency_scores(t)
    own = torch.diag_embed(scores_.diagonal(dim1=-2, dim2=-1))
    expected = {
        "mass": (scores_ - own).sum(1),
        "flow": dependency_scores(t, "flow").sum(1),
        "gate": t.messages[-1],
    }
    for kind, value in expected.items():
        torch.testing.assert_close(dependency_saliency(t, kind), value.unflatten(1, (2, 2)))
    forest = dependency_saliency(t, "forest").flatten(1)
    tops = dependency_tree(scores_, decode="forest").tops
    for b in range(2):
        sent = [float(t.messages[-1, b][tops[b] == top].sum()) for top in range(4)]
        assert torch.equal(forest[b], (tops[b] == int(np.argmax(sent))).double())
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0]]).double()
    ncut = dependency_saliency(t, "ncut", features.expand(2, 4, 2), weight=0.01)
    assert ncut.shape == (2, 2, 2)
    assert ((ncut[:, :, 0] > ncut[:, :, 1]).all(1) | (ncut[:, :, 0] < ncut[:, :, 1]).all(1)).all()


def test_the_normalized_cut_finds_two_blocks():
    affinity = torch.full((1, 5, 5), 0.01).double()
    affinity[:, :3, :3] = affinity[:, 3:, 3:] = 1.0
    cut = normalized_cut(affinity)[0]
    assert cut.amin() == 0
    small, large = cut[3:], cut[:3]
    assert small.min() > large.max()  # the smaller block has the entries of larger magnitude
    torch.testing.assert_close(small, small[:1].expand(2))


def test_bad_input():
    matrix, t = scores(4), trace()
    tree = dependency_tree(matrix.expand(2, 4, 4))
    battery.check_errors([
        (lambda: dependency_tree(matrix[:3]), "scores (3, 4): expected (N, N) or (B, N, N), all"),
        (lambda: dependency_tree(-matrix), "scores (4, 4): expected (N, N) or (B, N, N), all ≥ 0"),
        (lambda: dependency_tree(matrix * math.nan), "all ≥ 0"),
        (lambda: dependency_tree(matrix, "tree"), "decode='tree': expected one of mst, greedy"),
        (lambda: dependency_tree(matrix, root="gate"), "root='gate': expected received, self"),
        (lambda: dependency_tree(matrix, root=4), "root=4: expected places from 0 to 3"),
        (lambda: dependency_tree(matrix, root=torch.zeros(3).long()), "root (3,): expected a"),
        (lambda: dependency_tree(matrix, score="log"), "score='log': expected one of plain, pmi"),
        (lambda: dependency_scores(t, "layer:4"), "combine='layer:4': expected sum, mean_norm"),
        (lambda: dependency_scores(t, "layer:0"), "or layer:1 to layer:3"),
        (lambda: dependency_saliency(t, "root"), "kind='root': expected mass, flow, gate"),
        (lambda: dependency_saliency(t, "ncut"), "features None: expected (2, 4, 'D')"),
        (lambda: tree.path(0), "parents (2, 4): expected one image, tree[b]"),
        (lambda: tree[0].cut(0), "parts=0: expected at least the number of roots, 1"),
        (lambda: dependency_tree(matrix, "argmax").cut(2), "cut: expected a tree, got cycles"),
    ])  # fmt: skip
