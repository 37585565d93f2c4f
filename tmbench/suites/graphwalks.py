"""GraphWalks: breadth-first searches and parents over a list of edges, where no edge may be skipped.

The tasks and their score are those of OpenAI's data set (huggingface.co/datasets/openai/graphwalks, MIT), in the reading of
its correction of February 2026: a search results in the nodes at exactly its depth. Graphs and sentences are drawn and
written here, so scores do not compare with published ones.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ruler_tasks.draws import seeded
from ruler_tasks.fit import Draft
from ruler_tasks.lines import LineTokens
from ruler_tasks.recipe import Fitting
from tmbench.results.suite_rows import GraphWalksRow
from tmbench.suites.drawn import DrawnSuite, DrawnTask
from tmbench.suites.listing import ListDraft, Listing, Question

DEPTHS = (1, 2, 3)
MOST_NODES = 8
"""Of an answer, and so of the edges that leave a node or lead to it."""
NEW_TOKENS = 128
"""An answer of 8 nodes has at most 97 characters, and so no more tokens."""
EDGES_A_NODE = 2
PREFIX = "Final Answer:"
TEXT = """\
A directed graph is given below as a list of edges, and after it an operation on the graph. Each line "a -> b" is an edge
that leads from node a to node b. Carry out the operation, and answer with the set of nodes that it results in.
A BFS (breadth-first search) from a node with depth n results in the nodes whose shortest path from that node has exactly n
edges: nodes that are nearer do not belong to it, and neither does the node itself.
The parents of a node are the nodes from which an edge leads to it.

This is an example. The graph has these edges:
lime -> moss
dune -> lime
dune -> reed
reed -> lime
moss -> dune
Operation: BFS from node dune with depth 1
Final Answer: [lime, reed]
Operation: BFS from node reed with depth 2
Final Answer: [moss]
Operation: parents of node lime
Final Answer: [dune, reed]
The example ends here.

The graph to work on has these edges:
{lines}
Operation: {operation}
Write the nodes in square brackets with commas between them, as in the example.
"""
BFS = "BFS from node {node} with depth {depth}"
PARENTS = "parents of node {node}"
Edge = tuple[str, str]
Operation = Literal["bfs", "parents"]

_LIST = re.compile(rf"{PREFIX}\s*\[(.*?)\]")


def f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the set of nodes that an answer lists, as the data set grades it: 0 where there is no list in its form.

    The prompt ends in "Final Answer:", which begins the list's line. Where a model writes on, the first list counts.
    """
    found = _LIST.search(PREFIX + answer)
    nodes = {node.strip().strip("'\"") for node in found[1].split(",")} - {""} if found else set()
    truth = set(references)
    right = len(nodes & truth)
    return 2 * right / (len(nodes) + len(truth)) if right else 0.0


def at_depth(successors: Mapping[str, Sequence[str]], start: str, depth: int) -> list[str]:
    """The nodes whose shortest path from ``start`` has exactly ``depth`` edges, as a search meets them."""
    layer, seen = [start], {start}
    for _ in range(depth):
        met = dict.fromkeys(target for node in layer for target in successors.get(node, ()) if target not in seen)
        layer = list(met)
        seen.update(layer)
    return layer


