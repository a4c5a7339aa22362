"""The fused ops in Triton: kernels and their launchers, one module per module of `bertfast.ops`.

Nothing here is imported before the triton backend is chosen, so that bertfast works where triton is not installed.
"""
