"""What `import attnlab` loads, in an interpreter of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_loads_no_notebook_and_no_plotting():
    loaded = python("""
import sys
import torch, timm
before = set(sys.modules)
import attnlab
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*(name for name in sys.modules if name.startswith("attnlab.")))
""")
    added, ours = (line.split() for line in loaded.splitlines())
    assert set(added) <= {"attnlab", "einops"}, f"import attnlab loads {added}"
    assert not [name for name in ours if name.startswith("attnlab.lab")]


def test_registration_takes_no_name_of_timm():
    """A warning of timm about a name that is taken is an error here."""
    printed = python("""
import timm
before = set(timm.list_models())
import attnlab
print(*sorted(set(timm.list_models()) - before))
print(len(before - set(timm.list_models())), attnlab.__version__)
""")
    added, rest = printed.splitlines()
    ours = """cbam_resnet101 cbam_resnet18 cbam_resnet34 cbam_resnet50 cbam_resnet_mini
    deit_base deit_small deit_tiny dependencyvit_lite_small dependencyvit_lite_tiny
    dependencyvit_mini dependencyvit_small dependencyvit_tiny patchconvnet_b120 patchconvnet_b60
    patchconvnet_l120 patchconvnet_l60 patchconvnet_mini patchconvnet_s120 patchconvnet_s60
    patchconvnet_s60_multi resnet_mini se_resnet50 se_resnet_mini sknet50 spformer_base_patch16
    spformer_base_patch16_convstem spformer_mini spformer_small_patch16
    spformer_small_patch16_convstem spformer_small_patch32 spformer_small_patch32_convstem
    spformer_small_patch56 spformer_small_patch56_convstem spformer_tiny_patch16
    spformer_tiny_patch16_convstem vit_mini"""
    assert added.split() == ours.split()
    removed, version = rest.split()
    assert removed == "0"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
