"""Labels that contradict each other: a pair labelled both ways, and responses to one prompt that each beat the next in
a circle. Texts are numbers here, equal where they are the same."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def numbered(*columns: np.ndarray) -> np.ndarray:
    """Return for each row the number of the first one with the same values, int64 [n]."""
    order = np.lexsort(columns[::-1])
    new = np.ones(len(order), dtype=bool)
    if len(order) > 1:
        new[1:] = np.logical_or.reduce([column[order][1:] != column[order][:-1] for column in columns])
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first


def conflicts(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Return for each row the number of the first one of the same prompt and responses, where those are labelled both
    ways, else -1; int64 [n]."""
    same = numbered(prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected))
    forward = chosen < rejected
    seen = np.zeros((2, len(same)), dtype=bool)
    seen[0, same[forward]] = True
    seen[1, same[~forward & (chosen != rejected)]] = True
    both = np.asarray(seen[0] & seen[1])
    return np.where(both[same], same, -1)


def cycles(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Return for each row the number of the first one in the same circle of three responses or more, else -1; int64
    [n].

    Pairs labelled both ways are conflicts, and left out: what remains in a strongly connected component of the
    responses to a prompt lies on a circle.
    """
    rows = np.flatnonzero(conflicts(prompt, chosen, rejected) < 0)
    found = np.full(len(prompt), -1, dtype=np.int64)
    if not len(rows):
        return found
    node = numbered(np.tile(prompt[rows], 2), np.concatenate([chosen[rows], rejected[rows]]))
    names, ends = np.unique(node, return_inverse=True)
    winner, loser = ends.reshape(2, -1)
    edges = coo_matrix((np.ones(len(rows), dtype=np.int8), (winner, loser)), shape=(len(names), len(names)))
    component = connected_components(edges, connection="strong")[1]
    inside = (component[winner] == component[loser]) & (winner != loser)
    of = component[winner[inside]]
    least = np.full(component.max() + 1, len(prompt), dtype=np.int64)
    np.minimum.at(least, of, rows[inside])
    found[rows[inside]] = least[of]
    return found
