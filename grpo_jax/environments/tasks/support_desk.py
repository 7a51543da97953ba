"""The support desk of the task of that name: its database, its tools, and a scripted customer.

An episode is a success if the database is at the end as it must be, nothing was done that was not
confirmed, and the customer was told what it had to be (as tau-bench judges, arXiv:2406.12045). One
that would change its mind must have been asked: else whoever does nothing would be right.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from grpo_jax.data.tasks import support_desk as data

_MOST_TURNS = 8


class SupportDesk:
    """The desk; one episode is one case."""

    _is_deaf = False

    def __init__(self):
        self._database = sqlite3.connect(":memory:")
        self._database.execute("CREATE TABLE orders (number PRIMARY KEY, item, state, days)")

    def reset(self, number: int, seed_of_cases: int, **row) -> None:
        """Begins a case.

        Args:
            number: The number of the case.
            seed_of_cases: The seed that made the cases.
        """
        self._case = data.case(number, seed_of_cases)
        self._database.execute("DELETE FROM orders")
        rows = [(o.number, o.item, o.state, o.days) for o in self._case.orders]
        self._database.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", rows)
        self._begun = self._state()
        self._is_confirmed = self._broke_rules = self._is_refused = self._is_told = False
        self._keeps_it = False
        self._turns = 0

    def _state(self) -> list[tuple]:
        return self._database.execute("SELECT * FROM orders ORDER BY number").fetchall()

    # --- The clerk's tools ---

    def find_order(self, number: int) -> str:
        """Looks an order up.

        Args:
            number: The number of the order.

        Returns:
            Its item, its state, and the days since it arrived.
        """
        if self._is_deaf:
            number = self._another(int(number))
        asked = "SELECT * FROM orders WHERE number = ?"
        found = self._database.execute(asked, (int(number),)).fetchone()
        return data.Order(*found).told if found else "T: no order."

    def _another(self, number: int) -> int:
        """The number of an order that is neither this one nor the customer's."""
        not_these = (number, self._case.order.number)
        others = [o.number for o in self._case.orders if o.number not in not_these]
        return others[number % len(others)]

    def refund(self, number: int) -> str:
        """Pays an order back.

        Args:
            number: The number of the order.
        """
        return self._set(number, "refund")

    def cancel(self, number: int) -> str:
        """Cancels an order.

        Args:
            number: The number of the order.
        """
        return self._set(number, "cancel")

    def _set(self, number: int, act: str) -> str:
        self._broke_rules |= not self._is_confirmed
        asked = "UPDATE orders SET state = ? WHERE number = ?"
        done = self._database.execute(asked, (act, int(number))).rowcount
        return "T: ok." if done else "T: no order."

    # --- The customer ---

    def respond(self, messages: list[dict[str, Any]]) -> str | None:
        """What the customer says to the clerk; None: it hangs up."""
        said = messages[-1]["content"].strip()
        case, item = self._case, self._case.order.item
        self._turns += 1
        if self._turns > _MOST_TURNS:
            return None
        if said == data.ASK.strip():
            return data.named(case)
        if said == data.question(case.act, item).strip():
            if case.changes_mind:
                self._keeps_it = True
                return "U: no, keep it."
            self._is_confirmed = True
            return "U: yes."
        if said.endswith("?"):
            return "U: no."
        self._is_refused = said == data.refusal(item).strip()
        self._is_told = said in (data.DONE.strip(), data.FINE.strip())
        return None

    def get_reward(self) -> float:
        """1 for a success, else 0."""
        case, must_be = self._case, dict((row[0], row) for row in self._begun)
        order = case.order
        if not order.allows(case.act):
            is_told = self._is_refused
        else:
            is_told = self._is_told and (self._keeps_it or not case.changes_mind)
            if not case.changes_mind:
                must_be[order.number] = (order.number, order.item, case.act, order.days)
        is_state = self._state() == sorted(must_be.values())
        return float(is_state and is_told and not self._broke_rules)

    get_reward.right_or_wrong = True  # accuracy, pass@k and pass^k count it


class DeafSupportDesk(SupportDesk):
    """For a control: the screen shows another order than the one that is looked up."""

    _is_deaf = True