class Graph(Listing[Edge]):
    """Edges between random nodes, about two a node, and an operation on the graph that they make.

    No edge is there twice, none leads from a node to itself, and at most ``MOST_NODES`` leave a node or lead to it.
    """

    least = 4

    def __init__(self, operation: Operation, rng: random.Random, edges: int) -> None:
        """For about so many edges."""
        self._operation = operation
        self._rng = rng
        self._depth, self._choice = rng.choice(DEPTHS), rng.getrandbits(64)
        self._expected = edges
        self._nodes: list[str] = []
        self._taken: set[str] = set()
        self._edges: dict[Edge, None] = {}
        self._out: Counter[str] = Counter()
        self._in: Counter[str] = Counter()

    def first(self, count: int) -> list[Edge]:
        """The first so many edges."""
        while len(self._edges) < count:
            wanted = max(self._expected, len(self._edges)) // EDGES_A_NODE + 3
            while len(self._nodes) < wanted:
                self._nodes.append(self._new_node())
            source, target = self._rng.choice(self._nodes), self._rng.choice(self._nodes)
            full = MOST_NODES in (self._out[source], self._in[target])
            if source != target and (source, target) not in self._edges and not full:
                self._edges[source, target] = None
                self._out[source] += 1
                self._in[target] += 1
        return list(self._edges)[:count]

    def _new_node(self) -> str:
        while (node := f"{self._rng.getrandbits(40):010x}") in self._taken:
            pass
        self._taken.add(node)
        return node

    def line(self, item: Edge) -> str:
        """An edge as a prompt has it."""
        return f"{item[0]} -> {item[1]}"

    def question(self, items: Sequence[Edge]) -> Question:
        """An operation on the graph of these edges, drawn anew for them, as any may belong to the answer."""
        rng = random.Random(self._choice)
        if self._operation == "parents":
            node = rng.choice([target for _, target in items])
            answer = [source for source, target in items if target == node]
            return self._question(PARENTS.format(node=node), answer, {})
        node, depth, answer = self._walk(items, rng)
        return self._question(BFS.format(node=node, depth=depth), answer, {"depth": depth})

    def _walk(self, edges: Sequence[Edge], rng: random.Random) -> tuple[str, int, list[str]]:
        """A node, a depth and what lies there: of the depth drawn, or where no answer has a fitting size, of a smaller one.

        At depth 1 every node that an edge leaves has one.
        """
        successors: dict[str, list[str]] = {}
        for source, target in edges:
            successors.setdefault(source, []).append(target)
        starts = list(successors)
        rng.shuffle(starts)
        return next(
            (start, depth, found)
            for depth in range(self._depth, 0, -1)
            for start in starts
            if 1 <= len(found := at_depth(successors, start, depth)) <= MOST_NODES
        )

    def _question(self, operation: str, answer: Sequence[str], about: Mapping[str, int]) -> Question:
        return Question(TEXT.replace("{operation}", operation), PREFIX, tuple(sorted(answer)), about)


@dataclass(frozen=True)
class Walk:
    """How the samples of one of the two tasks are made."""

    operation: Operation

    def source(self, setting: Fitting) -> str:
        """Always random graphs."""
        return "random graphs"

    def draft(self, setting: Fitting, index: int, rng: random.Random) -> Draft:
        """A sample whose number of edges is open."""
        edge = LineTokens.of(setting, ("edges",), self._some_lines)
        return ListDraft(setting, Graph(self.operation, rng, edge.most(setting.budget, Graph.least)), edge, rng)

    def _some_lines(self, count: int) -> list[str]:
        graph = Graph(self.operation, seeded("edges"), count)
        return [graph.line(edge) for edge in graph.first(count)]


@dataclass(frozen=True, kw_only=True)
class GraphWalks(DrawnSuite):
    """The two tasks."""

    name: ClassVar[str] = "graphwalks"
    title: ClassVar[str] = GraphWalksRow.title
    row: ClassVar[type[GraphWalksRow]] = GraphWalksRow
    tasks: ClassVar[tuple[str, ...]] = GraphWalksRow.tasks
    recipes: ClassVar[Mapping[str, DrawnTask]] = {
        "bfs": DrawnTask("the nodes at one depth of a breadth-first search", Walk("bfs"), NEW_TOKENS, f1, TEXT),
        "parents": DrawnTask("the nodes that edges lead from to one", Walk("parents"), NEW_TOKENS, f1, TEXT),
    }
    sentences: ClassVar[tuple[str, ...]] = (TEXT, BFS, PARENTS, PREFIX)
    wording: ClassVar[str] = "graphwalks-1"
