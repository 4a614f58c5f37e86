#!/usr/bin/env python3
"""Checks the numeric oracle (docs/oracle.md) against a second implementation of the model, in PyTorch with autograd.

It was written from the equations of the model alone, not from the C++ code, so that a mistake would have to be made
twice to stay unseen. It reads an oracle file, computes every tensor in it anew from the given ones, in float64, and
compares. In float32 or bfloat16 it writes what PyTorch makes of the same weights: a candidate for `ref_cpu compare`.
It is a development check: no user of the model needs it, nor does `make test`.

    python3 -m pip install torch numpy safetensors
    ./ref_cpu oracle --seq-len 9 --chunk 4 --out oracle.safetensors
    python3 test/check_pytorch.py oracle.safetensors            # worst error of each group; exit 1 if any above 1e-9
    python3 test/check_pytorch.py --list *.safetensors          # one line for each file
    python3 test/check_pytorch.py oracle.safetensors --dtype bfloat16 --device cuda --out candidate.safetensors

An error is the RMS of the difference over the RMS of the oracle's tensor, where an RMS below 1e-6 counts as 1e-6, so
that a gradient that is zero but for rounding can be compared; integers must be equal. In float32 and bfloat16 errors
are printed, and judged if --tolerance is given. A value that is not finite, a tensor that is missing, unknown or not in
its place always fails.

B sequences, T tokens, D width, H heads, Hkv key/value heads, P head dimension, N state size, Q chunk length,
F feed-forward width, V vocabulary.
"""
import argparse
import hashlib
import json
import math
import re
import sys

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file


class Mismatch(Exception):
    """The file is not what docs/oracle.md promises."""


# ---- 1. The parts of the model, in the precision `high`: float64 or float32

def rmsnorm(x, weight, eps):
    """x (..., D), weight (D) -> rstd (...) = 1 / sqrt(mean(x^2) + eps), y = x rstd weight"""
    x = x.to(weight.dtype)
    rstd = (x.square().mean(-1) + eps).rsqrt()
    return rstd, x * rstd[..., None] * weight


def rope(x, start, theta):
    """x (B,T,heads,d): turns the pair (j, j + d/2) of token t by (start + t) theta^(-2j/d); tables made in double"""
    T, d = x.shape[1], x.shape[3]
    position = torch.arange(start, start + T, dtype=torch.float64)
    angle = position[:, None] * theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)  # (T,d/2)
    cos, sin = (t[:, None].to(x) for t in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def attention(q, k, v):
    """Causal softmax(q k^T / sqrt(P)) v. q (B,T,H,P); k, v (B,S,Hkv,P), of which the last T belong to the queries.
    Query head h reads key/value head h / (H / Hkv). -> lse (B,T,H), y (B,T,H,P)"""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthp,bshp->bths", q, k) / math.sqrt(q.shape[3])
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (t,s): s <= t + S - T
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return lse, torch.einsum("bths,bshp->bthp", (scores - lse[..., None]).exp(), v)


def ssd_dt(dt_raw, dt_bias, A_log, decay):
    """dt_raw (B,T,H); dt_bias, A_log (H) -> dt = softplus(dt_raw + dt_bias), dA = log a = -exp(A_log) dt.
    Without decay dA is a constant 0: it has a gradient, and passes none on to dt and A_log."""
    dt = torch.nn.functional.softplus(dt_raw.to(dt_bias) + dt_bias)
    return dt, -A_log.exp() * dt if decay else torch.zeros_like(dt, requires_grad=True)


def ssd_chunked(C, B, X, dt, dA, S, Q):
    """S_t = exp(dA_t) S_{t-1} + dt_t X_t (x) B_t, Y_t = S_t C_t, in chunks of Q tokens. C, B (B,T,H,N), X (B,T,H,P),
    dt, dA (B,T,H), S (B,H,P,N) -> cs (B,T,H), the list of states before, between and after the chunks, y (B,T,H,P)"""
    cs = torch.cat([part.cumsum(1) for part in dA.split(Q, 1)], 1)
    states, ys = [S], []
    for c, b, x, d, s in zip(*(t.split(Q, 1) for t in (C, B, X, dt, cs))):
        t = torch.arange(c.shape[1], device=c.device)
        later = (t[None, :] > t[:, None])[..., None]  # (t,s,1): s > t, which t does not see; masked before exp
        mask = (s[:, :, None] - s[:, None]).masked_fill(later, -torch.inf).exp()  # (B,t,s,H): a_{s+1} ... a_t
        scores = torch.einsum("bthn,bshn->btsh", c, b) * mask
        y = torch.einsum("btsh,bsh,bshp->bthp", scores, d, x)
        ys.append(y + s.exp()[..., None] * torch.einsum("bthn,bhpn->bthp", c, S))
        last = s[:, -1:]
        S = last[:, 0, :, None, None].exp() * S + torch.einsum("bsh,bshp,bshn->bhpn", (last - s).exp() * d, x, b)
        states.append(S)
    return cs, states, torch.cat(ys, 1)


def ssd_recurrent(C, B, X, dt, dA, S):
    """The same, token by token: for decoding. -> S after the last token, y"""
    ys = []
    for t in range(C.shape[1]):
        S = dA[:, t, :, None, None].exp() * S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], X[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]))
    return S, torch.stack(ys, 1)


def swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def cross_entropy(logits, targets):
    """logits (B,T,V), targets (B,T) -> nats (B,T)"""
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]


# ---- 2. The model. Matrix products, activations and the residual stream are in `low`, that is `high` or bfloat16.
# Parameters are kept in `high`, the optimizer's master weights, and rounded where they are multiplied. Norms, dt,
# decay, scan, states, softmax and loss are in `high`.

def is_attention(config, i):
    return config["attn_layer_period"] > 0 and i % config["attn_layer_period"] == config["attn_layer_offset"]


def parameter_shapes(config):
    D, H, Hkv, N, F, V = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads",
                                                  "ssd_state_size", "intermediate_size", "vocab_size"))
    ssd = {"c_proj.weight": (H * N, D), "b_proj.weight": (H * N, D), "x_proj.weight": (D, D), "dt_proj.weight": (H, D),
           "out_proj.weight": (D, D), "A_log": (H,), "dt_bias": (H,)}
    attn = {"q_proj.weight": (D, D), "k_proj.weight": (Hkv * D // H, D), "v_proj.weight": (Hkv * D // H, D),
            "o_proj.weight": (D, D)}
    common = {"pre_sequence_layernorm": (D,), "post_sequence_residual": (D,), "pre_state_layernorm": (D,),
              "feed_forward.gate_proj": (F, D), "feed_forward.up_proj": (F, D), "feed_forward.down_proj": (D, F),
              "post_state_residual": (D,)}
    shapes = {"model.word_embed.weight": (V, D), "model.final_layernorm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        mixer, of = ("attn.", attn) if is_attention(config, i) else ("ssd.", ssd)
        shapes |= {f"model.layers.{i}.{mixer}{name}": shape for name, shape in of.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in common.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (V, D)}


class Model:
    def __init__(self, config, weights, Q, low, high):
        self.config, self.w, self.Q, self.low, self.high = config, weights, Q, low, high
        self.H, self.P = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]

    def keep(self, name, value):
        """Names an activation, after rounding it to `low`."""
        self.trace[name] = value.to(self.low)
        return self.trace[name]

    def linear(self, u, name):
        return u @ self.w[name + ".weight"].to(self.low).T

    def rotate(self, x):
        return rope(x.to(self.high), self.start, self.config["rope_theta"])

    def forward(self, tokens, cache=None):
        """tokens (B,T) -> logits (B,T,V), and all tensors by name in self.trace. Without a cache from the zero state,
        chunk by chunk; with one, a dict of "position" and the states by name, on from there, token by token."""
        eps = self.config["rms_norm_eps"]
        self.trace, self.start = {}, cache["position"] if cache is not None else 0
        E = self.w["model.word_embed.weight"]
        x = self.keep("embedding", E[tokens])
        for i in range(self.config["num_hidden_layers"]):
            at, w = f"layers.{i}.", lambda name: self.w[f"model.layers.{i}.{name}.weight"]
            u = self.keep(at + "norm1", rmsnorm(x, w("pre_sequence_layernorm"), eps)[1])
            m = (self.attention if is_attention(self.config, i) else self.ssd)(at, u, cache)
            x = self.keep(at + "residual1", w("post_sequence_residual") * x + m)
            u = self.keep(at + "norm2", rmsnorm(x, w("pre_state_layernorm"), eps)[1])
            gate = self.keep(at + "ffn.gate", self.linear(u, f"model.{at}feed_forward.gate_proj"))
            up = self.keep(at + "ffn.up", self.linear(u, f"model.{at}feed_forward.up_proj"))
            hidden = self.keep(at + "ffn.hidden", swiglu(gate.to(self.high), up.to(self.high)))
            m = self.keep(at + "ffn.out", self.linear(hidden, f"model.{at}feed_forward.down_proj"))
            x = self.keep(at + "residual2", w("post_state_residual") * x + m)
        u = self.keep("final_norm", rmsnorm(x, self.w["model.final_layernorm.weight"], eps)[1])
        if cache is not None:
            cache["position"] += tokens.shape[1]
        head = E if self.config["tie_word_embeddings"] else self.w["lm_head.weight"]
        return self.keep("logits", u @ head.to(self.low).T)

    def ssd(self, at, u, cache):
        layer, at = at, at + "ssd."
        heads = lambda name: self.linear(u, f"model.{at}{name}_proj").unflatten(-1, (self.H, -1))
        C = self.keep(at + "C_before_rope", heads("c"))
        B = self.keep(at + "B_before_rope", heads("b"))
        X = self.keep(at + "X", heads("x"))
        dt_raw = self.keep(at + "dt_raw", self.linear(u, f"model.{at}dt_proj"))
        C = self.keep(at + "C", self.rotate(C)).to(self.high)
        B = self.keep(at + "B", self.rotate(B)).to(self.high)
        dt, dA = ssd_dt(dt_raw, self.w[f"model.{at}dt_bias"], self.w[f"model.{at}A_log"], self.config["ssd_decay"])
        self.trace |= {at + "dt": dt, at + "dA": dA}
        zero = u.new_zeros(u.shape[0], self.H, self.P, C.shape[-1], dtype=self.high, requires_grad=True)
        if cache is None:
            cs, states, y = ssd_chunked(C, B, X.to(self.high), dt, dA, zero, self.Q)
            self.trace |= {at + "cs": cs, at + "state_in": states[:-1], at + "state_out": states[1:]}
            self.trace[at + "final_state"] = states[-1]
        else:
            state = layer + "ssm_state"
            cache[state], y = ssd_recurrent(C, B, X.to(self.high), dt, dA, cache.get(state, zero))
            cache[layer + "y"] = y[:, -1]
        return self.keep(at + "out", self.linear(self.keep(at + "y", y).flatten(2), f"model.{at}out_proj"))

    def attention(self, at, u, cache):
        layer, at = at, at + "attn."
        heads = lambda name: self.linear(u, f"model.{at}{name}_proj").unflatten(-1, (-1, self.P))
        q = self.keep(at + "q_before_rope", heads("q"))
        k = self.keep(at + "k_before_rope", heads("k"))
        v = self.keep(at + "v", heads("v"))
        q = self.keep(at + "q", self.rotate(q))
        k = self.keep(at + "k", self.rotate(k))
        if cache is not None:
            k = cache[layer + "k"] = torch.cat((cache[layer + "k"], k), 1) if self.start else k
            v = cache[layer + "v"] = torch.cat((cache[layer + "v"], v), 1) if self.start else v
        lse, y = attention(q.to(self.high), k.to(self.high), v.to(self.high))
        self.trace[at + "lse"] = lse
        if cache is not None:
            cache[layer + "y"] = y[:, -1]
        return self.keep(at + "out", self.linear(self.keep(at + "y", y).flatten(2), f"model.{at}o_proj"))


# the order of the backward pass
FFN = "residual2 ffn.out ffn.hidden ffn.gate ffn.up norm2 residual1"
SSD = ("ssd.out ssd.y ssd.state_out ssd.state_in ssd.X ssd.B ssd.C ssd.dA ssd.dt ssd.dt_raw ssd.B_before_rope "
       "ssd.C_before_rope")
ATTENTION = "attn.out attn.y attn.v attn.k attn.q attn.k_before_rope attn.q_before_rope"


def gradients(objective, nodes):
    """d objective / d node for each named tensor, or list of states; zero where the objective does not depend on it."""
    flat = [t for v in nodes.values() for t in (v if isinstance(v, list) else [v])]
    found = iter(torch.autograd.grad(objective, flat, allow_unused=True, materialize_grads=True))
    return {"grad." + name: [next(found) for _ in v] if isinstance(v, list) else next(found)
            for name, v in nodes.items()}


def compute_model(given, meta, low, high):
    """Every tensor that docs/oracle.md promises for a model, in its order."""
    config, Q, tokens, targets = meta["config"], meta["chunk_length"], given["tokens"], given["targets"]
    shapes = parameter_shapes(config)
    weights = {name: t.to(high, copy=True).requires_grad_() for name, t in given.items() if name in shapes}
    model = Model(config, weights, Q, low, high)

    logits = model.forward(tokens)
    losses = cross_entropy(logits.to(high), targets)
    loss = objective = losses.mean()
    for name, cotangent in given.items():
        if name.startswith("cotangent."):
            objective = objective + (cotangent * model.trace[name.removeprefix("cotangent.")]).sum()
    out = {**model.trace, "losses": losses, "loss": loss, "objective": objective}

    names = ["logits", "final_norm"]
    for i in reversed(range(config["num_hidden_layers"])):
        mixer = ATTENTION if is_attention(config, i) else SSD
        names += [f"layers.{i}.{name}" for name in f"{FFN} {mixer} norm1".split()]
    nodes = {name: model.trace[name] for name in names + ["embedding"]}
    out |= gradients(objective, nodes | {name: weights[name] for name in reversed(weights)})
    out |= decode(model, tokens) | adamw(model, tokens, targets, meta["adamw"])
    cases = zip(*(given["sampler." + name].double().cpu().numpy() for name in ("logits", "uniform", "settings")))
    return out | {"sampler.token": torch.tensor([sample(*case) for case in cases])}


@torch.no_grad()
def decode(model, tokens):
    """One call consumes `split` tokens, single tokens follow; the cache and the last token's logits after each call."""
    T, out = tokens.shape[1], {}
    for split in sorted({1, model.Q - 1, model.Q, model.Q + 1}):
        cache = {"position": 0}
        for n in range(split, min(split + 4, T) + 1) if 1 <= split < T else ():
            logits = model.forward(tokens[:, cache["position"]:n], cache)
            after = cache | {"position": torch.tensor(cache["position"]), "logits": logits[:, -1]}
            out |= {f"decode.split_{split}.after_{n}.{name}": value for name, value in after.items()}
    return out


def adamw(model, tokens, targets, a):
    """Steps on the same tokens, with the gradient of the loss alone; decay on matrices only. Changes the weights."""
    losses, norms, sizes = [], [], {name: [] for name in model.w}
    m, v = ({name: torch.zeros_like(w) for name, w in model.w.items()} for _ in range(2))
    for step in range(1, a["steps"] + 1):
        loss = cross_entropy(model.forward(tokens).to(model.high), targets).mean()
        grads = {name: g.detach() for name, g in gradients(loss, model.w).items()}
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        losses.append(loss.detach())
        norms.append(norm)
        with torch.no_grad():
            for name, w in model.w.items():
                g = grads["grad." + name] * (a["clip"] / norm).clamp(max=1)
                m[name] = a["beta1"] * m[name] + (1 - a["beta1"]) * g
                v[name] = a["beta2"] * v[name] + (1 - a["beta2"]) * g * g
                m_hat, v_hat = m[name] / (1 - a["beta1"] ** step), v[name] / (1 - a["beta2"] ** step)
                decay = a["weight_decay"] if w.dim() == 2 else 0
                w -= a["lr"] * (m_hat / (v_hat.sqrt() + a["eps"]) + decay * w)
                sizes[name].append(w.square().sum().sqrt())
    out = {"loss": losses, "grad_norm": norms, **{"param_norm." + name: size for name, size in sizes.items()}}
    return {"adamw." + name: torch.stack(value) for name, value in out.items() if value}


def sample(logits, uniform, settings):
    """One token from logits (V), by docs/oracle.md. NumPy, in double."""
    temperature, top_k, top_p, min_p = settings
    if temperature == 0:
        return int(logits.argmax())  # the first of equals
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")  # most probable first, lower ids first among equals
    order = order[:int(top_k)] if top_k > 0 else order
    share = p[order].cumsum() / p[order].sum()
    order = order[:np.searchsorted(share, top_p) + 1]  # up to and with the first share >= top_p
    kept = np.sort(order[p[order] >= min_p * p.max()])
    total = p[kept].cumsum()
    return int(kept[min(np.searchsorted(total, uniform * total[-1], side="right"), len(kept) - 1)])


# ---- 3. Single ops

def op_ssd(i, config):
    dt, dA = ssd_dt(i["dt_raw"], i["dt_bias"], i["A_log"], config["ssd_decay"])
    cs, states, y = ssd_chunked(i["C"], i["B"], i["X"], dt, dA, i["initial_state"], config["Q"])
    return dict(dt=dt, dA=dA, cs=cs, state_in=states[:-1], state_out=states[1:], final_state=states[-1], y=y)


# the given tensors and their shapes, the function of them, the outputs with a cotangent, the tensors with a gradient
OPS = {
    "ssd": (dict(C="B T H N", B="B T H N", X="B T H P", dt_raw="B T H", dt_bias="H", A_log="H",
                 initial_state="B H P N"), op_ssd, "y final_state", "C B X dA dt dt_raw dt_bias A_log initial_state"),
    "attention": (dict(q="B T H P", k="B T Hkv P", v="B T Hkv P"),
                  lambda i, config: dict(zip(("lse", "y"), attention(i["q"], i["k"], i["v"]))), "y", "q k v"),
    "rmsnorm": (dict(x="B T D", weight="D"),
                lambda i, config: dict(zip(("rstd", "y"), rmsnorm(i["x"], i["weight"], config["norm_eps"]))),
                "y", "x weight"),
    "rope": (dict(x="B T H P"), lambda i, config: dict(y=rope(i["x"], 0, config["rope_theta"])), "y", "x"),
    "linear": (dict(x="B T D", weight="F D"), lambda i, config: dict(y=i["x"] @ i["weight"].T), "y", "x weight"),
    "embedding": (dict(tokens="B T", weight="V D"), lambda i, config: dict(y=i["weight"][i["tokens"]]), "y", "weight"),
    "swiglu": (dict(gate="B T F", up="B T F"),
               lambda i, config: dict(hidden=swiglu(i["gate"], i["up"])), "hidden", "gate up"),
    "residual": (dict(x="B T D", m="B T D", weight="D"),
                 lambda i, config: dict(y=i["weight"] * i["x"] + i["m"]), "y", "x m weight"),
    "cross_entropy": (dict(logits="B T V", targets="B T"),
                      lambda i, config: dict(losses=cross_entropy(i["logits"], i["targets"])), "losses", "logits"),
}


def compute_op(given, meta, low, high):
    _, function, differentiated, wanted = OPS[meta["kind"]]
    nodes = {name: t.to(high if t.dim() == 1 or name == "initial_state" else low).requires_grad_()
             for name, t in given.items() if t.is_floating_point()}
    out = function({name: nodes[name].to(high) if name in nodes else t for name, t in given.items()}, meta["config"])
    out |= {name: out[name].to(low) for name in ("y", "hidden") if name in out}
    objective = sum((given["cotangent." + name] * out[name]).sum() for name in differentiated.split())
    return out | gradients(objective, {name: (nodes | out)[name] for name in wanted.split()})


# ---- 4. The file, the comparison, the command

def given_shapes(meta, tensors):
    """The tensors that the file must give, and their shapes; fills in the defaults of the configuration."""
    config = meta["config"]
    if meta["kind"] != "model":
        config |= {"rope_theta": 10000.0, "norm_eps": 1e-6, "ssd_decay": True} | config
        given, _, differentiated, _ = OPS[meta["kind"]]
        shapes = {name: tuple(config[d] for d in text.split()) for name, text in given.items()}
        return shapes | {name: tensors[name].shape for name in ("cotangent." + n for n in differentiated.split())}
    defaults = {"attn_layer_period": 8, "attn_layer_offset": 7, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
                "ssd_decay": True, "tie_word_embeddings": True, "num_key_value_heads": config["num_attention_heads"],
                "ssd_state_size": config["hidden_size"] // config["num_attention_heads"]}
    config |= {key: value for key, value in defaults.items() if config.get(key) is None}
    (B, T), n = tensors["tokens"].shape, len(tensors["sampler.uniform"])
    H, N = config["num_attention_heads"], config["ssd_state_size"]
    cotangents = {f"cotangent.layers.{i}.ssd.final_state": (B, H, config["hidden_size"] // H, N)
                  for i in range(config["num_hidden_layers"]) if not is_attention(config, i)}
    return {"tokens": (B, T), "targets": (B, T), **parameter_shapes(config),
            **(cotangents if any(name in tensors for name in cotangents) else {}),
            "sampler.logits": (n, config["vocab_size"]), "sampler.uniform": (n,), "sampler.settings": (n, 4)}


def read_oracle(path):
    """-> the metadata, its JSON parsed; all tensors in the order of the file; the names of the given ones"""
    with open(path, "rb") as f:
        data = f.read()
    unordered = load(data)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    meta = header.pop("__metadata__", {})
    if (meta.get("schema"), meta.get("precision")) != ("transxssm-oracle-1", "fp64"):
        raise Mismatch(f"expected schema transxssm-oracle-1 and precision fp64, found {meta.get('schema')} and "
                       f"{meta.get('precision')}")
    meta |= {key: json.loads(meta[key]) for key in ("config", "chunk_length", "adamw", "noise") if key in meta}
    tensors = {name: unordered[name] for name in sorted(header, key=lambda n: header[n]["data_offsets"])}
    shapes = given_shapes(meta, tensors)
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise Mismatch(f"{name}: expected {shape}, found {tensors[name].shape if name in tensors else 'none'}")
    given = [name for name in tensors if name in shapes]
    hashed = [name for name in given if not name.startswith("sampler.")]
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in hashed)).hexdigest()
    if digest != meta.get("inputs_sha256"):
        raise Mismatch(f"inputs_sha256: the metadata says {meta.get('inputs_sha256')}, the data {digest}")
    return meta, tensors, given


def relative_error(value, reference):
    """RMS of the difference over the RMS of the reference; infinite if that is not finite or integers differ"""
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else math.inf
    rms = lambda t: t.double().square().mean().sqrt().item() if t.numel() else 0.0
    error = rms(value.double() - reference) / max(rms(reference), 1e-6)
    return error if math.isfinite(error) else math.inf


def group_of(name):
    grad, base = re.fullmatch(r"(grad\.)?(.*)", name).groups(default="")
    group = re.match(r"layers\.\d+|embedding|decode|adamw|sampler", base)
    return grad + (group.group() if group else "parameters" if base.startswith(("model.", "lm_head.")) else "outputs")


def check(path, args):
    """Recomputes the file and compares. -> problems (text), {group: (its worst error, name)}"""
    meta, tensors, given_names = read_oracle(path)
    low = getattr(torch, args.dtype)
    high = torch.float64 if low == torch.float64 else torch.float32
    given = {name: tensors[name].to(args.device) for name in given_names}
    found = (compute_model if meta["kind"] == "model" else compute_op)(given, meta, low, high)
    found = {name: torch.stack(t, 2) if isinstance(t, list) else t for name, t in found.items()}
    found = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in found.items()}

    problems = [f"{name}: promised, but not in the file" for name in found if name not in tensors]
    problems += [f"{name}: in the file, but unknown" for name in tensors if name not in found and name not in given]
    problems += [f"{name}: metadata noise expected 4 finite numbers, found {meta['noise'].get(name)}"
                 for name, t in found.items() if t.is_floating_point()
                 and not (len(n := meta["noise"].get(name, ())) == 4 and np.isfinite(n).all())]
    order = [name for name in tensors if name in found]
    problems += [f"{name}: in the file where {expected} is expected"
                 for name, expected in zip(order, (n for n in found if n in tensors)) if name != expected][:1]
    worst = {}
    for name in order:
        reference, value = tensors[name], found[name]
        dtype = torch.float64 if value.is_floating_point() else torch.int64
        if (reference.dtype, reference.shape) != (dtype, value.shape):
            problems.append(f"{name}: expected {dtype} {value.shape}, found {reference.dtype} {reference.shape}")
            continue
        error = relative_error(value, reference)
        if not (error <= args.tolerance and error < math.inf):
            problems.append(f"{name}: relative RMS {error:.3e}, tolerance {args.tolerance:g}")
        if error >= worst.setdefault(group_of(name), (error, name))[0]:
            worst[group_of(name)] = (error, name)
    if args.out:
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items() if k != "noise"}
        text["precision"] = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}[args.dtype]
        save_file({name: tensors[name] for name in given_names} | found, args.out, text)
    return problems, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="written by `ref_cpu oracle`")
    parser.add_argument("--list", action="store_true", help="one line for each file")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float64", help="(float64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--tolerance", type=float, help="largest relative RMS (1e-9 in float64; else none)")
    parser.add_argument("--out", metavar="CANDIDATE", help="write what was computed, for `ref_cpu compare`")
    args = parser.parse_args()
    if args.out and len(args.files) > 1:
        parser.error(f"--out: expected one FILE, found {len(args.files)}")
    if args.tolerance is None:
        args.tolerance = 1e-9 if args.dtype == "float64" else math.inf
    failed = 0
    for path in args.files:
        try:
            problems, worst = check(path, args)
        except (Mismatch, OSError, ValueError, KeyError, SafetensorError) as error:
            problems, worst = [f"{type(error).__name__}: {error}"], {}
        verdict = f"FAILED: {len(problems)} problems" if problems else "ok"
        failed += bool(problems)
        if args.list:
            figures = [f"{group} {error:.1e}" for group, (error, _) in worst.items()]
            print(f"{path}: {verdict};", *problems[:1], *figures, flush=True)
            continue
        print(f"{path}, {args.dtype}: {verdict}")
        for group, (error, name) in worst.items():
            print(f"    {group:<16} {error:.2e}  {name}")
        for problem in problems[:20]:
            print("    " + problem)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
