"""A scheduler that ends prefill chunks at query tiles: `--scheduler-cls bsfa_kernels.integrations.vllm.TileScheduler`.

A chunk that ends inside a query tile leaves that tile whole to no call, and all of its key tiles are kept. Nothing is
wrong then, only less is skipped. vLLM calls its schedulers' interface private: what is used of it is one method,
through which the size of every chunk passes.
"""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .options import Options, OptionsError
from .plan import round_to_tiles


class RoundsToTiles:
    """Before a scheduler of vLLM's in the order of bases."""

    def __init__(self, vllm_config, *arguments, **keywords):
        super().__init__(vllm_config, *arguments, **keywords)
        options = Options.of(vllm_config.additional_config)
        if options is not None:
            options.check_backend(vllm_config)
        config = vllm_config.scheduler_config
        # Chunks that something else has aligned stay as they are.
        aligned = self.need_mamba_block_aligned_split or config.disable_chunked_mm_input
        self.tile_rows = None if options is None or aligned else options.read().tile.rows

    def _reserve_prefill_lookahead(self, request, num_computed_tokens: int, num_new_tokens: int) -> int:
        if self.tile_rows is not None and num_new_tokens > 0:
            num_new_tokens = round_to_tiles(num_computed_tokens, num_new_tokens, request.num_tokens, self.tile_rows)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)


class AsyncTileScheduler(RoundsToTiles, AsyncScheduler):
    """In the place of vLLM's default."""


class SyncTileScheduler(RoundsToTiles, Scheduler):
    """In the place of the one that `--no-async-scheduling` takes."""


class TileScheduler:
    """The one of these two that the configuration asks for."""

    def __new__(cls, vllm_config, **arguments):
        if vllm_config.diffusion_config is not None:
            raise OptionsError("vLLM has schedulers of its own for diffusion models: leave out --scheduler-cls")
        if not hasattr(Scheduler, "_reserve_prefill_lookahead"):
            raise OptionsError("this vLLM's scheduler has another interface: leave out --scheduler-cls")
        asynchronous = vllm_config.scheduler_config.async_scheduling
        return (AsyncTileScheduler if asynchronous else SyncTileScheduler)(vllm_config, **arguments)
