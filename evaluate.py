"""Evaluation: what a model answers to question files, scored, with the protocol and 95 % intervals.

    python evaluate.py run --model M --questions a.jsonl b.jsonl --retriever R --out DIR   # interrupted, it goes on
    python evaluate.py score DIR/transcripts.jsonl    # or outputs as R1-Searcher released them
    python evaluate.py judge DIR/transcripts.jsonl --base_url http://127.0.0.1:8000/v1 --model NAME

`run` uses the loop, the prompt and the rules of training (the official code has other prompts, stops and caps in training
than in evaluation). Every question of every file is answered and counted once; decoding is greedy by default.
"""

import argparse
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import retriever
from records import clean, fingerprint, read_jsonl, read_questions, texts, user_errors, whole, write_jsonl, write_text
from reward import FORMAT_RULES, JUDGE_PROMPT, METRICS, PROMPTS, TAGS, best, contiguous_match, judge, load_prompt, verdict
from rollout import ENGINES, Episode, Limits, Rollout, derive_seed, prompt_encoder

VERSION = 2  # of the protocol: to be raised when the same model would get other numbers

# ---------------------------------------------------------------------------------------------------------------------
# Records, and what is said of many


def grade(episode: Episode, reward: str) -> None:
    """Judge a finished episode, in training and in evaluation alike."""
    episode.rewards = judge(episode.segments, len(episode.queries), episode.question["answers"], reward)


def record(episode: Episode) -> dict:
    """One line of `transcripts.jsonl`; the episode must have been judged."""
    return {
        **episode.question,
        **episode.rewards,
        "searches": len(episode.queries),
        "queries": episode.queries,
        "finish_reason": episode.finish_reason,
        "search_failures": episode.search_failures,
        "response_len": sum(episode.action_mask),
        "segments": episode.segments,
    }


def identity(question: dict) -> tuple[str, str]:
    """Ids are unique within a dataset: those of the released files all count from 1."""
    return question["dataset"], question["id"]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def summarize(records: list[dict]) -> dict[str, float]:
    """The README's metrics of answers, searches and format over the records of finished episodes."""
    return {
        "n": len(records),
        "reward": mean(r["reward"] for r in records),
        **{name: mean(r[name] for r in records) for name in METRICS},
        "search_rate": mean(r["searches"] > 0 for r in records),
        "searches": mean(r["searches"] for r in records),
        "format_rate": mean(r["failed_rule"] is None for r in records),
        **{f"failed_{rule.__name__}": mean(r["failed_rule"] == rule.__name__ for r in records) for rule in FORMAT_RULES},
        "truncated_rate": mean(r["finish_reason"] == "length" for r in records),
        "response_len": mean(r["response_len"] for r in records),
        "search_failures": sum(r["search_failures"] for r in records) / max(1, sum(r["searches"] for r in records)),
    }


def summarize_evaluation(records: list[dict]) -> dict[str, float]:
    """`summarize` with every number a mean over questions: failed searches as the share of questions that had one."""
    result = summarize(records)
    del result["search_failures"]
    return result | {"search_failed_rate": mean(r["search_failures"] > 0 for r in records)}


def measure(records: list[dict], summary: Callable[[list[dict]], dict[str, float]]) -> dict:
    """`summary` of the records with 95 % `intervals`: percentiles of 2,000 bootstrap resamples of the questions, seed 0."""
    import numpy as np

    result, n = summary(records), len(records)
    names = [name for name in result if name != "n"]
    values = np.array([[each.get(name, 0.0) for name in names] for each in (summary([r]) for r in records)])  # (N, M)
    random = np.random.default_rng(0)
    draws = (random.multinomial(n, np.full(n, 1 / n), size=100) for _ in range(20))  # how often each question is drawn
    means = np.concatenate([times @ values / n for times in draws])  # (2000, M)
    bounds = np.percentile(means, [2.5, 97.5], axis=0).round(6).T.tolist()
    return result | {"intervals": dict(zip(names, bounds, strict=True))}


def measure_by_dataset(records: list[dict], summary: Callable[[list[dict]], dict[str, float]]) -> dict[str, dict]:
    """`measure` of each dataset among the records, and of all of them as "all"."""
    names = sorted({r["dataset"] for r in records})
    parts = {name: measure([r for r in records if r["dataset"] == name], summary) for name in names}
    return parts if len(parts) == 1 else parts | {"all": measure(records, summary)}


