"""A conversation that keeps the model's state between turns: each turn reads only what is new."""

from collections.abc import Iterator

from m1jax.engine import Engine
from m1jax.errors import UserError
from m1jax.generation import Event, Prior
from m1jax.prompt import Options, Prompter, ends_inside_thinking


class Chat:
    """A conversation.

    Where the chat template renders earlier turns as the model wrote them (M1's does), a turn feeds the end of the last
    reply's turn and the new message. A template that rewrites earlier turns makes the whole conversation be read again.

    Attributes:
      tokens: all tokens of the conversation, replies included.
    """

    def __init__(self, engine: Engine, options: Options) -> None:
        self.tokens: list[int] = []
        self._engine, self._options = engine, options
        self._prompter = Prompter(engine.tokenizer)
        self._messages: list[dict[str, str]] = []
        self._text = ""  # what `tokens` say, up to an end-of-turn token
        self._ended = False  # whether `tokens` end with an end-of-turn token
        self._left: Prior | None = None  # of a text that is a beginning of `tokens`

    def send(self, message: str) -> Iterator[Event]:
        """The events of the reply to a message; to be exhausted before the next one.

        Raises:
          UserError: the message is empty or leaves no room in the context; the conversation is then as before.
        """
        if not message.strip():
            raise UserError("the message is empty: give some text")
        messages = [*self._messages, {"role": "user", "content": message}]
        opened, begun = self._prompter.text(messages, self._options)
        text = opened + begun
        tokens = self._continued(text)
        prior = None if tokens is None else self._left
        request = self._options.request(tokens or self._engine.tokenizer.encode(text), ends_inside_thinking(text))
        generation = self._engine.generate([request], max_rows=1, prior=prior)
        self._left = None  # used up; should generating fail, the next turn reads everything again
        reply = None
        for event in generation:
            reply = event.reply
            yield event
        if reply is None:
            return
        self._ended = reply.finish == "eos"
        words = self._engine.tokenizer.decode(reply.tokens[:-1] if self._ended else reply.tokens, keep=None)
        self._messages = [*messages, {"role": "assistant", "content": begun + words}]
        self._text = text + words
        self.tokens = [*request.tokens, *reply.tokens]
        self._left = generation.left

    def _continued(self, text: str) -> list[int] | None:
        """The conversation's tokens and those that `text` adds; None if `text` does not go on from them."""
        if self._left is None or not text.startswith(self._text):
            return None
        new = self._engine.tokenizer.encode(text[len(self._text) :])
        if not self._ended:
            return self.tokens + new
        # The template writes the end of the turn that the model has already said.
        return self.tokens + new[1:] if new[:1] == self.tokens[-1:] else None
