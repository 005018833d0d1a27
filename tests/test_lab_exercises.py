"""Every exercise accepts its solution and knows its stub and its typical mistakes; and a check
turns whatever a learner's function does into a result."""

import importlib.util
import inspect
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from attnlab.lab.exercises import catalogue, check, framework, hint, judge, solution
from attnlab.lab.exercises.framework import difference, show

ALL = list(catalogue().values())
SEEDS = range(5)

every_exercise = pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.name)


def load(tmp_path, source: str, name: str):
    """A learner's function from a file of its own, as if from a notebook cell."""
    path = tmp_path / "learner.py"
    path.write_text("import torch\nfrom einops import einsum, rearrange\n" + source)
    spec = importlib.util.spec_from_file_location("learner", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@every_exercise
def test_accepts_its_solution_on_every_seed(exercise):
    for seed in SEEDS:
        assert judge(exercise, exercise.solution, seed).status == "correct"


@every_exercise
def test_an_untouched_stub_is_not_attempted(exercise, tmp_path):
    stub = load(tmp_path, exercise.stub, exercise.solution.__name__)
    assert inspect.signature(stub) == inspect.signature(exercise.solution)
    assert stub.__doc__ == exercise.solution.__doc__
    for seed in SEEDS:
        assert judge(exercise, stub, seed).status == "not attempted"


@every_exercise
def test_rejects_at_least_three_typical_mistakes_each_with_its_hint(exercise):
    assert len(exercise.mistakes) >= 3
    for seed in SEEDS:
        for words, mistake in exercise.mistakes:
            result = judge(exercise, mistake, seed)
            assert (result.status, result.hint) == ("wrong", words), f"seed {seed}: {result}"


@every_exercise
def test_seeds_give_other_numbers_and_the_same_seed_the_same(exercise):
    first, again, other = ([case.args for case in exercise.cases(seed)] for seed in (0, 0, 1))
    assert difference(first, again) is None
    assert difference(first, other) is not None


@every_exercise
def test_the_docstring_gives_shapes_and_the_hints_grow_stronger(exercise):
    documentation = inspect.getdoc(exercise.solution)
    assert "Returns" in documentation or "Number of" in documentation
    assert len(exercise.hints) >= 2
    assert len({*exercise.hints, *(words for words, _ in exercise.mistakes)}) == len(
        exercise.hints
    ) + len(exercise.mistakes), "a hint is there twice"


@every_exercise
def test_a_planted_bug_is_one_change_of_one_line(exercise):
    if exercise.bug is None:
        assert exercise.stub.endswith('"""\n    raise NotImplementedError\n')
        return
    source = inspect.getsource(exercise.solution)
    assert source.count(exercise.bug[0]) == 1
    changed = [
        pair for pair in zip(source.splitlines(), exercise.stub.splitlines(), strict=True)
        if pair[0] != pair[1]
    ]  # fmt: skip
    assert len(changed) == 1


ENTROPY = catalogue()["attention.entropy"]
right = ENTROPY.solution


def test_the_first_failing_case_is_told_in_words():
    result = check("attention.entropy", lambda weights: right(weights).clone().fill_(1.0))
    assert result.text.startswith(
        "Case: two queries, three keys.\n  weights = float32 (2, 3): [[0."
    )
    assert "2 of 2 entries differ, first at (0,): " in result.text
    assert "  expected float32 (2,): [" in result.text
    assert "  got      float32 (2,): [1.0000, 1.0000]" in result.text
    assert result.hint == ENTROPY.hints[0]
    assert repr(result).startswith("✘ attention.entropy: wrong\n")


def test_an_edge_case_is_named_when_only_it_fails():
    def entropy(weights):
        return right(weights).masked_fill(weights.sum(dim=-1) == 0, 7.0)

    assert (
        "Case: every key is masked, the row is all zero."
        in check("attention.entropy", entropy).text
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda w: None, "Not a tensor but None came back."),
        (lambda w: right(w).numpy(), "Not a tensor but a ndarray came back."),
        (lambda w: right(w).tolist(), "Not a tensor but a list came back."),
        (lambda w: (right(w),), "Not a tensor but a tuple came back."),
        (lambda w: right(w)[..., None], "The shape is (2, 1) and should be (2,)."),
        (lambda w: right(w).double(), "The dtype is float64 and should be float32."),
        (lambda w: right(w).to("meta"), "A plain tensor on the CPU is expected, not torch.strided"),
        (lambda w: right(w).to_sparse(), "A plain tensor on the CPU is expected, not torch.sparse"),
        (lambda w: right(w) * torch.nan, "2 of 2 entries differ, first at (0,)"),
        (lambda w: right(w) * torch.nan, "nan found; 2 are NaN."),
        (lambda: None, "It cannot be called with (weights): too many positional arguments."),
        (lambda w, axis: right(w), "missing a required argument: 'axis'"),
        (lambda w: right(w.add_(0.5)), "It writes to its input weights."),
        (lambda w: [right(w), w.zero_()][0], "It writes to its input weights."),
    ],
)
def test_wrong_kinds_of_answers(function, words):
    result = check("attention.entropy", function)
    assert result.status == "wrong"
    assert words in result.text
    assert result.hint


