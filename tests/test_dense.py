"""Dense retrieval with a tiny random encoder: embedding, faiss indexes, prebuilt ones."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_retriever import change_one_byte, touch, write
from transformers import AutoModel, AutoTokenizer

import dense
from dense import Encoder
from retriever import build_dense, main, open_retriever, retriever_fingerprint

PASSAGES = [
    {"id": str(i), "title": f"Town {i}", "text": " ".join(f"w{j}" for j in range(i % 7 + 1))}
    for i in range(300)
]
TEXTS = [f"{passage['title']} {passage['text']}" for passage in PASSAGES]


def make_encoder(folder: Path, pooling: str) -> str:
    """A real encoder folder as the hub has them: a tiny BERT with random weights."""
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["town", "query", "passage", ":", *map(str, range(300)), *(f"w{i}" for i in range(9))]
    bert = folder.with_name("bert")
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join([*special, *words]))
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=400,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(bert)
    modules = [Transformer(str(bert)), Pooling(32, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "model", "mean")


def by_hand(encoder, texts, pooling="mean"):
    """Vectors of length 1, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK_SIZE", 64)  # 300 passages are 5 chunks
    return str(write(tmp_path / "corpus.jsonl", PASSAGES))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "index"


def test_vectors_are_those_of_the_encoder_on_title_and_text(encoder, corpus, folder):
    build_dense(corpus, folder, encoder)
    vectors = np.load(folder / "vectors.npy")
    expected = by_hand(encoder, TEXTS)
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    (found,) = open_retriever(str(folder)).search(["town 7 w0"], 300)
    scores = expected @ by_hand(encoder, ["town 7 w0"])[0]
    assert [p["score"] for p in found] == pytest.approx(sorted(scores, reverse=True), abs=2e-3)
    for passage in found:  # rows of the index are passages
        assert passage["score"] == pytest.approx(scores[int(passage["id"])], abs=2e-3)


BGE = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    ("name", "pooling", "query", "passage"),
    [
        ("e5-small", "mean", "query: ", "passage: "),
        ("BGE-small-en-v1.5", "cls", BGE, ""),
        ("other-e5", "mean", "", ""),
    ],
)
def test_the_folder_says_how_to_pool_and_the_name_what_goes_before_a_text(
    tmp_path, name, pooling, query, passage
):
    folder = make_encoder(tmp_path / name, pooling)
    encoder = Encoder(folder)
    expected = by_hand(folder, [query + "town 1", passage + "town 2 w1"], pooling)
    found = encoder.passages([{"id": "", "title": "town 2", "text": "w1"}])
    np.testing.assert_allclose(encoder.queries(["town 1"])[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[0], expected[1], atol=1e-5)


def test_an_encoder_that_has_moved_still_asks_as_it_was_named(tmp_path, corpus, folder):
    """Built from a link to it; then the folder gets another name."""
    link = tmp_path / "link"
    link.symlink_to(make_encoder(tmp_path / "e5-small", "mean"))
    build_dense(corpus, folder, str(link))
    vectors = by_hand(str(link), [f"passage: {text}" for text in TEXTS])
    np.testing.assert_allclose(np.load(folder / "vectors.npy"), vectors, atol=2e-3)
    (tmp_path / "e5-small").rename(tmp_path / "moved")
    (folder / "encoder").unlink()
    (folder / "encoder").symlink_to(tmp_path / "moved")
    (found,) = open_retriever(str(folder)).search(["town 7"], 1)
    query = by_hand(str(tmp_path / "moved"), ["query: town 7"])[0]
    assert found[0]["score"] == pytest.approx((vectors @ query).max(), abs=2e-3)


def test_no_query_has_no_results(encoder, corpus, folder):
    build_dense(corpus, folder, encoder)
    assert open_retriever(str(folder)).search([], 3) == []


def test_a_disk_that_is_full_is_named(encoder, corpus, folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("Error in faiss::FileIOWriter\nwrite error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", fail)
        with pytest.raises(OSError, match=r"faiss\.index: cannot be written .*No space left"):
            build_dense(corpus, folder, encoder)
    build_dense(corpus, folder, encoder)


def test_what_the_folder_says_wins_over_the_name(tmp_path):
    folder = make_encoder(tmp_path / "e5-base", "mean")
    config = Path(folder, "config_sentence_transformers.json")
    prompts = {"query": "town: ", "document": ""}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": prompts}))
    found = Encoder(folder).queries(["town 1"])
    np.testing.assert_allclose(found, by_hand(folder, ["town: town 1"]), atol=1e-5)


def test_several_gpus_embed_what_one_process_embeds(encoder, corpus, folder, monkeypatch):
    """A process of its own on the CPU in place of those on two GPUs."""
    model = SentenceTransformer
    pool = partial(model.start_multi_process_pool, target_devices=["cpu"])
    monkeypatch.setattr(model, "start_multi_process_pool", lambda self: pool(self))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dense, "CHUNK_SIZE", 200)
    build_dense(corpus, folder, encoder)
    np.testing.assert_allclose(np.load(folder / "vectors.npy"), by_hand(encoder, TEXTS), atol=2e-3)


def test_an_interrupted_build_is_completed_to_the_same_index(encoder, corpus, folder):
    build_dense(corpus, folder, encoder)
    whole = (folder / "faiss.index").read_bytes()
    (folder / "vectors.npy").rename(folder / "vectors.partial")
    (folder / "faiss.index").unlink()
    with pytest.raises(ValueError, match="build it again"):
        open_retriever(str(folder))
    build_dense(corpus, folder, encoder)
    assert (folder / "faiss.index").read_bytes() == whole


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "SQ8", "IVF4,PQ16x4", "HNSW8,SQ8"])
def test_another_factory_indexes_the_same_vectors_and_finds_most_of_what_flat_finds(
    encoder, corpus, folder, factory
):
    build_dense(corpus, folder, encoder)
    queries = [f"town {i} w0" for i in range(20)]
    exact = open_retriever(str(folder)).search(queries, 10)
    embedded = (folder / "vectors.npy").stat().st_mtime_ns
    build_dense(corpus, folder, encoder, factory, "nprobe=3" if "IVF" in factory else "")
    assert (folder / "vectors.npy").stat().st_mtime_ns == embedded
    assert json.loads((folder / "index.json").read_text())["factory"] == factory
    opened = open_retriever(str(folder))
    if "IVF" in factory:
        assert faiss.downcast_index(opened.index).nprobe == 3
    common = 0
    for expected, found in zip(exact, opened.search(queries, 10), strict=True):
        common += len({p["id"] for p in expected} & {p["id"] for p in found})
    assert common / 200 > (0.3 if "PQ" in factory else 0.7)


