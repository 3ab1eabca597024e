"""Triton kernels: channels-last tensors in, channels-last tensors out.

Nothing here is imported until a kernel is to run, so that Triton is only needed where it is used;
`support` alone can be imported anywhere, and says whether the others can.
"""
