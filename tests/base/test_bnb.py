"""bitsandbytes neither fetches code while it is imported nor has it lost the attribute that keeps weights unpacked."""

import subprocess
import sys

import pytest

from qlora_lite.base.bnb import bitsandbytes, keep_weights_unpacked
from tests.tiny_model import NUM_LINEAR, linear4bit_layers, tiny_base

# Every CPU counts as one with AVX512-BF16: the answer is replaced as soon as the module that gives it has been run.
PRETEND = """
import importlib.abc, importlib.util, sys
class Pretend(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Pretend())
"""


def run_with_fake_kernels(tmp_path, code: str) -> tuple[bool, str]:
    """-> (the fake `kernels` package was asked for a kernel, what was printed to stderr)."""
    package = tmp_path / "kernels"
    package.mkdir()
    marker = tmp_path / "called"
    (package / "__init__.py").write_text(
        f"def get_kernel(*a, **k):\n    open({str(marker)!r}, 'w').close()\n    raise RuntimeError('called')\n"
    )
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{PRETEND}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return marker.exists(), done.stderr


@pytest.mark.slow  # a process that imports torch
@pytest.mark.parametrize(
    "module", ["qlora_lite.base.bnb", "qlora_lite.training", "qlora_lite.api"]  # the last two import peft first
)  # fmt: skip
def test_importing_this_package_never_asks_the_kernels_package_for_code(tmp_path, module):
    check = "import kernels; assert kernels.get_kernel; assert 'bitsandbytes' in sys.modules"
    called, errors = run_with_fake_kernels(tmp_path, f"import {module}\n{check}")
    assert not called
    assert errors == ""


@pytest.mark.slow
def test_a_kernels_package_that_was_imported_before_is_put_back_untouched(tmp_path):
    code = "import kernels\nmine = kernels\nimport qlora_lite.base.bnb\nimport kernels\nassert kernels is mine"
    assert run_with_fake_kernels(tmp_path, code) == (False, "")


@pytest.mark.slow
def test_importing_bitsandbytes_alone_would_ask_for_code(tmp_path):
    """Watches upstream: when this fails, the guard may go."""
    called, errors = run_with_fake_kernels(tmp_path, "import bitsandbytes")
    assert called and "kernels-community" in errors


@pytest.mark.slow
def test_importing_this_package_imports_no_compiler_and_leaves_torchs_own_in_its_place():
    code = (
        "import sys, torch; before = torch.compile; import qlora_lite.base.bnb\n"
        "assert torch.compile is before and 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_bitsandbytes_still_has_the_attribute_that_forbids_repacking():
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    assert isinstance(layer.support_avx512bf16_for_cpu, bool | int)


def test_keep_weights_unpacked_counts_and_switches_every_4_bit_layer():
    model = tiny_base().model
    for layer in linear4bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    assert keep_weights_unpacked(model) == NUM_LINEAR
    assert not any(layer.support_avx512bf16_for_cpu for layer in linear4bit_layers(model).values())
