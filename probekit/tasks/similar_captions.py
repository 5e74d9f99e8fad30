"""The most similar captions of other images: by their words, or by a sentence-embedding model."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from sklearn import config_context
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from tqdm.auto import tqdm

from probekit import paths
from probekit.tasks.balance import CAPTION_CHUNK, balanced_assignment, ordered_chunks
from probekit.tasks.paraphrases import CaptionJudge
from probekit.tasks.words import split_words

TFIDF = "tfidf"
# Similar captions that are looked at for each caption, the caption itself included.
NEAREST = 31
# Captions that are compared by their words are looked for among so many others at most: time then
# grows with their number, and not with its square.
SEARCHED = 200_000
# Captions that are looked up at a time, between two steps of the progress bar.
QUERIES = 4_096
# MiB that scikit-learn may use for the similarities of some captions with all others.
WORKING_MEMORY = 256
# Pairs of captions that are looked at together.
PAIRS = 100_000
# Texts that are encoded before they are stored in half precision, and compared at a time.
ENCODED = 65_536
ENCODER_BATCH = 256
# Files of a sentence-embedding model on the hub; others may hold code.
ENCODER_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


class CaptionVectors(Protocol):
    """Captions as vectors, among which the nearest ones can be found."""

    def nearest(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the captions that are most similar to each of some captions, among these.

        Parameters
        ----------
        numbers : ndarray of int
            Shape (n,): which captions to compare.

        Returns
        -------
        neighbours : ndarray of int
            Shape (n, k): numbers of captions; -1 where there are fewer, and for the caption itself.
        cosines : ndarray of float
            Shape (n, k): how similar they are, 0 where there is none.
        """


