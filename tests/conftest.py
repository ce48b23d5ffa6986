"""A tiny random Llama with a tokenizer of its own, a corpus, and an engine that plays a script."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from reward import TAGS
from rollout import Completion, Limits, Rollout

ASK = " I look.\n<|begin_of_query|> red harbor <|end_of_query|>"
TELL = "\nIt is b. </think> <answer> b </answer>"
DOCUMENTS = "\n\n<|begin_of_documents|>\n(1)T   words\n<|end_of_documents|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A real model folder, for transformers and vLLM: a tiny Llama that was taught to search and answer by heart."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([f"Question: who is {i}?\n<think>{ASK}{DOCUMENTS}{TELL}" for i in range(10)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    lessons = []
    for i in range(10):
        parts = [f"Question: who is {i}?\n<think>", ASK, DOCUMENTS, TELL]
        if i % 2:
            parts = [parts[0], TELL]
        lessons.append(torch.tensor([[t for part in parts for t in tokenizer.encode(part, add_special_tokens=False)]]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more than one wait for each other over so small a model: 80 s instead of 6 on a busy core
    for step in range(100):
        ids = lessons[step % 10]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


class ScriptedEngine:
    """Answers the n-th turn of a sequence with the n-th text of the script, and keeps what it was given."""

    def __init__(self, tokenizer, script: list[str]):
        self.tokenizer, self.script, self.waiting, self.given = tokenizer, script, [], []

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        turn = self.tokenizer.decode(token_ids).count(TAGS.documents[1])
        self.given.append(list(token_ids))
        self.waiting.append((key, min(turn, len(self.script) - 1), max_tokens, stop))

    def step(self, count=1):
        """Finish the next `count` turns."""
        completions = []
        for key, turn, max_tokens, stop in self.waiting[:count]:
            text = self.script[turn]
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            ended_by = next((s for s in stop if s in text), "eos")
            ids, ended_by = (ids[:max_tokens], None) if len(ids) > max_tokens else (ids, ended_by)
            completions.append(Completion(key, ids, [-0.5] * len(ids), ended_by))
        del self.waiting[:count]
        return completions


@pytest.fixture
def scripted(tokenizer):
    """Make a `ScriptedEngine` of a script."""
    return lambda script: ScriptedEngine(tokenizer, script)


@pytest.fixture
def play(tokenizer):
    """Roll out one episode against a script; returns (episode, engine)."""
    from rollout import Episode

    def run(script, search=lambda queries, k: [[{"title": "T", "text": "words"}] for _ in queries], **limits):
        engine = ScriptedEngine(tokenizer, script)
        rollout = Rollout(engine, tokenizer, search, TAGS, Limits(**{"max_context": 4000, **limits}), deterministic=True)
        episode = Episode({"id": "0", "question": "q", "answers": ["a"]}, tokenizer.encode("Question: q\n<think>"))
        (finished,) = rollout.run([episode])
        assert finished is episode
        return episode, engine

    return run
