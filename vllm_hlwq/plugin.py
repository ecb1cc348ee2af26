"""vLLM's entry point: adds the expert-cache flags to the command line and checks the finished configuration.

``register`` runs in every vLLM process and may run more than once. It touches ``EngineArgs`` and vLLM's names of
quantisations only: the layer is put in place by our worker, which is only chosen when the cache is on, so that off is
stock vLLM. Who names our benchmark routing in vLLM's own variable for simulated routing gets that registered too.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from pydantic import ValidationError

from .errors import CheckpointError, ExpertCacheError
from .hlwq_engine import choose_loader, configuring, register_quant_methods
from .options import AUTO, ExpertCacheOptions, config_key, domain, flag
from .vllm_compat import borrow

WORKER = "vllm_hlwq.worker.ExpertCacheWorker"
ROUTING_VARIABLE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
_FROM_COMMAND_LINE = "_expert_cache_from_command_line"


def register() -> None:
    """Extend vLLM's engine arguments, once."""
    if os.environ.get(ROUTING_VARIABLE, "").startswith("measured_locality"):
        from .bench.routing import register_strategies

        register_strategies()
    engine_args = borrow("EngineArgs")
    if getattr(engine_args, "_expert_cache_flags", False):
        return
    engine_args._expert_cache_flags = True
    register_quant_methods()
    stock_add_cli_args = engine_args.add_cli_args
    stock_from_cli_args = engine_args.from_cli_args.__func__
    stock_create_engine_config = engine_args.create_engine_config

    def add_cli_args(parser: Any) -> Any:
        parser = stock_add_cli_args(parser)
        add_flags(parser)
        return parser

    def from_cli_args(cls: Any, arguments: argparse.Namespace) -> Any:
        made = stock_from_cli_args(cls, arguments)
        merge_flags(made, arguments)
        return made

    def create_engine_config(self: Any, *positional: Any, **named: Any) -> Any:
        try:
            with configuring(self):
                vllm_config = stock_create_engine_config(self, *positional, **named)
            choose_loader(vllm_config)
            configure(vllm_config)
            if vllm_config.parallel_config.worker_cls == WORKER and not self.disable_log_stats:
                from .metrics_endpoint import expose

                expose(vllm_config)
        except ValueError as error:
            ours = _own_error(error)
            if ours is None:
                raise
            if getattr(self, _FROM_COMMAND_LINE, False):
                raise SystemExit(f"vllm: error: {ours}") from None
            raise ours from None
        return vllm_config

    engine_args.add_cli_args = staticmethod(add_cli_args)
    engine_args.from_cli_args = classmethod(from_cli_args)
    engine_args.create_engine_config = create_engine_config


def _own_error(error: ValueError) -> ExpertCacheError | CheckpointError | None:
    """Our error, if that is what was raised, or what made pydantic refuse vLLM's configuration."""
    found = error
    if isinstance(error, ValidationError):
        found = error.errors()[0].get("ctx", {}).get("error", error)
    return found if isinstance(found, (ExpertCacheError, CheckpointError)) else None


def add_flags(parser: Any) -> None:
    """Add the expert-cache group to a parser; a vLLM that has the flags itself keeps its own."""
    if any(flag("cache_size") in action.option_strings for action in parser._actions):
        return
    group = parser.add_argument_group(
        title="ExpertCache", description="Expert cache for mixture-of-experts models (vllm-hlwq)."
    )
    for name, field in ExpertCacheOptions.model_fields.items():
        kind: dict[str, Any] = {"type": partial(_parse, name), "metavar": "N"}
        if field.annotation is bool:
            kind = {"action": "store_true"}
        elif isinstance(field.json_schema_extra, dict):
            kind = {"type": str, "metavar": field.json_schema_extra["metavar"]}
        group.add_argument(flag(name), default=None, help=f"{field.description} (default: {field.default})", **kind)


def merge_flags(engine_args: Any, arguments: argparse.Namespace) -> None:
    """Carry parsed flags into ``additional_config``.

    Raises:
        SystemExit: flag and ``--additional-config`` contradict each other.
    """
    setattr(engine_args, _FROM_COMMAND_LINE, True)
    additional = dict(engine_args.additional_config or {})
    for name in ExpertCacheOptions.model_fields:
        key = config_key(name)
        value = getattr(arguments, key, None)
        if value is None:
            continue
        if additional.get(key, value) != value:
            raise SystemExit(
                f"vllm: error: {flag(name)} {value} contradicts --additional-config, which has "
                f"{key}={additional[key]!r}; give one of them"
            )
        additional[key] = value
    engine_args.additional_config = additional


def configure(vllm_config: Any) -> None:
    """Check the configuration and choose our worker, if the cache is on.

    Raises:
        ExpertCacheError: an option is unusable or cannot be combined with the rest.
    """
    options = ExpertCacheOptions.from_additional_config(vllm_config.additional_config)
    if options.without_meaning is not None:
        raise ExpertCacheError(options.without_meaning)
    if options.cache_size == 0:
        return
    from .checks import check_engine_config

    check_engine_config(vllm_config, options)
    vllm_config.parallel_config.worker_cls = WORKER


def _parse(name: str, text: str) -> int | str:
    if name == "cache_size" and text == AUTO:
        return AUTO
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {domain(name)}")
    return value
