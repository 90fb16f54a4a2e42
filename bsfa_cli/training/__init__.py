"""How the bundled model was trained: python -m bsfa_cli.training --minutes 8 --out DIR (one GPU)."""
