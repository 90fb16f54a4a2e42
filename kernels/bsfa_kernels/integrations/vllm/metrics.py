"""The counts of all ranks on this machine as Prometheus metrics, on the server's own /metrics.

    vllm:bsfa_candidate_tiles_total{layer, rank}     tiles that a gate might have dropped
    vllm:bsfa_kept_tiles_total{layer, rank}          of these, kept
    vllm:bsfa_passed_prefills_total{layer, reason, rank}   sequences that vLLM's own kernel served, and why

vLLM's stat logger plug-ins live in the server's process and may register what they like; counts come from the workers
by way of files (counters.py). With several API servers vLLM's registry takes no collectors, and only the log has them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from vllm.v1.metrics.loggers import StatLoggerBase

from .counters import folder
from .options import Options


class Collector:
    """Reads the workers' files whenever the metrics are asked for."""

    def __init__(self, place: Path):
        self.place = place

    def describe(self) -> list:
        return []  # nothing is read when it is registered

    def collect(self) -> Iterator[CounterMetricFamily]:
        candidates, kept, passed = Counter(), Counter(), Counter()
        for counts in read(self.place):  # replicas of the model add up
            rank = str(counts["rank"])
            for layer, (k, c) in counts["tiles"].items():
                candidates[layer, rank] += c
                kept[layer, rank] += k
            for layer, reason, count in counts["passed"]:
                passed[layer, reason, rank] += count
        yield family("candidate_tiles", "Tiles that a gate might have dropped", ("layer", "rank"), candidates)
        yield family("kept_tiles", "Of these, kept", ("layer", "rank"), kept)
        yield family("passed_prefills", "Sequences that vLLM's kernel served", ("layer", "reason", "rank"), passed)


def family(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple, int]) -> CounterMetricFamily:
    found = CounterMetricFamily(f"vllm:bsfa_{name}", text, labels=labels)
    for key, value in values.items():
        found.add_metric(key, value)
    return found


def read(place: Path) -> Iterator[dict]:
    """The counts in a folder of this user's own."""
    try:
        if place.stat().st_uid != os.getuid():
            return
        files = sorted(place.glob("rank-*.json"))
    except FileNotFoundError:
        return
    for file in files:
        try:
            yield json.loads(file.read_text())
        except FileNotFoundError:  # its process has just ended
            continue


class Metrics(StatLoggerBase):
    """vLLM's stat logger plug-in: it only brings the collector into the server's process."""

    def __init__(self, vllm_config, engine_index: int = 0):
        self.collector = None
        options = Options.of(vllm_config.additional_config)
        if options is None:
            return
        options.check_backend(vllm_config)
        if options.log_every and engine_index == 0:
            self.collector = Collector(folder(vllm_config.instance_id))
            REGISTRY.register(self.collector)
            # Workers are often ended by a signal, without a chance to tidy up.
            atexit.register(shutil.rmtree, self.collector.place, ignore_errors=True)

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass
