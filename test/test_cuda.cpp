// The CUDA engine against the CPU reference: every op, forward and backward, in fp32 and bf16 at odd shapes; the
// whole model; decoding; determinism; the programs. Where there is no GPU these are counted as skipped.
#include "check.h"

// main.cpp leaves out the tests whose names begin with "cuda:" where there is no GPU.
#ifdef WITH_CUDA
using namespace ref;

namespace {

// TOLERANCES, relative L2 per tensor. The reference is the double version of ref_cpu, fed with inputs that are
// already on the precision's grid. fp32: both sides round to 6e-8 per operation, and sums of up to 200 terms in
// another order; exp of a cumulative sum of decays loses the most. bf16: an element is rounded to 2^-9 = 2e-3 at
// most, 1.1e-3 in the mean, once on output and once for each intermediate that tensor cores read (p and dz of
// attention; G, the state and scaled X or dY of SSD): the roundings are independent and add up as squares, to 2e-3 or
// 3e-3; gradients that are differences of such sums lose more.
struct Tolerance {
    double plain, product, difference;
};
Tolerance tolerance(Precision p) {
    return p == Precision::fp32 ? Tolerance{1e-6, 1e-5, 1e-4} : Tolerance{2.5e-3, 8e-3, 2e-2};
}

struct Case {
    Precision precision;
    const char* name;
};
const Case precisions[] = {{Precision::fp32, "fp32"}, {Precision::bf16, "bf16"}};

// TEST_QUICK=1: two lengths and two shapes, for compute-sanitizer, under which everything is a thousand times slower.
const bool quick = getenv("TEST_QUICK") != nullptr;
std::vector<int64> lengths(const std::vector<int64>& all) { return quick ? std::vector<int64>{65, all.back()} : all; }
std::vector<Shape> shapes(const std::vector<Shape>& all) {
    return quick ? std::vector<Shape>(all.begin(), all.begin() + 2) : all;
}

// To the nearest bf16, ties to even.
float on_grid(Precision p, float x) {
    if (p == Precision::fp32) return x;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&x, &bits, 4);
    return x;
}
// n normal numbers, the same for the same name, on the grid of p.
std::vector<float> normals(Precision p, const std::string& name, int64 n, double scale = 1, double shift = 0) {
    const Philox stream(7, name.c_str());
    std::vector<float> v(static_cast<size_t>(n));
    for (int64 i = 0; i < n; ++i) v[size_t(i)] = on_grid(p, float(shift + scale * stream.normal_at(uint64_t(i))));
    return v;
}
std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }
template <class T>
std::vector<T> sized(int64 n) {
    return std::vector<T>(size_t(n), T(0));
}
std::vector<int32_t> random_tokens(int64 V, int64 n, const char* name = "tokens") {
    const Philox stream(5, name);
    std::vector<int32_t> t;
    for (int64 i = 0; i < n; ++i) t.push_back(int32_t(stream.at(uint64_t(i)).word[0] % uint32_t(V)));
    return t;
}
// Columns [from, from + width) of rows `ld` apart.
template <class T>
std::vector<T> columns(const std::vector<T>& v, int64 ld, int64 from, int64 width) {
    std::vector<T> c;
    for (size_t r = 0; r * size_t(ld) < v.size(); ++r)
        for (int64 i = from; i < from + width; ++i) c.push_back(v[r * size_t(ld) + size_t(i)]);
    return c;
}

}  // namespace

TEST_CASE("cuda: linear layers equal the reference, whatever the alignment of their sizes") {
    for (const Case& k : precisions)
        for (const Shape& s :
             std::vector<Shape>{{1, 8, 8}, {3, 24, 20}, {65, 20, 29}, {130, 40, 51}, {7, 128, 260}, {5, 6, 10}}) {
            const int64 rows = s[0], in = s[1], out = s[2];
            CAPTURE(k.name);
            CAPTURE(to_text(s));
            const Tolerance tol = tolerance(k.precision);
            const auto x = normals(k.precision, "x", rows * in), w = normals(k.precision, "w", out * in),
                       dy = normals(k.precision, "dy", rows * out);
            const auto dw0 = normals(Precision::fp32, "dw", out * in);
            std::vector<double> y = sized<double>(rows * out), dx = sized<double>(rows * in), dw = wide(dw0);
            linear_forward(y.data(), wide(x).data(), wide(w).data(), rows, in, out);
            linear_backward(dx.data(), dw.data(), wide(dy).data(), wide(x).data(), wide(w).data(), rows, in, out,
                            false);
            std::vector<float> gy = sized<float>(rows * out), gdx = sized<float>(rows * in), gdw = dw0;
            cuda::linear_forward(k.precision, gy.data(), x.data(), w.data(), rows, in, out);
            cuda::linear_backward(k.precision, gdx.data(), gdw.data(), dy.data(), x.data(), w.data(), rows, in, out);
            CHECK_EQ(compare("y", gy, y, tol.plain), "");
            CHECK_EQ(compare("dx", gdx, dx, tol.plain), "");
            CHECK_EQ(compare("dw", gdw, dw, 1e-6), "");  // fp32 out of inputs on the grid
        }
}

TEST_CASE("cuda: embedding equals the reference; a token's gradient is the sum over its rows in order") {
    for (const Case& k : precisions)
        for (const int64 D : {1, 8, 40}) {
            const int64 rows = 77, V = 13;
            CAPTURE(k.name);
            const auto tokens = random_tokens(V - 2, rows);  // two that never occur
            const auto embed = normals(k.precision, "embed", V * D), dx = normals(k.precision, "dx", rows * D);
            std::vector<float> x = sized<float>(rows * D), gx = x;
            embedding_forward(x.data(), tokens.data(), embed.data(), rows, D);
            cuda::embedding_forward(k.precision, gx.data(), tokens.data(), embed.data(), rows, D, V);
            CHECK_EQ(compare_bits("x", gx, x), "");
            std::vector<double> de = wide(embed);
            std::vector<float> gde = embed;
            embedding_backward(de.data(), wide(dx).data(), tokens.data(), rows, D);
            cuda::embedding_backward(k.precision, gde.data(), dx.data(), tokens.data(), rows, D, V);
            CHECK_EQ(compare("dembed", gde, de, 1e-6), "");
        }
}

TEST_CASE("cuda: residual, dropout and norm equal the reference, joined as they are") {
    for (const Case& k : precisions)
        // One to eight warps to a row, one row or more to a warp, widths of every alignment.
        for (const Shape& size : std::vector<Shape>{
                 {8, 37}, {24, 2500}, {768, 37}, {2304, 37}, {6400, 37}, {18, 37}, {1030, 300}, {2050, 37}})
            for (const double p : {0.0, 0.3})
                for (const bool residual : {true, false}) {
                    const int64 D = size[0], rows = size[1];
                    if (p > 0 && !residual) continue;
                    CAPTURE(k.name);
                    CAPTURE(D);
                    CAPTURE(p);
                    CAPTURE(residual);
                    const Tolerance tol = tolerance(k.precision);
                    const Dropout drop{p, {uint64_t(3) << 40 | 9, 4, 5}, 6};
                    const auto x = normals(k.precision, "x", rows * D), m = normals(k.precision, "m", rows * D),
                               du = normals(k.precision, "du", rows * D), dout = normals(k.precision, "dout", rows * D);
                    const auto wr = normals(Precision::fp32, "wr", D, 0.2, 1),
                               wn = normals(Precision::fp32, "wn", D, 0.2, 1);
                    std::vector<float> gout = sized<float>(rows * D), gu = gout, grstd = sized<float>(rows);
                    cuda::residual_norm_forward(k.precision, gout.data(), gu.data(), grstd.data(), x.data(),
                                                residual ? m.data() : nullptr, wr.data(), wn.data(), 1e-6, drop, rows,
                                                D);
                    std::vector<double> out = wide(x), u = sized<double>(rows * D), rstd = sized<double>(rows);
                    if (residual) {
                        residual_forward(out.data(), wide(x).data(), wide(m).data(), wide(wr).data(), drop, rows, D);
                        CHECK_EQ(compare("out", gout, out, tol.plain), "");
                        out = wide(gout);  // the norm is of what was stored
                    }
                    rmsnorm_forward(u.data(), rstd.data(), out.data(), wide(wn).data(), 1e-6, rows, D);
                    CHECK_EQ(compare("u", gu, u, tol.plain), "");
                    CHECK_EQ(compare("rstd", grstd, rstd, 1e-6), "");

                    // backward: of u = rmsnorm(x) wn, joined with the residual dx = wr dout
                    std::vector<double> dx = sized<double>(rows * D), dm = dx, dwn = sized<double>(D), dwr = dwn;
                    const auto rs = normals(Precision::fp32, "rstd", rows, 0.1, 1);
                    if (residual)
                        residual_backward(dx.data(), dm.data(), dwr.data(), wide(dout).data(), wide(x).data(),
                                          wide(wr).data(), drop, rows, D);
                    rmsnorm_backward(dx.data(), dwn.data(), wide(du).data(), wide(x).data(), wide(wn).data(),
                                     wide(rs).data(), rows, D);
                    std::vector<float> gdx = sized<float>(rows * D), gdm = gdx, gdwn = sized<float>(D), gdwr = gdwn;
                    cuda::norm_residual_backward(k.precision, gdx.data(), gdwn.data(), gdwr.data(),
                                                 residual ? dout.data() : nullptr, du.data(), x.data(), wr.data(),
                                                 wn.data(), rs.data(), rows, D);
                    CHECK_EQ(compare("dx", gdx, dx, tol.plain), "");
                    CHECK_EQ(compare("dw_norm", gdwn, dwn, 1e-6), "");
                    if (!residual) continue;
                    CHECK_EQ(compare("dw_res", gdwr, dwr, 1e-6), "");
                    if (p == 0) continue;
                    cuda::dropout_backward(k.precision, gdm.data(), dout.data(), drop, rows * D);
                    CHECK_EQ(compare("dm", gdm, dm, tol.plain), "");
                    for (size_t i = 0; i < dm.size(); ++i) REQUIRE((gdm[i] == 0) == (dm[i] == 0));  // the same mask
                }
}

