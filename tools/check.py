"""Before the first GPU hour: do model, prompt, data, index, memory and disk fit together?

    python tools/check.py --stage 1 --retriever data/bm25    # the options of train.py, and --gpus

It loads neither model nor engine, and runs on a machine without a GPU too. It asks the retriever
128 queries, which a web search engine may charge for. Memory is estimated, not measured: see
docs/gpus.md. Exit status 2 if anything will fail.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answerability import FIRST, are_answered, in_first_passages
from checkpoint import KEEP_CHECKPOINTS
from config import STAGE_2, Arguments, Config, parse_arguments
from engine import compute_dtype
from inference import open_tokenizer
from policy import meta_model, refuse_unsupported
from records import read_questions, reraise_missing, user_errors
from reinforce_pp import HEAD_CHUNK
from retriever import open_retriever
from reward import load_prompt
from rollout import prompt_encoder
from run_folder import holds_run, refuse_changed_run, run_settings

GB = 1e9
ASKED = 64  # training questions that are searched for
SHOWN = 200  # characters of the prompt's end


@dataclass(frozen=True)
class Check(Arguments):
    """The command line of train.py, and the node."""

    gpus: int = torch.cuda.device_count() or 8  # GPUs of all nodes together
    gpu_memory_gb: float | None = None  # of one GPU (default: this machine's, else 85)


# --------------------------------------------------------------------------------------------------
# Memory. The formulas are fitted to the peaks of an update that benchmarks/memory_7b.py simulates.

CARD = 85e9  # bytes of a GPU that is called one of 80 GB; vLLM takes its share of all of them
RESERVED = 5e9  # bytes of a GPU for CUDA's context, NCCL and what a sleeping engine keeps


def training_bytes(lm, config: Config, ranks: int, itemsize: int = 2) -> tuple[float, float]:
    """Bytes of one rank at the peak of an update: (what the ranks share, what each one needs).

    Shared: parameters, gradients and Adam's moments in fp32, a reference if there is KL.
    Its own: embedding, head and the gradient of each, whole; logits of a chunk and their gradient;
    activations of a micro-batch.

    Args:
        itemsize: bytes of a number in `compute_dtype`.
    """
    shape = lm.config
    parameters = sum(p.numel() for p in lm.parameters())
    shared = parameters * (16 + itemsize * (config.kl_coef > 0)) / ranks
    vocabularies = 1 if shape.tie_word_embeddings else 2
    own = itemsize * vocabularies * 2 * shape.vocab_size * shape.hidden_size
    own += 1.5 * 4 * HEAD_CHUNK * shape.vocab_size
    # Tensors of a token within one layer, some of the hidden size, some of the MLP's.
    mlp_size = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    if config.gradient_checkpointing:
        widths = shape.num_hidden_layers * shape.hidden_size  # what each layer starts from
        widths += 5 * mlp_size + 14 * shape.hidden_size
    else:
        widths = shape.num_hidden_layers * (4 * mlp_size + 11 * shape.hidden_size)
    # A single sequence may exceed --micro_batch_tokens.
    tokens = max(config.micro_batch_tokens, config.max_context)
    return shared, own + itemsize * widths * tokens


def cache_bytes(shape, tokens: int) -> float:
    """Keys and values of so many tokens in bf16."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * 2 * shape.num_hidden_layers * heads * head_size * tokens


# --------------------------------------------------------------------------------------------------
# The checks. Each returns what is worth knowing, or raises what train.py would stop at.


