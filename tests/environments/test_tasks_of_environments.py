"""The tasks with environments: a perfect player wins, the demonstrations mostly lose, controls
cannot be won, and a small tokenizer reads all of it."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.data import tasks
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import Piece
from grpo_jax.rewards.exact import exact_answer

CLASSES = {
    "calculator": (None, "calculator:NoisyCalculator"),
    "lookup": ("lookup:Search", "lookup:FalseSearch"),
    "lookup_twice": ("lookup:Search", "lookup:FalseSearch"),
    "guess_word": ("guess_word:GuessWord", "guess_word:DeafGuessWord"),
    "support_desk": ("support_desk:SupportDesk", "support_desk:DeafSupportDesk"),
}
NAMES = list(CLASSES)
_CALL = re.compile(r'<tool_call>\{"name": "(\w+)", "arguments": (\{.*\})\}</tool_call>')


def environment(name: str, control: bool = False):
    entry = CLASSES[name][control]
    if entry is None:
        module = importlib.import_module("grpo_jax.environments.tasks.calculator")
        return SimpleNamespace(multiply=module.multiply, reset=lambda **row: None)
    module, _, cls = entry.partition(":")
    return getattr(importlib.import_module(f"grpo_jax.environments.tasks.{module}"), cls)()


def play(problem, pieces: list[Piece], env) -> tuple[float, list[tuple[str, str]]]:
    """The reward of a demonstration's turns, and what the demonstration and the environment say."""
    env.reset(**problem.columns, prompt=problem.prompt)
    said, messages = [], []
    turns = [p.text.removesuffix("<eos>") for p in pieces if p.is_policy]
    theirs = iter([p.text for p in pieces if not p.is_policy])
    for turn in turns:
        messages.append({"role": "assistant", "content": turn.strip()})
        call = _CALL.fullmatch(turn)
        if call:
            answer = str(getattr(env, call[1])(**eval(call[2])))
        else:
            answer = env.respond(messages) if hasattr(env, "respond") else None
        if answer is None:
            break
        said.append((next(theirs, ""), answer))
    if hasattr(env, "get_reward"):
        return env.get_reward(), said
    (reward,) = exact_answer([problem.prompt], [turns[-1]], [problem.columns["answer"]])
    return reward, said


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    module = tasks.load(request.param)
    train, held_out = module.generate(400, 100, 3)
    return SimpleNamespace(
        name=request.param, module=module, train=train, held_out=held_out,
        tokenizer=module.make_tokenizer(),
    )  # fmt: skip


def test_held_out_prompts_are_as_long_as_those_of_training(task):
    of = lambda part: {len(task.tokenizer(p.prompt).input_ids) for p in part}  # noqa: E731
    assert of(task.held_out) <= of(task.train)


def test_no_held_out_problem_is_trained_on(task):
    train, held_out = ([p.prompt for p in part] for part in (task.train, task.held_out))
    assert len(train) == 400 and len(held_out) == 100 and not set(train) & set(held_out)
    corpora = [{p.columns.get("corpus") for p in part} for part in (task.train, task.held_out)]
    assert not corpora[0] & corpora[1] - {None}
    again = task.module.generate(400, 100, 3)
    assert again == (task.train, task.held_out) != task.module.generate(400, 100, 4)
    assert len({p.where for p in [*task.train, *task.held_out]}) == 500


def test_demonstrations_say_what_the_environment_says(task):
    """And mostly lose: reinforcement learning has something to find."""
    env, rng = environment(task.name), stream(0, "solutions")
    rewards = []
    for problem in task.train[:200]:
        reward, said = play(problem, task.module.worked_solution(problem, rng), env)
        rewards.append(reward)
        for written, answered in said:
            assert written == answered
    low, high = {"calculator": (0.15, 0.35), "guess_word": (0.1, 0.4)}.get(task.name, (0.25, 0.6))
    assert low < np.mean(rewards) < high


def careful(task, monkeypatch):
    for name in ("GUESS", "SLIP", "ONCE", "CARELESS", "MISTAKEN", "UNASKED"):
        for module in (task.module, tasks.load("lookup")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 0.0)


