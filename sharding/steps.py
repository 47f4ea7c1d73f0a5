"""The three steps that are planned and compiled: abstract arguments laid out on a mesh, and the function over them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from m1jax.config import M1Config
from m1jax.kernels.experts import Quantization
from m1jax.lora.factors import Base, Lora
from m1jax.model import M1, abstract
from m1jax.sharding.mesh import Use
from m1jax.sharding.rules import rules_of, shardings, shards
from m1jax.state import PAGE, M1State, empty

Mode = Literal["serve", "prefill", "train"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step does.

    Attributes:
      mode: "serve" decodes one token of each row, "prefill" reads `chunk` of each, "train" is an optimiser step.
      batch: rows; None is as few as the mesh takes.
      context: length of the cache; in training, of the rows.
      chunk: tokens of each row read at once.
      dtype: of parameters and computation; training keeps parameters and Adam's moments in float32.
      quantize: what experts are stored in.
      lora_rank: of the factors that are trained beside a model in `dtype`; 0 trains the whole model.
    """

    mode: Mode
    batch: int | None
    context: int
    chunk: int = 8192
    dtype: str = "bfloat16"
    quantize: Quantization | None = None
    lora_rank: int = 0

    @property
    def rows(self) -> int:
        """The batch, once it is known."""
        assert self.batch is not None
        return self.batch

    @property
    def use(self) -> Use:
        """Which rules apply."""
        return "train" if self.mode == "train" else "serve"

    @property
    def tokens(self) -> int:
        """Tokens of each row in a step."""
        return {"serve": 1, "prefill": min(self.chunk, self.context), "train": self.context}[self.mode]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: `function(*arguments)`, with shardings on abstract arguments; those of `donated` indices are used up."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]


def make_step(config: M1Config, work: Workload, mesh: Mesh | AbstractMesh) -> Step:
    """The step of a workload on a mesh. Raises `UserError` if the mesh does not divide it."""
    if work.mode == "train":
        return _train(config, work, mesh)
    model = abstract(config, work.dtype, work.quantize)
    state = _state(config, work, mesh)
    tokens = _rows(mesh, work.rows, work.tokens)
    lengths = _rows(mesh, work.rows)

    def step(model: M1, state: M1State, tokens: jax.Array, lengths: jax.Array) -> Any:
        return model.step(tokens, state, lengths=lengths, logits="last")

    return Step(step, (_placed(config, mesh, model), _placed(config, mesh, state), tokens, lengths), (1,))


def _state(config: M1Config, work: Workload, mesh: Mesh | AbstractMesh) -> M1State:
    """As the engine has it: in pages, of which each row has as many as its context takes."""
    page = work.context if shards(mesh, "cache") > 1 else min(PAGE, work.context)
    each = -(-work.context // page)
    state = jax.eval_shape(lambda: empty(config, work.dtype, work.rows, work.rows * each, page))
    return dataclasses.replace(state, pages=jax.ShapeDtypeStruct((work.rows, each), jnp.int32))


def _placed(config: M1Config, mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(config, mesh, tree),
    )


def _rows(mesh: Mesh | AbstractMesh, *shape: int) -> jax.ShapeDtypeStruct:
    """int32 `[B]` or `[B, T]`, rows split."""
    spec = PartitionSpec(rules_of(mesh)["batch"] or None)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))


def trained(config: M1Config, work: Workload) -> tuple[Any, Base | None, Lora | None]:
    """What a training step updates, the model that it is beside if it is factors, and which factors these are."""
    if not work.lora_rank:
        return abstract(config, "float32"), None, None
    from m1jax.train.settings import LoraSettings  # the trainer builds on this package

    settings = LoraSettings()
    lora = Lora.of(config, work.lora_rank, settings.alpha, settings.targets)
    return lora.abstract(config), Base(abstract(config, work.dtype, work.quantize), lora.scale), lora


def _train(config: M1Config, work: Workload, mesh: Mesh | AbstractMesh) -> Step:
    """The trainer's step: AdamW on float32 weights, in `work.dtype`, layers computed twice."""
    # The trainer builds on this package.
    from m1jax.train.loss import Balance
    from m1jax.train.settings import GuardSettings, OptimizerSettings
    from m1jax.train.step import adamw, cross_entropy, init_state, make_step

    updated, base, lora = trained(config, work)
    optimizer = adamw(config, OptimizerSettings(), 1000, lora)
    state = jax.eval_shape(lambda model: init_state(model, optimizer), updated)
    spec = PartitionSpec(None, *(rules_of(mesh)[axis] or None for axis in ("batch", "sequence")))

    def rows(dtype: str) -> jax.ShapeDtypeStruct:  # one batch, nothing to accumulate
        shape = (1, work.rows, work.context)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    batch = {name: rows("int32") for name in ("tokens", "targets", "segments")} | {"weights": rows("float32")}
    loss = cross_entropy(work.dtype, "layer", Balance(config.router_aux_loss_coef))
    step = make_step(loss, optimizer, GuardSettings())
    if base is None:
        return Step(step, (_placed(config, mesh, state), batch), (0,))

    def beside(state: Any, batch: Any, base: Base) -> Any:
        return step(state, batch, base=base)

    return Step(beside, (_placed(config, mesh, state), batch, _placed(config, mesh, base)), (0,))
