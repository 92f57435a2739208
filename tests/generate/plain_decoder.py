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


def visible(q, k, dense, sparse, prompt):
    """[T,K,T]: which keys each query sees, tiles and blocks being pages."""
    T, K = k.shape[:2]
    cfg, size = sparse, sparse.block_kv
    near = cfg.window // size
    rule = cfg.retrieval if dense else cfg.mode
    seen = np.zeros((T, K, T), bool)
    for t, head in np.ndindex(T, K):
        own, chooser = t // size, t // size * size
        everywhere = rule == "full" or (rule != "streaming" and chooser + size > prompt - cfg.last)
        if rule == cfg.answers == "topk" and t >= prompt:
            everywhere, chooser = False, t
        blocks = {*range(min(cfg.sink // size, own + 1)), *range(max(0, own + 1 - near), own + 1)}
        if rule == "topk":
            queries = q[chooser].reshape(K, -1, q.shape[-1])[head]
            some, half = cfg.channels_of(q.shape[-1]) // 2, q.shape[-1] // 2
            slow = [*range(half - some, half), *range(2 * half - some, 2 * half)]
            logits = k[: own * size, head][:, slow] @ queries[:, slow].T / q.shape[-1] ** 0.5
            weights = np.exp(logits).reshape(own, size, len(queries)).sum(axis=1)
            far = [j for j in range(own) if j not in blocks]
            score = {j: (weights[j] / weights[far].sum(axis=0)).sum() for j in far}
            blocks |= {*sorted(far, key=lambda j: -score[j])[: cfg.blocks]}
        for block in range(own + 1) if everywhere else blocks:
            seen[t, head, block * size : block * size + size] = True
    return seen & np.tri(T, dtype=bool)[:, None]


def forward(config, params, tokens, decisions, prompt):
    """(logits [T,V], decisions) of tokens [T]; a decision that is None is the router's."""
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
            router = LayerRouter(config.layer_router)
            found = router.apply({"params": m["router"]}, np.float32(q)[None], np.array([T]))
            short = config.sparse.sink + config.sparse.window >= T
            dense = short or bool(found.routing.choice[0])
        taken.append(dense)
        q, k = turn(q, config.rope_theta), turn(k, config.rope_theta)
        scores = np.einsum("tnh,snh->nts", q, np.repeat(k, G, axis=1)) / np.sqrt(H)
        seen = np.repeat(visible(q, k, dense, config.sparse, prompt), G, axis=1)
        scores = np.where(seen.swapaxes(0, 1), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", weights, np.repeat(v, G, axis=1))
        x = x + np.einsum("tnh,nhd->td", mixed, m["out"])
        h, f = norm(x, p["mlp_norm"]["scale"], eps), p["mlp"]
        gate = h @ f["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f["up"])) @ f["down"]
    head = np.asarray(params["embedding"]).T if config.tie_embeddings else params["head"]
    return norm(x, params["final_norm"]["scale"], eps) @ head, taken


def greedy(config, params, prompt, steps, decisions):
    """(tokens made, decisions): the prompt decides, what follows obeys."""
    tokens, made = list(prompt), []
    for _ in range(steps):
        logits, decisions = forward(config, params, tokens, decisions, len(prompt))
        made.append(int(logits[-1].argmax()))
        tokens.append(made[-1])
    return made, decisions
