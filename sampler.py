"""Everything of a run that rolls out: its questions, the engine and the search.

Every rank holds an inference engine beside its shard of the model, and rolls out its share of the
questions. Which questions a step takes and which seeds its episodes get depend on the seed and the
step alone: a run on 1 or on N ranks trains on the same questions with the same seeds.
"""

import dataclasses
import random

import torch.distributed as dist
from tqdm import tqdm

from config import Config
from inference import answer_questions, open_rollout
from metrics import summarize
from policy import Policy, gather, release_memory, whole_parameters
from records import read_questions
from rollout import Episode, derive_seed

MAX_SEARCH_FAILURES = 0.2  # share of a step's queries that may fail; with more the run stops
# The share is that of at least so many queries: a step with fewer counts those before it, too.
MIN_SEARCHES = 20
# Mean abs(log pi - log pi_sampler) of an episode at which the run stops: in bf16 it is about 0.01,
# with wrong weights several nats.
MAX_SAMPLER_GAP = 1.0


def questions_of_step(questions: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """`count` questions in a row from an endless sequence of shuffled passes over all of them."""
    chosen, order = [], []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(questions))
        if not order or place == 0:
            order = list(questions)
            random.Random(derive_seed(seed, epoch)).shuffle(order)
        chosen.append(order[place])
    return chosen


class Sampler:
    """The questions, the engine and the search of a run: everything that rolls out."""

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.questions = read_questions(config.questions)
        self.eval_questions = read_questions(config.eval_questions) if config.eval_every else []
        self.rollout, self.encode = open_rollout(config, sleep_mode=True)
        self.failed_searches: list[bool] = []  # of the last queries, whether each one failed
        self.engine = self.rollout.engine
        self.engine.sleep()

    def sync_weights(self, policy: Policy) -> None:
        """Wake the engine with the policy's present weights."""
        release_memory()
        self.engine.wake_up()
        self.engine.load_weights(whole_parameters(policy))

    def roll_out(self, step: int) -> list[Episode]:
        """The step's episodes of all ranks, `samples_per_prompt` in a row for each question."""
        config, samples = self.config, self.config.samples_per_prompt
        questions = questions_of_step(self.questions, step, config.prompts_per_step, config.seed)
        mine = []
        for number in range(self.rank, len(questions), self.world):
            prompt_ids = self.encode(questions[number]["question"])
            for sample in range(samples):
                seed = derive_seed(config.seed, step, number, sample)
                mine.append(Episode(questions[number], prompt_ids, seed))
        finished = self.rollout.run(mine)
        quiet = self.rank > 0
        for _ in tqdm(finished, "rollout", len(mine), unit="episode", leave=False, disable=quiet):
            pass  # `mine` holds the episodes, in order
        self.engine.sleep()
        shares = gather(mine)
        episodes = []
        for number in range(len(questions)):
            start = number // self.world * samples
            episodes += shares[number % self.world][start : start + samples]
        return episodes

    def stop_if_searches_fail(self, records: list[dict]) -> None:
        """Raises RuntimeError with the retriever's message if too many queries failed.

        Args:
            records: of `episode_record`, those of all ranks.
        """
        failed = sum(record["search_failures"] for record in records)
        searches = sum(record["searches"] for record in records)
        recent = self.failed_searches
        recent += [True] * failed + [False] * (searches - failed)
        considered = max(searches, MIN_SEARCHES)
        del recent[:-considered]
        if sum(recent) > MAX_SEARCH_FAILURES * considered:
            errors = [error for [error] in gather([self.rollout.search_error]) if error]
            raise RuntimeError(f"{sum(recent)} of {len(recent)} searches failed: {errors[0]}")

    def stop_if_engine_differs(self, sampler_gap: float) -> None:
        """Raises RuntimeError if the engine samples from another model than the one that trains.

        vLLM only logs a reload of weights that failed, and after sleep it has no others.
        """
        if not sampler_gap <= MAX_SAMPLER_GAP:  # also where it is not a number
            gap = f"the log-probabilities of engine and trainer differ by {sampler_gap:.2f} a token"
            raise RuntimeError(f"{gap}: the engine lacks the trainer's weights (docs/gpus.md)")

    def evaluate(self, policy: Policy) -> dict[str, float]:
        """Metrics of greedy answers to the validation questions, each rank's share of them."""
        self.sync_weights(policy)
        sampling = self.rollout.limits
        mine = self.eval_questions[self.rank :: self.world]
        reward = self.config.reward
        self.rollout.limits = dataclasses.replace(sampling, temperature=0.0)
        answered = list(answer_questions(self.rollout, self.encode, mine, reward=reward))
        self.rollout.limits = sampling
        self.engine.sleep()
        records = {record["id"]: record for share in gather(answered) for record in share}
        # A sum depends on its order: not that in which episodes finish.
        in_order = [records[question["id"]] for question in self.eval_questions]
        self.stop_if_searches_fail(in_order)
        return {f"eval_{name}": value for name, value in summarize(in_order).items()}
