"""attn_implementation="bsfa" for Hugging Face transformers 5.

    import bsfa_kernels.integrations.transformers as bsfa      # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="bsfa")
    bsfa.apply(model, "thresholds.safetensors", count=True)    # without it every tile is kept: exact attention
    ...
    bsfa.skip_rate(model), bsfa.notes(model)
    bsfa.remove(model)

Prefill goes through `block_sparse_attention`; what a call runs otherwise, all of it exact, is decided in plan.py, and
`notes(model)` says where and why. What a module does is kept on that module, so that a copied or pickled model keeps
its thresholds, and copies have buffers of their own.

A mask, an argument or a keyword that is not known here is refused: models hand over selections and biases by keyword.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import dense
from .groups import exact_attention
from .head_shards import head_shards
from .identity import model_identity
from .masks import SpanMask, decode, mask_function, visible
from .modules import AttentionModule, attends, attention_modules, most_positions, named_modules, unwrapped
from .plan import LONG, NO_THRESHOLDS, Call, Route, Step, plan
from .sparse import SparseAttention

if TYPE_CHECKING:
    from ..thresholds import Thresholds

__all__ = [
    "AttentionModule",
    "DenseFallback",
    "Handler",
    "Note",
    "SparseAttention",
    "apply",
    "attach",
    "attention_modules",
    "model_identity",
    "notes",
    "remove",
    "skip_rate",
]

NAME = "bsfa"
# Keywords that models pass on to attention and that change nothing in it: what a mask says already, what is returned
# besides, and what only other implementations read.
IGNORED = frozenset({
    "sliding_window", "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits",
    "return_dict", "logits_to_keep", "labels", "num_items_in_batch", "deterministic", "encoder_hidden_states",
})  # fmt: skip
SELECTIONS = frozenset({"indices", "block_indices"})
# Where packed sequences begin: nothing new beside a mask that keeps them apart, as position_ids make one.
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


class Handler(Protocol):
    """What an attention module calls on prefill instead of attending with every tile kept. What else the planner may
    ask of it: plan.Gated.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        causal: bool,
        spans: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], Dv at most D, spans as in `block_sparse_attention`
        (None: both start at position 0, no padding); returns [B, Hq, Tq, Dv] in the dtype of q. A handler that says
        `knows_scoring` is given `window`, `softcap` and `sinks` besides where a module has them, as in
        `block_sparse_attention`, and `groups` (groups.py) where rows see one another both ways.
        """
        ...


class Note(NamedTuple):
    """A module of which a call was judged by no gate, and why; or ran other scores than its thresholds are for."""

    path: str
    reason: str
    route: str  # what ran instead, a value of plan.Route
    expected: bool  # by the call (decoding, a short chunk) or by what was asked for, see plan.Step


class DenseFallback(UserWarning):
    """Raised as a warning, once per reason, when a module asked to run bsfa cannot."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Registered with transformers' AttentionInterface; its signature and calls are transformers'.

    query [B, Hq, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv]; `attention_mask` from `masks.mask_function` or
    the user's own [B, 1 or Hq, Tq, Tk], bool or additive. Returns [B, Tq, Hq, Dv] and no attention weights. Raises
    ValueError for training, dropout, position biases, output_attentions, other masks and every keyword that is not
    known.
    """
    masked = attention_mask is not None and not isinstance(attention_mask, SpanMask)
    _refuse(module, dropout, {k: v for k, v in kwargs.items() if not (masked and k in PACKED)})
    if module.training and query.requires_grad:
        raise ValueError("attn_implementation='bsfa' has no backward pass: train with 'sdpa', or call model.eval()")
    plain = attention_mask is None and is_causal is False and softcap is None and s_aux is None
    if plain and query.shape[2] < LONG and _never_judged(module) and key.shape[-1] == value.shape[-1]:
        # As plan() decides for all of them. Vision towers make tens of thousands, one for every window.
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return dense.library(query, key, value, scale=scale, causal=False).transpose(1, 2).contiguous(), None
    query, key, value = _autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    s_aux = s_aux.to_local() if hasattr(s_aux, "to_local") else s_aux  # divided as the heads are
    spans = mask = window = groups = None
    if isinstance(attention_mask, SpanMask):
        spans, (causal, window), groups = decode(attention_mask)
        spans = None if spans is None else spans.to(query.device).contiguous()
    elif masked:
        mask = visible(attention_mask)
        causal = False
    elif query.shape[2] == 1:
        causal = False
    elif causal and key.shape[2] > query.shape[2]:
        # Nobody asked for a mask: queries start at position 0, later keys are an empty static cache.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]

    handler = active(module)
    call = Call(
        query, key, value, causal, spans is not None, mask is not None, window, softcap, s_aux is not None,
        groups is not None,
    )  # fmt: skip
    step = plan(call, handler)
    if step.reason is not None:
        _note(module, step)
    elif step.route is Route.GATED and (override := getattr(handler, "override", None)):
        _note(module, step._replace(reason=override))
    if step.route in (Route.GATED, Route.KEPT):
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        run = handler if step.route is Route.GATED else keep_every_tile
        named = {"window": window, "softcap": softcap, "sinks": s_aux, "groups": groups}
        scoring = {name: each for name, each in named.items() if each is not None}
        out = run(query, key, value, scale=scale, causal=causal, spans=spans, **scoring)
    elif step.route is Route.LIBRARY:
        out = dense.library(query, key, value, scale=scale, causal=causal)
    else:
        out = dense.attention(
            query, key, value, scale=scale, causal=causal, spans=spans, window=window, softcap=softcap, sinks=s_aux,
            mask=mask, groups=groups,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def keep_every_tile(q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring) -> torch.Tensor:
    """Exact attention on our own kernel: the only one that knows where each sequence stands, and sinks and softcap."""
    return exact_attention(q, k, v, scale=scale, causal=causal, spans=spans, **scoring).out


def _refuse(module: nn.Module, dropout: float, keywords: dict) -> None:
    if dropout:
        raise ValueError(
            f"attn_implementation='bsfa' has no attention dropout (got {dropout}); call model.eval() or set "
            "attention_dropout to 0"
        )
    for name, value in keywords.items():
        if value is None or name in IGNORED or (name == "output_attentions" and not value):
            continue
        if name == "position_bias":
            raise ValueError("attn_implementation='bsfa' does not support position biases; use 'sdpa' for this model")
        if name == "output_attentions":
            raise ValueError(
                "attn_implementation='bsfa' never forms attention weights; use 'eager' for output_attentions"
            )
        what = "selects keys by" if name in SELECTIONS else "passes to attention"
        raise ValueError(
            f"{type(module).__name__} {what} {name!r}, which attn_implementation='bsfa' does not know; use 'eager' or "
            "'sdpa' for this model"
        )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that an enclosing torch.autocast asks for, as PyTorch's own attention takes them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _never_judged(module: nn.Module) -> bool:
    """Whether no handler is on `module`, and a call of it was noted for that already."""
    state = vars(module)
    return "bsfa_handlers" not in state and NO_THRESHOLDS in state.get("bsfa_notes", ())


def _note(module: nn.Module, step: Step) -> None:
    if torch.compiler.is_compiling():
        return
    noted = vars(module).setdefault("bsfa_notes", {})
    if step.reason in noted:
        return
    noted[step.reason] = step
    if not step.expected:
        warnings.warn(f"bsfa: some layers run dense: {step.reason}", DenseFallback, stacklevel=4)


def notes(model: nn.Module) -> list[Note]:
    """Every module of `model` that made a call which no gate judged so far, or with other scores than its thresholds
    are for: what ran instead and why. Compiled forward passes leave no notes.
    """
    return [
        Note(path, step.reason, step.route.value, step.expected)
        for path, module in named_modules(model)
        for step in vars(module).get("bsfa_notes", {}).values()
    ]


def skip_rate(model: nn.Module) -> float | None:
    """Share of the tiles that gates of `model` may drop which they dropped, over all calls since `apply(count=True)` or
    since the counters were reset; None where nothing was counted. Waits for the device.
    """
    handlers = [active(module) for _, module in named_modules(model)]
    counts = [handler.counts for handler in handlers if getattr(handler, "counts", None) is not None]
    kept, candidates = (sum(int(count[i].sum()) for count in counts) for i in range(2))
    return 1 - kept / candidates if candidates else None


def active(module: nn.Module) -> Handler | None:
    """The handler that was put on `module` last."""
    handlers = getattr(module, "bsfa_handlers", None)
    return handlers[-1][1] if handlers else None


class Attachment:
    """Handlers in place on a model's modules; `detach()`, or leaving the `with` block, takes these off and no others,
    in whatever order attachments go. With the last one goes the attention implementation that `apply` chose.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.hooks: list = []  # of what handlers need to know of a forward pass, see visual_tokens.py

    def detach(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        _take_off(self.model, lambda attachment: attachment is self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_) -> None:
        self.detach()


def attach(model: nn.Module, handlers: Mapping[str, Handler]) -> Attachment:
    """Put `handlers` {module path: handler} on the attention modules of `model`, at once; the last one put on a module
    is the one that runs.

    Raises ValueError for a path that is no attention module, or one that would never call its handler because it runs
    another attention implementation.
    """
    model = unwrapped(model)
    modules = dict(named_modules(model))
    for path in handlers:
        if path not in modules or not attends(modules[path]):
            raise ValueError(f"{type(model).__name__} has no attention module {path!r}")
        implementation = modules[path].config._attn_implementation
        if implementation != NAME:
            raise ValueError(f"module {path!r} runs attn_implementation={implementation!r}, not 'bsfa'")
    attachment = Attachment(model)
    visual = {id(each): each for handler in handlers.values() if (each := getattr(handler, "visual", None)) is not None}
    for each in visual.values():
        attachment.hooks += each.watch(model)
    for path, handler in handlers.items():
        # A new list each time: forward passes that run meanwhile keep theirs.
        vars(modules[path])["bsfa_handlers"] = [*vars(modules[path]).get("bsfa_handlers", ()), (attachment, handler)]
    return attachment


def apply(
    model: nn.Module,
    thresholds: str | os.PathLike | Thresholds,
    point: str | None = None,
    *,
    count: bool = False,
    longest: int | None = None,
    scores: str | None = None,
) -> Attachment:
    """Run `model` with the operating point `point` of a thresholds file (None: its only or default point).

    Sets attn_implementation="bsfa" where the model runs another, until the last attachment is gone. `count` keeps
    kept/candidate tile counts on each handler, see `skip_rate`. Buffers are made for sequences up to `longest`
    positions (None: the model's own maximum) and do not move afterwards, so that calls can be captured in CUDA graphs.
    `scores`, "exact" or "int8", override those that the point was made for, and `notes` says so; a GPU without a kernel
    for int8 scores runs exact ones, and `notes` says so too.

    Of a tensor-parallel model (transformers' `tp_plan`) each process takes the thresholds of the heads it computes, and
    counts its own tiles.

    Raises ThresholdsError for a bad file, an unknown point, and, naming the field, a file made for another model:
    configuration and weights are compared, the weights by `identity.fingerprint` and only where it can be taken (not
    of sharded or quantised parameters). Raises ValueError where it is not plain which heads a process computes.
    """
    from ..thresholds import Thresholds

    model = unwrapped(model)
    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.read(thresholds)
    thresholds.check_model(model_identity(model))
    modules = attention_modules(model)
    if longest is None:
        longest = most_positions(model.config)
    shards = head_shards(model, modules)
    handlers = SparseAttention.for_model(
        thresholds, modules, point, shards, count=count, longest=longest, scores=scores
    )  # fmt: skip
    former = {}
    if all(model.get_submodule(path).config._attn_implementation != NAME for path in modules):
        former = _implementations(model)
        model.set_attn_implementation(NAME)
    try:
        attachment = attach(model, handlers)
    except ValueError:
        _restore(former)
        raise
    vars(model).setdefault("bsfa_former", former)
    return attachment


def remove(model: nn.Module) -> None:
    """Take every handler off `model`, whoever put it there, and give it back the attention implementation that it had
    before `apply` chose one. What was never applied may be removed.
    """
    model = unwrapped(model)
    for attachment in {entry[0] for module in model.modules() for entry in vars(module).get("bsfa_handlers", ())}:
        attachment.detach()
    _take_off(model, lambda attachment: True)


def _take_off(model: nn.Module, wanted) -> None:
    left = False
    for module in model.modules():
        if "bsfa_handlers" not in vars(module):
            continue
        kept = [entry for entry in module.bsfa_handlers if not wanted(entry[0])]
        if kept:
            vars(module)["bsfa_handlers"] = kept
        else:
            del vars(module)["bsfa_handlers"]
        left = left or bool(kept)
    if not left:
        _restore(vars(model).pop("bsfa_former", {}))


def _implementations(model: nn.Module) -> dict:
    """{configuration: the attention implementation it names} of all configurations in `model`."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    configs += [getattr(config, name, None) for config in configs for name in getattr(config, "sub_configs", ())]
    return {id(config): (config, config._attn_implementation) for config in configs if config is not None}


def _restore(former: dict) -> None:
    for config, implementation in former.values():
        if config._attn_implementation == NAME:  # and not what somebody chose since
            config._attn_implementation_internal = implementation


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_function)
