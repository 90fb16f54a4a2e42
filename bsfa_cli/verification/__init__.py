"""What `bsfa verify` measures: the kernel, every layer and head, and what comes out of the model."""

KIND, FORMAT = "bsfa verify", 1  # of its stored result
