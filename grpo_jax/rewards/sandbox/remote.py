"""A module that lives in another process: so tests call a program that cannot touch them.

Both sides send requests as lines of JSON and answer each other's. Plain values are copied, lists
and dicts that a call has changed are copied back, and all other objects stay where they are: the
test side holds a `Proxy`. What the program's side returns never compares equal to a plain value by
an `==` of its own, and can call only functions that a test has given it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.rewards.sandbox import plain

_MAX_PRINTED = 1 << 20
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_COMPARED = ("lt", "le", "gt", "ge")


class Proxy:
    """An object of the program, seen from its tests."""

    def __init__(self, peer: Peer, number: int, name: str):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "__name__", name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask(self._number, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask(self._number, "set", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask(self._number, "call", *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Proxy):  # the program's own == would decide
            return False
        return self is other or bool(self._peer.ask(self._number, "eq", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return self._peer.ask(self._number, "hash")

    def __iter__(self) -> Iterator:
        held = self._peer.ask(self._number, "iter")
        while True:
            item = self._peer.ask(held._number, "next")
            if not item:
                return
            yield item[0]

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Proxy) and self._peer.ask(self._number, "is", instance)

    def __exit__(self, *error: object) -> None:
        self._peer.ask(self._number, "exit")


def _asking(do: str) -> Callable:
    return lambda self, *args: self._peer.ask(self._number, do, *args)


def _asking_about_its_own(do: str) -> Callable:
    """As `_asking`, but not with a plain value: in `abs(f(2) - 4) < 1e-6`, - would tell the 4."""

    def operation(self: Proxy, other: Any) -> Any:
        is_its_own = isinstance(other, Proxy)
        return self._peer.ask(self._number, do, other) if is_its_own else NotImplemented

    return operation


for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), *_COMPARED):
    _made = _asking if _name in ("mul", "rmul") else _asking_about_its_own
    setattr(Proxy, f"__{_name}__", _made(_name))
for _name in ("len", "contains", "getitem", "setitem", "delitem", "str", "repr", "bool", "enter"):
    setattr(Proxy, f"__{_name}__", _asking(_name))
for _name in ("int", "float", "neg", "abs", "index", "next"):
    setattr(Proxy, f"__{_name}__", _asking(_name))


def _next(iterator: Iterator) -> tuple:
    return next(((item,) for item in iterator), ())


_DO: dict[str, Callable] = {
    "call": lambda what, *args, **kwargs: what(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "is": lambda kind, instance: isinstance(instance, kind),
    "iter": iter,
    "next": _next,
    "bool": bool,
    "str": str,
    "repr": repr,
    "hash": hash,
    "len": len,
    "int": int,
    "float": float,
    "enter": lambda what: what.__enter__(),
    "exit": lambda what: what.__exit__(None, None, None),
    **{n: getattr(operator, n) for n in ("eq", "contains", "getitem", "setitem", "delitem")},
    **{n: getattr(operator, n) for n in ("neg", "abs", "index", *_COMPARED)},
    **{n: getattr(operator, f"{n}_" if n in ("and", "or") else n) for n in _BINARY},
}
_DO |= {
    f"r{n}": lambda what, other, do=_DO[n]: do(other, what)
    for n in _BINARY  # a test's value stands at the left
}


class Peer:
    """One end of the connection between a program and its tests."""

    def __init__(self, reader: Iterator[bytes], send: Callable[[Any], None], is_test: bool):
        self._reader, self._send, self._is_test = reader, send, is_test
        self._objects: list[Any] = []  # of this side, by number
        self._numbers: dict[int, int] = {}  # by id
        self._proxies: dict[int, Any] = {}

    def ask(self, number: int | str, do: str, *args: Any, **kwargs: Any) -> Any:
        """What an operation on an object of the other side gives; raises the error that it raises.

        Lists, dicts and sets among the arguments are changed as the other side changed them.
        """
        self._send({"on": number, "do": do, "args": self._out(list(args)),
                    "kwargs": self._out(kwargs)})  # fmt: skip
        answer = self.serve_until_answer()
        print(answer.get("printed", ""), end="")
        for i, changed in answer.get("changed", ()):
            _become(args[i], self._in(changed))
        if "error" in answer:
            raise self._error(*answer["error"])
        return self._in(answer["value"])

    def serve_until_answer(self) -> dict:
        """Carries out the other side's requests until its answer comes."""
        for line in self._reader:
            message = json.loads(line)
            if "on" not in message:
                return message
            self._send(self._done(message))
        raise RuntimeError("the program has ended")

    # --- Requests of the other side ---

    def _done(self, message: dict) -> dict:
        printed = io.StringIO()
        try:
            args, kwargs = self._in(message["args"]), self._in(message["kwargs"])
            before = [json.dumps(a) if isinstance(a, (list, dict)) else "" for a in message["args"]]
            what = self._objects[message["on"]]
            if self._is_test and message["do"] != "call":
                raise PermissionError("only functions of a test can be called")
            with contextlib.redirect_stdout(printed if not self._is_test else None):
                value = self._out(_DO[message["do"]](what, *args, **kwargs))
            answer = {"value": value}
            after = [self._changed(a, was) for a, was in zip(args, before)]
            answer["changed"] = [[i, x] for i, x in enumerate(after) if x is not None]
        except BaseException as error:
            answer = {"error": self._told(error)}
        if text := printed.getvalue():
            answer["printed"] = text[:_MAX_PRINTED]
        return answer

    def _changed(self, value: Any, before: str) -> Any:
        """A list, dict or set as it is now; None if it is as it was, or none of these."""
        if not isinstance(value, (list, dict, set, bytearray)):
            return None
        now = self._out(value)
        return None if json.dumps(now) == before else now

    def _told(self, error: BaseException) -> list:
        kinds = [k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins"]
        own = type(error) if type(error).__module__ != "builtins" else None
        try:
            args = self._out(list(error.args))
        except Exception:
            args = [str(error)]
        return [None if own is None else self._out(own), kinds, args]

    def _error(self, own: Any, kinds: list[str], args: Any) -> Exception:
        kind = None if own is None else self._in(own)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = _builtin_error(kinds)
        try:
            return kind(*self._in(args))
        except Exception:
            return RuntimeError(f"{kind.__name__} in the program")

    # --- Values ---

    def _out(self, value: Any) -> Any:
        return plain.packed(value, self._held)

    def _held(self, value: Any) -> dict:
        if isinstance(value, Proxy):
            return {"mine": value._number}
        if isinstance(value, type) and hasattr(value, "_number_there"):
            return {"mine": value._number_there}
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        kinds = []
        if isinstance(value, type) and issubclass(value, BaseException):
            kinds = [k.__name__ for k in value.__mro__ if k.__module__ == "builtins"]
        name = getattr(value, "__name__", "")
        return {"o": [self._numbers[id(value)], name if isinstance(name, str) else "", kinds]}

    def _in(self, value: Any) -> Any:
        return plain.unpacked(value, self._met)

    def _met(self, kind: str, held: Any) -> Any:
        if kind == "mine":
            return self._objects[held]
        number, name, kinds = held
        if number not in self._proxies:
            if kinds and self._is_test:
                made = type(name, (_builtin_error(kinds),), {"_number_there": number})
            elif self._is_test:
                made = Proxy(self, number, name)
            else:
                made = _function_of_a_test(self, number)
            self._proxies[number] = made
        return self._proxies[number]


def _function_of_a_test(peer: Peer, number: int) -> Callable:
    return lambda *args, **kwargs: peer.ask(number, "call", *args, **kwargs)


def _builtin_error(kinds: list[str]) -> type[Exception]:
    """The first of these names that is an Exception: never one that ends the tests."""
    for name in kinds:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
    return RuntimeError


def _become(value: Any, now: Any) -> None:
    """Changes a list, dict, set or bytearray of a test in place."""
    if isinstance(value, (list, bytearray)) and type(now) in (list, bytes):
        value[:] = now
    elif isinstance(value, (dict, set)) and type(now) in (dict, set):
        value.clear()
        value.update(now)


def serve(
    load: Callable[[], dict[str, Any]],
    reader: Iterator[bytes],
    send: Callable[[Any], None],
    told: Callable[[BaseException], str],
) -> int:
    """The program's side: loads the module, tells its names, and carries out requests."""
    peer = Peer(reader, send, is_test=False)
    try:
        names = load()
    except BaseException as error:
        send({"failed": told(error)})
        return 0
    public = {}
    for name, value in names.items():
        if not name.startswith("__") and not isinstance(value, types.ModuleType):
            with contextlib.suppress(Exception):
                public[name] = peer._out(value)
    send({"names": public})
    with contextlib.suppress(RuntimeError):  # the tests have ended
        peer.serve_until_answer()
    return 0


def module(reader: Iterator[bytes], send: Callable[[Any], None]) -> tuple[types.ModuleType, str]:
    """The tests' side: the program as a module, and the error of its loading or ""."""
    peer = Peer(reader, send, is_test=True)
    made = types.ModuleType("solution")
    first = peer.serve_until_answer()
    for name, value in first.get("names", {}).items():
        setattr(made, name, peer._in(value))
    return made, first.get("failed", "")
