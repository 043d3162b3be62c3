"""A least-recently-used cache that closes what it evicts."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """A least-recently-used cache: values by integer key, opened on first access and closed on eviction.

    Values are evicted while their sizes add up to more than `limit`; by default each has size 1.
    """

    def __init__(
        self,
        limit: int,
        open_one: Callable[[int], Value],
        size_of: Callable[[Value], int] = lambda _: 1,
        close: Callable[[Value], None] = lambda _: None,
    ) -> None:
        self._limit, self._open, self._size_of, self._close = limit, open_one, size_of, close
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._size = 0

    def __del__(self) -> None:
        for value in self._values.values():
            self._close(value)

    def __getitem__(self, key: int) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = self._open(key)
        self._size += self._size_of(value)
        while self._size > self._limit and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._size -= self._size_of(oldest)
            self._close(oldest)
        return value
