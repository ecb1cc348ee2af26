"""Writes a Hugging Face model card for a coded checkpoint: README.md with its front matter, and charts beside it.

Every figure comes from ``card_facts``; nothing is said that was not measured or counted in the checkpoint's files.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import charts
from .card_facts import SIXTEEN_BIT, ExpertMemory, Facts, gather
from .card_quick_start import quick_start
from .conversion import readable
from .writer import write_bytes, write_text

CARD = "README.md"
MARK = "<!-- Written by `hlwq card`, which overwrites it; take this line out to keep changes. -->"
# The exporter copies side files, but none that begin like this.
CHARTS = {name: f"hlwq_{name}.png" for name in ("compression", "error", "sizes")}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_FITS = {
    "norm": "the block's Euclidean norm",
    "gain": "the block's least-squares factor",
    "search": "the factor with the least squared error of several that were searched",
}


def write_card(path: Path, originals: list[str], force: bool = False) -> list[Path]:
    """Write ``README.md`` and the charts into a checkpoint's folder.

    Args:
        path: folder of an HLWQ or INT4 checkpoint.
        originals: the 16-bit model it was made from: its folder, its name on the Hugging Face hub, or both.
        force: overwrite a README.md that we did not write.

    Returns:
        The files, all written whole or not at all; the card last.

    Raises:
        CheckpointError: the checkpoint cannot be read, an original is neither, or somebody's README.md is there.
    """
    folder, hub_name = _sort_originals(originals)
    card = path / CARD
    if not force and os.path.lexists(card) and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(f"{card}: was not written by `hlwq card`; add --force to overwrite it, or move it away")
    facts = gather(path, folder)
    pictures = {
        "compression": charts.compression({name: facts.total(name) for name in facts.sizes}),
        "sizes": charts.breakdown(facts.sizes),
    }
    if facts.errors and facts.relative_mse is not None:
        pictures["error"] = charts.layer_errors(facts.errors, facts.relative_mse)
    text = render(facts, hub_name or _cached_name(folder), _license(folder))
    written = []
    for name, picture in pictures.items():
        written.append(path / CHARTS[name])
        write_bytes(written[-1], picture)
    write_text(card, text)
    return [*written, card]


def _sort_originals(originals: list[str]) -> tuple[Path | None, str | None]:
    folders = [Path(original) for original in originals if Path(original).is_dir()]
    names = [original for original in originals if not Path(original).is_dir()]
    wrong = next((name for name in names if not _HUB_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise CheckpointError(f"--original {wrong}: neither a folder nor a name like owner/model; give one of them")
    if len(folders) > 1 or len(names) > 1:
        raise CheckpointError(f"--original {originals[-1]}: the second of its kind; give one folder and one name")
    return (folders[0] if folders else None), (names[0] if names else None)


def _cached_name(folder: Path | None) -> str | None:
    """The hub's name of a model in its cache, whose folder is ``models--owner--name/snapshots/...``."""
    if folder is None:
        return None
    match = _HUB_CACHE.fullmatch(folder.resolve().parent.parent.name)
    return f"{match['owner']}/{match['name']}" if match else None


def _license(folder: Path | None) -> dict[str, Any]:
    """What the original's own card says of its license."""
    if folder is None or not (folder / CARD).is_file():
        return {}
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError  # what it reads with

    try:
        said = metadata_load(folder / CARD) or {}
    except (ValueError, YAMLError) as error:  # also what is not UTF-8
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / CARD}: its front matter cannot be read ({reason:.120}); mend it, or give --original the hub's "
            "name alone"
        ) from None
    return {key: said[key] for key in ("license", "license_name", "license_link") if key in said}