def test_a_prebuilt_index_opens_with_its_corpus_file(encoder, folder, tmp_path):
    """As Search-R1 publishes them: a faiss file, and a JSONL of id and contents in its order."""
    lines = [{"id": p["id"], "contents": f'"{p["title"]}"\n{p["text"]}'} for p in PASSAGES]
    corpus = str(write(tmp_path / "wiki-18.jsonl", lines))
    index = faiss.IndexFlatIP(32)
    index.add(by_hand(encoder, TEXTS))
    prebuilt = str(tmp_path / "e5_Flat.index")
    faiss.write_index(index, prebuilt)
    build_dense(corpus, folder, encoder, prebuilt=prebuilt)
    assert not list(folder.glob("vectors*"))
    with pytest.raises(ValueError, match="another prebuilt"):  # would embed all passages
        build_dense(corpus, folder, encoder)
    (found,) = open_retriever(str(folder)).search(["town 9 w0 w1 w2"], 1)
    assert found[0]["title"] == "Town 9" and found[0]["score"] == pytest.approx(1, abs=1e-5)


def test_a_prebuilt_index_of_other_passages_is_refused(encoder, corpus, folder, tmp_path):
    index = faiss.IndexFlatIP(32)
    index.add(np.zeros((5, 32), np.float32))
    faiss.write_index(index, str(tmp_path / "small.index"))
    with pytest.raises(ValueError, match="5 vectors of size 32, but 300 passages"):
        build_dense(corpus, folder, encoder, prebuilt=str(tmp_path / "small.index"))
    build_dense(corpus, folder, encoder)  # the folder is still free


