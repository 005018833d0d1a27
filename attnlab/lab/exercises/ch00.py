"""The exercise of chapter 00: one line, to learn how a check talks."""

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def normalize(scores: torch.Tensor) -> torch.Tensor:
    """Divide each row by its sum, so that every query's weights sum to 1.

    scores: (queries, keys), all positive.
    Returns (queries, keys); `scores` itself stays as it was.
    """
    return scores / scores.sum(dim=-1, keepdim=True)


def _cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, 6, generator=generator) + 0.1
    return [
        Case("two queries, three keys", (torch.tensor([[1.0, 1.0, 2.0], [3.0, 5.0, 2.0]]),)),
        Case("one key gets everything", (torch.tensor([[7.0]]),)),
        Case("as many queries as keys", (scores[:, :4].contiguous(),)),
        Case("four queries, six keys", (scores,)),
    ]


NORMALIZE = Exercise(
    topic="start",
    solution=normalize,
    cases=_cases,
    hints=(
        "A row is one query: sum over its keys, the last axis, and keep that axis (keepdim=True), "
        "or the shapes do not fit each other.",
        "scores.sum(dim=-1, keepdim=True) has the shape (queries, 1), and dividing by it "
        "divides each row.",
    ),
    mistakes=(
        (
            "The columns sum to 1, not the rows: keys are the last axis, so sum over dim=-1.",
            lambda scores: scores / scores.sum(dim=0),
        ),
        (
            "All weights together sum to 1. Each query has its own weights: sum row by row.",
            lambda scores: scores / scores.sum(),
        ),
        (
            "That is a softmax: its rows sum to 1 too, but it takes exponentials first.",
            lambda scores: scores.softmax(dim=-1),
        ),
        (
            "You divided by the largest score. Divide by the sum of the row.",
            lambda scores: scores / scores.amax(dim=-1, keepdim=True),
        ),
    ),
)

EXERCISES = (NORMALIZE,)
