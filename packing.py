"""Packing: sequences that begin alike compute this beginning once.

The gradient is that of separate sequences; only the computation is shared. Shapes: R rows of a
micro-batch, L tokens of a row, N action tokens of a micro-batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Longest row of several sequences, in tokens: the attention of a row grows with its square.
MAX_SHARED_ROW = 1536
# A sequence joins a row where it adds at most this share of its own length. Sharing has a price: a
# dense mask, and attention that is computed across the sequences of a row before it is masked.
MAX_ADDED_SHARE = 0.5


def common_length(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix of two lists of token ids."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))


@dataclass
class Row:
    """A row of a plan; each sequence adds the tokens that it does not share with the one before."""

    members: list[int]  # indices of the sequences
    tokens: int  # of the row

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1


def plan_micro_batches(
    sequences: dict[int, list[int]], budget: int, ranks: int = 1
) -> list[list[list[int]]]:
    """Micro-batches of rows of sequences, for `pack`.

    Sorted by token ids, a sequence shares most with the one just before it, of those before it; it
    joins the row of that one where this saves enough. Rows are sorted by length, so that the rows
    of a micro-batch are alike and padding is small. Shared and plain rows never mix: one shared row
    would give all rows of its micro-batch a dense mask. The largest micro-batches are divided until
    all ranks get the same number, so that none idles and no collective can hang.

    Args:
        sequences: token ids by index.
        budget: tokens of a micro-batch, padding included; a single sequence may exceed it.
        ranks: that share the micro-batches; where rows are too few, some micro-batches are empty.
    Returns:
        For each micro-batch its rows, and for each row the indices of its sequences.
    """
    rows: list[Row] = []
    for index in sorted(sequences, key=sequences.__getitem__):
        sequence = sequences[index]
        previous = sequences[rows[-1].members[-1]] if rows else []
        added = len(sequence) - common_length(previous, sequence)
        begins_alike = added <= MAX_ADDED_SHARE * len(sequence)
        if begins_alike and rows[-1].tokens + added <= min(budget, MAX_SHARED_ROW):
            rows[-1].members.append(index)
            rows[-1].tokens += added
        else:
            rows.append(Row([index], len(sequence)))
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
    # The ranks compute neighbours at the same time: these are alike, so that no rank waits long.
    micro_batches.sort(key=lambda rows: sum(row.tokens for row in rows), reverse=True)
    return [[row.members for row in rows] for rows in micro_batches]


@dataclass
class PackedRow:
    """A row as `pack` lays it out: every sequence, up to its last action, is a path in a tree."""

    ids: list[int]
    positions: list[int]  # that each token has in its own sequence
    paths: list[list[int]]  # of each sequence that adds tokens: where its tokens stand in the row
    actions: list[tuple[int, int]]  # where the state stands that predicts an action; the action


def pack_row(sequences: list[tuple[list[int], list[int]]]) -> PackedRow:
    """Lay out the sequences of one row, each (token ids, action mask)."""
    row = PackedRow([], [], [], [])
    previous: list[int] = []
    path: list[int] = []  # of the previous tokens
    for ids, mask in sequences:
        actions = [t for t, acted in enumerate(mask) if acted]
        # The last action is predicted but never read, and nothing after it is needed.
        inputs = ids[: actions[-1]] if actions else ids[:1]
        shared = common_length(previous, inputs)
        if shared < len(inputs):  # else the previous path holds all of them
            begin, added = len(row.ids), inputs[shared:]
            path = [*path[:shared], *range(begin, begin + len(added))]
            row.ids += added
            row.positions += range(shared, len(inputs))
            row.paths.append(path)
            previous = inputs
        row.actions += [(path[t - 1], ids[t]) for t in actions]
    return row


def visible_tokens(row: PackedRow, length: int) -> np.ndarray:
    """(length, length) bool: a token sees its path up to itself; padding sees itself."""
    mask = np.eye(length, dtype=bool)
    for path in row.paths:
        mask[np.ix_(path, path)] = np.tri(len(path), dtype=bool)
    return mask


def pack(rows: list[list[tuple[list[int], list[int]]]]) -> dict[str, Tensor | None]:
    """Model inputs for rows of sequences; a sequence shares the beginning of the one before it.

    A token sees those before it in its own sequence and no others, and has its position there, so
    values and gradients are those of separate sequences, while what begins alike is computed once.
    Rows of one sequence are plain right-padded causal rows and need no mask.

    Args:
        rows: per row its sequences, each (token ids, action mask); a first token is no action.
    Returns:
        input_ids (R, L); position_ids (R, L) and attention_mask (R, 1, L, L), true where visible,
        both None where no row is shared; source (M,), the flat index into (R * L) of a state, and
        targets (M,), the action token that it predicts; and for the N action tokens, sequence by
        sequence, actions (N,), the index into these: sequences may have some in common.
    """
    packed = [pack_row(row) for row in rows]
    length = max(len(row.ids) for row in packed)

    def pad(lists: list[list[int]]) -> Tensor:
        return torch.tensor([values + [0] * (length - len(values)) for values in lists])

    predictions: dict[tuple[int, int], int] = {}  # numbers of (source, target): each is made once
    actions = []
    for row_number, row in enumerate(packed):
        for place, target in row.actions:
            prediction = (row_number * length + place, target)
            actions.append(predictions.setdefault(prediction, len(predictions)))
    batch = {
        "input_ids": pad([row.ids for row in packed]),
        "position_ids": None,
        "attention_mask": None,
        "source": torch.tensor([source for source, _ in predictions], dtype=torch.long),
        "targets": torch.tensor([target for _, target in predictions], dtype=torch.long),
        "actions": torch.tensor(actions, dtype=torch.long),
    }
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = pad([row.positions for row in packed])
        visible = np.stack([visible_tokens(row, length) for row in packed])
        batch["attention_mask"] = torch.tensor(visible[:, None])
    return batch
