"""What int8 does to a real model's answers: `bertfast.quantize` on all-MiniLM-L6-v2, and retrieval with its embeddings.

    python -m benchmarks.quantization [--output FILE]

The texts are the standard library's documentation. `quantize` sees 512 sentences; all that is measured is of others.
Retrieval: in runs of five sentences the first is the query, the other four are documents. Each variant's ten best
documents of all are compared with float32's. Exits with 1 where a goal is missed.
"""

import argparse
import copy
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import bertfast
from benchmarks.results import Writer
from benchmarks.workloads import minilm_folder
from bertfast import machine, texts

GIVEN, QUERIES, RUN, TOP, BATCH = 512, 500, 5, 10, 64
WORDS = range(5, 61)
MEAN_COSINE, WORST_COSINE, SAME = 0.999, 0.995, 0.95
# Documents whose cosines differ by less are as good as one another; the median distance of the tenth from the eleventh
# is 0.004 in these texts.
TIE = 0.005
# Mean cosines that `quantize` is asked for, by what the variant is called.
VARIANTS = {"int8": 0.999, "int8, 0.9995": 0.9995}


class Texts(NamedTuple):
    """given: what `quantize` sees. Documents RUN - 1 times a query, in the order of the queries."""

    given: list[str]
    queries: list[str]
    documents: list[str]


def divide(draw: random.Random) -> Texts:
    """Texts of the standard library's documentation, none of them in two parts."""
    runs = []
    for document in texts.documents(texts.library()):
        fitting = [sentence for sentence in document.sentences if len(sentence.split()) in WORDS]
        runs += [fitting[i : i + RUN] for i in range(0, len(fitting) - RUN + 1, RUN)]
    draw.shuffle(runs)
    asked, rest = runs[:QUERIES], runs[QUERIES:]
    given = [sentence for run in rest for sentence in run]
    return Texts(draw.sample(given, GIVEN), [run[0] for run in asked], [s for run in asked for s in run[1:]])


def embed(model: SentenceTransformer, drawn: Texts) -> Tensor:
    """(queries + documents, hidden) float64, in this order."""
    both = [*drawn.queries, *drawn.documents]
    return torch.from_numpy(model.encode(both, batch_size=BATCH, show_progress_bar=False)).double()


def compare(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Cosines, and how the TOP best documents of each query differ.

    same_set, same_order, same_first: the share of queries. same_but_ties: the share whose every newcomer scores within
    TIE of the document in the last place, in float32. overlap: mean share of the best that are the same. own and
    own_exact: how many of the query's own documents are among the best, here and in float32. score_error: its root mean
    square.
    """
    cosines = torch.cosine_similarity(exact, found)
    scores, others = (e[:QUERIES] @ e[QUERIES:].T for e in (exact, found))
    best, best_found = scores.topk(TOP).indices, others.topk(TOP).indices
    common = (best[:, :, None] == best_found[:, None, :]).any(1).sum(1)
    last = scores.gather(1, best)[:, -1:]
    own = torch.arange(QUERIES)[:, None]
    return {
        "cosine": cosines.mean().item(),
        "worst_cosine": cosines.min().item(),
        "same_set": _share(common == TOP),
        "same_order": _share((best == best_found).all(1)),
        "same_first": _share(best[:, 0] == best_found[:, 0]),
        "same_but_ties": _share((scores.gather(1, best_found) >= last - TIE).all(1)),
        "overlap": (common / TOP).mean().item(),
        "own": (best_found // (RUN - 1) == own).sum(1).double().mean().item(),
        "own_exact": (best // (RUN - 1) == own).sum(1).double().mean().item(),
        "score_error": (others - scores).square().mean().sqrt().item(),
    }


def _share(holds: Tensor) -> float:
    return holds.double().mean().item()


def main(arguments: list[str] | None = None) -> int:
    """Quantise, embed, compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines to append to")
    options = parser.parse_args(arguments)
    drawn = divide(random.Random(0))
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    exact = embed(bertfast.patch(copy.deepcopy(model)), drawn)
    found: dict[str, dict[str, Any]] = {}
    if machine.has_bfloat16():
        found["bf16"] = compare(exact, embed(bertfast.patch(copy.deepcopy(model), compute="bf16"), drawn))
    for name, cosine in VARIANTS.items():
        quantised = copy.deepcopy(model)
        report = bertfast.quantize(quantised, drawn.given, min_cosine=cosine)
        print(f"{name}: {report}\n", flush=True)
        found[name] = compare(exact, embed(quantised, drawn)) | {"report": report.to_dict()}
    columns = [name for name, value in next(iter(found.values())).items() if isinstance(value, float)]
    print(f"{QUERIES} queries, {len(drawn.documents)} documents" + "".join(f"{name:>14}" for name in found))
    for column in columns:
        print(f"{column:<30}" + "".join(f"{values[column]:14.5f}" for values in found.values()))
    goals = {"cosine": MEAN_COSINE, "worst_cosine": WORST_COSINE, "overlap": SAME, "same_but_ties": SAME}
    goals |= {"same_first": SAME, "same_set": SAME}
    missed = [
        f"{name} {found['int8'][name]:.4f} < {goal}" for name, goal in goals.items() if found["int8"][name] < goal
    ]
    print(f"goals missed by int8: {', '.join(missed)}" if missed else "int8 meets every goal")
    if options.output is not None:
        writer = Writer(options.output)
        writer.write("environment", **machine.environment())
        for name, values in found.items():
            writer.write("quantization", benchmark="quantization", variant=name, model="all-MiniLM-L6-v2", **values)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
