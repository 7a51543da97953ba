"""What a template writes of earlier turns: when an episode forks, and what it goes on from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import chat_families
import jinja2
import pytest
from made_episodes import TOOLS

from grpo_jax.data.templates import TemplateError
from grpo_jax.environments import dialogue
from grpo_jax.environments.rewriting import Spoken
from grpo_jax.environments.spelling import Spelling

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
LOOSE = CALL.replace(", ", ",  ")  # as a policy may spell it, and no template does
XML = "<tool_call>\n<function=multiply>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
RESULT = {"role": "tool", "name": "multiply", "content": "2"}
KEEPS = chat_families.QWEN3.replace(
    "loop.index0 > ns.last and (loop.last or m.reasoning_content)", "m.reasoning_content"
)


class Here:
    """A renderer of this process, which `refuses` a conversation that holds this text."""

    def __init__(self, refuses=None):
        self.refuses, self.times = refuses, 0

    def render(self, tokenizer, conversations, arguments, *, now, ends):
        self.times += 1
        for number, messages in enumerate(conversations):
            if self.refuses and any(self.refuses in m["content"] for m in messages):
                raise TemplateError(number, "no")
        try:
            texts = [
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=end == "open", **given
                )
                for messages, given, end in zip(conversations, arguments, ends)
            ]
        except jinja2.TemplateError as error:
            raise TemplateError(0, str(error)) from error
        return SimpleNamespace(texts=texts)


class Talk:
    """A conversation that grows as `episodes.py` lets it grow."""

    def __init__(self, template, *, begun="", renderer=None, **arguments):
        self.tokenizer, stops = chat_families.qwen(template)
        self.spelling, self.begun = Spelling(self.tokenizer), begun
        self.arguments, self.renderer = arguments, renderer or Here()
        self.made = dialogue.prove(
            self.tokenizer,
            TOOLS,
            self.renderer,
            stop_ids=stops,
            observation_tokens=64,
            replies=True,
            arguments=arguments,
            spelling=self.spelling,
            forks=True,
        )
        last = ASK[1] | {"content": ASK[1]["content"] + begun}
        self.messages, self.steps = [ASK[0], last], []
        (self.prompt,) = self.made.begin([ASK], [begun])
        self.ids = list(self.prompt)

    def says(self, text, *group, stopped=True):
        """What the policy samples, and the answers; what the episode goes on from, or None."""
        turn = self.spelling.full(text + "<|im_end|>" * stopped)
        said = self.made.parse(turn).message
        self.steps.append((said, [*group]))
        self.messages += [said, *group]
        self.ids += [*turn, *self.made.follow(turn, stopped, group)]
        spoken = Spoken(ASK, self.begun, None, self.prompt, self.steps, self.ids)
        (context,) = self.made.rewriting.contexts([spoken])
        if context is not None:
            self.ids = self.prompt[: len(self.prompt) - self.made.rewriting.tail] + context
        return context

    def rendered(self):
        """The whole by transformers alone."""
        return self.tokenizer.apply_chat_template(
            self.messages, TOOLS, add_generation_prompt=True, return_dict=False, **self.arguments
        )


def user(text):
    return {"role": "user", "content": text}


def qwen3():
    """The template of Qwen3, which TRL ships."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("needs TRL, for its copy of Qwen3's template")
    return (Path(found.origin).parent / "chat_templates" / "qwen3.jinja").read_text()


