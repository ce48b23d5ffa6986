"""Evaluation: answer question files with a model, score the answers, have a judge look at them.

    python evaluate.py run --model M --questions a.jsonl b.jsonl --retriever R --out DIR
    python evaluate.py score DIR/transcripts.jsonl    # or outputs as R1-Searcher released them
    python evaluate.py judge DIR/transcripts.jsonl --base_url http://127.0.0.1:8000/v1 --model NAME

`run` uses the loop, the prompt and the rules of training (the official code has other prompts,
stops and caps in training than in evaluation), unless `--protocol` names another paper's; `--mode`
has baselines without the loop. Every question of every file is answered and counted once; decoding
is greedy by default. `run` and `judge` may be killed: the same command goes on.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from answerability import measure_answerability
from inference import answer_questions, check_limits, open_rollout, question_key
from metrics import JUDGE_PROMPT, format_cell, measure_by_dataset, table, verdict
from protocol import PROTOCOLS, Evaluation, complete_options, describe_protocol
from records import (
    MALFORMED,
    Journal,
    answer_texts,
    fingerprint,
    read_jsonl,
    read_questions,
    refuse_changed_settings,
    replace_surrogates,
    reraise_corrupt,
    user_errors,
    write_jsonl,
    write_text,
)
from reward import METRICS, best, contiguous_match
from search_client import url_path

# --------------------------------------------------------------------------------------------------
# run: answer question files


def read_question_files(paths: list[str], limit: int) -> list[dict]:
    """The first `limit` (0: all) questions of each file; errors as in `read_questions`.

    The dataset of questions that name none is their file's name, or its path if files share a name.
    """
    if limit < 0:
        raise ValueError("--limit must be at least 0")
    file_names = [Path(path).stem for path in paths]
    questions = {}
    for path in paths:
        is_unique = file_names.count(Path(path).stem) == 1
        for question in read_questions(path, None if is_unique else path)[: limit or None]:
            dataset, name = question_key(question)
            if (dataset, name) in questions:
                raise ValueError(f"{path}: id {name!r} of dataset {dataset!r} for the second time")
            questions[dataset, name] = question
    if not questions:
        raise ValueError("--questions: there is no question to answer")
    return list(questions.values())


def answer_remaining(evaluation: Evaluation, questions: list[dict], journal: Journal) -> list[dict]:
    """Answer the questions that the journal lacks; the records of all, in the questions' order."""
    with reraise_corrupt(journal.path, "remove it to begin again"):
        measure_by_dataset(journal.records)  # raises if an answer lacks its scores
        finished = {question_key(record): record for record in journal.records}
    remaining = [question for question in questions if question_key(question) not in finished]
    if remaining:
        protocol = PROTOCOLS[evaluation.protocol]
        rollout, encode = open_rollout(evaluation, protocol.tags, protocol.prompt_role)
        answered = answer_questions(
            rollout,
            lambda question: encode(protocol.ask(question)),
            remaining,
            evaluation.seed,
            search_first=evaluation.mode == "single",
        )
        for record in tqdm(answered, "evaluate", len(questions), initial=len(finished)):
            journal.append(record)
            finished[question_key(record)] = record
        if rollout.search_error:
            print(f"searches failed, the last one with: {rollout.search_error}", file=sys.stderr)
    return [finished[question_key(question)] for question in questions]


def read_metrics(file: Path) -> dict:
    """A `metrics.json`: {"protocol": {..}, "results": {dataset: {metric: value}}}."""
    text = file.read_bytes()
    with reraise_corrupt(file, "make the evaluation again"):
        metrics = json.loads(text)
        table(metrics["results"])  # raises if the results do not have their shape
        return {"protocol": dict(metrics["protocol"]), "results": metrics["results"]}


def read_results(folders: list[Path]) -> dict[str, dict]:
    """Results of evaluations by "FOLDER DATASET", with ACC_L where `judge` has been run.

    Folders that share a name stand with their paths. Verdicts on another file, such as an earlier
    evaluation's in the same folder, are left out.
    """
    names = [folder.name for folder in folders]
    results = {}
    for folder in folders:
        name = folder.name if names.count(folder.name) == 1 else folder
        judged_file = folder / "transcripts.judged.jsonl"
        judged = {}
        if judged_file.exists() and (folder / "transcripts.jsonl").exists():
            outputs = read_outputs(judged_file)
            transcripts_sha256 = fingerprint(folder / "transcripts.jsonl")
            if all(output.get("judged_sha256") == transcripts_sha256 for output in outputs):
                judged = measure_outputs(outputs)
            else:
                print(f"{judged_file}: left out, it judges another file", file=sys.stderr)
        for dataset, result in read_metrics(folder / "metrics.json")["results"].items():
            scores = judged.get(dataset, {})
            if "acc_l" in scores:
                result["acc_l"] = scores["acc_l"]
                result.setdefault("intervals", {})["acc_l"] = scores["intervals"]["acc_l"]
            results[f"{name} {dataset}"] = result
    return results


