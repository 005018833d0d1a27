"""`attnlab.lab.claims`: one deterministic line, or an error that says what was measured."""

import math

import numpy as np
import pytest
import torch

from attnlab.lab.claims import ClaimError, claim

HOLDS = [
    (0.8, {"above": 0.7}),
    (0.8, {"below": 0.9}),
    (0.8, {"above": 0.7, "below": 0.9}),
    (3, {"equal": 3}),
    (3.05, {"equal": 3, "tol": 0.1}),
    (math.inf, {"above": 0}),
    (math.inf, {"equal": math.inf}),
    (torch.tensor(0.8), {"above": 0.7}),
    (torch.tensor([[5]]), {"equal": 5}),
    (np.float32(0.5), {"equal": 0.5}),
    (True, {}),
    (torch.tensor(1) == 1, {}),
    (np.bool_(True), {}),
]

FAILS = [
    (0.7, {"above": 0.7}, r"measured 0\.7, expected above 0\.7"),
    (0.9, {"below": 0.9}, r"measured 0\.9, expected below 0\.9"),
    (0.5, {"above": 0.7, "below": 0.9}, r"expected above 0\.7 and expected below 0\.9"),
    (1.0, {"above": 0.7, "below": 0.9}, r"measured 1\.0"),
    (3.2, {"equal": 3, "tol": 0.1}, r"measured 3\.2, expected 3 ± 0\.1"),
    (2, {"equal": 3}, "measured 2, expected 3$"),
    (math.nan, {"above": 0.7}, "measured nan"),
    (math.nan, {"below": 0.7}, "measured nan"),
    (math.nan, {"equal": 0.0, "tol": 1e9}, "measured nan"),
    (torch.tensor(math.nan), {"above": -math.inf}, "measured nan"),
    (False, {}, "measured False, expected to be true"),
    (torch.tensor(False), {}, "measured False"),
]

WRONG = [
    ("", True, {}, "text=''"),
    ("two\nlines", True, {}, "text='two"),
    (None, True, {}, "text=None"),
    ("x", 0.5, {}, "expected at least one bound"),
    ("x", True, {"above": 0.5}, "value=True: expected a number"),
    ("x", None, {"above": 0.5}, "value=None: expected a number or a bool"),
    ("x", "0.8", {"above": 0.5}, "value='0.8'"),
    ("x", torch.ones(2), {"above": 0.5}, r"value=\(2,\): expected one element"),
    ("x", 0.8, {"above": math.nan}, "above=nan: expected a number"),
    ("x", 0.8, {"above": "a lot"}, "above='a lot'"),
    ("x", 0.8, {"above": 0.5, "tol": 0.1}, "tol=0.1: expected ≥ 0, beside equal="),
    ("x", 0.8, {"equal": 0.5, "tol": -1}, "tol=-1"),
]


@pytest.mark.parametrize(("value", "bounds"), HOLDS)
def test_a_claim_that_holds_prints_its_text_and_no_number(value, bounds, capsys):
    assert claim("Attention finds the key patch", value, **bounds) is None
    assert capsys.readouterr() == ("✔ Attention finds the key patch\n", "")


@pytest.mark.parametrize(("value", "bounds", "words"), FAILS)
def test_a_claim_that_fails_says_what_was_measured(value, bounds, words, capsys):
    with pytest.raises(ClaimError, match=words) as caught:
        claim("Attention finds it", value, **bounds)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value).startswith("✘ Attention finds it: ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("text", "value", "bounds", "words"), WRONG)
def test_bad_arguments_are_named(text, value, bounds, words):
    with pytest.raises(ValueError, match=words):
        claim(text, value, **bounds)
