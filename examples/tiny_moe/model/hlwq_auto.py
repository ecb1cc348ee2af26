"""Lies beside HLWQ weights, so that transformers finds vllm-hlwq by itself under ``trust_remote_code=True``.

transformers asks a checkpoint's own code for the configuration before it looks at how the weights are quantised; the
import here is in time. The configuration itself is the one that transformers has for the model.
"""

from typing import Any

from transformers import AutoConfig

import vllm_hlwq  # noqa: F401 - registers HLWQ with transformers


class HLWQAutoConfig:
    """Stands where transformers expects a configuration class."""

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """Nothing of this checkpoint's own is to be saved with models that are made from it."""

    @staticmethod
    def from_pretrained(path: Any, **kwargs: Any) -> Any:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **kwargs)
