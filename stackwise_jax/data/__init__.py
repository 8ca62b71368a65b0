"""Text: where it comes from, how it becomes tokens, and the stream of batches."""

from stackwise_jax.data.builtin import markov_entropy
from stackwise_jax.data.pipeline import Dataset, Loader, load_datasets, load_text_dataset, training_texts
from stackwise_jax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Dataset",
    "Loader",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_datasets",
    "load_text_dataset",
    "load_tokenizer",
    "markov_entropy",
    "training_texts",
]
