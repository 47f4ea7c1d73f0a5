"""One step of reinforcement learning by rule: rollouts, rewards, advantages, and off-policy updates on them."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.distributed import check_same
from m1jax.errors import UserError
from m1jax.evaluate import Local, score, written
from m1jax.model import M1
from m1jax.prompt import Options, Prompter
from m1jax.rl.experience import Experience, Reply, pack, reward, stacked
from m1jax.rl.losses import group_advantages, informative, overlong_penalty
from m1jax.rl.policy import correlation
from m1jax.rl.rollout import Rollout, check_finite, padded_prompts, rollout, sampling_rows
from m1jax.rl.settings import RLSettings
from m1jax.tasks import Problem, Task, find, mixture
from m1jax.train.step import TrainState, computing

Metrics = dict[str, Any]
# (state, batch [A, B, T], step of the schedule) -> state, metrics on the host
UpdateFunction = Callable[[TrainState, Mapping[str, Any], int], tuple[TrainState, Mapping[str, Any]]]
# (state, batch [A, B, T]) -> metrics of its first [B, T] on the host, nothing learnt
MeasureFunction = Callable[[TrainState, Mapping[str, Any]], Mapping[str, Any]]

EVALUATION_ROWS = 64
SAMPLE = 64  # problems whose prompts are measured


class Learner:
    """Steps of a run; all randomness follows from the seed and the step's number, so that a run can be continued.

    Args:
      settings: of the stage.
      prompter: of the model's tokenizer.
      eos: tokens that end a reply.
      dtype: to compute in.
      seed: of problems and sampling.
      steps: of the whole run, for the windows.
      accumulate: batches whose gradients make one update.
      ways: groups of devices that the rows of a batch are split over.

    Raises:
      UserError: a task is not there, or the questions do not divide among the groups of devices.
    """

    def __init__(
        self,
        settings: RLSettings,
        prompter: Prompter,
        eos: list[int],
        dtype: str,
        seed: int,
        steps: int,
        accumulate: int = 1,
        ways: int = 1,
    ) -> None:
        if settings.questions % ways:
            raise UserError(
                f"rl.questions = {settings.questions} does not divide among {ways} groups of devices: take a multiple"
            )
        self.settings, self.prompter, self.dtype = settings, prompter, dtype
        self.tasks = find(settings.tasks)
        self._eos = np.asarray(eos, np.int32)
        self._seed, self._steps = seed, steps
        self._accumulate, self._ways = accumulate, ways

    def check_problems(self, context: int) -> None:
        """Raises `UserError` if there are none, or a row or the model's context does not hold one and its reply.

        As far as a sample of the problems tells, and those of the evaluations; before the first rollout rather than at
        the first long reply or the first evaluation.
        """
        settings, window = self.settings, self.settings.windows[-1]
        problems = self._problems(self._seed)
        asked = [next(problems) for _ in range(SAMPLE)]
        if settings.evaluate_every:
            asked += [problem for _, _, held_out in self._held_out(0) for problem in held_out]
        prompts = self._prompts(asked)
        longest, padded = max(map(len, prompts)), padded_prompts(prompts)[0].shape[1]
        if longest + window > settings.row_tokens:
            raise UserError(
                f"rl.row_tokens = {settings.row_tokens} does not hold a prompt of {longest} tokens and a window of "
                f"{window}: raise it"
            )
        if padded + window > context:
            raise UserError(
                f"rl.windows: a prompt of {padded} tokens and a window of {window} exceed the model's context of "
                f"{context}: shorten the window"
            )

    def _problems(self, seed: int) -> Iterator[Problem]:
        return mixture(self.tasks, seed, self.settings.difficulty, self.settings.hardest_share)

    def _prompts(self, problems: list[Problem]) -> list[tuple[int, ...]]:
        return [self.prompter.plain(problem.question, Options()).tokens for problem in problems]

    def step(
        self, model: M1, state: TrainState, number: int, update: UpdateFunction, measure: MeasureFunction
    ) -> tuple[TrainState, Metrics]:
        """Generates a batch with the model of a state and updates that; `update` is one optimizer update."""
        start = time.perf_counter()
        groups, metrics, last = self.collect(computing(model, self.dtype), number)
        seconds = time.perf_counter() - start
        metrics |= {"rollout_seconds": seconds, "rollout_tokens_per_second": metrics["rollout_tokens"] / seconds}
        if groups:
            state, learnt = self.learn(state, [reply for group in groups for reply in group], number, update)
        else:  # every group was all right or all wrong: there is nothing to learn, but log-probs to compare
            batch = stacked(self._packed(last, number)[:1], self._accumulate, self._ways)[0]
            learnt = {"updates": 0, "loss": 0.0} | _correlations(measure(state, batch))
        return state, metrics | learnt

    def collect(self, policy: M1, number: int) -> tuple[list[list[Reply]], Metrics, list[Reply]]:
        """Groups to learn from, what all were like, and all replies of the last rollout.

        Dynamic sampling goes on until there are enough groups or the attempts are used up.
        """
        settings = self.settings
        problems = self._problems(1_000_003 * self._seed + number)
        groups: list[list[Reply]] = []
        rounds: list[Metrics] = []
        asked: list[list[Reply]] = []
        while len(rounds) < settings.attempts and len(groups) < settings.questions:
            drawn = [next(problems) for _ in range(settings.questions)]
            asked, useful, metrics = self._ask(policy, drawn, number, len(rounds))
            rounds.append(metrics)
            groups += [group for group, good in zip(asked, useful, strict=True) if good]
        mean = {name: float(np.mean([metrics[name] for metrics in rounds])) for name in rounds[0]}
        groups = groups[: settings.questions]
        counts = {"attempts": len(rounds), "groups": len(groups), "window": settings.window(number, self._steps)}
        tokens = mean["reply_tokens"] * len(rounds) * settings.questions * settings.replies
        return groups, mean | counts | {"rollout_tokens": tokens}, [reply for group in asked for reply in group]

    def _ask(
        self, policy: M1, problems: list[Problem], number: int, attempt: int
    ) -> tuple[list[list[Reply]], list[bool], Metrics]:
        """One rollout of all problems: the groups, which of them to learn from, and what the replies were like."""
        settings, G = self.settings, self.settings.replies
        # Every process draws and judges for itself.
        check_same("draw of problems, which the seed alone should decide,", problems)
        window = settings.window(number, self._steps)
        prompts = self._prompts(problems)
        seeds = random.Random(f"{self._seed} {number} {attempt}")
        rows = sampling_rows([seeds.getrandbits(32) for _ in problems], G, settings.temperature)
        tokens, lengths = padded_prompts(prompts)
        out = jax.device_get(
            rollout(
                policy,
                tokens,
                lengths,
                rows,
                self._eos,
                settings.loop_tokens,
                replies=G,
                window=window,
                routes=settings.replay_routes,
                recurrent=settings.recurs(self.dtype),
            )
        )
        check_finite(policy, prompts, out)
        replies = zip(out.tokens, out.lengths, out.ended, strict=True)
        texts = [written(self.prompter.tokenizer, row[:n].tolist(), bool(ended)) for row, n, ended in replies]
        judged = [
            reward(problems[row // G], text, bool(out.ended[row]), settings.format_reward)
            for row, text in enumerate(texts)
        ]
        rewards = np.asarray([value for value, _ in judged], np.float32)
        if settings.overlong_margin:
            rewards += np.asarray(overlong_penalty(out.lengths, window, settings.overlong_margin))
        correct = np.asarray([right for _, right in judged])
        advantages = np.asarray(group_advantages(jnp.asarray(rewards.reshape(-1, G))))
        useful = np.asarray(informative(jnp.asarray(correct.reshape(-1, G))))
        groups = [
            [_reply(prompts[q], q, row, out, advantage) for row, advantage in enumerate(advantages[q].tolist(), q * G)]
            for q in range(len(problems))
        ]
        return (
            groups,
            (useful | (not settings.dynamic_sampling)).tolist(),
            {
                "reward": float(rewards.mean()),
                "accuracy": float(correct.mean()),
                "reply_tokens": float(out.lengths.mean()),
                "ended": float(out.ended.mean()),
                "looped": float(out.looped.mean()),
                "informative": float(useful.mean()),
            },
        )

    def learn(
        self, state: TrainState, replies: list[Reply], number: int, update: UpdateFunction
    ) -> tuple[TrainState, Metrics]:
        """Updates on the replies, shuffled and split evenly; in the first one the log-probs are of the same weights.

        The schedule counts the updates that were planned: where a batch has fewer, each takes several of its steps.
        """
        batches = stacked(self._packed(replies, number), self._accumulate, self._ways)
        told: list[Mapping[str, Any]] = []
        planned = self.settings.updates
        for k, batch in enumerate(batches, 1):
            state, metrics = update(state, batch, number * planned + k * planned // len(batches) - 1)
            told.append(metrics)
        means = {name: np.mean([metrics[name] for metrics in told], axis=0) for name in told[0] if name != "agreement"}
        return state, means | {"updates": len(batches)} | _correlations(told[0])

    def _packed(self, replies: list[Reply], number: int) -> list[Experience]:
        """The replies, shuffled and split evenly, as what each update reads."""
        order = list(range(len(replies)))
        random.Random(f"shuffle {self._seed} {number}").shuffle(order)
        settings, updates = self.settings, self.settings.updates
        if settings.even_updates:
            updates = max(1, round(updates * len(replies) / (settings.questions * settings.replies)))
        parts = [[replies[n] for n in part] for k in range(updates) if (part := order[k::updates])]
        mean_over = settings.policy_loss.mean_over
        return [pack(part, settings.row_tokens, mean_over) for part in parts]

    def evaluate(self, model: M1, seed: int = 0) -> Metrics:
        """Greedy accuracy on held-out problems of each task at its full difficulty here, and the mean of all."""
        settings = self.settings
        answers = Local(computing(model, self.dtype), self.prompter, settings.windows[-1], EVALUATION_ROWS)
        out: Metrics = {}
        for task, level, problems in self._held_out(seed):
            out[f"held_out/{task.name}"] = score(task, problems, level, answers).accuracy
        return out | {"held_out": float(np.mean(list(out.values())))}

    def _held_out(self, seed: int) -> list[tuple[Task, int, list[Problem]]]:
        """Each task's level and problems in an evaluation."""
        levels = [(task, task.level(self.settings.difficulty)) for task in self.tasks]
        return [(task, level, task.problems(self.settings.evaluate_problems, seed, level)) for task, level in levels]


def _reply(prompt: tuple[int, ...], q: int, row: int, out: Rollout, advantage: float) -> Reply:
    """A row of a rollout on the host, reply to question q."""
    n, routes = out.lengths[row], None
    if out.routes is not None and out.prompt_routes is not None:
        routes = np.concatenate([out.prompt_routes[q, : len(prompt)], out.routes[row, :n]])
    return Reply(prompt, np.asarray(out.tokens[row, :n]), np.asarray(out.logp[row, :n]), advantage, routes)


def _correlations(metrics: Mapping[str, Any]) -> Metrics:
    """How well log-probabilities, and probabilities, of rollout and training agree."""
    agreement = np.asarray(metrics["agreement"])
    return {"correlation_logp": correlation(agreement[0]), "correlation_p": correlation(agreement[1])}
