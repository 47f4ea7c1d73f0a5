"""Rollouts: many replies generated on the device in one loop, with the log-probability of every token as it was drawn.

Letters: Q questions, G replies of each, B = Q · G rows, T tokens of the longest prompt, W window (the most tokens of a
reply), V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m1jax.generation import not_finite
from m1jax.model import M1
from m1jax.sampling import Sampling, SamplingRows, sample
from m1jax.sharding.region import everywhere, ways
from m1jax.state import M1State

SURE = 0.99  # the probability from which on a token counts as certain, in the search for repetition loops


class Rollout(NamedTuple):
    """Replies; row q · G + g is reply g to question q."""

    tokens: jax.Array  # int32 [B, W], the end-of-sentence token included, then 0
    logp: jax.Array  # float32 [B, W], under the policy that drew them, then 0
    lengths: jax.Array  # int32 [B]
    ended: jax.Array  # bool [B], whether the model ended the reply itself
    looped: jax.Array  # bool [B], whether it was stopped as a repetition loop
    prompt_routes: jax.Array | None  # integers [Q, T, L, k], the experts that the tokens of the prompts went to
    routes: jax.Array | None  # [B, W, L, k], those of the replies


class _Carry(NamedTuple):
    logits: jax.Array  # float32 [B, V], for the next token
    state: M1State
    active: jax.Array  # bool [B]
    sure: jax.Array  # int32 [B], how many tokens in a row were certain
    out: Rollout
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("replies", "window", "routes", "recurrent"))
def rollout(
    model: M1,
    prompts: jax.Array,
    lengths: jax.Array,
    rows: SamplingRows,
    eos: jax.Array,
    loop_tokens: jax.Array | int,
    *,
    replies: int,
    window: int,
    routes: bool = False,
    recurrent: bool = False,
) -> Rollout:
    """Generates replies until each has ended, fills the window or goes round in circles.

    Args:
      model: the policy.
      prompts: int32 `[Q, T]`, padded on the right.
      lengths: int32 `[Q]`, tokens of each prompt.
      rows: how each of the B rows is sampled; without filters, or `logp` is not what was drawn from.
      eos: int32 `[n]`, tokens that end a reply.
      loop_tokens: a reply is stopped after so many consecutive tokens of probability above 0.99 (M1: 3000).
      replies: G.
      window: W.
      routes: whether to say which experts the tokens went to.
      recurrent: whether the prompts are read as in `M1.step` with it.

    Returns:
      The replies. Given the same seeds they are those of `m1jax.engine`.
    """
    Q, T = prompts.shape
    B = Q * replies
    parts = ways("cache")
    state = model.init_state(Q, -(-(T + window) // parts) * parts)
    prompt_routes = reply_routes = None
    if routes:
        logits, state, prompt_routes = model.routed_step(prompts, state, lengths, recurrent)
        reply_routes = jnp.zeros((B, window, *prompt_routes.shape[2:]), prompt_routes.dtype)
    else:
        logits, state = model.step(prompts, state, lengths, "last", recurrent)
    source = jnp.repeat(jnp.arange(Q), replies)
    seen = jnp.zeros((B, logits.shape[-1]), bool)  # only a repetition penalty would read it
    out = Rollout(
        jnp.zeros((B, window), jnp.int32),
        jnp.zeros((B, window), jnp.float32),
        jnp.zeros((B,), jnp.int32),
        jnp.zeros((B,), bool),
        jnp.zeros((B,), bool),
        None,
        reply_routes,
    )
    temperature = jnp.asarray(rows.temperature)
    scale = jnp.where(temperature > 0, temperature, 1.0)[:, None]

    def one(carry: _Carry) -> _Carry:
        token = sample(carry.logits, rows, carry.state.length, seen)
        logp = jnp.take_along_axis(jax.nn.log_softmax(carry.logits / scale), token[:, None], axis=1)[:, 0]
        active, out = carry.active, carry.out
        sure = jnp.where(logp > jnp.log(SURE), carry.sure + 1, 0)
        ended = active & jnp.isin(token, eos)
        looped = active & ~ended & (sure >= loop_tokens)
        out = out._replace(
            tokens=out.tokens.at[:, carry.step].set(jnp.where(active, token, 0)),
            logp=out.logp.at[:, carry.step].set(jnp.where(active, logp, 0.0)),
            lengths=out.lengths + active,
            ended=out.ended | ended,
            looped=out.looped | looped,
        )
        count = active.astype(jnp.int32)
        if out.routes is None:
            logits, state = model.step(token[:, None], carry.state, lengths=count, logits="last")
        else:
            logits, state, chosen = model.routed_step(token[:, None], carry.state, count)
            out = out._replace(routes=out.routes.at[:, carry.step].set(chosen[:, 0]))
        return _Carry(logits, state, active & ~ended & ~looped, sure, out, carry.step + 1)

    def going(carry: _Carry) -> jax.Array:
        return jnp.any(carry.active) & (carry.step < window)

    start = _Carry(logits[source], state.take(source), jnp.ones((B,), bool), out.lengths, out, jnp.int32(0))
    out = lax.while_loop(going, one, start).out
    return jax.tree.map(everywhere, out._replace(prompt_routes=prompt_routes))


def check_finite(model: M1, prompts: Sequence[Sequence[int]], found: Rollout) -> None:
    """Raises `UserError`, which names the first bad layer, if a reply's log-probabilities are no numbers.

    `prompts` are those of the questions, `found` is on the host.
    """
    bad = np.flatnonzero(~np.isfinite(found.logp).all(axis=1))
    if bad.size:
        row = int(bad[0])
        prompt = prompts[row * len(prompts) // len(found.logp)]
        raise not_finite(model, [*prompt, *found.tokens[row, : found.lengths[row]].tolist()])


def sampling_rows(seeds: Sequence[int], replies: int, temperature: float) -> SamplingRows:
    """Rows for one seed per question: plain sampling at this temperature (0 is greedy), nothing filtered."""
    setting = Sampling(temperature=temperature, top_p=1.0)
    return SamplingRows.of([(setting, seed, g) for seed in seeds for g in range(replies)])


def padded_prompts(prompts: Sequence[Sequence[int]], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 `[Q, T]`, T a multiple so that few shapes are compiled, and their lengths int32 `[Q]`."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    out = np.zeros((len(prompts), -(-max(lengths) // multiple) * multiple), np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        row[: len(prompt)] = prompt
    return out, lengths
