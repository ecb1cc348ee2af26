"""``--moe-expert-store-cache`` in real vLLM workers: the second start reads its experts from files, converts nothing.

Experts of ``marlin_on_cpu`` are converted by vLLM's own functions, as on CUDA, with all of them resident.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import format_files
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel, engine_config
from marlin_operators import marlin_on_cpu
from safetensors.torch import load_file, save_file

from vllm_hlwq import device_loading, kept_loader, record_cache, record_files
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.device_backend import DeviceBackend
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.host_store import HostStore
from vllm_hlwq.plugin import configure
from vllm_hlwq.record_cache import reads_whole_files

LAYERS = 2


@pytest.fixture(scope="module")
def int4(qwen3_moe_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "qwen3-CT"
    export_int4(qwen3_moe_bf16, out)
    return out


def outputs(loaded: LoadedModel) -> torch.Tensor:
    """What every layer makes of the same input."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 128, generator=generator).bfloat16()
    logits = torch.randn(9, NUM_EXPERTS, generator=generator)
    return torch.stack([loaded.run(layer, hidden, logits) for layer in range(LAYERS)])


def restored(loaded: LoadedModel) -> list[bool]:
    return [runner.routed_experts.restored for runner in loaded.runners]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def records(loaded: LoadedModel) -> list[torch.Tensor]:
    return [runner.routed_experts.expert_cache.store.records for runner in loaded.runners]


