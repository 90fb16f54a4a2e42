"""Asking a model questions and counting what it answers, dense and sparse."""
