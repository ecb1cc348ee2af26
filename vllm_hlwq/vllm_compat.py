"""Everything borrowed from vLLM's internals, as data: the only module that imports vLLM.

Each name carries what it is used for and which of its members are relied on, so that the tests can compare the list
with the installed vLLM and with the sources of releases that are not installed. Names are imported when first asked
for: the command line must not pay for the model code.

Checked against: 0.32.0 (oldest) to 0.33.0 (newest).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

OLDEST_CHECKED = "0.32.0"
NEWEST_CHECKED = "0.33.0"


@dataclass(frozen=True)
class Borrowed:
    """One name of vLLM's: where it is, why it is needed, and the members of it that are used or overridden.

    Members are of the class, or set by its methods on ``self``.
    """

    module: str
    attribute: str
    reason: str
    members: tuple[str, ...] = ()


_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors"

BORROWED: dict[str, Borrowed] = {
    "EngineArgs": Borrowed(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "extended with our flags and with the check of the finished configuration; vLLM has no hook for either",
        ("add_cli_args", "from_cli_args", "create_engine_config", "additional_config", "disable_log_stats"),
    ),
    "init_logger": Borrowed("vllm.logger", "init_logger", "log lines in vLLM's format and at its level"),
    "LoggingStatLogger": Borrowed(
        "vllm.v1.metrics.loggers",
        "LoggingStatLogger",
        "writes the periodic log line that the hit rate is appended to",
    ),
    "get_world_group": Borrowed(
        "vllm.distributed.parallel_state",
        "get_world_group",
        "at start-up, adds up the slots of an engine's ranks, and finds a cache size that all of their GPUs hold",
    ),
    "current_platform": Borrowed("vllm.platforms", "current_platform", "tells a CPU runtime from a CUDA one"),
    "VLLM_MOE_SKIP_PADDING": Borrowed(
        "vllm.envs", "VLLM_MOE_SKIP_PADDING", "tells whether vLLM keeps its mask of padding rows up to date"
    ),
    "VLLM_BATCH_INVARIANT": Borrowed(
        "vllm.envs", "VLLM_BATCH_INVARIANT", "tells whether only kernels may run whose sums no batch changes"
    ),
    "get_current_vllm_config": Borrowed(
        "vllm.config", "get_current_vllm_config", "the engine's configuration while a layer is built"
    ),
    "get_forward_context": Borrowed(
        "vllm.forward_context",
        "get_forward_context",
        "finds the layer of a traced step by its name; the map belongs to the engine, so engines do not mix",
    ),
    "GPUWorker": Borrowed(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        "base of our worker on CUDA, chosen through the public worker_cls setting; it knows the memory that is granted",
        (
            "load_model",
            "compile_or_warm_up_model",
            "execute_model",
            "shutdown",
            "reload_weights",
            "update_weights",
            "save_sharded_state",
            "save_tensorized_model",
            "init_snapshot",
            "requested_memory",
        ),
    ),
    "CPUWorker": Borrowed(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker",
        "base of our worker on a CPU, chosen through the public worker_cls setting",
        ("compile_or_warm_up_model",),
    ),
    "PluggableLayer": Borrowed(
        "vllm.model_executor.custom_op",
        "PluggableLayer",
        "vLLM's registry of out-of-tree layers",
        ("register_oot",),
    ),
    "op_registry_oot": Borrowed(
        "vllm.model_executor.custom_op",
        "op_registry_oot",
        "shows whether another plugin holds the layer: a second registration is an assertion failure in vLLM",
    ),
    "RoutedExperts": Borrowed(
        f"{_FUSED_MOE}.routed_experts",
        "RoutedExperts",
        "base of our layer: it owns the expert weights and their loading",
        ("_get_quant_method", "weight_loader", "load_weights", "expert_map"),
    ),
    "GptOssRoutedExperts": Borrowed(
        "vllm.model_executor.models.gpt_oss",
        "GptOssRoutedExperts",
        "base of our layer for gpt-oss, which loads its experts in a way of its own",
        ("weight_loader",),
    ),
    "MoERunnerInterface": Borrowed(
        f"{_FUSED_MOE}.runner.moe_runner_interface",
        "MoERunnerInterface",
        "recognises mixture-of-experts layers among the engine's named layers",
    ),
    "FusedMoEMethodBase": Borrowed(
        f"{_FUSED_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase",
        "initialises a quant method without asking vLLM's oracle for a kernel",
        ("create_weights", "get_fused_moe_quant_config", "is_monolithic", "apply", "maybe_roundup_sizes"),
    ),
    "UnquantizedFusedMoEMethod": Borrowed(
        f"{_FUSED_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod",
        "declares the checkpoint tensors of BF16 and FP16 experts",
        ("create_weights",),
    ),
    "CompressedTensorsWNA16MoEMethod": Borrowed(
        f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_wna16",
        "CompressedTensorsWNA16MoEMethod",
        "declares the checkpoint tensors of pack-quantized INT4 experts",
        ("create_weights", "get_weight_shape"),
    ),
    "CompressedTensorsConfig": Borrowed(
        f"{_COMPRESSED}.compressed_tensors",
        "CompressedTensorsConfig",
        "says which scheme the checkpoint gives a layer's experts",
        (
            "_add_fused_moe_to_target_scheme_map",
            "get_scheme_dict",
            "_is_wNa16_group_channel",
            "_is_fp8_w8a8",
            "from_config",
            "get_name",
        ),
    ),
    "QuantizationConfig": Borrowed(
        f"{_QUANTIZATION}.base_config",
        "QuantizationConfig",
        "the kind of class that vLLM registers for a quantisation's name",
        ("from_config", "get_config_filenames", "maybe_update_config"),
    ),
    "register_quantization_config": Borrowed(
        _QUANTIZATION, "register_quantization_config", "vLLM's registry of quantisations from outside"
    ),
    "register_model_loader": Borrowed(
        "vllm.model_executor.model_loader", "register_model_loader", "vLLM's registry of loaders from outside"
    ),
    "DefaultModelLoader": Borrowed(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader",
        "loads what its iterator of tensors gives, from files or as they are made",
        ("get_all_weights", "download_model", "load_weights", "_get_weights_iterator", "_prepare_weights"),
    ),
    "enable_tqdm": Borrowed(
        "vllm.model_executor.model_loader.weight_utils",
        "enable_tqdm",
        "tells whether this rank shows the progress of loading",
    ),
    "AutoAWQConfig": Borrowed(f"{_QUANTIZATION}.auto_awq", "AutoAWQConfig", "recognises AWQ checkpoints"),
    "AutoAWQMoEMethod": Borrowed(
        f"{_QUANTIZATION}.auto_awq",
        "AutoAWQMoEMethod",
        "declares the checkpoint tensors of AWQ experts",
        ("create_weights",),
    ),
    "AutoGPTQConfig": Borrowed(f"{_QUANTIZATION}.auto_gptq", "AutoGPTQConfig", "recognises GPTQ checkpoints"),
    "AutoGPTQMoEMethod": Borrowed(
        f"{_QUANTIZATION}.auto_gptq",
        "AutoGPTQMoEMethod",
        "declares the checkpoint tensors of GPTQ experts",
        ("create_weights",),
    ),
    "get_moe_quant_method": Borrowed(
        f"{_QUANTIZATION}.auto_gptq",
        "get_moe_quant_method",
        "applies a GPTQ checkpoint's exceptions for single layers",
    ),
    "GptOssMxfp4Config": Borrowed(
        f"{_QUANTIZATION}.mxfp4", "GptOssMxfp4Config", "recognises gpt-oss checkpoints in MXFP4"
    ),
    "GptOssMxfp4MoEMethod": Borrowed(
        f"{_QUANTIZATION}.mxfp4",
        "GptOssMxfp4MoEMethod",
        "declares the checkpoint tensors of gpt-oss's MXFP4 experts, and rounds their sizes up for Marlin",
        ("create_weights", "maybe_roundup_sizes"),
    ),
    "Mxfp4MoeBackend": Borrowed(
        f"{_FUSED_MOE}.oracle.mxfp4", "Mxfp4MoeBackend", "vLLM's name of the Marlin backend for MXFP4", ("MARLIN",)
    ),
    "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format": Borrowed(
        f"{_FUSED_MOE}.oracle.mxfp4",
        "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format",
        "repacks MXFP4 experts into Marlin's layout, as a function of a chunk of experts",
    ),
    "Fp8Config": Borrowed(f"{_QUANTIZATION}.fp8", "Fp8Config", "recognises FP8 checkpoints"),
    "Fp8MoEMethod": Borrowed(
        f"{_QUANTIZATION}.fp8", "Fp8MoEMethod", "declares the checkpoint tensors of FP8 experts", ("create_weights",)
    ),
    "CompressedTensorsW8A8Fp8MoEMethod": Borrowed(
        f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8",
        "CompressedTensorsW8A8Fp8MoEMethod",
        "declares the checkpoint tensors of compressed-tensors' FP8 experts",
        ("create_weights",),
    ),
    "Fp8MoeBackend": Borrowed(
        f"{_FUSED_MOE}.oracle.fp8", "Fp8MoeBackend", "vLLM's name of the Marlin backend for FP8", ("MARLIN",)
    ),
    "convert_to_fp8_moe_kernel_format": Borrowed(
        f"{_FUSED_MOE}.oracle.fp8",
        "convert_to_fp8_moe_kernel_format",
        "repacks FP8 experts into Marlin's layout, as a function of a chunk of experts",
    ),
    "process_fp8_weight_tensor_strategy_moe": Borrowed(
        f"{_QUANTIZATION}.utils.fp8_utils",
        "process_fp8_weight_tensor_strategy_moe",
        "gives gate and up of an expert one scale where the checkpoint has two",
    ),
    "is_layer_skipped": Borrowed(
        f"{_QUANTIZATION}.utils.quant_utils",
        "is_layer_skipped",
        "tells whether a checkpoint leaves a layer in 16 bit",
    ),
    "WNA16_SUPPORTED_TYPES_MAP": Borrowed(
        f"{_COMPRESSED}.schemes.compressed_tensors_wNa16",
        "WNA16_SUPPORTED_TYPES_MAP",
        "vLLM's name of the symmetric packed integer type",
    ),
    "WNA16_ZP_SUPPORTED_TYPES_MAP": Borrowed(
        f"{_COMPRESSED}.schemes.compressed_tensors_wNa16",
        "WNA16_ZP_SUPPORTED_TYPES_MAP",
        "vLLM's name of the asymmetric packed integer type",
    ),
    "FusedMoEQuantConfig": Borrowed(
        f"{_FUSED_MOE}.config",
        "FusedMoEQuantConfig",
        "tells the kernel frame that activations stay 16-bit, and names tuned kernel settings",
        ("make", "config_name"),
    ),
    "FusedMoEKernel": Borrowed(
        f"{_FUSED_MOE}.modular_kernel",
        "FusedMoEKernel",
        "frame that prepares inputs (also across data-parallel ranks) and calls our experts",
        ("apply",),
    ),
    "FusedMoEExpertsModular": Borrowed(
        f"{_FUSED_MOE}.modular_kernel",
        "FusedMoEExpertsModular",
        "base of our experts: the place where the final expert ids arrive",
        ("apply", "workspace_shapes", "moe_problem_size", "finalize_weight_and_reduce_impl"),
    ),
    "FusedMoEActivationFormat": Borrowed(
        f"{_FUSED_MOE}.modular_kernel", "FusedMoEActivationFormat", "declares token-major inputs"
    ),
    "maybe_make_prepare_finalize": Borrowed(
        f"{_FUSED_MOE}.all2all_utils",
        "maybe_make_prepare_finalize",
        "the input preparation that fits the parallel configuration",
    ),
    "TopKWeightAndReduceNoOP": Borrowed(
        f"{_FUSED_MOE}.topk_weight_and_reduce",
        "TopKWeightAndReduceNoOP",
        "says that our experts have already weighted and summed over top-k",
    ),
    "_fused_marlin_moe": Borrowed(
        f"{_FUSED_MOE}.experts.marlin_moe",
        "_fused_marlin_moe",
        "the Marlin kernels and the activation between them, over blocks that are already aligned",
    ),
    "TritonExperts": Borrowed(
        f"{_FUSED_MOE}.experts.triton_moe",
        "TritonExperts",
        "the activation between the two products of 16-bit experts, with what it adds to the other backends'",
        ("activation",),
    ),
    "invoke_fused_moe_triton_kernel": Borrowed(
        f"{_FUSED_MOE}.fused_moe",
        "invoke_fused_moe_triton_kernel",
        "the Triton kernel of 16-bit experts, over blocks that are already aligned",
    ),
    "try_get_optimal_moe_config": Borrowed(
        f"{_FUSED_MOE}.fused_moe",
        "try_get_optimal_moe_config",
        "tile sizes of that kernel for a resident model, which decide its bits",
    ),
    "apply_moe_activation_supported": Borrowed(
        f"{_FUSED_MOE}.activation",
        "apply_moe_activation_supported",
        "tells whether the activation between the two products is one of vLLM's",
    ),
    "ApplyMoEActivationConfig": Borrowed(
        f"{_FUSED_MOE}.activation",
        "ApplyMoEActivationConfig",
        "limit, alpha and beta of gated activations",
        ("from_configs",),
    ),
    "moe_align_block_size": Borrowed(
        f"{_FUSED_MOE}.moe_align_block_size", "moe_align_block_size", "sorts a step's rows into blocks of one expert"
    ),
    "moe_sum": Borrowed(
        "vllm._custom_ops", "moe_sum", "sums weighted rows over top-k, passing over rows without expert"
    ),
    "convert_to_wna16_moe_kernel_format": Borrowed(
        f"{_FUSED_MOE}.oracle.int_wna16",
        "convert_to_wna16_moe_kernel_format",
        "repacks INT4 experts into Marlin's layout, as a function of a chunk of experts",
    ),
    "WNA16MoEBackend": Borrowed(
        f"{_FUSED_MOE}.oracle.int_wna16", "WNA16MoEBackend", "vLLM's name of the Marlin backend", ("MARLIN",)
    ),
    "marlin_moe_padded_intermediate": Borrowed(
        f"{_QUANTIZATION}.utils.marlin_utils",
        "marlin_moe_padded_intermediate",
        "expert width after padding to Marlin's tile",
    ),
    "get_marlin_input_dtype": Borrowed(
        f"{_QUANTIZATION}.utils.marlin_utils",
        "get_marlin_input_dtype",
        "tells whether VLLM_MARLIN_INPUT_DTYPE asks for 8-bit activations",
    ),
    "scalar_types": Borrowed("vllm.scalar_type", "scalar_types", "vLLM's names of 4-bit weights", ("uint4", "uint4b8")),
    "MoEActivation": Borrowed(
        f"{_FUSED_MOE}.activation",
        "MoEActivation",
        "vLLM's name of a layer's activation, for a layer that is benchmarked without an engine",
        ("from_str",),
    ),
    "init_workspace_manager": Borrowed(
        "vllm.v1.worker.workspace",
        "init_workspace_manager",
        "lets the Marlin kernels keep their locks from call to call outside an engine too, as they do in one",
    ),
    "get_accelerator_view_from_cpu_tensor": Borrowed(
        "vllm.utils.torch_utils",
        "get_accelerator_view_from_cpu_tensor",
        "shows kernels weights in host memory as vLLM's own offloading does, for a benchmark of that",
    ),
    "RoutingStrategy": Borrowed(
        f"{_FUSED_MOE}.router.routing_simulator_router",
        "RoutingStrategy",
        "base of the benchmarks' routing with measured locality",
        ("route_tokens",),
    ),
    "RoutingSimulator": Borrowed(
        f"{_FUSED_MOE}.router.routing_simulator_router",
        "RoutingSimulator",
        "vLLM's own place for routing that a benchmark prescribes",
        ("register_strategy",),
    ),
}


def borrow(name: str) -> Any:
    """Import and return a name of ``BORROWED``, with the value that it has now: some are environment variables.

    Raises:
        ImportError: the installed vLLM does not have it.
    """
    entry = BORROWED[name]
    try:
        return getattr(importlib.import_module(entry.module), entry.attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"vllm-hlwq needs {entry.module}.{entry.attribute} ({entry.reason}), which the installed vLLM lacks; "
            f"install vLLM {OLDEST_CHECKED} to {NEWEST_CHECKED}"
        ) from error
