"""Dense retrieval with a tiny random encoder: embedding, restart, ranks, faiss indexes, prebuilt ones."""

import json
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from test_retriever import command, write
from transformers import AutoModel, AutoTokenizer

import retriever
from retriever import Encoder, build_dense, open_retriever

PASSAGES = [{"id": str(i), "title": f"Town {i}", "text": " ".join(f"w{j}" for j in range(i % 7 + 1))} for i in range(300)]


def make_encoder(folder: Path, pooling: str) -> str:
    """A real encoder folder as the hub has them: a tiny BERT with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "town", "query", "passage", ":", *map(str, range(300))]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(9))]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=400)
    BertModel(BertConfig(**sizes, initializer_range=0.5)).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(32, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "e", "mean")


def by_hand(encoder_folder, texts, pooling="mean"):
    """Vectors of length 1, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder_folder), AutoModel.from_pretrained(encoder_folder)
    with torch.no_grad():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    rows = [each[0] if pooling == "cls" else each.mean(0) for each in hidden]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(retriever, "SHARD", 64)  # 300 passages are 5 shards
    return str(write(tmp_path / "corpus.jsonl", PASSAGES))


def test_vectors_are_those_of_the_encoder_on_title_and_text(encoder_folder, corpus, tmp_path):
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)
    shards = [np.load(file) for file in sorted((tmp_path / "index").glob("vectors-*.npy"))]
    assert [len(shard) for shard in shards] == [64, 64, 64, 64, 44] and shards[0].dtype == np.float16
    expected = by_hand(encoder_folder, [f"{p['title']} {p['text']}" for p in PASSAGES])
    np.testing.assert_allclose(np.concatenate(shards), expected, atol=2e-3)
    (found,) = open_retriever(str(tmp_path / "index")).search(["town 7 w0"], 300)
    scores = expected @ by_hand(encoder_folder, ["town 7 w0"])[0]
    assert [p["score"] for p in found] == pytest.approx(sorted(scores, reverse=True), abs=2e-3)
    assert all(p["score"] == pytest.approx(scores[int(p["id"])], abs=2e-3) for p in found)  # rows are passages


BGE = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    ("name", "pooling", "query", "passage"),
    [("e5-small", "mean", "query: ", "passage: "), ("BGE-small-en-v1.5", "cls", BGE, ""), ("other-e5", "mean", "", "")],
)
def test_the_folder_says_how_to_pool_and_the_family_what_goes_before_a_text(tmp_path, name, pooling, query, passage):
    folder = Path(make_encoder(tmp_path / "made", pooling)).rename(tmp_path / name)
    encoder = Encoder(str(folder))
    expected = by_hand(folder, [query + "town 1", passage + "town 2 w1"], pooling)
    np.testing.assert_allclose(encoder.queries(["town 1"])[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(encoder.passages([{"id": "", "title": "town 2", "text": "w1"}])[0], expected[1], atol=1e-5)


def test_what_the_folder_says_goes_before_what_the_family_does(tmp_path):
    folder = Path(make_encoder(tmp_path / "made", "mean")).rename(tmp_path / "e5-base")
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "town: ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    np.testing.assert_allclose(Encoder(str(folder)).queries(["town 1"]), by_hand(folder, ["town: town 1"]), atol=1e-5)


def test_an_interrupted_build_is_completed_to_the_same_index(encoder_folder, corpus, tmp_path):
    folder = tmp_path / "index"
    build_dense(corpus, folder, encoder_folder, "Flat", "", None)
    whole = (folder / "faiss.index").read_bytes()
    kept = (folder / "vectors-00001.npy").stat().st_mtime_ns
    for name in ("vectors-00003.npy", "faiss.index"):
        (folder / name).unlink()
    (folder / "vectors-00003.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match="build it again"):
        open_retriever(str(folder))
    build_dense(corpus, folder, encoder_folder, "Flat", "", None)
    assert (folder / "faiss.index").read_bytes() == whole
    assert (folder / "vectors-00001.npy").stat().st_mtime_ns == kept


def test_two_ranks_make_the_index_that_one_makes(encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "corpus.jsonl", PASSAGES)
    script = tmp_path / "index.py"  # the command line, with small shards
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(retriever.__file__).parent)!r})\n"
        "import retriever; retriever.SHARD = 64; retriever.main()"
    )
    words = ["index", "--kind", "dense", "--encoder", encoder_folder, "--corpus", tmp_path / "corpus.jsonl", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, out in (([], "one"), (torchrun, "two")):
        subprocess.run([sys.executable, *launcher, script, *words, tmp_path / out], check=True, capture_output=True)
    for file in (tmp_path / "one").glob("vectors-*.npy"):
        np.testing.assert_allclose(np.load(file), np.load(tmp_path / "two" / file.name), atol=1e-3)
    assert (tmp_path / "two" / "faiss.index").exists()


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "SQ8", "IVF4,PQ16x4", "HNSW8,SQ8"])
def test_any_factory_finds_most_of_what_flat_finds(encoder_folder, corpus, tmp_path, factory):
    folder = tmp_path / "index"
    build_dense(corpus, folder, encoder_folder, "Flat", "", None)
    queries = [f"town {i} w0" for i in range(20)]
    exact = [{p["id"] for p in found} for found in open_retriever(str(folder)).search(queries, 10)]
    vectors = {file: file.stat().st_mtime_ns for file in folder.glob("vectors-*")}
    parameters = "nprobe=4" if "IVF" in factory else ""
    build_dense(corpus, folder, encoder_folder, factory, parameters, None)
    assert vectors == {file: file.stat().st_mtime_ns for file in folder.glob("vectors-*")}  # another index of the same
    assert json.loads((folder / "index.json").read_text())["factory"] == factory
    search = open_retriever(str(folder))
    if "IVF" in factory:
        assert faiss.downcast_index(search.index).nprobe == 4
    found = [{p["id"] for p in found} for found in search.search(queries, 10)]
    recall = sum(len(a & b) for a, b in zip(exact, found, strict=True)) / 200
    assert recall > (0.3 if "PQ" in factory else 0.8)