TEST_CASE("cuda: RoPE equals the reference and is undone by its inverse") {
    for (const Case& k : precisions)
        for (const int64 d : {2, 6, 16, 64, 128}) {
            CAPTURE(k.name);
            CAPTURE(d);
            const int64 B = 2, T = 9, H = 3, ld = (H * d + 12) / 8 * 8, pos0 = 5;
            RopeTable<float> table;
            RopeTable<double> truth;
            table.extend(d, 10000, pos0 + T);
            truth.extend(d, 10000, pos0 + T);
            const auto x = normals(k.precision, "x", B * T * ld);
            for (const bool inverse : {false, true}) {
                auto want = wide(x);
                auto got = x;
                rope(want.data(), truth, B, T, H, ld, pos0, inverse);
                cuda::rope(k.precision, got.data(), table, B, T, H, ld, pos0, inverse);
                CHECK_EQ(compare("x", got, want, tolerance(k.precision).plain), "");
            }
        }
}

TEST_CASE("cuda: attention equals the reference, forward and backward, at odd lengths and groups") {
    for (const Case& k : precisions)
        for (const int64 T : lengths({1, 63, 64, 65, 131, 321, 200}))
            for (const Shape& s :
                 shapes({{1, 1, 6}, {4, 2, 32}, {6, 2, 64}, {2, 1, 70}, {3, 3, 128}, {4, 1, 96}, {20, 4, 16}})) {
                const int64 B = 2, H = s[0], Hkv = s[1], P = s[2], ld = ((H + 2 * Hkv) * P + 7) / 8 * 8, rows = B * T;
                CAPTURE(k.name);
                CAPTURE(T);
                CAPTURE(to_text(s));
                const Tolerance tol = tolerance(k.precision);
                const AttentionShape n{B, T, T, H, Hkv, P, ld, ld, T * ld};
                const int64 ko = H * P, vo = ko + Hkv * P;
                const auto q = normals(k.precision, "qkv", rows * ld, 1.5),
                           dy = normals(k.precision, "dy", rows * H * P);
                const auto qd = wide(q), dyd = wide(dy);
                std::vector<double> y = sized<double>(rows * H * P), lse = sized<double>(rows * H),
                                    d = sized<double>(rows * ld);
                attention_forward(y.data(), lse.data(), qd.data(), qd.data() + ko, qd.data() + vo, n);
                attention_backward(d.data(), d.data() + ko, d.data() + vo, dyd.data(), qd.data(), qd.data() + ko,
                                   qd.data() + vo, y.data(), lse.data(), n);
                std::vector<float> gy = sized<float>(rows * H * P), glse = sized<float>(rows * H),
                                   gd = sized<float>(rows * ld);
                cuda::attention_forward(k.precision, gy.data(), glse.data(), q.data(), q.data() + ko, q.data() + vo, n);
                CHECK_EQ(compare("y", gy, y, tol.product), "");
                CHECK_EQ(compare("lse", glse, lse, 1e-5), "");
                cuda::attention_backward(k.precision, gd.data(), nullptr, nullptr, dy.data(), q.data(), q.data() + ko,
                                         q.data() + vo, gy.data(), glse.data(), n);
                // T = 1: p is 1, so that dq and dk are zero but for rounding
                const double nothing = T == 1 ? (k.precision == Precision::fp32 ? 1e-4 : 0.3) : 0;
                const auto part = [&](const char* name, int64 from, int64 width) {
                    if (T == 1 && from < vo) {
                        for (const float g : columns(gd, ld, from, width)) CHECK(std::fabs(g) < nothing);
                    } else {
                        CHECK_EQ(
                            compare(name, columns(gd, ld, from, width), columns(d, ld, from, width), tol.difference),
                            "");
                    }
                };
                part("dq", 0, H * P);
                part("dk", ko, Hkv * P);
                part("dv", vo, Hkv * P);
            }
}

TEST_CASE("cuda: attention of a few queries over a longer cache equals the reference") {
    for (const Case& k : precisions)
        for (const int64 T : {1, 3, 70}) {
            CAPTURE(k.name);
            CAPTURE(T);
            const int64 B = 2, H = 4, Hkv = 2, P = 24, S = T + 90, capacity = S + 5, ld = H * P;
            AttentionShape n{B, T, S, H, Hkv, P, ld, Hkv * P, capacity * Hkv * P};
            const auto q = normals(k.precision, "q", B * T * ld),
                       key = normals(k.precision, "k", B * capacity * Hkv * P),
                       v = normals(k.precision, "v", B * capacity * Hkv * P);
            std::vector<double> y = sized<double>(B * T * ld), lse = sized<double>(B * T * H);
            attention_forward(y.data(), lse.data(), wide(q).data(), wide(key).data(), wide(v).data(), n);
            std::vector<float> gy = sized<float>(B * T * ld), glse = sized<float>(B * T * H);
            cuda::attention_forward(k.precision, gy.data(), glse.data(), q.data(), key.data(), v.data(), n);
            CHECK_EQ(compare("y", gy, y, tolerance(k.precision).product), "");
            CHECK_EQ(compare("lse", glse, lse, 1e-5), "");
        }
}

TEST_CASE("cuda: attention whose scores grow along the sequence equals the reference") {
    for (const int64 P : {64, 128}) {
        CAPTURE(P);
        const int64 B = 1, T = 300, H = 2, ld = 3 * H * P;
        const AttentionShape n{B, T, T, H, H, P, ld, ld, T * ld};
        auto q = normals(Precision::bf16, "qkv", T * ld);
        for (int64 t = 0; t < T; ++t)
            for (int64 i = H * P; i < 2 * H * P; ++i)
                q[size_t(t * ld + i)] = on_grid(Precision::bf16, q[size_t(t * ld + i)] * float(1 + double(t) / 20));
        const auto qd = wide(q);
        std::vector<double> y = sized<double>(T * H * P), lse = sized<double>(T * H);
        attention_forward(y.data(), lse.data(), qd.data(), qd.data() + H * P, qd.data() + 2 * H * P, n);
        std::vector<float> gy = sized<float>(T * H * P), glse = sized<float>(T * H);
        cuda::attention_forward(Precision::bf16, gy.data(), glse.data(), q.data(), q.data() + H * P,
                                q.data() + 2 * H * P, n);
        CHECK_EQ(compare("y", gy, y, tolerance(Precision::bf16).product), "");
        CHECK_EQ(compare("lse", glse, lse, 1e-5), "");
    }
}

