"""A decoder in NumPy that reads everything anew for each token, with a mask a layer."""

import numpy as np

from routing_jax.routers import LayerRouter


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(scale)


def turn(x, theta):
    H = x.shape[-1]
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(0, H, 2) / H)
    low, high = np.split(x, 2, axis=-1)
    pairs = (low + 1j * high) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def visible(T, dense, serving):
    """[T,T]: a query sees the first blocks, and from `window` blocks before its own on."""
    block = np.arange(T) // serving.page_size
    sparse = serving.sparse
    near = block[None] >= block[:, None] - sparse.window
    return np.tri(T, dtype=bool) & (dense | near | (block[None] < sparse.sinks))


def forward(config, params, tokens, decisions, serving, routers=None):
    """(logits [T,V], decisions) of tokens [T]; where a decision is None the layer's router takes it."""
    x = np.asarray(params["embedding"], np.float64)[np.asarray(tokens)]
    T, G, H, eps = (
        len(tokens),
        config.num_heads // config.num_kv_heads,
        config.head_dim,
        config.norm_eps,
    )
    taken = []
    for layer, dense in enumerate(decisions):
        p = params[f"layers_{layer}"]["block_0"]
        h, m = norm(x, p["mixer_norm"]["scale"], eps), p["mixer"]
        q, k, v = (np.einsum("td,dnh->tnh", h, m[name]) for name in ("query", "key", "value"))
        if "query_norm" in m:
            q, k = norm(q, m["query_norm"], eps), norm(k, m["key_norm"], eps)
        if dense is None:
            router = LayerRouter(routers.config)
            queries = np.float32(q)[None]
            found = router.apply({"params": routers.params[layer]}, queries, np.array([T]))
            dense = bool(found.routing.choice[0])
        taken.append(dense)
        q, k = turn(q, config.rope_theta), turn(k, config.rope_theta)
        scores = np.einsum("tnh,snh->nts", q, np.repeat(k, G, axis=1)) / np.sqrt(H)
        scores = np.where(visible(T, dense, serving), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", weights, np.repeat(v, G, axis=1))
        x = x + np.einsum("tnh,nhd->td", mixed, m["out"])
        h, f = norm(x, p["mlp_norm"]["scale"], eps), p["mlp"]
        gate = h @ f["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f["up"])) @ f["down"]
    head = np.asarray(params["embedding"]).T if config.tie_embeddings else params["head"]
    return norm(x, params["final_norm"]["scale"], eps) @ head, taken


def greedy(config, params, prompt, steps, decisions, serving, routers=None):
    """(tokens made, decisions): the prompt decides, what follows obeys."""
    tokens, made = list(prompt), []
    for _ in range(steps):
        logits, decisions = forward(config, params, tokens, decisions, serving, routers)
        made.append(int(logits[-1].argmax()))
        tokens.append(made[-1])
    return made, decisions
