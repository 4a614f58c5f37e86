#!/usr/bin/env python3
"""Times the model in PyTorch beside `transxssm bench`, in one run on one GPU, and prints both with their ratios.

For each case it runs `./transxssm bench CASE --csv ...`, then the same in PyTorch with the same shapes, and writes into --out
CASE.csv (ours), CASE_pytorch.csv (theirs, same columns), CASE.svg (both) and CASE.md (the table). With --doc it also puts
tables and plots into that file, between `<!-- CASE -->` and `<!-- end -->`. A development tool: no user of the model needs it.

    python3 test/bench_pytorch.py                                       # every case, every length
    python3 test/bench_pytorch.py ssd attention --lengths 4096
    python3 test/bench_pytorch.py train --peer-lengths 4096,16384 --doc docs/benchmarks.md   # PyTorch at two of the lengths

The peers, each as fast as PyTorch makes it: bf16 autocast over fp32 weights, fused AdamW, torch.compile, attention by
FlashAttention and by cuDNN, decoding as one CUDA graph. SSD is mamba_ssm's Triton kernel where that package can be imported
(its folders ops/ and utils/ with every __init__.py emptied are enough: name the folder around it with --mamba), else the
chunked form in matrix products, compiled.

B sequences, T tokens, D width, L layers, H heads, P head dimension, N state size, Q chunk length, F feed-forward width,
V vocabulary.
"""
import argparse
import csv
import gc
import math
import os
import re
import shutil
import subprocess
import sys
import time

os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"  # its key lacks the choice of attention: what flash compiled would serve cuDNN, too
import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {  # V, D, L, H, N, F, attn_period, attn_offset, tied head: as in ref_cpu.cpp
    "tiny": (256, 128, 4, 4, 32, 320, 4, 3, True),
    "5m": (256, 256, 8, 4, 64, 512, 8, 7, True),
    "10m": (256, 384, 8, 6, 64, 624, 8, 7, True),
    "320m": (50304, 768, 24, 12, 128, 3072, 8, 7, False),
    "1.3b": (50304, 2048, 24, 32, 128, 4096, 8, 7, True),
}
COLUMNS = ("case,engine,model,what,B,T,runs,ms,ms_25,ms_75,tokens_per_s,bytes,flops,memory,share_of_copy,share_of_gemm,"
           "note").split(",")
FAMILIES = ["hybrid", "transformer", "ssm"]
DEVICE = "cuda"


class Config:
    def __init__(self, preset, family):
        (self.V, self.D, self.L, self.H, self.N, self.F, self.period, self.offset, self.tie) = PRESETS[preset]
        self.P = self.D // self.H
        if family == "transformer":
            self.period, self.offset = 1, 0
        elif family == "ssm":
            self.period = 0

    def is_attention(self, i):
        return self.period > 0 and i % self.period == self.offset


# ---- 1. The layers

def rope(x, cos, sin):
    """x (B,T,H,d): the pair (j, j + d/2) turns; cos, sin (T,1,d/2)"""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def angles(positions, d):
    """positions (T) -> cos, sin (T,1,d/2)"""
    a = positions.float()[:, None] * 10000.0 ** (-torch.arange(0, d, 2, device=positions.device) / d)
    return a.cos()[:, None].bfloat16(), a.sin()[:, None].bfloat16()


