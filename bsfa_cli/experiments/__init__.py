"""Measurements of the project itself, stored under profiles/results/."""
