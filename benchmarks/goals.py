"""What a release has to reach on a CPU: the least speed-up over Hugging Face's sdpa in the same precision."""

PEER = "bertfast"
GOALS = {
    ("1x16", "base", "float32"): 2.4,
    ("1x128", "base", "float32"): 1.5,
    ("8x128", "base", "float32"): 1.2,
    ("32x128 ragged", "base", "float32"): 2.9,
    ("64 sentences", "minilm", "float32"): 3.5,
    ("1x16", "base", "bfloat16"): 1.5,
    ("1x128", "base", "bfloat16"): 1.3,
    ("8x128", "base", "bfloat16"): 1.15,
    ("32x128 ragged", "base", "bfloat16"): 2.6,
    ("pretrain 8x128", "base", "float32"): 1.3,
    ("pretrain 8x128", "base", "bfloat16"): 1.3,
    ("pretrain 32x128 ragged", "base", "float32"): 2.8,
    ("pretrain 32x128 ragged", "base", "bfloat16"): 2.8,
}
