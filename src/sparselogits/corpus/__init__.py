"""Pack text, records, Hugging Face datasets and token ids into windows of a fixed length."""

from sparselogits.corpus.formats import Format, LineFormat
from sparselogits.corpus.packed import CorpusSummary, PackedCorpus
from sparselogits.corpus.packer import pack
from sparselogits.corpus.source import Source, open_source
from sparselogits.corpus.tokenizer_identity import require_tokenizer, tokenizer_fingerprint
from sparselogits.corpus.tokenizing import packing_for
from sparselogits.corpus.windows import Packing, Window, fingerprint

__all__ = [
    "CorpusSummary",
    "Format",
    "LineFormat",
    "PackedCorpus",
    "Packing",
    "Source",
    "Window",
    "fingerprint",
    "open_source",
    "pack",
    "packing_for",
    "require_tokenizer",
    "tokenizer_fingerprint",
]
