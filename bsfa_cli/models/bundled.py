"""The models in the box, by name, and YaRN, by which one of them reads further than it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# Made by `python -m bsfa_cli.training`.
BUNDLED, BUNDLED_ID = Path(__file__).parent / "retrieval", "bsfa/retrieval-llama"
# Made by `python -m bsfa_cli.training.vision`, at up to FRAMES_TRAINED tokens.
FRAMES, FRAMES_ID = Path(__file__).parent / "frames", "bsfa/frames-llava"
FRAMES_2X_ID, FRAMES_TRAINED = "bsfa/frames-llava-2x", 65536


class Bundled(NamedTuple):
    """A folder in the box, and how many times further than it was trained the model is to read."""

    name: str
    folder: Path
    factor: int = 1

    def prepare(self, config) -> None:
        """Change the folder's configuration as the name asks."""
        if self.factor > 1:
            set_yarn(config.get_text_config(), self.factor, FRAMES_TRAINED)


MODELS = (Bundled(BUNDLED_ID, BUNDLED), Bundled(FRAMES_ID, FRAMES), Bundled(FRAMES_2X_ID, FRAMES, 2))


def find_bundled(name) -> Bundled | None:
    """The model in the box that MODEL names, the first one for None; None for all else."""
    return MODELS[0] if name is None else next((model for model in MODELS if model.name == name), None)


def set_yarn(config, factor: int, positions: int) -> None:
    """Let a language model's configuration take `factor` times the `positions` that it was trained for."""
    config.rope_parameters = dict(config.rope_parameters) | {
        "rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": positions,
    }  # fmt: skip
    config.max_position_embeddings = factor * positions
