"""Tiny published models: random weights, the files that hold them, and a forward pass in NumPy.

Independent of the library: weights as Hugging Face names them, RoPE in both published forms.
"""

import json

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import save_file

BASE = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "smollm2": BASE | {"tie_word_embeddings": True},
    "llama3": BASE | {"rope_scaling": LLAMA3_ROPE, "attention_bias": False},
    "linear": {k: v for k, v in BASE.items() if k != "rope_theta"}
    | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}},
    "mistral": BASE | {"model_type": "mistral", "head_dim": 16, "sliding_window": 48},
    "qwen2": BASE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False},
}


def head_dim(config):
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def random_tensors(config, seed=0):
    """Weights that give logits of order 1, norms and biases far from their initial values."""
    rng = np.random.default_rng(seed)
    V, D, F = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], head_dim(config)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (D,),
            at + "post_attention_layernorm.weight": (D,),
            at + "self_attn.q_proj.weight": (N * H, D),
            at + "self_attn.k_proj.weight": (K * H, D),
            at + "self_attn.v_proj.weight": (K * H, D),
            at + "self_attn.o_proj.weight": (D, N * H),
            at + "mlp.gate_proj.weight": (F, D),
            at + "mlp.up_proj.weight": (F, D),
            at + "mlp.down_proj.weight": (D, F),
        }
        if config["model_type"] == "qwen2":
            shapes |= {at + f"self_attn.{c}_proj.bias": (n * H,) for c, n in zip("qkv", (N, K, K))}
        if config["model_type"] == "qwen3":
            shapes |= {at + f"self_attn.{c}_norm.weight": (H,) for c in "qk"}

    def draw(name, shape):
        noise = rng.normal(size=shape).astype(np.float32)
        if "norm" in name:
            return 1 + noise / 4
        return noise if len(shape) == 1 or "embed" in name else 2 * noise / shape[1] ** 0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


def frequencies(config):
    """Radians a token of each pair, slowed as the config says; a loop, as the papers write it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, H = rope.get("rope_theta", config.get("rope_theta")), head_dim(config)
    slowed = []
    for i in range(H // 2):
        frequency = theta ** (-2 * i / H)
        match rope.get("rope_type"):
            case "linear":
                frequency /= rope["factor"]
            case "llama3":
                wavelength = 2 * np.pi / frequency
                old = rope["original_max_position_embeddings"]
                low, high = rope["low_freq_factor"], rope["high_freq_factor"]
                if wavelength > old / low:
                    frequency /= rope["factor"]
                elif wavelength > old / high:
                    smooth = (old / wavelength - low) / (high - low)
                    frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        slowed.append(frequency)
    return np.array(slowed)


def forward(config, tensors, tokens, interleaved=False):
    """Logits [T,V] of tokens [T]; `interleaved` turns neighbours, as GGUF's llama stores them."""
    T, N, K = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    H, eps = head_dim(config), config["rms_norm_eps"]
    turns = np.exp(1j * np.arange(T)[:, None] * frequencies(config))[:, None]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * tensors[name]

    def project(x, name):
        return x @ tensors[name + ".weight"].T + tensors.get(name + ".bias", 0)

    def turn(x):
        low, high = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
        pairs = (low + 1j * high) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (project(h, at + f"self_attn.{c}_proj").reshape(T, -1, H) for c in "qkv")
        if at + "self_attn.q_norm.weight" in tensors:
            q = norm(q, at + "self_attn.q_norm.weight")
            k = norm(k, at + "self_attn.k_norm.weight")
        q, k = turn(q), turn(k)
        mixed = np.empty((T, N, H))
        for n in range(N):
            group = n // (N // K)
            scores = q[:, n] @ k[:, group].T / np.sqrt(H)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, n] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        x = x + project(mixed.reshape(T, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = project(h, at + "mlp.gate_proj")
        x = x + project(
            gate / (1 + np.exp(-gate)) * project(h, at + "mlp.up_proj"), at + "mlp.down_proj"
        )
    x = norm(x, "model.norm.weight")
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    return x @ tensors[head].T


def write_folder(folder, config, tensors, shards=1, dtype=np.float32):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for i in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for theirs, ours in _GGUF_NAMES.items():
        name = name.replace(theirs + ".", ours + ".")
    return name


def gguf_tensors(config, tensors):
    """The tensors as a GGUF file has them: llama's q and k with each pair's rows side by side."""
    out = {}
    for name, tensor in tensors.items():
        if config["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            heads = np.split(tensor, tensor.shape[0] // head_dim(config))
            halves = [np.split(head, 2) for head in heads]
            tensor = np.concatenate([row for a, b in halves for pair in zip(a, b) for row in pair])
            tensor = tensor.reshape(tensors[name].shape)
        out[name] = tensor
    return out


def write_gguf(path, config, tensors, kind=GGMLQuantizationType.F32, extra=()):
    """A GGUF file with matrices of some type; `extra` holds (method, arguments) of the writer."""
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim(config))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    writer.add_rope_freq_base(theta)
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", rope["factor"])
    if rope.get("rope_type") == "llama3":
        plain = frequencies(config | {"rope_scaling": None, "rope_theta": theta})
        writer.add_tensor("rope_freqs.weight", np.float32(plain / frequencies(config)))
    if config["model_type"] == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    for name, tensor in gguf_tensors(config, tensors).items():
        wanted = kind if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(tensor, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
