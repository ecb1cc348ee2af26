"""A cache that leaves no room for a KV cache is refused in one line, and only where that is certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_config, start_worker
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import make_checkpoint
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.config.multimodal import MultiModalConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import _max_memory_usage_bytes_from_groups, get_kv_cache_groups

from vllm_hlwq.bank_sizes import BankSizes
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint_sizes import UnknownSizes
from vllm_hlwq.engine_sizes import device_demand, device_estimate, kv_cache_bytes, model_facts
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.memory_check import Device, Limit, check_memory, limit_of, shortage
from vllm_hlwq.options import KV_FLOOR_SEQS, ExpertCacheOptions
from vllm_hlwq.sizing import GRAPH_LAYER_BYTES, GRAPHS_BYTES, DeviceDemand, KvLayer, kv_floor_elements
from vllm_hlwq.worker import install_layers

GIB = 2**30
AUTO = ExpertCacheOptions(cache_size="auto")
# Gemma-4-26B-A4B at 4096 tokens on 12 GiB, by hand: 30 layers, of which 5 attend globally.
GEMMA = DeviceDemand(
    dense=4_790_313_020,
    workspace=645_922_816,
    kv_cache=25 * 4096 * 4096 * 2 + 5 * 2048 * 4096 * 2,
    banks=BankSizes((3_159_552,) * 30, 128, 8, 12 * GIB),
)
LIMIT = Limit(11 * GIB, "where so much is there", "KV cache for a test", "do something")


def granted(demand: DeviceDemand, slots: int, *, spare: int = 0) -> Limit:
    return Limit(demand.bytes(slots) + spare, LIMIT.words, LIMIT.kv_cache, LIMIT.remedy)


def test_the_refusal_names_every_part_and_the_largest_that_fits() -> None:
    # 805,306,368 bytes, a sixteenth of 12 GiB, hold 127 experts twice: all 28 without a slot.
    limit = Limit(11 * GIB, "where --gpu-memory-utilization 0.92 grants 11811160064", "KV cache for 4096 tokens", "")
    # 4,790,313,020 + 645,922,816 + 922,746,880 are 6,358,982,716; 5,452,177,348 are left for N x 94,786,560 and
    # (128 - N) x 6,319,104: N x 88,467,456 + 808,845,312.
    assert shortage(GEMMA, 100, limit) == (
        "--moe-expert-cache-size 100: 4790313020 bytes of weights outside the experts, 9478656000 of 100 slots in each "
        "of 30 layers, 176934912 of staging, 645922816 of working memory and 922746880 of KV cache for 4096 tokens are "
        "16014573628 bytes on each GPU, where --gpu-memory-utilization 0.92 grants 11811160064; "
        "the largest number that can fit is 52"
    )
    assert (5_452_177_348 - 808_845_312) // 88_467_456 == 52


def test_a_byte_decides() -> None:
    assert shortage(GEMMA, 52, granted(GEMMA, 52)) is None
    message = shortage(GEMMA, 52, granted(GEMMA, 52, spare=-1))
    assert message is not None
    assert message.endswith("the largest number that can fit is 51")


def test_a_model_that_does_not_fit_at_all() -> None:
    message = shortage(GEMMA, 4, granted(GEMMA, 1, spare=-1))
    assert message is not None
    assert message.endswith("the model does not fit at all, not even with 1: do something")
    assert shortage(GEMMA, 1, granted(GEMMA, 1)) is None


def test_more_slots_than_experts_are_for_the_layer_to_refuse() -> None:
    assert shortage(GEMMA, 129, Limit(0, "", "", "")) is None


def test_a_kv_cache_of_unknown_size_is_called_so() -> None:
    demand = DeviceDemand(10, 10, 0, GEMMA.banks)
    message = shortage(demand, 4, Limit(0, "", "KV cache", ""))
    assert message is not None
    assert "10 of working memory and a KV cache of unknown size are" in message


@given(
    sizes=st.tuples(*[st.integers(0, 10_000)] * 4),
    records=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    experts=st.integers(1, 20),
    data=st.data(),
)
def test_what_is_proposed_is_accepted(
    sizes: tuple[int, int, int, int], records: list[int], experts: int, data: st.DataObject
) -> None:
    dense, workspace, kv_cache, limit = sizes
    demand = DeviceDemand(dense, workspace, kv_cache, BankSizes(tuple(records), experts, 2, 1000))
    slots = data.draw(st.integers(1, experts))
    message = shortage(demand, slots, Limit(limit, "", "", ""))
    if message is None:
        assert demand.bytes(slots) <= limit
        return
    assert "\n" not in message
    others = [n for n in range(1, experts + 1) if shortage(demand, n, Limit(limit, "", "", "")) is None]
    if others:
        assert message.endswith(f" {max(others)}")
    else:
        assert "not even with 1" in message


# Out of vLLM's configuration, on real checkpoints.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "model"
    make_checkpoint("small", out)
    return out


@pytest.fixture(scope="module")
def qwen3_moe_int4(qwen3_moe_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen3-moe-int4")
    export_int4(qwen3_moe_bf16, out)
    return out


def config_of(model: Path, cache_size: int = 4, **engine_args: Any) -> Any:
    """A configuration as on CUDA: on a CPU vLLM reserves the KV cache by an environment variable."""
    config = engine_config(model, cache_size, **engine_args)
    config.cache_config.kv_cache_memory_bytes = None
    return config


def demand_of(config: Any, cache_size: int = 4, staging_size: int | None = None) -> DeviceDemand:
    return device_demand(config, ExpertCacheOptions(cache_size=cache_size, staging_size=staging_size), GIB)


def test_a_configuration_to_a_demand(small: Path) -> None:
    config = config_of(small, max_model_len=256, max_num_batched_tokens=128, max_num_seqs=8)
    demand = demand_of(config, staging_size=3)
    assert demand.dense == 3_163_400
    assert demand.workspace == 128 * 4 * (3 * 192 + 256) * 2
    # Keys and values of 2 heads of 32 in three layers, of 1 head of 64 in the last: 128 values of 2 bytes a token.
    assert demand.kv_cache == 3 * (64 - 1 + 128) * 256 + 256 * 256
    assert demand.banks == BankSizes((78_336,) * 4, 16, 4, GIB, 3)


@pytest.mark.parametrize(("model", "length"), [("small", 512), ("small", 2048), ("qwen3_moe_int4", 700)])
def test_vllm_takes_at_least_that_and_little_more(request: pytest.FixtureRequest, model: str, length: int) -> None:
    config = config_of(
        request.getfixturevalue(model), max_model_len=length, max_num_batched_tokens=256, gpu_memory_utilization=0.3
    )
    demand = demand_of(config)
    worker = start_worker(config)
    install_layers()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        built = initialize_model(vllm_config=config)
    parameters = {p.data_ptr(): p.nbytes for name, p in built.named_parameters() if ".experts." not in name}
    # Gemma-4 keeps the global layers' keys once more as their values, vLLM alone.
    assert demand.dense <= sum(parameters.values()) <= 1.02 * demand.dense
    worker.model_runner.model = built
    needed = sum(spec.max_memory_usage_bytes(config) for spec in worker.get_kv_cache_spec().values())
    # vLLM counts whole blocks, here of 128 tokens, one more in sliding layers, and a batch for each that is in flight.
    assert demand.kv_cache <= needed
    if model == "qwen3_moe_int4":
        assert needed == demand.kv_cache // length * 128 * -(-length // 128)
    # The estimate that a cache size of auto is based on is on the other side of both.
    config.cache_config.block_size, config.cache_config.kv_cache_layout = 64, "LBNHC"
    estimate = device_estimate(config, ExpertCacheOptions(cache_size="auto", kv_floor_seqs=3), GIB)
    assert sum(parameters.values()) <= estimate.dense
    groups = get_kv_cache_groups(config, worker.get_kv_cache_spec())
    most = _max_memory_usage_bytes_from_groups(config, groups)
    assert 3 * most <= estimate.kv_cache <= 3 * 1.5 * most


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 512), ({"max_model_len": 96}, 96), ({"max_model_len": -1}, 1)],
)
def test_a_sequence_is_as_long_as_the_user_says(qwen3_moe_int4: Path, changes: dict[str, Any], length: int) -> None:
    config = config_of(qwen3_moe_int4, **changes)
    # 2 layers, keys and values of 2 heads of 32.
    assert demand_of(config).kv_cache == 2 * 2 * 2 * 32 * length * 2
    assert f"for one sequence of {length} tokens" in limit_of(config, Device(0, 0, 0)).kv_cache


@pytest.mark.parametrize(
    ("dtype", "value_bytes"), [("auto", 2), ("bfloat16", 2), ("fp8", 1), ("fp8_e5m2", 1), ("nvfp4", 0)]
)
def test_the_dtype_of_the_kv_cache(qwen3_moe_int4: Path, dtype: str, value_bytes: int) -> None:
    config = config_of(qwen3_moe_int4)
    object.__setattr__(config.cache_config, "cache_dtype", dtype)
    assert kv_cache_bytes((KvLayer(10, None),), config) == 10 * 512 * value_bytes


def test_a_checkpoint_with_an_8_bit_kv_cache(qwen3_moe_int4: Path) -> None:
    config = config_of(qwen3_moe_int4)
    config.quant_config.kv_cache_scheme = {"num_bits": 8, "type": "float"}
    assert kv_cache_bytes((KvLayer(10, None),), config) == 10 * 512


def test_tensor_parallelism_cuts_experts_and_expert_parallelism_deals_them(small: Path) -> None:
    config = config_of(small)
    whole = demand_of(config)
    config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = 2
    cut = demand_of(config)
    # 96 of 192 columns are padded to 128.
    assert cut.banks.records == (3 * 128 * 256 // 2 + 3 * 128 * 256 // 64 * 2,) * 4
    assert (cut.dense, cut.kv_cache) == (whole.dense // 2, whole.kv_cache // 2)
    assert cut.banks.num_experts == 16
    config.parallel_config.enable_expert_parallel = True
    dealt = demand_of(config)
    assert dealt.banks.records == whole.banks.records
    assert dealt.banks.num_experts == 8
    assert dealt.workspace == whole.workspace


def test_ranks_share_the_floor_as_far_as_there_are_heads(qwen3_moe_int4: Path) -> None:
    config, found = config_of(qwen3_moe_int4), []
    for ranks in (1, 2, 4):  # keys and values have two heads
        config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = ranks
        found.append(device_estimate(config, AUTO, GIB).kv_cache)
    assert found == [found[0], found[0] // 2, found[0] // 2]


@pytest.mark.parametrize(("without_windows", "windows"), [(False, [64, 64, 64, None]), (True, [None] * 4)])
def test_the_floor_without_vllms_hybrid_manager(small: Path, without_windows: bool, windows: list[int | None]) -> None:
    config = config_of(small, max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8)
    config.scheduler_config.disable_hybrid_kv_cache_manager = without_windows
    elements = kv_floor_elements([KvLayer(128, window) for window in windows], 256, config.max_in_flight_tokens)
    assert device_estimate(config, AUTO, GIB).kv_cache == KV_FLOOR_SEQS * elements * 2


def test_an_eager_engine_captures_nothing(small: Path) -> None:
    config = config_of(small)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4]
    for eager, graphs in ((False, GRAPHS_BYTES + 2 * 3 * 4 * GRAPH_LAYER_BYTES), (True, 0)):
        config.model_config.enforce_eager = eager
        assert device_estimate(config, AUTO, GIB).graphs == graphs


def test_who_sizes_the_kv_cache_may_use_all_that_is_free(qwen3_moe_int4: Path) -> None:
    config = config_of(qwen3_moe_int4, gpu_memory_utilization=0.5)
    device = Device(total=1000, free=900, granted=500)
    limit = limit_of(config, device)
    assert (limit.bytes, limit.words) == (500, "where --gpu-memory-utilization 0.5 grants 500")
    assert "raise --gpu-memory-utilization" in limit.remedy
    config.cache_config.kv_cache_memory_bytes = 12_345
    limit = limit_of(config, device)
    assert (limit.bytes, limit.words) == (900, "where 900 are free")
    assert limit.remedy == "lower --kv-cache-memory-bytes"
    assert demand_of(config).kv_cache == 12_345
    config.cache_config.num_gpu_blocks_override = 7
    limit = limit_of(config, device)
    assert (limit.bytes, limit.remedy) == (900, "lower --max-model-len or --max-num-batched-tokens")
    assert demand_of(config).kv_cache == 2 * 2 * 2 * 32 * 512 * 2


@pytest.mark.parametrize(
    ("settings", "loaded"),
    [({}, True), ({"language_model_only": True}, False), ({"limit_per_prompt": {"image": 0}}, False)],
)
def test_towers_count_unless_they_are_left_out(small: Path, settings: dict[str, Any], loaded: bool) -> None:
    config = config_of(small).model_config
    assert not model_facts(config).towers
    config.multimodal_config = MultiModalConfig(**settings)
    assert model_facts(config).towers is loaded


UNKNOWN = {
    "pipeline": ("parallel_config", "world_size", 2, "several GPUs"),
    "context": ("parallel_config", "decode_context_parallel_size", 2, "several GPUs"),
    "offload": ("offload_config.uva", "cpu_offload_gb", 1.0, "offloaded"),
    "prefetch": ("offload_config.prefetch", "offload_group_size", 2, "offloaded"),
    "hub": ("model_config", "model", "owner/name", "no local folder"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_where_it_cannot_be_known_nothing_is_refused(small: Path, case: str, log: list[str]) -> None:
    path, setting, value, reason = UNKNOWN[case]
    config = config_of(small)
    part = config
    for name in path.split("."):
        part = getattr(part, name)
    object.__setattr__(part, setting, value)
    with pytest.raises(UnknownSizes, match=reason):
        demand_of(config)
    check_memory(config, ExpertCacheOptions(cache_size=4), Device(0, 0, 0))
    assert len(log) == 1
    assert reason in log[0]
    assert "--moe-expert-cache-size 4 leaves room for a KV cache will show after loading only" in log[0]


def test_damaged_files_are_not_judged(small: Path, tmp_path: Path, log: list[str]) -> None:
    config = config_of(small)
    config.model_config.model = str(tmp_path)
    check_memory(config, ExpertCacheOptions(cache_size=4), Device(0, 0, 0))
    assert len(log) == 1
    assert "holds no safetensors file" in log[0]


def test_16_bit_experts(qwen3_moe_bf16: Path) -> None:
    demand = demand_of(config_of(qwen3_moe_bf16, max_num_batched_tokens=128, max_num_seqs=8))
    # 2 layers; an expert is three matrices of 128 x 128, and two staging banks hold the 12 that have no slot.
    assert demand.banks.records == (3 * 128 * 128 * 2,) * 2
    assert demand.banks.staging_bytes(4) == 2 * 12 * 3 * 128 * 128 * 2
    assert demand.workspace == 128 * 4 * (3 * 128 + 128) * 2


def test_the_check_refuses_with_the_users_own_flags(small: Path, log: list[str]) -> None:
    config = config_of(small, gpu_memory_utilization=0.75)
    demand = demand_of(config)
    options = ExpertCacheOptions(cache_size=12)
    check_memory(config, options, Device(GIB, GIB, demand.bytes(12)))
    with pytest.raises(ExpertCacheError) as caught:
        check_memory(config, options, Device(GIB, GIB, demand.bytes(12) - 1))
    message = str(caught.value)
    assert message.startswith("--moe-expert-cache-size 12: 3163400 bytes of weights outside the experts, 3760128 of 12")
    assert f"where --gpu-memory-utilization 0.75 grants {demand.bytes(12) - 1}; " in message
    assert message.endswith("the largest number that can fit is 11")
    assert log == []
