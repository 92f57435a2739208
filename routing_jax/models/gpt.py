"""What GPT-2's decoder has otherwise than Llama's: LayerNorm, a GELU MLP, one spread of weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The matrices that write into the residual stream; 2L of them add up there.
_RESIDUAL = (("mixer", "out"), ("mlp", "down"))


class LayerNorm(nn.Module):
    """(x − mean) / std · scale, computed in float32, without bias (Ba et al. 2016)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last dimension of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale[None, None]).astype(x.dtype)


class GeluMLP(nn.Module):
    """gelu(x·up)·down, without biases."""

    mlp_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B,T,D] to [B,T,D]."""
        D, F = x.shape[-1], self.mlp_width
        init = nn.initializers.lecun_normal()
        up = self.param("up", init, (D, F)).astype(x.dtype)
        down = self.param("down", init, (F, D)).astype(x.dtype)
        hidden = jax.nn.gelu(jnp.einsum("BTD,DF->BTF", x, up), approximate=False)
        return jnp.einsum("BTF,FD->BTD", hidden, down)


def draw_weights(params: dict[str, Any], std: float, layers: int, rng: jax.Array) -> dict[str, Any]:
    """Every matrix drawn anew from N(0, std), output projections from N(0, std/√(2L)).

    Radford et al. 2019. Vectors, the norms' scales and the biases, stay as they are.

    Args:
      params: of the unrolled model.
      std: standard deviation.
      layers: L.
      rng: a PRNG key.

    >>> params = {"mlp": {"down": jnp.zeros((64, 64))}, "scale": jnp.ones(3)}
    >>> drawn = draw_weights(params, 0.02, 8, jax.random.key(0))
    >>> round(float(drawn["mlp"]["down"].std()), 3), drawn["scale"].tolist()
    (0.005, [1.0, 1.0, 1.0])
    """
    keys = iter(jax.random.split(rng, len(jax.tree.leaves(params))))

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        key = next(keys)
        if leaf.ndim < 2 or path[-1].key.endswith("_bias"):
            return leaf
        residual = tuple(k.key for k in path[-2:]) in _RESIDUAL
        spread = std / (2 * layers) ** 0.5 if residual else std
        return spread * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, params)
