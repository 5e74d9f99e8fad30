"""Global semantics: captions of an image, and captions of other images, from easy to hard.

Except for the swapped ones, the captions that do not belong to an image are those of other images
of its split, in a balanced assignment (:mod:`probekit.tasks.balance`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

from probekit.tasks.balance import (
    CAPTION_CHUNK,
    TooFewImages,
    balanced_assignment,
    random_assignment,
    random_chunks,
)
from probekit.tasks.base import Selection, example_rows
from probekit.tasks.paraphrases import CaptionJudge
from probekit.tasks.swapped_captions import WordStatistics, swap_words

PROMPT = "This image contains: {caption}.\nIs this right?"
# Also that of Chinese and Japanese, of Hindi, and of Arabic and Urdu.
FINAL_PUNCTUATION = " .,;:!?。．，、；：！？।؟۔،"
NEGATIVES = ("random", "similar", "same_categories", "swapped")


def clean_caption(caption: str) -> str:
    """Put a caption on one line, without final punctuation, which the prompt adds.

    Doubled punctuation and spaces before it are removed.
    """
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"([.,;:!?])[.,;:!?]+", r"\1", text)
    return text.rstrip(FINAL_PUNCTUATION)


def caption_task(
    selection: Selection,
    rng: np.random.Generator,
    *,
    negatives: str = "random",
    prompt: str = PROMPT,
) -> pd.DataFrame:
    """Ask each image about some of its captions (label 1) and as many others (label 0).

    Parameters
    ----------
    selection : Selection
        The images and their captions; :attr:`BuildSettings.captions` says how many of them each
        image is asked about. An image that has fewer is asked about all of them.
    rng : Generator
        Source of the random numbers.
    negatives : str
        What the captions with label 0 are.

        ``"random"``
            Captions of other images of the split.
        ``"similar"``
            The most similar captions of other images, without paraphrases. Captions for which
            nothing similar is found are left out.
        ``"same_categories"``
            Captions of other images that show the same categories, of all that are annotated.
            Images that show none, or what no other image shows, are left out.
        ``"swapped"``
            The image's own captions with two words exchanged. Captions in which nothing can be
            exchanged are left out.
    prompt : str
        Template of the prompts, with the field `caption`.

    Raises
    ------
    ValueError
        No image has a caption.

    Notes
    -----
    A caption alone says nothing about its label: each one is asked once with label 1 and once with
    label 0 (swapped ones: with the same words), within its split.
    """
    if selection.captions.empty:
        raise ValueError(
            f"{selection.settings.folder} has no captions: take tasks about objects, or a dataset "
            "with captions"
        )
    parts = []
    for split_images in selection.images_by_split():
        images = split_images[split_images.index.isin(selection.captions.index)]
        positions, captions = _draw_captions(selection, images, rng=rng)
        owners = images.index[positions].tolist()
        if negatives == "swapped":
            other_captions = _swap_each(selection, captions, owners=owners, rng=rng)
        else:
            assigned = _assign(selection, captions, owners=owners, negatives=negatives, rng=rng)
            other_captions = [captions[j] if j >= 0 else None for j in assigned]
        kept = [k for k, caption in enumerate(other_captions) if caption is not None]
        kept_images = images.iloc[[positions[k] for k in kept]]
        for label, texts in ((1, captions), (0, other_captions)):
            prompts = [prompt.format(caption=texts[k]) for k in kept]
            parts.append(example_rows(kept_images, prompts, [label] * len(kept)))
    return pd.concat(parts)


def _draw_captions(
    selection: Selection, images: pd.DataFrame, *, rng: np.random.Generator
) -> tuple[list[int], list[str]]:
    """Return the captions that are asked about, and the positions of their images."""
    positions = []
    captions = []
    for position, image in enumerate(images.index):
        image_captions = selection.captions[image]
        if selection.settings.captions == 1:
            numbers = [int(rng.integers(len(image_captions)))]
        else:
            numbers = rng.permutation(len(image_captions))[: selection.settings.captions].tolist()
        for number in numbers:
            positions.append(position)
            captions.append(image_captions[number])
    return positions, captions


def _swap_each(
    selection: Selection,
    captions: list[str],
    *,
    owners: list[Hashable],
    rng: np.random.Generator,
) -> list[str | None]:
    all_captions = [text for image in dict.fromkeys(owners) for text in selection.captions[image]]
    statistics = WordStatistics.from_captions(all_captions, selection.annotated_nc.columns)
    if captions and not statistics.nouns:
        raise ValueError(
            f"no caption of {selection.settings.folder} has an English noun, after a word such as "
            f"“a” or “the” ({captions[0]!r}, ...): leave caption_swapped out"
        )
    return [
        swap_words(caption, selection.captions[owner], statistics=statistics, rng=rng)
        for caption, owner in zip(captions, owners, strict=True)
    ]


def _assign(
    selection: Selection,
    captions: list[str],
    *,
    owners: list[Hashable],
    negatives: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the number of the caption with which each is exchanged, -1 where it is left out."""
    if negatives == "random":
        return _assign_random(captions, owners, captions_by_image=selection.captions, rng=rng)
    if negatives == "similar":
        from probekit.tasks.similar_captions import assign_similar  # loads torch

        return assign_similar(
            captions,
            owners,
            captions_by_image=selection.captions,
            rng=rng,
            similarity=selection.settings.similarity,
            home=selection.home,
        )
    if negatives == "same_categories":
        if selection.instances.empty:
            raise ValueError(
                f"{selection.settings.folder} has no instances, so no categories that could be the "
                "same: leave caption_same_categories out"
            )
        return assign_within_groups(
            captions,
            owners,
            captions_by_image=selection.captions,
            groups=_category_groups(selection, owners),
            rng=rng,
        )
    raise ValueError(f"unknown negatives {negatives!r}: take one of {', '.join(NEGATIVES)}")


