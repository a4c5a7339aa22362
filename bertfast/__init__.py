"""bertfast: BERT encoders without padding, on fused kernels, with the same weights and the same outputs."""

from importlib import metadata

from bertfast import backend, ops
from bertfast.architectures import Family, families, register_family
from bertfast.attention_interface import register_attention
from bertfast.config import BertConfig
from bertfast.errors import BackendError, BertfastError, CheckpointError, QuantizationError, UnsupportedModelError
from bertfast.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bertfast.model import BertModel
from bertfast.packing import FlatteningCollator, PackedBatch, Packing, PackingCollator
from bertfast.patching import explain, patch, unpatch
from bertfast.runtime.quantization import QuantizationReport, quantize, unquantize

try:
    __version__ = metadata.version("bertfast")
except metadata.PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertfastError",
    "CheckpointError",
    "Family",
    "FlatteningCollator",
    "PackedBatch",
    "Packing",
    "PackingCollator",
    "QuantizationError",
    "QuantizationReport",
    "UnsupportedModelError",
    "__version__",
    "backend",
    "explain",
    "families",
    "ops",
    "patch",
    "quantize",
    "register_attention",
    "register_family",
    "unpatch",
    "unquantize",
]
