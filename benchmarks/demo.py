"""The demonstration: a real all-MiniLM-L6-v2 embeds real text, with and without bertfast.

    python -m benchmarks.demo

Prints how far the two differ and how much faster the patched model is, from interleaved runs. Exits with 1 where the
embeddings are not the same to float32 precision.
"""

import copy
import sys

import torch
from sentence_transformers import SentenceTransformer

import bertfast
from benchmarks.workloads import minilm_folder
from bertfast import measure, texts

SENTENCES = 256
BATCH = 64
ROUNDS = 7
TOLERANCE = 2e-5


def main() -> int:
    """Embed, compare, time; returns the exit code."""
    sentences = texts.sentences(SENTENCES)
    stock = SentenceTransformer(str(minilm_folder()), device="cpu")
    patched = bertfast.patch(copy.deepcopy(stock))
    print(f"all-MiniLM-L6-v2, {SENTENCES} texts of Python's own documentation, batches of {BATCH}, such as:")
    print(f"  {min(sentences[:20], key=len)!r}\n")

    def embed(model: SentenceTransformer) -> torch.Tensor:
        return torch.from_numpy(model.encode(sentences, batch_size=BATCH, show_progress_bar=False))

    a, b = embed(stock), embed(patched)
    difference = (a - b).abs().max().item()
    cosine = torch.cosine_similarity(a.double(), b.double()).min().item()
    verdict = "the same" if difference <= TOLERANCE else "NOT THE SAME"
    print(f"embeddings   {verdict}: largest difference {difference:.1e}, smallest cosine {cosine:.8f}")

    calls = {"stock": lambda: embed(stock), "bertfast": lambda: embed(patched)}
    times = measure.interleave(calls, rounds=ROUNDS)
    for name, seconds in times.items():
        print(f"{name:12} {SENTENCES / measure.Summary.of(seconds).median:6.0f} sentences/s")
    ratio = measure.Ratio.of(times["stock"], times["bertfast"])
    print(
        f"speed-up     {ratio.value:.2f} times ({ratio.low:.2f} to {ratio.high:.2f}), {ROUNDS} interleaved rounds, "
        f"{torch.get_num_threads()} threads\n"
    )
    print(bertfast.explain(patched))
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
