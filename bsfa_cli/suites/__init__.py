"""Retrieval tasks: what `bsfa verify --tasks` asks a model and what the bundled model was trained on."""
