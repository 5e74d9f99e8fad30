import builtins
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from probekit.tasks import similar_captions
from probekit.tasks.paraphrases import content_words
from probekit.tasks.similar_captions import (
    NEAREST,
    SentenceVectors,
    WordVectors,
    assign_similar,
    encode_texts,
    load_sentence_encoder,
)

SCENES = [
    f"a {colour} {thing} on the {place}"
    for colour in ("red", "blue", "green")
    for thing in ("cup", "car", "kite")
    for place in ("table", "grass", "road", "beach")
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Folder of a tiny sentence-embedding model with random weights, saved as the hub's are."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in SCENES for word in text.split()})
    vocabulary = [*special_tokens, *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(32)]
    sentence_transformers.SentenceTransformer(modules=modules).save(str(folder / "whole"))
    return str(folder / "whole")


def captions_of_scenes(captions_per_image: int) -> tuple[list[str], list[int], dict]:
    """The first caption of each image, the images, and all captions by image."""
    starts = range(0, len(SCENES), captions_per_image)
    captions_by_image = {
        image: SCENES[start : start + captions_per_image] for image, start in enumerate(starts)
    }
    captions = [image_captions[0] for image_captions in captions_by_image.values()]
    return captions, list(captions_by_image), captions_by_image


# ----------------------------------------------------------------------------- nearest, by words


def word_cosines(texts: list[str], rows: np.ndarray) -> np.ndarray:
    """The cosines of some texts with all, 0 with themselves."""
    vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    cosines = (vectors[rows] @ vectors.T).toarray()
    cosines[np.arange(len(rows)), rows] = 0
    return cosines


def test_the_nearest_captions_are_those_of_the_full_product():
    rng = np.random.default_rng(0)
    words = np.array([f"w{k}" for k in range(500)])
    chance = 1 / (np.arange(500) + 2.7)
    texts = [" ".join(rng.choice(words, 6, p=chance / chance.sum())) for _ in range(900)]
    neighbours, cosines = WordVectors(texts).nearest(np.arange(len(texts)))
    assert neighbours.shape == cosines.shape == (900, NEAREST)
    full = word_cosines(texts, np.arange(900))
    best = -np.sort(-full, axis=1)[:, : NEAREST - 1]
    np.testing.assert_allclose(-np.sort(-cosines, axis=1)[:, : NEAREST - 1], best, atol=1e-5)
    assert (neighbours != np.arange(900)[:, None]).all()
    is_found = neighbours >= 0
    assert (cosines[~is_found] == 0).all()
    looked_up = np.take_along_axis(full, np.where(is_found, neighbours, 0), axis=1)
    np.testing.assert_allclose(looked_up[is_found], cosines[is_found], atol=1e-5)


def test_nearest_captions_are_looked_for_among_some_of_them_only():
    texts = SCENES * 2
    numbers = np.arange(5, 60)
    neighbours, _ = WordVectors(texts).nearest(numbers)
    assert set(np.unique(neighbours)) <= {-1, *numbers.tolist()}
    twin = np.where(numbers < 36, numbers + 36, numbers - 36)
    has_twin = np.isin(twin, numbers)
    assert has_twin.sum() > 30
    assert (neighbours[has_twin] == twin[has_twin, None]).any(axis=1).all()


def test_many_captions_are_searched_in_parts(monkeypatch):
    texts = SCENES * 4
    monkeypatch.setattr(similar_captions, "SEARCHED", 50)
    monkeypatch.setattr(similar_captions, "QUERIES", 20)
    neighbours, cosines = WordVectors(texts).nearest(np.arange(len(texts)))
    part = np.arange(len(texts)) % 3  # 144 captions in three parts of at most 50
    row, rank = np.nonzero(neighbours >= 0)
    assert len(row) > 1000
    assert (part[neighbours[row, rank]] == part[row]).all()
    full = word_cosines(texts, np.arange(len(texts)))
    full[part[:, None] != part] = 0
    np.testing.assert_allclose(cosines.max(1), full.max(1), atol=1e-5)


# ----------------------------------------------------------------- nearest, by a model of sentences


def test_a_model_of_sentences_leaves_out_what_is_nearer_than_another_caption_of_the_image(encoder):
    from sentence_transformers import SentenceTransformer

    captions, owners, captions_by_image = captions_of_scenes(2)
    vectors = SentenceVectors(captions, owners, captions_by_image=captions_by_image, model=encoder)
    neighbours, cosines = vectors.nearest(np.arange(len(captions)))
    exact_nd = SentenceTransformer(encoder).encode(SCENES, normalize_embeddings=True)
    compared = 0
    for i in range(len(captions)):
        full = exact_nd[2 * i] @ exact_nd[::2].T
        limit = exact_nd[2 * i] @ exact_nd[2 * i + 1]
        if np.abs(full - limit).min() < 2e-3:  # half precision may decide either way
            continue
        compared += 1
        full[i] = np.inf
        expected = np.sort(full[full < limit])[::-1]
        is_found = neighbours[i] >= 0
        assert is_found.sum() == len(expected)
        np.testing.assert_allclose(np.sort(cosines[i][is_found])[::-1], expected, atol=2e-3)
        np.testing.assert_allclose(full[neighbours[i][is_found]], cosines[i][is_found], atol=2e-3)
    assert compared > 9


def test_vectors_are_held_in_half_precision_block_by_block(encoder, monkeypatch):
    captions, owners, captions_by_image = captions_of_scenes(1)
    plain = SentenceVectors(captions, owners, captions_by_image=captions_by_image, model=encoder)
    whole_neighbours, whole_cosines = plain.nearest(np.arange(36))
    monkeypatch.setattr(similar_captions, "ENCODED", 7)  # does not divide their number
    vectors_nd = encode_texts(load_sentence_encoder(encoder), SCENES)
    assert vectors_nd.dtype == torch.float16
    assert vectors_nd.shape == (36, 32)
    blocks = SentenceVectors(captions, owners, captions_by_image=captions_by_image, model=encoder)
    neighbours, cosines = blocks.nearest(np.arange(36))
    np.testing.assert_allclose(np.sort(cosines), np.sort(whole_cosines), atol=1e-3)
    assert (np.sort(neighbours) >= 0).sum() == (whole_neighbours >= 0).sum()
    assert (neighbours != np.arange(36)[:, None]).all()


def test_captions_are_exchanged_by_a_model_of_sentences(encoder):
    captions, owners, captions_by_image = captions_of_scenes(2)
    rng = np.random.default_rng(0)
    folder = Path(encoder)
    assigned = assign_similar(
        captions,
        owners,
        captions_by_image=captions_by_image,
        rng=rng,
        similarity=folder.name,
        home=folder.parent,
    )
    assert sorted(assigned) == list(range(len(captions)))
    assert (assigned != np.arange(len(captions))).all()


def test_a_model_of_sentences_is_fetched_and_read_from_safetensors_alone(
    encoder, tmp_path, monkeypatch
):
    request = {}

    def snapshot_download(source, **options):
        request.update(options, source=source)
        return encoder

    monkeypatch.setattr(similar_captions, "snapshot_download", snapshot_download)
    assert load_sentence_encoder("org/encoder@abc").encode(["a red cup"]).shape == (1, 32)
    assert request["source"] == "org/encoder"
    assert request["revision"] == "abc"
    for name in ("pytorch_model.bin", "2_Dense/pytorch_model.bin", "args.bin", "a.pkl", "a.pt"):
        assert not any(fnmatch(name, pattern) for pattern in request["allow_patterns"])
    pickled = tmp_path / "pickled"
    shutil.copytree(encoder, pickled)
    (weights,) = pickled.rglob("model.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"in safetensors \(.*pytorch_model.bin can run code"):
        load_sentence_encoder(str(pickled))


def test_what_is_no_model_of_sentences_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match=r"take .tfidf., or the hub id or folder"):
        load_sentence_encoder(str(tmp_path / "nothing"))


def test_where_the_extra_is_not_installed_words_still_do(monkeypatch):
    import_module = builtins.__import__

    def import_without_extra(name, *arguments, **options):
        if name.partition(".")[0] == "sentence_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_extra)
    captions, owners, captions_by_image = captions_of_scenes(1)
    rng = np.random.default_rng(0)
    assert (
        assign_similar(captions, owners, captions_by_image=captions_by_image, rng=rng) >= 0
    ).all()
    with pytest.raises(ImportError, match=r"pip install -e '\.\[similar\]'"):
        assign_similar(
            captions, owners, captions_by_image=captions_by_image, rng=rng, similarity="org/encoder"
        )


# ------------------------------------------------------------------------------------- exchanged


def test_what_nothing_similar_is_found_for_is_left_out_and_counted():
    captions = [*SCENES, "xylophones", "zebras"]
    captions_by_image = {i: [caption] for i, caption in enumerate(captions)}
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="5.3% of 38 captions are left out"):
        assigned = assign_similar(captions, range(38), captions_by_image=captions_by_image, rng=rng)
    assert np.flatnonzero(assigned < 0).tolist() == [36, 37]
    assert sorted(assigned[:36]) == list(range(36))
    for i in range(36):
        assert content_words(captions[i]) & content_words(captions[assigned[i]])


def test_the_most_similar_pairs_come_first():
    captions = ["big red cup tea", "big red cup milk", "big dog runs", "small dog sits"]
    captions_by_image = {i: [caption] for i, caption in enumerate(captions)}
    rng = np.random.default_rng(0)
    assigned = assign_similar(captions, range(4), captions_by_image=captions_by_image, rng=rng)
    assert assigned.tolist() == [1, 0, 3, 2]


def test_gaps_are_filled_in_chunks_by_exchange(monkeypatch):
    """Everybody may be given anything, so nobody is left out; what fits already stays."""
    monkeypatch.setattr(similar_captions, "CAPTION_CHUNK", 8)

    class LenientJudge:
        def may_be_true(self, i, j):
            return False

        def shares_word(self, i, j):
            return True

    chain = np.roll(np.arange(30), -1)
    chain[29] = -1  # caption 0 was assigned to nobody
    exchanged = np.array([31, 30])
    assigned = np.concatenate([chain, exchanged])
    similar_captions._fill_gaps(assigned, LenientJudge(), rng=np.random.default_rng(0))
    assert sorted(assigned) == list(range(32))
    assert (assigned != np.arange(32)).all()
    assert assigned[30:].tolist() == [31, 30]
    assert (assigned[:30] == chain).sum() >= 22


def test_few_captions_are_exchanged_with_those_that_were_assigned_already():
    class StrictJudge:
        """Each image may receive the next one's caption alone, the last one that of the first."""

        def may_be_true(self, i, j):
            return j != (i + 1) % 3

        def shares_word(self, i, j):
            return True

    assigned = np.array([-1, 2, 1])
    similar_captions._fill_gaps(assigned, StrictJudge(), rng=np.random.default_rng(0))
    assert assigned.tolist() == [1, 2, 0]
