"""How good predictions are: each function gives numbers by name, as the libraries that everybody quotes compute them.

Classification by scikit-learn, correlations by scipy, entities by seqeval, answers by the rules of SQuAD's script.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

Metrics = dict[str, float]


def classification_metrics(gold: Sequence[int], predicted: Sequence[int], classes: int) -> Metrics:
    """Accuracy, macro F1 over the classes that occur, Matthews' correlation; with two classes the F1 of class 1 too."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {
        "accuracy": accuracy_score(gold, predicted),
        "macro_f1": f1_score(gold, predicted, average="macro", zero_division=0),
        "matthews": matthews_corrcoef(gold, predicted),
    }
    if classes == 2:
        metrics["f1"] = f1_score(gold, predicted, pos_label=1, zero_division=0)
    return _floats(metrics)


def regression_metrics(gold: Sequence[float], predicted: Sequence[float]) -> Metrics:
    """Pearson's and Spearman's correlation, their mean, and the root of the mean squared error.

    Correlations with something constant are NaN.
    """
    from scipy.stats import pearsonr, spearmanr

    constant = min(len(set(gold)), len(set(predicted))) < 2  # of which scipy would only warn
    pearson, spearman = (math.nan if constant else f(gold, predicted).statistic for f in (pearsonr, spearmanr))
    squares = [(a - b) ** 2 for a, b in zip(gold, predicted, strict=True)]
    rmse = math.sqrt(math.fsum(squares) / len(squares))
    correlation = (pearson + spearman) / 2
    return _floats({"correlation": correlation, "pearson": pearson, "spearman": spearman, "rmse": rmse})


def entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Metrics:
    """F1, precision and recall of whole entities, the F1 of each kind, and the share of words tagged right.

    As conlleval counts: an entity is right where its kind, its first and its last word are.
    """
    from seqeval.metrics import accuracy_score, classification_report

    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    report = classification_report(gold, predicted, output_dict=True, zero_division=0)
    total = report["micro avg"]
    kinds = {f"f1 {kind}": report[kind]["f1-score"] for kind in report if not kind.endswith(" avg")}
    metrics = {"f1": total["f1-score"], "precision": total["precision"], "recall": total["recall"]}
    return _floats({**metrics, **kinds, "word_accuracy": accuracy_score(gold, predicted)})


def answer_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[str]) -> Metrics:
    """Exact match and F1 of words, means over all questions: SQuAD's, v1.1 and v2.

    gold: the right answers to each question, the best of which counts; none where there is none to give. Where some
    questions have none, the F1 of each kind of question follows.
    """
    pairs = [(_or_none(answers), answer) for answers, answer in zip(gold, predicted, strict=True)]
    exact = [float(normalize(answer) in map(normalize, answers)) for answers, answer in pairs]
    f1 = [max(word_f1(a, answer) for a in answers) for answers, answer in pairs]
    metrics = {"f1": _mean(f1), "exact": _mean(exact)}
    if not all(gold):
        answerable = [score for score, answers in zip(f1, gold, strict=True) if answers]
        impossible = [score for score, answers in zip(f1, gold, strict=True) if not answers]
        metrics |= {"f1 with answer": _mean(answerable), "f1 without answer": _mean(impossible)}
    return metrics


def normalize(answer: str) -> str:
    """The answer in lower case, without punctuation, without a, an and the, with single spaces: as SQuAD compares."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(gold: str, predicted: str) -> float:
    """The F1 of the words that two answers share; where one of them has none, whether both have."""
    theirs, ours = normalize(gold).split(), normalize(predicted).split()
    if not theirs or not ours:
        return float(theirs == ours)
    same = (Counter(theirs) & Counter(ours)).total()
    return 2 * same / (len(theirs) + len(ours))


def _or_none(answers: Sequence[str]) -> Sequence[str]:
    """SQuAD's script leaves out answers of which nothing remains, and an impossible question's is the empty one."""
    return [a for a in answers if normalize(a)] or [""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _floats(metrics: dict[str, Any]) -> Metrics:
    return {name: float(value) for name, value in metrics.items()}


def confusion_matrix(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """How often each label (rows) was taken for each (columns)."""
    from sklearn.metrics import confusion_matrix as count

    return count(gold, predicted, labels=list(labels)).tolist()
