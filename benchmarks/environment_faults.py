"""Environments that fail beside others that must not notice, and tools that take their time.

    python benchmarks/environment_faults.py [--environments 64] [--seconds 1]
        [--soak MINUTES] [--pause SECONDS]

Three turns of many environments, an eighth of which hang, cannot be interrupted, crash, flood their
output, fork or eat memory in the second one. For each fault the table has the time until its answer
came, and what it was; then whether the others' answers are those of a run without faults, and
whether a process is left. After that a round in which each environment's tool takes a second. With
--soak it all goes on, with a pause between two rounds, and the memory and open files of this
process are compared between an early round and the last. No device is used. Linux alone.

The status is 1 where something is not as it must be. On a machine that is busy with other things, a
call of the others may not get a processor within its time limit, and is answered as one that took
too long. Such rows are counted by themselves, and what they leave open is the status 2.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from grpo_jax.environments import contract
from grpo_jax.environments.live import Limits, Live

MEMORY_BYTES = 256 << 20
GRACE_S = 2.0  # beyond the time limit, for a step to end


class Faulty:
    """Counts, and does what its tool is told."""

    def reset(self, **row) -> None:
        """Begins an episode."""
        self.total = 0

    def do(self, what: str, number: int) -> str:
        """Does something.

        Args:
            what: "count" or a fault.
            number: Is added.
        """
        self.total += number
        getattr(self, f"_{what}", lambda: None)()
        return f"{self.total}"

    def _slow(self):
        time.sleep(1.0)

    def _hang(self):
        time.sleep(10_000)

    def _hang_for_good(self):
        while True:
            try:
                time.sleep(10_000)
            except BaseException:
                pass

    def _crash(self):
        os.abort()

    def _flood(self):
        for _ in range(2000):
            print("x" * 10_000)
        os.write(1, b"x" * 10_000_000)
        subprocess.run(["yes"], timeout=0.2, check=False)

    def _fork(self):
        for _ in range(4):
            if not os.fork():
                os.setsid()
                if not os.fork():
                    time.sleep(10_000)
                os._exit(0)
        time.sleep(10_000)

    def _bomb(self):
        for _ in range(9):  # 512 processes, if nobody ends them
            os.fork()
        time.sleep(10_000)

    def _eat(self):
        held = [bytearray(b"1" * (16 << 20)) for _ in range(10_000)]
        assert held

    def _eat_in_others(self):
        code = "x = [bytearray(b'1' * (1 << 20)) for _ in range(200)]; input()"
        for _ in range(4):
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        time.sleep(10_000)

    def get_reward(self) -> float:
        """The sum."""
        return float(self.total)


FAULTS = ["hang", "crash", "flood", "fork", "eat", "hang_for_good", "eat_in_others", "bomb"]


def turn(what: str, number: int) -> SimpleNamespace:
    call = SimpleNamespace(name="do", arguments={"what": what, "number": number})
    return SimpleNamespace(content="", calls=(call,))


def gather(live: Live, num: int, limit_s: float) -> dict[int, tuple[float, object]]:
    """The answers of all rows by row, with the time that each took."""
    began, found = time.monotonic(), {}
    while len(found) < num and time.monotonic() - began < limit_s:
        for answer in live.answers(0.2):
            found[answer.row] = (time.monotonic() - began, answer)
    return found


def episodes(live: Live, num: int, faults: dict[int, str]) -> tuple[dict, float]:
    """What all rows were answered in three turns and at their end, and the slowest turn's time."""
    said: dict[int, list] = {row: [] for row in range(num)}
    slowest, ended = 0.0, set()
    for row in range(num):
        live.reset(row, {}, row, row)
    for row, (_, answer) in gather(live, num, 60.0).items():
        said[row].append(answer)
        if answer.outcome:  # it could not begin
            ended.add(row)
    for number in range(3):
        for row in set(said) - ended:
            what = faults.get(row, "count") if number == 1 else "count"
            live.act(row, turn(what, row + number), [])
        for row, (seconds, answer) in gather(live, num - len(ended), 60.0).items():
            slowest = max(slowest, seconds)
            said[row].append(answer)
            if answer.outcome:
                ended.add(row)
                said[row].append(seconds)
            elif row in faults and number == 1:
                said[row].append(seconds)
    for row in set(said) - ended:
        live.finish(row, [], {}, [])
    for row, (_, answer) in gather(live, num - len(ended), 60.0).items():
        said[row].append(answer)
    return said, slowest


def is_late(answer) -> bool:
    """Whether a call, a reset or a reward hit its time limit."""
    return "timeout" in answer.failures or "took longer than" in answer.message


def compared(said: list, alone: list) -> str:
    """How a row's answers are beside those of a run without faults: "same", "late" or "wrong".

    "late": they are alike until one of them hit its time limit, in either run.
    """
    mine, theirs = ([a for a in row if not isinstance(a, float)] for row in (said, alone))
    for a, b in zip(mine, theirs):
        if is_late(a) or is_late(b):
            return "late"
        if (a.messages, a.reward, a.outcome) != (b.messages, b.reward, b.outcome):
            return "wrong"
    return "same" if len(mine) == len(theirs) else "wrong"


