"""Captions that mean nearly the same: by their words, or by a sentence-embedding model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from sys import intern

import numpy as np
import scipy.sparse
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from tqdm.auto import tqdm

from probekit.dealing import dealt

STOP = ENGLISH_STOP_WORDS
NEAREST = 30  # captions that are looked at for each
HEAVIEST = 6  # words that others are looked up by
CHUNK = 256  # captions that are compared with all others at a time
PARAPHRASE = 0.75  # share of content words from which on a caption may be true of the other's image, too


def content(caption: str) -> frozenset[str]:
    """Its words, without those that any caption may have."""
    return frozenset(map(intern, re.findall(r"[a-z0-9']+", caption.lower()))) - STOP


def contents(own: Sequence[Sequence[str]]) -> list[list[frozenset[str]]]:
    """The content words of each image's captions; images that stand there several times share them."""
    found = {id(said): said for said in own}
    words = {key: [content(text) for text in said] for key, said in found.items()}
    return [words[id(said)] for said in own]


def paraphrases(words: frozenset[str], known: Sequence[frozenset[str]]) -> bool:
    """Does a caption (its content words) say nearly what one of the known ones says, and so may be true with it?"""
    return any(len(words & other) >= PARAPHRASE * max(1, len(words | other)) for other in known)


# ------------------------------------------------------------------------------------------------------------- nearest


def nearest(captions: Sequence[str], k: int = NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other captions of each by TF-IDF: places (n, k), -1 where there are fewer, and cosines (n, k).

    Looked up are those that share one of the :data:`HEAVIEST` words of a caption, 4 k of them are compared in full.
    Captions are compared in chunks, so memory grows with their number and not with its square.
    """
    x = TfidfVectorizer(stop_words="english", sublinear_tf=True, dtype=np.float32).fit_transform(captions)
    xt = scipy.sparse.csc_matrix(x.T)
    places, cosines = np.full((len(captions), k), -1, np.int32), np.zeros((len(captions), k), np.float32)
    for at in tqdm(range(0, len(captions), CHUNK), "similar captions", unit_scale=CHUNK, unit="caption", delay=5):
        rows, found = _looked_up(x[at : at + CHUNK], xt, at, 4 * k)
        value = np.asarray(x[at + rows].multiply(x[found]).sum(1)).ravel()
        order = np.lexsort((-value, rows))
        rows, found, value = rows[order], found[order], value[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        top = rank < k
        places[at + rows[top], rank[top]], cosines[at + rows[top], rank[top]] = found[top], value[top]
    return places, cosines


def _looked_up(x: scipy.sparse.csr_matrix, xt: scipy.sparse.csc_matrix, at: int, k: int
               ) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `x` and numbers of the captions that are closest to each by its heaviest words, without itself."""
    of = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    order = np.lexsort((-x.data, of))
    heavy = order[np.arange(len(of)) - x.indptr[of] < HEAVIEST]
    light = scipy.sparse.csr_matrix((x.data[heavy], (of[heavy], x.indices[heavy])), shape=x.shape)
    product, rows, found = (light @ xt).tocsr(), [], []
    for i, (start, end) in enumerate(zip(product.indptr[:-1], product.indptr[1:], strict=True)):
        index, value = product.indices[start:end], product.data[start:end]
        if len(index) > k + 1:
            index = index[np.argpartition(-value, k)[: k + 1]]
        index = index[index != at + i]
        rows.append(np.full(len(index), i))
        found.append(index)
    return np.concatenate(rows), np.concatenate(found)


def nearest_embedded(captions: Sequence[str], own: Sequence[Sequence[str]], model: str, k: int = NEAREST
                     ) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`nearest`, by the vectors of a sentence-embedding model (https://sbert.net).

    What is at least as similar to a caption as another one of its own image says too nearly the same, and is left out.

    Parameters
    ----------
    own : all captions of the image of each caption
    model : hub id, or folder
    """
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"similarity={model!r} is no sentence-embedding model that can be loaded: take \"tfidf\", or "
                         f"the hub id or folder of one ({error})") from error
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for said in [captions, *own] for text in said))}
    vector_nd = encoder.encode(list(texts), batch_size=CHUNK, normalize_embeddings=True, convert_to_tensor=True)
    v = vector_nd[[texts[text] for text in captions]]
    places, cosines = np.full((len(captions), k), -1, np.int32), np.zeros((len(captions), k), np.float32)
    for at in tqdm(range(0, len(captions), CHUNK), "similar captions", unit_scale=CHUNK, unit="caption", delay=5):
        cosine = v[at : at + CHUNK] @ v.T
        for i, row in enumerate(cosine, at):
            others = [texts[text] for text in own[i] if text != captions[i]]
            if others:
                row[row >= (vector_nd[others] @ v[i]).max()] = -torch.inf
            row[i] = -torch.inf
        top = cosine.topk(min(k, len(captions)))
        value, place = top.values.float().cpu().numpy(), top.indices.cpu().numpy()
        places[at : at + CHUNK, : value.shape[1]] = np.where(np.isfinite(value), place, -1)
        cosines[at : at + CHUNK, : value.shape[1]] = np.where(np.isfinite(value), value, 0)
    return places, cosines


# ------------------------------------------------------------------------------------------------------------- dealing


def similar(right: Sequence[str], own: Sequence[Sequence[str]], rng: np.random.Generator, by: str = "tfidf"
            ) -> np.ndarray:
    """A permutation (n,) that gives each image the most similar caption of another one that is left.

    The closest pairs are dealt out first; what is left over at the end is dealt out at random. Captions that may be
    true of the image, being those of its own or paraphrases of them, are passed over.

    Parameters
    ----------
    right : one caption an image
    own : all captions of each image
    by : ``"tfidf"``, or a sentence-embedding model, see :func:`nearest_embedded`
    """
    known, words = contents(own), [content(text) for text in right]
    places, cosines = nearest(right) if by == "tfidf" else nearest_embedded(right, own, by)
    given, taken = np.full(len(right), -1), np.zeros(len(right), bool)
    width, near = places.shape[1], places.ravel()
    order = np.argsort(-cosines.ravel(), kind="stable")
    order = order[near[order] >= 0]
    for part in np.array_split(order, len(order) // 100_000 + 1):
        part = part[(given[part // width] < 0) & ~taken[near[part]]]
        for i, j in zip((part // width).tolist(), near[part].tolist(), strict=True):
            if given[i] < 0 and not taken[j] and not paraphrases(words[j], known[i]):
                given[i], taken[j] = j, True
    given[given < 0] = rng.permutation(np.flatnonzero(~taken))
    return dealt(len(right), lambda i, j: i == j or paraphrases(words[j], known[i]), rng, given)
