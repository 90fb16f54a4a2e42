"""lm-evaluation-harness with thresholds: its own command line, at an operating point.

    python -m bsfa_kernels.integrations.lm_eval run --model bsfa --tasks TASKS --batch_size 1 \\
        --model_args pretrained=FOLDER,thresholds=thresholds.safetensors,point=skip-50

    BSFA_THRESHOLDS=thresholds.safetensors BSFA_POINT=skip-50 \\
    python -m bsfa_kernels.integrations.lm_eval run --model hf --tasks TASKS --batch_size 1 \\
        --model_args pretrained=FOLDER,attn_implementation=bsfa

Its model `bsfa` is its own `hf` with the arguments `thresholds` and `point`; `hf` itself takes them from the
environment. Without thresholds every tile is kept. When the tasks are done, stderr has the skip rate. With a batch size
above 1 the harness pads without a mask, and padding then takes part in the gates' votes.
"""

from __future__ import annotations

import os
import sys
from functools import wraps

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .transformers import NAME, Attachment, apply, skip_rate

THRESHOLDS, POINT = "BSFA_THRESHOLDS", "BSFA_POINT"


@register_model("bsfa")
class SparseLM(HFLM):
    """The harness's `hf`, with attn_implementation="bsfa" and a thresholds file."""

    def __init__(
        self, *arguments, thresholds: str | None = None, point: str | None = None, scores: str | None = None, **options
    ):
        """Raises ThresholdsError as `apply`, and whatever the harness raises."""
        super().__init__(*arguments, attn_implementation=NAME, **options)
        self.attachment = (
            None if thresholds is None else apply(self.model, thresholds, point, count=True, scores=scores)
        )


def apply_environment(model: torch.nn.Module) -> Attachment | None:
    """`apply` what BSFA_THRESHOLDS and BSFA_POINT name; None where they are not set.

    Raises ValueError for a model that would run without them: one with another attention implementation. Raises
    ThresholdsError as `apply`.
    """
    thresholds, point = os.environ.get(THRESHOLDS), os.environ.get(POINT)
    if not thresholds:
        if point:
            raise ValueError(f"{POINT} is set and {THRESHOLDS} is not: a point of which file?")
        return None
    implementation = model.config.get_text_config()._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f"{THRESHOLDS} is set and the model runs attn_implementation={implementation!r}; give "
            f"attn_implementation={NAME}, or unset it"
        )
    return apply(model, thresholds, point or None, count=True)


def main() -> None:
    """The harness's command line, in which every model it creates gets the environment's thresholds."""
    from lm_eval.__main__ import cli_evaluate

    create, models = HFLM._create_model, []

    @wraps(create)
    def created(self, *arguments, **options):
        create(self, *arguments, **options)
        if not isinstance(self, SparseLM):
            apply_environment(self.model)
        elif os.environ.get(THRESHOLDS):
            raise ValueError(f"the model bsfa takes thresholds=FILE in --model_args; unset {THRESHOLDS}, or use hf")
        models.append(self.model)

    HFLM._create_model = created
    try:
        cli_evaluate()
    finally:
        HFLM._create_model = create
    for model in models:
        rate = skip_rate(model)
        skipped = None if rate is None else f"{rate:.1%} of the tiles a gate may drop were skipped"
        print(f"bsfa: {skipped or 'nothing was counted: every tile was kept'}", file=sys.stderr)


if __name__ == "__main__":
    main()
