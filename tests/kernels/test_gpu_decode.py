"""Decoding by the GPU's kernel, interpreted, against plain XLA."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import gpu_decode, quantize, rotary
from grpo_jax.kernels.choice import choose_decoding
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.kernels.kv_cache import CacheShape, DecodeStep, RingCache
from grpo_jax.structs import Layer

R, W, Q, N, K, H = 2, 3, 32, 6, 2, 32
FREQUENCIES = 10_000.0 ** (-np.arange(0, H, 2) / H)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("limit,begin", [(20, 0), (20, 13), (130, 0), (130, 90)])
def test_tokens_after_a_shared_prompt(limit, begin, int8):
    """Prompts of unlike lengths, lanes at different tokens, round the end of the ring."""
    length_R = jnp.array([17, 32])
    first_RW = np.array([[0, 3, 1], [2, 0, limit - 4]])  # the step at which a lane begins
    kinds, caches = (RingCache(int8), TritonDecode(int8, interpret=True)), []
    for kind in kinds:
        cache = kind.empty(CacheShape(R, W, Q, limit, K, H), jnp.float32)
        prompt = kind.of_prompt(normal(0, R, Q, K, H), normal(1, R, Q, K, H))
        order = jnp.array([1, 0])
        shuffled = jax.tree.map(lambda x: x[order], prompt)  # noqa: B023
        caches.append(kind.admit(cache, shuffled, order, length_R[order], W))

    @jax.jit
    def run(kind_caches):
        outs = []
        for kind, cache in zip(kinds, kind_caches):

            def step(cache, t):
                q, k, v = (
                    jax.random.normal(jax.random.fold_in(jax.random.key(i), t), (R, W, n, H))
                    for i, n in enumerate((N, K, K))
                )
                time_RW = t - first_RW
                live_RW = time_RW >= 0
                time_RW = jnp.maximum(time_RW, 0)
                angles = rotary.rotary(length_R[:, None] + time_RW, FREQUENCIES)
                now = DecodeStep(length_R, time_RW, live_RW, (begin + t) % limit, limit, angles)
                out, new = kind.extend(cache, q, k, v, now)  # noqa: B023
                return new, jnp.where(live_RW[..., None, None], out, 0)

            cache, out = jax.lax.scan(step, cache, jnp.arange(limit))
            outs.append(out)
        return outs

    want, got = run(caches)
    assert (np.abs(want).max(axis=(1, 2, 3, 4)) > 0.1).all()
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_the_program_for_a_gpu_has_the_kernel():
    """One for the prompt's keys and one for the lanes' own."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    kind = TritonDecode()
    like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731

    @jax.jit
    def extend(cache, q, k, v, angles, *where):
        return kind.extend(cache, q, k, v, DecodeStep(*where, 64, angles))

    heads = [like(jnp.bfloat16, R, W, n, H) for n in (N, K, K)]
    heads.append((like(jnp.float32, R, W, H // 2),) * 2)
    whole = [like(jnp.int32, R), like(jnp.int32, R, W), like(bool, R, W), like(jnp.int32)]
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        cache = jax.eval_shape(lambda: kind.empty(CacheShape(R, W, Q, 64, K, H), jnp.bfloat16))
        text = extend.trace(cache, *heads, *whole).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2


def test_the_choice():
    def choice(
        platform="gpu", model=tiny.MODEL, tensor=1, cache="auto", dtype=jnp.bfloat16,
        option="streamed",
    ):  # fmt: skip
        devices = np.array([SimpleNamespace(platform=platform)])
        mesh = SimpleNamespace(devices=devices, shape={"tensor": tensor})
        return choose_decoding(option, cache, model, mesh, dtype)

    model = dataclasses.replace(tiny.MODEL, head_size=64)
    assert choice(model=model, cache="int8") == TritonDecode(True)
    assert choice(model=model, option="auto") == TritonDecode()
    assert choice(model=model, option="auto", dtype=jnp.float32) == RingCache()
    for words, refused in (
        ("it is for NVIDIA GPUs", {"platform": "cpu"}),
        ("heads are of size 8", {}),
        (
            "sliding windows",
            {"model": dataclasses.replace(model, layers=(Layer(window=4), Layer()))},
        ),
        ("mesh.tensor = 2", {"model": model, "tensor": 2}),
        ("it takes bfloat16", {"model": model, "dtype": jnp.float32}),
    ):
        with pytest.raises(ValueError, match=rf'rollout\.attention = "streamed": .*{words}.*"xla"'):
            choice(**refused)


def compare_on_a_gpu() -> None:
    """At a real shape in bfloat16 against plain XLA in float32."""
    slots, lanes, prompt, limit, heads = 4, 8, 256, 1024, 12
    size = 128
    length_R = jnp.array([200, 256, 1, 77])
    keys = iter(jax.random.split(jax.random.key(0), 8))
    drawn = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)  # noqa: E731
    prompts = [drawn(slots, prompt, K, size) for _ in range(2)]
    own = [drawn(slots, K, lanes, limit, size) for _ in range(2)]
    new = [drawn(slots, lanes, n, size) for n in (heads, K, K)]
    time_RW = (
        jnp.arange(slots * lanes).reshape(slots, lanes) * 33
    )  # up to 1023, past the ring's end
    for int8 in (False, True):
        outs = []
        for kind, dtype in ((RingCache(), jnp.float32), (TritonDecode(int8), jnp.bfloat16)):
            k, v = (x.astype(dtype) for x in own)
            if not isinstance(kind, TritonDecode):
                k = jnp.swapaxes(k, 3, 4)
            elif int8:
                k, v = (quantize.int8(x, 4) for x in (k, v))
            cache = kind.of_prompt(*(x.astype(dtype) for x in prompts)), (k, v)
            frequencies = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
            angles = rotary.rotary(length_R[:, None] + time_RW, frequencies)
            live_RW = jnp.ones_like(time_RW, bool)
            step = DecodeStep(length_R, time_RW, live_RW, jnp.int32(600), limit, angles)
            extend = jax.jit(lambda cache, *new: kind.extend(cache, *new, step)[0])  # noqa: B023
            outs.append(extend(cache, *(x.astype(dtype) for x in new)).astype(jnp.float32))
        error = jnp.linalg.norm(outs[1] - outs[0]) / jnp.linalg.norm(outs[0])
        print(f"int8 {int8}: {error:.5f}")
        assert error < (0.03 if int8 else 0.01)


def test_share_of_the_cache_that_a_step_reads():
    """By hand: of 200 positions in four blocks, and of lanes that end at unlike times."""
    share = lambda tokens, steps, lanes: gpu_decode.share_read(  # noqa: E731
        np.array(tokens), steps, lanes, 200
    )
    assert share([199], 199, 1) == (64 * (1 + 2 + 3) + 6 * 4) / (199 * 4)
    assert share([199, 65], 199, 2) == (408 + 64) / (2 * 199 * 4)
    assert share([0, 0], 0, 2) == 0


def test_on_a_gpu(optimized):
    tiny.run_on_a_gpu(__file__, optimized)


if __name__ == "__main__":
    compare_on_a_gpu()
