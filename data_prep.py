"""Questions and corpora.

python data_prep.py kilt --source kilt_knowledgesource.json --out data/passages.jsonl      # the paper's corpus
python data_prep.py corpus --format wiki-18 --source wiki-18.jsonl --out data/passages.jsonl
python data_prep.py questions --format hotpotqa --source hotpot_train_v1.1.json --out hotpotqa.jsonl    # a training set
python data_prep.py difficulty --questions hotpotqa.jsonl --model MODEL --retriever index --out difficulty.jsonl
python data_prep.py mix --stage 2 --questions difficulty.jsonl ... --exclude test.jsonl ... --out data/stage_2.jsonl
"""

import argparse
import bz2
import csv
import fcntl
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from records import (
    MALFORMED,
    Passage,
    clean,
    parse_passage,
    parse_question,
    read_jsonl,
    read_questions,
    user_errors,
    whole,
    write_jsonl,
    write_text,
)
from retriever import open_retriever

# ---------------------------------------------------------------------------------------------------------------------
# The demo world's words


# ---------------------------------------------------------------------------------------------------------------------
# The demo model


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
    return [json.loads(line)]


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
            passages += map(parse_passage, FORMATS[format](line, n) if line.strip() else [])
        except (*MALFORMED, csv.Error) as error:
            raise ValueError(f"{path}:{n}: not a line of the format {format}, {error!r:.200}") from None
    return "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in passages).encode(), len(passages)


def source_files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


def chunks(source: Path, bar: tqdm) -> Iterator[tuple[Path, int, list[bytes]]]:
    """About 1 MiB of lines at a time, with their file and the number of the first."""
    for path in source_files(source):
        number, before = 1, bar.n
        with open(path, "rb") as raw, OPENERS.get(path.suffix, nullcontext)(raw) as file:
            try:
                while lines := file.readlines(1 << 20):
                    yield path, number, lines
                    number += len(lines)
                    bar.update(before + raw.tell() - bar.n)
            except (EOFError, zlib.error) as error:
                raise ValueError(f"{path}: damaged after line {number - 1} ({error})") from None


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
    files = [file.stat() for file in source_files(source)]
    size, written = sum(file.st_size for file in files), [file.st_mtime_ns for file in files]
    origin = {"source": str(source.resolve()), "format": format, "size": size, "written": written}
    done = {"origin": origin, "chunks": 0, "bytes": 0, "passages": 0}
    refuse_to_overwrite(out)
    if source.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: it is within the source, and would be read as such")
    if workers < 1:
        raise ValueError("--workers: at least 1")
    if not partial.exists():
        note.unlink(missing_ok=True)
    if note.exists():
        with whole(note, "remove it to begin again"):
            before = json.loads(note.read_text())
            done = {name: type(value)(before[name]) for name, value in done.items()}
        if done["origin"] != origin or not 0 <= done["bytes"] <= partial.stat().st_size:
            raise ValueError(f"{note}: begun from {done['origin']}, not from {origin}; remove it to begin again")
    bar = tqdm(total=size, desc=str(out), unit="B", unit_scale=True, mininterval=1)
    with open(partial, "ab") as file, bar, ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial}: another call is writing it") from None
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


# ---------------------------------------------------------------------------------------------------------------------
# Questions: published data sets, the difficulty of their questions, and the training sets drawn from both

# What each data set calls the id (on the Hub all say id). The rest they share, but for capitals and MuSiQue's aliases.
ID_FIELDS = {"hotpotqa": "_id", "2wiki": "_id", "musique": "id", "bamboogle": None}


def local_file(source: str) -> Path:
    """A file here, or one of the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION]/FILE or its page's address."""
    if "://" not in source:
        return Path(source)
    from huggingface_hub import hf_hub_download, parse_hf_uri

    try:
        uri = parse_hf_uri(source)
        return Path(hf_hub_download(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None  # the Hub's messages have many lines


def raw_records(path: Path) -> Iterator[tuple[str, dict | bytes]]:
    """Where each record of a JSON array, a JSONL or a CSV file stands, and the record or its line of JSON."""
    data = path.read_bytes()
    if data.startswith(b"PAR1"):
        raise ValueError("parquet; save it as JSON lines first")
    if path.suffix == ".csv":
        yield from ((f"record {n}", row) for n, row in enumerate(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))), 1))
    elif data.lstrip().startswith(b"["):
        yield from ((f"record {n}", record) for n, record in enumerate(json.loads(data), 1))
    else:
        yield from ((f"line {n}", line) for n, line in enumerate(data.splitlines(), 1) if line.strip())