def test_a_missing_return_is_asked_for():
    assert check("attention.entropy", lambda w: None).hint == "Is the `return` missing?"


def test_writing_to_a_tensor_inside_a_list_is_seen():
    rollout = catalogue()["attention.rollout"].solution
    result = check("attention.rollout", lambda maps: [rollout(maps), maps[1].mul_(2)][0])
    assert "It writes to its input maps." in result.text
    emptied = check("attention.rollout", lambda maps: [rollout(list(maps)), maps.pop()][0])
    assert "It writes to its input maps." in emptied.text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda *a: a[0] * 1.0, "Not an int but a float came back."),
        (lambda *a: True, "Not an int but a bool came back."),
        (lambda *a: torch.tensor(3), "Not an int but a Tensor came back."),
        (lambda *a: 3, "The number differs.\n  expected 22,050,664\n  got      3"),
    ],
)
def test_wrong_numbers(answer, words):
    assert words in check("attention.vit_parameters", answer).text


def test_wrong_numbers_of_values():
    merge = catalogue()["attention.merge_blocks"].solution
    two = check("attention.merge_blocks", lambda *a: merge(*a)[:2])
    assert "3 values are expected, and 2 came back." in two.text
    one = check("attention.merge_blocks", lambda *a: merge(*a)[2])
    assert "3 values are expected, and a Tensor came back." in one.text
    shape = check("attention.merge_blocks", lambda *a: (*merge(*a)[:2], a[2][None]))
    assert "Returned value 3: The shape is (1, 1, 2) and should be (1, 2)." in shape.text


def test_an_exception_names_the_learners_own_line(tmp_path):
    helper = "def helper(w):\n    return torch.cat([w, w], dim=9)\n\n\n"
    source = helper + "def entropy(w):\n    return helper(w)"
    result = check("attention.entropy", load(tmp_path, source, "entropy"))
    assert result.status == "wrong"
    assert "It raised IndexError: Dimension out of range" in result.text
    assert "in line 4: return torch.cat([w, w], dim=9)" in result.text, "the line, not torch's"


def test_einops_errors_keep_their_explanation(tmp_path):
    source = "def entropy(w):\n    return rearrange(w, 'b h q k -> b q (h k)')"
    result = check("attention.entropy", load(tmp_path, source, "entropy"))
    assert "It raised EinopsError" in result.text
    assert "in line 4: return rearrange" in result.text


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), RecursionError("deep")])
def test_exits_and_interrupts_become_results(error):
    def entropy(weights):
        raise error

    result = check("attention.entropy", entropy)
    assert result.status == "wrong"
    expected = "You stopped it" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    assert expected in result.text
    assert f"in line {inspect.getsourcelines(entropy)[1] + 1}: raise error" in result.text


def test_not_implemented_later_or_by_torch_is_an_attempt():
    def halfway(weights):
        if weights.ndim > 2:
            raise NotImplementedError
        return right(weights)

    def torchs(weights):
        raise NotImplementedError("aten::x is not implemented for 'Half'")

    for function in (halfway, torchs):
        result = check("attention.entropy", function)
        assert result.status == "wrong"
        assert "It raised NotImplementedError" in result.text


def test_addresses_are_taken_out_of_messages():
    def entropy(weights):
        raise TypeError(f"cannot use {object()}")

    assert "cannot use <object object>" in check("attention.entropy", entropy).text


def test_printing_is_kept_short_and_shown_only_when_wrong(capsys):
    def loud(weights):
        for _ in range(100_000):
            print("spam, spam, spam")
        return right(weights)

    assert check("attention.entropy", loud).status == "correct"
    assert "spam" not in capsys.readouterr().out
    wrong = check("attention.entropy", lambda w: print("the sum is", 3) or w)
    assert "Your function printed:\n  the sum is 3" in wrong.text
    noisy = check("attention.entropy", lambda w: [loud(w), w][1])
    assert noisy.text.count("spam") < 100
    assert noisy.text.endswith("…")


@pytest.mark.parametrize("thing", [None, 3, torch.ones(2), "entropy"])
def test_not_a_function(thing):
    result = check("attention.entropy", thing)
    assert result.status == "wrong"
    assert "not a function: write check('attention.entropy', entropy)." in result.text


