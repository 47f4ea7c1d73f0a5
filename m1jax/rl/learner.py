"""One step of reinforcement learning by rule: rollouts, rewards, advantages, and off-policy updates on them."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.errors import UserError
from m1jax.evaluate import Local, score
from m1jax.model import M1
from m1jax.prompt import Options, Prompter
from m1jax.rl.experience import Reply, pack, reward, stacked
from m1jax.rl.losses import group_advantages, informative, overlong_penalty
from m1jax.rl.policy import correlation
from m1jax.rl.rollout import padded_prompts, rollout, sampling_rows
from m1jax.rl.settings import RLSettings
from m1jax.tasks import Problem, find, mixture
from m1jax.train.step import TrainState, computing

Metrics = dict[str, Any]
# (state, batch [A, B, T]) -> state, metrics on the host
UpdateFunction = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Mapping[str, Any]]]

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

    def check_lengths(self, context: int) -> None:
        """Raises `UserError` if a row or the model's context does not hold a prompt and the longest window.

        As far as a sample of the problems tells; before the first rollout rather than at the first long reply.
        """
        settings, window = self.settings, self.settings.windows[-1]
        problems = mixture(self.tasks, seed=self._seed, difficulty=settings.difficulty)
        prompts = self._prompts([next(problems) for _ in range(SAMPLE)])
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

    def _prompts(self, problems: list[Problem]) -> list[tuple[int, ...]]:
        return [self.prompter.plain(problem.question, Options()).tokens for problem in problems]

    def step(self, state: TrainState, number: int, update: UpdateFunction) -> tuple[TrainState, Metrics]:
        """Generates a batch with the current policy and updates it; `update` is one optimizer update."""
        groups, metrics = self.collect(computing(state.model, self.dtype), number)
        state, learnt = self.learn(state, [reply for group in groups for reply in group], number, update)
        return state, metrics | learnt

    def collect(self, policy: M1, number: int) -> tuple[list[list[Reply]], Metrics]:
        """Groups to learn from; dynamic sampling goes on until there are enough or the attempts are used up."""
        settings = self.settings
        problems = mixture(self.tasks, seed=1_000_003 * self._seed + number, difficulty=settings.difficulty)
        groups: list[list[Reply]] = []
        rounds: list[Metrics] = []
        while len(rounds) < settings.attempts and len(groups) < settings.questions:
            asked = [next(problems) for _ in range(settings.questions)]
            found, metrics = self._ask(policy, asked, number, len(rounds))
            rounds.append(metrics)
            groups += found
        mean = {name: float(np.mean([metrics[name] for metrics in rounds])) for name in rounds[0]}
        groups = groups[: settings.questions]
        counts = {"attempts": len(rounds), "groups": len(groups), "window": settings.window(number, self._steps)}
        return groups, mean | counts

    def _ask(self, policy: M1, problems: list[Problem], number: int, attempt: int) -> tuple[list[list[Reply]], Metrics]:
        """One rollout of all problems: the groups worth learning from, and what the replies were like."""
        settings, G = self.settings, self.settings.replies
        window = settings.window(number, self._steps)
        prompts = self._prompts(problems)
        seeds = random.Random(f"{self._seed} {number} {attempt}")
        rows = sampling_rows([seeds.getrandbits(32) for _ in problems], G, settings.temperature)
        tokens, lengths = padded_prompts(prompts)
        out = jax.device_get(
            rollout(policy, tokens, lengths, rows, self._eos, settings.loop_tokens, replies=G, window=window)
        )
        decode = self.prompter.tokenizer.decode
        texts = [decode(row[:n].tolist()) for row, n in zip(out.tokens, out.lengths, strict=True)]
        judged = [
            reward(problems[row // G], text, bool(out.ended[row]), settings.format_reward)
            for row, text in enumerate(texts)
        ]
        rewards = np.asarray([value for value, _ in judged], np.float32)
        if settings.overlong_margin:
            rewards += np.asarray(overlong_penalty(out.lengths, window, settings.overlong_margin))
        grouped = jnp.asarray(rewards.reshape(-1, G))
        advantages, useful = np.asarray(group_advantages(grouped)), np.asarray(informative(grouped))
        groups = [
            [
                Reply(prompts[q], out.tokens[row, : out.lengths[row]], out.logp[row, : out.lengths[row]], advantage)
                for row, advantage in enumerate(advantages[q].tolist(), q * G)
            ]
            for q in range(len(problems))
            if useful[q] or not settings.dynamic_sampling
        ]
        return groups, {
            "reward": float(rewards.mean()),
            "accuracy": float(np.mean([correct for _, correct in judged])),
            "reply_tokens": float(out.lengths.mean()),
            "ended": float(out.ended.mean()),
            "looped": float(out.looped.mean()),
            "informative": float(useful.mean()),
        }

    def learn(
        self, state: TrainState, replies: list[Reply], number: int, update: UpdateFunction
    ) -> tuple[TrainState, Metrics]:
        """Updates on the replies, shuffled and split evenly; before the first one the log-probs are compared."""
        if not replies:  # every group was all right or all wrong
            return state, {"updates": 0, "loss": 0.0, "tokens": 0}
        order = list(range(len(replies)))
        random.Random(f"shuffle {self._seed} {number}").shuffle(order)
        updates = self.settings.updates
        parts = [[replies[n] for n in part] for k in range(updates) if (part := order[k::updates])]
        batches = stacked([pack(part, self.settings.row_tokens) for part in parts], self._accumulate, self._ways)
        told: list[Mapping[str, Any]] = []
        for batch in batches:
            state, metrics = update(state, batch)
            told.append(metrics)
        agreement = np.asarray(told[0]["agreement"])
        means = {name: np.mean([metrics[name] for metrics in told], axis=0) for name in told[0] if name != "agreement"}
        return state, means | {
            "correlation_logp": correlation(agreement[0]),
            "correlation_p": correlation(agreement[1]),
            "updates": len(batches),
            "tokens": int(sum((batch["segments"] > 0).sum() for batch in batches)),
        }

    def evaluate(self, model: M1, seed: int = 0) -> Metrics:
        """Greedy accuracy on held-out problems of each task at its full difficulty here, and the mean of all."""
        settings = self.settings
        answers = Local(computing(model, self.dtype), self.prompter, settings.windows[-1], EVALUATION_ROWS)
        out: Metrics = {}
        for task in self.tasks:
            level = max(1, round(task.difficulty * settings.difficulty))
            problems = task.problems(settings.evaluate_problems, seed, level)
            out[f"held_out/{task.name}"] = score(task, problems, level, answers).accuracy
        return out | {"held_out": float(np.mean(list(out.values())))}
