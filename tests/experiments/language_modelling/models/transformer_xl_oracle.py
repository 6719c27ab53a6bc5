"""Transformer-XL in plain NumPy, float64, a token at a time and with a memory that grows.

Written from the paper and from how the reference behaves, under the reference's names.
"""

from itertools import pairwise

import numpy as np

DEFAULTS = {
    "n_token": 11, "n_layer": 2, "n_head": 2, "d_model": 6, "d_head": 3, "d_inner": 5,
    "dropout": 0.3, "dropatt": 0.2, "tie_weight": True, "d_embed": None, "div_val": 1,
    "tie_projs": [False], "pre_lnorm": False, "tgt_len": 4, "ext_len": 0, "mem_len": 6,
    "cutoffs": [], "same_length": False, "attn_type": 0, "clamp_len": -1,
}  # fmt: skip


def _widths(cfg):
    embed = cfg["d_embed"] or cfg["d_model"]
    return [embed // cfg["div_val"] ** i for i in range(len(cfg["cutoffs"]) + 1)]


def _ranges(cfg):
    ends = [0, *cfg["cutoffs"], cfg["n_token"]]
    return list(pairwise(ends))


def random_weights(cfg, seed=0):
    rng = np.random.default_rng(seed)
    d, hc, inner = cfg["d_model"], cfg["n_head"] * cfg["d_head"], cfg["d_inner"]
    widths, ranges = _widths(cfg), _ranges(cfg)
    weights = {}

    def add(name, *shape):
        weights[name] = rng.normal(0, 0.4, shape).astype(np.float32)

    for i in range(cfg["n_layer"]):
        at, ff = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"
        add(f"{at}.qkv_net.weight", 3 * hc, d)
        add(f"{at}.o_net.weight", d, hc)
        add(f"{at}.r_net.weight", hc, d)
        add(f"{ff}.CoreNet.0.weight", inner, d)
        add(f"{ff}.CoreNet.0.bias", inner)
        add(f"{ff}.CoreNet.3.weight", d, inner)
        add(f"{ff}.CoreNet.3.bias", d)
        for norm in (at, ff):
            add(f"{norm}.layer_norm.weight", d)
            weights[f"{norm}.layer_norm.weight"] += 1
            add(f"{norm}.layer_norm.bias", d)
    for where in (
        [f"layers.{i}.dec_attn." for i in range(cfg["n_layer"])] if cfg.get("untie_r") else [""]
    ):
        add(f"{where}r_w_bias", cfg["n_head"], cfg["d_head"])
        add(f"{where}r_r_bias", cfg["n_head"], cfg["d_head"])
    tables = [(cfg["n_token"], widths[0])]
    if cfg["div_val"] != 1:
        tables = [(high - low, w) for (low, high), w in zip(ranges, widths, strict=True)]
    for i, (n, w) in enumerate(tables):
        add(f"word_emb.emb_layers.{i}.weight", n, w)
        add(f"crit.out_layers.{i}.weight", n, w)
        add(f"crit.out_layers.{i}.bias", n)
        if cfg["tie_weight"]:
            weights[f"crit.out_layers.{i}.weight"] = weights[f"word_emb.emb_layers.{i}.weight"]
    if cfg["div_val"] != 1 or widths[0] != d:
        for i, (_, w) in enumerate(tables):
            add(f"word_emb.emb_projs.{i}", d, w)
        for i, w in enumerate(widths):
            add(f"crit.out_projs.{i}", d, w)
            if i < len(cfg["tie_projs"]) and cfg["tie_projs"][i]:
                source = 0 if cfg["div_val"] == 1 else i
                weights[f"crit.out_projs.{i}"] = weights[f"word_emb.emb_projs.{source}"]
    if cfg["cutoffs"]:
        add("crit.cluster_weight", len(cfg["cutoffs"]), widths[0])
        add("crit.cluster_bias", len(cfg["cutoffs"]))
    return weights


def _norm(weights, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.layer_norm.weight"] + weights[f"{name}.layer_norm.bias"]


def _position(distance, cfg):
    if cfg["clamp_len"] > 0:
        distance = min(distance, cfg["clamp_len"])
    angles = distance / 10000 ** (np.arange(0, cfg["d_model"], 2) / cfg["d_model"])
    return np.concatenate([np.sin(angles), np.cos(angles)])


def _attend(weights, cfg, i, x_TxD, memory_MxD):
    """Attention of layer i for one lane, before residual sum and norm."""
    name, c = f"layers.{i}.dec_attn", cfg["d_head"]
    context = np.concatenate([memory_MxD, x_TxD])
    if cfg["pre_lnorm"]:
        context = _norm(weights, name, context)
    q, k, v = np.split(context @ weights[f"{name}.qkv_net.weight"].T, 3, axis=-1)
    own = f"{name}." if cfg.get("untie_r") else ""
    w_bias, r_bias = weights[f"{own}r_w_bias"], weights[f"{own}r_r_bias"]
    out = np.zeros((len(x_TxD), cfg["n_head"] * c))
    for t in range(len(x_TxD)):
        now = len(memory_MxD) + t
        first = max(0, now - cfg["mem_len"] + 1) if cfg["same_length"] else 0
        keys = range(first, now + 1)
        r = np.stack([_position(now - j, cfg) for j in keys]) @ weights[f"{name}.r_net.weight"].T
        for h in range(cfg["n_head"]):
            part = slice(h * c, (h + 1) * c)
            scores = k[first : now + 1, part] @ (q[now, part] + w_bias[h])
            scores = (scores + r[:, part] @ (q[now, part] + r_bias[h])) / np.sqrt(c)
            p = np.exp(scores - scores.max())
            out[t, part] = p / p.sum() @ v[first : now + 1, part]
    return out @ weights[f"{name}.o_net.weight"].T


def _feed_forward(weights, name, x):
    h = np.maximum(x @ weights[f"{name}.CoreNet.0.weight"].T + weights[f"{name}.CoreNet.0.bias"], 0)
    return h @ weights[f"{name}.CoreNet.3.weight"].T + weights[f"{name}.CoreNet.3.bias"]


def _layer(weights, cfg, i, x, memory):
    at, ff = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"
    x = x + _attend(weights, cfg, i, x, memory)
    if cfg["pre_lnorm"]:
        return x + _feed_forward(weights, ff, _norm(weights, ff, x))
    x = _norm(weights, at, x)
    return _norm(weights, ff, x + _feed_forward(weights, ff, x))


def _embed(weights, cfg, token):
    i = next(i for i, (_, high) in enumerate(_ranges(cfg)) if token < high)
    if cfg["div_val"] == 1:
        i, row = 0, token
    else:
        row = token - _ranges(cfg)[i][0]
    x = weights[f"word_emb.emb_layers.{i}.weight"][row]
    projection = weights.get(f"word_emb.emb_projs.{i}")
    return (x if projection is None else projection @ x) * np.sqrt(cfg["d_model"])


def _log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def _output(weights, cfg, i):
    low, high = _ranges(cfg)[i]
    if cfg["div_val"] == 1:
        table, bias = weights["crit.out_layers.0.weight"], weights["crit.out_layers.0.bias"]
        return table[low:high], bias[low:high]
    return weights[f"crit.out_layers.{i}.weight"], weights[f"crit.out_layers.{i}.bias"]


def _log_probs(weights, cfg, i, hidden):
    table, bias = _output(weights, cfg, i)
    if i == 0 and cfg["cutoffs"]:
        table = np.concatenate([table, weights["crit.cluster_weight"]])
        bias = np.concatenate([bias, weights["crit.cluster_bias"]])
    projection = weights.get(f"crit.out_projs.{i}")
    hidden = hidden if projection is None else hidden @ projection
    return _log_softmax(table @ hidden + bias)


def _nll(weights, cfg, hidden, target):
    i = next(i for i, (_, high) in enumerate(_ranges(cfg)) if target < high)
    head = _log_probs(weights, cfg, 0, hidden)
    if i == 0:
        return -head[target]
    tail = _log_probs(weights, cfg, i, hidden)
    return -(head[-i] + tail[target - _ranges(cfg)[i][0]])


def segment(weights, cfg, tokens_TxB, targets_TxB, memories):
    """nll [T, B] and the next memories, a list over layer inputs of [M, B, D]."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    t, b = tokens_TxB.shape
    nll, hiddens = np.zeros((t, b)), []
    for lane in range(b):
        x = np.stack([_embed(weights, cfg, token) for token in tokens_TxB[:, lane]])
        inputs = [x]
        for i in range(cfg["n_layer"]):
            x = _layer(weights, cfg, i, x, memories[i][:, lane])
            inputs.append(x)
        hiddens.append(inputs)
        for s in range(t):
            nll[s, lane] = _nll(weights, cfg, x[s], targets_TxB[s, lane])
    new = [np.stack([h[i] for h in hiddens], 1) for i in range(cfg["n_layer"] + 1)]
    joined = [np.concatenate([old, h]) for old, h in zip(memories, new, strict=True)]
    return nll, [x[max(0, len(x) - cfg["mem_len"]) :] for x in joined]


def golden(cfg, segments=3, batch=2, seed=0):
    """Arrays as in the golden files, without gradients, and the last segment's mean nll of θ."""
    rng = np.random.default_rng(seed + 1)
    weights, t = random_weights(cfg, seed), cfg["tgt_len"]
    tokens = rng.integers(0, cfg["n_token"], (segments * t + 1, batch))
    memories = [np.zeros((0, batch, cfg["d_model"]))] * (cfg["n_layer"] + 1)
    arrays = {"tokens": tokens} | {f"param/{name}": value for name, value in weights.items()}
    for s in range(segments):
        before = memories
        window = tokens[s * t : (s + 1) * t], tokens[s * t + 1 : (s + 1) * t + 1]
        arrays[f"nll/{s}"], memories = segment(weights, cfg, *window, before)
        if cfg["mem_len"]:
            arrays |= {f"mem/{s}/{i}": memory for i, memory in enumerate(memories)}

    def last_loss(other):
        return segment(other, cfg, *window, before)[0].mean()

    return arrays, weights, last_loss