def published_questions(path: Path, format: str) -> tuple[list[dict], int]:
    """The questions of a published file, and how many it says cannot be answered (MuSiQue); these are left out.

    Raises:
        ValueError: names the file, the line or record, and what is wrong there.
    """
    if format == "r1-searcher":
        return read_questions(path), 0
    questions, left_out, where = {}, 0, "as a whole"
    try:
        for where, raw in raw_records(path):  # noqa: B007
            record = {key.lower(): value for key, value in (raw if isinstance(raw, dict) else json.loads(raw)).items()}
            if not record.get("answerable", True):
                left_out += 1
                continue
            key = ID_FIELDS[format]
            name = clean(str(record[key if key in record else "id"])) if key else f"{format}-{len(questions) + 1}"
            text = clean(record["question"].strip())
            answers = [clean(str(a).strip()) for a in (record["answer"], *record.get("answer_aliases", []))]
            if not text or not answers[0] or record["answer"] is None:
                raise ValueError("a question without text or answer")
            if name in questions:
                raise ValueError(f"id {name!r} occurs twice")
            answers = [a for a in dict.fromkeys(answers) if a]
            questions[name] = {"id": name, "question": text, "answers": answers, "dataset": format}
    except (*MALFORMED, csv.Error) as error:
        raise ValueError(f"{path}, {where}: not of the format {format}, {error!r:.200}") from None
    if not questions:
        raise ValueError(f"{path}: it holds no question of the format {format}")
    return list(questions.values()), left_out


