"""A tiny world to train in: model, questions, passages, configuration; and what a run logged."""

import dataclasses
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import train
from config import Config
from reward import PROMPTS
from rollout import prompt_encoder

# Imports of the libraries take longer than a run of the tiny model.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "transformers.models.llama.modeling_llama"])

ASK = " I look.\n<|begin_of_query|> red harbor <|end_of_query|>"
TELL = "\nIt is b. </think> <answer> b </answer>"
DOCUMENTS = "\n\n<|begin_of_documents|>\n(1)T   words\n<|end_of_documents|>"
PROMPT = "Question: {question}\n<think>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Options of the published configurations that the tiny models share with them, by family: the
# first is that of the demo's model.
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2},
    "qwen2": {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2},
    "qwen2-tied": {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2},
    "qwen3": {
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "head_dim": 48,
    },
    "llama3.1": {
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [2, 1],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
}
TINY = dict(
    prompt_file="p.txt",
    engine="transformers",
    prompts_per_step=3,
    samples_per_prompt=4,
    updates_per_rollout=1,
    algorithm="grpo",
    learning_rate=1e-3,
    documents_per_search=1,
    max_searches=2,
    max_turn_tokens=64,
    max_context=400,
    micro_batch_tokens=600,
    gradient_checkpointing=False,
    save_every=1,
    steps=3,
)


def make_model(folder: Path, family: str = "llama", prompts: tuple[str, ...] = (PROMPT,)) -> None:
    """A real model folder: a tiny model that was taught to search and answer by heart.

    Args:
        prompts: after which it was taught that: texts with {question}, or names of `PROMPTS`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"Question: who is {i}?\n<think>{ASK}{DOCUMENTS}{TELL}" for i in range(10)]
    bpe.train_from_iterator(texts, trainer)
    chat_template = CHAT_TEMPLATE
    if family == "llama3.1":  # a BOS: the tokenizer's before a text, the template's before a chat
        bos = SPECIAL[0]
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
        chat_template = bos + CHAT_TEMPLATE
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama" if family == "llama3.1" else family.removesuffix("-tied"),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config)
    lessons = []
    encoders = [prompt_encoder(tokenizer, PROMPTS.get(each, [("text", each)])) for each in prompts]
    for i in range(10):
        parts = [TELL] if i % 2 else [ASK, DOCUMENTS, TELL]
        ids = encoders[i // 2 % len(encoders)](f"who is {i}?")
        ids += [t for part in parts for t in tokenizer.encode(part, add_special_tokens=False)]
        lessons.append(torch.tensor([ids]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        ids = lessons[step % 10]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_world(folder: Path, model: str) -> Config:
    """Questions and passages for the tiny model; a configuration for runs within the folder."""
    (folder / "p.txt").write_text(PROMPT)
    questions = [{"id": i, "question": f"who is {i}?", "answers": ["b"]} for i in range(8)]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    passages = [{"id": i, "title": "T", "text": f"words {i} </answer>"} for i in range(5)]
    (folder / "c.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    return Config(**TINY, model=model, questions="q.jsonl", retriever="c.jsonl")


def metrics_of(out) -> list[dict]:
    """What the run logged, without its times; a torn last line is left out."""
    file = Path(out) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    timed = re.compile("seconds|peak|.*per_second")
    return [{k: v for k, v in row.items() if not timed.match(k)} for row in rows]


def steps(config: Config, count: int) -> Config:
    return dataclasses.replace(config, steps=count)


def model_of(run) -> bytes:
    """The weights of the run's exported model."""
    return Path(run, "model/model.safetensors").read_bytes()


def checkpoint_names(run="a") -> list[str]:
    return sorted(path.name for path in Path(run, "checkpoints").iterdir())


def state_of(out) -> dict:
    """Parameters and moments of the run's newest checkpoint, as whole tensors in fp32."""
    import torch
    from safetensors.torch import load_file

    newest = checkpoint.list_checkpoints(Path(out, "checkpoints"))[-1]
    ranks = [load_file(file) for file in sorted(newest.glob("*.safetensors"))]
    return {name: torch.cat([shards[name] for shards in ranks]) for name in ranks[0]}


def equal_states(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def command(config: Config, out: str, *flags: str) -> list[str]:
    """train.py and its arguments."""
    options = dataclasses.asdict(config).items()
    given = [f"--{k}={v}" for k, v in options if not isinstance(v, bool) and v != ""]
    return [train.__file__, "--preset", "demo", "--stage", "2", "--out", out, *given, *flags]


def launch(ranks: int, *command: str) -> subprocess.CompletedProcess:
    """Run a script on ranks as torchrun does, in forks of a process that has imported torch.

    The status is that of the first rank that fails; the others are then terminated.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    with TemporaryDirectory() as logs:
        running = []
        for rank in range(ranks):
            own = {"MASTER_ADDR": "127.0.0.1", "RANK": rank, "LOCAL_RANK": rank}
            environment = dict(os.environ) | {k: str(v) for k, v in (shared | own).items()}
            running.append(FORKS.Process(target=run_rank, args=(command, environment, logs)))
            running[-1].start()
        status, deadline = 0, time.monotonic() + 300
        while running and not status:
            assert connection.wait([p.sentinel for p in running], deadline - time.monotonic())
            ended = [process for process in running if not process.is_alive()]
            status = next((process.exitcode for process in ended if process.exitcode), 0)
            running = [process for process in running if process not in ended]
        for process in running:
            process.terminate()
            process.join()
        stdout, stderr = (Path(logs, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def run_rank(command: tuple[str, ...], environment: dict[str, str], logs: str) -> None:
    """Become the script that the command names."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        os.dup2(os.open(Path(logs, name), flags, 0o600), descriptor)
    os.environ.update(environment)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
