"""python -m bsfa_cli.experiments.positions --length 131072 --out FILE.json

How far the bundled vision-language model reads under other settings of its rotary positions: exact answers of the dense
model to the same questions under each of SETTINGS. It was trained at up to 65,536 tokens; what `bsfa/frames-llava-2x`
is set to was chosen by this. No tile is skipped here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ..data import frame_tasks
from ..data.amount import check_amount
from ..data.frame_questions import FramePlan
from ..environment import describe, resolve_device
from ..errors import UsageError
from ..files import check_writable, write_json
from ..models.bundled import FRAMES, FRAMES_2X_ID, FRAMES_ID, FRAMES_TRAINED
from ..models.load import load_model
from ..suites.run import Examiner
from . import end

BASE = 1e7  # of the model's rotary embedding, as trained
BUNDLED = "as in the box"  # YaRN as `bsfa/frames-llava-2x` has it
WHAT = (
    "Exact answers (1: every token right) of bsfa/frames-llava, dense, to the same questions under other settings of "
    "its rotary positions: python -m bsfa_cli.experiments.positions"
)


def yarn(factor: float, attention: float) -> dict:
    """rope_parameters of YaRN (arXiv 2309.00071); `attention` scales its cosines and sines."""
    return {
        "rope_type": "yarn", "rope_theta": BASE, "factor": factor, "attention_factor": attention,
        "original_max_position_embeddings": FRAMES_TRAINED,
    }  # fmt: skip


SETTINGS = {
    "default": {"rope_type": "default", "rope_theta": BASE},
    "linear2": {"rope_type": "linear", "rope_theta": BASE, "factor": 2.0},
    **{f"yarn2 attention {scale}": yarn(2.0, scale) for scale in (1.0, 1.04, 1.08, 1.12, 1.2)},
    **{f"yarn1 attention {scale}": yarn(1.0, scale) for scale in (1.04, 1.08, 1.12, 1.2)},
    **{f"theta {theta:g}": {"rope_type": "default", "rope_theta": theta} for theta in (2e7, 4e7)},
}


def examiners(settings: dict[str, dict], device: torch.device) -> dict[str, Examiner]:
    """The model under each of `settings`, and under BUNDLED as the box has it with YaRN; PyTorch's attention."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, parameters) in enumerate(settings.items()):
            place = Path(folder) / str(index)
            shutil.copytree(FRAMES, place)
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            config["text_config"]["rope_parameters"] = parameters
            (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
            found[name] = _examiner(place, device)
    return found | {BUNDLED: _examiner(FRAMES_2X_ID, device)}


def _examiner(name: Path | str, device: torch.device) -> Examiner:
    loaded = load_model(name, device=device, attn_implementation="sdpa")
    return Examiner(loaded.model, loaded.tokenizer)


def answers(found: dict[str, Examiner], plan: FramePlan) -> dict[str, dict[str, list[float]]]:
    """{setting: {task: [1.0 where right, ...]}}, every question of `plan` to each."""
    exact = {name: {task: [] for task in plan.tasks} for name in found}
    tokenizer = next(iter(found.values())).tokenizer
    for question in plan.questions_for(tokenizer):
        for name, examiner in found.items():
            exact[name][question.task].append(float(examiner.ask(question).exact))
    return exact


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.positions", description=__doc__)
    parser.add_argument("--length", type=int, default=131072, help="tokens (default: 131072)")
    parser.add_argument("--questions", type=int, default=8, help="questions a task (default: 8)")
    parser.add_argument("--ask-at", type=float, default=0.7, help="share of the text before a question (default: 0.7)")
    parser.add_argument("--seed", type=int, default=7, help="of the questions (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    if options.questions < 1:
        raise UsageError(f"--questions must be 1 or more, got {options.questions}")
    if options.length > 2 * FRAMES_TRAINED:
        raise UsageError(f"{FRAMES_2X_ID} reads up to {2 * FRAMES_TRAINED} tokens, got --length {options.length}")
    check_amount(options.questions, options.length, "--questions")
    check_writable(options.out)
    device = resolve_device(options.device)
    plan = FramePlan(tuple(frame_tasks.NAMES), (options.length,), options.questions, options.seed, True, options.ask_at)
    exact = answers(examiners(SETTINGS, device), plan)
    for name, tasks in exact.items():
        right = [mark for marks in tasks.values() for mark in marks]
        print(f"{name}: {sum(right) / len(right):.3f} of {len(right)}", file=sys.stderr)
    write_json(options.out, {
        "what": WHAT, "model": FRAMES_ID, "length": options.length, "asked_at": options.ask_at, "seed": options.seed,
        "environment": describe(str(device)), "settings": SETTINGS, "answers": exact,
    })  # fmt: skip
    print(f"written: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end("positions", main)
