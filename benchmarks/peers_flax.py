"""A Vision Transformer in Flax, whose parameters have the names of Google's files, and its steps by optax."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from peers_job import CLIP, MOMENTUM, RATE, TOTAL, batch


class Mlp(nn.Module):
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, N, D) -> (B, N, D)
        y = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))  # (B, N, M), by tanh
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class Block(nn.Module):
    config: SimpleNamespace
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, N, D) -> (B, N, D)
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_eps, dtype=self.dtype)
        attention = nn.MultiHeadDotProductAttention(
            self.config.num_heads, dtype=self.dtype, name="MultiHeadDotProductAttention_1"
        )
        x = x + attention(norm(name="LayerNorm_0")(x))
        return x + Mlp(self.config.mlp_dim, self.dtype, name="MlpBlock_3")(norm(name="LayerNorm_2")(x))


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):  # (B, N, D) -> (B, N, D)
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)


class Transformer(nn.Module):
    config: SimpleNamespace
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, N, D) -> (B, N, D)
        x = Positions(name="posembed_input")(x)
        for i in range(self.config.num_layers):
            x = Block(self.config, self.dtype, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name="encoder_norm")(x)


class ViT(nn.Module):
    config: SimpleNamespace
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):  # (B, H, W, C) -> (B, K)
        D, patch = self.config.hidden_size, (self.config.patch_size,) * 2
        x = nn.Conv(D, patch, patch, padding="VALID", dtype=self.dtype, name="embedding")(images)
        x = x.reshape(len(x), -1, D)  # (B, N - 1, D)
        token = self.param("cls", nn.initializers.zeros, (1, 1, D)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, D)), x], axis=1)  # (B, N, D)
        x = Transformer(self.config, self.dtype, name="Transformer")(x)
        return nn.Dense(self.config.num_classes, dtype=self.dtype, name="head")(x[:, 0]).astype(jnp.float32)


def flax_step(job: SimpleNamespace) -> Callable[[], float]:
    """The step of a job, compiled by jax.jit, with the state donated."""
    if jax.default_backend() != {"cpu": "cpu", "cuda": "gpu"}[job.device]:
        raise ImportError(f"jax sees no device of the kind {job.device}")
    model = ViT(job.config, jnp.dtype(job.precision))
    images, labels = batch(job)
    images, labels = jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels)
    with np.load(f"{job.folder}/original.npz") as file:
        params = unflatten_dict({name: jnp.asarray(file[name]) for name in file.files}, sep="/")
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.sgd(optax.cosine_decay_schedule(RATE, TOTAL), MOMENTUM)
    )

    def loss_and_logits(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, images, labels):
        params, opt_state = state
        (loss, _), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def measure(params, images, labels):
        loss, logits = loss_and_logits(params, images, labels)
        return loss, (logits.argmax(-1) == labels).sum()

    state = params, optimizer.init(params)

    def train() -> float:
        nonlocal state
        state, loss = update(state, images, labels)
        return float(loss)

    def evaluate() -> float:
        loss, correct = measure(params, images, labels)
        int(correct)
        return float(loss)

    return train if job.what == "train" else evaluate
