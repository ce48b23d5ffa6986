"""The protocols of evaluate.py run: what is injected, what is limited, what is counted."""

import pytest

from protocol import PROTOCOLS, squad_exact_match
from reward import normalize

SEARCH_R1 = PROTOCOLS["search-r1"]
PASSAGES = [
    {"id": "7", "title": "Red Harbor", "text": "Red Harbor is a film.\nIt was shot in Dover."},
    {"id": "9", "title": 'The "Old" Mill', "text": "A mill {number}, <information> of 1901."},
]
# What `execute_predictions` and `_passages2string` of Search-R1 (a14dc3a) append to an episode for
# these passages, whose wiki-18 contents are `"title"\ntext`; written down by hand.
SEARCH_R1_INJECTS = """\


<information>Doc 1(Title: "Red Harbor") Red Harbor is a film.
It was shot in Dover.
Doc 2(Title: "The "Old" Mill") A mill {number}, <information> of 1901.</information>

"""


def test_search_r1_injects_what_its_own_loop_injects(play):
    turns = [
        "<think> I look.</think>\n<search> red harbor </search>",
        "<think> I know.</think>\n<answer> Dover </answer>",
    ]
    episode, engine = play(
        turns, tags=SEARCH_R1.tags, search=lambda queries, k: [PASSAGES for _ in queries]
    )
    kinds = [kind for kind, _ in episode.segments]
    assert kinds == ["prompt", "policy", "documents", "policy"]
    assert episode.segments[1:] == [
        ("policy", turns[0]),
        ("documents", SEARCH_R1_INJECTS),
        ("policy", turns[1]),
    ]
    assert (episode.finish_reason, episode.queries) == ("answer", ["red harbor"])
    assert engine.stops == {"</search>", "</answer>"}


def test_search_r1_without_results(play):
    turns = ["<search> nothing </search>", "<answer> b </answer>"]
    episode, _ = play(turns, tags=SEARCH_R1.tags, search=lambda queries, k: [[] for _ in queries])
    assert episode.segments[2][1] == "\n\n<information></information>\n\n"


@pytest.mark.parametrize(
    ("prediction", "gold", "squad", "ours"),
    [
        ("acid house", "acid-house", 0, 1),
        ("acidhouse", "acid-house", 1, 0),
        ("The U.S.A.", "usa", 1, 0),
        ("a  Red Harbor!", "red harbor", 1, 1),
        ("", "!!!", 0, 0),
        ("A", "A", 1, 1),  # of which only articles are left, and then nothing
        ("b", "c", 0, 0),
    ],
)
def test_exact_match_of_the_two_protocols(prediction, gold, squad, ours):
    assert squad_exact_match(prediction, gold) == squad
    assert (normalize(prediction) == normalize(gold)) == bool(ours)
