"""The text of the Metal kernels, as MLX takes it and as a file of its own."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from kernel_cases import KERNEL_FILES, on_gpu, plain_clusters
from mlx_flashhead.head.kernels import header, part
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.row_products import NAME as ROW_PRODUCTS

STANDALONE = KERNEL_FILES.with_suffix(".metal")
XCODE = (
    shutil.which("xcrun")
    and not subprocess.run(
        ["xcrun", "-sdk", "macosx", "metal", "--version"], capture_output=True
    ).returncode
)
# Text of the file, what stands in its place, and what Apple's compiler says of it.
MISTAKES = [
    ("scores, n_hidden, group,", "scores, group,", "no matching function"),
    ("[[thread_index_in_simdgroup]]", "[[thread_in_simdgroup]]", "'thread_in_simdgroup'"),
    ("device float* scores [[", "float* scores [[", "no matching function"),
    ("// kernel   grid", "threadgroup float s[4];\n// kernel   grid", "in the body of a kernel"),
]


@pytest.mark.skipif(on_gpu(), reason="the emulator's compiler")
def test_the_file_compiles_by_itself(tmp_path):
    from metal_emulator import KernelFault, check_standalone

    check_standalone(STANDALONE)
    broken = tmp_path / STANDALONE.name
    shutil.copytree(KERNEL_FILES, tmp_path / KERNEL_FILES.name)
    text = STANDALONE.read_text()
    for right, wrong, said in MISTAKES:
        assert right in text
        broken.write_text(text.replace(right, wrong))
        with pytest.raises(KernelFault, match=said):
            check_standalone(broken)


@pytest.mark.skipif(not XCODE, reason="no Metal compiler: that takes a Mac with Xcode")
def test_the_file_compiles_with_apples_compiler(tmp_path):
    made = tmp_path / "flash_head.air"
    for sdk in ("macosx", "iphoneos"):
        command = ["xcrun", "-sdk", sdk, "metal", "-fno-fast-math", "-c", STANDALONE, "-o", made]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert made.stat().st_size > 0


def test_the_file_has_every_kernel_that_python_makes():
    """The same names, in each of its heads."""
    names = []

    def metal_kernel(*, name, **_):
        names.append(name)

    MetalOperations(plain_clusters(np.random.default_rng(0), 8, 4), metal_kernel)
    text = STANDALONE.read_text()
    kernels = set(re.findall(r"\bvoid (flash_head_\w+)\(", text))
    assert kernels == {*names, f"flash_head_{ROW_PRODUCTS}"}
    hosted = set(
        re.findall(r'FLASH_HEAD_KERNEL\(\w+, "(\w+)"', text.replace('"softcap_30"', "map"))
    )
    assert hosted - {"flash_head_screen_masked"} == kernels


def test_parts_are_ascii_include_nothing_and_are_all_in_the_file():
    """MLX and Swift hand them to the compiler as ASCII, and that knows no folder of ours."""
    included = re.findall(r'^#include "flash_head/(\w+)\.h"$', STANDALONE.read_text(), re.M)
    names = sorted(file.stem for file in KERNEL_FILES.iterdir())
    assert sorted(included) == names
    for name in names:
        assert part(name).isascii() and "#include" not in part(name), name
    with pytest.raises(FileNotFoundError, match=r"flash_head/sort\.h"):
        part("sort")
    # a kernel gets those it needs, without comments
    text = header("histogram", "sample")
    assert "noise_of" in text and "to_finite" in text and "ROW_THREADS" in text
    assert "select_probes" not in text and "//" not in text
    assert all(line == line.strip() != "" for line in text.splitlines())