def refuse_to_overwrite(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already; remove it to make it again")
    out.parent.mkdir(parents=True, exist_ok=True)


def make_questions(args: argparse.Namespace) -> None:
    """Write the questions of a published file, or a sample of them, in the file's order."""
    refuse_to_overwrite(args.out)
    questions, left_out = published_questions(local_file(args.source), args.format)
    if not 0 <= args.sample <= len(questions):
        raise ValueError(f"--sample {args.sample}: {args.source} has {len(questions)} questions")
    indices = range(len(questions))
    chosen = sorted(random.Random(args.seed).sample(indices, args.sample)) if args.sample else indices
    write_jsonl(args.out, [questions[i] for i in chosen])
    drawn = f" (--sample {args.sample} --seed {args.seed})" if args.sample else ""
    print(f"{args.out}: {len(chosen)} of {len(questions)} questions{drawn}; {left_out} that cannot be answered left out")


def level(rollouts: int, solved: bool) -> str:
    """The paper's bounds on the rollouts until the first right answer."""
    needed = rollouts + (not solved)  # at least so many
    if needed <= 20 and not solved:
        return "undecided"  # given up too early to tell
    return "easy" if needed < 10 else "medium" if needed <= 20 else "hard"


def roll_out_until_right(rollout, encode, questions: list[dict], verdicts: dict, args) -> Iterator[tuple[str, bool]]:
    """Yield (id, whether right) of every rollout, until each question has a right one or `max_rollouts`.

    All are in one continuous batch, each with one rollout at a time. A question that is done leaves its place to the next;
    one that is not goes to the end of the line. `verdicts`: by id, of the rollouts so far; grows.

    Raises:
        RuntimeError: a search failed: what the model makes of that says nothing about the question.
    """
    from reward import judge
    from rollout import Episode, derive_seed

    def is_open(name: str) -> bool:
        return True not in verdicts[name] and len(verdicts[name]) < args.max_rollouts

    order = {q["id"]: i for i, q in enumerate(questions)}
    waiting = deque(q for q in questions if is_open(q["id"]))

    def episodes() -> Iterator[Episode | None]:
        while True:
            q = waiting.popleft() if waiting else None
            seed = q and derive_seed(args.seed, order[q["id"]], len(verdicts[q["id"]]))  # whatever else is under way
            yield q and Episode(q, encode(q["question"]), seed=seed)  # None: those under way may come back

    for episode in rollout.run(episodes()):
        if episode.search_failures:
            raise RuntimeError(f"{args.retriever}: {rollout.search_error}; the same command goes on from here")
        q, scores = episode.question, judge(episode.segments, len(episode.queries), episode.question["answers"])
        verdicts[q["id"]].append(scores[args.right] == 1)
        if is_open(q["id"]):
            waiting.append(q)
        yield q["id"], scores[args.right] == 1


def noted_verdicts(notes: Path, settings: dict, questions: list[dict]) -> dict[str, list[bool]]:
    """The verdicts that an interrupted call has noted, by id; what follows the last new line is torn and cut off."""
    verdicts = {q["id"]: [] for q in questions}
    lines = notes.read_bytes().split(b"\n")[:-1] if notes.exists() else []
    with whole(notes, "remove it to begin again"):
        before, *rollouts = map(json.loads, lines if len(lines) > 1 else [json.dumps(settings)])  # none yet: begin anew
        before = dict(before)
    for name, value in before.items():
        if settings.get(name) != value:
            raise ValueError(f"{notes}: begun with {name} {value}, not {settings.get(name)}; remove it to begin again")
    with whole(notes, "remove it to begin again"):
        for name, right in rollouts:
            verdicts[name].append(bool(right))
    write_jsonl(notes, [settings, *rollouts])
    return verdicts


def make_difficulty(args: argparse.Namespace) -> None:
    """Write the questions with `rollouts` and `solved`. Every rollout is noted; a later call goes on from there."""
    refuse_to_overwrite(args.out)
    if args.max_rollouts < 1:
        raise ValueError("--max_rollouts must be at least 1")
    questions = read_questions(args.questions)

    import torch
    from transformers import AutoTokenizer

    from reward import TAGS, load_prompt
    from rollout import ENGINES, Limits, Rollout, prompt_encoder

    search = open_retriever(args.retriever).search
    free = ("handler", "out", "gpu_memory_utilization")
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    settings["sha256"] = hashlib.sha256(json.dumps(questions).encode()).hexdigest()  # of the questions
    notes = args.out.with_name(args.out.name + ".progress")
    verdicts = noted_verdicts(notes, settings, questions)
    limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = prompt_encoder(tokenizer, load_prompt(args.prompt_file))
    engine = ENGINES[args.engine](args.model, args.max_context, args.gpu_memory_utilization)
    rollout = Rollout(engine, tokenizer, search, TAGS, limits, deterministic=not torch.cuda.is_available())
    total = sum(len(v) if True in v else args.max_rollouts for v in verdicts.values())
    bar = tqdm(desc="at most", total=total, initial=sum(map(len, verdicts.values())), unit=" rollouts")
    with open(notes, "a", buffering=1) as file, bar:  # line by line, so that a killed call keeps them
        for name, right in roll_out_until_right(rollout, encode, questions, verdicts, args):
            file.write(json.dumps([name, right]) + "\n")
            bar.total -= (args.max_rollouts - len(verdicts[name])) * right  # those that are spared
            bar.update()
    counted = [q | {"rollouts": len(verdicts[q["id"]]), "solved": True in verdicts[q["id"]]} for q in questions]
    write_jsonl(args.out, counted)
    notes.unlink()
    for (unsolved, rollouts), count in sorted(Counter((not q["solved"], q["rollouts"]) for q in counted).items()):
        name = "unsolved after" if unsolved else "solved by"
        print(f"{name:>14} {rollouts:3} {count:6} {'#' * (60 * count // len(counted))}")
    levels = Counter(level(q["rollouts"], q["solved"]) for q in counted)
    print(f"{args.out}: {len(counted)} questions, {', '.join(f'{count} {name}' for name, count in levels.most_common())}")


STAGES = {  # the paper's counts
    1: ["hotpotqa:medium:200", "2wiki:medium:150"],
    2: ["hotpotqa:medium:2561", "hotpotqa:hard:2000", "2wiki:medium:1087", "2wiki:hard:2500"],
}


def parse_draw(text: str) -> tuple[str, str, int]:
    """DATASET:LEVEL:COUNT. An `argparse` type."""
    dataset, difficulty, count = text.split(":")
    if difficulty not in ("easy", "medium", "hard") or int(count) < 1:
        raise ValueError
    return dataset, difficulty, int(count)


def read_counted(path: Path) -> list[dict]:
    """The questions that `make_difficulty` wrote, with `rollouts` and `solved`; errors as in `read_jsonl`."""

    def parse(record: dict) -> dict:
        counts = {"rollouts": record["rollouts"], "solved": record["solved"]}
        if [type(value) for value in counts.values()] != [int, bool]:
            raise ValueError("rollouts must be a whole number, solved true or false")
        return parse_question(record, path.stem) | counts

    return read_jsonl(path, parse, "a question with rollouts and solved")


def make_mix(args: argparse.Namespace) -> None:
    """Write the asked counts, in random order, without any question of the test sets or any text twice.

    Raises:
        ValueError: there are too few; all that is missing is named.
    """
    from reward import normalize

    refuse_to_overwrite(args.out)
    seen = {normalize(q["question"]) for file in args.exclude for q in read_questions(file)}
    files = [read_counted(file) for file in args.questions]
    pools: dict[tuple[str, str], list[dict]] = {}
    for record in chain(*files):
        if (text := normalize(record["question"])) not in seen:
            seen.add(text)
            record["difficulty"] = level(record["rollouts"], record["solved"])
            pools.setdefault((record["dataset"], record["difficulty"]), []).append(record)
    wanted: Counter[tuple[str, str]] = Counter()
    for dataset, difficulty, count in args.draw or map(parse_draw, STAGES[args.stage]):
        wanted[dataset, difficulty] += count
    have = {key: len(pools.get(key, [])) for key in wanted}
    if missing := [f"{' '.join(key)} {have[key]} of {count}" for key, count in wanted.items() if have[key] < count]:
        raise ValueError(f"too few questions: {', '.join(missing)}")
    rng = random.Random(args.seed)
    drawn = [record for key, count in wanted.items() for record in rng.sample(pools[key], count)]
    rng.shuffle(drawn)
    write_jsonl(args.out, drawn)
    read, kept = sum(map(len, files)), sum(map(len, pools.values()))
    print(f"{args.out}: {len(drawn)} questions (--seed {args.seed}); of {read}, {read - kept} are in the test sets or twice")


def add_difficulty_arguments(parser: argparse.ArgumentParser) -> None:
    from reward import METRICS, PROMPTS
    from rollout import ENGINES, Limits

    add = parser.add_argument
    add("--questions", required=True, help="question file (JSONL)")
    add("--model", required=True, help="Hugging Face folder (paper: Qwen2.5-7B-Instruct)")
    add("--retriever", required=True, help="passage file (JSONL), index folder or search server URL")
    add("--max_rollouts", type=int, default=20, help="give a question up after so many; 20 tell that it is hard")
    # The authors': each of their 350 stage-1 questions has an answer that acc_r takes among its 10, for em or f1 264 have
    add(
        "--right",
        choices=METRICS,
        default="acc_r",
        help="the metric that is 1 of a right answer (default acc_r, the authors')",
    )
    add("--prompt_file", default="chat", help=f"one of {', '.join(PROMPTS)}, or a text file with {{question}} in it")
    add("--engine", default="vllm", choices=ENGINES, help="inference engine")
    add("--gpu_memory_utilization", type=float, default=0.9, help="the engine's share of the GPU")
    for name, value in vars(Limits()).items():
        add(f"--{name}", type=type(value), default=value, help=f"default {value}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    questions = commands.add_parser("questions", help="published data sets to questions")
    questions.add_argument(
        "--format", choices=[*ID_FIELDS, "r1-searcher"], required=True, help="r1-searcher: its released sets"
    )
    questions.add_argument("--source", required=True, help="file (JSON, JSONL or CSV) or hf://datasets/OWNER/NAME/FILE")
    questions.add_argument("--sample", type=int, default=0, help="draw so many (the paper's test sets: 500); 0 is all")
    difficulty = commands.add_parser("difficulty", help="roll questions out until the first right answer")
    add_difficulty_arguments(difficulty)
    mix = commands.add_parser("mix", help="draw a training set by data set and difficulty")
    mix.add_argument("--questions", type=Path, nargs="+", required=True, help="what `difficulty` wrote")
    mix.add_argument("--exclude", type=Path, nargs="*", default=[], help="test sets (JSONL), of which none may be drawn")
    counts = mix.add_mutually_exclusive_group(required=True)
    counts.add_argument("--stage", type=int, choices=STAGES, help="the paper's counts")
    counts.add_argument(
        "--draw", type=parse_draw, nargs="+", metavar="DATASET:LEVEL:COUNT", help="LEVEL: easy, medium or hard"
    )
    recipe = ((questions, make_questions, "draw"), (difficulty, make_difficulty, "sampling"), (mix, make_mix, "draw"))
    for command, handler, what in recipe:
        command.add_argument("--seed", type=int, default=0, help=f"of the {what}")
        command.add_argument("--out", type=Path, required=True, help="file to write")
        command.set_defaults(handler=handler)
    kilt = commands.add_parser("kilt", help="KILT's knowledge source in passages of 100 words")
    corpus = commands.add_parser("corpus", help="other published corpora to passages")
    corpus.add_argument(
        "--format", choices=FORMATS, required=True, help="wiki-18: Search-R1's; dpr: psgs_w100.tsv; hotpotqa: its abstracts"
    )
    kilt.set_defaults(format="kilt")
    for command in (kilt, corpus):
        add = command.add_argument
        add("--source", type=Path, required=True, help="file (also .gz, .bz2) or a folder of such files")
        add("--out", type=Path, required=True, help="passage file to write; an interrupted call is gone on with")
        add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
        command.set_defaults(handler=lambda args: make_corpus(args.source, args.out, args.format, args.workers))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("data_prep.py"):
        args.handler(args)


if __name__ == "__main__":
    main()
