import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from probekit.tasks import similar_captions

SCENES = [f"a {colour} {thing} on the {place}" for colour in ("red", "blue", "green")
          for thing in ("cup", "car", "kite") for place in ("table", "grass", "road", "beach")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny sentence-embedding model with random weights, saved as the hub's are."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for text in SCENES for word in text.split()} | {"guy", "man", "horse", "rides", "horseback"})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, initializer_range=0.5)
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    reader = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[reader, Pooling(32)]).save(str(folder / "whole"))
    return str(folder / "whole")


def test_nearest_is_the_plain_product():
    texts = SCENES * 10
    places, cosines = similar_captions.nearest(texts, 40)
    x = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    for i in (0, 17, 300, len(texts) - 1):
        full = (x[i] @ x.T).toarray()[0]
        full[i] = -1
        np.testing.assert_allclose(cosines[i], np.sort(full)[::-1][:40], atol=1e-5)
        np.testing.assert_allclose(full[places[i]], cosines[i], atol=1e-5)


def test_nearest_finds_the_closest_of_long_captions_by_their_heaviest_words():
    rng = np.random.default_rng(0)
    words = np.array([f"w{k}" for k in range(2000)])
    p = 1 / (np.arange(2000) + 2.7)
    texts = [" ".join(rng.choice(words, 9, p=p / p.sum())) for _ in range(3000)]
    places, cosines = similar_captions.nearest(texts, 5)
    x = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    full = (x[:300] @ x.T).toarray()
    full[np.arange(300), np.arange(300)] = -1
    assert (full.max(1) - cosines[:300, 0] < 1e-5).mean() > 0.95
    assert (np.take_along_axis(full, places[:300].astype(int), 1) - cosines[:300] < 1e-5).all()


def test_a_model_of_sentences_judges_instead(encoder):
    own = [[SCENES[k], SCENES[k + 1]] for k in range(0, len(SCENES), 2)]
    right = [said[0] for said in own]
    places, cosines = similar_captions.nearest_embedded(right, own, encoder, 4)
    from sentence_transformers import SentenceTransformer

    v = SentenceTransformer(encoder).encode(SCENES, normalize_embeddings=True)
    for i in range(len(right)):
        full = v[2 * i] @ v[::2].T
        full[(full >= v[2 * i] @ v[2 * i + 1] - 1e-4) | (np.arange(len(right)) == i)] = -np.inf
        best = np.sort(full)[::-1][:4]
        np.testing.assert_allclose(cosines[i], np.where(np.isfinite(best), best, 0), atol=1e-3)  # half precision
        assert ((places[i] >= 0) == np.isfinite(best)).all()
    given = similar_captions.similar(right, own, np.random.default_rng(0), encoder)
    assert sorted(given) == list(range(len(right))) and (given != np.arange(len(right))).all()


def test_a_model_of_sentences_is_read_from_safetensors_alone(encoder, tmp_path, monkeypatch):
    asked = {}

    def fetched(source, **more):
        asked.update(source=source, **more)
        return encoder

    monkeypatch.setattr(similar_captions, "snapshot_download", fetched)
    assert similar_captions._sentence_encoder("org/encoder@abc").encode(["a red cup"]).shape == (1, 32)
    assert asked["source"] == "org/encoder" and asked["revision"] == "abc"
    assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]
                   for name in ("pytorch_model.bin", "2_Dense/pytorch_model.bin", "training_args.bin", "a.pkl", "a.pt"))
    pickled = tmp_path / "pickled"
    shutil.copytree(encoder, pickled)
    weights, = pickled.rglob("model.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"in safetensors \(.*pytorch_model.bin can run code"):
        similar_captions.nearest_embedded(["a", "b"], [["a"], ["b"]], str(pickled))


def test_vectors_of_all_captions_are_held_once_and_in_half_precision(encoder, monkeypatch):
    from sentence_transformers import SentenceTransformer

    plain = similar_captions.nearest_embedded(SCENES, [[text] for text in SCENES], encoder, 4)
    monkeypatch.setattr(similar_captions, "BLOCK", 7)  # does not divide their number
    blocks = similar_captions.nearest_embedded(SCENES, [[text] for text in SCENES], encoder, 4)
    np.testing.assert_allclose(blocks[1], plain[1], atol=1e-5)
    vectors = similar_captions._encoded(SentenceTransformer(encoder), SCENES)
    assert vectors.dtype == torch.float16 and vectors.shape == (36, 32)


def test_what_says_nearly_the_same_is_a_paraphrase():
    def says(text, *known):
        return similar_captions.paraphrases(similar_captions.content(text), [similar_captions.content(other) for other in known])

    park = "A man on a skateboard performs a trick at the skate park"
    assert says("a man on a skateboard performing a trick at a skate park", park)
    assert says("A man on a skateboard", park) and says("Men riding horses", "Two men ride a brown horse on a beach")
    assert not says("A man on a skateboard", "A man in a car", "A skateboard in a park")  # covered by no single one
    assert says("a red cup, a kite, a car and a bench", "a cup, a kite, a car and a bench")  # 4 of 5 in either
    assert says("a cup, a kite, a car and a bench", "a cup, a car and a bench")  # 3 of 4 in both together
    assert not says("Two cars", "A car and a cup") and not says("", "A car")


CHINESE = ["一个男人在沙滩上骑马", "一只狗在草地上", "Un café crème", "It is there", "桌子上有两个杯子"]


def test_captions_in_any_script_have_words_and_are_never_wrong_for_their_own_image():
    assert all(similar_captions.content(text) for text in CHINESE if text != "It is there")
    own = [[text, text.upper()] for text in CHINESE]
    true = similar_captions.judge([text.lower() for text in CHINESE], own)
    assert [[true(i, j) for j in range(5)] for i in range(5)] == np.eye(5, dtype=bool).tolist()


def test_what_nothing_similar_is_found_for_is_left_out_and_that_is_said(capsys):
    right = [*SCENES, "xylophones", "zebras"]
    given = similar_captions.similar(right, [[text] for text in right], np.random.default_rng(0))
    kept = np.flatnonzero(given >= 0)
    assert (given[-2:] == -1).all() and sorted(given[kept]) == kept.tolist() and len(kept) >= 30
    assert all(similar_captions.content(right[i]) & similar_captions.content(right[given[i]]) for i in kept)
    assert "of 38 captions have no similar one that is wrong: left out" in capsys.readouterr().out


def test_no_model_of_sentences_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"take .tfidf., or the hub id or folder"):
        similar_captions.nearest_embedded(["a", "b"], [["a"], ["b"]], str(tmp_path / "nothing"))
