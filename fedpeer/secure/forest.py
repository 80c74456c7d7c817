"""Boosted trees as arrays, and how they grow level by level where the label is known.

Node i of a tree has the children 2i + 1, left, and 2i + 2. Who splits a node has the rule of it under a number of its
own, a record; the forest knows whose it is, and nothing of feature and threshold.

Rules
* What outlives a turn lies in `Growing.state`, a dict of message values; everything else follows from the inputs.
* A level ends when each of its nodes was split or is a leaf. A child of fewer than 2·MIN_ROWS rows is a leaf.
* Sums of rows that do not learn are 0, but they go through the trees, count as rows, and have margins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpeer.secure import trees
from fedpeer.secure.losses import Loss
from fedpeer.secure.trees import MIN_ROWS, UNIT, Bools, Floats, Ints, Rules, Sums

LEAF: Final = -1
GUEST: Final = 0
"""As the owner of a split; its hosts are 1, 2, …"""
FOREST: Final = {"owner": np.int16, "record": np.int32, "value": np.float64, "gain": np.float64}
"""Of each node, (trees, 2^(depth + 1) - 1)."""
OWN: Final = ("feature", "threshold", "missing_left")
"""Of each record of an owner."""


def empty(count: int, depth: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a forest of leaves that say 0."""
    shape = count, 2 ** (depth + 1) - 1
    return {name: np.full(shape, LEAF if name == "owner" else 0, dtype) for name, dtype in FOREST.items()}


@dataclass(frozen=True)
class Best:
    """The best split of a node so far."""

    gain: float
    owner: int
    places: Ints
    """of the candidates with this gain, in their owner's order"""
    sums: Sums
    """theirs"""


