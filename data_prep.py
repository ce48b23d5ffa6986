"""Corpora and training sets from published files.

    python data_prep.py kilt --source kilt_knowledgesource.json --out data/passages.jsonl
    python data_prep.py corpus --format wiki-18 --source wiki-18.jsonl --out data/passages.jsonl
    python data_prep.py questions --format hotpotqa --source hotpot_train_v1.1.json --out q.jsonl
    python data_prep.py difficulty --questions q.jsonl --model MODEL --retriever index --out d.jsonl
    python data_prep.py mix --stage 2 --questions d.jsonl --exclude test.jsonl --out stage_2.jsonl

The paper's corpus is that of `kilt`. Its training sets are drawn by `mix` from HotpotQA and
2WikiMultiHopQA, by the difficulty of the questions (difficulty.py).
"""

import bz2
import csv
import gzip
import io
import json
import random
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import tyro
from filelock import FileLock
from tqdm import tqdm

from difficulty import level, make_difficulty
from records import (
    MALFORMED,
    Passage,
    answer_texts,
    content_files,
    fsync_and_rename,
    parse_passage,
    parse_question,
    read_jsonl,
    read_questions,
    refuse_to_overwrite,
    reraise_corrupt,
    user_errors,
    write_jsonl,
)
from reward import normalize

# --------------------------------------------------------------------------------------------------
# Sources


def local_file(source: str) -> Path:
    """A local file, or the local copy of a file of the Hugging Face Hub.

    Args:
        source: a path, hf://datasets/OWNER/NAME[@REVISION]/FILE, or the address of the file's page.
    Raises:
        ValueError: the Hub has no such file or cannot be reached.
    """
    if "://" not in source:
        return Path(source)
    from huggingface_hub import hf_hub_download, parse_hf_uri

    try:
        uri = parse_hf_uri(source)
        copy = hf_hub_download(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())  # the Hub's messages have many lines
        raise ValueError(f"{source}: {message}") from None
    return Path(copy)


# --------------------------------------------------------------------------------------------------
# Corpora. A format is a function from the JSON value of a published file's line to passages.


def kilt_passages(article: dict) -> list[Passage]:
    """An article of KILT, cut every 100 words as in the official split.

    The article's paragraphs are joined first, and two markers of the layout are removed.
    """
    text = "".join(article["text"]).replace("BULLET::::", "").replace("Section::::", "")
    words = text.split()
    passages = []
    for n, start in enumerate(range(0, len(words), 100)):
        name = f"{article['wikipedia_id']}-{n}"
        text = " ".join(words[start : start + 100])
        passages.append({"id": name, "title": article["wikipedia_title"], "text": text})
    return passages


def wiki18_passages(passage: dict) -> list[Passage]:
    """A passage of Search-R1's corpus, or of any corpus in our own format."""
    return [passage]


def hotpotqa_passages(abstract: dict) -> list[Passage]:
    """An abstract of HotpotQA's Wikipedia: one passage of all its sentences, if it has any."""
    text = " ".join("".join(abstract["text"]).split())
    passage = {"id": abstract["id"], "title": abstract["title"], "text": text}
    return [passage] if text else []


FORMATS = {
    "kilt": kilt_passages,
    "wiki-18": wiki18_passages,
    "hotpotqa": hotpotqa_passages,
}


def unzip(raw: BinaryIO) -> Iterator[bytes]:
    """The lines of an archive's JSONL files."""
    archive = zipfile.ZipFile(raw)
    for name in archive.namelist():
        if name.endswith(".jsonl") and not name.startswith("__MACOSX"):
            yield from archive.open(name)


DECOMPRESSORS = {".gz": gzip.open, ".bz2": bz2.open, ".zip": unzip}


