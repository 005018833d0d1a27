"""The benchmark suite: forms and peers compute the same, what it says of numbers, its files."""

import json
import math
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from attnlab import cli
from attnlab.lab import bench, bench_measure, bench_report
from attnlab.lab.bench_report import BEGIN, END
from attnlab.lab.bench_rows import ROWS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPARABLE = [n for n, row in ROWS.items() if len(row.forms) > 1 or (row.peers and row.same)]
MODELS = [name for name in COMPARABLE if ROWS[name].theory is None]
MECHANISMS = [name for name in COMPARABLE if name not in MODELS]

pytestmark = pytest.mark.usefixtures("one_thread")


# Rows


def outputs(name: str, size: int, form: str, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        function, inputs, module = ROWS[name].make(size, form)
    if module is not None:
        module.eval()
    with torch.no_grad():
        out = function(*inputs)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def check_forms(name: str, size: int, device: torch.device) -> None:
    row = ROWS[name]
    expected = outputs(name, size, "auto", device)
    for form in (*row.forms[:-1], *(row.peers if row.same else ())):
        got = outputs(name, size, form, device)
        for a, b in zip(got, expected, strict=True):
            assert ((a - b).abs().max() / b.abs().max()).item() < 1e-4, form


@pytest.mark.parametrize("name", MECHANISMS)
def test_forms_and_peers_of_a_mechanism_compute_the_same(name, device):
    check_forms(name, {"cgnl": 16, "dilated": 196}.get(name, 64), device)


@pytest.mark.parametrize("name", MODELS)
def test_forms_and_peers_of_a_model_compute_the_same(name, device):
    check_forms(name, 32 if name.endswith("50") else 64, device)


def test_a_form_that_computed_something_else_would_be_seen(device, monkeypatch):
    row = ROWS["warp"]

    def wrong(size, form):
        case = row.make(size, form)
        other = lambda features, flow: case.function(features, -flow)  # noqa: E731
        return case._replace(function=other) if form == "torch" else case

    monkeypatch.setitem(ROWS, "warp", row._replace(make=wrong))
    with pytest.raises(AssertionError, match="torch"):
        check_forms("warp", 64, device)


def test_rows_are_complete():
    assert set(ROWS) - set(COMPARABLE) == {"cgnl-block", "slic"}  # beside others' computations
    for name, row in ROWS.items():
        assert row.forms[-1] == "auto", name
        assert list(row.sizes) == sorted(set(row.sizes)), name
        assert set(row.most) <= {*row.forms, *row.peers} - {"auto"}, name
        assert not row.backward or row.theory, name
        if "explicit" in row.forms:  # peaks of memory, the first of which is that of a small size
            assert row.sizes[0] < min(row.sizes[-1], row.most.get("explicit", math.inf)), name
        if row.bare and row.theory:  # growth can be told
            assert sum(size >= bench_report.GROWTH_FROM for size in row.sizes) >= 2, name


# What the numbers say


def made_up(**changes) -> dict:
    """Results of two rows that meet every target: attention, and SE beside timm's."""
    times = []
    for mode, factor in zip(bench_report.MODES, (1.0, 3.0), strict=True):
        for N in (256, 1024, 4096):
            fast = factor * 1e-9 * N**2
            taken = {"explicit": 4 * fast, "blockwise": 2 * fast, "fused": fast, "auto": fast}
            times.append({"row": "attention", "mode": mode, "size": N, "calls": {}, "load": 0.1,
                          "median": taken, "min": dict(taken)})  # fmt: skip
            taken = {"auto": factor * 1e-7 * N, "timm": factor * 1.25e-7 * N}
            times.append({"row": "se", "mode": mode, "size": N, "calls": {}, "load": None,
                          "median": taken, "min": dict(taken)})  # fmt: skip
    results = {
        "machine": {"name": "m", "cpu": "A CPU", "threads": 2, "device": "cpu", "torch": "2.9"},
        "options": {"device": "cpu", "dtype": "float32", "compile": False, "quick": False},
        "times": times,
        "memory": [{"row": "attention", "size": 4096,
                    "bytes": {"explicit": 2**28, "auto": 2**23}}],
        "errors": {},
    }  # fmt: skip
    return results | changes


def change(results: dict, name: str, form: str, factor: float, *, of=("median", "min"), size=None):
    for record in results["times"]:
        if record["row"] == name and size in (None, record["size"]):
            for key in of:
                record[key][form] *= factor


def not_met(results: dict) -> list[list[str]]:
    return [check.not_met for check in bench_report.checks(results)]


def test_targets_that_are_met():
    checks = bench_report.checks(made_up())
    assert [check.compared for check in checks] == [2 * 3 * 3, 1, 1, 4]
    assert [check.not_met + check.explained for check in checks] == [[]] * 4
    lines = bench_report.verdict(made_up()).splitlines()
    assert lines[0] == "- auto is no more than 5 % slower than any other form: 18 of 18"


def test_auto_slower_than_another_form():
    results = made_up()
    change(results, "attention", "fused", 0.9, size=1024)
    slower = not_met(results)[0]
    assert slower == [f"attention, {mode}, N = 1,024: 1.11 of fused" for mode in bench_report.MODES]
    assert "16 of 18. Not met: attention" in bench_report.verdict(results)

    within = made_up()
    change(within, "attention", "fused", 0.96)
    assert not_met(within)[0] == []
    one_slow_moment = made_up()
    change(one_slow_moment, "attention", "fused", 0.5, of=("median",))
    assert not_met(one_slow_moment)[0] == []


@pytest.mark.parametrize(("auto", "missed"), [
    (2**28, []), (int(1.04 * 2**28), []), (2**29, ["attention, N = 4,096: 2.00 of explicit"]),
])  # fmt: skip
def test_auto_larger_than_explicit(auto, missed):
    results = made_up()
    results["memory"][0]["bytes"]["auto"] = auto
    assert not_met(results)[1] == missed


def test_peaks_of_small_calls_are_no_news():
    results = made_up()
    results["memory"][0]["bytes"] |= {"explicit": 0, "auto": 2**20}
    assert not_met(results)[1] == []
    results["memory"][0]["bytes"]["auto"] += 1
    assert len(not_met(results)[1]) == 1


def test_slower_than_a_peer_and_why(monkeypatch):
    results = made_up()
    change(results, "se", "timm", 0.5)
    assert not_met(results)[2] == ["se: 1.60 of timm"]
    monkeypatch.setitem(ROWS, "se", ROWS["se"]._replace(why="theirs has no mean"))
    check = bench_report.checks(results)[2]
    assert (check.not_met, check.explained) == ([], ["se: 1.60 of timm (theirs has no mean)"])
    assert "0 of 1. Explained: se: 1.60" in bench_report.verdict(results)
    change(results, "se", "timm", 1.595)  # 1.003: 1.00 as it is printed
    assert bench_report.checks(results)[2].explained == []


def test_growth_off_theory():
    results = made_up()
    for record in results["times"]:
        if record["row"] == "attention" and record["mode"] == "forward":
            record["median"]["auto"] *= record["size"] ** 0.3
    assert not_met(results)[3] == ["attention, forward: 2.30, theory 2"]


def test_growth_is_fitted_from_1024_tokens_on():
    results = made_up()
    change(results, "attention", "auto", 100, size=256)
    assert math.isclose(bench_report.exponent(results, "attention", "forward"), 2)
    results["times"] = [r for r in results["times"] if r["size"] != 4096]
    assert bench_report.exponent(results, "attention", "forward") is None


def test_the_table_has_ratios():
    lines = bench_report.summary(made_up()).splitlines()
    assert len(lines) == 4
    attention, se = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert attention == ["attention", "4,096", "4.0×", "4.0×", "0.031", "", "2.00", "2.00", "2"]
    assert se == ["se", "", "", "", "", "timm 0.80", "1.00", "1.00", "1"]
    grid = bench_report.grid(made_up())
    assert "| se | 256 | forward | timm 1.25× |" in grid
    assert "explicit 4.00×, blockwise 2.00×, fused 1.00× |" in grid


def test_a_row_that_failed_is_named():
    results = made_up(errors={"slic": "No module named 'skimage'"})
    assert bench_report.verdict(results).endswith("- slic failed: No module named 'skimage'")


# README


def with_file(folder: Path, results: dict, name: str = "suite-m.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(results))
    return folder


def test_readme_gets_the_tables_of_every_machine_and_keeps_the_rest(tmp_path):
    folder = with_file(tmp_path / "results", made_up())
    with_file(folder, made_up(), "suite-n-cuda.json")
    (folder / "attention-m.json").write_text("{}")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    bench_report.update_readme(readme, folder)
    text = readme.read_text()
    assert text == f"before\n{BEGIN}\n\n{bench_report.section(folder)}\n\n{END}\nafter\n"
    for part in ("suite-m.json", "suite-n-cuda.json", "A CPU, 2 threads, PyTorch 2.9, float32"):
        assert part in text
    bench_report.update_readme(readme, folder)
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}", f"{BEGIN}{END}{BEGIN}"])
def test_a_readme_without_the_two_markers(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="<!-- benchmarks:end -->, once each"):
        bench_report.update_readme(tmp_path / "README.md", with_file(tmp_path / "r", made_up()))


def test_a_folder_without_results(tmp_path):
    (tmp_path / "README.md").write_text(BEGIN + END)
    with pytest.raises(ValueError, match="run `attnlab bench`"):
        bench_report.update_readme(tmp_path / "README.md", tmp_path)


def in_readme(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def test_readme_holds_what_the_committed_results_say(tmp_path):
    """Where no machine was measured, there are no markers, and the section is empty too."""
    section = bench_report.section(RESULTS)
    assert in_readme((ROOT / "README.md").read_text(encoding="utf-8")) == section
    for path in RESULTS.glob("suite-*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        change(results, "attention", "explicit", 2)
        assert bench_report.section(with_file(tmp_path / path.stem, results)) not in section


# Measuring


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds of a clock that only steps move."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(bench_measure, "time", clock)
    return now


def test_steps_take_turns(clock):
    calls = []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    steps = {name: partial(step, name, duration) for duration, name in enumerate("abc", start=1)}
    times = bench_measure.take_turns(steps, least=4)
    assert times == {"a": [1] * 4, "b": [2] * 4, "c": [3] * 4}
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]  # the first is not counted
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert len(bench_measure.take_turns(steps, least=1, budget=13)["a"]) == 3  # 6 seconds a round


def test_the_first_call_of_several_in_a_turn_is_not_counted(clock):
    def step(durations: list[float]) -> None:
        clock[0] += durations.pop(0)

    cold_and_warm = [9, 3, 1, 1, 3, 1, 1]  # a round before the first, then two turns
    steps = {"slow": partial(step, [7, 6, 6]), "fast": partial(step, cold_and_warm)}
    times = bench_measure.take_turns(steps, least=2, row=4.5)
    assert times == {"slow": [6, 6], "fast": [1, 1, 1, 1]}


def test_memory_is_that_of_a_fresh_process(device):
    if device.type == "cuda":
        pytest.skip("the suite's quick run measures it there")
    place = ("cpu", 1, ("attention", 16, "explicit", False, "cpu", "float32", False))
    scores = 4 * 1024**2 * 4  # four heads, float32
    taken = bench_measure.alone(
        bench_measure.extra_memory, bench.make_step, *place,
        "attention", 1024, "explicit", False, "cpu", "float32", False,
    )  # fmt: skip
    assert scores < taken < 4 * scores


def test_a_quick_run_of_two_rows(device, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["bench", "--quick", "--only", "warp", "cgnl", "--device", device.type]
    assert cli.main([*words, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["command"] == f"attnlab {' '.join(words)} --out {out}"
    assert [(r["row"], r["mode"], r["size"]) for r in results["times"]] == [
        (name, mode, size) for name, size in (("warp", 256), ("cgnl", 16))
        for mode in bench_report.MODES
    ]  # fmt: skip
    record = results["times"][0]
    assert set(record["median"]) == set(record["min"]) == {"auto", "torch"}
    assert record["calls"] == {"auto": 2, "torch": 2}
    assert 0 < record["min"]["auto"] <= record["median"]["auto"]
    assert results["errors"] == {}
    assert [check["compared"] for check in results["checks"]] == [2 * 2, 0, 1, 0]
    printed = capsys.readouterr().out
    assert bench_report.summary(results) in printed
    assert bench_report.verdict(results) in printed


def test_bfloat16(device):
    for name in ("se", "superpixel", "reversed"):
        for form in bench.fitting(name, 64):
            bench.make_step(name, 64, form, True, device.type, "bfloat16", False)()


@pytest.mark.needs("compiler")
def test_compiled(device):
    bench.make_step("se", 16, "auto", False, device.type, "float32", True)()


def test_a_row_that_cannot_be_run_does_not_stop_the_others(monkeypatch):
    def broken(size, form):
        raise RuntimeError("out of memory\ntried to allocate")

    monkeypatch.setitem(ROWS, "se", ROWS["se"]._replace(make=broken))
    results = bench.run(["se", "warp"], quick=True)
    assert results["errors"] == {"se": "out of memory"}
    assert bench_report.measured(results) == ["warp"]


def test_forms_that_have_no_room_are_left_out():
    assert bench.fitting("window", 4096) == ["explicit", "blocks", "auto"]
    assert bench.fitting("window", 16384) == ["blocks", "auto"]


@pytest.mark.parametrize(("compiled", "quick", "sizes"), [
    (False, False, [256, 1024, 4096, 16384]), (False, True, [256]),
    (True, False, [4096]), (True, True, [256]),
])  # fmt: skip
def test_compiled_at_one_size_and_quick_at_the_smallest(compiled, quick, sizes):
    assert list(bench.sizes_of(ROWS["window"], compiled, quick)) == sizes


def test_the_file_is_named_by_machine_and_options():
    assert bench.default_file("m", "cpu", "float32", False) == RESULTS / "suite-m.json"
    name = bench.default_file("m", "cuda", "bfloat16", True).name
    assert name == "suite-m-cuda-bf16-compile.json"


def test_results_of_an_installed_package_go_to_this_folder(monkeypatch):
    monkeypatch.setattr(bench, "repo_root", lambda: None)
    assert bench.default_file("m", "cpu", "float32", False) == Path("suite-m.json")


@pytest.mark.parametrize(("words", "message"), [
    (["--only", "attentoin"], "only='attentoin': expected one of attention, multi-head"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    (["--quik"], "unrecognized arguments: --quik"),
])  # fmt: skip
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *words])
    assert message in capsys.readouterr().err


def test_no_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--device", "cuda"])
    assert "device='cuda': expected cpu: PyTorch finds no CUDA device" in capsys.readouterr().err


def test_readme_of_an_installed_package(capsys, monkeypatch):
    monkeypatch.setattr(bench, "repo_root", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--readme"])
    assert "expected a checkout" in capsys.readouterr().err