def of_others(said: dict, alone: dict, faults: dict) -> collections.Counter:
    """How many rows without a fault are "same", "late" and "wrong"."""
    return collections.Counter(compared(said[r], alone[r]) for r in said if r not in faults)


def told(counts: collections.Counter, seconds: float) -> str:
    return (
        f"{counts['same']} are those of a run without faults, {counts['late']} until a call hit "
        f"its limit of {seconds:g} s, {counts['wrong']} are not"
    )


def processes_below(pid: int) -> set[int]:
    from grpo_jax.rewards import keeper

    return set(keeper.below(pid))


def faults_table(live: Live, num: int, seconds: float, alone: dict) -> int:
    """Prints the table of the faults; the status."""
    rows = range(3, num, 8)
    faults = {row: FAULTS[i % len(FAULTS)] for i, row in enumerate(rows)}
    said, slowest = episodes(live, num, faults)
    print(f"{num} environments, {len(faults)} of them with a fault; limit of a call {seconds:g} s")
    print(f"{'fault':16}{'answer after':>14}  outcome        what came of the call")
    for row, fault in faults.items():
        after = next(a for a in said[row] if isinstance(a, float))
        answer = said[row][2]
        text = answer.messages[0]["content"] if answer.messages else answer.message
        outcome = answer.outcome or f"goes on, {', '.join(answer.failures) or 'no failure'}"
        print(f"{fault:16}{after:12.2f} s  {outcome:22} {text[:60]}")
    counts = of_others(said, alone, faults)
    print(f"the slowest turn took {slowest:.2f} s; at most {seconds + GRACE_S:g} s are allowed")
    print(f"answers of the others: {told(counts, seconds)}")
    return status_of(counts, slowest <= seconds + GRACE_S)


def status_of(counts: collections.Counter, in_time: bool = True) -> int:
    """0: all is as it must be; 1: not; 2: calls without a fault hit their limit, so who knows."""
    if counts["wrong"] or (not in_time and not counts["late"]):
        return 1
    return 2 if counts["late"] else 0


def slow_round(live: Live, num: int) -> bool:
    for row in range(num):
        live.reset(row, {}, row, row)
    gather(live, num, 60.0)
    for row in range(num):
        live.act(row, turn("slow", 1), [])
    found = gather(live, num, 60.0)
    took = max(seconds for seconds, _ in found.values())
    print(f"a round of {num} tools of 1 s: {took:.2f} s; one after the other {num} s")
    for row in range(num):
        live.drop(row)
    return took <= 1.5


def held(pid: int = 0) -> tuple[int, int]:
    """Resident KiB and open files of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]), len(os.listdir("/proc/self/fd"))


def soak(live: Live, asked: argparse.Namespace, faults: dict[int, str], alone: dict) -> int:
    """Repeats the round with faults; the status."""
    num, minutes = asked.environments, asked.soak
    begin, rounds, early, counts = time.monotonic(), 0, None, collections.Counter()
    while time.monotonic() - begin < 60 * minutes:
        counts += of_others(episodes(live, num, faults)[0], alone, faults)
        rounds += 1
        time.sleep(asked.pause)
        if early is None and rounds >= 5:
            early = (*held(), len(processes_below(os.getpid())))
    late = (*held(), len(processes_below(os.getpid())))
    print(
        f"{rounds} rounds in {minutes:g} min: resident KiB, open files, processes: {early}, {late}"
    )
    print(f"answers of the others: {told(counts, asked.seconds)}")
    if early is None or late[0] > 1.05 * early[0] or late[1:] > (early[1], early[2] + 4):
        return 1
    return status_of(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--environments", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="limit of a call")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes that it goes on")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two rounds")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    found = contract.read(["environment_faults:Faulty"], [], memory_bytes=MEMORY_BYTES)
    own = os.getpid()
    with Live(found, Limits(asked.seconds, 60.0), num=asked.environments) as live:
        alone, _ = episodes(live, asked.environments, {})
        statuses = [faults_table(live, asked.environments, asked.seconds, alone)]
        if asked.soak:
            rows = range(3, asked.environments, 8)
            faults = {row: FAULTS[i % (len(FAULTS) - 1)] for i, row in enumerate(rows)}
            statuses.append(soak(live, asked, faults, alone))
    limits = Limits(10.0, 60.0)
    again = contract.read(["environment_faults:Faulty"], [], memory_bytes=MEMORY_BYTES)
    with Live(again, limits, num=asked.environments) as live:
        if not slow_round(live, asked.environments):
            statuses.append(2 if 2 in statuses else 1)
    time.sleep(0.2)
    left = processes_below(own)
    print(f"processes left: {len(left)}")
    if 2 in statuses:
        cpus, load = os.cpu_count(), os.getloadavg()[0]
        print(f"The machine was too busy to tell all: a load of {load:.0f} on {cpus} processors.")
    sys.exit(1 if left or 1 in statuses else max(statuses))


if __name__ == "__main__":
    main()
