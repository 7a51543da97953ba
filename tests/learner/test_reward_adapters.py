"""A reward model's adapters and head beside peft's: scores and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import transformers
from hf_model import CASES, save_random_model
from safetensors.numpy import load_file

from grpo_jax.algorithm.scalar_losses import BradleyTerryLoss
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import scalars
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import start
from grpo_jax.learner.update import make_update
from grpo_jax.models import lora, parameters
from grpo_jax.models.hf import export, peft, targets
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.targets import Spec
from grpo_jax.models.hf.weights import load_params
from grpo_jax.structs import Experience, ModelConfig, Sampling

PAIRS, RATE, CENTRE = 8, 0.25, 0.05
MARGIN = np.linspace(-0.2, 0.5, PAIRS, dtype=np.float32)


def pairs() -> list[list[list[int]]]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, 48, n).tolist()  # noqa: E731
    common = [draw(1 + p % 3) for p in range(PAIRS)]
    return [[c + draw(rng.integers(1, 6)), c + draw(rng.integers(1, 6))] for c in common]


def experience(shards: int) -> Experience:
    rollouts = scalars.as_rollouts(pairs(), None, shards)
    signal_PG = np.zeros(rollouts.length_PG.shape, np.float32)
    signal_PG[:PAIRS, 0] = MARGIN
    return Experience(rollouts, signal_PG, rollouts.chosen_PGC, None, None)


@dataclasses.dataclass
class Case:
    """A model with adapters, its weights on the host, and the same with peft."""

    model: ModelConfig
    frozen: dict
    trained: dict
    theirs: torch.nn.Module


@pytest.fixture(scope="module", params=["auto", "nf4"])
def case(request, tmp_path_factory, tokenizer) -> Case:
    """Theirs reads two folders: the base, as its codes stand for it, and our adapter and head."""
    peft_lib = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("case")
    save_random_model(folder / "lm", *CASES["llama"])
    base, mesh = read_config(folder / "lm"), tiny.one_device()
    spec = Spec(3, 6.0, ranks={"layers.1.self_attn.q_proj": 2})
    chosen = targets.lora_of(base, spec, base=request.param)
    model = dataclasses.replace(base, head="scalar", lora=chosen)
    draws = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: jnp.float32(draws.normal(0, 0.2, x.shape)), lora.trained_shapes(model)
    )
    params = load_params(folder / "lm", base, mesh)
    frozen = lora.frozen_as(model, {n: x for n, x in params.items() if n != "head"}, jnp.float32)
    how = {"source": folder / "lm", "dtype": "float32", "tokenizer": tokenizer}
    plain = lora.merged(frozen, jnp.float32) | {"head": params["head"]}
    export.save(folder / "base", plain, base, **how)
    peft.save(folder / "adapter", trained, model, base=str(folder / "base"))
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = read(folder / "base", num_labels=1)
    wrapped = peft_lib.PeftModel.from_pretrained(theirs, folder / "adapter", is_trainable=True)
    return Case(model, jax.device_get(frozen), jax.device_get(trained), wrapped)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def their_scores(case: Case) -> torch.Tensor:
    score = lambda ids: case.theirs(input_ids=torch.tensor([ids])).logits[0, 0]  # noqa: E731
    return torch.stack([torch.stack([score(ids) for ids in pair]) for pair in pairs()])


def placed(case: Case, mesh):
    axes = lora.frozen_axes(case.model)
    frozen = jax.device_put(case.frozen, sharding.tree_shardings(mesh, axes, case.frozen))
    axes = lora.trained_axes(case.model)
    return frozen, jax.device_put(case.trained, sharding.tree_shardings(mesh, axes, case.trained))


def their_gradients(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of the pairs, and its gradients by the names of PEFT's files."""
    case.theirs.zero_grad()
    chosen, rejected = their_scores(case).T
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(MARGIN))
    loss = (loss + CENTRE * (chosen + rejected) ** 2).mean()
    loss.backward()
    named = {n: p.grad for n, p in case.theirs.named_parameters() if p.requires_grad}
    plain = lambda name: name.replace(".modules_to_save", "").replace(".default", "")  # noqa: E731
    return loss.item(), {plain(name): grad.numpy() for name, grad in named.items()}


def test_loss_and_gradients_are_those_of_peft(case, tmp_path):
    """On one device, and on eight that divide everything; and the base keeps every bit."""
    in_codes = case.model.lora.base == "nf4"
    mesh = tiny.one_device() if in_codes else sharding.make_mesh(2, 2, 2)
    scorer, optimizer = Scorer(case.model, mesh, Sampling(), whole=True), optax.sgd(RATE)
    update = make_update(scorer, BradleyTerryLoss(CENTRE), optimizer, num_minibatches=1)
    frozen, trained = placed(case, mesh)
    given = transfer.shard_rows(mesh, experience(sharding.num_row_shards(mesh)))
    state, metrics = update(start(trained, case.model, mesh, optimizer), given, 0, frozen=frozen)
    slope = jax.tree.map(lambda a, b: (a - b) / RATE, case.trained, jax.device_get(state.params))
    peft.save(tmp_path, slope, case.model)
    got = load_file(tmp_path / peft.WEIGHTS)

    loss, want = their_gradients(case)
    assert metrics["reward_model/loss"] == pytest.approx(loss, rel=1e-5)
    assert got.keys() == want.keys() and "base_model.model.score.weight" in got
    for name, value in want.items():
        assert np.abs(value).max() > 1e-4, name
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), case.frozen)
    assert state.params.keys() == {"layers", "score"} and "score" not in frozen


def test_what_learns_is_counted():
    """The adapters of both layers, of rank 3, and the head's width."""
    model = dataclasses.replace(tiny.MODEL, head="scalar")
    model = dataclasses.replace(model, lora=targets.lora_of(model, Spec(3, 6.0)))
    sizes = [x.size for x in jax.tree.leaves(lora.trained_shapes(model))]
    assert lora.num_trained(model) == sum(sizes)
    policy = dataclasses.replace(model, head="vocabulary")
    assert lora.num_trained(model) - lora.num_trained(policy) == model.width
    whole = parameters.param_shapes(model)
    assert {*lora.frozen_shapes(model, jnp.float32)} == {*whole} - {"score"}


def test_the_head_gets_no_adapter():
    model = dataclasses.replace(tiny.MODEL, head="scalar")
    with pytest.raises(ValueError, match="score, the head of a reward model, which is trained"):
        targets.lora_of(model, Spec(2, 4.0, targets=("q_proj", "score")))