// RoPE of C and B is part of the GPU's kernels; the reference turns them before and turns their gradients back after.
TEST_CASE("cuda: SSD equals the reference, forward and backward, at odd lengths, state sizes and head counts") {
    for (const Case& k : precisions)
        for (const int64 T : lengths({1, 63, 64, 65, 131, 583}))  // 583: 10 chunks, in several blocks
            for (const Shape& s : shapes({{1, 6, 14},
                                          {3, 64, 128},
                                          {2, 64, 64},
                                          {2, 16, 32},
                                          {1, 34, 96},
                                          {1, 128, 128},
                                          {11, 64, 64},
                                          {11, 64, 128}}))
                for (const bool states : {false, true})
                    for (const int64 pos0 : {-1, 0, 300}) {
                        // A start at 300 with states, one at 0 without; at one length also without RoPE (-1). 143
                        // (sequence, head) pairs are many enough that blocks take their states from each other.
                        const bool many = s[0] == 11;
                        if (pos0 < 0 ? T != 131 : (pos0 > 0) != states) continue;
                        if (many && (T < 583 || !states)) continue;
                        const int64 B = many ? 13 : 2, H = s[0], P = s[1], N = s[2],
                                    ld = (2 * H * N + H * P + 7) / 8 * 8, rows = B * T;
                        CAPTURE(k.name);
                        CAPTURE(T);
                        CAPTURE(to_text(s));
                        CAPTURE(states);
                        CAPTURE(pos0);
                        const Tolerance tol = tolerance(k.precision);
                        const SsdShape n{B, T, H, P, N, 16, ld};
                        const int64 bo = H * N, xo = 2 * H * N, PN = B * H * P * N;
                        const auto p = normals(k.precision, "proj", rows * ld),
                                   dY = normals(k.precision, "dY", rows * H * P);
                        auto dt = normals(Precision::fp32, "dt", rows * H), dA = dt;
                        for (size_t i = 0; i < dt.size();
                             ++i) {  // steps of 0.01 to 0.3, decays from fast to slow by head
                            dt[i] = 0.05f * std::exp(0.8f * dt[i]);
                            dA[i] = -(1 + 7 * float(i % size_t(H))) * dt[i];
                        }
                        const auto S0 = normals(Precision::fp32, "S0", PN, 0.5),
                                   dST = normals(Precision::fp32, "dST", PN, 0.5);
                        RopeTable<float> table;
                        RopeTable<double> truth;
                        table.extend(N, 10000, 300 + std::max<int64>(T, 65));
                        truth.extend(N, 10000, 300 + std::max<int64>(T, 65));
                        auto pd = wide(p);
                        if (pos0 >= 0) rope(pd.data(), truth, B, T, 2 * H, ld, pos0, false);
                        const auto dYd = wide(dY), dtd = wide(dt), dAd = wide(dA), S0d = wide(S0), dSTd = wide(dST);
                        std::vector<double> Y = sized<double>(rows * H * P), ST = sized<double>(PN),
                                            d = sized<double>(rows * ld), ddt = sized<double>(rows * H), ddA = ddt,
                                            dS0 = ST, kept = sized<double>(PN * ((T + 15) / 16));
                        ssd_chunked_forward(Y.data(), ST.data(), kept.data(), pd.data(), pd.data() + bo, pd.data() + xo,
                                            dtd.data(), dAd.data(), states ? S0d.data() : nullptr, n);
                        ssd_chunked_backward<double>(d.data(), d.data() + bo, d.data() + xo, ddt.data(), ddA.data(),
                                                     dS0.data(), nullptr, dYd.data(), states ? dSTd.data() : nullptr,
                                                     pd.data(), pd.data() + bo, pd.data() + xo, dtd.data(), dAd.data(),
                                                     kept.data(), n);
                        if (pos0 >= 0) rope(d.data(), truth, B, T, 2 * H, ld, pos0, true);
                        const RopeTable<float>* angles = pos0 >= 0 ? &table : nullptr;
                        std::vector<float> gY = sized<float>(rows * H * P), gST = sized<float>(PN),
                                           gd = sized<float>(rows * ld), gddt = sized<float>(rows * H), gddA = gddt,
                                           gdS0 = gST;
                        cuda::ssd_chunked_forward(k.precision, gY.data(), gST.data(), p.data(), p.data() + bo,
                                                  p.data() + xo, dt.data(), dA.data(), states ? S0.data() : nullptr,
                                                  angles, pos0, n);
                        CHECK_EQ(compare("Y", gY, Y, tol.product), "");
                        CHECK_EQ(compare("S_T", gST, ST, tol.product), "");
                        if (states) {  // in place; the few pairs of B 2 share the GPU's blocks
                            std::vector<float> again = gY, S = S0;
                            cuda::ssd_chunked_forward(k.precision, again.data(), S.data(), p.data(), p.data() + bo,
                                                      p.data() + xo, dt.data(), dA.data(), S.data(), angles, pos0, n);
                            CHECK(again == gY);
                            CHECK(S == gST);
                        }
                        cuda::ssd_chunked_backward(k.precision, gd.data(), gddt.data(), gddA.data(), gdS0.data(),
                                                   dY.data(), states ? dST.data() : nullptr, p.data(), p.data() + bo,
                                                   p.data() + xo, dt.data(), dA.data(), states ? S0.data() : nullptr,
                                                   angles, pos0, n);
                        CHECK_EQ(compare("dC", columns(gd, ld, 0, H * N), columns(d, ld, 0, H * N), tol.product), "");
                        CHECK_EQ(compare("dB", columns(gd, ld, bo, H * N), columns(d, ld, bo, H * N), tol.product), "");
                        CHECK_EQ(compare("dX", columns(gd, ld, xo, H * P), columns(d, ld, xo, H * P), tol.product), "");
                        CHECK_EQ(compare("dS_0", gdS0, dS0, tol.product), "");
                        CHECK_EQ(compare("ddt", gddt, ddt, tol.product), "");
                        // a token alone with no state before it: its decay multiplies zero
                        if (T == 1 && !states)
                            for (const float g : gddA)
                                CHECK(std::fabs(g) < (k.precision == Precision::fp32 ? 1e-3 : 2.0));
                        else CHECK_EQ(compare("ddA", gddA, ddA, tol.difference), "");
                    }
}

// The residual stream of a decode step, whose kernels multiply their input by each row's rstd and pass on w_res * x.
namespace {
struct StreamCase {
    const Precision precision;
    const int64 B, D;
    const double eps = 1e-2;
    const std::vector<float> x, w_res;
    std::vector<float> out = sized<float>(B * D);
    StreamCase(Precision p, int64 sequences, int64 width)
        : precision(p),
          B(sequences),
          D(width),
          x(normals(p, "x", B * D, 0.3)),
          w_res(normals(Precision::fp32, "w_res", D, 0.5, 1)) {}
    cuda::ResidualTwin twin() { return {out.data(), x.data(), w_res.data(), eps}; }
    // `input` (B,ld) times rstd of its row, as the norm of the reference makes it.
    std::vector<double> scaled(const std::vector<float>& input) const {
        std::vector<double> v = wide(input), u = sized<double>(B * D), rstd = sized<double>(B);
        rmsnorm_forward(u.data(), rstd.data(), wide(x).data(), std::vector<double>(size_t(D), 1).data(), eps, B, D);
        for (size_t i = 0; i < v.size(); ++i) v[i] *= rstd[i / (v.size() / size_t(B))];
        return v;
    }
    void check_out() const {
        std::vector<double> want = wide(x);
        for (size_t i = 0; i < want.size(); ++i) want[i] *= double(w_res[i % size_t(D)]);
        CHECK_EQ(compare("out", out, want, tolerance(precision).plain), "");
    }
};
}  // namespace

TEST_CASE("cuda: the SSD decode step equals RoPE, dt and the recurrence") {
    for (const Case& k : precisions)
        for (const bool decay : {true, false})
            for (const Shape& s : std::vector<Shape>{{1, 6, 14}, {3, 5, 12}, {3, 64, 128}, {5, 12, 36}}) {
                const int64 B = 3, H = s[0], P = s[1], N = s[2], width = 2 * H * N + H * P + H,
                            ld = (width + 7) / 8 * 8;
                const int64 PN = B * H * P * N, pos = 21;
                CAPTURE(k.name);
                CAPTURE(N);
                const SsdShape n{B, 1, H, P, N, 16, ld};
                const auto p = normals(k.precision, "proj", B * ld);
                const auto bias = normals(Precision::fp32, "dt_bias", H), log = normals(Precision::fp32, "A_log", H);
                std::vector<float> S = normals(Precision::fp32, "S", PN), gY = sized<float>(B * H * P), gS = S;
                std::vector<double> Sd = wide(S), Y = sized<double>(B * H * P), dt = sized<double>(B * H), dA = dt;
                StreamCase residual(k.precision, B, H * P);
                auto pd = residual.scaled(p);
                RopeTable<double> table_d;
                RopeTable<float> table;
                table_d.extend(N, 10000, pos + 1);
                table.extend(N, 10000, pos + 1);
                ref::rope(pd.data(), table_d, B, 1, 2 * H, ld, pos, false);
                ref::ssd_dt_forward(dt.data(), dA.data(), pd.data() + 2 * H * N + H * P, wide(bias).data(),
                                    wide(log).data(), decay, B, H, ld);
                ssd_recurrent_forward(Y.data(), Sd.data(), pd.data(), pd.data() + H * N, pd.data() + 2 * H * N,
                                      dt.data(), dA.data(), Sd.data(), n);
                cuda::ssd_step(k.precision, gY.data(), gS.data(), p.data(), residual.twin(), bias.data(), log.data(),
                               table, pos, decay, n);
                residual.check_out();
                CHECK_EQ(compare("Y", gY, Y, tolerance(k.precision).plain), "");
                CHECK_EQ(compare("S", gS, Sd, 1e-6), "");  // fp32 in any precision
            }
}

