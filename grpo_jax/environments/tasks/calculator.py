"""The tool of the task calculator (`data/tasks/calculator.py`), and one that is of no use."""

from __future__ import annotations

import random


def multiply(a: int, b: int) -> int:
    """Multiplies two whole numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The product.
    """
    return int(a) * int(b)


class NoisyCalculator:
    """For a control: its product is that of other numbers, so that nothing is gained by asking."""

    def reset(self, **row) -> None:
        """Begins an episode."""

    def multiply(self, a: int, b: int) -> int:
        """Multiplies two whole numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            A product.
        """
        return random.randrange(100, 1000) * random.randrange(10, 100)