def read_metrics(file: Path, part: str) -> dict:
    """The protocol or the results in a `metrics.json`."""
    text = file.read_bytes()
    with whole(file, "make the evaluation again"):
        found = dict(json.loads(text)[part])
        if part == "results":
            table(found)  # it can be shown
        return found


def read_results(folders: list[Path]) -> dict[str, dict]:
    """The results of several evaluations, by folder and dataset; with ACC_L where `judge` has been there."""
    results = {}
    for folder in folders:
        saved = read_metrics(folder / "metrics.json", "results")
        judged = folder / "transcripts.judged.jsonl"
        for dataset, scores in measure_by_dataset(read_outputs(judged), score).items() if judged.exists() else ():
            if "acc_l" in scores:
                saved[dataset]["acc_l"] = scores["acc_l"]
                saved[dataset].setdefault("intervals", {})["acc_l"] = scores["intervals"]["acc_l"]
        results |= {f"{folder.name} {dataset}": result for dataset, result in saved.items()}
    return results


COLUMNS = """
    n em f1 acc_r acc_r_contiguous acc_l search_rate searches format_rate truncated_rate search_failed_rate
""".split()


def show(column: str, value: float | list[float] | None) -> str:
    """A cell: percent, or a plain number for a count; an interval as low-high; nothing for what was not measured."""
    if isinstance(value, list):
        return "-".join(show(column, bound) for bound in value).replace("%-", "-")
    return "" if value is None else {"n": f"{value:.0f}", "searches": f"{value:.2f}"}.get(column, f"{value:.1%}")


