"""Text: where it comes from, how it becomes tokens, and the stream of batches."""

from stackwise_jax.data.builtin import markov_entropy
from stackwise_jax.data.labelled import (
    NO_LABEL,
    LabelledBatch,
    LabelledDataset,
    LabelledLoader,
    LabelledTexts,
    encode_labelled,
    labelled_batches,
    read_labelled,
)
from stackwise_jax.data.pipeline import Dataset, Loader, load_datasets, load_text_dataset, training_texts
from stackwise_jax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "NO_LABEL",
    "ByteTokenizer",
    "Dataset",
    "LabelledBatch",
    "LabelledDataset",
    "LabelledLoader",
    "LabelledTexts",
    "Loader",
    "SentencePieceTokenizer",
    "Tokenizer",
    "encode_labelled",
    "labelled_batches",
    "load_datasets",
    "load_text_dataset",
    "load_tokenizer",
    "markov_entropy",
    "read_labelled",
    "training_texts",
]