def run(evaluation: Annotated[Evaluation, tyro.conf.arg(name="")]) -> None:
    """Answer question files and score the answers; a finished evaluation is only shown."""
    evaluation = complete_options(evaluation)
    check_limits(evaluation)
    questions = read_question_files(evaluation.questions, evaluation.limit)
    protocol = describe_protocol(evaluation)
    out = evaluation.out
    out.mkdir(parents=True, exist_ok=True)
    journal_file = out / "answered.jsonl.partial"
    metrics_file = out / "metrics.json"
    if metrics_file.exists():
        # The software may differ: showing finished numbers claims nothing about today's software.
        saved = read_metrics(metrics_file)["protocol"]
        refuse_changed_settings(metrics_file, saved, protocol, "change --out", {"software"})
        print(f"{out}: evaluated already")
    else:
        answerable = [{} for _ in questions]
        if evaluation.answerability and evaluation.retriever is not None:
            answerable = measure_answerability(evaluation.retriever, questions)
        records = answer_remaining(evaluation, questions, Journal(journal_file, protocol))
        records = [record | row for record, row in zip(records, answerable, strict=True)]
        write_jsonl(out / "transcripts.jsonl", records)
        results = measure_by_dataset(records, PROTOCOLS[evaluation.protocol].metrics_of)
        metrics = {"protocol": protocol, "results": results}
        write_text(metrics_file, json.dumps(metrics, indent=1))
    journal_file.unlink(missing_ok=True)
    print(table(read_results([out])))
    print(f"transcripts: {out / 'transcripts.jsonl'}\nmetrics: {metrics_file}")


# --------------------------------------------------------------------------------------------------
# score: metrics of outputs that exist already


def read_outputs(path: Path) -> list[dict]:
    """Records of a `transcripts.jsonl`, or of a file as R1-Searcher released it.

    Released lines have `answer` (gold), `pred_ans` and `gpt4o_output`; they become like our own,
    with `answers`, `answer` and `judge_reply` (None where an output was not judged).
    """

    def parse(record: dict) -> dict:
        record = json.loads(replace_surrogates(json.dumps(record, ensure_ascii=False)))
        if "pred_ans" in record:
            record["answers"] = record["answer"]
            record["answer"] = record.pop("pred_ans")
            record["judge_reply"] = record.get("gpt4o_output")
        record["answers"] = [answer for answer in answer_texts(record["answers"]) if answer]
        record["answer"] = " ".join(answer_texts(record["answer"]))
        record["dataset"] = record.get("dataset") or path.stem
        record.setdefault("judge_reply", None)
        if not record["answers"] or not isinstance(record["dataset"], str):
            raise ValueError("an output without a gold answer, or whose dataset is no string")
        record["question"]  # must exist
        return record

    expected = '{"question", "answers", "answer"} or {"question", "answer", "pred_ans"}'
    return read_jsonl(path, parse, expected, key=None)  # ids may repeat


def measure_outputs(outputs: list[dict]) -> dict[str, dict]:
    """Answer metrics by dataset and, if any output has a verdict, ACC_L over all of them."""
    metrics = METRICS | {"acc_r_contiguous": contiguous_match}
    judged = any(verdict(output["judge_reply"]) is not None for output in outputs)

    def metrics_of(output: dict) -> dict[str, float]:
        values = {}
        for name, metric in metrics.items():
            values[name] = best(metric, output["answer"], output["answers"])
        if judged:
            values["acc_l"] = verdict(output["judge_reply"]) is True
        return values

    return measure_by_dataset(outputs, metrics_of)


def count_verdicts(outputs: list[dict]) -> bool:
    """Print how many outputs have a verdict, to stderr; True if all have one."""
    replies = [output["judge_reply"] for output in outputs]
    judged = sum(verdict(reply) is not None for reply in replies)
    missing = replies.count(None)
    unparsed = len(replies) - judged - missing
    print(f"judged {judged}, unparsed {unparsed}, without reply {missing}", file=sys.stderr)
    return judged == len(replies)


def score(
    file: tyro.conf.Positional[Path], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
) -> None:
    """Print the metrics of outputs: EM, F1, ACC_R, ACC_R_CONTIGUOUS, ACC_L.

    ACC_R: every gold token occurs in the prediction, in any order (as in the official evaluator).
    ACC_R_CONTIGUOUS: the gold tokens occur in one piece and in order. ACC_L: the share of all
    questions whose verdict in the file is True. Tokens are lower-case, without punctuation and
    articles; of several gold answers the best counts.

    Args:
        file: transcripts.jsonl, or outputs as R1-Searcher released them
        as_json: print one JSON object, in percent
    """
    outputs = read_outputs(file)
    count_verdicts(outputs)
    results = measure_outputs(outputs)
    if not as_json:
        print(table(results))
        return
    *_, overall = results.values()  # the last one is "all"
    del overall["intervals"]
    percents = {name: round(100 * value, 1) for name, value in overall.items()}
    print(json.dumps(percents | {"n": len(outputs), "acc_l": percents.get("acc_l")}))


