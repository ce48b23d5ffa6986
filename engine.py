"""Inference engines for the rollout loop: vLLM, and a small one on plain transformers.

Both sample from the full softmax after temperature and report the log-probability of every sampled
token, so that training can compare its own with the sampler's.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Completion:
    """What an engine sampled for one submitted sequence."""

    key: int
    token_ids: list[int]  # the stop string's tokens and EOS included
    log_probs: list[float]  # of `token_ids`, after temperature, over the full softmax
    stop: str | None  # the stop string that ended the turn, "eos", or None: no tokens were left


def compute_dtype():
    """The torch.dtype in which engine and trainer compute: bfloat16, but float32 on an AVX2 CPU."""
    import torch

    # Without AVX-512 a CPU multiplies bfloat16 many times more slowly (RESULTS.md).
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.float32
    return torch.bfloat16


class Engine(Protocol):
    """An inference engine.

    `submit` takes a sequence under a key of the caller's; `step` works on the submitted sequences,
    on one or on many at once, and returns those that ended; `load_weights` takes (Hugging Face
    name, whole tensor) pairs. Between `sleep` and `wake_up` the engine holds no GPU memory, and
    `wake_up` only reserves it: the engine can generate once `load_weights` has returned.
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
        dtype: of weights and computation; by default `compute_dtype`.
        sleep_mode: `sleep` frees the GPU. Only one engine of a process can have it.
    """

    def __init__(
        self,
        model: str,
        max_context: int,
        gpu_memory_utilization: float = 0.6,
        dtype: str | None = None,
        sleep_mode: bool = False,
    ):
        import torch

        self.on_gpu = torch.cuda.is_available()
        self.sleep_mode = sleep_mode and self.on_gpu
        # On a GPU a reload of weights that fails is only a warning.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if self.on_gpu else "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in the process
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # keeps training's threads
        from vllm import LLM

        # Under torchrun the engine takes RANK and LOCAL_RANK from the environment.
        launcher = "external_launcher" if "LOCAL_RANK" in os.environ else None
        self.llm = LLM(
            model=model,
            load_format="safetensors",  # never a pickle
            dtype=dtype or compute_dtype(),
            max_model_len=max_context,
            max_num_seqs=256,  # as many as the loop has under way; some GPUs hold tables for 1,024
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,
            block_size=None if self.on_gpu else 32,  # the CPU's 128 caches little of a short prompt
            # After a partial prefill vLLM rewinds the random generator of a request, which a CPU
            # generator cannot do.
            enable_chunked_prefill=self.on_gpu,
            enforce_eager=not self.on_gpu,
            enable_sleep_mode=self.sleep_mode,
            # fp32 logits, as the trainer computes them; a CPU would convert the head at every step.
            hf_overrides={"head_dtype": "float32"} if self.on_gpu else None,
            logprobs_mode="processed_logprobs",  # after temperature, as the trainer computes them
            distributed_executor_backend=launcher,
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
        if self.sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.on_gpu:
            self.llm.apply_model(_repack_tied_head)
        # The prefix cache was computed with the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps its prefix cache: there are requests under way")

    def sleep(self):
        """Free the GPU for the trainer. Level 2 drops the weights too: the trainer has newer."""
        if self.sleep_mode:
            self.llm.sleep(level=2)

    def wake_up(self):
        """Take memory for the weights; `load_weights` fills it and takes the KV cache's, too."""
        if self.sleep_mode:
            self.llm.wake_up(tags=["weights"])


class TransformersEngine:
    """A small engine on plain transformers, one sequence at a time: slow, exact, easy to read.

    The tokens of a sequence do not depend on what else was submitted, so a rollout repeats bit for
    bit whatever the timing. Of the other engine's options it needs none.
    """

    def __init__(self, model: str, *unused: Any, sleep_mode: bool = False):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.submitted: list[tuple[int, list[int], dict]] = []  # key, ids, options of sampling

    def submit(self, key, token_ids, **options):
        self.submitted.append((key, list(token_ids), options))

    def step(self) -> list[Completion]:
        """Sample the sequence that was submitted first, to its end."""
        if not self.submitted:
            return []
        key, token_ids, options = self.submitted.pop(0)
        return [self._complete(key, token_ids, **options)]

    def _complete(self, key, token_ids, *, max_tokens, stop, temperature, seed) -> Completion:
        generator = self.torch.Generator().manual_seed(seed)
        cache = None
        unread = token_ids  # ids that the KV cache does not hold yet
        sampled = []
        reported = []  # log-probabilities of the sampled tokens
        ended_by = None  # a stop string or "eos"
        while ended_by is None and len(sampled) < max_tokens:
            with self.torch.no_grad():
                out = self.model(
                    self.torch.tensor([unread]),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            log_probs = (out.logits[0, -1] / (temperature or 1.0)).log_softmax(-1)
            if temperature == 0:
                token = int(log_probs.argmax())
            else:
                token = int(self.torch.multinomial(log_probs.exp(), 1, generator=generator))
            cache = out.past_key_values
            unread = [token]
            sampled.append(token)
            reported.append(float(log_probs[token]))
            if token in self.eos:
                ended_by = "eos"
            else:
                text = self.tokenizer.decode(sampled)
                ended_by = next((string for string in stop if string in text), None)
        return Completion(key, sampled, reported, ended_by)

    def load_weights(self, named_tensors):
        parameters = dict(self.model.named_parameters())
        with self.torch.no_grad():
            for name, tensor in named_tensors:
                parameters[name].copy_(tensor)

    def sleep(self): ...
    def wake_up(self): ...


ENGINES = {"vllm": VLLMEngine, "transformers": TransformersEngine}