TEST_CASE("cuda: the attention decode step equals RoPE and attention over the cache, in any number of splits") {
    for (const Case& k : precisions)
        for (const Shape& s :
             std::vector<Shape>{{2, 2, 64}, {4, 2, 6}, {3, 1, 40}, {2, 1, 128}, {33, 3, 8}, {32, 4, 128}, {5, 5, 80}})
            for (const int64 past : std::vector<int64>{0, 1, 130, 700})
                for (const int64 splits : std::vector<int64>{1, 5, 13}) {
                    const int64 B = 2, H = s[0], Hkv = s[1], P = s[2], width = (H + 2 * Hkv) * P,
                                ld = (width + 7) / 8 * 8;
                    const int64 capacity = past + 3, row = Hkv * P;
                    CAPTURE(k.name);
                    CAPTURE(P);
                    CAPTURE(past);
                    CAPTURE(splits);
                    const AttentionShape n{B, 1, past + 1, H, Hkv, P, ld, row, capacity * row};
                    const auto p = normals(k.precision, "proj", B * ld);
                    std::vector<float> K = normals(k.precision, "K", B * n.seq_kv),
                                       V = normals(k.precision, "V", B * n.seq_kv);
                    std::vector<float> gK = K, gV = V, gy = sized<float>(B * H * P);
                    StreamCase residual(k.precision, B, H * P);
                    std::vector<double> pd = residual.scaled(p), Kd = wide(K), Vd = wide(V),
                                        y = sized<double>(B * H * P), lse = sized<double>(B * H);
                    RopeTable<double> table_d;
                    RopeTable<float> table;
                    table_d.extend(P, 10000, past + 1);
                    table.extend(P, 10000, past + 1);
                    ref::rope(pd.data(), table_d, B, 1, H + Hkv, ld, past, false);
                    for (int64 b = 0; b < B; ++b)
                        for (int64 i = 0; i < row; ++i) {
                            Kd[size_t(b * n.seq_kv + past * row + i)] = pd[size_t(b * ld + H * P + i)];
                            Vd[size_t(b * n.seq_kv + past * row + i)] = pd[size_t(b * ld + H * P + row + i)];
                        }
                    ref::attention_forward(y.data(), lse.data(), pd.data(), Kd.data(), Vd.data(), n);
                    cuda::attention_step(k.precision, gy.data(), gK.data(), gV.data(), p.data(), residual.twin(), table,
                                         past, splits, n);
                    residual.check_out();
                    CHECK_EQ(compare("y", gy, y, tolerance(k.precision).product), "");
                    CHECK_EQ(compare("k", gK, Kd, tolerance(k.precision).plain), "");
                    CHECK_EQ(compare("v", gV, Vd, tolerance(k.precision).plain), "");
                }
}

TEST_CASE("cuda: the SwiGLU decode step equals norm and SwiGLU") {
    for (const Case& k : precisions)
        for (const Shape& s : std::vector<Shape>{{1, 1}, {6, 15}, {40, 24}, {1000, 333}, {768, 2048}, {1500, 8}}) {
            const int64 B = 3, D = s[0], F = s[1];
            CAPTURE(k.name);
            CAPTURE(to_text(s));
            const auto gate_up = normals(k.precision, "gate_up", B * 2 * F, 3);
            StreamCase residual(k.precision, B, D);
            std::vector<double> h = sized<double>(B * F);
            std::vector<float> gh = sized<float>(B * F);
            swiglu_forward(h.data(), residual.scaled(gate_up).data(), B, F);
            cuda::swiglu_step(k.precision, gh.data(), gate_up.data(), residual.twin(), B, F, D);
            residual.check_out();
            CHECK_EQ(compare("h", gh, h, tolerance(k.precision).plain), "");
        }
}

TEST_CASE("cuda: dt, its decay and their gradients equal the reference") {
    for (const bool decay : {true, false}) {
        const int64 rows = 1500, H = 5, ld = 8;
        const auto raw = normals(Precision::fp32, "raw", rows * ld, 8), bias = normals(Precision::fp32, "bias", H),
                   log = normals(Precision::fp32, "log", H), ddt = normals(Precision::fp32, "ddt", rows * H),
                   ddA = normals(Precision::fp32, "ddA", rows * H);
        std::vector<double> dt = sized<double>(rows * H), dA = dt, draw = sized<double>(rows * ld), dbias = wide(bias),
                            dlog = wide(log);
        ssd_dt_forward(dt.data(), dA.data(), wide(raw).data(), wide(bias).data(), wide(log).data(), decay, rows, H, ld);
        std::vector<float> gdt = sized<float>(rows * H), gdA = gdt, gdraw = sized<float>(rows * ld), gdbias = bias,
                           gdlog = log;
        cuda::ssd_dt_forward(gdt.data(), gdA.data(), raw.data(), bias.data(), log.data(), decay, rows, H, ld);
        CHECK_EQ(compare("dt", gdt, dt, 1e-6), "");
        CHECK_EQ(compare("dA", gdA, dA, 1e-6), "");
        ssd_dt_backward(draw.data(), dbias.data(), dlog.data(), wide(ddt).data(), wide(ddA).data(), wide(raw).data(),
                        wide(bias).data(), wide(log).data(), dA.data(), decay, rows, H, ld);
        cuda::ssd_dt_backward(gdraw.data(), gdbias.data(), gdlog.data(), ddt.data(), ddA.data(), raw.data(),
                              bias.data(), log.data(), gdA.data(), decay, rows, H, ld);
        CHECK_EQ(compare("ddt_raw", gdraw, draw, 1e-5), "");
        CHECK_EQ(compare("ddt_bias", gdbias, dbias, 1e-5), "");
        CHECK_EQ(compare("dA_log", gdlog, dlog, 1e-5), "");
    }
}

TEST_CASE("cuda: SwiGLU equals the reference") {
    for (const Case& k : precisions)
        for (const int64 F : {1, 8, 20, 320}) {
            CAPTURE(k.name);
            CAPTURE(F);
            const int64 rows = 33;
            const auto gu = normals(k.precision, "gate_up", rows * 2 * F, 3), dh = normals(k.precision, "dh", rows * F);
            std::vector<double> h = sized<double>(rows * F), d = sized<double>(rows * 2 * F);
            swiglu_forward(h.data(), wide(gu).data(), rows, F);
            swiglu_backward(d.data(), wide(dh).data(), wide(gu).data(), rows, F);
            std::vector<float> gh = sized<float>(rows * F), gd = sized<float>(rows * 2 * F);
            cuda::swiglu_forward(k.precision, gh.data(), gu.data(), rows, F);
            cuda::swiglu_backward(k.precision, gd.data(), dh.data(), gu.data(), rows, F);
            CHECK_EQ(compare("h", gh, h, tolerance(k.precision).plain), "");
            CHECK_EQ(compare("dgate_up", gd, d, tolerance(k.precision).plain), "");
        }
}

TEST_CASE("cuda: SwiGLU joined with its products equals the reference") {
    for (const Case& k : precisions)
        // Many tokens and widths that are multiples of 64 take Hopper's kernel in bf16; tiles are 128 x 96 and 128 x 128.
        for (const Shape& s :
             shapes({{33, 20, 12}, {8192 + 37, 192, 320}, {8192 + 136, 128, 192}, {8192, 64, 64}, {8192, 128, 512}})) {
            const int64 rows = s[0], D = s[1], F = s[2];
            CAPTURE(k.name);
            CAPTURE(to_text(s));
            const Tolerance tol = tolerance(k.precision);
            const auto x = normals(k.precision, "x", rows * D), w = normals(k.precision, "w", 2 * F * D, 0.2),
                       dy = normals(k.precision, "dy", rows * D), w_down = normals(k.precision, "w_down", D * F, 0.2);
            std::vector<double> gate_up = sized<double>(rows * 2 * F), h = sized<double>(rows * F), dh = h,
                                dgate_up = gate_up, dw = wide(w_down);
            linear_forward(gate_up.data(), wide(x).data(), wide(w).data(), rows, D, 2 * F);
            std::vector<float> gg = sized<float>(rows * 2 * F), gh = sized<float>(rows * F), gd = gg, gh2 = gh;
            cuda::gate_up_forward(k.precision, gh.data(), gg.data(), x.data(), w.data(), rows, D, F);
            CHECK_EQ(compare("gate_up", gg, gate_up, tol.plain), "");
            swiglu_forward(h.data(), wide(gg).data(), rows, F);  // of what was rounded
            CHECK_EQ(compare("h", gh, h, tol.plain), "");
            linear_backward(dh.data(), dw.data(), wide(dy).data(), h.data(), wide(w_down).data(), rows, F, D, false);
            for (double& v : dh) v = double(on_grid(k.precision, float(v)));
            swiglu_backward(dgate_up.data(), dh.data(), wide(gg).data(), rows, F);
            cuda::down_backward(k.precision, gd.data(), gh2.data(), dy.data(), gg.data(), w_down.data(), rows, D, F);
            CHECK_EQ(compare("dgate_up", gd, dgate_up, tol.plain), "");
            CHECK_EQ(compare_bits("h made again", gh2, gh), "");
        }
}

