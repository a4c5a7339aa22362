"""What the compilers make of the GPU kernels, without a GPU: `python -m benchmarks.static`.

Every Triton kernel is compiled ahead of time as BERT uses it (cases.py), just as its launcher would have it compiled
(capture.py, compilation.py), and the CUDA kernels are read from the module as it was built (cuda.py). What is in the
machine code (sass.py) has to pass the gates (gates.py), and must not have become more since the committed
baseline.jsonl (baseline.py).

TRITON_INTERPRET has to be unset: a process that interprets kernels cannot compile them.
"""