def test_a_moved_corpus_is_linked_again_and_a_changed_one_refused(
    encoder, corpus, folder, tmp_path
):
    build_dense(corpus, folder, encoder)
    moved = tmp_path / "moved.jsonl"
    Path(corpus).rename(moved)
    with pytest.raises(
        FileNotFoundError, match=f"{corpus} is not there; if it moved: ln -sf"
    ) as error:
        open_retriever(str(folder))
    command = str(error.value).rpartition(": ")[2].replace("/PATH", str(moved))
    subprocess.run(command.split(), check=True)  # what the message says
    assert open_retriever(str(folder)).search(["town"], 1)[0]
    moved = moved.rename(tmp_path / "elsewhere.jsonl")
    build_dense(str(moved), folder, encoder)
    assert open_retriever(str(folder)).search(["town"], 1)[0]
    change_one_byte(moved)
    with pytest.raises(ValueError, match=r"passages\.jsonl is not whole, or was changed"):
        open_retriever(str(folder))


def test_a_changed_index_or_encoder_is_refused(encoder, corpus, folder, tmp_path):
    model = shutil.copytree(encoder, tmp_path / "model")
    build_dense(corpus, folder, str(model))
    whole = (folder / "faiss.index").read_bytes()
    change_one_byte(folder / "faiss.index")
    for use in (open_retriever, retriever_fingerprint):
        with pytest.raises(ValueError, match=r"faiss\.index is not whole, or was changed"):
            use(str(folder))
    build_dense(corpus, folder, str(model))
    assert (folder / "faiss.index").read_bytes() == whole
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"{model} is not there; if it moved: ln -sfn"):
        open_retriever(str(folder))
    build_dense(corpus, folder, str(moved))
    assert open_retriever(str(folder)).search(["town"], 1)[0]
    for file in [next(moved.rglob("*.safetensors")), next(moved.glob("1_Pooling/*"))]:
        content = file.read_bytes()
        change_one_byte(file)
        with pytest.raises(ValueError, match="encoder is not whole, or was changed"):
            open_retriever(str(folder))
        with pytest.raises(ValueError, match="an index with another encoder is there"):
            build_dense(corpus, folder, str(moved))
        file.write_bytes(content)


def test_a_fingerprint_is_that_of_index_and_parameters_not_of_places_and_times(
    encoder, corpus, folder, tmp_path
):
    model = shutil.copytree(encoder, tmp_path / "model")
    fingerprints = []
    for options in (["Flat"], ["IVF4,Flat", "nprobe=1"], ["IVF4,Flat", "nprobe=2"]):
        build_dense(corpus, folder, encoder, *options)
        fingerprints.append(retriever_fingerprint(str(folder)))
        build_dense(corpus, tmp_path / "second", str(model), *options)
        assert retriever_fingerprint(str(tmp_path / "second")) == fingerprints[-1]
        touch(Path(corpus))
        build_dense(corpus, folder, encoder, *options)
        assert retriever_fingerprint(str(folder)) == fingerprints[-1]
    assert len({*fingerprints, retriever_fingerprint(corpus), None}) == 5


@pytest.mark.parametrize(
    ("factory", "parameters"), [("Nonsense", ""), ("IVF1024,Flat", ""), ("Flat", "nonsense=1")]
)
def test_what_faiss_refuses_is_one_line(encoder, corpus, folder, factory, parameters):
    with pytest.raises(ValueError, match="faiss refuses") as error:
        build_dense(corpus, folder, encoder, factory, parameters)
    assert "\n" not in str(error.value)


def test_half_an_index_is_refused_and_built_again(encoder, corpus, folder):
    build_dense(corpus, folder, encoder)
    index = folder / "faiss.index"
    whole = index.read_bytes()
    for end in (0, 40, len(whole) // 2, -1):  # with some of them faiss would end the process
        index.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"faiss\.index is not whole.*build it again") as error:
            open_retriever(str(folder))
        assert "\n" not in str(error.value)
    build_dense(corpus, folder, encoder)
    assert index.read_bytes() == whole


def test_an_encoder_that_is_a_pickle_is_refused(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "model")
    (weights,) = (tmp_path / "model").rglob("*.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="no encoder there"):
        Encoder(str(tmp_path / "model"))


def test_the_command_line(encoder, folder, tmp_path, capsys):
    corpus = str(write(tmp_path / "corpus.jsonl", PASSAGES[:20]))
    words = ["--corpus", corpus, "--out", str(folder), "--encoder", encoder, "--factory", "HNSW8"]
    main(["index", "--kind", "dense", *words])
    assert (folder / "encoder").resolve() == Path(encoder)
    main(["search", "--index", str(folder), "town 3 w0 w1 w2 w3", "--k", "1"])
    assert capsys.readouterr().out == "Town 3: w0 w1 w2 w3\n"
