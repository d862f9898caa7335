"""Which views a subject concerns: found along its tokens, however many filters there are."""

from __future__ import annotations

from flux_svc.fanout.view import View

KNOWN_BYTES = 32 * 2**20
"""Of memory for the subjects whose views are remembered, about; then all are forgotten at once. Not
so many subjects: with a thousand views that want everything each of them is 8 KB."""
_SUBJECT_BYTES, _VIEW_BYTES = 250, 8
"""What one that is remembered costs beside its letters, and each of its views."""


class _Node:
    """The filters that go on with one token more."""

    __slots__ = ("any", "ends", "next", "rest")

    def __init__(self) -> None:
        self.next: dict[str, _Node] = {}
        self.any: _Node | None = None
        """Behind `*`."""
        self.ends: list[View] = []
        """Views with a filter that ends here."""
        self.rest: list[View] = []
        """Views with a filter that ends here with `>`."""


class Routes:
    """A tree of all views' filters, token by token, and a memory of the subjects that came.

    An event of a known subject costs one look into a dict. A subject that was never seen costs a
    walk of at most 2^(its tokens) nodes, and in practice as many as it has tokens: it is never held
    against every filter.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[View, ...]] = {}
        """Subject -> its views, as `of` answered."""
        self._known_bytes = 0
        self._root = _Node()

    def add(self, view: View) -> None:
        for pattern in view.filters.filters:
            node, is_rest = self._node(pattern)
            (node.rest if is_rest else node.ends).append(view)
        self._forget()

    def remove(self, view: View) -> None:
        """A view that was added."""
        for pattern in view.filters.filters:
            _remove(self._root, pattern.split("."), view)
        self._forget()

    def of(self, subject: str) -> tuple[View, ...]:
        """Each view once."""
        views = self._known.get(subject)
        if views is None:
            if self._known_bytes >= KNOWN_BYTES:
                self._forget()
            views = self._known[subject] = self._find(subject.split("."))
            self._known_bytes += _SUBJECT_BYTES + len(subject) + _VIEW_BYTES * len(views)
        return views

    def _forget(self) -> None:
        self._known.clear()
        self._known_bytes = 0

    def _node(self, pattern: str) -> tuple[_Node, bool]:
        node = self._root
        for token in pattern.split("."):
            if token == ">":
                return node, True
            if token == "*":
                node.any = node.any or _Node()
                node = node.any
            else:
                node = node.next.setdefault(token, _Node())
        return node, False

    def _find(self, tokens: list[str]) -> tuple[View, ...]:
        found: dict[View, None] = {}
        nodes = [self._root]
        for token in tokens:
            following = []
            for node in nodes:
                found.update(dict.fromkeys(node.rest))
                if (named := node.next.get(token)) is not None:
                    following.append(named)
                if node.any is not None:
                    following.append(node.any)
            nodes = following
        for node in nodes:
            found.update(dict.fromkeys(node.ends))
        return tuple(found)


def _remove(node: _Node, tokens: list[str], view: View) -> bool:
    """Takes the view off the end of the path; True when nothing is left at or below `node`."""
    if not tokens:
        node.ends.remove(view)
    elif tokens[0] == ">":
        node.rest.remove(view)
    elif tokens[0] == "*":
        if node.any is not None and _remove(node.any, tokens[1:], view):
            node.any = None
    elif _remove(node.next[tokens[0]], tokens[1:], view):
        del node.next[tokens[0]]
    return not (node.next or node.any or node.ends or node.rest)
