"""Several processes of a run as threads of one, which tell each other JSON, as processes do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from grpo_jax.hosts import processes


class Together:
    """Processes that are threads here: what one gathers, all get."""

    def __init__(self, patch: pytest.MonkeyPatch, num: int):
        self._own, self._told = threading.local(), [""] * num
        self._meeting = threading.Barrier(num, timeout=60)
        self.num = num
        patch.setattr(processes, "count", lambda: num)
        patch.setattr(processes, "number", lambda: self._own.number)
        patch.setattr(processes, "gather", self._gather)

    def _gather(self, value: Any, what: str) -> list[Any]:
        self._told[self._own.number] = json.dumps(value)
        self._meeting.wait()
        found = [json.loads(told) for told in self._told]
        self._meeting.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(number)` returns in each process."""
        found = [None] * self.num

        def begin(number):
            self._own.number = number
            found[number] = work(number)

        threads = [threading.Thread(target=begin, args=(n,)) for n in range(self.num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found
