"""Side by side with transformers' `MiniMaxForCausalLM`, where it computes the official model.

That is: rotary_dim = head_dim, heads a power of two, whole prompts, `position_ids` passed. Its layer factor is
1 - i/(L-1+1e-5) + 1e-5 where the official one is 1 - i/(L-1) + 1e-5: the test gives it the official one.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m1jax
from m1jax.lora.adapter import open_adapter, save_adapter
from m1jax.lora.factors import Base, Lora
from m1jax.params import flatten
from m1jax.train.loss import Balance
from m1jax.train.step import accumulated, cross_entropy
from m1jax.weights import expected
from tests.tools import rms_error

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "model"
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_attn_alpha_factor=1.8,
        full_attn_alpha_factor=1.7,
        mlp_alpha_factor=1.6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.2,
    )
    transformers.MiniMaxForCausalLM(config).save_pretrained(path)
    return path


def official_decay(model: Any) -> Any:
    """Replaces the slopes of transformers' class by the official ones."""
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if layer.block_type != "linear_attention":
            continue
        attention = layer.self_attn
        heads = attention.num_attention_heads
        slope = 2.0 ** (-8.0 * (torch.arange(heads, dtype=torch.float32) + 1) / heads)
        slope = (slope * (1 - i / (len(layers) - 1) + 1e-5))[:, None, None]
        attention.slope_rate = slope
        attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(slope)
    return model


def test_logits_and_decode(folder: Path) -> None:
    theirs = official_decay(transformers.MiniMaxForCausalLM.from_pretrained(folder).eval())
    ours = m1jax.load(folder)
    ids = np.random.default_rng(0).integers(0, 96, (2, 290))
    with torch.no_grad():
        whole = theirs(torch.tensor(ids), use_cache=True)
        nxt = torch.argmax(whole.logits[:, -1:], -1)
        position = torch.full((2, 1), 290)
        one = theirs(nxt, cache=whole.cache, use_cache=True, position_ids=position)
    assert rms_error(ours(ids), whole.logits.numpy()) < 3e-6
    logits, state = ours.step(ids, ours.init_state(2, 300), logits="last")
    assert np.array_equal(np.argmax(logits, -1), nxt.numpy()[:, 0])
    logits, _ = ours.step(nxt.numpy(), state, logits="last")
    assert rms_error(logits, one.logits[:, 0].numpy()) < 3e-6


def test_loss_and_gradients_with_the_balancing_loss(folder: Path) -> None:
    """Every parameter's gradient, float32; rows of different lengths, padding excluded from both losses."""
    theirs = official_decay(transformers.MiniMaxForCausalLM.from_pretrained(folder))
    theirs.train()
    ids = np.random.default_rng(1).integers(0, 96, (2, 140))
    valid = np.arange(140) < np.asarray([[140], [97]])
    out = theirs(
        torch.tensor(ids),
        attention_mask=torch.tensor(valid.astype(np.int64)),
        position_ids=torch.arange(140)[None].expand(2, -1),
        labels=torch.tensor(np.where(valid, ids, -100)),
        output_router_logits=True,
        use_cache=False,
    )
    out.loss.backward()

    ours = m1jax.load(folder)
    coefficient = theirs.config.router_aux_loss_coef
    targets, weights = np.roll(ids, -1, 1), (valid & np.roll(valid, -1, 1) & (np.arange(140) < 139)).astype(np.float32)
    batch = {
        "tokens": jnp.asarray(ids, jnp.int32),
        "targets": jnp.asarray(targets, jnp.int32),
        "weights": jnp.asarray(weights),
        "segments": jnp.asarray(valid, jnp.int32),
    }
    loss = cross_entropy("float32", "layer", Balance(coefficient))
    gradient, metrics = jax.jit(functools.partial(accumulated, loss))(ours, {k: v[None] for k, v in batch.items()})
    assert float(metrics["loss"]) == pytest.approx(out.loss.item(), rel=1e-6)
    assert float(metrics["balance"]) == pytest.approx(out.aux_loss.item(), rel=1e-6)
    found = flatten(gradient)
    slots = expected(ours.config, "fused")
    theirs_by_name = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert theirs_by_name.keys() == slots.keys()
    for name, slot in slots.items():
        mine = np.asarray(found[slot.target])[slot.index].reshape(slot.shape)
        assert rms_error(mine, theirs_by_name[name]) < 1e-5, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_an_adapter_is_pefts(folder: Path, tmp_path: Path) -> None:
    """One that PEFT made gives the logits that it gives there, added to the weights or beside them; and back."""
    peft = pytest.importorskip("peft", reason="the extra `parity` is not installed")
    names = ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    given = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(official_decay(transformers.MiniMaxForCausalLM.from_pretrained(folder).eval()), given)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(0, 96, (2, 70))

    def logits(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.numpy()

    want, plain = logits(theirs), m1jax.load(folder)
    assert rms_error(plain(ids), want) > 0.1
    assert rms_error(m1jax.load(folder, adapter=tmp_path / "theirs")(ids), want) < 3e-6
    # Beside the weights, as it is trained; saved by us, read by PEFT.
    config, lora = plain.config, Lora.of(plain.config, 3, 5.0, ("*",))
    adapter = open_adapter(tmp_path / "theirs", config)
    adapter.check(lora, config)
    factors = adapter.factors(lora, config)
    assert rms_error(Base(plain, lora.scale).with_factors(factors)(ids), want) < 3e-6
    save_adapter(factors, tmp_path / "ours", lora, config, str(folder))
    again = official_decay(transformers.MiniMaxForCausalLM.from_pretrained(folder).eval())
    assert rms_error(logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()), want) < 1e-6