@dataclass(frozen=True)
class Growing:
    """All that is known of the rows where the label is, and the trees grown so far."""

    bins: Ints
    """(features, rows)"""
    ends: Floats
    """(features, max_bin - 1)"""
    targets: Floats
    """(rows, groups)"""
    weights: Floats
    """0 where nothing is learned from a row, for validation for example"""
    loss: Loss
    rules: Rules
    learning_rate: float
    max_depth: int
    state: dict[str, Any]

    @property
    def max_bin(self) -> int:
        return int(self.ends.shape[1]) + 1

    @property
    def tree(self) -> int:
        """The number of the tree that grows, or of the next one."""
        return int(self.state["tree"])

    @property
    def open(self) -> list[int]:
        """The nodes of this level that may be split; none between two trees."""
        return [int(node) for node in self.state["open"]]

    def begin(self, learns: Bools, features: Ints) -> None:
        """A new tree of the rows that learn (if they have weight), and of these own features."""
        state, group = self.state, self.tree % self.loss.groups
        weights = np.where(learns, self.weights, 0.0) / UNIT
        g, h = self.loss.derivatives(state["margins"][:, group], self.targets[:, group])
        state["g"], state["h"] = (np.rint(weights * each).astype(np.int64) for each in (g, h))
        state["features"] = features
        state["node"] = np.zeros(len(weights), np.int16)
        state["open"] = [0]
        self._value(0, state["g"], state["h"])

    def places(self) -> npt.NDArray[np.int16]:
        """Of each row the place of its node among the open ones, or -1."""
        found = np.full(len(self.state["node"]), -1, np.int16)
        for place, node in enumerate(self.open):
            found[self.state["node"] == node] = place
        return found

    def of_node(self, node: int) -> tuple[Ints, Ints]:
        """g and h of its rows."""
        rows = self.state["node"] == node
        return self.state["g"][rows], self.state["h"][rows]

    def own_best(self, node: int) -> Best:
        """The best split by an own feature; its gain is -infinity if there is none."""
        g, h = self.of_node(node)
        rows = self.state["node"] == node
        none = Sums(np.zeros(0, np.int64), np.zeros(0, np.int64))
        start = Best(-np.inf, LEAF, np.zeros(0, np.int64), none)
        return self.better(
            start, GUEST, trees.sums(self.bins[self.state["features"]][:, rows], g, h, self.max_bin), node
        )

    def better(self, best: Best, owner: int, left: Sums, node: int) -> Best:
        """The best of a node, with another owner's candidates; an equal gain changes nothing."""
        g, h = self.of_node(node)
        gains = self.rules.gains(left, int(g.sum()), int(h.sum()))
        if not len(gains) or not gains.max() > best.gain:
            return best
        places = np.flatnonzero(gains == gains.max())
        return Best(float(gains.max()), owner, places, Sums(left.g[places], left.h[places]))

    def split_own(self, node: int, best: Best) -> None:
        """By the first of the guest's best candidates."""
        state = self.state
        feature, t, side = (
            int(part) for part in np.unravel_index(best.places[0], (len(state["features"]), self.max_bin - 1, 2))
        )
        feature = int(state["features"][feature])
        state["feature"].append(feature)
        state["threshold"].append(float(self.ends[feature, t]))
        state["missing_left"].append(bool(side))
        rows = state["node"] == node
        self.split(node, best, trees.left_of(self.bins[feature, rows], t, bool(side), self.max_bin))

    def split(self, node: int, best: Best, left: Bools) -> None:
        """`left`: of the rows of the node, in order."""
        state, tree = self.state, self.tree
        state["owner"][tree, node], state["gain"][tree, node] = best.owner, best.gain
        state["record"][tree, node] = state["records"][best.owner]
        state["records"][best.owner] += 1
        rows = np.flatnonzero(state["node"] == node)
        for child, chosen in ((2 * node + 1, rows[left]), (2 * node + 2, rows[~left])):
            state["node"][chosen] = child
            self._value(child, state["g"][chosen], state["h"][chosen])

    def end_level(self) -> None:
        """Opens the children that may be split, or ends the tree."""
        state = self.state
        parents = [node for node in self.open if state["owner"][self.tree, node] != LEAF]
        children = [child for node in parents for child in (2 * node + 1, 2 * node + 2)]
        if children and (children[0] + 1).bit_length() > self.max_depth:
            children = []
        state["open"] = [child for child in children if int((state["node"] == child).sum()) >= 2 * MIN_ROWS]
        if not state["open"]:
            self._end_tree()

    def grow_alone(self, learns: Bools, features: Ints) -> None:
        """A whole tree with splits of the guest only."""
        self.begin(learns, features)
        while self.open:
            for node in self.open:
                if (best := self.own_best(node)).owner == GUEST:
                    self.split_own(node, best)
            self.end_level()

    def _value(self, node: int, g: Ints, h: Ints) -> None:
        value = self.rules.value(int(g.sum()), int(h.sum()))
        self.state["value"][self.tree, node] = self.learning_rate * value

    def _end_tree(self) -> None:
        state = self.state
        state["margins"][:, self.tree % self.loss.groups] += state["value"][self.tree, state["node"]]
        state["tree"] = self.tree + 1


def margins(arrays: Any, base: Floats, leaves: Ints) -> Floats:
    """(rows, groups), of the leaf of each row in each tree, (trees, rows); added up as in growing them."""
    found = np.repeat(base[None, :], leaves.shape[1], axis=0)
    for tree, nodes in enumerate(leaves):
        found[:, tree % len(base)] += arrays["value"][tree, nodes]
    return found


def goes_left(values: Floats, threshold: Floats, missing_left: Bools) -> Bools:
    return np.where(np.isnan(values), missing_left, values <= threshold)


def importance(columns: list[str], feature: Ints, gain: Floats) -> dict[str, dict[str, Any]]:
    """Of each column how many splits it has, and what they gained together."""
    return {
        name: {"splits": int((feature == place).sum()), "gain": float(gain[feature == place].sum())}
        for place, name in enumerate(columns)
    }


def gains_of(arrays: Any, owner: int) -> Floats:
    """The gain of each record of this owner, in the order of the records."""
    own = arrays["owner"] == owner
    found = np.zeros(int(own.sum()))
    found[arrays["record"][own]] = arrays["gain"][own]
    return found
