"""A support desk: a customer wants to return or cancel an order, and the clerk obeys rules.

The clerk asks for the order, looks it up, refuses what the rules forbid, has the rest confirmed,
and then acts. The customer is a script (`environments/tasks/support_desk.py`): it names its order
only when asked, sometimes corrects the number, and sometimes changes its mind. Most demonstrations
are those of careless clerks, who skip a step.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import small_tokenizer
from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import Piece

ITEMS = (
    "lamp chair phone shirt book radio table clock vase bag scarf mirror kettle drill tent guitar "
    "camera jacket carpet mug pillow ladder blender watch basket candle globe hammer piano printer "
    "rug saddle shelf skirt sofa spoon toaster umbrella violin wallet"
).split()
DAYS = 30  # within which an order may be returned
RULES = f"P: returns within {DAYS} days. cancel only if packed. confirm first."
# Probabilities that a clerk acts on the first number though it was corrected, or on what the
# customer has given up; mistakes the rules; has nothing confirmed
CARELESS, MISTAKEN, UNASKED = 0.4, 0.15, 0.5
ASK, DONE, FINE = " which order?", " done.", " fine."
_FIND = small_tokenizer.call_pieces("find_order", ("number", False))
_ACT = {name: small_tokenizer.call_pieces(name, ("number", False)) for name in ("refund", "cancel")}


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of the desk's database."""

    number: int
    item: str
    state: str  # "packed", "shipped" or "arrived"
    days: int  # since it arrived; 0: it has not

    @property
    def told(self) -> str:
        """What the clerk's screen shows."""
        when = f" {self.days} days ago" if self.state == "arrived" else ""
        return f"T: {self.item} {self.state}{when}."

    def allows(self, act: str) -> bool:
        """Whether the rules allow to "refund" or "cancel" it."""
        if act == "cancel":
            return self.state == "packed"
        return self.state == "arrived" and self.days <= DAYS


@dataclasses.dataclass(frozen=True)
class Case:
    """What a customer wants, and the orders that there are."""

    act: str  # "refund" or "cancel"
    order: Order  # that the customer means
    wrong: Order | None  # that it names first, by mistake
    changes_mind: bool
    orders: tuple[Order, ...]


def case(number: int, seed: int) -> Case:
    """The case of this number."""
    rng = stream(seed, "problems", 1 + number)
    act = ("refund", "cancel")[rng.integers(2)]
    orders = []
    for n, item in zip(rng.permutation(900)[:6], rng.permutation(ITEMS)):
        state = ("packed", "shipped", "arrived")[rng.integers(3)]
        days = int(rng.integers(1, 2 * DAYS + 1)) if state == "arrived" else 0
        orders.append(Order(100 + int(n), str(item), state, days))
    # Most orders are in the state of which the rules allow the wish; of those that have arrived,
    # half have too long ago, so that no answer is right for most.
    fits = {"refund": "arrived", "cancel": "packed"}[act]
    if rng.random() < 0.6:
        days = int(rng.integers(1, 2 * DAYS + 1)) if fits == "arrived" else 0
        orders[0] = dataclasses.replace(orders[0], state=fits, days=days)
    wrong = orders[1] if rng.random() < 0.25 else None
    in_order = tuple(sorted(orders, key=lambda order: order.number))
    return Case(act, orders[0], wrong, bool(rng.random() < 0.25), in_order)


def named(chosen: Case) -> str:
    """What the customer answers when asked for the order."""
    if chosen.wrong is None:
        return f"U: order {chosen.order.number}."
    return f"U: order {chosen.wrong.number}. no, {chosen.order.number}."


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out cases, all different from each other."""
    problems = []
    for number in range(num_train + num_eval):
        wish = {"refund": "return", "cancel": "cancel"}[case(number, seed).act]
        # As many digits for each: held-out cases have the least numbers.
        prompt = f"{RULES} U{number:05}: please {wish} my order."
        columns = {"number": number, "seed_of_cases": seed}
        problems.append(Problem(prompt, columns, f"task support_desk, problem {number + 1}"))
    return problems[num_eval:], problems[:num_eval]


def worked_solution(problem: Problem, rng: np.random.Generator) -> list[Piece]:
    """The clerk's side of a case, as a more or less careless clerk does it."""
    chosen = case(problem.columns["number"], problem.columns["seed_of_cases"])
    drawn = lambda share: rng.random() < share  # noqa: E731
    theirs = lambda text: Piece(text, is_policy=False)  # noqa: E731
    order = chosen.order
    pieces = [Piece(f"{ASK}<eos>"), theirs(named(chosen))]
    if chosen.wrong is not None and drawn(CARELESS):
        order = chosen.wrong
    pieces += [Piece(f"{_FIND[0]}{order.number}{_FIND[1]}<eos>"), theirs(order.told)]
    if order.allows(chosen.act) == drawn(MISTAKEN):
        return [*pieces, Piece(refusal(order.item))]
    if not drawn(UNASKED):
        pieces.append(Piece(f"{question(chosen.act, order.item)}<eos>"))
        if order is not chosen.order:
            return [*pieces, theirs("U: no."), Piece(FINE)]
        if chosen.changes_mind:
            pieces.append(theirs("U: no, keep it."))
            if not drawn(CARELESS):
                return [*pieces, Piece(FINE)]
        else:
            pieces.append(theirs("U: yes."))
    before, after = _ACT[chosen.act]
    return [*pieces, Piece(f"{before}{order.number}{after}<eos>"), theirs("T: ok."), Piece(DONE)]


def question(act: str, item: str) -> str:
    """What the clerk asks to have an act confirmed."""
    return f" {'return' if act == 'refund' else 'cancel'} the {item}?"


def refusal(item: str) -> str:
    """What the clerk says of a wish that the rules forbid."""
    return f" sorry, too late for the {item}."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and digit, and one for each part of a call around its number."""
    words = (
        "returns within days cancel only if packed confirm first please return my order which "
        "sorry too late for done fine the no keep it yes ok shipped arrived ago what"
    ).split()
    marks = [*_FIND, *_ACT["refund"], *_ACT["cancel"]]
    return small_tokenizer.make("PUT0123456789:.,?#", [*words, *ITEMS], list(dict.fromkeys(marks)))
