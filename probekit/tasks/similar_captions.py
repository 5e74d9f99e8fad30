"""Captions that mean nearly the same: by their words, or by a sentence-embedding model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from sys import intern

import numpy as np
import scipy.sparse
import torch
from huggingface_hub import snapshot_download
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from tqdm.auto import tqdm

from probekit import paths
from probekit.tasks.balance import mixed, without

STOP = ENGLISH_STOP_WORDS
NUMBERS = frozenset(("two", "three", "four", "five", "six", "eight", "nine", "ten"))  # stop words that say something
NEAREST = 30  # captions that are looked at for each
HEAVIEST = 6  # words that others are looked up by
CHUNK = 256  # captions that are compared with all others at a time
ENCODER_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a sentence-embedding model on the hub
BLOCK = 65_536  # of which others so many at a time are taken in full precision
PARAPHRASE = 0.75  # share of content words from which on a caption may be true of the other's image, too
COVERED = 0.8  # share of a caption's content words that another one has, from which on it says nothing else


def content(caption: str) -> frozenset[str]:
    """Stems of its words, without words that any caption may have."""
    return frozenset(_stem(word) for word in re.findall(r"[\w']+", caption.lower())
                     if word in NUMBERS or word not in STOP)


@cache
def _stem(word: str) -> str:
    """A word without the endings of plurals and verbs: rides, riding and ride are the same."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and not word.endswith("ss") and len(word) >= len(ending) + 3:
            word = word.removesuffix(ending)
            break
    word = word.removesuffix("e") if len(word) > 3 else word
    return intern(word[:-1] if len(word) > 3 and word[-1] == word[-2] else word)


def contents(own: Sequence[Sequence[str]]) -> list[list[frozenset[str]]]:
    """The content words of each image's captions; images that stand there several times share them."""
    found = {id(said): said for said in own}
    words = {key: [content(text) for text in said] for key, said in found.items()}
    return [words[id(said)] for said in own]


def paraphrases(words: frozenset[str], known: Sequence[frozenset[str]]) -> bool:
    """Does a caption (its content words) say nearly what one of the known ones says, and so may be true with it?"""
    return any(both >= PARAPHRASE * len(words | other) or both >= COVERED * len(words)
               for other in known if (both := len(words & other)))


