"""The shapes of a plan are those of a step, with demonstrations and with a teacher."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from valid_config import valid

from grpo_jax.environments.demonstrations import AsDrawn, Hints, OneMore
from grpo_jax.planning.rows import Rows
from grpo_jax.setup import learner, teacher

P, G, C = 4, 2, 6


@pytest.mark.parametrize("name", ["chord", "uft", "teacher"])
def test_the_experience_of_a_plan_is_that_of_a_step(name):
    by_name = {
        "teacher": {"distill__teacher": "t", "distill__loss": "reward"},
    }.get(name, {"hybrid__method": name})
    config = valid(batch__prompts=P, batch__group=G, rollout__max_tokens=C, **by_name)
    mesh, drawn = tiny.one_device(), tiny.rollouts(P, G, C)
    prompts = [[2]] * P
    given = {
        "chord": OneMore(prompts, [[3, 1]] * P),
        "uft": Hints([[2, 3]] * P, prompts, [[3]] * P, C),
        "teacher": AsDrawn(prompts),
    }[name]
    rollouts = given.joined(drawn)
    shape = tiny.MODEL if name == "teacher" else None
    made = learner.make_learner(config, tiny.MODEL, mesh, teacher=shape)
    prepare, _ = teacher.given_to(made.prepare, made.update, tiny.params(7))
    log_probs = prepare.log_probs(tiny.params(), None, rollouts)
    reward_PG = np.zeros(rollouts.length_PG.shape, np.float32)
    experience = prepare(log_probs, reward_PG)
    for controller in made.controllers:
        experience = experience.replace(**{f"{controller.coefficient}_PG": reward_PG})
    width = rollouts.prompt_PQ.shape[1]
    planned = Rows(mesh).experience(config, made, rollouts.length_PG, width, has_reference=False)
    told = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert told(planned) == told(experience)
