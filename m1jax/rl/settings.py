"""`[rl]` of the settings: what the stage does between two optimizer steps. The paper's values are the defaults."""

import dataclasses

import jax

from m1jax.errors import UserError
from m1jax.rl.losses import NAMED, PolicyLoss


@dataclasses.dataclass(frozen=True)
class RLSettings:
    """A step of the run is one generation batch and the updates on it.

    Attributes:
      tasks: names of `m1jax.tasks`, "all", or files that define a `TASK`.
      difficulty: of the problems, as a fraction of each task's shipped difficulty; 1.2 is a fifth harder.
      hardest_share: of the problems, those of that difficulty; the others are of any difficulty up to it.
      loss: "cispo", "dapo", "grpo" or "reinforce".
      floor, cap: other bounds on r than the loss's own, as values of r itself.
      mean_over: "tokens" or "replies", in place of the loss's own: of replies with "grpo", else of tokens.
      unified_mask: adds the mask of the unified form, with these bounds (floor, cap) on r; empty is none.
      updates: optimizer updates on each generation batch.
      even_updates: a batch for which dynamic sampling has not found enough groups gets fewer updates, of as many
        replies each; else as many updates of fewer, which AdamW makes as large as any.
      questions: of a generation batch, after dynamic sampling.
      replies: to each question, the group that advantages are normalised in.
      dynamic_sampling: leave out groups that are all right or all wrong, and ask more questions instead.
      attempts: at most so many rollouts for one generation batch.
      windows: the most tokens of a reply; raised in stages of equal length.
      overlong_margin: tokens before the window's end over which a reply's reward sinks by up to 1; 0 is off.
      loop_tokens: a reply is stopped after so many consecutive tokens of probability above 0.99.
      temperature: of rollouts; the policy that is trained is the one at this temperature.
      replay_routes: in the updates, tokens go to the experts that they went to in the rollout, with the weights that
        the routers now give those (arXiv 2510.11370): rounding sends none elsewhere.
      recurrent: prompts and updates read attention token by token, as replies are written, see `M1.step`: else its
        float32 sums differ, and in bfloat16 now and then what they are rounded to. As many steps one after the other
        as a row has tokens, in each layer, with `model.remat` twice. If it is not said, on CPUs in bfloat16 alone.
      format_reward: for a reply in M1's format; a correct answer earns 1 more.
      row_tokens: length of a packed row; it must hold the longest prompt and window.
      evaluate_every: steps between evaluations, greedy, on held-out problems; 0 is never.
      evaluate_problems: how many of each task.
    """

    tasks: tuple[str, ...] = ("all",)
    difficulty: float = 1.0
    hardest_share: float = 0.5
    loss: str = "cispo"
    floor: float | None = None
    cap: float | None = None
    mean_over: str = ""
    unified_mask: tuple[float, ...] = ()
    updates: int = 16
    even_updates: bool = True
    questions: int = 64
    replies: int = 8
    dynamic_sampling: bool = True
    attempts: int = 4
    windows: tuple[int, ...] = (40_000, 48_000, 56_000, 64_000, 72_000, 80_000)
    overlong_margin: int = 0
    loop_tokens: int = 3000
    temperature: float = 1.0
    replay_routes: bool = True
    recurrent: bool | None = None
    format_reward: float = 0.1
    row_tokens: int = 100_000
    evaluate_every: int = 0
    evaluate_problems: int = 100

    def __post_init__(self) -> None:
        for name in ("updates", "questions", "attempts", "row_tokens", "loop_tokens", "evaluate_problems"):
            if getattr(self, name) < 1:
                raise UserError(f"rl.{name} = {getattr(self, name)} must be 1 or more")
        if self.replies < 2:
            raise UserError(f"rl.replies = {self.replies} must be 2 or more: a group to compare")
        if self.updates > self.questions * self.replies:
            raise UserError(
                f"rl.updates = {self.updates} exceeds the {self.questions * self.replies} replies of a batch"
            )
        if not self.windows or min(self.windows) < 1 or list(self.windows) != sorted(self.windows):
            raise UserError(f"rl.windows = {list(self.windows)} must be positive and rising")
        if self.row_tokens <= self.windows[-1]:
            raise UserError(
                f"rl.row_tokens = {self.row_tokens} does not hold a prompt and a window of {self.windows[-1]}: raise it"
            )
        if not 0 <= self.overlong_margin <= min(self.windows):
            raise UserError(f"rl.overlong_margin = {self.overlong_margin} must be from 0 to the window")
        if self.temperature <= 0:
            raise UserError(f"rl.temperature = {self.temperature} must be above 0: greedy replies are all alike")
        for name in ("format_reward", "evaluate_every"):
            if getattr(self, name) < 0:
                raise UserError(f"rl.{name} = {getattr(self, name)} must be 0 or more")
        self._check_problems()
        if self.loss not in NAMED:
            raise UserError(f"rl.loss = {self.loss!r} is unknown: choose from {', '.join(NAMED)}")
        if len(self.unified_mask) not in (0, 2) or (self.unified_mask and self.loss != "cispo"):
            raise UserError("rl.unified_mask is [floor, cap] and goes with loss = 'cispo'")
        if self.loss == "reinforce" and (self.floor, self.cap) != (None, None):
            raise UserError("rl.floor and rl.cap have no meaning with loss = 'reinforce', whose weight has no bounds")
        _ = self.policy_loss

    def _check_problems(self) -> None:
        if self.difficulty <= 0:
            raise UserError(f"rl.difficulty = {self.difficulty} must be above 0")
        if not 0 <= self.hardest_share <= 1:
            raise UserError(f"rl.hardest_share = {self.hardest_share} must be from 0 to 1")

    def recurs(self, dtype: str) -> bool:
        """Whether lightning attention goes token by token in a dtype to compute in."""
        if self.recurrent is not None:
            return self.recurrent
        return jax.default_backend() == "cpu" and dtype == "bfloat16"

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss with its bounds."""
        loss = NAMED[self.loss]
        given = {name: getattr(self, name) for name in ("floor", "cap") if getattr(self, name) is not None}
        given |= {"mean_over": self.mean_over} if self.mean_over else {}
        if self.unified_mask:
            given |= {"kind": "unified", "mask_floor": self.unified_mask[0], "mask_cap": self.unified_mask[1]}
        return dataclasses.replace(loss, **given)

    def window(self, step: int, steps: int) -> int:
        """The output window at one of so many steps: `windows` in stages of equal length."""
        return self.windows[min(step * len(self.windows) // steps, len(self.windows) - 1)]
