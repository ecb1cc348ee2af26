"""The model card's example for transformers; a test runs it as it is printed."""

from __future__ import annotations

from .card_facts import Facts

PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def quick_start(facts: Facts, name: str) -> str:
    """The section, for a checkpoint whose folder has this name."""
    kind = "AutoProcessor" if any((facts.path / file).is_file() for file in PROCESSORS) else "AutoTokenizer"
    if facts.inspected.get("missing"):
        load = 'path, device_map="auto", quantization_config=vllm_hlwq.HLWQConfig(base_model="the 16-bit model")'
    else:
        load = 'path, device_map="auto"'
    return f"""## Use in transformers

```python
import vllm_hlwq  # without it, or trust_remote_code=True, transformers only warns and loads RANDOM weights
from transformers import AutoModelForCausalLM, {kind}

path = {name!r}
model = AutoModelForCausalLM.from_pretrained({load})
tokenizer = {kind}.from_pretrained(path)
inputs = tokenizer(text="The", return_tensors="pt").to(model.device)
inputs.pop("token_type_ids", None)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40))[0])
```

It needs vllm-hlwq, and accelerate for `device_map`. Weights are decoded to 16 bit while they load; with
`quantization_config=vllm_hlwq.HLWQConfig(mode="coded")` they stay coded and are decoded whenever they are used."""