def without_weights(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy whose experts are wrong, and which is taken for the original nevertheless."""
    shutil.copytree(model, out)
    state = load_file(out / "model.safetensors")
    for name, tensor in state.items():
        if ".experts." in name and not name.endswith("weight_shape"):
            tensor.zero_()
    save_file(state, out / "model.safetensors", {"format": "pt"})
    of = record_cache.identities([model])
    monkeypatch.setattr(record_cache, "identities", lambda folders: of)
    return out


@pytest.mark.parametrize("name", ["qwen3_moe_bf16", "gemma4_bf16", "gpt_oss_bf16", "int4"])
@pytest.mark.parametrize("cache_size", [TOP_K, NUM_EXPERTS])
def test_the_second_start_takes_nothing_from_the_checkpoint(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
    name: str,
    cache_size: int,
) -> None:
    model = request.getfixturevalue(name)
    plain = LoadedModel(model, cache_size)
    first = LoadedModel(model, cache_size, store_cache=tmp_path / "cache")
    assert restored(first) == [False] * LAYERS
    assert len(files(tmp_path / "cache")) == LAYERS
    # The name of the model's folder is that of the folder of its files.
    (tmp_path / "wrong").mkdir()
    wrong = without_weights(model, tmp_path / "wrong" / model.name, monkeypatch)
    second = LoadedModel(wrong, cache_size, store_cache=tmp_path / "cache")
    assert restored(second) == [True] * LAYERS
    assert torch.equal(outputs(first), outputs(plain))
    assert torch.equal(outputs(second), outputs(plain))
    assert plain.worker.expert_cache_sizes() == second.worker.expert_cache_sizes()
    said = [line for line in log if line.startswith("Expert store cache: ")]
    assert said[0].startswith(f"Expert store cache: 0 of 2 layers read from {tmp_path / 'cache'} (0 bytes, ")
    assert said[0].endswith("s), 2 saved")
    assert said[1].startswith(f"Expert store cache: 2 of 2 layers read from {tmp_path / 'cache'} (")
    assert said[1].endswith("s), 0 saved")


@pytest.mark.parametrize("kind", ["compressed", "gptq", "gptq with biases", "fp8", "mxfp4"])
def test_the_second_start_converts_nothing(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_backend: Callable[..., None],
    kind: str,
) -> None:
    base = request.getfixturevalue("gpt_oss_bf16" if kind == "mxfp4" else "qwen3_moe_bf16")
    model = {
        "compressed": lambda: request.getfixturevalue("int4"),
        "gptq": lambda: format_files.gptq(base, tmp_path / "gptq"),
        "gptq with biases": lambda: format_files.gptq(base, tmp_path / "gptq", biases=True),
        "fp8": lambda: format_files.fp8(base, tmp_path / "fp8"),
        "mxfp4": lambda: format_files.gpt_oss_mxfp4(base, tmp_path / "mxfp4"),
    }[kind]()
    converted: list[int] = []
    convert = DeviceBackend.convert

    def counting(backend: DeviceBackend, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted.append(len(next(iter(raw.values()))))
        return convert(backend, raw)

    monkeypatch.setattr(DeviceBackend, "convert", counting)
    use_backend(marlin_on_cpu)
    plain = LoadedModel(model, NUM_EXPERTS)
    converted.clear()
    first = LoadedModel(model, NUM_EXPERTS, store_cache=tmp_path / "cache")
    assert sum(converted) >= LAYERS * NUM_EXPERTS
    converted.clear()
    second = LoadedModel(model, NUM_EXPERTS, store_cache=tmp_path / "cache")
    assert converted == []
    assert restored(second) == [True] * LAYERS
    for loaded in (first, second):
        assert torch.equal(outputs(loaded), outputs(plain))


def test_an_hlwq_checkpoint_is_not_decoded_again(
    qwen3_moe_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(qwen3_moe_bf16, tmp_path / "coded")
    first = LoadedModel(tmp_path / "coded", TOP_K, store_cache=tmp_path / "cache")
    decoded: list[str] = []
    from vllm_hlwq.checkpoint.export import Int4Export

    tensors = Int4Export.tensors

    def noting(export: Int4Export, group: Any) -> Any:
        decoded.append(group.parameter)
        return tensors(export, group)

    monkeypatch.setattr(Int4Export, "tensors", noting)
    second = LoadedModel(tmp_path / "coded", TOP_K, store_cache=tmp_path / "cache")
    assert decoded
    assert not any(".experts." in name for name in decoded)
    assert torch.equal(outputs(first), outputs(second))


def test_the_loader_reads_what_is_of_no_expert(int4: Path) -> None:
    state = load_file(int4 / "model.safetensors")
    given = dict(kept_loader.tensors(str(int4 / "model.safetensors")))
    assert given.keys() == state.keys()
    without_memory = {name for name, tensor in given.items() if tensor.is_meta}
    assert without_memory == {name for name in state if ".mlp.experts." in name}
    for name, tensor in given.items():
        assert (tensor.shape, tensor.dtype) == (state[name].shape, state[name].dtype)
        assert tensor.is_meta or torch.equal(tensor, state[name])


def test_weights_that_only_look_like_experts_are_not_lost(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoadedModel(int4, TOP_K, store_cache=tmp_path)
    monkeypatch.setattr(kept_loader, "is_of_experts", lambda name: ".mlp." in name)  # the router too
    with pytest.raises(ExpertCacheError, match=r"named as experts outside .* remove --moe-expert-store-cache"):
        LoadedModel(int4, TOP_K, store_cache=tmp_path)


def test_one_bad_file_has_the_whole_checkpoint_read(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoadedModel(int4, TOP_K, store_cache=tmp_path)
    files(tmp_path)[0].unlink()
    monkeypatch.setattr(kept_loader, "tensors", None)  # not to be asked
    loaded = LoadedModel(int4, TOP_K, store_cache=tmp_path)
    assert restored(loaded) == [False, True]
    assert loaded.config.load_config.load_format == "auto"


def flip(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-100, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a flipped bit": (lambda file, other: flip(file), "damaged: checksum"),
    "cut": (lambda file, other: os.truncate(file, file.stat().st_size - 1), "cut off or too long"),
    "empty": (lambda file, other: os.truncate(file, 0), "not a file of expert records"),
    "another layer's": (lambda file, other: file.write_bytes(other.read_bytes()), "layer 'model.layers.1"),
    "a folder": (lambda file, other: replace_by_a_folder(file), "Is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_told_and_made_anew(int4: Path, tmp_path: Path, log: list[str], damage: str) -> None:
    first = LoadedModel(int4, TOP_K, store_cache=tmp_path)
    bad, other = files(tmp_path)
    good = bad.read_bytes()
    break_it, said = DAMAGES[damage]
    break_it(bad, other)
    log.clear()
    second = LoadedModel(int4, TOP_K, store_cache=tmp_path)
    assert restored(second) == [False, True]
    assert torch.equal(outputs(first), outputs(second))
    (line,) = [line for line in log if "made anew" in line]
    assert line.startswith(f"Expert store cache: {bad}: ")
    assert said in line
    if damage == "a folder":
        assert any("could not be written" in line for line in log)
    else:
        assert bad.read_bytes() == good
        assert restored(LoadedModel(int4, TOP_K, store_cache=tmp_path)) == [True, True]


def test_another_vllm_or_other_weights_get_files_of_their_own(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = LoadedModel(int4, TOP_K, store_cache=cache)
    fine_tuned = tmp_path / int4.name
    shutil.copytree(int4, fine_tuned)
    state = load_file(fine_tuned / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("weight_scale"):
            tensor.mul_(2)
    save_file(state, fine_tuned / "model.safetensors", {"format": "pt"})
    other = LoadedModel(fine_tuned, TOP_K, store_cache=cache)
    assert restored(other) == [False] * LAYERS
    assert not torch.equal(outputs(first), outputs(other))
    with monkeypatch.context() as patched:
        patched.setattr(record_cache, "version", lambda name: "99" if name == "vllm" else version(name))
        assert restored(LoadedModel(int4, TOP_K, store_cache=cache)) == [False] * LAYERS
    assert len(files(cache)) == 3 * LAYERS
    for model in (int4, fine_tuned):
        assert restored(LoadedModel(model, TOP_K + 1, store_cache=cache)) == [True] * LAYERS


def test_a_full_disk_is_told_once_and_stops_nothing(int4: Path, tmp_path: Path, log: list[str]) -> None:
    plain = LoadedModel(int4, TOP_K)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        loaded = LoadedModel(int4, TOP_K, store_cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(outputs(loaded), outputs(plain))
    (line,) = [line for line in log if "could not be written" in line]
    assert "File too large" in line
    assert "serving goes on" in line
    assert "--moe-expert-store-cache" in line
    assert files(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_told(int4: Path, tmp_path: Path, log: list[str]) -> None:
    (tmp_path / "file").touch()
    LoadedModel(int4, TOP_K, store_cache=tmp_path / "file" / "cache")
    (line,) = [line for line in log if "could not be written" in line]
    assert "Not a directory" in line


def test_a_file_in_the_folders_place_is_refused(int4: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-store-cache .*file: is a file; give a folder"):
        engine_config(int4, TOP_K, store_cache=tmp_path / "file")


def test_made_up_weights_are_not_kept(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpertCacheError, match=r"--moe-expert-store-cache .*: --load-format dummy makes weights up"):
        LoadedModel(int4, TOP_K, store_cache=tmp_path, load_format="dummy")


def test_without_a_cache_or_a_path_it_is_refused() -> None:
    with pytest.raises(ExpertCacheError, match=r"--moe-expert-store-cache x has no meaning without --moe-expert-cache"):
        configure(SimpleNamespace(additional_config={"moe_expert_store_cache": "x"}))
    with pytest.raises(ExpertCacheError, match=r"^moe_expert_store_cache=3: must be the path of a folder"):
        configure(SimpleNamespace(additional_config={"moe_expert_cache_size": 4, "moe_expert_store_cache": 3}))


START = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import conftest
    from pathlib import Path
    from engines import LoadedModel
    from test_store_cache import outputs, restored
    loaded = LoadedModel(Path(sys.argv[2]), 4, store_cache=Path(sys.argv[3]))
    print("sum", outputs(loaded).float().sum().item(), restored(loaded))
""")