def ssd_chunked(X, dt, A, B, C, Q=128):
    """SSD in matrix products. X (b,T,H,P), dt (b,T,H) after softplus, A (H), B and C (b,T,H,N) -> (b,T,H,P)"""
    b, T, H, P = X.shape
    Q = min(Q, T)
    split = lambda t: t.unflatten(1, (T // Q, Q)).movedim(3, 1)  # (b,T,H,...) -> (b,H,chunks,Q,...)
    cs = split(dt * A).cumsum(-1)  # log of the decay since the chunk began
    X, B, C = split(X * dt[..., None].to(X.dtype)), split(B), split(C)
    lower = torch.ones(Q, Q, dtype=torch.bool, device=X.device).tril()
    mask = (cs[..., :, None] - cs[..., None, :]).masked_fill(~lower, -math.inf).exp()
    within = ((C @ B.mT) * mask.to(X.dtype)) @ X
    last = cs[..., -1]  # (b,H,chunks)
    ends = ((X * (last[..., None] - cs).exp()[..., None].to(X.dtype)).mT @ B).float()  # what each chunk adds to the state
    # the state before chunk z: sum over c < z of ends_c, decayed by the chunks in between
    total = last.cumsum(-1)
    before = F.pad(total, (1, 0))[..., :-1]
    n = T // Q
    earlier = torch.ones(n, n, dtype=torch.bool, device=X.device).tril(-1)
    decay = (before[..., :, None] - total[..., None, :]).masked_fill(~earlier, -math.inf).exp()
    states = (decay @ ends.flatten(3)).view_as(ends)
    y = within + (C * cs.exp()[..., None].to(X.dtype)) @ states.to(X.dtype).mT
    return y.movedim(1, 3).flatten(1, 2)


def import_mamba(folder):
    if folder:
        sys.path.insert(0, folder)
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        return mamba_chunk_scan_combined
    except ImportError:
        return None


MAMBA = None  # its kernel, once main() has looked for it


class RMSNorm(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.qkv, self.out = nn.Linear(c.D, 3 * c.D, bias=False), nn.Linear(c.D, c.D, bias=False)

    def forward(self, u, qk, cb):
        q, k, v = self.qkv(u).unflatten(-1, (3, self.c.H, self.c.P)).unbind(2)
        y = F.scaled_dot_product_attention(rope(q, *qk).transpose(1, 2), rope(k, *qk).transpose(1, 2), v.transpose(1, 2),
                                           is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SSD(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.cbx = nn.Linear(c.D, 2 * c.H * c.N + c.D, bias=False)
        self.dt, self.out = nn.Linear(c.D, c.H, bias=False), nn.Linear(c.D, c.D, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.rand(c.H) * math.log(16)), nn.Parameter(torch.full((c.H,), -4.0))

    def forward(self, u, qk, cb):
        c = self.c
        C, B, X = self.cbx(u).split((c.H * c.N, c.H * c.N, c.D), -1)
        C, B = (rope(t.unflatten(-1, (c.H, c.N)), *cb) for t in (C, B))
        X, dt, A = X.unflatten(-1, (c.H, c.P)), self.dt(u), -self.A_log.float().exp()
        if MAMBA:
            y = MAMBA(X, dt, A, B, C, 128, dt_bias=self.dt_bias, dt_softplus=True)
        else:
            y = ssd_chunked(X, F.softplus(dt.float() + self.dt_bias), A, B, C)
        return self.out(y.flatten(2))


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.D), RMSNorm(c.D)
        self.mixer = Attention(c) if c.is_attention(i) else SSD(c)
        self.gate_up, self.down = nn.Linear(c.D, 2 * c.F, bias=False), nn.Linear(c.F, c.D, bias=False)
        self.res1, self.res2 = nn.Parameter(torch.ones(c.D)), nn.Parameter(torch.ones(c.D))

    def forward(self, x, qk, cb):
        x = self.res1.to(x.dtype) * x + self.mixer(self.norm1(x), qk, cb)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return self.res2.to(x.dtype) * x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, c, T):
        super().__init__()
        self.embed, self.head = nn.Embedding(c.V, c.D), nn.Linear(c.D, c.V, bias=False)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.L))
        self.norm = RMSNorm(c.D)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
        if c.tie:
            self.head.weight = self.embed.weight
        for name, d in (("qk", c.P), ("cb", c.N)):
            cos, sin = angles(torch.arange(T), d)
            self.register_buffer(name + "_cos", cos)
            self.register_buffer(name + "_sin", sin)

    def forward(self, tokens, targets):
        x = self.embed(tokens).bfloat16()
        for layer in self.layers:
            x = layer(x, (self.qk_cos, self.qk_sin), (self.cb_cos, self.cb_sin))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class Decoder:
    """One token of each of B sequences after T others, weights and caches in bf16, states in fp32."""

    def __init__(self, c, B, T):
        self.c, self.layers = c, []
        w = lambda *shape: (torch.randn(*shape, device=DEVICE) * 0.02).bfloat16()
        ones = lambda: torch.ones(c.D, device=DEVICE, dtype=torch.bfloat16)
        for i in range(c.L):
            l = dict(norm1=ones(), norm2=ones(), gate_up=w(2 * c.F, c.D), down=w(c.D, c.F), out=w(c.D, c.D))
            if c.is_attention(i):
                l.update(proj=w(3 * c.D, c.D), k=w(B, c.H, T + 1, c.P), v=w(B, c.H, T + 1, c.P))
            else:
                l.update(proj=w(2 * c.H * c.N + c.D + 16, c.D), A=-1 - 15 * torch.rand(c.H, device=DEVICE),
                         S=torch.randn(B, c.H, c.P, c.N, device=DEVICE))
            self.layers.append(l)
        self.embed, self.norm = w(c.V, c.D), ones()
        self.head = self.embed if c.tie else w(c.V, c.D)
        self.position = torch.full((1,), T, device=DEVICE)

    def step(self, tokens):
        c, x = self.c, self.embed[tokens]
        B = x.shape[0]
        qk, cb = angles(self.position, c.P), angles(self.position, c.N)
        turn = lambda t, d, a: rope(t.reshape(B, 1, c.H, d), *a)[:, 0]
        for l in self.layers:
            z = F.rms_norm(x, (c.D,), l["norm1"], 1e-6) @ l["proj"].mT
            if "k" in l:
                q, k, v = z.split(c.D, -1)
                l["k"].index_copy_(2, self.position, turn(k, c.P, qk)[:, :, None])
                l["v"].index_copy_(2, self.position, v.reshape(B, c.H, 1, c.P))
                y = F.scaled_dot_product_attention(turn(q, c.P, qk)[:, :, None], l["k"], l["v"]).reshape(B, c.D)
            else:
                C, Bs, X, dt = z[:, :2 * c.H * c.N + c.D + c.H].split((c.H * c.N, c.H * c.N, c.D, c.H), -1)
                C, Bs = (turn(t, c.N, cb).float() for t in (C, Bs))
                dt = F.softplus(dt.float())
                add = (dt[..., None] * X.view(B, c.H, c.P).float())[..., None] * Bs[:, :, None]
                l["S"].copy_(l["S"] * (dt * l["A"]).exp()[..., None, None] + add)
                y = (l["S"] @ C[..., None]).reshape(B, c.D).bfloat16()
            x = x + y @ l["out"].mT
            gate, up = (F.rms_norm(x, (c.D,), l["norm2"], 1e-6) @ l["gate_up"].mT).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ l["down"].mT
        return (F.rms_norm(x, (c.D,), self.norm, 1e-6) @ self.head.mT).argmax(-1)


# ---- 2. Measuring: as `measure` in transxssm.cu, so that both sides are treated alike

def measure(f, repeats):
    """A call of no account and 0.15 s of further ones, then `repeats`, fewer if they take over two seconds, with an event after each -> ms"""
    f()
    torch.cuda.synchronize()
    start, calls, seconds = time.perf_counter(), 0, 0
    while seconds < 0.15:
        f()
        torch.cuda.synchronize()
        calls, seconds = calls + 1, time.perf_counter() - start
    once = seconds / calls
    runs = min(repeats, max(3, int(2 / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for e in events[1:]:
        f()
        e.record()
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    return dict(runs=runs, ms=ms[runs // 2], ms_25=ms[runs // 4], ms_75=ms[runs - 1 - runs // 4])


def row(case, engine, model, what, B, T, fill, tokens=None):
    """One figure; what does not fit into memory is a row with a note."""
    r = dict.fromkeys(COLUMNS, "")
    r.update(case=case, engine=engine, model=model, what=what, B=B, T=T)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    try:
        r.update(fill())
        r["tokens_per_s"] = 1e3 * (B * T if tokens is None else tokens) / r["ms"] or ""
        r["memory"] = torch.cuda.max_memory_allocated()
        print(f"  {engine:16s} {model:18s} {what:20s} {B:6d} x {T:<6d} {r['ms']:10.3f} ms", flush=True)
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if "out of memory" not in str(e) and "No available kernel" not in str(e):
            raise
        r["note"] = str(e).splitlines()[0].replace(",", ";")
        print(f"  {engine:16s} {model:18s} {what:20s} {B:6d} x {T:<6d} {r['note'][:90]}", flush=True)
    return r


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


def use_attention(kind):  # "any": PyTorch chooses
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(kind in ("flash", "any"))
    cuda.enable_cudnn_sdp(kind in ("cuDNN", "any"))
    cuda.enable_mem_efficient_sdp(kind == "any")
    cuda.enable_math_sdp(kind == "any")


def ssd_engine():
    return "PyTorch Triton" if MAMBA else "PyTorch"


# ---- 3. The cases -> rows

def train(a):
    rows = []
    for family in a.model:
        for attention in ("flash", "cuDNN") if family == "transformer" else ("cuDNN",):
            use_attention(attention)
            engine = f"PyTorch {attention}" if family == "transformer" else ssd_engine()
            for T in a.lengths:
                c, B = Config(a.preset, family), a.step_tokens // T
                torch._dynamo.reset()
                made = {}  # in the first figure, so that its memory is counted and freed

                def model():
                    if not made:
                        m = Model(c, T).to(DEVICE)
                        made["optimizer"] = torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
                        made["tokens"] = torch.randint(c.V, (2, B, T), device=DEVICE)
                        if a.compile == "layers":
                            for layer in m.layers:
                                layer.compile(dynamic=False)
                        made["model"] = torch.compile(m, dynamic=False) if a.compile == "model" else m
                    return made

                def step():
                    with torch.autocast(DEVICE, torch.bfloat16):
                        loss = model()["model"](*made["tokens"])
                    loss.backward()
                    made["optimizer"].step()
                    made["optimizer"].zero_grad(set_to_none=True)

                def evaluation():
                    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                        model()["model"](*made["tokens"])

                name = f"{a.preset} {family}"
                rows.append(row("train", engine, name, "step", B, T, lambda: measure(step, a.repeats)))
                if not rows[-1]["note"]:
                    rows.append(row("train", engine, name, "evaluation", B, T, lambda: measure(evaluation, a.repeats)))
                made.clear()
    return rows


def decode(a):
    rows = []
    use_attention("any")
    for family in a.model:
        c = Config(a.preset, family)
        for B in a.batches:
            for T in a.contexts:
                def fill():
                    d = Decoder(c, B, T)
                    step = torch.compile(d.step, dynamic=False) if a.compile != "none" else d.step
                    tokens = torch.zeros(B, dtype=torch.long, device=DEVICE)
                    stream = torch.cuda.Stream()
                    with torch.no_grad(), torch.cuda.stream(stream):
                        for _ in range(3):
                            step(tokens)
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.no_grad(), torch.cuda.graph(graph):
                        tokens.copy_(step(tokens))
                    return measure(graph.replay, 50)

                torch._dynamo.reset()
                rows.append(row("decode", "PyTorch", f"{a.preset} {family}", "token", B, T, fill, tokens=B))
    return rows


def ssd(a):
    c, rows = Config(a.preset, "hybrid"), []
    scan = MAMBA or torch.compile(ssd_chunked, dynamic=False)
    for T in a.lengths:
        B = a.step_tokens // T
        for what in ("forward", "forward + backward"):
            def fill():
                bf16 = dict(device=DEVICE, dtype=torch.bfloat16)
                x, dy = torch.randn(B, T, c.H, c.P, **bf16), torch.randn(B, T, c.H, c.P, **bf16)
                b, k = torch.randn(B, T, c.H, c.N, **bf16) / math.sqrt(c.N), torch.randn(B, T, c.H, c.N, **bf16)
                dt, A = torch.rand(B, T, c.H, device=DEVICE) * 0.1, -1 - 4 * torch.rand(c.H, device=DEVICE)
                inputs = [t.requires_grad_() for t in (x, dt, A, b, k)]
                if what == "forward":
                    return measure(lambda: scan(*inputs, 128), a.repeats)
                return measure(lambda: torch.autograd.grad(scan(*inputs, 128), inputs, dy), a.repeats)

            rows.append(row("ssd", ssd_engine(), f"H{c.H} P{c.P} N{c.N}", what, B, T, fill))
    return rows


def attention(a):
    c, rows = Config(a.preset, "transformer"), []
    for kind in ("flash", "cuDNN"):
        use_attention(kind)
        for T in a.lengths:
            B = a.step_tokens // T
            for what in ("forward", "forward + backward"):
                def fill():
                    q, k, v = (torch.randn(B, c.H, T, c.P, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
                               for _ in range(3))
                    dy = torch.randn_like(q)
                    f = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    if what == "forward":
                        return measure(f, a.repeats)
                    return measure(lambda: torch.autograd.grad(f(), (q, k, v), dy), a.repeats)

                rows.append(row("attention", f"PyTorch {kind}", f"H{c.H} P{c.P}", what, B, T, fill))
    return rows


def gemm(a):
    c, M, rows = Config(a.preset, "hybrid"), a.step_tokens, []
    attention_layers = sum(c.is_attention(i) for i in range(c.L))
    products = [("[C|B|X|dt]", c.D, 2 * c.H * c.N + c.D + c.H, c.L - attention_layers),
                ("[q|k|v]", c.D, 3 * c.D, attention_layers), ("mixer out", c.D, c.D, c.L),
                ("[gate|up]", c.D, 2 * c.F, c.L), ("down", c.F, c.D, c.L), ("head", c.D, c.V, 1)]
    for what in ("y = x W'", "dx = dy W", "dW += dy' x"):
        step = 0
        for name, fan_in, out, times in products:
            def fill():
                padded = (out + 31) // 32 * 32  # as ours are; without, the first product takes three times as long
                x, w, y = (torch.rand(*s, device=DEVICE).mul_(2).sub_(1).bfloat16()
                           for s in ((M, fan_in), (padded, fan_in), (M, padded)))
                f = {"y": lambda: x @ w.mT, "dx": lambda: y @ w, "dW": lambda: y.mT @ x}[what.split()[0]]
                return measure(f, a.repeats)

            rows.append(row("gemm", "PyTorch", name, what, 1, M, fill, tokens=0))
            step += times * (rows[-1]["ms"] or math.nan)
        if step > 0:
            rows.append(row("gemm", "PyTorch", "all of a step", what, 1, M, lambda: dict(ms=step), tokens=0))
    return rows


# ---- 4. Both sides in one table

def our_side(a, case, path):
    words = [a.transxssm, "bench", case, "--preset", a.preset, "--repeats", str(a.repeats), "--csv", path, "--step-tokens",
             str(a.step_tokens)]
    for name in ("lengths", "contexts", "batches"):
        words += ["--" + name, ",".join(map(str, getattr(a, name)))]
    words += ["--model", ",".join(a.model)]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, check=True)
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def table(case, rows):
    """Markdown: a line per shape, a column per engine and model; then how many times faster ours is than the best of the others,
    and our hybrid than the Transformers. Products are lines, too."""
    rate, by_line = case in ("train", "prefill", "decode"), case == "gemm"
    cells, lines, columns = {}, {}, {}  # (line, column) -> row
    for r in rows:
        if r["case"] != case or r["what"] == "backward" or not (r["ms"] or r["note"]):
            continue
        line = (r["model"] if by_line else "", r["what"], int(r["B"]), int(r["T"]))
        column = (r["engine"], "" if by_line else r["model"])
        lines[line] = columns[column] = True
        cells[line, column] = r
    ours = "transxssm"
    columns = sorted(columns, key=lambda c: c[0] != ours)  # ours first
    ms = lambda line, column: float((cells.get((line, column)) or {}).get("ms") or math.inf)
    best = lambda line, model: min((ms(line, c) for c in columns if c[0] != ours and c[1] == model), default=math.inf)
    ratio = lambda theirs, here: f"{theirs / here:.2f}" if math.isfinite(theirs) and math.isfinite(here) else ""

    def show(line, column):
        r = cells.get((line, column))
        if not r:
            return ""
        if not r["ms"]:
            return "no memory" if "memory" in r["note"] or "GB" in r["note"] else "not possible"
        text = f"{float(r['tokens_per_s']):,.0f}" if rate else f"{float(r['ms']):.3f}"
        return text + (f", {float(r['memory']) / 1e9:.1f} GB" if r["what"] == "step" else "")

    ratios = [(f"{m}: here over the best other".lstrip(": "), lambda line, m=m: ratio(best(line, m), ms(line, (ours, m))))
              for m in dict.fromkeys(c[1] for c in columns if c[0] != ours)]
    for e, hybrid in columns:
        transformer = hybrid.replace("hybrid", "transformer")
        if e == ours and hybrid.endswith("hybrid") and (ours, transformer) in columns:
            at = lambda line, h=hybrid: ms(line, (ours, h))
            ratios.append(("hybrid over our Transformer", lambda line, t=transformer: ratio(ms(line, (ours, t)), at(line))))
            if any(c[0] != ours and c[1] == transformer for c in columns):
                ratios.append(("over the best other Transformer", lambda line, t=transformer: ratio(best(line, t), at(line))))
    name = lambda c: f"{'here' if c[0] == ours else c[0]}: {c[1]}".rstrip(": ")
    head = (["product"] if by_line else []) + ["tokens/s" if rate else "ms", "B x T"] + [name(c) for c in columns]
    text = ["| " + " | ".join(head + [r[0] for r in ratios]) + " |", "|---" * (len(head) + len(ratios)) + "|"]
    for line in lines:
        first = ([line[0].replace("|", "\\|")] if by_line else []) + [line[1], f"{line[2]} x {line[3]:,}"]
        text.append("| " + " | ".join(first + [show(line, c) for c in columns] + [f(line) for _, f in ratios]) + " |")
    return "\n".join(text) + "\n"


def put_into_document(path, case, text):
    with open(path) as f:
        document = f.read()
    begin = f"<!-- {case} -->"
    if begin not in document:
        sys.exit(f"{path}: has no line {begin}")
    document = re.sub(re.escape(begin) + r".*?<!-- end -->", lambda _: f"{begin}\n{text}<!-- end -->", document, count=1,
                      flags=re.S)
    with open(path, "w") as f:
        f.write(document)


def families(text):
    names = FAMILIES if text == "all" else text.split(",")
    for name in names:
        if name not in FAMILIES:
            raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(FAMILIES)}, all")
    return names


def main():
    numbers = lambda s: [int(n) for n in s.split(",")]
    cases = {"train": train, "prefill": None, "decode": decode, "ssd": ssd, "attention": attention, "gemm": gemm}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(cases) + " [all]")
    p.add_argument("--preset", default="320m", choices=PRESETS)
    p.add_argument("--model", default="all", type=families, help="hybrid, transformer, ssm, several by commas, or all")
    p.add_argument("--lengths", type=numbers, default="512,1024,2048,4096,8192,16384,32768,65536")
    p.add_argument("--step-tokens", type=int, default=65536)
    p.add_argument("--contexts", type=numbers, default="512,4096,16384,65536")
    p.add_argument("--batches", type=numbers, default="1,8,64")
    for name in ("lengths", "contexts", "batches"):
        p.add_argument("--peer-" + name, type=numbers, help="PyTorch at these alone: compiling takes minutes")
    p.add_argument("--peer-model", type=families)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--compile", default="model", choices=["model", "layers", "none"], help="layers: sooner ready")
    p.add_argument("--mamba", default="", help="folder that holds mamba_ssm")
    p.add_argument("--transxssm", default="./transxssm")
    p.add_argument("--out", default="build/benchmarks")
    p.add_argument("--doc", default="", help="put tables and plots into this file")
    a = p.parse_args()
    for case in a.cases:
        if case not in cases:
            p.error(f"unknown case '{case}': expected one of {', '.join(cases)}")
    if not torch.cuda.is_available():
        sys.exit("bench_pytorch.py: no NVIDIA GPU was found")
    peer = argparse.Namespace(**vars(a))
    for name in ("model", "lengths", "contexts", "batches"):
        setattr(peer, name, getattr(a, "peer_" + name) or getattr(a, name))
    global MAMBA
    MAMBA = import_mamba(a.mamba)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    os.makedirs(a.out, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, SSD: {ssd_engine()}")
    for case in a.cases or cases:
        files = [os.path.join(a.out, case + end) for end in (".csv", "_pytorch.csv", ".svg", ".md")]
        free_memory()
        rows = our_side(a, case, files[0])
        theirs = cases[case](peer) if cases[case] else []
        with open(files[1], "w", newline="") as f:
            w = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            w.writeheader()
            w.writerows(theirs)
        subprocess.run([a.transxssm, "bench", "plot", files[0], files[1], "--svg", files[2]], check=True)
        text = table(case, rows + theirs)
        with open(files[3], "w") as f:
            f.write(text)
        print("\n" + text, flush=True)
        if a.doc:
            if case != "gemm":
                plot = os.path.join(os.path.dirname(a.doc), f"bench_{case}.svg")
                shutil.copyfile(files[2], plot)
                text += f"\n![{case}]({os.path.basename(plot)})\n"
            put_into_document(a.doc, case, text)


if __name__ == "__main__":
    main()
