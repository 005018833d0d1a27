"""Decoding dependency trees: images a second of each decoder, and Edmonds against networkx.

    python benchmarks/trees.py [--machine NAME] [--threads 2] [--quick]

The scores are made like attention: random queries and keys, some keys popular with all, summed over
layers. Prints a Markdown table, and writes benchmarks/results/trees-NAME.json. Run it on a quiet
machine.
"""

import networkx
import torch
from _common import arguments, seconds, table, write
from networkx.algorithms.tree.branchings import maximum_spanning_arborescence

from attnlab.dependency_trees import dependency_tree


def scores(images: int, tokens: int, layers: int = 12, popularity: float = 2.0) -> torch.Tensor:
    """Child-by-parent scores `(images, tokens, tokens)`."""
    q, k = torch.randn(2, layers, images, tokens, 16)
    popular = popularity * torch.randn(layers, images, 1, tokens)
    return (q @ k.mT / 4 + popular).softmax(-1).sum(0)


def by_networkx(matrix: torch.Tensor) -> None:
    """The same tree: all edges but those into the root."""
    root = int((matrix - matrix.diag().diag()).sum(0).argmax())
    logs = matrix.double().log().tolist()
    graph = networkx.DiGraph()
    graph.add_weighted_edges_from(
        (parent, child, logs[child][parent])
        for child in range(len(logs))
        for parent in range(len(logs))
        if child not in (parent, root)
    )
    maximum_spanning_arborescence(graph)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batch, repeats = (8, 2) if args.quick else (64, 5)
    results = {"batch": batch, "images_a_second": {}}
    sizes = [64, 196] if args.quick else [64, 196, 400]
    for tokens in sizes:
        many = scores(batch, tokens)
        few = many[: 2 if args.quick else 8]
        steps = {
            "greedy, batch": (lambda x=many: dependency_tree(x, "greedy"), len(many)),
            "mst": (lambda x=few: dependency_tree(x, "mst"), len(few)),
            "mst, best root": (lambda x=few: dependency_tree(x, "mst", root="best"), len(few)),
            "forest": (lambda x=few: dependency_tree(x, "forest"), len(few)),
            "networkx": (lambda x=few[0]: by_networkx(x), 1),
        }
        taken = seconds({name: step for name, (step, _) in steps.items()}, repeats)
        results["images_a_second"][tokens] = {
            name: images / taken[name] for name, (_, images) in steps.items()
        }
    rates = results["images_a_second"]
    print(table(["images a second", *(f"{tokens} tokens" for tokens in sizes)], [
        [name, *(f"{rates[tokens][name]:.1f}" for tokens in sizes)] for name in rates[sizes[0]]
    ]))  # fmt: skip
    write("trees", args, results)


if __name__ == "__main__":
    main()
