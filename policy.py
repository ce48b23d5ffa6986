"""The ranks, and the policy: a causal language model in FSDP2."""

import ctypes
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import compute_dtype
from records import reraise_missing
from reinforce_pp import token_log_probs

# Timeout of collectives: how far a rank's rollout may lag behind another's. If a process dies, the
# others end at once all the same; if a node does, they may wait for it as long as this.
COLLECTIVE_TIMEOUT = timedelta(hours=3)
# Options of configurations that change the logits behind the head.
LOGIT_RESCALINGS = """
    final_logit_softcapping logits_soft_cap logits_scaling logit_scale lm_head_multiplier
""".split()

# --------------------------------------------------------------------------------------------------
# Ranks


def start_distributed() -> None:
    """Join the process group that torchrun describes, or make one of this process alone."""
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
            os.environ.setdefault(name, value)
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            # Every micro-batch has a new shape, and oneDNN and PyTorch each keep the kernels of the
            # last 1,024 shapes, 0.9 GiB of them.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
            os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def share_cores() -> None:
    """Divide a GPU node's cores among its ranks, which torchrun and vLLM limit to one thread each.

    Packing, loading and offloaded Adam run on the CPU there, too.
    """
    if torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def gather(mine: list) -> list[list]:
    """The lists of all ranks, by rank."""
    shares: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares


def end_process(error: BaseException | None = None) -> None:
    """End this process at once, with the status that is due to the error, if there is one.

    Python's own end would wait for collectives that other ranks never join, and vLLM's exit handler
    would destroy process groups a second time.
    """
    if isinstance(error, SystemExit) and not error.code:
        raise error
    status = 0
    try:
        if isinstance(error, SystemExit):
            status = 2
        elif error is not None:
            status = 1
            traceback.print_exception(error)
        sys.stdout.flush()
    finally:  # also where nothing can be written any more
        os._exit(status)


# --------------------------------------------------------------------------------------------------
# The model


