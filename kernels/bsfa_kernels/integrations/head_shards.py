"""Which query heads a process of a tensor-parallel transformers model computes: the ones whose thresholds it needs.

Two layouts are plain. Where q_proj, k_proj and v_proj are all "colwise", process r of n has the r-th of n equal runs of
query heads and the same run of key-value heads, so that every group of query heads stays with its key-value head.
Where their outputs are gathered, or they are not divided at all, each process computes all heads. Anything else is
refused: thresholds on the wrong heads would drop the wrong tiles without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .modules import AttentionModule

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
DIVIDED = "colwise"
# Styles after which every process holds all of a projection's outputs, or that divide what comes after attention.
WHOLE = frozenset({
    None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "replicated_with_grad_allreduce",
})  # fmt: skip


def head_shards(model: nn.Module, modules: Mapping[str, AttentionModule]) -> dict[str, slice]:
    """{module path: this process's query heads}, slice(None) where it computes all of them.

    `modules` are those of `attention_modules(model)`. Raises ValueError, naming the module, for a layout that is not
    plain: other plans than "colwise", heads that do not divide, weights divided by something else than a plan.
    """
    return {path: _heads(model, module) for path, module in modules.items()}


def _heads(model: nn.Module, module: AttentionModule) -> slice:
    attention = model.get_submodule(module.path)
    plan = (model.tp_plan or {}) if (getattr(model, "_tp_size", None) or 1) > 1 else {}
    styles = {name: _style(f"{module.path}.{name}", plan) for name, _ in attention.named_children()}
    divided = {name: style for name, style in styles.items() if style not in WHOLE}
    qkv = {styles.get(name) for name in PROJECTIONS}
    if qkv == {DIVIDED}:
        return _run(attention, module)
    if qkv & {DIVIDED} or any(name != "o_proj" for name in divided):
        said = ", ".join(f"{name} {styles[name]!r}" for name in sorted({*divided, *PROJECTIONS} & set(styles)))
        raise ValueError(
            f"{module.path}: its tensor-parallel plan ({said}) is not q_proj, k_proj and v_proj all {DIVIDED!r} or all "
            "gathered, so which heads a process computes is not known; load the model without tp_plan"
        )
    if not plan and not _is_fsdp(model) and any(_mesh(getattr(attention, name, None)) for name in PROJECTIONS):
        raise ValueError(
            f"{module.path}: its weights are divided over processes, but not by a transformers tp_plan, so which heads "
            "a process computes is not known"
        )
    return slice(None)


def _run(attention: nn.Module, module: AttentionModule) -> slice:
    """The run of query heads of this process, where all three projections are divided by rows."""
    from torch.distributed.tensor import Shard

    weights = {name: getattr(attention, name).weight for name in PROJECTIONS}
    meshes = [_mesh(getattr(attention, name)) for name in PROJECTIONS]
    if not all(mesh is not None and mesh.ndim == 1 for mesh in meshes) or any(
        weight.placements != (Shard(0),) for weight in weights.values()
    ):
        raise ValueError(
            f"{module.path}: its projections are not divided by rows over one group of processes (quantised, or "
            "divided twice), so which heads a process computes is not known"
        )
    processes, rank = meshes[0].size(), meshes[0].get_local_rank()
    if module.query_heads % processes or module.kv_heads % processes:
        raise ValueError(
            f"{module.path}: {module.query_heads} query and {module.kv_heads} key-value heads do not divide over "
            f"{processes} processes"
        )
    heads = module.query_heads // processes
    return slice(rank * heads, (rank + 1) * heads)


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """The plan's style for a module; transformers writes `*` for the numbers of layers."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _mesh(projection: nn.Module | None):
    """The processes that a projection's weight is divided over; None for a plain one."""
    return getattr(getattr(projection, "weight", None), "device_mesh", None)


def _is_fsdp(model: nn.Module) -> bool:
    """Whether weights are gathered before they are used, so that every process computes all heads."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