class WordVectors:
    """Captions as TF-IDF vectors of their words.

    Parameters
    ----------
    captions : sequence of str
        The n captions.

    Notes
    -----
    Beside the vectors, a search holds :data:`WORKING_MEMORY` MiB of similarities, a few times over
    while they are sorted. Where there are more than :data:`SEARCHED` captions, each is compared
    with an equal part of the others.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        vectorizer = TfidfVectorizer(
            tokenizer=_longer_words,
            token_pattern=None,
            stop_words="english",
            sublinear_tf=True,
            dtype=np.float32,
        )
        self._vectors_nv = vectorizer.fit_transform(captions)

    def nearest(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the most similar captions, see :meth:`CaptionVectors.nearest`."""
        neighbours = np.full((len(numbers), NEAREST), -1)
        cosines = np.zeros((len(numbers), NEAREST), np.float32)
        part_count = -(-len(numbers) // SEARCHED)
        with (
            config_context(working_memory=WORKING_MEMORY),
            tqdm(total=len(numbers), desc="similar captions", unit="caption", delay=5) as progress,
        ):
            for first in range(part_count):
                rows = np.arange(first, len(numbers), part_count)
                k = min(NEAREST, len(rows))
                search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
                search.fit(self._vectors_nv[numbers[rows]])
                for queries in ordered_chunks(rows, size=QUERIES):
                    distances, places = search.kneighbors(self._vectors_nv[numbers[queries]])
                    neighbours[queries, :k] = numbers[rows[places]]
                    cosines[queries, :k] = 1 - distances
                    progress.update(len(queries))
        is_none = (cosines <= 0) | (neighbours == numbers[:, None])
        neighbours[is_none] = -1
        cosines[is_none] = 0
        return neighbours, cosines


def _longer_words(caption: str) -> list[str]:
    """Return the words of a caption that have two characters or more."""
    return [word for word in split_words(caption) if len(word) > 1]


class SentenceVectors:
    """Captions as vectors of a sentence-embedding model (https://sbert.net).

    What is at least as similar to a caption as another caption of the same image says too nearly
    the same, and is never among its nearest ones.

    Parameters
    ----------
    captions, owners : sequence
        The n captions, and the image that each belongs to.
    captions_by_image : mapping
        All captions of each image.
    model : str
        A hub id, ``id@revision``, or a folder.
    home : str, Path or Home, optional
        Where a relative folder starts, see :meth:`probekit.paths.Home.find`.

    Raises
    ------
    ImportError
        The package sentence-transformers is not installed.
    ValueError
        There is no such model, or its weights are not safetensors.

    Notes
    -----
    Vectors are held in half precision, so cosines are within 1e-3 of the exact ones. All of COCO's
    591,000 captions with d = 768 take 0.9 GB, and as much again while they are compared.
    """

    def __init__(
        self,
        captions: Sequence[str],
        owners: Sequence[Hashable],
        *,
        captions_by_image: Mapping[Hashable, Sequence[str]],
        model: str,
        home: str | Path | paths.Home | None = None,
    ) -> None:
        encoder = load_sentence_encoder(model, home)
        of_images = [text for owner in dict.fromkeys(owners) for text in captions_by_image[owner]]
        rows = {text: row for row, text in enumerate(dict.fromkeys([*captions, *of_images]))}
        vectors_nd = encode_texts(encoder, list(rows))
        self._vectors_nd = vectors_nd[[rows[caption] for caption in captions]]
        self._limits_n = vectors_nd.new_full((len(captions),), torch.inf, dtype=torch.float32)
        for number, (caption, owner) in enumerate(zip(captions, owners, strict=True)):
            others = [rows[other] for other in captions_by_image[owner] if other != caption]
            if others:
                cosines = vectors_nd[others].float() @ self._vectors_nd[number].float()
                self._limits_n[number] = cosines.max()

    def nearest(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the most similar captions, see :meth:`CaptionVectors.nearest`."""
        from sentence_transformers.util import semantic_search

        neighbours = np.full((len(numbers), NEAREST), -1)
        cosines = np.zeros((len(numbers), NEAREST), np.float32)
        searched_nd = self._vectors_nd[numbers]
        limits_n1 = self._limits_n[numbers, None]
        with tqdm(total=len(numbers), desc="similar captions", unit="caption", delay=5) as progress:
            for queries in ordered_chunks(range(len(numbers)), size=QUERIES):
                results = semantic_search(
                    torch.cat([searched_nd[queries].float(), limits_n1[queries]], dim=1),
                    searched_nd,
                    query_chunk_size=ENCODER_BATCH,
                    corpus_chunk_size=ENCODED,
                    top_k=NEAREST,
                    score_function=_cosines_below_limit,
                )
                for row, result in zip(queries, results, strict=True):
                    for rank, neighbour in enumerate(result):
                        place = int(neighbour["corpus_id"])
                        if place != row and np.isfinite(neighbour["score"]):
                            neighbours[row, rank] = numbers[place]
                            cosines[row, rank] = neighbour["score"]
                progress.update(len(queries))
        return neighbours, cosines


def _cosines_below_limit(queries_qe: torch.Tensor, searched_nd: torch.Tensor) -> torch.Tensor:
    """Return cosines (q, n), minus infinity where they reach the limit that ends each query."""
    cosines_qn = queries_qe[:, :-1] @ searched_nd.float().T
    limits_q1 = queries_qe[:, -1:]
    return cosines_qn.masked_fill(cosines_qn >= limits_q1, -torch.inf)


def load_sentence_encoder(model: str, home: str | Path | paths.Home | None = None):
    """Load a sentence-embedding model from safetensors alone: other weights can run code.

    Parameters
    ----------
    model : str
        A hub id, ``id@revision``, or a folder.
    home : str, Path or Home, optional
        Where a relative folder starts, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    sentence_transformers.SentenceTransformer

    Raises
    ------
    ImportError
        The package sentence-transformers is not installed.
    ValueError
        There is no such model, or its weights are not safetensors.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"similarity={model!r} needs the package sentence-transformers: "
            "pip install -e '.[similar]'"
        ) from error
    try:
        folder = _encoder_folder(model, home)
        return SentenceTransformer(str(folder), model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"similarity={model!r} is no sentence-embedding model that can be loaded: take "
            '"tfidf", or the hub id or folder of one that has its weights in safetensors '
            f"({error})"
        ) from error


def _encoder_folder(model: str, home: str | Path | paths.Home | None) -> Path:
    folder = paths.Home.find(home).resolve(model)
    if not folder.is_dir():
        hub_id, _, revision = model.partition("@")
        folder = Path(
            snapshot_download(hub_id, revision=revision or None, allow_patterns=ENCODER_FILES)
        )
    for file in folder.rglob("pytorch_model*.bin"):
        if not any(file.parent.glob("model*.safetensors")):
            raise OSError(
                f"{file} can run code when it is loaded, and no model.safetensors is beside it"
            )
    return folder


def encode_texts(encoder, texts: Sequence[str]) -> torch.Tensor:
    """Return the unit vectors of texts, shape (n, d), in half precision.

    Parameters
    ----------
    encoder : sentence_transformers.SentenceTransformer
        The model.
    texts : sequence of str
        The n texts. Only :data:`ENCODED` of them are held in full precision at a time.
    """
    parts = []
    for start in range(0, len(texts), ENCODED):
        vectors = encoder.encode(
            texts[start : start + ENCODED],
            batch_size=ENCODER_BATCH,
            normalize_embeddings=True,
            convert_to_tensor=True,
        )
        parts.append(vectors.half())
    return torch.cat(parts)


def assign_similar(
    captions: Sequence[str],
    owners: Sequence[Hashable],
    *,
    captions_by_image: Mapping[Hashable, Sequence[str]],
    rng: np.random.Generator,
    similarity: str = TFIDF,
    home: str | Path | paths.Home | None = None,
) -> np.ndarray:
    """Exchange each caption for a similar one of another image.

    The most similar pairs come first. What is left over is compared once more, among itself. What
    then is left is exchanged with others, so that each caption has a content word in common with
    those of the image that receives it. Where this is impossible, captions are left out.

    Parameters
    ----------
    captions, owners : sequence
        The n captions, and the image that each belongs to.
    captions_by_image : mapping
        All captions of each image. No image receives one of these, or a paraphrase of one.
    rng : Generator
        Source of the random numbers.
    similarity : str
        ``"tfidf"`` (:class:`WordVectors`), or a sentence-embedding model
        (:class:`SentenceVectors`).
    home : str, Path or Home, optional
        Where the folder of a model starts, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    ndarray of int
        Shape (n,): the number of the caption that each is exchanged for, -1 where it is left out.

    Warns
    -----
    UserWarning
        Captions are left out; the message says how many.
    """
    vectors: CaptionVectors
    if similarity == TFIDF:
        vectors = WordVectors(captions)
    else:
        vectors = SentenceVectors(
            captions, owners, captions_by_image=captions_by_image, model=similarity, home=home
        )
    judge = CaptionJudge(captions, owners, captions_by_image=captions_by_image)
    everyone = np.arange(len(captions))
    assigned = np.full(len(captions), -1)
    numbers = everyone
    for _ in range(2):
        neighbours, cosines = vectors.nearest(numbers)
        _assign_closest(assigned, numbers, neighbours, cosines=cosines, judge=judge)
        left_over = np.setdiff1d(everyone, assigned)
        if len(left_over) == 0:
            return assigned
        numbers = np.union1d(np.flatnonzero(assigned < 0), left_over)
    _fill_gaps(assigned, judge, rng=rng)
    is_left_out = assigned < 0
    if is_left_out.any():
        warnings.warn(
            f"{is_left_out.mean():.1%} of {len(captions):,} captions are left out: no other image "
            "has a similar caption that is not true of theirs, too",
            stacklevel=2,
        )
    return assigned


def _assign_closest(
    assigned: np.ndarray,
    numbers: np.ndarray,
    neighbours: np.ndarray,
    *,
    cosines: np.ndarray,
    judge: CaptionJudge,
) -> None:
    """Fill `assigned` where it is -1, the most similar pairs first."""
    is_taken = np.zeros(len(assigned), bool)
    is_taken[assigned[assigned >= 0]] = True
    k = neighbours.shape[1]
    order = np.argsort(-cosines.ravel(), kind="stable")
    order = order[neighbours.ravel()[order] >= 0]
    for part in ordered_chunks(order, size=PAIRS):
        receivers = numbers[part // k]
        offers = neighbours.ravel()[part]
        is_open = (assigned[receivers] < 0) & ~is_taken[offers]
        pairs = zip(receivers[is_open].tolist(), offers[is_open].tolist(), strict=True)
        for i, j in pairs:
            if assigned[i] < 0 and not is_taken[j] and not judge.may_be_true(i, j):
                assigned[i] = j
                is_taken[j] = True


def _fill_gaps(assigned: np.ndarray, judge: CaptionJudge, *, rng: np.random.Generator) -> None:
    """Fill `assigned` where it is -1, in exchange with others.

    A chain begins with a caption that was assigned to nobody, goes on with the caption that was
    assigned to it, and so on to a caption to which none was assigned. So the members of a chain can
    exchange among themselves. Where there are few captions, all of them take part.
    """
    members = []
    for start in np.setdiff1d(np.arange(len(assigned)), assigned):
        i = start
        while i >= 0:
            members.append(i)
            i = assigned[i]
    if len(assigned) <= CAPTION_CHUNK:
        members = list(range(len(assigned)))
    for chunk in ordered_chunks(members, size=CAPTION_CHUNK):
        cost_nn = rng.random((len(chunk), len(chunk)))
        for row, i in enumerate(chunk):
            for column, j in enumerate(chunk):
                if assigned[i] == j:
                    cost_nn[row, column] = 0
                elif not judge.shares_word(i, j) or judge.may_be_true(i, j):
                    cost_nn[row, column] = np.inf
        order = balanced_assignment(cost_nn)
        assigned[chunk] = np.where(order < 0, -1, chunk[order])