def render(facts: Facts, base_model: str | None = None, license: dict[str, Any] | None = None) -> str:
    """The card's text."""
    name = facts.path.resolve().name
    hlwq = facts.own_format.startswith("HLWQ")
    sections = [
        f"# {name}",
        _introduction(facts, base_model),
        *([quick_start(facts, name)] if hlwq else []),
        _commands(facts, name),
        "## What is coded, and how\n\n" + (_hlwq_method(facts) if hlwq else _int4_method(facts)),
        "## Error\n\n" + _error(facts),
        "## Size\n\n" + _size(facts),
    ]
    if facts.memory is not None:
        sections.append("## GPU memory\n\n" + _memory(facts.memory))
    sections.append("## Limits\n\n" + _limits(facts))
    return _front_matter(facts, base_model, license or {}) + MARK + "\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts, base_model: str | None, license: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    hlwq = facts.own_format.startswith("HLWQ")
    tags = ["hlwq", *(f"{bits}-bit" for bits in facts.inspected["bits"])] if hlwq else ["compressed-tensors", "int4"]
    known: dict[str, Any] = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    data = ModelCardData(
        **known,
        **license,
        library_name="vllm-hlwq" if hlwq else "vllm",
        pipeline_tag="text-generation",
        tags=[*tags, "quantized", *(["moe"] if facts.memory else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _introduction(facts: Facts, base_model: str | None) -> str:
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a 16-bit model"
    ratio = facts.total(SIXTEEN_BIT) / facts.total(facts.own_format)
    return (
        f"The weights of {of} as {facts.own_format}: {readable(facts.total(facts.own_format))} in place of "
        f"{readable(facts.total(SIXTEEN_BIT))}, {ratio:.2f} times smaller.\n\n"
        f"![Weights by format]({CHARTS['compression']})"
    )


def default_slots(memory: ExpertMemory) -> int:
    """Experts a layer for the command: an eighth of them."""
    return max(1, memory.experts // 8)


def _commands(facts: Facts, name: str) -> str:
    serve = "vllm serve {} --moe-expert-cache-size {}"
    if not facts.own_format.startswith("HLWQ"):
        slots = f" --moe-expert-cache-size {default_slots(facts.memory)}" if facts.memory else ""
        return f"## Serve\n\n```bash\nvllm serve {shlex.quote(name)}{slots}\n```\n\n" + _about_slots(facts)
    if facts.memory is None:
        plain = shlex.quote(f"{name}-BF16")
        return (
            f"## Use\n\n`hlwq export` makes no INT4 sibling of it: {facts.no_export}. Back to 16 bit:\n\n"
            f"```bash\nhlwq dequantize {shlex.quote(name)} {plain}\nvllm serve {plain}\n```"
        )
    sibling = shlex.quote(f"{name}-CT")
    group = f" --group-size {facts.group_size}" if facts.group_size else ""
    return (
        "## Serve\n\nvLLM serves the INT4 sibling, which is made once, on any machine:\n\n"
        f"```bash\nhlwq export {shlex.quote(name)} {sibling} --format compressed-tensors{group}\n"
        f"{serve.format(sibling, default_slots(facts.memory))}\n```\n\n" + _about_slots(facts)
    )


def _about_slots(facts: Facts) -> str:
    if facts.memory is None:
        return "Stock vLLM serves it."
    return (
        f"`--moe-expert-cache-size` is how many of a layer's {facts.memory.experts} experts stay on the GPU "
        "(it needs vllm-hlwq; without the flag, stock vLLM serves the same folder with all of them there)."
    )


def _hlwq_method(facts: Facts) -> str:
    found, own = facts.inspected, facts.own
    levels = found["levels"] or []
    bits, size = found["bits"][0], found["block_size"]
    coded = [p for p in found["parameters"] if p["stored"].startswith("Q")]
    kept = len(found["parameters"]) - len(coded)
    table = f"codebook {own.codebook}, stored in the file" if own else f"codebook: {found['codebook']}"
    half = " ".join(f"{level:.6f}" for level in levels[len(levels) // 2 :])
    fit = f" ({_FITS[own.fit]})" if own and own.fit in _FITS else ""
    rows = [
        ("parameters", f"{len(coded)} coded, {kept} kept as they are"),
        ("bits a code", f"{bits}, packed most significant bit first"),
        ("block", f"{size} weights of a row, the last of a row padded with zeros"),
        ("rotation", f"Hadamard matrix in natural (Sylvester) order, {size} x {size}, no sign flips"),
        ("scale", f"one float16 a block{fit}"),
        ("bits a weight", f"{bits + 16 / size:.3f} before padding"),
        ("levels", f"{len(levels)}, {table}"),
    ]
    text = "| | |\n|---|---|\n" + "".join(f"| {what} | {value} |\n" for what, value in rows)
    if levels:
        text += f"\nThe levels are symmetric about zero; the positive ones:\n\n```text\n{half}\n```\n"
    text += (
        "\nA weight is decoded as `((levels[code] / sqrt(block)) @ H) * scale`, with the codes of a block, the "
        "Hadamard matrix H of ones and minus ones divided by sqrt(block), and the block's scale."
    )
    if own and own.kept:
        reasons = sorted({reason.replace("_", " ") for reason in own.kept.values()})
        text += f"\n\nKept as they are: {', '.join(reasons)}."
    return text


def _int4_method(facts: Facts) -> str:
    size = f"{facts.group_size} inputs" if facts.group_size else "a whole row"
    return (
        f"compressed-tensors `pack-quantized`: 4-bit integers, one 16-bit scale for {size}. What is not "
        "listed as INT4 below is kept in 16 bit and named in `ignore` of `config.json`."
    )


def _error(facts: Facts) -> str:
    if facts.relative_mse is None:
        return "Not measured: the original was not at hand when this card was written (`hlwq card --original`)."
    source = "when it was coded" if facts.own else "against the original"
    rows = "".join(
        f"| {'none' if e.layer is None else e.layer} | {e.kind} | {e.weights:,} | {e.relative_mse:.6f} |\n"
        for e in facts.errors
    )
    return (
        f"Relative mean squared error of all weights that coding changed: **{facts.relative_mse:.6f}**, measured "
        f"{source}. That of a layer is the mean of its parameters', by their number of weights.\n\n"
        f"![Error by layer]({CHARTS['error']})\n\n"
        "<details><summary>By layer</summary>\n\n"
        f"| layer | | weights | relative mean squared error |\n|---|---|---|---|\n{rows}\n</details>"
    )


def _size(facts: Facts) -> str:
    own = facts.total(facts.own_format)
    rows = "".join(
        f"| {part.kind} | {part.stored} | {part.weights:,} | {readable(part.bytes)} | {part.bytes / own:.1%} |\n"
        for part in facts.sizes[facts.own_format]
    )
    totals = "".join(
        f"| {name} | {readable(facts.total(name))} | {facts.total(SIXTEEN_BIT) / facts.total(name):.2f} |\n"
        for name in facts.sizes
    )
    planned = "" if facts.memory is None or not facts.own_format.startswith("HLWQ") else (
        " The INT4 sibling's size is computed from its tensors' shapes."
    )  # fmt: skip
    return (
        f"![Bytes by kind]({CHARTS['sizes']})\n\n"
        f"| | stored as | weights | size | share |\n|---|---|---|---|---|\n{rows}\n"
        f"| format | size | times smaller |\n|---|---|---|\n{totals}\n"
        f"Sizes are of tensors, 1 GB = 10^9 bytes.{planned}"
    )


def binary(count: int) -> str:
    """Bytes of memory for people: ``3.16 GiB``, ``0.22 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _memory(memory: ExpertMemory) -> str:
    slot = sum(memory.slot_bytes)
    rows = "".join(
        f"| {n} | {n / memory.experts:.1%} | {binary(n * slot)} | {binary(memory.device_bytes(n))} |\n"
        for n in memory.choices()
    )
    return (
        f"What the INT4 weights take on the GPU, by `--moe-expert-cache-size`: one expert of each of "
        f"{len(memory.slot_bytes)} layers is {binary(slot)}, and all that is no expert, "
        f"{binary(memory.resident_bytes)}, is always there. All {memory.experts} experts wait in host memory, "
        f"{binary(memory.host_bytes)}.\n\n"
        f"| experts a layer | of all | slots | weights on the GPU |\n|---|---|---|---|\n{rows}\n"
        "Not counted: the KV cache, which grows with context and requests; activations; the staging banks of the "
        "expert cache; CUDA's own memory and vLLM's CUDA graphs. 1 GiB = 2^30 bytes."
    )


def _limits(facts: Facts) -> str:
    lines = []
    if facts.own_format.startswith("HLWQ"):
        lines.append("vLLM does not read HLWQ itself: export it first.")
        if facts.memory is not None:
            lines.append("The INT4 sibling rounds the decoded weights again; its error comes on top of the one above.")
    lines.append("The error is that of the weights. No benchmark of the model's answers is part of this card.")
    if facts.inspected.get("missing"):
        count = len(facts.inspected["missing"])
        lines.append(f"{count} parameters of the model are not in this folder and come from the original.")
    return "\n".join(f"- {line}" for line in lines)
