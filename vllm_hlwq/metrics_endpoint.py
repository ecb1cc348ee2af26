"""The API server's side of the metrics: what workers publish on vLLM's own /metrics and in its periodic log line.

vLLM drops collectors whose ``_name`` begins with ``vllm:`` when it registers its own. Prometheus's collector of files
has no such attribute and stays. A plugin in the group ``vllm.stat_logger_plugins`` could register later, but where one
is installed vLLM keeps statistics even for those who turn them off (``--disable-log-stats``), and with the cache off.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector

from .metrics import H2D_BYTES, HITS, QUERIES
from .metrics_files import MULTIPROCESS_VARIABLE, create_folder
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")

_PERIODIC_LINE = re.compile(r"(?:Engine (\d+)|\d+ Engines Aggregated): Avg prompt throughput")
_registered: list[MultiProcessCollector] = []

_GENERATED = "vllm:generation_tokens_total"
_PROMPT = "vllm:prompt_tokens_by_source_total"


def expose(vllm_config: Any) -> None:
    """Prepare for the metrics of an engine that is about to start; in the process that configures it.

    In a process with several engines the newest has /metrics, as it is with vLLM's own metrics.
    """
    parallel = vllm_config.parallel_config
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return  # one of several API servers: the process that started it and the engine has prepared
    folder = create_folder(vllm_config)
    _warn_of_other_machines(parallel)
    if folder.is_symlink():
        logger.debug("Expert cache metrics go to the folder that %s names", MULTIPROCESS_VARIABLE)
    else:
        while _registered:
            REGISTRY.unregister(_registered.pop())
        _registered.append(MultiProcessCollector(None, path=str(folder)))
        REGISTRY.register(_registered[0])
    _extend_log_line(folder)


def _warn_of_other_machines(parallel: Any) -> None:
    elsewhere = parallel.data_parallel_size_local < parallel.data_parallel_size
    if parallel.nnodes > 1 or elsewhere or parallel.distributed_executor_backend == "ray":
        logger.warning("Expert cache metrics on /metrics cover only the workers on this machine")


def _extend_log_line(folder: Path) -> None:
    line_logger = logging.getLogger(borrow("LoggingStatLogger").__module__)
    for present in list(line_logger.filters):
        if isinstance(present, HitRateOnLogLine):
            line_logger.removeFilter(present)
    line_logger.addFilter(HitRateOnLogLine(folder))


class HitRateOnLogLine(logging.Filter):
    """Appends hit rate and bytes per token, since the last such line, to vLLM's periodic line of an engine.

    Tokens are those that went through the layers: computed prompt tokens, and generated ones.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._cache = MultiProcessCollector(None, path=str(folder))
        self._before: dict[str | None, Counter[str]] = defaultdict(Counter)

    def filter(self, record: logging.LogRecord) -> bool:
        line = _PERIODIC_LINE.match(str(record.msg))
        if line is None:
            return True
        engine = None if line[1] is None else str(int(line[1]))
        now = self._totals(engine)
        since = Counter(now)
        since.subtract(self._before[engine])
        self._before[engine] = now
        if since["queries"] > 0:
            record.msg += ", Expert cache hit rate: %.1f%%"
            record.args = (*_positional(record.args), 100 * since["hits"] / since["queries"])
            if since["tokens"] > 0:
                record.msg += ", %.2f MB/token"
                record.args += (since["bytes"] / since["tokens"] / 1e6,)
        return True

    def _totals(self, engine: str | None) -> Counter[str]:
        of_cache = {QUERIES.exposed_name: "queries", HITS.exposed_name: "hits", H2D_BYTES.exposed_name: "bytes"}
        totals: Counter[str] = Counter()
        for metric in self._cache.collect():
            for sample in metric.samples:
                if sample.name in of_cache and engine in (None, sample.labels["engine"]):
                    totals[of_cache[sample.name]] += int(sample.value)
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                generated = sample.name == _GENERATED
                computed = sample.name == _PROMPT and sample.labels["source"] == "local_compute"
                if (generated or computed) and engine in (None, sample.labels["engine"]):
                    totals["tokens"] += int(sample.value)
        return totals


def _positional(args: Any) -> tuple[object, ...]:
    return args if isinstance(args, tuple) else (args,)
