"""What ``import vllm_hlwq`` costs and does, each in a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MODEL = PROJECT / "examples/tiny_moe/model"
IMPORT_SECONDS = 0.3
LOAD = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(MODEL)!r}OPTIONS)
import torch
print(float(model(torch.arange(12)[None]).logits.float().norm()))
"""


def run(code: str, **environment: str) -> str:
    search = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    variables = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_is_cheap_and_imports_no_framework() -> None:
    code = "import sys, time; start = time.perf_counter(); import vllm_hlwq; print(time.perf_counter() - start); "
    code += (
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'vllm', 'numba'}))"
    )
    outputs = [run(code).splitlines() for _ in range(5)]
    assert min(float(seconds) for seconds, _ in outputs) < IMPORT_SECONDS
    assert {modules for _, modules in outputs} == {"[]"}


@pytest.fixture(scope="module")
def wanted() -> str:
    return run("import vllm_hlwq" + LOAD.replace("OPTIONS", ""))


@pytest.mark.parametrize(
    "code",
    [
        "import transformers.quantizers.auto\nimport vllm_hlwq" + LOAD,
        "import vllm_hlwq\nimport vllm_hlwq.hf.registration as r\nr.register_on_import()" + LOAD,
        "import vllm_hlwq.hf.registration as r\nr.register()\nr.register()\nr.register_on_import()" + LOAD,
        "from vllm_hlwq import HLWQConfig" + LOAD,
        "from transformers import AutoModelForCausalLM\nimport vllm_hlwq" + LOAD,
    ],
    ids=["after", "twice before", "twice after", "from import", "lazily after"],
)
def test_any_order_of_imports_registers(code: str, wanted: str) -> None:
    assert run(code.replace("OPTIONS", "")) == wanted


def test_the_checkpoints_own_file_registers(wanted: str, tmp_path: Path) -> None:
    """Without an import of ours anywhere."""
    code = LOAD.replace("OPTIONS", ", trust_remote_code=True")
    assert run(code, HF_MODULES_CACHE=str(tmp_path)) == wanted
    assert (MODEL / "hlwq_auto.py").read_text() == (PROJECT / "vllm_hlwq/hf/hlwq_auto.py").read_text()


@pytest.mark.parametrize("mode", ["decode", "coded"])
def test_transformers_alone_imports_no_vllm(mode: str) -> None:
    code = "import sys, vllm_hlwq" + LOAD.replace(
        "OPTIONS", f", quantization_config=vllm_hlwq.HLWQConfig(mode={mode!r})"
    )
    assert run(code + "print('vllm' in sys.modules)").splitlines()[-1] == "False"


def test_the_waiting_finder_is_gone_when_it_has_done_its_work() -> None:
    code = (
        "import sys, vllm_hlwq\nfrom vllm_hlwq.hf.registration import _Waiting\n"
        "count = lambda: sum(isinstance(finder, _Waiting) for finder in sys.meta_path)\n"
        "before = count()\nimport transformers.quantizers.auto as auto\n"
        "print(before, count(), auto.AUTO_QUANTIZER_MAPPING['polar'].__name__, auto.__spec__.loader.__class__.__name__)"
    )
    assert run(code) == "1 0 HLWQHfQuantizer SourceFileLoader"


def test_transformers_can_be_imported_where_registering_fails() -> None:
    code = """
import warnings
import vllm_hlwq.hf.registration as registration

def fail():
    raise ImportError("HfQuantizer has moved")

registration.register = fail
with warnings.catch_warnings(record=True) as caught:
    import transformers.quantizers.auto
print([str(warning.message) for warning in caught])
"""
    assert "HfQuantizer has moved" in run(code)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import vllm_hlwq

    with pytest.raises(AttributeError, match="no attribute 'HLWQCatalogue'"):
        vllm_hlwq.HLWQCatalogue  # noqa: B018


def test_a_transformers_that_loads_otherwise_is_refused_and_not_misread() -> None:
    """As from 5.21 on, without the hook that a quantizer is first called by; vLLM allows no such version yet."""
    code = (
        "from transformers.quantizers.base import HfQuantizer\ndel HfQuantizer.update_tp_plan\nimport vllm_hlwq\n"
        "from transformers import AutoModelForCausalLM, __version__\n"
        f"try:\n    AutoModelForCausalLM.from_pretrained({str(MODEL)!r})\n"
        "except vllm_hlwq.errors.CheckpointError as error:\n    print(str(error).replace(__version__, 'X'))"
    )
    assert run(code) == (
        "transformers X loads models in a way that vllm-hlwq does not know; "
        "pip install 'transformers>=5.16.1,<5.20', or use `hlwq dequantize`"
    )