def test_a_prebuilt_index_opens_with_its_corpus_file(encoder_folder, tmp_path):
    """As Search-R1 publishes them: a faiss file, and a JSONL of id and contents in the same order."""
    lines = [{"id": str(i), "contents": f'"{p["title"]}"\n{p["text"]}'} for i, p in enumerate(PASSAGES)]
    corpus = str(write(tmp_path / "wiki-18.jsonl", lines))
    index = faiss.IndexFlatIP(32)
    index.add(by_hand(encoder_folder, [f"{p['title']} {p['text']}" for p in PASSAGES]))
    faiss.write_index(index, str(tmp_path / "e5_Flat.index"))
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", str(tmp_path / "e5_Flat.index"))
    assert not list((tmp_path / "index").glob("vectors-*"))
    with pytest.raises(ValueError, match="another prebuilt"):  # would embed all passages anew
        build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)
    (found,) = open_retriever(str(tmp_path / "index")).search(["town 9 w0 w1 w2"], 1)
    assert found[0]["title"] == "Town 9" and found[0]["score"] == pytest.approx(1, abs=1e-5)


def test_a_prebuilt_index_of_other_passages_is_refused(encoder_folder, corpus, tmp_path):
    index = faiss.IndexFlatIP(32)
    index.add(np.zeros((5, 32), np.float32))
    faiss.write_index(index, str(tmp_path / "small.index"))
    with pytest.raises(ValueError, match="5 vectors of size 32, but 300 passages"):
        build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", str(tmp_path / "small.index"))
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)  # and the folder is still free


def test_a_changed_or_moved_corpus(encoder_folder, corpus, tmp_path):
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)
    moved = tmp_path / "moved.jsonl"
    Path(corpus).rename(moved)
    with pytest.raises(FileNotFoundError, match="--corpus"):
        open_retriever(str(tmp_path / "index"))
    assert open_retriever(str(tmp_path / "index"), corpus=str(moved)).search(["town"], 1)[0]
    build_dense(str(moved), tmp_path / "index", encoder_folder, "Flat", "", None)  # says where it is from now on
    assert open_retriever(str(tmp_path / "index")).search(["town"], 1)[0]
    moved.rename(corpus)
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)
    write(Path(corpus), PASSAGES[:-1])
    with pytest.raises(ValueError, match="another corpus"):
        open_retriever(str(tmp_path / "index"))


def test_an_empty_or_wrong_factory_or_index_is_one_line(encoder_folder, corpus, tmp_path):
    for factory, parameters in (("Nonsense", ""), ("IVF1024,Flat", ""), ("Flat", "nonsense=1")):
        with pytest.raises(ValueError, match="faiss refuses") as error:
            build_dense(corpus, tmp_path / "index", encoder_folder, factory, parameters, None)
        assert "\n" not in str(error.value)
    build_dense(corpus, tmp_path / "index", encoder_folder, "Flat", "", None)
    whole = (tmp_path / "index" / "faiss.index").read_bytes()
    for half in (b"", whole[:40], whole[: len(whole) // 2], whole[:-1]):  # some of which would end the process by a signal
        (tmp_path / "index" / "faiss.index").write_bytes(half)
        with pytest.raises(ValueError, match=r"faiss\.index is not whole.*build it again") as error:
            open_retriever(str(tmp_path / "index"))
        assert "\n" not in str(error.value)


def test_an_encoder_that_is_a_pickle_is_refused(encoder_folder, corpus, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(encoder_folder, tmp_path / "e")
    (weights,) = (tmp_path / "e").rglob("*.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="no encoder there"):
        Encoder(str(tmp_path / "e"))


def test_the_command_line(encoder_folder, tmp_path):
    write(tmp_path / "corpus.jsonl", PASSAGES[:20])
    words = ["--kind", "dense", "--corpus", tmp_path / "corpus.jsonl", "--out", tmp_path / "index"]
    assert "--encoder" in command("index", *words).stderr
    assert command("index", *words, "--encoder", encoder_folder, "--factory", "HNSW8").returncode == 0
    assert json.loads((tmp_path / "index" / "index.json").read_text())["encoder"] == encoder_folder
    assert command("search", "--index", tmp_path / "index", "town 3 w0 w1 w2 w3", "-k", 1).stdout == "Town 3: w0 w1 w2 w3\n"