def table(results: dict[str, dict]) -> str:
    """Results by name as an aligned table, of each the numbers and, where it has them, their intervals beneath."""
    columns = [c for c in COLUMNS if any(c in result for result in results.values())]
    rows = [["", *columns]]
    for name, result in results.items():
        rows.append([name, *(show(c, result.get(c)) for c in columns)])
        if "intervals" in result:
            rows.append(["  95 %", *(show(c, result["intervals"].get(c)) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in rows]
    return "\n".join("  ".join(line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# run: answer question files

# vLLM does not promise that its numbers are the same whatever sequences share a step. Groups of questions that run by
# themselves, after one another, are the same in a run that was interrupted. (32 questions of the demo showed no difference.)
GROUP = 16


def answer(rollout: Rollout, encode, questions: list[dict], seed: int = 0, reward: str = "stage2") -> Iterable[dict]:
    """Roll the questions out and yield a judged record for each as it finishes."""
    episodes = (Episode(q, encode(q["question"]), seed=derive_seed(seed, *identity(q))) for q in questions)
    for episode in rollout.run(episodes):
        grade(episode, reward)
        yield record(episode)


def read_question_files(paths: list[str], limit: int) -> list[dict]:
    """The questions of all files, of each the first `limit` (0: all); errors as in `read_questions`."""
    questions = [question for path in paths for question in read_questions(path)[: limit or None]]
    for (dataset, name), times in Counter(map(identity, questions)).items():
        if times > 1:
            raise ValueError(f"--questions: id {name!r} of dataset {dataset!r} is in {times} of the files")
    return questions


def model_fingerprint(model: str) -> str:
    """Of every file in the model's folder; of a name on the hub the revision."""
    from transformers.utils import cached_file

    try:
        folder = Path(cached_file(model, "config.json")).parent
    except (OSError, ValueError):
        raise FileNotFoundError(f"{model}: neither a model folder nor a model of the hub (--model)") from None
    return fingerprint(folder) if Path(model).is_dir() else folder.name


def commit() -> str:
    """The commit of this code, with "-dirty" if it was changed; "unknown" outside a repository or without git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(args: argparse.Namespace) -> dict:
    """The protocol: all that the numbers depend on."""
    prompt, source = json.dumps(load_prompt(args.prompt_file)).encode(), Path(args.retriever)
    corpus = source / "index.json" if source.is_dir() else source  # an index names its corpus by fingerprint
    return {
        "evaluator": VERSION,
        "commit": commit(),
        "model": {"path": args.model, "fingerprint": model_fingerprint(args.model)},
        "questions": [[path, fingerprint(path)] for path in args.questions],
        "limit": args.limit,
        "retriever": {"source": args.retriever, "fingerprint": fingerprint(corpus) if corpus.is_file() else None},
        "prompt": {"name": args.prompt_file, "sha256": hashlib.sha256(prompt).hexdigest()},
        "engine": args.engine,
        "seed": args.seed,
        **{name: getattr(args, name) for name in Limits.__dataclass_fields__},
    }


def refuse_another(file: Path, before: dict, now: dict, may_differ: tuple[str, ...] = ()) -> None:
    other = [name for name in now if name not in may_differ and before.get(name) != now[name]]
    if other:
        raise ValueError(f"{file}: holds another evaluation ({', '.join(other)}); give another --out")


def resume(journal: Path, protocol: dict, questions: list[dict], group: int) -> list[dict]:
    """What an interrupted run left, in the questions' order: those of whole groups. The others go.

    Raises:
        ValueError: the journal is of another protocol, or it is damaged other than by a half-written last line.
    """
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    with whole(journal):
        before, *records = map(dict, map(json.loads, lines or [json.dumps(protocol)]))
        finished = {identity(r): r for r in records}
    refuse_another(journal, before, protocol)
    groups = [[identity(q) for q in questions[i : i + group]] for i in range(0, len(questions), group)]
    kept = [finished[name] for names in groups if finished.keys() >= set(names) for name in names]
    write_jsonl(journal, [protocol, *kept])
    return kept


def roll_out(args: argparse.Namespace, questions: list[dict], journal: Path, protocol: dict) -> list[dict]:
    """A record of each question, in order: those that the journal has, the others as they finish, into the journal first."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    on_gpu = torch.cuda.is_available()  # there no two runs are alike to the bit, and nothing is gained by groups
    grouped = args.engine == "vllm" and not on_gpu
    records = resume(journal, protocol, questions, GROUP if grouped else 1)
    done = set(map(identity, records))
    left = [question for question in questions if identity(question) not in done]
    if left:
        search = retriever.open_retriever(args.retriever).search
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encode = prompt_encoder(tokenizer, load_prompt(args.prompt_file))
        engine = ENGINES[args.engine](args.model, args.max_context, args.gpu_memory_utilization)
        limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
        rollout = Rollout(engine, tokenizer, search, TAGS, limits, deterministic=not on_gpu)
        size = GROUP if grouped else len(left)
        bar = tqdm(desc="evaluate", total=len(questions), initial=len(records), unit="q")
        with open(journal, "a", encoding="utf-8") as stream, bar:
            for start in range(0, len(left), size):
                if grouped:
                    engine.llm.reset_prefix_cache()  # what it holds changes the numbers too
                for answered in answer(rollout, encode, left[start : start + size], args.seed):
                    stream.write(json.dumps(answered, ensure_ascii=False) + "\n")
                    stream.flush()
                    records.append(answered)
                    bar.update()
        if rollout.search_error:
            print(f"searches failed, the last one with: {rollout.search_error}", file=sys.stderr)
    finished = {identity(r): r for r in records}
    return [finished[identity(question)] for question in questions]


def run(args: argparse.Namespace) -> None:
    """Answer, score, write `transcripts.jsonl` and `metrics.json` into `--out`."""
    questions, protocol = read_question_files(args.questions, args.limit), describe(args)
    args.out.mkdir(parents=True, exist_ok=True)
    metrics_file, transcripts = args.out / "metrics.json", args.out / "transcripts.jsonl"
    journal = args.out / "answered.jsonl.partial"
    if metrics_file.exists():
        before = read_metrics(metrics_file, "protocol")
        refuse_another(metrics_file, before, protocol, may_differ=("commit",))  # of those that answered
        print(f"{args.out}: evaluated already")
    else:
        records = roll_out(args, questions, journal, protocol)
        write_jsonl(transcripts, records)
        done = {"protocol": protocol, "results": measure_by_dataset(records, summarize_evaluation)}
        write_text(metrics_file, json.dumps(done, indent=1))
    journal.unlink(missing_ok=True)
    print(table(read_results([args.out])))
    print(f"transcripts: {transcripts}\nmetrics: {metrics_file}")


# ---------------------------------------------------------------------------------------------------------------------
# score and judge: outputs that are there already

SCORES = METRICS | {"acc_r_contiguous": contiguous_match}


def read_outputs(path: Path) -> list[dict]:
    """Every line of `transcripts.jsonl` or of a released file (`question, answer, pred_ans, gpt4o_output`) as an output.

    An output is `{"record": the line, "dataset", "question", "answers", "prediction", "reply": the judge's, None without}`.
    """
    numbers = count()

    def parse(line: dict) -> dict:
        line = json.loads(clean(json.dumps(line, ensure_ascii=False)))
        gold, prediction = ("answer", "pred_ans") if "pred_ans" in line else ("answers", "answer")
        answers = [a for a in texts(line[gold]) if a]
        dataset = line.get("dataset") or path.stem
        if not (answers and isinstance(dataset, str)):
            raise ValueError("a question without an answer, or with a dataset that is no string")
        return {
            "id": next(numbers),  # released files have none, and may ask a question twice
            "record": line,
            "dataset": dataset,
            "question": line["question"],
            "answers": answers,
            "prediction": " ".join(texts(line[prediction])),
            "reply": line.get("judge_reply", line.get("gpt4o_output")),
        }

    return read_jsonl(path, parse, '{"question", "answers", "answer"} or {"question", "answer", "pred_ans"}')


def score(outputs: list[dict]) -> dict[str, float]:
    """Mean of each of `SCORES` and, if any output was judged, ACC_L over all of them."""
    scores = {name: mean(best(metric, o["prediction"], o["answers"]) for o in outputs) for name, metric in SCORES.items()}
    verdicts = [verdict(o["reply"]) for o in outputs]
    acc_l = {"acc_l": verdicts.count(True) / len(outputs)} if set(verdicts) != {None} else {}
    return {"n": len(outputs), **scores, **acc_l}


def show_verdicts(outputs: list[dict], missing: str) -> bool:
    """Say on stderr how many were judged; True if all were."""
    judged = sum(verdict(o["reply"]) is not None for o in outputs)
    without = sum(o["reply"] is None for o in outputs)
    print(f"judged {judged}, unparsed {len(outputs) - judged - without}, {missing} {without}", file=sys.stderr)
    return judged == len(outputs)


def run_score(args: argparse.Namespace) -> None:
    outputs = read_outputs(args.file)
    show_verdicts(outputs, "not judged")
    if args.json:
        percents = {name: round(100 * value, 1) for name, value in score(outputs).items() if name != "n"}
        print(json.dumps({"n": len(outputs), **percents, "acc_l": percents.get("acc_l")}))
    else:
        print(table(measure_by_dataset(outputs, score)))


def ask_judge(args: argparse.Namespace, prompts: list[str]) -> dict[str, str | None]:
    """The judge's reply to each prompt, from the cache if it is there; None where the request failed for good."""
    import requests
    from tqdm import tqdm

    url, key = args.base_url.rstrip("/") + "/chat/completions", os.environ.get("OPENAI_API_KEY")
    headers, lock, failures = {"Authorization": f"Bearer {key}"} if key else {}, threading.Lock(), []
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    with whole(args.cache):
        cache = sqlite3.connect(args.cache, timeout=60, check_same_thread=False, isolation_level=None)
        cache.execute("CREATE TABLE IF NOT EXISTS replies (url, model, prompt, reply, PRIMARY KEY (url, model, prompt))")

    def ask(prompt: str) -> str | None:
        asked = (url, args.model, prompt)
        with lock:
            row = cache.execute("SELECT reply FROM replies WHERE (url, model, prompt) = (?, ?, ?)", asked).fetchone()
        if row is None:
            messages = [{"role": "user", "content": prompt}]
            body = {"model": args.model, "messages": messages, "temperature": 0, "max_tokens": 16}
            try:
                answered = retriever.fetch(requests, "POST", url, json=body, headers=headers)
                with retriever.shape_of(url):
                    (choice,) = answered["choices"]
                    row = (clean(str(choice["message"]["content"] or "")),)
            except RuntimeError as error:
                failures.append(str(error))
                return None
            with lock:
                cache.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", asked + row)
        return row[0]

    different = list(dict.fromkeys(prompts))
    pool = ThreadPoolExecutor(args.concurrency)
    try:
        replies = list(tqdm(pool.map(ask, different), "judge", len(different), unit="q"))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for those that wait
    if failures:
        print(f"{len(failures)} requests failed, the last one: {failures[-1]}", file=sys.stderr)
    return dict(zip(different, replies, strict=True))


def run_judge(args: argparse.Namespace) -> None:
    """Write the records with the judge's reply and verdict beside; status 1 if some have none."""
    outputs, out = read_outputs(args.file), args.out or args.file.with_suffix(".judged.jsonl")
    if out.resolve() == args.file.resolve():
        raise ValueError(f"{out}: --out is the file to be judged")
    if out.exists() and any(o["record"].get("judge_model") != args.model for o in read_outputs(out)):
        raise ValueError(f"{out}: holds something other than verdicts of {args.model}; give another --out")
    prompts = [JUDGE_PROMPT.format(**o | {"answers": " | ".join(o["answers"])}) for o in outputs]
    replies = ask_judge(args, prompts)
    for output, prompt in zip(outputs, prompts, strict=True):
        output["reply"] = reply = replies[prompt]
        output["record"] |= {"judge": verdict(reply), "judge_reply": reply, "judge_model": args.model}
    write_jsonl(out, [output["record"] for output in outputs])
    complete, scores = show_verdicts(outputs, "failed"), score(outputs)
    note = "" if complete else ", those without a verdict counted as not right"
    print(f"ACC_L over all {len(outputs)} questions{note}: {scores['acc_l']:.1%}" if "acc_l" in scores else "ACC_L: none")
    print(f"judged outputs: {out}")
    sys.exit(0 if complete else 1)


# ---------------------------------------------------------------------------------------------------------------------
# plot: training curves


# ---------------------------------------------------------------------------------------------------------------------
# The report: report.html is the page, the data goes into it as JSON


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    """What a rollout needs: model, retriever, prompt, limits."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder")
    add("--retriever", required=True, help="passage file (JSONL), index folder or search server URL")
    add("--prompt_file", default="base", help=f"one of {', '.join(PROMPTS)}, or a text file with {{question}} in it")
    add("--engine", default="vllm", choices=ENGINES, help="inference engine")
    add("--gpu_memory_utilization", type=float, default=0.9, help="the engine's share of the GPU")
    add("--seed", type=int, default=0, help="of the sampling, if any")
    for name, value in vars(Limits(documents_per_search=5, temperature=0.0)).items():  # 5 documents (official code)
        add(f"--{name}", type=type(value), default=value, help=f"default {value}")


SCORE_HELP = """
EM, F1 and, of the accuracies, ACC_R: every gold token occurs in the prediction, in any order (as the official evaluator
computes it); ACC_R_CONTIGUOUS: they occur in one piece and in order; ACC_L: the share of all questions whose verdict in the
file is True. Tokens are lower-case, without punctuation and articles; of several gold answers the best counts."""
JUDGE_HELP = """
The key, if the server wants one, comes from OPENAI_API_KEY. Replies are cached by server, model and prompt, so that a second
call asks only what is missing. A reply that is not True or False is unparsed; it and a request that failed count as not
right in ACC_L, which is over all questions. Exit status 1 if any has no verdict."""
JUDGE_CACHE = Path.home() / ".cache" / "nanosearcher" / "judge.sqlite"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="answer question files and score the answers")
    add_rollout_arguments(run_parser)
    run_parser.add_argument("--questions", nargs="+", required=True, help="question files (JSONL)")
    run_parser.add_argument("--limit", type=int, default=0, help="only the first so many questions of each file; 0 is all")
    run_parser.add_argument("--out", type=Path, required=True, help="folder for transcripts.jsonl and metrics.json")
    run_parser.set_defaults(handler=run)
    score_parser = commands.add_parser("score", help="metrics of outputs", description=SCORE_HELP)
    score_parser.add_argument("--json", action="store_true", help="one object, in percent")
    score_parser.set_defaults(handler=run_score)
    judge_parser = commands.add_parser("judge", help="ACC_L: have a language model judge outputs", description=JUDGE_HELP)
    judge_parser.add_argument(
        "--base_url", required=True, help="of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"
    )
    judge_parser.add_argument("--model", required=True, help="the judge, as the server calls it")
    judge_parser.add_argument("--out", type=Path, help="default: FILE with .judged.jsonl for its suffix")
    judge_parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    judge_parser.add_argument("--cache", type=Path, default=JUDGE_CACHE, help=f"of replies (default {JUDGE_CACHE})")
    judge_parser.set_defaults(handler=run_judge)
    for outputs_parser in (score_parser, judge_parser):
        outputs_parser.add_argument("file", type=Path, help="transcripts.jsonl, or outputs as R1-Searcher released them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("evaluate.py"):
        args.handler(args)


if __name__ == "__main__":
    main()
