"""What every test shares: the device, and the optional parts of a machine."""

import os
import shutil

import pytest
import torch

os.environ["ATTNLAB_PROGRESS"] = "off"  # tests write into no learner's file

# Two cores run the suite; more threads than that slow small tensors down.
torch.set_num_threads(min(2, os.cpu_count() or 1))

PARTS = {
    "browser": lambda: shutil.which("chromium") or shutil.which("google-chrome"),
    "compiler": lambda: shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "needs(part): needs an optional part of the machine: browser, compiler"
    )


def pytest_runtest_setup(item):
    """Skip with the reason, or fail where `ATTNLAB_REQUIRE` says that the part must be there."""
    required = [part for part in os.environ.get("ATTNLAB_REQUIRE", "").split(",") if part]
    for marker in item.iter_markers("needs"):
        (part,) = marker.args
        if PARTS[part]():
            continue
        if part in required:
            pytest.fail(f"ATTNLAB_REQUIRE asks for a {part}, and this machine has none")
        pytest.skip(f"this machine has no {part}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA device"))])  # fmt: skip
def device(request) -> torch.device:
    """Each test that takes it runs on the CPU, and on CUDA where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """For modules of small tensors: two threads gain nothing, and fight where cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
