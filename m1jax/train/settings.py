"""The settings of a training run: a TOML file as dataclasses. An unknown key is refused, with the nearest known one."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from m1jax.errors import UserError

T = TypeVar("T")
Over = Literal["model", "layer"]
MAX_SEED = 2**32 - 1  # that the shuffling of data takes


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """`[model]`: what is trained. Either `path` or `config`."""

    path: str = ""  # a model to go on from: weights, config and tokenizer
    config: str = ""  # a config.json, for random weights
    tokenizer: str = ""  # a tokenizer folder; that of `path` by default
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; weights, head and optimiser are float32
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of OUT/model; a stage that goes on from it wants float32
    remat: Literal["none", "projections", "layer"] = "layer"  # what the gradient keeps of each layer
    capacity: float = 0.0  # tokens of an expert, as a multiple of an equal share; 0: no token is dropped


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """`[lora]`: of the model nothing is trained but small factors beside matrices of attention, `out/adapter`.

    The model is then held in `model.dtype`, once, and needs neither gradients nor moments.
    """

    rank: int = 0  # of the factors; 0: no factors, the whole model is trained
    alpha: float = 32.0  # their product counts alpha / rank
    targets: tuple[str, ...] = ("lightning.*", "softmax.*")  # names or patterns, as in `m1jax.params.param_table`
    path: str = ""  # an adapter of such factors to go on from
    quantize: Literal["", "int8", "int4"] = ""  # what the experts are held in, if not in `model.dtype`


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`[data]`: documents, and how they fill rows. Stage rl has no documents: only `accumulate` counts there."""

    files: tuple[str, ...] = ()  # files or patterns such as "corpus/*.jsonl": .txt, .jsonl, .npy (tokens)
    length: int = 2048  # tokens of a row
    rows: int = 8  # rows of a batch, on all devices together
    accumulate: int = 1  # batches whose gradients make one step
    end_token: str = ""  # name of the token after each document; the tokenizer's eos by default
    bins: int = 32  # rows that are being filled at a time; more leave less padding
    # Documents are dealt out to so many streams, each of which fills an equal part of the rows: of several processes
    # each reads the streams of its own rows alone. Batches follow from this number, whatever that of the processes is.
    streams: int = 1
    validation: tuple[str, ...] = ()  # files or patterns; left out of `files`, their cross-entropy is reported
    validate_every: int = 500  # steps, and at the end


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """`[optimizer]`: AdamW as in the papers, and its schedule: warm up, stay, decay.

    In stage rl it counts planned updates, `rl.updates` of each batch, however many of them a batch has replies for.
    """

    learning_rate: float = 2e-4
    warmup: int = 500  # steps (rl: updates) from 0
    decay: int = 0  # steps (rl: updates) at the end, down to `final`
    final: float = 0.1  # of the learning rate
    # Factors of the learning rate, such as "softmax.*=5,moe.router=0", by names of parameters as in
    # `m1jax.params.param_table`; the last that fits counts, and 0 leaves a parameter as it is.
    rates: str = ""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 0.0  # 0: 1e-8, in stage rl the paper's 1e-15
    weight_decay: float = 0.1  # not of norms
    clip: float = 1.0  # global norm of the gradient; 0: no clipping
    balance: float = -1.0  # weight of the routers' balancing loss; negative: that of the model's config
    # What it averages over. "model" is the official loss: layers in which few experts do all the work are balanced by
    # others in which they do none. "layer" wants every layer balanced, as GShard does.
    balance_over: Over = "model"


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """`[checkpoint]`: written beside the training, the newest `keep` stay."""

    every: int = 0  # steps; 0: 500, in stage rl, whose steps are generation batches, 10
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """`[guard]`: what happens at a loss or gradient that is not finite, and at a spike of the loss."""

    action: Literal["stop", "skip"] = "stop"
    # Standard deviations above the running mean, each at least 1% of it and 0.02; 0: no limit. With "skip", where a
    # spike moves mean and deviation a little, a level that the loss keeps to is no spike after a while.
    spike: float = 10.0
    skips: int = 10  # in a row, then the run stops


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """`[log]`: what is written down."""

    every: int = 1  # steps
    tensorboard: bool = True
    peak_tflops: float = 0.0  # of one device, for the utilisation; 0: that of the device if it is known


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run."""

    stage: Literal["pretrain", "sft", "rl"]
    out: str  # folder for checkpoints, metrics and the trained model
    steps: int
    seed: int = 0
    mesh: str = ""  # such as "data=2,expert=4"; "auto": one for all devices present; empty: the first device alone
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    log: LogSettings = LogSettings()
    rl: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # read by the stage itself

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out is empty: name a folder")
        o, data = self.optimizer, ("length", "rows", "accumulate", "bins", "streams", "validate_every")
        positive = [f"data.{name}" for name in data]
        for name in ("steps", *positive, "checkpoint.keep", "guard.skips", "log.every"):
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if value < 1:
                raise UserError(f"{name} = {value} must be 1 or more")
        ranges = {
            "optimizer.learning_rate": (o.learning_rate, o.learning_rate > 0, "more than 0"),
            "optimizer.b1": (o.b1, 0 <= o.b1 < 1, "at least 0 and less than 1"),
            "optimizer.b2": (o.b2, 0 <= o.b2 < 1, "at least 0 and less than 1"),
            "optimizer.eps": (o.eps, o.eps >= 0, "0 or more"),
            "optimizer.clip": (o.clip, o.clip >= 0, "0 or more"),
            "optimizer.final": (o.final, 0 <= o.final <= 1, "between 0 and 1"),
            "optimizer.warmup": (o.warmup, o.warmup >= 0, "0 or more"),
            "optimizer.decay": (o.decay, o.decay >= 0, "0 or more"),
            "optimizer.weight_decay": (o.weight_decay, o.weight_decay >= 0, "0 or more"),
            "checkpoint.every": (self.checkpoint.every, self.checkpoint.every >= 0, "0 (the stage's own) or more"),
            "lora.rank": (self.lora.rank, self.lora.rank >= 0, "0 (no factors, the whole model is trained) or more"),
            "lora.alpha": (self.lora.alpha, self.lora.alpha > 0, "more than 0"),
            "log.peak_tflops": (self.log.peak_tflops, self.log.peak_tflops >= 0, "0 (that of the device) or more"),
            "seed": (self.seed, 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            "guard.spike": (self.guard.spike, self.guard.spike >= 0, "0 (no limit) or more"),
            "model.capacity": (self.model.capacity, self.model.capacity >= 0, "0 (no token is dropped) or more"),
        }
        for name, (value, good, wanted) in ranges.items():
            if not good:
                raise UserError(f"{name} = {value} must be {wanted}")
        if self.data.rows % self.data.streams:
            raise UserError(f"data.rows = {self.data.rows} does not divide among data.streams = {self.data.streams}")
        if self.stage == "rl":
            self._check_rl()
        elif self.rl:
            raise UserError(f"[rl] has no meaning in stage {self.stage}: leave it out")
        if bool(self.model.path) == bool(self.model.config):
            raise UserError("[model] needs either path (a model to go on from) or config (for random weights)")
        self._check_lora()

    def _check_lora(self) -> None:
        """Raises `UserError` for factors beside a model that is trained, or random."""
        for field in dataclasses.fields(self.lora):
            if not self.lora.rank and getattr(self.lora, field.name) != field.default:
                raise UserError(f"lora.{field.name} has no meaning without factors: set lora.rank, such as 16")
        if self.lora.rank and not self.model.path:
            raise UserError("lora.rank: factors are trained beside a model: set model.path instead of config")
        if self.lora.rank and self.model.save_dtype != "float32":
            raise UserError("model.save_dtype has no meaning with [lora], whose adapter is float32: leave it out")

    def _check_rl(self) -> None:
        """Raises `UserError` for what other stages read and this one does not."""
        if self.data.validation:
            raise UserError("data.validation has no meaning in stage rl: set rl.evaluate_every")
        for field in dataclasses.fields(self.data):
            if field.name != "accumulate" and getattr(self.data, field.name) != field.default:
                raise UserError(f"data.{field.name} has no meaning in stage rl, which draws problems: leave it out")
        if self.model.capacity:
            raise UserError(f"model.capacity = {self.model.capacity} has no meaning in stage rl: leave it out")

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint.every or (10 if self.stage == "rl" else 500)


def read(file: Path) -> Settings:
    """The settings in a TOML file. Raises `UserError`."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} is not a TOML file: {error}") from None
    try:
        return parse(Settings, table)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def parse(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a TOML table.

    Args:
      kind: the dataclass; tables in it are dataclasses themselves.
      table: keys and values.
      where: name of the table, for messages.

    Raises:
      UserError: a key is unknown or missing, or a value is of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known are {', '.join(fields)}"
            raise UserError(f"unknown key {where}{key}: {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}{missing[0]} is missing: add it")
    return kind(**{key: _value(hints[key], value, where + key) for key, value in table.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """A TOML value as the field's type wants it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{name} = {value!r} must be a table: write [{name}]")
        return parse(hint, value, f"{name}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name} = {value!r} must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise UserError(f"{name} = {value!r} must be a list")
        return tuple(_value(args[0], item, name) for item in values)
    if origin in (typing.Union, types.UnionType):
        return _value(args[0], value, name)
    kind: Any = dict if origin is not None else hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value} must be finite")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {value!r} must be of type {kind.__name__}")
    return value
