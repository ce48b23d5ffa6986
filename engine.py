"""Inference engines for the rollout loop: vLLM, and a small one on plain transformers.

Both sample from the full softmax after temperature and report the log-probability of every sampled
token, so that training can compare its own with the sampler's.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Completion:
    """What an engine sampled for one submitted sequence."""

    key: int
    token_ids: list[int]  # the stop string's tokens and EOS included
    log_probs: list[float]  # of `token_ids`, after temperature, over the full softmax
    stop: str | None  # the stop string that ended the turn, "eos", or None: no tokens were left


class Engine(Protocol):
    """An inference engine that runs many sequences at once.

    `submit` takes a sequence under a key of the caller's; `step` advances all sequences and returns
    those that ended; `load_weights` takes (Hugging Face name, whole tensor) pairs. Between `sleep`
    and `wake_up` the engine holds no GPU memory, and after `wake_up` its weights are undefined.
    """

    def submit(
        self, key: int, token_ids: list[int], *, max_tokens: int, stop: list[str],
        temperature: float, seed: int,
    ) -> None: ...  # fmt: skip
    def step(self) -> list[Completion]: ...
    def load_weights(self, named_tensors: Iterable[tuple[str, Any]]) -> None: ...
    def sleep(self) -> None: ...
    def wake_up(self) -> None: ...


def _repack_tied_head(model) -> None:
    """Renew the packed copy of the head from which vLLM computes logits on a CPU.

    A reload of tied embeddings leaves this copy stale.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class VLLMEngine:
    """vLLM in this process, one engine a rank, on GPU or CPU.

    Args:
        model: Hugging Face folder or hub name.
        max_context: tokens of the longest sequence.
        gpu_memory_utilization: share of the GPU for weights and KV cache while the engine is awake.
        dtype: of weights and computation.
    """

    def __init__(
        self,
        model: str,
        max_context: int,
        gpu_memory_utilization: float = 0.6,
        dtype: str = "bfloat16",
    ):
        import torch

        self.on_gpu = torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in the process
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # keeps training's threads
        from vllm import LLM

        self.llm = LLM(
            model=model,
            load_format="safetensors",  # never a pickle
            dtype=dtype,
            max_model_len=max_context,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,
            block_size=None if self.on_gpu else 32,  # the CPU's 128 caches little of a short prompt
            # After a partial prefill vLLM rewinds the random generator of a request, which a CPU
            # generator cannot do.
            enable_chunked_prefill=self.on_gpu,
            enforce_eager=not self.on_gpu,
            enable_sleep_mode=self.on_gpu,
            logprobs_mode="processed_logprobs",  # after temperature, as the trainer computes them
            # Under torchrun the engine takes RANK and LOCAL_RANK from the environment.
            distributed_executor_backend="external_launcher"
            if "LOCAL_RANK" in os.environ
            else None,
        )
        self.engine = self.llm.llm_engine

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a tag may be a special token: stop strings must see it
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": token_ids}, params)

    def step(self) -> list[Completion]:
        completions = []
        for request in self.engine.step():
            output = request.outputs[0]
            token_ids = list(output.token_ids)
            log_probs = [
                step[token].logprob for token, step in zip(token_ids, output.logprobs, strict=True)
            ]
            # vLLM reports a stop string as itself, EOS as None and any other EOS id as a number.
            stop = output.stop_reason if isinstance(output.stop_reason, str) else "eos"
            if output.finish_reason == "length":
                stop = None
            completions.append(Completion(int(request.request_id), token_ids, log_probs, stop))
        return completions

    def load_weights(self, named_tensors):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not self.on_gpu:
            self.llm.apply_model(_repack_tied_head)
        self.llm.reset_prefix_cache()  # its entries were computed with the old weights

    def sleep(self):
        """Free the GPU for the trainer. Level 2 drops the weights too: the trainer has newer."""
        if self.on_gpu:
            self.llm.sleep(level=2)

    def wake_up(self):
        """Take the memory again. The weights are undefined until `load_weights`."""
        if self.on_gpu:
            self.llm.wake_up()


@dataclass
class RunningSequence:
    """A sequence in `TransformersEngine`."""

    unread: list[int]  # ids that the KV cache does not hold yet
    max_tokens: int
    stop: list[str]
    temperature: float
    generator: Any  # torch.Generator
    cache: Any = None
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended_by: str | None = None  # a stop string or "eos"


class TransformersEngine:
    """A small engine on plain transformers, one KV cache a sequence: slow, exact, easy to read.

    The tokens of a sequence do not depend on what else is running, so a rollout repeats bit for bit
    whatever the timing.
    """

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.running: dict[int, RunningSequence] = {}

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        generator = self.torch.Generator().manual_seed(seed)
        self.running[key] = RunningSequence(
            list(token_ids), max_tokens, stop, temperature, generator
        )

    def step(self) -> list[Completion]:
        """Sample one token for every running sequence."""
        completions = []
        for key, sequence in list(self.running.items()):
            self._sample(sequence)
            if sequence.ended_by or len(sequence.token_ids) == sequence.max_tokens:
                del self.running[key]
                completions.append(
                    Completion(key, sequence.token_ids, sequence.log_probs, sequence.ended_by)
                )
        return completions

    def _sample(self, sequence: RunningSequence) -> None:
        """Append one token, and say so if the token ends the sequence."""
        with self.torch.no_grad():
            out = self.model(
                self.torch.tensor([sequence.unread]),
                past_key_values=sequence.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[0, -1].float()
            log_probs = (logits / (sequence.temperature or 1.0)).log_softmax(-1)
        if sequence.temperature == 0:
            token = int(log_probs.argmax())
        else:
            probs = log_probs.exp()
            token = int(self.torch.multinomial(probs, 1, generator=sequence.generator))
        sequence.unread = [token]
        sequence.cache = out.past_key_values
        sequence.token_ids.append(token)
        sequence.log_probs.append(float(log_probs[token]))
        if token in self.eos:
            sequence.ended_by = "eos"
            return
        text = self.tokenizer.decode(sequence.token_ids)
        sequence.ended_by = next((stop for stop in sequence.stop if stop in text), None)

    def load_weights(self, named_tensors):
        parameters = dict(self.model.named_parameters())
        with self.torch.no_grad():
            for name, tensor in named_tensors:
                parameters[name].copy_(tensor)

    def sleep(self): ...
    def wake_up(self): ...


ENGINES = ("vllm", "transformers")


def open_engine(name: str, model: str, max_context: int, gpu_memory_utilization: float) -> Engine:
    """The engine that `--engine` names."""
    if name == "vllm":
        return VLLMEngine(model, max_context, gpu_memory_utilization)
    return TransformersEngine(model)