def test_two_engines_that_start_at_once_share_a_folder(int4: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(Path(__file__).parent), str(int4), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    sums = [next(line for line in text.splitlines() if line.startswith("sum")).split()[1] for text in said]
    assert sums[0] == sums[1]
    assert len(files(tmp_path)) == LAYERS
    third = LoadedModel(int4, 4, store_cache=tmp_path)
    assert restored(third) == [True] * LAYERS
    assert str(outputs(third).float().sum().item()) == sums[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"safetensors_load_strategy": "lazy"}, None),
        ({"safetensors_load_strategy": "eager"}, "--safetensors-load-strategy eager"),
        ({"load_format": "fastsafetensors"}, "--load-format fastsafetensors"),
        ({"model_loader_extra_config": {"enable_multithread_load": True}}, "enable_multithread_load"),
    ],
)
def test_settings_that_read_experts_all_the_same_are_named(settings: dict[str, Any], said: str | None) -> None:
    stock = {"load_format": "auto", "safetensors_load_strategy": None, "model_loader_extra_config": {}}
    assert reads_whole_files(SimpleNamespace(**stock | settings)) == said


def test_a_host_store_on_the_way_to_a_gpu_is_kept_as_the_kernels_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``load_cache``'s way with fewer slots than experts, as far as there is no GPU to it."""
    from test_convert_store import EXPERTS, RAW, Transposing
    from test_pinned_memory import MemoryLock

    monkeypatch.setattr(device_loading, "CHUNK_BYTES", 2 * RAW.record_bytes)
    cpu = torch.device("cpu")
    raw = HostStore(EXPERTS, RAW)
    raw.records.copy_(torch.randint(0, 64, raw.records.shape, dtype=torch.uint8))  # no NaN among the scales
    backend, runtime = Transposing(4), MemoryLock()
    store = device_loading.convert_store(raw, device_loading.kernel_layout(raw, backend, cpu), backend, cpu, runtime)
    record_files.write_records(tmp_path / "file", {}, store, lambda _: None)
    found = record_files.read_records(tmp_path / "file", {}, EXPERTS, cpu, lambda _: None)
    monkeypatch.setattr(backend, "convert", None)  # not to be called any more
    layout = device_loading.kernel_layout(found, backend, cpu)
    assert layout.key() == store.layout.key()
    assert device_loading.convert_store(found, layout, backend, cpu, runtime) is found
    assert runtime.sizes[found.address] == found.nbytes
    assert found.device_address is not None
    assert torch.equal(found.records, store.records)
    bank = device_loading.resident_bank(found, layout, backend, cpu)
    assert all(torch.equal(bank.fields[name], store.field(name)) for name in layout)


def test_the_bars_count_every_byte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], int4: Path, use_backend: Callable[..., None]
) -> None:
    use_backend(marlin_on_cpu)
    LoadedModel(int4, NUM_EXPERTS)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Converting experts: ")]
    assert lines[-1].startswith("Converting experts: 100% | 811k/811k [")
    LoadedModel(int4, NUM_EXPERTS, use_tqdm_on_load=False)
    assert "Converting" not in capsys.readouterr().err


def test_checkpoints_without_safetensors_files_are_not_kept(
    qwen3_moe_bf16: Path, tmp_path: Path, log: list[str]
) -> None:
    model = tmp_path / "pickled"
    shutil.copytree(qwen3_moe_bf16, model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(qwen3_moe_bf16 / "model.safetensors"), model / "pytorch_model.bin")
    LoadedModel(model, TOP_K, store_cache=tmp_path / "cache")
    (line,) = [line for line in log if "has no safetensors files" in line]
    assert "serving goes on" in line
    assert not (tmp_path / "cache").exists()
