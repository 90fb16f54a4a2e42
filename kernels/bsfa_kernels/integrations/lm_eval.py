"""lm-evaluation-harness with thresholds: its model `bsfa` is its own `hf`, run at an operating point.

    python -m bsfa_kernels.integrations.lm_eval run --model bsfa --tasks TASKS --batch_size 1 \\
        --model_args pretrained=FOLDER,thresholds=thresholds.safetensors,point=skip-50

Everything else is the harness's own. Without `thresholds` every tile is kept. With a batch size above 1 the harness
pads without a mask, and padding then takes part in the gates' votes.
"""

from __future__ import annotations

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .transformers import NAME, apply


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


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