def test_the_learners_code_runs_after_all_answers_are_known(monkeypatch):
    def entropy(weights):
        monkeypatch.setattr(torch.special, "entr", torch.zeros_like)
        return weights.sum(dim=-1) * 0

    result = check("attention.entropy", entropy)
    assert result.status == "wrong"
    assert "Case: two queries, three keys." in result.text


def test_the_notebooks_random_numbers_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check("attention.entropy", lambda weights: torch.rand(weights.shape[:-1]))
    check("attention.entropy", lambda weights: torch.manual_seed(5) and right(weights))
    assert torch.equal(torch.rand(3), expected)


def test_modules_and_builtins_can_be_checked():
    class Entropy(nn.Module):
        def forward(self, weights):
            return right(weights)

    assert check("attention.entropy", Entropy()).status == "correct"
    assert check("attention.entropy", torch.softmax).status == "wrong"


def test_a_result_is_the_same_text_every_time_and_escapes_its_html():
    def entropy(weights):
        print("<script>alert(1)</script>")
        return weights

    first, second = (check("attention.entropy", entropy) for _ in range(2))
    assert repr(first) == repr(second)
    assert first._repr_html_() == second._repr_html_()
    assert "<script>" not in first._repr_html_()
    assert "&lt;script&gt;" in first._repr_html_()


def test_a_check_takes_milliseconds():
    start = time.perf_counter()
    for exercise in ALL:
        judge(exercise, exercise.solution)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("name", "close"),
    [("attention.entropi", "attention.entropy"), ("entropy", "attention.entropy"),
     ("attention.causalmask", "attention.causal_mask"), ("zzz", "attention.rollout")],
)  # fmt: skip
def test_an_unknown_name_gets_the_closest_ones(name, close):
    for message in (check(name, right), hint(name), solution(name)):
        assert f"There is no exercise {name!r}. Known: " in repr(message)
        assert close in repr(message)
    assert check(name, right).status == "unknown"


def test_arguments_the_wrong_way_round():
    result = check(right, "attention.entropy")
    assert result.status == "unknown"
    assert 'The name comes first, in quotes: check("attention.entropy", entropy).' in result.text


def test_hints_go_from_mild_to_strong():
    for exercise in ALL:
        last = len(exercise.hints)
        assert repr(hint(exercise.name)) == repr(hint(exercise.name, 1))
        for level, words in enumerate(exercise.hints, start=1):
            text = repr(hint(exercise.name, level))
            assert text.startswith(f"Hint {level} of {last}: {words}")
            assert (f"hint('{exercise.name}', {level + 1})" in text) == (level < last)


@pytest.mark.parametrize("level", [0, 4, -1, "two", 1.5])
def test_a_hint_that_is_not_there(level):
    assert f"has the hints 1 to 3, and level = {level!r} is none." in repr(
        hint("attention.entropy", level)
    )


def test_solution_shows_the_source(monkeypatch):
    monkeypatch.delenv("ATTNLAB_SOLUTIONS", raising=False)
    shown = solution("attention.entropy")
    assert repr(shown) == inspect.getsource(right)
    assert shown._repr_markdown_() == f"```python\n{inspect.getsource(right)}```"


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no", "false"])
def test_solutions_can_be_hidden_in_class(value, monkeypatch):
    monkeypatch.setenv("ATTNLAB_SOLUTIONS", value)
    shown = repr(solution("attention.entropy"))
    assert "Solutions are hidden here" in shown
    assert "def entropy" not in shown
    assert check("attention.entropy", right).status == "correct", "checks go on working"


def test_a_script_prints_what_a_notebook_shows(capsys):
    result = check("attention.entropy", right)
    assert capsys.readouterr().out == f"{result!r}\n"
    assert "correct" in result._repr_html_()


def test_numbers_are_written_with_four_digits():
    assert show(torch.tensor([1 / 3, -0.0, math.inf, math.nan])) == (
        "float32 (4,): [0.3333, 0.0000, inf, nan]"
    )
    assert show(torch.tensor([123456.0, 1e-5])) == "float32 (2,): [1.235e+05, 1.000e-05]"
    assert show(torch.tensor([[True, False]])) == "bool (1, 2): [[True, False]]"
    assert show(torch.zeros(2, 5)) == "float32 (2, 5)"
    assert show(torch.tensor(2)) == "int64 (): 2"
    assert show([torch.zeros(3, 9)] * 4) == "list of 4: float32 (3, 9)"


def test_no_two_threads_parse_an_exercise_at_once(monkeypatch):
    inside, most = [], []
    parse = framework.ast.parse

    def slow(source):
        inside.append(source)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return parse(source)

    with monkeypatch.context() as patched, ThreadPoolExecutor(4) as pool:
        patched.setattr(framework.ast, "parse", slow)
        found = list(pool.map(lambda exercise: exercise.imports, ALL[:4]))
    assert max(most) == 1
    assert all(line.startswith(("import ", "from ")) for lines in found for line in lines)