def halving(problem) -> list[Piece]:
    """A perfect game of guess_word."""
    from grpo_jax.data.tasks.guess_word import WORDS, told

    low, past, hidden, pieces = 0, len(WORDS), WORDS.index(problem.columns["word"]), []
    while True:
        guess = (low + past) // 2
        pieces.append(Piece(f" {WORDS[guess]}"))
        if guess == hidden:
            return pieces
        pieces.append(Piece(f" {told(guess, hidden)}", is_policy=False))
        low, past = (low, guess) if hidden < guess else (guess + 1, past)


def perfect(task, problem):
    if task.name == "guess_word":
        return halving(problem)
    return task.module.worked_solution(problem, np.random.default_rng(0))


def test_a_careful_player_wins(task, monkeypatch):
    careful(task, monkeypatch)
    env = environment(task.name)
    for problem in task.train[:100]:
        assert play(problem, perfect(task, problem), env)[0] == 1.0, problem


def test_the_control_is_of_no_use(task, monkeypatch):
    """Whoever believes it does no better than a guess."""
    careful(task, monkeypatch)
    env = environment(task.name, control=True)
    wins = []
    for problem in task.train[:200]:
        env.reset(**problem.columns)
        if task.name == "guess_word":
            wins.append(deaf_game(env, problem))
        elif task.name == "support_desk":
            case = task.module.case(*problem.columns.values())
            told = [env.find_order(number) for number in range(100, 1000, 9)]
            wins.append(any(case.order.item in one for one in told))
        else:
            pieces = task.module.worked_solution(problem, np.random.default_rng(0))
            calls = [_CALL.fullmatch(p.text.removesuffix("<eos>")) for p in pieces if p.is_policy]
            answers = [str(getattr(env, c[1])(**eval(c[2]))) for c in calls if c]
            wins.append(answers[-1].removesuffix(".").split()[-1] == problem.columns["answer"])
    assert np.mean(wins) < 0.3


def deaf_game(env, problem) -> float:
    from grpo_jax.data.tasks.guess_word import WORDS

    low, past = 0, len(WORDS)
    while low < past:
        guess = (low + past) // 2
        answer = env.respond([{"content": f" {WORDS[guess]}"}])
        if answer is None:
            break
        low, past = (low, guess) if answer == " earlier" else (guess + 1, past)
    return env.get_reward()


def test_the_tokenizer_reads_all_of_it(task, tmp_path):
    """In few tokens, the same after it was saved; and the environment's texts hold no mark."""
    from transformers import AutoTokenizer

    task.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    rng = stream(0, "solutions")
    marks = {i for i, t in task.tokenizer.added_tokens_decoder.items() if t.content != "<eos>"}
    longest = 0
    for problem in task.train[:200]:
        pieces = task.module.worked_solution(problem, rng)
        total = 0
        for text, is_policy in [(problem.prompt, False), *pieces]:
            ids = task.tokenizer(text)["input_ids"]
            assert task.tokenizer.pad_token_id not in ids, text
            assert saved(text)["input_ids"] == ids and saved.decode(ids) == text
            assert is_policy or not marks & set(ids)
            total += len(ids)
        longest = max(longest, total)
    assert longest <= 90 and len(task.tokenizer) < 1500


def test_a_clerk_who_does_not_ask_for_a_yes_has_lost():
    """Though the database is as it must be; so has one who acts after a no, or does nothing."""
    data, env = tasks.load("support_desk"), environment("support_desk")
    numbers = range(200)
    cases = {n: c for n in numbers if (c := data.case(n, 0)).order.allows(c.act) and not c.wrong}
    number, case = next((n, c) for n, c in cases.items() if not c.changes_mind)
    say = lambda text: env.respond([{"content": text}])  # noqa: E731
    asks = data.question(case.act, case.order.item)
    for is_asked, reward in ((True, 1.0), (False, 0.0)):
        env.reset(number, 0)
        assert say(data.ASK) == f"U: order {case.order.number}."
        assert not is_asked or say(asks) == "U: yes."
        assert getattr(env, case.act)(case.order.number) == "T: ok."
        assert say(data.DONE) is None and env.get_reward() == reward
    number, case = next((n, c) for n, c in cases.items() if c.changes_mind)
    asks = data.question(case.act, case.order.item)
    for is_asked, acts, reward in ((True, False, 1.0), (True, True, 0.0), (False, False, 0.0)):
        env.reset(number, 0)
        assert not is_asked or say(asks) == "U: no, keep it."
        assert not acts or getattr(env, case.act)(case.order.number) == "T: ok."
        assert say(data.FINE) is None and env.get_reward() == reward


