# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Routed attention in two minutes
#
# A tiny model learns to recall: it reads key–value pairs, then a marked key, and answers with that
# key's value. First it may attend everywhere. Then attention costs something, and its routers learn
# which single token needs it.
#
# On Colab, install the library first:

# %%
try:
    import routing_jax
except ImportError:
    # %pip install -q "routing_jax @ git+https://github.com/OWNER/routing_jax"
    import routing_jax

print(routing_jax.__version__)

# %% [markdown]
# ## Train
# The preset `recall-128`, shortened to length 16, after length 8; λ rises once accuracy holds.

# %%
import tempfile

from routing_jax.train.presets import get_preset
from routing_jax.train.run import run

config = get_preset("recall-128").replace(
    data__length=16,
    curriculum__lengths=(8,),
    curriculum__hold_steps=300,
    batch_tokens=1024,
    eval_sequences=512,
    log_every=100,
)
workdir = tempfile.mkdtemp()
result = run(config, workdir, resume=True)

# %%
print(f"accuracy {result.accuracy:.2%} on {result.sequences} held-out sequences")
print(f"{result.usage:.2%} of tokens attend; the least possible is {result.least_usage:.2%}")

# %% [markdown]
# ## Accuracy, usage and λ over the steps

# %%
from IPython.display import Image

Image(f"{workdir}/history.png")

# %% [markdown]
# ## Which token attended, in which layer?
# One held-out sequence. The question stands at the end: a MARKER and the key that is asked.

# %%
Image(f"{workdir}/heatmap.png")

# %% [markdown]
# ## What it costs
# Attention is not all there is to pay for: keys and values are made for every token, and the router
# and the convolution run everywhere. `cost` counts that.

# %%
print(f"usage {result.usage:.4f}   cost {result.cost:.4f}   kv cost {result.kv_cost:.4f}")