TEST_CASE("cuda: cross-entropy equals the reference for any vocabulary") {
    for (const Case& k : precisions)
        for (const int64 V : {1, 9, 256, 259, 4096, 50257}) {
            const int64 rows = 5, ld = (V + 7) / 8 * 8;
            CAPTURE(k.name);
            CAPTURE(V);
            const auto z = normals(k.precision, "logits", rows * ld, 4);
            const auto targets = random_tokens(V, rows);
            std::vector<double> dense = columns(wide(z), ld, 0, V), losses = sized<double>(rows);
            cross_entropy_forward(losses.data(), dense.data(), targets.data(), rows, V);
            cross_entropy_backward(dense.data(), losses.data(), targets.data(), 1, rows, V);
            std::vector<float> got = z, gl = sized<float>(rows);
            cuda::cross_entropy(k.precision, gl.data(), got.data(), targets.data(), rows, V);
            if (V == 1) continue;  // the loss is log 1
            CHECK_EQ(compare("losses", gl, losses, 1e-5), "");
            CHECK_EQ(compare("dlogits", columns(got, ld, 0, V), dense, tolerance(k.precision).plain), "");
            for (const float pad : columns(got, ld, V, ld - V)) CHECK(pad == 0);
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole model
// ---------------------------------------------------------------------------------------------------------------------

namespace {

Config small() {
    Config c;
    c.V = 29;
    c.D = 24;
    c.L = 3;
    c.H = 4;
    c.Hkv = 2;
    c.N = 8;
    c.F = 20;
    c.Q = 4;
    c.T = 70;
    c.attn_period = 3;
    c.attn_offset = 1;
    return c;
}

std::vector<std::pair<std::string, Config>> kinds() {
    std::vector<std::pair<std::string, Config>> all;
    const auto add = [&](const std::string& name, const std::function<void(Config&)>& change) {
        Config c = small();
        change(c);
        c.validate();
        all.emplace_back(name, c);
    };
    add("hybrid", [](Config&) {});
    add("transformer", [](Config& c) {
        c.attn_period = 1;
        c.attn_offset = 0;
    });
    add("pure ssm", [](Config& c) { c.attn_period = 0; });
    add("untied, V % 8 = 3", [](Config& c) {
        c.tie = false;
        c.V = 35;
    });
    add("V % 8 = 1, widths divide by 8", [](Config& c) {
        c.V = 33;
        c.F = 32;
        c.H = c.Hkv = 3;
    });
    add("D % 8 = 4", [](Config& c) {
        c.D = 20;
        c.H = 2;
        c.Hkv = 1;
    });
    add("one head, N > P", [](Config& c) {
        c.H = c.Hkv = 1;
        c.N = 46;
    });
    add("no decay", [](Config& c) { c.ssd_decay = false; });
    add("dropout", [](Config& c) { c.dropout = 0.1; });
    return all;
}

std::vector<float> lively_weights(Precision p, const Config& c) {
    const ParamTable table(c);
    std::vector<float> w = initial_weights(c, 3);
    for (const ParamSpec& s : table.specs) {
        const Philox stream(4, s.name.c_str());
        for (int64 i = 0; i < s.count; ++i) {
            float& x = w[size_t(s.offset + i)];
            if (s.init == Init::normal) x = on_grid(p, (c.D > 64 ? 3 : 10) * x);  // a layer's gain is about 1
            if (s.init == Init::ones) x += 0.2f * float(stream.normal_at(uint64_t(i)));
        }
    }
    return w;
}
// How far rounding to bf16 alone takes the logits of a token: the reference in float, which rounds what a bf16 engine would
// store, against `truth`. Relative L2 of the worst token.
struct Bf16Rounding : ref::Probe<float> {
    void see(const std::string& name, float* data, const Shape& shape, int64 ld) override {
        for (const char* kept : {"dt", "dA", "cs", "state_in", "state_out", "final_state", "lse", "losses"})
            if (name.substr(name.rfind('.') + 1) == kept) return;
        const int64 rows = shape[0] * shape[1], width = element_count(shape) / rows;
        for (int64 r = 0; r < rows; ++r)
            for (int64 j = 0; j < width; ++j) data[r * ld + j] = on_grid(Precision::bf16, data[r * ld + j]);
    }
    const float* final_state_cotangent(int64) const override { return nullptr; }
};
double bf16_noise(const Config& c, const std::vector<float>& w, const std::vector<int32_t>& tokens, int64 B,
                  const std::vector<double>& truth) {
    Model<float> m(c);
    Bf16Rounding rounding;
    m.probe = &rounding;
    m.weights = w;
    m.forward(tokens.data(), nullptr, B, int64(tokens.size()) / B, nullptr, nullptr);
    double most = 0;
    for (int64 r = 0; r < int64(tokens.size()); ++r) {
        double error = 0, size = 0;
        for (int64 i = r * c.V; i < (r + 1) * c.V; ++i) {
            const double e = double(m.logits[size_t(i)]) - truth[size_t(i)];
            error += e * e;
            size += truth[size_t(i)] * truth[size_t(i)];
        }
        most = std::max(most, std::sqrt(error / size));
    }
    return most;
}
std::vector<float> read_buffer(const Engine& e, Buffer which) {
    std::vector<float> v(size_t(e.table.count));
    e.read(which, v.data());
    return v;
}
// A few training steps; the losses.
std::vector<double> train_steps(Engine& e, int64 steps, int64 B, int64 T, double lr, int64 first = 1) {
    std::vector<double> losses;
    for (int64 step = first; step < first + steps; ++step) {
        const auto tokens = random_tokens(e.config.V, B * T + 1, ("step" + std::to_string(step)).c_str());
        const DropoutKey key{1, uint32_t(step), 0};
        e.zero_gradients();
        losses.push_back(e.forward(tokens.data(), tokens.data() + 1, B, T, &key));
        e.backward(1);
        const double norm = e.gradient_norm();
        e.update(AdamW(), lr, step, norm > 1 ? 1 / norm : 1);
    }
    return losses;
}

}  // namespace

// The oracle's noise, measured for each tensor at this size, says what bf16 may do to it (docs/oracle.md).
TEST_CASE("cuda: a whole pass, decoding and training steps pass the oracle's own tolerances, for every kind of model") {
    TempDir tmp;
    std::vector<std::vector<std::string>> models;
    const auto add = [&](const std::vector<std::string>& words) {
        // Later options prevail. T is no multiple of Q or of the kernels' chunks, N is not P, V and D are no multiples of 8.
        models.push_back({"oracle", "--layers",  "3",  "--d-model",     "36", "--heads",       "6", "--d-ff",
                          "40",     "--d-state", "10", "--vocab",       "37", "--chunk",       "8", "--batch",
                          "2",      "--seq-len", "83", "--attn-period", "3",  "--attn-offset", "1", "--adamw-steps",
                          "2"});
        models.back().insert(models.back().end(), words.begin(), words.end());
    };
    add({"--tie", "true", "--kv-heads", "2", "--adamw-steps", "10"});
    add({"--tie", "false"});
    add({"--tie", "false", "--kv-heads", "1", "--attn-period", "1", "--attn-offset", "0"});
    add({"--attn-period", "0", "--layers", "2"});
    add({"--heads", "1", "--d-model", "10", "--d-state", "16"});
    add({"--ssd-decay", "false"});
    add({"--state-cotangent", "false", "--seq-len", "5"});
    add({"--d-model", "40", "--heads", "5", "--d-state", "8", "--seq-len", "128", "--vocab", "64"});
    add({"--d-model", "128", "--heads", "2", "--d-state", "64", "--d-ff", "320", "--seq-len", "200", "--batch", "1",
         "--chunk", "64"});
    add({"--d-model", "128", "--heads", "2", "--d-state", "128", "--d-ff", "320", "--seq-len", "583", "--batch", "1",
         "--chunk", "64", "--layers", "2", "--attn-period", "2"});
    for (size_t i = 0; i <= models.size(); ++i) {
        const bool stored = i == models.size();
        const std::string oracle = stored ? std::string(SOURCE_DIR) + "/test/oracle.safetensors" : tmp / "oracle";
        CAPTURE(i);
        if (!stored) {
            const auto words = models[i];
            std::vector<std::string> all = words;
            all.insert(all.end(), {"--out", oracle});
            REQUIRE_EQ(run_program("ref_cpu", all).err, "");
        }
        for (const Case& k : precisions) {
            CAPTURE(k.name);
            const RunResult made =
                run_program("transxssm", {"candidate", oracle, "--out", tmp / "candidate", "--precision", k.name});
            REQUIRE_EQ(made.err, "");
            const RunResult r =
                run_program("ref_cpu", {"compare", oracle, tmp / "candidate", "--dtype", k.name, "--partial"});
            CHECK_MESSAGE(r.status == 0, r.out);
            // What the engine does not have, and nothing else: numbers that stay on chip, and the host's sampler.
            for (size_t at = 0; (at = r.out.find("\nmissing  ", at)) != std::string::npos;) {
                at += strlen("\nmissing  ");
                const std::string name = r.out.substr(at, r.out.find(' ', at + 1) - at);
                const std::string last = name.substr(name.rfind('.') + 1);
                const bool on_chip = last == "cs" || last == "state_in" || last == "state_out";
                CHECK_MESSAGE((on_chip || contains(name, "decode.") ? on_chip || last == "y" : last == "token"), name);
            }
        }
    }
}

TEST_CASE("cuda: in fp32 loss and every gradient of the whole model equal the CPU's, with dropout too") {
    for (const auto& kind : kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        const int64 B = 2, T = 70;
        const auto tokens = random_tokens(c.V, B * T), targets = random_tokens(c.V, B * T, "targets");
        const auto w = lively_weights(Precision::fp32, c);
        const DropoutKey key{1, 2, 3};
        Model<double> truth(c);
        std::copy(w.begin(), w.end(), truth.weights.begin());
        const double want = truth.forward(tokens.data(), targets.data(), B, T, &key, nullptr);
        const auto gpu = make_cuda_engine(c, Precision::fp32);
        gpu->write(Buffer::weights, w.data());
        CHECK(gpu->forward(tokens.data(), targets.data(), B, T, &key) == doctest::Approx(want).epsilon(1e-5));
        gpu->zero_gradients();
        gpu->backward(0.5);
        truth.backward(0.5);
        const auto g = read_buffer(*gpu, Buffer::gradients);
        for (const ParamSpec& s : truth.table.specs) {
            if (s.param == Param::A_log && !c.ssd_decay) continue;  // exactly zero
            CHECK_EQ(
                compare("gradient of " + s.name, g.data() + s.offset, truth.gradients.data() + s.offset, s.count, 1e-3),
                "");
        }
        double squares = 0;
        for (const float x : g) squares += double(x) * double(x);
        CHECK(gpu->gradient_norm() == doctest::Approx(std::sqrt(squares)).epsilon(1e-9));
        CHECK_EQ(gpu->find_non_finite(), "");
    }
}

// The first pass lays out memory by what it is asked for, not by what the engine did before.
TEST_CASE("cuda: the first training pass after a short one, and the first of all, give the gradients of any other") {
    Config c = small();
    c.attn_period = 1;
    c.attn_offset = 0;
    c.L = 2;
    const int64 B = 4, T = 4000;  // many tokens for the heads' width
    const auto tokens = random_tokens(c.V, B * T + 1);
    const auto gradients = [&](Engine& e) {
        e.zero_gradients();
        e.forward(tokens.data(), tokens.data() + 1, B, T);
        e.backward(1);
        return read_buffer(e, Buffer::gradients);
    };
    const auto first = make_cuda_engine(c, Precision::bf16), later = make_cuda_engine(c, Precision::bf16);
    for (Engine* e : {first.get(), later.get()}) e->write(Buffer::weights, lively_weights(Precision::bf16, c).data());
    const std::string plan = first->plan(B, T);
    const auto want = gradients(*first);
    CHECK_EQ(first->plan(B, T), plan);
    later->forward(tokens.data(), tokens.data() + 1, 1, 2);
    CHECK_EQ(compare_bits("gradients", gradients(*later), want), "");
    CHECK_EQ(compare_bits("gradients", gradients(*first), want), "");
}

TEST_CASE("cuda: recomputed activations give the same bits") {
    const auto check = [](const Case& k, const std::string& name, const Config& c, int64 B, int64 T) {
        CAPTURE(k.name);
        CAPTURE(name);
        const auto w = lively_weights(k.precision, c);
        const auto kept = make_cuda_engine(c, k.precision), made = make_cuda_engine(c, k.precision, true);
        for (Engine* e : {kept.get(), made.get()}) e->write(Buffer::weights, w.data());
        const auto losses = train_steps(*kept, 3, B, T, 1e-3);
        CHECK_EQ(compare_bits("losses", train_steps(*made, 3, B, T, 1e-3), losses), "");
        for (const Buffer b : {Buffer::gradients, Buffer::weights})
            CHECK_EQ(compare_bits("buffer", read_buffer(*made, b), read_buffer(*kept, b)), "");
        CHECK_EQ(made->find_non_finite(), "");
        CHECK(contains(made->plan(B, T), "recomputed"));
    };
    for (const Case& k : precisions)
        for (const auto& kind : kinds()) check(k, kind.first, kind.second, 2, 70);
    Config c = small();  // for the kernels of many tokens
    c.D = 64;
    c.F = 192;
    check(precisions[1], "many tokens", c, 2, 4200);
}

TEST_CASE("cuda: prefill in any split and single steps equal the CPU's full pass") {
    for (const Case& k : precisions)
        for (const auto& kind : kinds()) {
            CAPTURE(k.name);
            CAPTURE(kind.first);
            Config c = kind.second;
            const int64 B = 2, T = 70;
            const auto tokens = random_tokens(c.V, B * T);
            const auto w = lively_weights(k.precision, c);
            Model<double> truth(c);
            std::copy(w.begin(), w.end(), truth.weights.begin());
            truth.forward(tokens.data(), nullptr, B, T, nullptr, nullptr);
            const auto gpu = make_cuda_engine(c, k.precision);
            gpu->write(Buffer::weights, w.data());
            // Some comparisons are of one token alone. In bf16 that allows twice what rounding does to the worst one.
            const double tol = k.precision == Precision::fp32 ? 1e-4 : 2 * bf16_noise(c, w, tokens, B, truth.logits);
            for (const std::vector<int64>& split :
                 std::vector<std::vector<int64>>{{70}, {1, 69}, {64, 6}, {65, 1, 1, 3}, {1, 1, 66, 2}}) {
                const auto state = gpu->new_state(B, T + 3);
                int64 at = 0;
                for (const int64 n : split) {
                    std::vector<int32_t> part;
                    for (int64 b = 0; b < B; ++b)
                        part.insert(part.end(), tokens.begin() + b * T + at, tokens.begin() + b * T + at + n);
                    const bool every = n % 2 == 1;
                    std::vector<float> logits(size_t(B * (every ? n : 1) * c.V));
                    gpu->step(*state, part.data(), n, logits.data(), every);
                    for (int64 b = 0; b < B; ++b) {
                        const int64 first = every ? 0 : n - 1, count = n - first;
                        CHECK_EQ(compare("logits", logits.data() + b * count * c.V,
                                         truth.logits.data() + (b * T + at + first) * c.V, count * c.V, tol),
                                 "");
                    }
                    at += n;
                }
            }
        }
}

// Tokens one by one against the CPU's full pass; the same bits twice; and on the way a state that is saved and loaded.
namespace {
void check_decoding(Precision precision, const Config& c, int64 B, int64 prompt, int64 steps, double tol) {
    const int64 T = prompt + steps;
    const auto tokens = random_tokens(c.V, B * T);
    const auto w = lively_weights(precision, c);
    const auto gpu = make_cuda_engine(c, precision), cpu = make_cpu_engine(c);
    gpu->write(Buffer::weights, w.data());
    cpu->write(Buffer::weights, w.data());
    const auto columns_of = [&](int64 at, int64 n) {
        std::vector<int32_t> part;
        for (int64 b = 0; b < B; ++b)
            part.insert(part.end(), tokens.begin() + b * T + at, tokens.begin() + b * T + at + n);
        return part;
    };
    TempDir tmp;
    std::vector<float> first(size_t(B * c.V)), logits(first), wanted(first);
    const auto reference = cpu->new_state(B, T);
    for (int run = 0; run < 2; ++run) {
        std::unique_ptr<State> state = gpu->new_state(B, T);
        gpu->step(*state, columns_of(0, prompt).data(), prompt, logits.data());
        if (run == 0) cpu->step(*reference, columns_of(0, prompt).data(), prompt, wanted.data());
        for (int64 i = 0; i < steps; ++i) {
            if (run == 1 && i == steps / 2) {
                gpu->save_state(*state, tmp / "state");
                state = gpu->load_state(tmp / "state", T);
            }
            gpu->step(*state, columns_of(prompt + i, 1).data(), 1, logits.data());
            if (run == 1) continue;
            cpu->step(*reference, columns_of(prompt + i, 1).data(), 1, wanted.data());
            CHECK_EQ(compare("logits", logits, wanted, tol), "");
        }
        if (run == 0) first = logits;
    }
    CHECK_EQ(compare_bits("logits", logits, first), "");
}
Config wide_model() {  // widths that take every fast path: D and F multiples of 256, for the kernel of whole tokens
    Config c = small();
    c.V = 20003;  // several tiles of the head for a block
    c.D = 256;
    c.H = 4;
    c.Hkv = 4;
    c.N = 64;
    c.F = 512;
    c.L = 4;
    c.Q = 64;
    return c;
}
}  // namespace

TEST_CASE("cuda: decoding 1 to 8, 20 and 64 sequences equals the CPU's, for every kind of model") {
    for (const Case& k : precisions) {
        CAPTURE(k.name);
        const double tol = k.precision == Precision::fp32 ? 1e-4 : 0.06;
        for (const int64 B : std::vector<int64>{1, 2, 3, 4, 5, 6, 7, 8, 20, 64}) {
            CAPTURE(B);
            for (const auto& kind : kinds()) {
                CAPTURE(kind.first);
                if (B == 3 || B == 20 || (kind.first == "hybrid" && B % 2 == 0))
                    check_decoding(k.precision, kind.second, B, 5, 6, tol);
            }
            check_decoding(k.precision, wide_model(), B, 3, 6, tol);
        }
        Config c = wide_model();
        c.Hkv = 2;
        c.tie = false;
        c.ssd_decay = false;
        c.N = 128;
        for (const int64 B : std::vector<int64>{2, 5}) check_decoding(k.precision, c, B, 1, 6, tol);
        for (const int64 B : std::vector<int64>{1, 3, 8, 9})  // a cache in several splits
            check_decoding(k.precision, wide_model(), B, 900, 5, tol);
        c.attn_period = 0;
        check_decoding(k.precision, c, 2, 1, 6, tol);
        c = wide_model();  // for the kernel of whole tokens: more columns than a warp holds at once
        c.V = 500;
        c.D = c.F = 1024;
        c.H = c.Hkv = 8;
        c.N = 32;
        c.L = 2;
        for (const int64 B : std::vector<int64>{1, 2, 4, 5}) check_decoding(k.precision, c, B, 3, 6, 1.5 * tol);
        c.D = 512;  // wider heads
        c.F = 1280;
        c.H = c.Hkv = 4;
        c.N = 52;
        for (const int64 B : std::vector<int64>{1, 4, 8}) check_decoding(k.precision, c, B, 3, 6, 1.5 * tol);
    }
}

TEST_CASE("cuda: greedy decoding chooses the tokens that its own logits rank first") {
    for (const Case& k : precisions)
        for (const Config& c : {small(), wide_model()})
            for (const int64 B : std::vector<int64>{1, 2, 4, 7, 20}) {
                CAPTURE(k.name);
                CAPTURE(B);
                const auto gpu = make_cuda_engine(c, k.precision);
                gpu->write(Buffer::weights, lively_weights(k.precision, c).data());
                const int64 count = 70, vocab = c.V - 2;
                std::vector<int32_t> last = random_tokens(c.V, B), chosen(size_t(B * count)), wanted(chosen);
                const auto a = gpu->new_state(B, count), b = gpu->new_state(B, count);
                gpu->decode_greedy(*a, last.data(), count, vocab, chosen.data());
                gpu->Engine::decode_greedy(*b, last.data(), count, vocab, wanted.data());  // by the logits, on the host
                CHECK(chosen == wanted);
                CHECK_EQ(a->position, count);
                CHECK_ERROR(gpu->decode_greedy(*a, last.data(), 1, vocab, chosen.data()), "room for 70");
            }
    auto w = lively_weights(Precision::bf16, wide_model());
    w[size_t(ParamTable(wide_model()).offset(Param::final_norm)) + 7] = NAN;
    const auto gpu = make_cuda_engine(wide_model(), Precision::bf16);
    gpu->write(Buffer::weights, w.data());
    int32_t token = 1;
    CHECK_ERROR(gpu->decode_greedy(*gpu->new_state(1, 4), &token, 2, 100, &token), "is not a finite number");
}

TEST_CASE("cuda: decoding follows the weights when they change, in the midst of a sequence and after other passes") {
    for (const Case& k : precisions)
        for (const auto& kind : std::vector<std::pair<Config, int64>>{{small(), 3}, {wide_model(), 2}}) {
            const Config& c = kind.first;
            const int64 B = kind.second, count = 9;
            CAPTURE(k.name);
            CAPTURE(c.D);
            const auto tokens = random_tokens(c.V, B * count);
            // One engine goes on; the other is new after each change, with the state that was saved.
            const auto old = make_cuda_engine(c, k.precision);
            old->write(Buffer::weights, lively_weights(k.precision, c).data());
            const auto state = old->new_state(B, count);
            TempDir tmp;
            std::vector<float> logits(size_t(B * c.V)), want(logits), before;
            for (int64 at = 0; at < count; ++at) {
                if (at == 3) train_steps(*old, 1, 2, 9, 1e-2);  // an optimizer's step, after which a graph is there
                if (at == 6) {
                    auto w = read_buffer(*old, Buffer::weights);
                    for (float& x : w) x *= 0.9f;
                    old->write(Buffer::weights, w.data());
                }
                if (at == 7) old->step(*old->new_state(B, 5), tokens.data(), 5, logits.data());  // a prompt
                const auto fresh = make_cuda_engine(c, k.precision);
                fresh->write(Buffer::weights, read_buffer(*old, Buffer::weights).data());
                old->save_state(*state, tmp / "state");
                const auto copy = fresh->load_state(tmp / "state", count);
                old->step(*state, tokens.data() + at * B, 1, logits.data());
                fresh->step(*copy, tokens.data() + at * B, 1, want.data());
                CHECK_EQ(compare_bits("logits", logits, want), "");
                CHECK(logits != before);
                before = logits;
            }
        }
}

TEST_CASE("cuda: a saved state goes on as if it had not been saved, and moves between CPU and GPU") {
    const Config c = small();
    TempDir tmp;
    const auto w = lively_weights(Precision::fp32, c);
    const auto tokens = random_tokens(c.V, 40);
    const auto gpu = make_cuda_engine(c, Precision::fp32), cpu = make_cpu_engine(c);
    gpu->write(Buffer::weights, w.data());
    cpu->write(Buffer::weights, w.data());
    std::vector<float> a(size_t(2 * c.V)), b = a, d = a;
    const auto s = gpu->new_state(2, 20);
    gpu->step(*s, tokens.data(), 9, a.data());
    gpu->save_state(*s, tmp / "state");
    const auto again = gpu->load_state(tmp / "state", 30);
    const auto moved = cpu->load_state(tmp / "state", 30);
    gpu->step(*s, tokens.data() + 18, 3, a.data());
    gpu->step(*again, tokens.data() + 18, 3, b.data());
    cpu->step(*moved, tokens.data() + 18, 3, d.data());
    CHECK_EQ(compare_bits("logits", b, a), "");
    CHECK_EQ(compare("logits", a, d, 1e-4), "");
    CHECK_ERROR(gpu->step(*s, tokens.data(), 20, a.data()), "room for 20");
    const auto another = make_cuda_engine(c, Precision::fp32);
    CHECK_ERROR(another->step(*s, tokens.data(), 1, a.data()), "another engine's");
}

TEST_CASE("cuda: fp32 training follows the CPU's losses for 20 steps") {
    for (const auto& kind : kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        const auto gpu = make_cuda_engine(c, Precision::fp32), cpu = make_cpu_engine(c);
        const auto w = initial_weights(c, 1);
        gpu->write(Buffer::weights, w.data());
        cpu->write(Buffer::weights, w.data());
        CHECK_EQ(compare("losses", train_steps(*gpu, 20, 2, 33, 1e-3), train_steps(*cpu, 20, 2, 33, 1e-3), 1e-4), "");
        CHECK_EQ(compare("weights", read_buffer(*gpu, Buffer::weights), read_buffer(*cpu, Buffer::weights), 1e-3), "");
    }
}

TEST_CASE("cuda: two runs give the same bits, and a run carried over by its buffers goes on with the same bits") {
    for (const Case& k : precisions)
        for (const auto& kind : kinds()) {
            CAPTURE(k.name);
            CAPTURE(kind.first);
            const Config& c = kind.second;
            const auto w = initial_weights(c, 1);
            std::unique_ptr<Engine> e[3];
            for (auto& engine : e) {
                engine = make_cuda_engine(c, k.precision);
                engine->write(Buffer::weights, w.data());
            }
            const auto first = train_steps(*e[0], 6, 3, 65, 1e-3), second = train_steps(*e[1], 3, 3, 65, 1e-3);
            for (const Buffer b : {Buffer::weights, Buffer::exp_avg, Buffer::exp_avg_sq})
                e[2]->write(b, read_buffer(*e[1], b).data());
            const auto third = train_steps(*e[2], 3, 3, 65, 1e-3, 4);
            CHECK(e[0]->gemm_choices().size() > 1);  // the library's version, and at least one product
            CHECK((e[0]->gemm_choices() == e[1]->gemm_choices()));
            for (size_t i = 0; i < 3; ++i) {
                CHECK(first[i] == second[i]);
                CHECK(first[i + 3] == third[i]);
            }
            for (const Buffer b : {Buffer::weights, Buffer::exp_avg, Buffer::exp_avg_sq})
                CHECK_EQ(compare_bits("buffer", read_buffer(*e[2], b), read_buffer(*e[0], b)), "");
        }
}

TEST_CASE("cuda: logits too many to be kept are made again, with the same loss and gradients") {
    Config c = small();
    c.V = 50257;
    c.L = 1;
    c.D = 8;
    c.H = c.Hkv = 1;
    const int64 B = 3, T = 30000;  // 90,000 rows of 50,264 logits: 9 GB in bf16
    const auto gpu = make_cuda_engine(c, Precision::bf16);
    gpu->write(Buffer::weights, initial_weights(c, 1).data());
    const auto tokens = random_tokens(c.V, B * T + 1);
    gpu->zero_gradients();
    const double all = gpu->forward(tokens.data(), tokens.data() + 1, B, T);
    gpu->backward(1);
    const auto want = read_buffer(*gpu, Buffer::gradients);
    gpu->zero_gradients();
    double parts = 0;
    for (int64 b = 0; b < B; ++b) {  // one sequence at a time: they are kept
        parts += gpu->forward(tokens.data() + b * T, tokens.data() + b * T + 1, 1, T) / double(B);
        gpu->backward(1.0 / double(B));
    }
    CHECK(parts == doctest::Approx(all).epsilon(1e-6));
    CHECK_EQ(compare("gradients", read_buffer(*gpu, Buffer::gradients), want, 2e-2),
             "");  // du is rounded at another scale
}

// 45 equal sequences: the loss and its gradients are those of one, unless an index of the 2.26e9 logits overflows.
TEST_CASE("cuda: more than 2^31 logits, kept in memory, give the loss and the gradients of each sequence alone") {
    Config c = small();
    c.V = 50257;
    c.L = 1;
    c.D = 8;
    c.H = c.Hkv = 1;
    c.attn_period = 0;
    const int64 B = 45, T = 1000;
    REQUIRE(B * T * c.V > int64(1) << 31);
    const auto w = lively_weights(Precision::bf16, c);
    const auto text = random_tokens(c.V, T + 1);
    std::vector<int32_t> tokens, targets;
    for (int64 b = 0; b < B; ++b) {
        tokens.insert(tokens.end(), text.begin(), text.end() - 1);
        targets.insert(targets.end(), text.begin() + 1, text.end());
    }
    const auto gpu = make_cuda_engine(c, Precision::bf16);
    gpu->write(Buffer::weights, w.data());
    gpu->zero_gradients();
    const double loss = gpu->forward(tokens.data(), targets.data(), B, T);
    gpu->backward(1);
    const auto all = read_buffer(*gpu, Buffer::gradients);
    gpu->zero_gradients();
    CHECK(gpu->forward(tokens.data(), targets.data(), 1, T) == doctest::Approx(loss).epsilon(1e-6));
    gpu->backward(1);
    // gradients of activations are smaller by 45, which is no power of 2: they are rounded elsewhere
    CHECK_EQ(compare("gradients", all, read_buffer(*gpu, Buffer::gradients), 1e-2), "");
    Model<float> truth(c);
    truth.weights = w;
    CHECK(truth.forward(tokens.data(), targets.data(), 1, T, nullptr, nullptr) == doctest::Approx(loss).epsilon(2e-3));
}

TEST_CASE("cuda: what cannot be done is one line that says why") {
    Config c = small();
    const auto gpu = make_cuda_engine(c, Precision::bf16);
    gpu->write(Buffer::weights, initial_weights(c, 1).data());
    const auto tokens = random_tokens(c.V, 20);
    CHECK_ERROR(gpu->backward(1), "forward");
    gpu->forward(tokens.data(), tokens.data() + 1, 1, 11);
    gpu->backward(1);
    CHECK_ERROR(gpu->backward(1), "forward");
    const std::vector<int32_t> bad = {1, 2, int32_t(c.V)};
    CHECK_ERROR(gpu->forward(bad.data(), tokens.data(), 1, 3), "token 29", "29");
    c.T = 1 << 14;
    c.D = 1024;
    c.H = c.Hkv = 16;
    c.F = 65536;
    const auto large = make_cuda_engine(c, Precision::bf16);
    const std::vector<int32_t> many(size_t(1) << 21, 1);
    CHECK_ERROR(large->forward(many.data(), many.data(), 128, 1 << 14), "128 x 16384", "a batch of", "fits");
    c.N = 4096;
    CHECK_ERROR(make_cuda_engine(c, Precision::bf16), "N 4096", "on-chip");
    std::vector<float> w = initial_weights(small(), 1);
    w[100] = NAN;
    gpu->write(Buffer::weights, w.data());
    CHECK(contains(gpu->find_non_finite(), "weight model.word_embed.weight, element 100, is nan"));
}
// ---------------------------------------------------------------------------------------------------------------------
// The programs
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// A run of ./train on a page of this repository, into OUT.
RunResult train_on_page(const std::string& out, const std::vector<std::string>& options) {
    std::vector<std::string> words = {"--data",         std::string(SOURCE_DIR) + "/docs/model.md",
                                      "--out",          out,
                                      "--sample-every", "0",
                                      "--eval-every",   "0",
                                      "--save-every",   "0"};
    words.insert(words.end(), options.begin(), options.end());
    return run_program("train", words);
}
// Nats per token that `eval` finds on another page.
double eval_loss(const std::string& program, const std::string& run, const std::vector<std::string>& options = {}) {
    std::vector<std::string> words = {"eval", run, "--data", std::string(SOURCE_DIR) + "/docs/rope.md"};
    words.insert(words.end(), options.begin(), options.end());
    const RunResult r = run_program(program, words);
    CHECK_EQ(r.err, "");
    const size_t at = r.out.find("\nloss ");
    return at == std::string::npos ? -1 : strtod(r.out.c_str() + at + strlen("\nloss "), nullptr);
}

}  // namespace

TEST_CASE("cuda: bf16 learns as well as the CPU, and a checkpoint means the same on both") {
    TempDir tmp;
    const std::vector<std::string> options = {"--preset", "tiny", "--steps", "150"};
    const auto with = [&](std::vector<std::string> more) {
        more.insert(more.end(), options.begin(), options.end());
        return more;
    };
    REQUIRE_EQ(train_on_page(tmp / "cpu", with({"--device", "cpu"})).err, "");
    REQUIRE_EQ(train_on_page(tmp / "gpu", with({"--device", "cuda"})).err, "");
    CHECK(contains(read_file(resolve_checkpoint(tmp / "gpu") + "/trainer.json"), "bf16\""));
    double ends[2];
    for (const int on_gpu : {0, 1}) {
        const std::string run = tmp / (on_gpu ? "gpu" : "cpu");
        const double want = eval_loss("ref_cpu", run);
        CHECK(want > 0.5);
        CHECK(eval_loss("transxssm", run, {"--precision", "fp32"}) == doctest::Approx(want).epsilon(1e-5));
        CHECK(eval_loss("transxssm", run) == doctest::Approx(want).epsilon(2e-3));
        ends[on_gpu] = want;
    }
    CHECK(ends[1] == doctest::Approx(ends[0]).epsilon(0.02));
}

TEST_CASE("cuda: two runs of the program leave the same checkpoint, and so do a resumed one and one that recomputes") {
    for (const Case& k : precisions) {
        CAPTURE(k.name);
        TempDir tmp;
        const auto with = [&](std::vector<std::string> more) {
            more.insert(more.end(),
                        {"--device",  "cuda", "--precision", k.name, "--layers",      "3", "--d-model",     "36",
                         "--heads",   "2",    "--d-state",   "10",   "--attn-period", "3", "--attn-offset", "1",
                         "--dropout", "0.1",  "--batch",     "3",    "--grad-accum",  "2", "--seq-len",     "83",
                         "--steps",   "12"});
            return more;
        };
        REQUIRE_EQ(train_on_page(tmp / "a", with({})).err, "");
        REQUIRE_EQ(train_on_page(tmp / "b", with({})).err, "");
        REQUIRE_EQ(train_on_page(tmp / "c", with({"--recompute"})).err, "");
        REQUIRE_EQ(train_on_page(tmp / "d", with({"--stop-after", "5"})).err, "");
        REQUIRE_EQ(run_program("train", {"--resume", tmp / "d", "--recompute"}).err, "");
        for (const char* other : {"b", "c", "d"})
            for (const char* file : {"/step-12/model.safetensors", "/step-12/optimizer.safetensors"}) {
                CAPTURE(other);
                CHECK(read_file(tmp / other + file) == read_file(tmp / "a" + file));
            }
    }
}

TEST_CASE("without a GPU that can be used every program that needs one says so in one line") {
    TempDir tmp;
    const std::string oracle = std::string(SOURCE_DIR) + "/test/oracle.safetensors";
    RunOptions hidden;
    hidden.env = {"CUDA_VISIBLE_DEVICES=-1"};
    const std::string why = have_gpu() ? "no NVIDIA GPU was found" : cuda::problem();
    CHECK_EQ(refusal(run_program("train", {"--device", "cuda"}, hidden), 1, {"--device cuda", why, "--device cpu"}),
             "");
    CHECK_EQ(refusal(run_program("transxssm", {"bench"}, hidden), 1, {why}), "");
    CHECK_EQ(refusal(run_program("transxssm", {"candidate", oracle, "--out", tmp / "c"}, hidden), 1, {why}), "");
    CHECK(!file_exists(tmp / "c"));
}
#else
TEST_CASE("cuda: every op, the whole model, decoding and determinism, against the CPU reference") {}  // always left out
#endif
