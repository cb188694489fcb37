"""What is kept of the texts of pairs to compare them: a digest of each, and a MinHash signature of its shingles."""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from rensa import RMinHash

TEXTS = ("prompt", "chosen", "rejected")
PERMUTATIONS = 120
SEED = 1  # of the permutations
WIDTH, DENSE_WIDTH = 5, 3  # characters of a shingle; of texts mostly in Han, kana or Hangul
NO_TEXT = b"\0" * 16  # the digest where nothing is said
PRIME = np.uint64(0x100000001B3)
DENSE = ((0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # ranges of characters

SIGNATURES = pa.schema(
    [
        ("pair_id", pa.string()),
        *((f"{text}_digest", pa.binary(16)) for text in TEXTS),
        *((f"{text}_signature", pa.list_(pa.uint16(), PERMUTATIONS)) for text in TEXTS),
    ]
)


class SignTexts:
    """Batch function: pairs -> SIGNATURES.

    Digests are of roles and contents with runs of whitespace as one space: equal ones are the same text. Signatures are
    of the contents alone, their letters folded (NFKC, case), cut into shingles of characters in every script.
    """

    def __call__(self, pairs: pa.Table) -> pa.Table:
        columns: dict[str, pa.Array] = {"pair_id": pairs["pair_id"]}
        signed = {}
        for name in TEXTS:
            digests, texts = _read(pairs[name])
            columns[f"{name}_digest"] = pa.array(digests, pa.binary(16))
            flat = pa.array(signatures(texts).reshape(-1))
            signed[f"{name}_signature"] = pa.FixedSizeListArray.from_arrays(flat, PERMUTATIONS)
        return pa.table(columns | signed, schema=SIGNATURES)


def _read(column: pa.ChunkedArray) -> tuple[list[bytes], list[str]]:
    """Return the digest of each list of messages, and its folded text."""
    digests, texts = [], []
    for messages in column.to_pylist():
        said = [(message["role"], " ".join(message["content"].split())) for message in messages or ()]
        if not any(content for _, content in said):
            digests.append(NO_TEXT)
            texts.append("")
            continue
        whole = "\x1e".join(f"{role}\x1f{content}" for role, content in said)
        digests.append(hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        texts.append(_folded(" ".join(content for _, content in said)))
    return digests, texts


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash signature of each text, uint16 [n, PERMUTATIONS]: the share of equal entries of two estimates
    the Jaccard index of their shingles, within 0.04 (a standard deviation) at 0.8."""
    hashes, offsets = _shingles([text.ljust(WIDTH, "\0") for text in texts])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(-1, PERMUTATIONS).astype(np.uint16)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of each shingle of texts, uint64, and where each text's begin, with where the last ends."""
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    length = np.array([len(text) for text in texts], dtype=np.int64)
    start = np.cumsum(length) - length
    width = np.full(len(texts), WIDTH)
    if len(characters) and characters.max() >= DENSE[0][0]:
        dense = np.logical_or.reduce([(characters >= low) & (characters <= high) for low, high in DENSE])
        width[np.add.reduceat(dense.astype(np.int64), start) * 2 > length] = DENSE_WIDTH
    count = length - width + 1
    hashes = _windows(characters, WIDTH)
    if (width == DENSE_WIDTH).any():
        own = np.repeat(width == DENSE_WIDTH, length)
        hashes[own] = _windows(characters, DENSE_WIDTH)[own]
    within = np.arange(len(characters)) - np.repeat(start, length)
    return hashes[within < np.repeat(count, length)], np.concatenate([[0], np.cumsum(count)]).astype(np.uint64)


def _windows(characters: np.ndarray, width: int) -> np.ndarray:
    """Return a hash of so many characters from each on; at the end, of what is there."""
    padded = np.concatenate([characters, np.zeros(width - 1, dtype=np.uint32)]).astype(np.uint64)
    hashes = np.full(len(characters), width, dtype=np.uint64)
    for shift in range(width):
        hashes ^= padded[shift : shift + len(characters)]
        hashes *= PRIME
        hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(32)
    return hashes