def _assign_random(
    captions: list[str],
    owners: list[Hashable],
    *,
    captions_by_image: Mapping[Hashable, Sequence[str]],
    rng: np.random.Generator,
) -> np.ndarray:
    texts = [caption.lower() for caption in captions]
    image_texts = {
        image: {caption.lower() for caption in captions_by_image[image]} for image in set(owners)
    }

    def clashes(i: int, j: int) -> bool:
        return texts[j] in image_texts[owners[i]]

    _refuse_common_caption(captions, texts)
    return random_assignment(len(captions), clashes, rng=rng)


def _refuse_common_caption(captions: list[str], texts: list[str]) -> None:
    """Refuse captions of which more than half are the same: half of them need another one."""
    if not texts:
        return
    ((text, count),) = Counter(texts).most_common(1)
    if 1 < len(texts) < 2 * count:
        raise TooFewImages(
            f"{count} of {len(texts)} captions of a split are the same, "
            f"{captions[texts.index(text)]!r}, so there are not enough others that do not belong "
            "to their images: remove these captions from the dataset"
        )


def _category_groups(selection: Selection, owners: list[Hashable]) -> list[bytes | None]:
    """Return a key of the categories that each image shows, None where it shows none."""
    shows_nc = selection.annotated_nc.loc[owners].to_numpy()
    return [row.tobytes() if row.any() else None for row in shows_nc]


def assign_within_groups(
    captions: Sequence[str],
    owners: Sequence[Hashable],
    *,
    captions_by_image: Mapping[Hashable, Sequence[str]],
    groups: Sequence[Hashable | None],
    rng: np.random.Generator,
) -> np.ndarray:
    """Exchange captions at random within groups, such as images that show the same categories.

    Parameters
    ----------
    captions, owners : sequence
        The n captions, and the image that each belongs to.
    captions_by_image : mapping
        All captions of each image. No image receives one of these, or a paraphrase of one.
    groups : sequence
        The group of each caption; None takes no part.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    ndarray of int
        Shape (n,): the number of the caption that each is exchanged for, -1 where it is left out.
        As few as possible are left out within each chunk of
        :data:`~probekit.tasks.balance.CAPTION_CHUNK` captions of a group.
    """
    judge = CaptionJudge(captions, owners, captions_by_image=captions_by_image)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        if group is not None:
            members[group].append(i)
    assigned = np.full(len(captions), -1)
    for numbers in members.values():
        for chunk in random_chunks(numbers, rng, size=CAPTION_CHUNK):
            cost_nn = rng.random((len(chunk), len(chunk)))
            for row, i in enumerate(chunk):
                for column, j in enumerate(chunk):
                    if judge.may_be_true(i, j):
                        cost_nn[row, column] = np.inf
            order = balanced_assignment(cost_nn)
            assigned[chunk] = np.where(order < 0, -1, chunk[order])
    return assigned