def judge(right: Sequence[str], own: Sequence[Sequence[str]]) -> Callable[[int, int], bool]:
    """May caption j of `right` be true of image i? As one of its own, in whatever case, or as a paraphrase of one."""
    known, words = contents(own), [content(text) for text in right]
    texts = {id(said): frozenset(text.lower() for text in said) for said in own}
    lower = [text.lower() for text in right]
    return lambda i, j: lower[j] in texts[id(own[i])] or paraphrases(words[j], known[i])


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
    model : hub id, ``id@revision``, or folder
    """
    try:
        encoder = _sentence_encoder(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"similarity={model!r} is no sentence-embedding model that can be loaded: take \"tfidf\", or "
                         f"the hub id or folder of one that has its weights in safetensors ({error})") from error
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for said in [captions, *own] for text in said))}
    vector_nd, at_n = _encoded(encoder, list(texts)), torch.tensor([texts[text] for text in captions])
    places, cosines = np.full((len(captions), k), -1, np.int32), np.zeros((len(captions), k), np.float32)
    for at in tqdm(range(0, len(captions), CHUNK), "similar captions", unit_scale=CHUNK, unit="caption", delay=5):
        v = vector_nd[at_n[at : at + CHUNK]].float()
        cosine = torch.cat([v @ vector_nd[part].float().T for part in at_n.split(BLOCK)], 1)
        for i, row in enumerate(cosine, at):
            others = [texts[text] for text in own[i] if text != captions[i]]
            if others:
                row[row >= (vector_nd[others].float() @ v[i - at]).max()] = -torch.inf
            row[i] = -torch.inf
        top = cosine.topk(min(k, len(captions)))
        value, place = top.values.cpu().numpy(), top.indices.cpu().numpy()
        places[at : at + CHUNK, : value.shape[1]] = np.where(np.isfinite(value), place, -1)
        cosines[at : at + CHUNK, : value.shape[1]] = np.where(np.isfinite(value), value, 0)
    return places, cosines


def _sentence_encoder(model: str):
    """The model, out of safetensors alone: other weights can run code when they are loaded."""
    from sentence_transformers import SentenceTransformer

    folder = paths.Home.find().resolve(model)
    if not folder.is_dir():
        source, _, revision = model.partition("@")
        folder = Path(snapshot_download(source, revision=revision or None, allow_patterns=ENCODER_FILES))
    others = [str(file) for file in folder.rglob("pytorch_model*.bin")
               if not any(file.parent.glob("model*.safetensors"))]
    if others:
        raise OSError(f"{', '.join(others)} can run code when loaded, and there is no model.safetensors beside it")
    return SentenceTransformer(str(folder), model_kwargs={"use_safetensors": True})


def _encoded(encoder, texts: list[str]) -> torch.Tensor:
    """Unit vectors (n, d) in half precision, made block by block.

    Cosines are within 1e-3 of the exact ones. All of COCO's 591,000 captions with d = 768 take 591,000 x 768 x 2 bytes
    = 0.9 GB; a chunk's cosines with all take 256 x 591,000 x 4 bytes = 0.6 GB, twice while they are put together.
    """
    out = None
    for at in range(0, len(texts), BLOCK):
        part = encoder.encode(texts[at : at + BLOCK], batch_size=CHUNK, normalize_embeddings=True,
                              convert_to_tensor=True)
        out = part.new_empty((len(texts), part.shape[1]), dtype=torch.float16) if out is None else out
        out[at : at + BLOCK] = part
    return out


# ------------------------------------------------------------------------------------------------------------- dealing


def similar(right: Sequence[str], own: Sequence[Sequence[str]], rng: np.random.Generator, by: str = "tfidf"
            ) -> np.ndarray:
    """A permutation (n,) that gives each image the most similar caption of another one that is left; -1 left out.

    The closest pairs are dealt out first; what is left over is compared once more, among itself, and what then is left
    is exchanged with others until all share a content word with what they get. Captions that may be true of the image,
    being those of its own or paraphrases of them, are passed over. Where nothing is found, image and caption are left
    out, and that is said.

    Parameters
    ----------
    right : one caption an image
    own : all captions of each image
    by : ``"tfidf"``, or a sentence-embedding model, see :func:`nearest_embedded`
    """
    true, given = judge(right, own), np.full(len(right), -1)
    left = np.arange(len(right))
    for _ in range(2):
        texts, of = [right[i] for i in left], [own[i] for i in left]
        _closest(given, left, *(nearest(texts) if by == "tfidf" else nearest_embedded(texts, of, by)), true)
        free = np.setdiff1d(np.arange(len(right)), given)
        if not len(free):
            break
        left = np.union1d(np.flatnonzero(given < 0), free)
    near = given.copy()
    given[given < 0] = rng.permutation(free)

    def clashes(i: int, j: int) -> bool:
        shared = near[i] == j or any(content(right[j]) & content(text) for text in own[i])
        return i == j or not shared or true(i, j)

    given, wrong = mixed(len(right), clashes, rng, given)
    given = without(given, wrong, clashes)
    if (given < 0).any():
        tqdm.write(f"{(given < 0).mean():.1%} of {len(right):,} captions have no similar one that is wrong: left out")
    return given


def _closest(given: np.ndarray, numbers: np.ndarray, places: np.ndarray, cosines: np.ndarray,
             true: Callable[[int, int], bool]) -> None:
    """Fill `given` (n,) where it is -1, the closest pairs first; `places`, `cosines` (m, k) are of `numbers` (m,)."""
    taken, width, near = np.zeros(len(given), bool), places.shape[1], places.ravel()
    taken[given[given >= 0]] = True
    order = np.argsort(-cosines.ravel(), kind="stable")
    order = order[near[order] >= 0]
    for part in np.array_split(order, len(order) // 100_000 + 1):
        of, what = numbers[part // width], numbers[near[part]]
        open_ = (given[of] < 0) & ~taken[what]
        for i, j in zip(of[open_].tolist(), what[open_].tolist(), strict=True):
            if given[i] < 0 and not taken[j] and not true(i, j):
                given[i], taken[j] = j, True
