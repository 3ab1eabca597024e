"""Reports on a model and a machine: backends, correctness and time."""
