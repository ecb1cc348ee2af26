"""The model card: its figures against the files, its pictures against its figures, its commands as a user runs them."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from pathlib import Path

import checkpoints
import matplotlib.image
import numpy as np
import pytest
from click.testing import Result
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

from vllm_hlwq.checkpoint.card_facts import KINDS, ExpertMemory, gather, kind_of
from vllm_hlwq.checkpoint.charts import COLOURS
from vllm_hlwq.checkpoint.conversion import readable
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.verify import verify
from vllm_hlwq.cli import app
from vllm_hlwq.options import flag

NAME = "Tiny MoE Q5"
"""With spaces, which commands must quote."""


def card(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = card(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    return result.stderr


def tensor_bytes(folder: Path, pattern: str = "") -> int:
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return sum(tensor.nbytes for name, tensor in tensors.items() if re.search(pattern, name))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "source"
    checkpoints.write(checkpoints.gemma4_config(), out, varied=True)
    (out / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: https://example.org\n---\n# The original\n")
    return out


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    out = source.with_name(NAME)
    quantize(source, out, fit="gain")
    result = card(out, "--original", source, "--original", "owner/tiny-moe")
    files = ["hlwq_compression.png", "hlwq_sizes.png", "hlwq_error.png", "README.md"]
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [str(out / file) for file in files]
    return out


@pytest.fixture(scope="module")
def text(coded: Path) -> str:
    return (coded / "README.md").read_text()


@pytest.fixture(scope="module")
def sibling(coded: Path, text: str, source: Path) -> Path:
    """Made by the card's own command."""
    command = next(line for line in text.splitlines() if line.startswith("hlwq export"))
    arguments = shlex.split(command)[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(coded.parent)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return coded.parent / arguments[2]


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first line begins with a heading."""
    lines = text[text.index(f"\n{heading}") + 1 :].splitlines()
    rows = lines[2 : next(index for index, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_front_matter(coded: Path) -> None:
    assert metadata_load(coded / "README.md") == {
        "base_model": "owner/tiny-moe",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "license_link": "https://example.org",
        "library_name": "vllm-hlwq",
        "pipeline_tag": "text-generation",
        "tags": ["hlwq", "5-bit", "quantized", "moe"],
    }


def test_sizes_are_those_of_the_files(text: str, source: Path, coded: Path, sibling: Path) -> None:
    parts = {"16 bit": source, "HLWQ Q5": coded, "INT4 g64": sibling}
    sizes = {name: tensor_bytes(folder, r"^(?!hlwq\.codebook)") for name, folder in parts.items()}
    expected = [[name, readable(size), f"{sizes['16 bit'] / size:.2f}"] for name, size in sizes.items()]
    assert table(text, "| format | size") == expected
    rows = {kind: (stored, size) for kind, stored, _, size, _ in table(text, "| | stored as")}
    assert rows["experts"] == ("Q5", readable(tensor_bytes(coded, r"experts\.")))
    assert rows["attention"] == ("Q5", readable(tensor_bytes(coded, r"self_attn\.(?!.*norm(?!s$))")))
    assert rows["norms, routers and other"][1] == readable(tensor_bytes(coded, r"norm(?!s$)|router|layer_scalar"))
    shares = [float(share.rstrip("%")) for *_, share in table(text, "| | stored as")]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_errors_are_those_that_verify_measures(text: str, source: Path, coded: Path) -> None:
    report = verify(coded, source)
    stated = re.search(r"that coding changed: \*\*([\d.]+)\*\*", text)
    # Verify compares after rounding to BF16, of relative error 2 ** -9 at most and independent of the coding's.
    assert float(stated[1]) == pytest.approx(report.relative_mse, rel=5e-3)  # type: ignore[index]
    shapes = {name: parameter.shape for name, parameter in open_source(source).parameters.items()}
    for layer, kind, weights, error in table(text, "| layer |"):
        mine = [
            name for name in report.errors
            if kind_of(name) == kind and (f"layers.{layer}." in name if layer != "none" else "layers." not in name)
        ]  # fmt: skip
        counts = [math.prod(shapes[name]) for name in mine]
        mean = sum(n * report.errors[name] for n, name in zip(counts, mine, strict=True)) / sum(counts)
        assert int(weights.replace(",", "")) == sum(counts)
        assert float(error) == pytest.approx(mean, rel=5e-3)
    assert len(table(text, "| layer |")) == 7  # experts, MLP, attention in two layers, and the embedding


def test_gpu_memory_is_that_of_the_sibling(text: str, sibling: Path) -> None:
    expert = tensor_bytes(sibling, r"layers\.\d\.experts\.0\..*(packed|scale)$")  # one of each of both layers
    others = tensor_bytes(sibling, r"^(?!.*\.experts\.)")
    rows = table(text, "| experts a layer")
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16"]
    for slots, _, of_slots, total in rows:
        assert of_slots == f"{int(slots) * expert / 2**20:.2f} MiB"
        assert total == f"{(int(slots) * expert + others) / 2**20:.2f} MiB"


def test_memory_by_hand() -> None:
    memory = ExpertMemory(slot_bytes=(100, 100, 120), experts=6, resident_bytes=1000)
    assert memory.device_bytes(4) == 4 * 320 + 1000
    assert memory.host_bytes == 6 * 320
    assert memory.choices() == [1, 2, 4, 6]


def test_commands_parse(text: str) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["hlwq", "export"], ["vllm", "serve"]]
    export, serve = commands
    context = get_command(app).commands["export"].make_context("export", export[2:])  # type: ignore[attr-defined]
    assert (context.params["source"], context.params["out"]) == (Path(NAME), Path(f"{NAME}-CT"))
    assert context.params["group_size"] == 64
    assert serve[2] == f"{NAME}-CT"
    assert serve[3] == flag("cache_size")
    assert 1 <= int(serve[4]) <= checkpoints.NUM_EXPERTS
    assert len(serve) == 5


def test_pictures_show_the_figures(coded: Path, sibling: Path, source: Path) -> None:
    """Bars are as long as sizes are large, and each kind of the error chart is there in its colour."""
    pictures = {name: matplotlib.image.imread(coded / f"hlwq_{name}.png") for name in ("compression", "sizes", "error")}
    for picture in pictures.values():
        assert picture.shape[1] > 1000
        assert 0.02 < (picture[..., :3].min(-1) < 0.95).mean() < 0.6, "blank, or all ink"

    def longest(picture: np.ndarray, colour: str) -> int:
        rgb = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)]) / 255
        return int((np.abs(picture[..., :3] - rgb).max(-1) < 0.02).sum(1).max())

    grey, blue, orange = (COLOURS[KINDS[index]] for index in (4, 0, 2))
    lengths = [longest(pictures["compression"], colour) for colour in (grey, blue, orange)]
    sizes = [tensor_bytes(folder) for folder in (source, coded, sibling)]
    assert lengths[1] / lengths[0] == pytest.approx(sizes[1] / sizes[0], rel=0.02)
    assert lengths[2] / lengths[0] == pytest.approx(sizes[2] / sizes[0], rel=0.02)
    assert all(longest(pictures["error"], COLOURS[kind]) > 4 for kind in KINDS[:4])
    assert all(longest(pictures["sizes"], COLOURS[kind]) > 20 for kind in KINDS[:4])


def test_the_sibling_has_a_card_of_its_own(sibling: Path, source: Path, coded: Path) -> None:
    assert not list(sibling.glob("hlwq_*.png")), "the exporter takes the card for a side file"
    assert card(sibling).exit_code == 0
    assert "Not measured" in (sibling / "README.md").read_text()
    assert card(sibling, "--original", source).exit_code == 0
    text = (sibling / "README.md").read_text()
    assert f"**{verify(sibling, source).relative_mse:.6f}**" in text
    assert metadata_load(sibling / "README.md")["library_name"] == "vllm"
    assert f"vllm serve '{NAME}-CT' {flag('cache_size')} 2\n" in text
    assert table(text, "| experts a layer") == table((coded / "README.md").read_text(), "| experts a layer")
    # The rest was coded at 5 bits before; the experts are rounded once more.
    errors = {row[1]: float(row[3]) for row in table(text, "| layer |")}
    assert errors["experts"] > 2 * max(error for kind, error in errors.items() if kind != "experts")


def test_somebody_s_card_is_kept(coded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(coded, folder)
    assert card(folder).exit_code == 0, "our own card is written anew"
    (folder / "README.md").write_text("# Mine\n")
    (folder / "hlwq_error.png").unlink()
    assert "README.md: was not written by `hlwq card`; add --force" in refused(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert not (folder / "hlwq_error.png").exists()
    assert card(folder, "--force").exit_code == 0
    assert (folder / "README.md").read_text().startswith("---\n")
    assert not list(folder.glob("*.tmp"))


def test_a_model_without_experts_goes_back_to_16_bit(dense_bf16: Path, tmp_path: Path) -> None:
    quantize(dense_bf16, tmp_path / "dense", bits=4)
    assert card(tmp_path / "dense").exit_code == 0
    text = (tmp_path / "dense/README.md").read_text()
    assert "makes no INT4 sibling of it: holds no experts" in text
    assert "hlwq dequantize dense dense-BF16\nvllm serve dense-BF16\n" in text
    assert "GPU memory" not in text
    assert metadata_load(tmp_path / "dense/README.md")["tags"] == ["hlwq", "4-bit", "quantized"]


def test_the_name_comes_from_the_hub_s_cache(coded: Path, source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-owner--a.model/snapshots/0123"
    shutil.copytree(source, snapshot)
    folder = tmp_path / "model"
    shutil.copytree(coded, folder)
    assert card(folder, "--original", snapshot).exit_code == 0
    assert metadata_load(folder / "README.md")["base_model"] == "some-owner/a.model"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{source}",), "is not coded, so there is nothing to say"),
        (("{coded}/model.safetensors",), "no folder, and a card goes into one"),
        (("{coded}", "--original", "nowhere"), "--original nowhere: neither a folder nor a name like owner/model"),
        (("{coded}", "--original", "a/b", "--original", "c/d"), "--original c/d: the second of its kind"),
    ],
)
def test_what_makes_no_card_is_refused(coded: Path, source: Path, arguments: tuple[str, ...], said: str) -> None:
    before = (source / "README.md").read_text()
    forced = ("--force",) if arguments[0] == "{source}" else ()
    assert said in refused(*(a.format(source=source, coded=coded) for a in arguments), *forced)
    assert (source / "README.md").read_text() == before


@pytest.mark.parametrize(
    "content", [b"---\nlicense: mit\nbase_model: a: b\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xe9\n---\n"]
)
def test_an_original_whose_card_cannot_be_read_is_named(
    coded: Path, source: Path, tmp_path: Path, content: bytes
) -> None:
    original = tmp_path / "original"
    shutil.copytree(source, original)
    (original / "README.md").write_bytes(content)
    said = refused(str(coded), "--original", str(original), "--force")
    assert said.startswith(f"hlwq: {original}/README.md: its front matter cannot be read (")
    assert said.strip().endswith("mend it, or give --original the hub's name alone")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.experts.7.w1.weight", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "dense MLP"),
        ("model.layers.3.mlp.down_proj.weight", "dense MLP"),
        ("model.layers.3.mlp.gate.weight", "norms, routers and other"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norms, routers and other"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "norms, routers and other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_experts_stored_one_by_one(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    """As fused ones: the plan's tensors are those of the export."""
    quantize(qwen3_moe_bf16, tmp_path / "q5", fit="norm")
    export_int4(open_source(tmp_path / "q5"), tmp_path / "int4", search=False)
    planned, made = gather(tmp_path / "q5"), gather(tmp_path / "int4")
    assert planned.memory == made.memory
    assert planned.sizes["INT4 g128"] == made.sizes["INT4 g128"]