class Policy(nn.Module):
    """A causal language model that returns log-probabilities of chosen tokens instead of logits.

    The head is applied within this module's forward, during which FSDP holds its whole weight.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(
        self, input_ids, position_ids, attention_mask, source, targets, actions, temperature: float
    ) -> Tensor:
        """(N,) fp32 log-probabilities of the actions; the inputs are those that `pack` makes."""
        output = self.lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
        )
        hidden = output.last_hidden_state.flatten(0, 1)  # (R * L, H)
        head = self.lm.get_output_embeddings().weight  # (V, H)
        return token_log_probs(hidden[source], head, targets, temperature)[actions]

    def begin_micro_batch(self, is_last: bool) -> None:
        """On one CPU rank, keep weights and fp32 gradients whole until the last micro-batch.

        FSDP would copy both each time, to the same bits. Several ranks keep theirs sharded.
        """
        if dist.get_world_size() == 1 and not torch.cuda.is_available():
            self.set_requires_gradient_sync(is_last)
            self.set_reshard_after_forward(is_last)
            self.set_reshard_after_backward(is_last)


def meta_model(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a Hugging Face folder or hub name, without storage; only config.json is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa",  # reads the boolean masks of `pack`
        )


def refuse_unsupported(model: str, max_context: int) -> None:
    """Refuse a model that `Policy` and the masks of `pack` would not compute as its authors do.

    The head must be a plain linear map. Every decoder layer must attend to the whole context, and
    positions must enter it in the same way whatever else is computed: in a shared row a token's
    place in the row is not its place in the sequence, which a sliding window, a convolution or a
    recurrence would have to know.

    Args:
        model: Hugging Face folder or hub name; only its config.json is read.
        max_context: tokens of the longest sequence.
    Raises:
        ValueError: names what is not supported.
    """
    with reraise_missing(f"--model {model}", "; use another model"):
        lm = meta_model(model)
    config = lm.config
    head_bias = getattr(lm.get_output_embeddings(), "bias", None)
    rescaled = any(getattr(config, name, None) for name in LOGIT_RESCALINGS)
    block_types = getattr(config, "layer_types", None) or getattr(config, "block_types", None)
    window = getattr(config, "sliding_window", None)
    rope_type = str((getattr(config, "rope_parameters", None) or {}).get("rope_type"))
    if head_bias is not None or rescaled:
        unsupported = "its head is not a plain linear map"
    elif not hasattr(lm.base_model, "layers"):
        unsupported = "its decoder layers have an unknown place"
    elif set(block_types or ["full_attention"]) != {"full_attention"}:
        unsupported = "its layers do not all attend to the whole context"
    elif window and window < max_context:
        unsupported = f"its layers attend to {window} tokens only"
    elif "dynamic" in rope_type or rope_type == "longrope":
        unsupported = f"its positions depend on the batch (rope_type {rope_type})"
    else:
        return
    raise ValueError(f"--model {model}: {unsupported}; use another model")


def load_policy(
    model: str,
    gradient_checkpointing: bool = False,
    cpu_offload: bool = False,
    frozen: bool = False,
) -> Policy:
    """The sharded model of a Hugging Face folder or hub name.

    Args:
        gradient_checkpointing: recompute activations in the backward pass.
        cpu_offload: keep parameters and optimiser states in host memory.
        frozen: parameters without gradient in `compute_dtype` instead of fp32 ones to train.
    """
    lm = meta_model(model, compute_dtype() if frozen else torch.float32)
    policy = shard(lm, gradient_checkpointing, cpu_offload, frozen)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.to_empty(device="cpu" if cpu_offload else device)
    lm.tie_weights()  # to_empty gives each use of a shared weight memory of its own
    for module in lm.modules():
        if next(module.buffers(recurse=False), None) is not None:
            lm._init_weights(module.to(device))  # the frequencies of RoPE: in no file
    read_weights(lm, model)
    return policy


def read_weights(lm: nn.Module, model: str) -> None:
    """Fill this rank's shards from the safetensors of a Hugging Face folder or hub name.

    Raises:
        ValueError: a parameter is not there, or has another shape.
    """
    from huggingface_hub import snapshot_download
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    folder = model
    if not Path(model).is_dir():
        folder = snapshot_download(model, allow_patterns="*.safetensors")
    try:
        load(dict(lm.named_parameters()), storage_reader=HuggingFaceStorageReader(folder))
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"--model {model}: {cause}; use another model") from None


def shard(
    lm: nn.Module, gradient_checkpointing: bool, cpu_offload: bool, frozen: bool = False
) -> Policy:
    """The model in FSDP2: every decoder layer a unit, `compute_dtype`, fp32 reduction."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    if gradient_checkpointing and not frozen:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(lm).train(not frozen).requires_grad_(not frozen)
    on_gpu = torch.cuda.is_available()
    settings = {
        "mesh": init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(compute_dtype(), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy(),
    }
    for layer in lm.base_model.layers:
        fully_shard(layer, **settings)
    # By default the root unit, embeddings and head, stays gathered after the forward pass: for 7B
    # these are 2 GB on every GPU.
    return fully_shard(policy, **settings, reshard_after_forward=True)


def whole_parameters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor), gathered one by one; all ranks iterate together."""
    for name, parameter in policy.lm.named_parameters():
        rows = parameter.detach().to(compute_dtype())
        # What --cpu_offload keeps in host memory is gathered on the GPUs: over gloo, 15 GB a sync.
        yield name, rows.to(rows.device_mesh.device_type).full_tensor()


# --------------------------------------------------------------------------------------------------
# Memory and time


def release_memory() -> None:
    """Return what training freed: to the GPU, where the engine takes it, or to the system.

    On a CPU glibc keeps freed memory as long as anything lies above it, and the process would grow
    from step to step.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # only glibc has it
        libc.malloc_trim(0)


def peak_memory_gib() -> float:
    """After an update: what is taken of the GPU, or the process's peak where there is no GPU.

    PyTorch's allocator still holds its peak then. Its own count would be too high: it has the
    engine's memory in it, also while the engine sleeps.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long the body takes, with the work that it has given to the GPU."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[f"seconds_{phase}"] = time.perf_counter() - start