class Checks:
    def __init__(self, check: Check):
        self.check, self.config = check, check.config
        self.found = None  # the model without storage, once `model` has found it
        self.on_gpus = check.preset != "demo" or torch.cuda.is_available()  # here or elsewhere

    @property
    def lm(self):
        if self.found is None:
            raise ValueError("cannot be checked without the model")
        return self.found

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.lm.parameters())

    @cached_property
    def questions(self) -> list[dict]:
        file = self.config.questions
        if not Path(file).exists():
            raise ValueError(f"--questions {file} is not there; make it with data_prep.py")
        return read_questions(file)

    def model(self) -> str:
        config = self.config
        remedy = "; give a model folder, or fetch it: hf download OWNER/NAME"
        if config.model == STAGE_2["model"]:
            remedy = "; train stage 1 first, or give --model"
        with reraise_missing(f"--model {config.model}", remedy):
            self.found = meta_model(config.model)
        shape = self.lm.config
        refuse_unsupported(config.model, config.max_context)
        longest = getattr(shape, "max_position_embeddings", config.max_context)
        if longest < config.max_context:
            raise ValueError(f"the model takes {longest} tokens; lower --max_context to that")
        millions = self.parameters / 1e6
        return f"{shape.model_type}, {millions:,.0f} M parameters, {longest:,} tokens"

    def prompt(self) -> str:
        config, _ = self.config, self.lm  # without a model there is no tokenizer
        tokenizer = open_tokenizer(config.model)
        encode = prompt_encoder(tokenizer, load_prompt(config.prompt_file))
        ids = encode("Who directed the film Red Harbor?")
        left = config.max_context - len(ids)
        if left < config.max_turn_tokens:
            raise ValueError(f"{left} of --max_context {config.max_context} tokens are left for it")
        return f"{len(ids)} tokens, ending in\n{tokenizer.decode(ids)[-SHOWN:]}"

    def training_questions(self) -> str:
        config, count = self.config, len(self.questions)
        passes = config.steps * config.prompts_per_step / count
        episodes = config.prompts_per_step * config.samples_per_prompt
        tokens = episodes * config.max_context
        steps = f"{config.steps} steps of {episodes:,} episodes, at most {tokens:,} tokens"
        return f"{count:,} in {config.questions}, {passes:.2g} passes in {steps}"

    def validation_questions(self) -> str:
        if not self.config.eval_every:
            return "none: --eval_every is off, and no best model is kept"
        return f"{len(read_questions(self.config.eval_questions)):,}"

    def search(self) -> str:
        """Asks the questions themselves, one after another."""
        config, asked = self.config, self.questions[:ASKED]
        retriever = open_retriever(config.retriever)
        begin = time.perf_counter()
        found = [retriever.search([q["question"]], config.documents_per_search)[0] for q in asked]
        milliseconds = 1e3 * (time.perf_counter() - begin) / len(asked)
        recall = sum(are_answered(found, asked)) / len(asked)
        answerable = sum(in_first_passages(retriever.search, asked)) / len(asked)
        if answerable == 0:
            raise ValueError(
                f"no answer to {len(asked)} questions in the first {FIRST} passages of each, so "
                f"that nothing can be learned: is --retriever {config.retriever} of another corpus?"
            )
        return (
            f"{milliseconds:.0f} ms a query; the answer to a question stands in its first "
            f"{config.documents_per_search} passages for {recall:.0%}, in its first {FIRST} "
            f"for {answerable:.0%} of {len(asked)} questions"
        )

    def memory(self) -> str:
        return self.gpu_memory() if self.on_gpus else self.host_memory()

    def gpu_memory(self) -> str:
        config, ranks = self.config, self.check.gpus
        memory = CARD
        if self.check.gpu_memory_gb is not None:
            memory = self.check.gpu_memory_gb * GB
        elif torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
        awake = config.gpu_memory_utilization * memory
        memory -= RESERVED
        shared, own = training_bytes(self.lm, config, ranks)
        gradients = 4 * self.parameters / ranks  # they are freed before a rollout
        host = ""
        if config.cpu_offload:
            # Parameters and gradients are pinned, in blocks that PyTorch rounds to powers of two.
            at_most = shared * ranks + 8 * self.parameters
            host = f"; up to {at_most / GB:.0f} GB of host memory on all nodes together"
            shared = gradients = 0.0
        largest = 2 * self.lm.config.vocab_size * self.lm.config.hidden_size  # on its way to it
        training, rolling_out = shared + own, shared - gradients + awake + largest
        peaks = (
            f"about {training / GB:.0f} GB in an update and {rolling_out / GB:.0f} GB in a "
            f"rollout, of {memory / GB:.0f} on each of {ranks} GPUs"
        )
        if max(training, rolling_out) > memory:
            raise ValueError(
                f"{peaks}; lower --micro_batch_tokens or --gpu_memory_utilization, take more GPUs, "
                "or give --cpu_offload"
            )
        weights = 2 * self.parameters
        cache = cache_bytes(self.lm.config, config.max_context)
        if weights + cache > awake:
            raise ValueError(
                f"the engine's weights and one episode take {(weights + cache) / GB:.0f} GB of its "
                f"{awake / GB:.0f}; raise --gpu_memory_utilization or lower --max_context"
            )
        return f"{peaks}; cache for {(awake - weights) / cache:.0f} episodes of --max_context{host}"

    def host_memory(self) -> str:
        itemsize = compute_dtype().itemsize
        shared, own = training_bytes(self.lm, self.config, 1, itemsize)
        # Weights, kept from one micro-batch to the next, and the engine's; its cache.
        needed = shared + own + 2 * itemsize * self.parameters + 2**30
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        share = f"about {needed / GB:.1f} GB of this machine's {memory / GB:.0f}"
        if needed > memory:
            raise ValueError(f"{share}; lower --micro_batch_tokens or take a smaller model")
        return share

    def disk(self) -> str:
        config = self.config
        parameters = self.parameters
        best = config.eval_every > 0
        checkpoints = KEEP_CHECKPOINTS + 1 + best  # one is written before the oldest goes
        itemsize = 2 if self.on_gpus else compute_dtype().itemsize
        needed = parameters * (checkpoints * 12 + (1 + best) * itemsize)
        out = self.check.out_folder
        there = next(path for path in [out, *out.absolute().parents] if path.exists())
        free = shutil.disk_usage(there).free
        free += sum(file.stat().st_size for file in out.glob("checkpoints/*/*"))  # a resumed run's
        size = f"{checkpoints} checkpoints and the model: {needed / GB:.1f} GB of {free / GB:.0f}"
        if needed > free:
            raise ValueError(f"{size} free at {there}; give --out another disk")
        return f"{size} free"

    def run_folder(self) -> str:
        out = self.check.out_folder
        if holds_run(out, self.check.resume):
            refuse_changed_run(out, run_settings(self.config))
        return str(out)


ORDER = """
    model prompt training_questions validation_questions search memory disk run_folder
""".split()


def run_checks(check: Check) -> bool:
    """Print a line for each check; whether all are ok."""
    checks = Checks(check)
    all_ok = True
    for name in ORDER:
        try:
            verdict, detail = "ok", getattr(checks, name)()
        except (ValueError, OSError, RuntimeError) as error:
            verdict, detail = "will fail", str(error) or repr(error)
            all_ok = False
        first, *rest = detail.splitlines()
        print(f"{verdict:9}  {name.replace('_', ' '):20}  {first}")
        for line in rest:
            print(f"{'':9}  {'':20}  | {line}")
    return all_ok


def main(argv: list[str] | None = None) -> None:
    with user_errors("check.py"):
        check = parse_arguments(argv, __doc__, Check)
        if check.gpus < 1:
            raise ValueError("--gpus must be at least 1")
        if not run_checks(check):
            sys.exit(2)


if __name__ == "__main__":
    main()