def read_lines(files: list[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """Yield the lines of files, each with its file and number; a bar counts the bytes read.

    Raises:
        ValueError: a file is not of the compression that its suffix says, or it is damaged.
    """
    size = sum(path.stat().st_size for path in files)
    with tqdm(total=size, desc="corpus", unit="B", unit_scale=True, delay=1) as bar:
        for path in files:
            bytes_before = bar.n
            number = 0
            with open(path, "rb") as raw:
                file = DECOMPRESSORS[path.suffix](raw) if path.suffix in DECOMPRESSORS else raw
                try:
                    for number, line in enumerate(file, 1):
                        yield path, number, line
                        bar.update(bytes_before + raw.tell() - bar.n)
                except (EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{path}: damaged after line {number} ({error})") from None


def convert(files: list[Path], format: str) -> Iterator[Passage]:
    """Yield the passages of published files; raises ValueError with the file and the line."""
    for path, number, line in read_lines(files):
        if not line.strip():
            continue
        try:
            passages = [parse_passage(record) for record in FORMATS[format](json.loads(line))]
        except MALFORMED as error:
            raise ValueError(
                f"{path}:{number}: not a line of the format {format}, {error!r:.200}"
            ) from None
        yield from passages


def make_corpus(source: str, out: Path, format: Literal[tuple(FORMATS)]) -> None:
    """Convert a published corpus to passages, in constant memory.

    Args:
        source: file (also .gz, .bz2, .zip), folder of files, or hf://datasets/OWNER/NAME/FILE
        out: passage file to write
        format: kilt: articles, cut every 100 words; wiki-18: Search-R1's and FlashRAG's; hotpotqa:
            its abstracts
    """
    refuse_to_overwrite(out)
    path = local_file(source)
    if path.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: it is within the source, and would be read as such")
    partial = out.with_name(out.name + ".partial")
    count = 0
    with FileLock(partial, timeout=0):  # refuses a second call that would write the same file
        with open(partial, "w", encoding="utf-8") as file:
            for passage in convert(content_files(path), format):
                file.write(json.dumps(passage, ensure_ascii=False) + "\n")
                count += 1
        if count == 0:
            raise ValueError(f"{source}: it holds no line of the format {format}")
        fsync_and_rename(partial, out)
    print(f"{out}: {count} passages")


# --------------------------------------------------------------------------------------------------
# Questions of published data sets


def published_records(path: Path) -> Iterator[dict]:
    """Yield the records of a JSON array, JSONL, CSV or parquet file."""
    data = path.read_bytes()
    if data.startswith(b"PAR1"):
        import pyarrow.parquet

        with reraise_corrupt(path, "fetch it again"):
            table = pyarrow.parquet.read_table(path)
        for batch in table.to_batches():  # all rows as Python objects would need much more memory
            yield from batch.to_pylist()
    elif path.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
    elif data.lstrip().startswith(b"["):
        yield from json.loads(data)
    else:
        for line in data.splitlines():
            if line.strip():
                yield json.loads(line)


def search_r1_fields(record: dict) -> dict:
    """A record of Search-R1's training set, which joins several data sets, as other sets have it.

    Its question may stand only at the end of its prompt.
    """
    dataset = record["data_source"]
    question = record.get("question") or record["prompt"][-1]["content"].rpartition("Question: ")[2]
    return {
        "id": f"{dataset}-{record['extra_info']['index']}",
        "question": question,
        "golden_answers": record["reward_model"]["ground_truth"]["target"],
        "dataset": dataset,
    }


def published_questions(path: Path, dataset: str, aliases: bool = False) -> tuple[list[dict], int]:
    """The questions of a published file, and how many it says cannot be answered (MuSiQue).

    Args:
        aliases: whether the answer's aliases count as answers (MuSiQue).
    Raises:
        ValueError: names the file, the record and what is wrong there.
    """
    questions = {}
    unanswerable = 0
    try:
        for record in published_records(path):
            fields = {name.lower(): value for name, value in record.items()}
            if "reward_model" in fields:
                fields = search_r1_fields(fields)
            if not fields.get("answerable", True):
                unanswerable += 1
                continue
            # The authors' files say _id, the Hub's say id, and Bamboogle's questions have none.
            name = fields.get("_id", fields.get("id", f"{dataset}-{len(questions) + 1}"))
            answers = answer_texts(fields.get("golden_answers") or fields["answer"])
            if aliases:
                answers += fields.get("answer_aliases") or []
            question = {"id": name, "question": fields["question"], "answers": answers}
            question = parse_question(question, fields.get("dataset") or dataset)
            question["answers"] = list(dict.fromkeys(question["answers"]))  # each once
            if question["id"] in questions:
                raise ValueError(f"id {question['id']!r} occurs twice")
            questions[question["id"]] = question
    except (*MALFORMED, csv.Error) as error:
        number = len(questions) + unanswerable + 1
        raise ValueError(
            f"{path}, record {number}: not of the format {dataset}, {error!r:.200}"
        ) from None
    if not questions:
        raise ValueError(f"{path}: it holds no question of the format {dataset}")
    return list(questions.values()), unanswerable


def make_questions(
    source: str,
    out: Path,
    format: Literal[
        "hotpotqa", "2wiki", "musique", "bamboogle", "r1-searcher", "flashrag", "search-r1"
    ],
    sample: int = 0,
    seed: int = 0,
    aliases: bool = False,
) -> None:
    """Convert a published data set, or a sample of it, to questions in the file's order.

    Args:
        source: file (JSON, JSONL, CSV or parquet) or hf://datasets/OWNER/NAME/FILE
        out: question file to write
        format: data set; r1-searcher and search-r1: the training sets that their authors released;
            flashrag: a set as FlashRAG publishes it, named as the folder that holds the file
        sample: draw so many (the paper's test sets: 500); 0 is all
        seed: of the draw
        aliases: MuSiQue's aliases count as answers too; the paper's test set has one answer each
    """
    refuse_to_overwrite(out)
    path = local_file(source)
    unanswerable = 0
    if format == "r1-searcher":
        questions = read_questions(path)
    else:
        dataset = path.absolute().parent.name if format == "flashrag" else format
        questions, unanswerable = published_questions(path, dataset, aliases)
    total = len(questions)
    if not 0 <= sample <= total:
        raise ValueError(f"--sample {sample}: {source} has {total} questions")
    if sample:
        indices = random.Random(seed).sample(range(total), sample)
        questions = [questions[index] for index in sorted(indices)]
    write_jsonl(out, questions)
    left_out = f"{unanswerable} that cannot be answered left out"
    print(f"{out}: {len(questions)} of {total} questions; {left_out}")


# --------------------------------------------------------------------------------------------------
# The mix

STAGES = {  # the paper's counts
    1: ("hotpotqa:medium:200", "2wiki:medium:150"),
    2: ("hotpotqa:medium:2561", "hotpotqa:hard:2000", "2wiki:medium:1087", "2wiki:hard:2500"),
}


def parse_draw(text: str) -> tuple[str, str, int]:
    """Data set, level and count; raises ValueError."""
    draw = re.fullmatch(r"(.+):(easy|medium|hard):([1-9][0-9]*)", text)
    if draw is None:
        raise ValueError(f"--draw {text}: expected DATASET:LEVEL:COUNT, LEVEL easy, medium or hard")
    return draw[1], draw[2], int(draw[3])


def parse_counted(record: dict) -> dict:
    """A question as `make_difficulty` writes it; raises one of `MALFORMED` else."""
    rollouts = record["rollouts"]
    solved = record["solved"]
    if type(rollouts) is not int or type(solved) is not bool:
        raise ValueError("rollouts must be a whole number, solved true or false")
    difficulty = {"rollouts": rollouts, "solved": solved, "difficulty": level(rollouts, solved)}
    return parse_question(record, record["dataset"]) | difficulty


def make_mix(
    questions: list[Path],
    out: Path,
    exclude: tuple[Path, ...] = (),
    stage: Literal[tuple(STAGES)] | None = None,
    draw: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Draw a training set by data set and level, in which no question occurs twice.

    Args:
        questions: what `difficulty` wrote
        out: question file to write
        exclude: test sets (JSONL), of which no question may be drawn
        stage: draw the paper's counts
        draw: in place of --stage, DATASET:LEVEL:COUNT each; LEVEL is easy, medium or hard
        seed: of the draw
    """
    refuse_to_overwrite(out)
    if (stage is None) == (not draw):
        raise ValueError("one of --stage and --draw is needed")
    counts = Counter()
    for dataset, difficulty, count in map(parse_draw, draw or STAGES[stage]):
        counts[dataset, difficulty] += count
    taken = set()
    for file in exclude:
        taken.update(normalize(question["question"]) for question in read_questions(file))
    pools = defaultdict(list)
    for number, file in enumerate(questions, 1):
        for question in read_jsonl(file, parse_counted, "a question with rollouts and solved"):
            text = normalize(question["question"])
            if text not in taken:
                taken.add(text)
                # FlashRAG numbers the questions of each data set from 0, Search-R1 those of a file.
                question["id"] = f"{question['dataset']}-{number}-{question['id']}"
                pools[question["dataset"], question["difficulty"]].append(question)
    missing = []
    for pool, count in counts.items():
        if len(pools[pool]) < count:
            missing.append(f"{' '.join(pool)} {len(pools[pool])} of {count}")
    if missing:
        raise ValueError(f"too few questions: {', '.join(missing)}")
    rng = random.Random(seed)
    drawn = []
    for pool, count in counts.items():
        drawn += rng.sample(pools[pool], count)
    rng.shuffle(drawn)
    write_jsonl(out, drawn)
    print(f"{out}: {len(drawn)} questions")


def main(argv: list[str] | None = None) -> None:
    commands = {
        "kilt": partial(make_corpus, format="kilt"),
        "corpus": make_corpus,
        "questions": make_questions,
        "difficulty": make_difficulty,
        "mix": make_mix,
    }
    with user_errors("data_prep.py"):
        tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, use_underscores=True, args=argv
        )


if __name__ == "__main__":
    main()
