"""Packing: sequences that begin alike compute their common prefix once.

The gradient is that of separate sequences; only the computation is shared. Shapes: R rows of a
micro-batch, L tokens of a row, N action tokens of a micro-batch.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

# Longest row of several sequences, in tokens: the attention of a row grows with its square.
MAX_SHARED_ROW = 1536
# A sequence joins a row where it adds at most this share of its own length. Sharing has a price: a
# dense mask, and attention that is computed across the sequences of a row before it is masked.
MAX_ADDED_SHARE = 0.5


def common_prefix(one: list[int], other: list[int]) -> list[int]:
    """The longest common prefix of two lists of token ids."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:length]
    return min(one, other, key=len)


@dataclass
class Row:
    """Sequences that share a row: their common prefix, then the remainder of each."""

    members: list[int]  # indices of the sequences
    prefix: list[int]  # token ids
    tokens: int  # of the prefix and all remainders

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1

    def join(self, index: int, sequence: list[int]) -> "Row":
        """This row with one more sequence, whose start may shorten the common prefix."""
        prefix = common_prefix(self.prefix, sequence)
        # Tokens that leave the prefix are stored once per member; the prefix held one copy.
        copies = (len(self.prefix) - len(prefix)) * (len(self.members) - 1)
        tokens = self.tokens + copies + len(sequence) - len(prefix)
        return Row([*self.members, index], prefix, tokens)


def plan_micro_batches(
    sequences: dict[int, list[int]], budget: int, ranks: int = 1
) -> list[list[list[int]]]:
    """Micro-batches of rows of sequences, for `pack`.

    A sequence joins the row before it where that saves enough. Rows are sorted by length, so that
    the rows of a micro-batch are alike and padding is small. Shared and plain rows never mix: one
    shared row would give all rows of its micro-batch a dense mask. The largest micro-batches are
    divided until all ranks get the same number, so that none idles and no collective can hang.

    Args:
        sequences: token ids by index; samples of one question are neighbours.
        budget: tokens of a micro-batch, padding included; a single sequence may exceed it.
        ranks: that share the micro-batches; where rows are too few, some micro-batches are empty.
    Returns:
        For each micro-batch its rows, and for each row the indices of its sequences.
    """
    rows: list[Row] = []
    for index, sequence in sequences.items():
        if rows:
            joined = rows[-1].join(index, sequence)
            added = joined.tokens - rows[-1].tokens
            fits = joined.tokens <= min(budget, MAX_SHARED_ROW)
            if fits and added <= MAX_ADDED_SHARE * len(sequence):
                rows[-1] = joined
                continue
        rows.append(Row([index], sequence, len(sequence)))
    rows.sort(key=lambda row: (row.is_shared, row.tokens), reverse=True)
    micro_batches: list[list[Row]] = []
    for row in rows:
        last = micro_batches[-1] if micro_batches else [row]
        longest = last[0]
        fits = (len(last) + 1) * longest.tokens <= budget
        if micro_batches and fits and row.is_shared == longest.is_shared:
            last.append(row)
        else:
            micro_batches.append([row])
    while len(micro_batches) % ranks:
        largest = max(micro_batches, key=lambda rows: (len(rows) > 1, sum(r.tokens for r in rows)))
        half = len(largest) // 2  # 0 if no micro-batch can be divided: an empty one is left
        micro_batches.append(largest[half:])
        del largest[half:]
    return [[row.members for row in rows] for rows in micro_batches]


@dataclass
class PackedRow:
    """A row as `pack` lays it out; the first three lists are parallel."""

    ids: list[int]
    positions: list[int]  # that each token has in its own sequence
    branches: list[int]  # 0 in the prefix, else the number of the sequence
    source: list[int]  # for each action token: where the state that predicts it stands in the row
    targets: list[int]  # the action tokens


def pack_row(sequences: list[tuple[list[int], list[int]]]) -> PackedRow:
    """Lay out the sequences of one row, each (token ids, action mask)."""
    actions = [[t for t, acted in enumerate(mask) if acted] for _, mask in sequences]
    # The last action is predicted but never read, and nothing after it is needed.
    inputs = []
    for (ids, _), acted in zip(sequences, actions, strict=True):
        inputs.append(ids[: acted[-1]] if acted else ids[:1])
    prefix = reduce(common_prefix, inputs)
    shared = len(prefix)
    row = PackedRow(list(prefix), list(range(shared)), [0] * shared, [], [])
    for number, (ids, _) in enumerate(sequences):
        begin, length = len(row.ids), len(inputs[number])
        place = [*range(shared), *range(begin, begin + length - shared)]  # of each token in the row
        row.source += [place[t - 1] for t in actions[number]]
        row.targets += [ids[t] for t in actions[number]]
        row.ids += inputs[number][shared:]
        row.positions += range(shared, length)
        row.branches += [number + 1] * (length - shared)
    return row


def pack(rows: list[list[tuple[list[int], list[int]]]]) -> dict[str, Tensor | None]:
    """Model inputs for rows of sequences; the sequences of a row share their common prefix.

    A row is the longest common prefix of its sequences, then the remainder of each. A remainder
    sees the prefix and itself, at the positions that it would have alone, so values and gradients
    are those of separate sequences, while the prefix is computed once. Rows of one sequence are
    plain right-padded causal rows and need no mask.

    Args:
        rows: per row its sequences, each (token ids, action mask).
    Returns:
        input_ids (R, L); position_ids (R, L) and attention_mask (R, 1, L, L), true where visible,
        both None where no row is shared; and for the N action tokens, sequence by sequence: source
        (N,), the flat index into (R * L) of the state that predicts the token, and targets (N,).
    """
    packed = [pack_row(row) for row in rows]
    length = max(len(row.ids) for row in packed)

    def pad(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([values + [value] * (length - len(values)) for values in lists])

    source = [number * length + s for number, row in enumerate(packed) for s in row.source]
    targets = [target for row in packed for target in row.targets]
    batch = {
        "input_ids": pad([row.ids for row in packed], 0),
        "position_ids": None,
        "attention_mask": None,
        "source": torch.tensor(source, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
    }
    if any(len(row) > 1 for row in rows):
        branch = pad([row.branches for row in packed], -1)  # (R, L)
        same_branch = branch[:, :, None] == branch[:, None, :]  # (R, L, L)
        in_prefix = branch[:, None, :] == 0
        batch["position_ids"] = pad([row.positions for row in packed], 0)
        batch["attention_mask"] = (same_branch | in_prefix).tril()[:, None]
    return batch