def test_no_answer_is_right_for_most_orders_that_have_arrived():
    """A policy would settle on one that is, though half of them have arrived too long ago."""
    cases = [tasks.load("support_desk").case(number, 0) for number in range(2000)]
    orders = [c.order for c in cases if c.act == "refund" and c.order.state == "arrived"]
    share = np.mean([order.allows("refund") for order in orders])
    assert 600 < len(orders) and 0.45 < share < 0.55


def test_a_turn_is_worth_what_it_finds_out():
    env = environment("guess_word")
    env.reset(word="jote")
    worth = []
    for guess in ("kimo", "deki", "jabu", "jote"):
        env.turn_reward = 0.0
        env.respond([{"content": f" {guess}"}])
        worth.append(env.turn_reward)
    assert min(worth) > 0 and sum(worth) == pytest.approx(1.0) and env.get_reward() == 1.0


def test_a_corpus_says_nothing_of_another():
    from grpo_jax.data import corpora

    one, other = corpora.make("0-1"), corpora.make("0-2")
    assert not set(one.documents) & set(other.documents)
    assert corpora.make("0-1") == one != corpora.make("1-1")


def test_what_a_false_corpus_tells_is_never_right():
    from grpo_jax.data import corpora

    for number in range(20):
        true, false = (corpora.make(f"0-{number}", is_false=is_false) for is_false in (False, True))
        assert false.people == true.people
        town_of = dict(d[2:-1].split(" is in ") for d in false.documents if " is in " in d)
        for person, document in zip(false.people, false.documents):
            name, born, firm = re.fullmatch(
                r"- (.+) was born in (\w+) and works at (\w+)\.", document
            ).groups()
            assert name == person.name
            assert born != person.born and firm != person.firm and town_of[firm] != person.town


def test_conversations_have_the_tokens_of_the_demonstrations(task):
    """What is sampled and answered is what was imitated; every call of theirs can be read."""
    from grpo_jax.environments.plain_dialogue import PlainDialogue

    tokenizer = task.tokenizer
    stop = tokenizer.eos_token_id
    schemas = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("multiply", "search", "find_order", "refund", "cancel")
    ]
    dialogue = PlainDialogue(tokenizer, schemas, stop_ids=[stop], observation_tokens=16)
    rng, calls = stream(0, "solutions"), 0
    for problem in task.train[:40]:
        pieces = task.module.worked_solution(problem, rng)
        for piece, after in zip(pieces, [*pieces[1:], None]):
            if not piece.is_policy:
                continue
            ids = tokenizer(piece.text)["input_ids"]
            turn = dialogue.parse(ids if after else [*ids, stop])
            if "<tool_call>" in piece.text:
                calls += 1
                (call,) = turn.valid_calls
                assert str(next(iter(call.arguments.values()))).strip() in piece.text
            else:
                assert not turn.calls
                assert turn.content.strip() == piece.text.removesuffix("<eos>").strip()
            if after:
                messages = [{"role": "tool", "content": after.text}]
                assert dialogue.follow(ids, True, messages) == tokenizer(after.text)["input_ids"]
    assert calls or task.name == "guess_word"


@pytest.mark.parametrize("name", NAMES)
def test_its_config_is_accepted(name, tmp_path):
    from grpo_jax.config.arguments import load_config
    from grpo_jax.trainers import grpo_run

    few = ["--config.data.num_train=64", "--config.data.num_eval=16"]
    grpo_run.refuse_early(load_config(name, few), tmp_path / "run")