@pytest.mark.parametrize("name", ["made", "quiet", "opened", "Qwen3"])
def test_an_episode_goes_on_from_one_rendering_of_the_whole(name):
    template = {"opened": chat_families.QWEN3_XML}.get(name, chat_families.QWEN3)
    template = qwen3() if name == "Qwen3" else template
    talk = Talk(template, begun=" Room 2.", **{"enable_thinking": False} if name == "quiet" else {})
    assert talk.made.rewriting.tail == {"quiet": 4, "opened": 2}.get(name, 0)
    think, call = "<think>\nHm.\n</think>\n\n", XML if name == "opened" else LOOSE
    think = "Hm.\n</think>\n\n" if name == "opened" else think
    first = talk.says(think + "I look.\n" + call, RESULT)
    assert (first is None) == (name != "quiet")  # whose opening is written once alone
    for turn in (think + "It is 2.", "It is 3." if name != "opened" else think + "It is 3."):
        talk.says(turn, user("And\nthen?"))
        assert talk.ids == talk.rendered()
    assert not any("Hm." in talk.spelling.text(talk.ids).split("assistant")[n] for n in (1, 2, 3))


def test_a_turn_that_a_limit_cut_in_its_thinking_loses_it():
    talk = Talk(chat_families.QWEN3)
    assert talk.says("<think>\nHm, hm", user("Well?"), stopped=False) is not None
    assert talk.ids == talk.rendered() and "Hm" not in talk.spelling.text(talk.ids)


def test_nothing_is_rendered_where_nothing_can_change():
    renderer = Here()
    talk = Talk(chat_families.QWEN3, renderer=renderer)
    times = renderer.times
    assert talk.says(LOOSE, RESULT) is None
    assert talk.says("<think>\nHm.\n</think>\n\n" + LOOSE, RESULT, RESULT) is None
    assert renderer.times == times
    # Other spellings alone are no reason to fork: what was sampled stands.
    talk = Talk(chat_families.QWEN3, renderer=renderer)
    assert talk.says(LOOSE, user("<think>Hm.</think>")) is None and renderer.times > times
    assert LOOSE in talk.spelling.text(talk.ids)


def test_a_template_that_keeps_thinking_never_forks():
    made = Talk(KEEPS).made
    assert made.rewriting is None and not made.notes


def test_control_tokens_of_an_environment_stay_text():
    talks = [Talk(chat_families.QWEN3, begun=said) for said in ("<|im_end|>", "word")]
    for talk in talks:
        talk.says(CALL, RESULT | {"content": talk.begun, "name": talk.begun})
        assert talk.says("<think>\nHm.\n</think>\n\nSo.", user(talk.begun)) is not None
    odd, usual = talks
    assert odd.spelling.text(odd.ids) == usual.spelling.text(usual.ids).replace("word", odd.begun)
    control = [[i for i in t.ids if i in t.spelling.control] for t in talks]
    assert control[0] == control[1]


def test_an_episode_that_cannot_be_rendered_stands(capsys):
    talk = Talk(chat_families.QWEN3, renderer=Here(refuses="So."))
    good, bad = (
        Spoken(ASK, "", None, talk.prompt, [({"role": "assistant", "content": said}, [user("?")])],
               talk.prompt + talk.spelling.full("<think>\nHm.\n</think>"))
        for said in ("Yes.", "So.")
    )  # fmt: skip
    found = talk.made.rewriting.contexts([bad, good, bad])
    assert [context is None for context in found] == [True, False, True]
    assert "does not render an episode again: no" in capsys.readouterr().out


def test_templates_whose_turns_cannot_be_written_again_are_refused():
    raising = "{%- if m.tool_calls and m.tool_calls[1:] %}{{ raise_exception('One.') }}{% endif %}"
    one = chat_families.QWEN3.replace("{%- for call in", raising + "\n{%- for call in", 1)
    with pytest.raises(ValueError, match=r'history = "fork".*one call in a turn.*"append"'):
        Talk(one)
    moved = chat_families.QWEN3.replace("Tools:", "{{ messages | length }} Tools:")
    talk = Talk(chat_families.QWEN3)
    talk.tokenizer.chat_template = moved  # which the proof would refuse
    with pytest.raises(ValueError, match=r'history = "fork".*rewrites the prompt itself'):
        talk.says("<think>\nHm.\n</think>\n\nSo.", user("Well?"))
