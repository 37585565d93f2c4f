"""GraphWalks: an independent reader of its prompts finds the answers by networkx, and its score is the published one."""

from __future__ import annotations

import re

import networkx as nx
import pytest

from tmbench.errors import UserError
from tmbench.suites.graphwalks import DEPTHS, MOST_NODES, NEW_TOKENS, PREFIX, TEXT, GraphWalks, f1

OPERATION = re.compile(r"Operation: (?:BFS from node (\w+) with depth (\d+)|parents of node (\w+))\n")


def graph_of(text):
    """The graph of a text's lines, as a reader sees it who knows of edges alone."""
    edges = re.findall(r"^(\w+) -> (\w+)$", text, re.MULTILINE)
    assert len(set(edges)) == len(edges)
    return nx.DiGraph(edges)


def answer(graph, operation):
    start, depth, node = operation.groups()
    return set(graph.predecessors(node)) if node else nx.descendants_at_distance(graph, start, int(depth))


def samples(task, length, tokenizer, places=range(6), seed=42):
    return GraphWalks().samples(task, length, places, seed, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("length", [700, 1000, 4096])
@pytest.mark.parametrize("task", GraphWalks.tasks)
def test_networkx_finds_the_answers(task, length, tokenizer):
    for sample in samples(task, length, tokenizer):
        _, own = sample.prompt.split("The graph to work on has these edges:\n")
        graph = graph_of(own)
        (operation,) = OPERATION.finditer(own)
        assert answer(graph, operation) == set(sample.references)
        assert 1 <= len(sample.references) <= MOST_NODES
        assert (operation[1] is None) == (task == "parents")
        assert sample.parameters == ({"depth": int(operation[2])} if task == "bfs" else {})
        assert not list(nx.selfloop_edges(graph))
        assert min(dict(graph.degree()).values()) >= 1
        assert all(re.fullmatch("[0-9a-f]{10}", node) for node in graph)
        assert own.endswith(PREFIX)


def test_the_example_in_the_prompt_is_right():
    example, _ = TEXT.split("The example ends here.")
    asked = list(OPERATION.finditer(example))
    graph = graph_of(example)
    shown = re.findall(r"Final Answer: \[(.*)\]", example)
    assert [answer(graph, one) for one in asked] == [set(each.split(", ")) for each in shown]
    assert len(shown) == 3


@pytest.mark.slow
def test_searches_go_as_deep_as_drawn_and_edges_stand_anywhere(tokenizer):
    found = samples("bfs", 4096, tokenizer, range(24))
    assert {one.parameters["depth"] for one in found} == set(DEPTHS)
    # Where the first edges of a search stand among all, in parts of the list: a band at the end would miss most.
    places = []
    for one in found:
        edges = re.findall(r"^(\w{10}) -> \w+$", one.prompt, re.MULTILINE)
        start = next(OPERATION.finditer(one.prompt, one.prompt.index("The graph to work on")))[1]
        places += [place / len(edges) for place, source in enumerate(edges) if source == start]
    assert min(places) < 0.2
    assert max(places) > 0.8
    assert 0.3 < sum(places) / len(places) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("task", GraphWalks.tasks)
def test_samples_fill_their_length_and_depend_on_seed_and_number_alone(task, tokenizer):
    for length in (900, 4096):
        found = samples(task, length, tokenizer)
        lengths = [len(one.ids) + one.max_new_tokens for one in found]
        assert max(lengths) <= length
        # No more than an edge and its deviation stays empty of a short one, and 1/256 of a long one.
        assert min(lengths) > length - max(64, length // 128)
        assert found[2:4] == samples(task, length, tokenizer, (2, 3))
        assert len({one.prompt for one in (*found, *samples(task, length, tokenizer, seed=43))}) == 2 * len(found)


def test_the_longest_answer_fits_its_tokens(tokenizer):
    nodes = [f"{number:010x}" for number in range(2**40 - MOST_NODES, 2**40)]
    assert len(f" [{', '.join(nodes)}]") <= NEW_TOKENS, "a token has a character at least"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" [a, b]", 1),
        (" [b,a]\nOperation: parents of node x\nFinal Answer: [x]", 1),
        (" [a, b], and [c] beside it", 1),
        (" [a] [b]", 2 / 3),
        (" ['a', \"b\"]", 1),
        ("\n[a, b, b]", 1),
        (" [a]", 2 / 3),
        (" [a, b, c, d]", 2 / 3),
        (" [A, B]", 0),
        (" a, b", 0),
        (" [a, b", 0),
        (" []", 0),
        ("", 0),
        (" it is this:\nFinal Answer: [a, b]", 1),
        (" [ab]", 0),
    ],
)
def test_f1(text, score):
    assert f1(text, ("a", "b")) == pytest.approx(score)
    figures = GraphWalks().figures("bfs", [text, ""], [("a", "b"), ("c",)])
    assert figures == {"score": round(50 * score, 2), "nulls": 1 + (text == "")}


@pytest.mark.slow
@pytest.mark.parametrize("task", GraphWalks.tasks)
def test_a_length_for_less_than_a_graph_is_refused(task, tokenizer):
    suite = GraphWalks()
    with pytest.raises(UserError, match=f"--length 300 is too short for {task}, which needs") as caught:
        suite.check([task], [4096, 300], 1, 42, tokenizer)
    least = int(re.findall(r"needs (\d+) tokens", str(caught.value))[0])
    suite.check([task], [least], 1, 42, tokenizer)
    for sample in samples(task, least, tokenizer, range(20)):
        assert len(sample.ids) + sample.max_new_tokens <= least
        assert sample.prompt.count(" -> ") >= 4