# --------------------------------------------------------------------------------------------------
# judge: ACC_L, the verdicts of a language model

# The client waits 0.5, 1, 2, 4 and then 8 seconds between tries, or as long as the server asks.
JUDGE_RETRIES = 7
JUDGE_TIMEOUT = 60  # seconds for one try


async def ask_judge(
    prompts: list[str], base_url: str, model: str, concurrency: int, journal: Journal
) -> dict[str, str]:
    """Ask the judge; replies by prompt, each appended to the journal as it arrives.

    Prompts whose request failed after all retries are left out; their number and the last reason go
    to stderr.
    """
    import openai
    from tqdm.asyncio import tqdm as async_tqdm

    key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client refuses an empty key
    client = openai.AsyncOpenAI(
        base_url=base_url, api_key=key, max_retries=JUDGE_RETRIES, timeout=JUDGE_TIMEOUT
    )
    free_slots = asyncio.Semaphore(concurrency)
    replies = {}
    failures = []

    async def ask(prompt: str) -> None:
        messages = [{"role": "user", "content": prompt}]
        try:
            async with free_slots:
                completion = await client.chat.completions.create(
                    model=model, messages=messages, temperature=0, max_tokens=16
                )
            [choice] = completion.choices
            reply = str(choice.message.content or "")
        except (openai.OpenAIError, *MALFORMED) as error:
            failures.append(f"{type(error).__name__}: {error}")
        else:
            replies[prompt] = replace_surrogates(reply).replace(key, "***")
            journal.append([prompt, replies[prompt]])

    await async_tqdm.gather(*map(ask, prompts), desc="judge")
    if failures:
        reason = failures[-1].replace(key, "***")  # a server may quote the key that it refuses
        failed = f"{len(failures)} requests to {base_url} failed"
        print(f"{failed}, the last one: {reason!r:.300}", file=sys.stderr)
    return replies


def add_verdicts(
    outputs: list[dict], journal: Journal, base_url: str, model: str, concurrency: int
) -> None:
    """Set `judge`, `judge_reply` and `judge_model` of each output; ask what the journal lacks."""
    with reraise_corrupt(journal.path, "remove it to begin again"):
        replies = dict(journal.records)
    prompts = []
    for output in outputs:
        question = output["question"]
        prediction = output["answer"]
        answers = " | ".join(output["answers"])
        prompt = JUDGE_PROMPT.format(question=question, answers=answers, prediction=prediction)
        prompts.append(prompt)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]  # each once
    if missing:
        replies |= asyncio.run(ask_judge(missing, base_url, model, concurrency, journal))
    for output, prompt in zip(outputs, prompts, strict=True):
        reply = replies.get(prompt)
        output |= {"judge": verdict(reply), "judge_reply": reply, "judge_model": model}


def judge(
    file: tyro.conf.Positional[Path],
    base_url: str,
    model: str,
    out: Path | None = None,
    concurrency: int = 8,
) -> None:
    """Have a language model judge outputs; write them with replies and verdicts, print ACC_L.

    The key, if the server wants one, comes from OPENAI_API_KEY. Replies are kept beside the output,
    so that a second call asks only what is missing. A reply other than True or False is unparsed.
    ACC_L is over all questions: unparsed and failed ones count as not right, and the exit status is
    1 if there are any.

    Args:
        file: transcripts.jsonl, or outputs as R1-Searcher released them
        base_url: OpenAI-compatible server, such as http://127.0.0.1:8000/v1
        model: the judge, as the server calls it
        out: default: FILE with .judged.jsonl for its suffix
        concurrency: requests at a time
    """
    outputs = read_outputs(file)
    out = out or file.with_suffix(".judged.jsonl")
    file_sha256 = fingerprint(file)
    existing = read_outputs(out) if out.exists() else []
    for earlier in existing:
        if earlier.get("judge_model") != model or earlier.get("judged_sha256") != file_sha256:
            holds = f"holds something other than verdicts of {model} on {file}"
            raise ValueError(f"{out}: {holds}; change --out or remove it")
    if concurrency < 1:
        raise ValueError(f"--concurrency {concurrency}: at least 1")
    url_path(base_url)  # refuses what is none
    settings = {"server": base_url, "model": model, "prompt": JUDGE_PROMPT.replace("\n", " ")}
    journal = Journal(out.with_name(f"{out.name}.replies"), settings)
    add_verdicts(outputs, journal, base_url, model, concurrency)
    write_jsonl(out, [output | {"judged_sha256": file_sha256} for output in outputs])
    complete = count_verdicts(outputs)
    *_, overall = measure_outputs(outputs).values()  # the last one is "all"
    accuracy = format_cell("acc_l", overall.get("acc_l")) or "none"
    print(f"ACC_L over all {len(outputs)} questions: {accuracy}\njudged outputs: {out}")
    if not complete:
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    commands = {"run": run, "score": score, "judge": judge}
    with user_errors("evaluate.py"):
        tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, use_underscores=True, args=argv
        )


if __name__ == "__main__":
    main()
