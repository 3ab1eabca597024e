"""A folder for each backend, the self-check of kernels, and the choices that were measured."""
