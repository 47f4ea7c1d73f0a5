"""From replies to what an update reads: rewards by rule, and rows packed with prompts and replies.

Letters: B rows, T tokens of a row, L layers, k experts of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from m1jax.errors import UserError
from m1jax.rl.losses import MeanOver
from m1jax.tasks import Problem, verify


class Reply(NamedTuple):
    """A reply with its prompt."""

    prompt: Sequence[int]
    tokens: np.ndarray  # int32 [n]
    logp: np.ndarray  # float32 [n], under the policy that wrote it
    advantage: float
    routes: np.ndarray | None = None  # [tokens of prompt and reply, L, k], the experts that they went to


class Experience(NamedTuple):
    """Packed rows, arrays `[B, T]`; entry t is about predicting token t + 1 of the row."""

    tokens: np.ndarray  # int32
    segments: np.ndarray  # int32, 0 is padding
    targets: np.ndarray  # int32
    old_logp: np.ndarray  # float32
    advantage: np.ndarray  # float32
    weights: np.ndarray  # float32, 0 but where the target was generated: what it counts for in the mean
    routes: np.ndarray | None  # [B, T, L, k], where the tokens themselves went


def reward(problem: Problem, reply: str, ended: bool, format_reward: float) -> tuple[float, bool]:
    """1 for the right answer and `format_reward` for M1's format; and whether the answer is right.

    A reply that the model did not end itself earns nothing: its answer may be the beginning of another one.
    """
    verdict = verify(problem, reply)
    correct = verdict.correct and ended
    return float(correct) + format_reward * float(verdict.well_formed and ended), correct


def pack(replies: Sequence[Reply], row_tokens: int, mean_over: MeanOver = "tokens") -> Experience:
    """Packs replies, the longest first, each into the first row with room.

    A token's weight is 1, or 1 / n of a reply of n tokens where the mean is over replies.

    Raises:
      UserError: a reply with its prompt is longer than `row_tokens`.
    """
    sizes = [len(reply.prompt) + len(reply.tokens) for reply in replies]
    if max(sizes) > row_tokens:
        raise UserError(
            f"rl.row_tokens = {row_tokens} does not hold a prompt and reply of {max(sizes)} tokens: raise it"
        )
    contents: list[list[Reply]] = []
    used: list[int] = []
    for index in sorted(range(len(replies)), key=lambda n: -sizes[n]):
        row = next((n for n, size in enumerate(used) if size + sizes[index] <= row_tokens), len(used))
        if row == len(used):
            contents.append([])
            used.append(0)
        contents[row].append(replies[index])
        used[row] += sizes[index]
    kinds = (np.int32, np.int32, np.int32, np.float32, np.float32, np.float32)
    shape, routes = (len(used), row_tokens), replies[0].routes
    out = Experience(*(np.zeros(shape, kind) for kind in kinds), routes=None)
    if routes is not None:
        out = out._replace(routes=np.zeros((*shape, *routes.shape[1:]), routes.dtype))
    for row, content in enumerate(contents):
        end = 0
        for segment, reply in enumerate(content, 1):
            _write(out, row, segment, end, reply, 1.0 if mean_over == "tokens" else 1.0 / len(reply.tokens))
            end += len(reply.prompt) + len(reply.tokens)
    return out


def _write(out: Experience, row: int, segment: int, start: int, reply: Reply, weight: float) -> None:
    first, end = start + len(reply.prompt), start + len(reply.prompt) + len(reply.tokens)
    out.tokens[row, start:first], out.tokens[row, first:end] = reply.prompt, reply.tokens
    out.segments[row, start:end] = segment
    predicts = slice(first - 1, end - 1)
    out.targets[row, predicts], out.old_logp[row, predicts] = reply.tokens, reply.logp
    out.advantage[row, predicts], out.weights[row, predicts] = reply.advantage, weight
    if out.routes is not None:
        out.routes[row, start:end] = reply.routes


def stacked(parts: Sequence[Experience], accumulate: int, ways: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches of one shape `[A, B, T, ...]`, by name, for `m1jax.train.step`; rows of padding are added.

    The number of rows is rounded up, with one in 16 to spare, so that few shapes are ever compiled; B to a multiple
    of `ways`.
    """
    need = -(-max(len(part.tokens) for part in parts) * 17 // 16)
    step = max(1, 2 ** (need.bit_length() - 2))
    rows = -(-need // step) * step
    rows = -(-rows // (accumulate * ways)) * accumulate * ways

    def batch(x: np.ndarray) -> np.ndarray:
        more = np.zeros((rows - len(x), *x.shape[1:]), x.dtype)
        return np.concatenate([x, more]).reshape(accumulate, -1, *x.shape[1:])

    return [{name: batch(x) for name, x in part._asdict().items() if x is not None} for part in parts]
