// The layers of the CPU reference, one by one. The definitions are short enough to be written again here, naively.
#include "check.h"

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace ref;

namespace {

template <class T>
std::vector<T> normals(const char* name, int64 n, double scale = 1, double mean = 0) {
    const Philox stream(11, name);
    std::vector<T> v(static_cast<size_t>(n));
    for (int64 i = 0; i < n; ++i) v[size_t(i)] = T(mean + scale * stream.normal_at(uint64_t(i)));
    return v;
}

template <class T>
std::vector<T> convert(const std::vector<double>& v) {
    return std::vector<T>(v.begin(), v.end());
}

// ---- SSD problems ---------------------------------------------------------------------------------------------------

struct SsdCase {
    SsdShape n;
    std::vector<double> cbx, dt, dA, S_0, dY, dS_T;

    SsdCase(int64 B, int64 T, int64 H, int64 P, int64 N, int64 Q, bool decay = true)
        : n{B, T, H, P, N, Q, H * (2 * N + P)} {
        cbx = normals<double>("cbx", B * T * n.ld);
        S_0 = normals<double>("S_0", B * H * P * N);
        dY = normals<double>("dY", B * T * H * P);
        dS_T = normals<double>("dS_T", B * H * P * N);
        const Philox stream(3, "dt");
        for (int64 i = 0; i < B * T * H; ++i) {
            dt.push_back(0.01 + 0.5 * stream.uniform_at(uint64_t(i)));
            dA.push_back(decay ? -2 * dt.back() : 0);
        }
    }
};

struct SsdResult {
    std::vector<double> Y, S_T, d, ddt, ddA, dS_0;
};

enum class Form { recurrent, quadratic, chunked };

template <class T>
SsdResult run_ssd(const SsdCase& c, Form form, bool state = true) {
    const SsdShape& n = c.n;
    const auto cbx = convert<T>(c.cbx), dt = convert<T>(c.dt), dA = convert<T>(c.dA), S_0 = convert<T>(c.S_0),
               dY = convert<T>(c.dY), dS_T = convert<T>(c.dS_T);
    const int64 b = n.H * n.N, x = 2 * b, NC = (n.T + n.Q - 1) / n.Q;
    std::vector<T> Y(dY.size()), S_T(S_0.size()), d(cbx.size()), ddt(dt.size()), ddA(dt.size()), dS_0(S_0.size());
    std::vector<T> chunk_states(size_t(n.B * n.H * NC * n.P * n.N));
    const T *p = cbx.data(), *s0 = state ? S_0.data() : nullptr, *dst = state ? dS_T.data() : nullptr;
    T *q = d.data(), *ds0 = state ? dS_0.data() : nullptr, *st = state ? S_T.data() : nullptr;
    switch (form) {
        case Form::recurrent:
            ssd_recurrent_forward(Y.data(), st, p, p + b, p + x, dt.data(), dA.data(), s0, n);
            ssd_recurrent_backward(q, q + b, q + x, ddt.data(), ddA.data(), ds0, dY.data(), dst, p, p + b, p + x,
                                   dt.data(), dA.data(), s0, n);
            break;
        case Form::quadratic:
            ssd_quadratic_forward(Y.data(), st, p, p + b, p + x, dt.data(), dA.data(), s0, n);
            ssd_quadratic_backward(q, q + b, q + x, ddt.data(), ddA.data(), ds0, dY.data(), dst, p, p + b, p + x,
                                   dt.data(), dA.data(), s0, n);
            break;
        case Form::chunked:
            ssd_chunked_forward(Y.data(), st, chunk_states.data(), p, p + b, p + x, dt.data(), dA.data(), s0, n);
            ssd_chunked_backward<T>(q, q + b, q + x, ddt.data(), ddA.data(), ds0, nullptr, dY.data(), dst, p, p + b,
                                    p + x, dt.data(), dA.data(), chunk_states.data(), n);
    }
    const auto wide = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
    return {wide(Y), wide(S_T), wide(d), wide(ddt), wide(ddA), wide(dS_0)};
}

void check_equal(const SsdResult& got, const SsdResult& want, double tolerance) {
    CHECK_EQ(compare("Y", got.Y, want.Y, tolerance), "");
    CHECK_EQ(compare("S_T", got.S_T, want.S_T, tolerance), "");
    CHECK_EQ(compare("dC,dB,dX", got.d, want.d, tolerance), "");
    CHECK_EQ(compare("ddt", got.ddt, want.ddt, tolerance), "");
    // ddA is the difference of sums the size of ddt, so that its error is measured by both
    double norm2 = 0;
    for (const auto* v : {&want.ddt, &want.ddA})
        for (const double x : *v) norm2 += x * x;
    CHECK_EQ(compare("ddA", got.ddA, want.ddA, HUGE_VAL, tolerance * std::sqrt(norm2)), "");
    CHECK_EQ(compare("dS_0", got.dS_0, want.dS_0, tolerance), "");
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

// K products of order 1 are added: each addition is off by at most eps/2 of the sum so far, which stays below 16 or so
// at these K.
template <class T>
static void matmul_against_triple_loop() {
    const double eps = double(std::numeric_limits<T>::epsilon());
    for (const int64 M : {1, 3, 8, 9, 64, 70})
        for (const int64 N : {1, 31, 32, 33, 520})
            for (const int64 K : {1, 5, 64, 257})
                for (const Layout la : {Layout::plain, Layout::transposed})
                    for (const Layout lb : {Layout::plain, Layout::transposed}) {
                        const int64 pad = 3;  // rows longer than needed: strides must be honoured
                        const int64 lda = (la == Layout::plain ? K : M) + pad,
                                    ldb = (lb == Layout::plain ? N : K) + pad;
                        const auto a = normals<T>("a", (la == Layout::plain ? M : K) * lda);
                        const auto b = normals<T>("b", (lb == Layout::plain ? K : N) * ldb);
                        auto c = normals<T>("c", M * (N + pad));
                        std::vector<double> want(c.begin(), c.end());
                        for (int64 i = 0; i < M; ++i)
                            for (int64 j = 0; j < N; ++j)
                                for (int64 k = 0; k < K; ++k)
                                    want[size_t(i * (N + pad) + j)] +=
                                        double(a[size_t(la == Layout::plain ? i * lda + k : k * lda + i)]) *
                                        double(b[size_t(lb == Layout::plain ? k * ldb + j : j * ldb + k)]);
                        matmul(c.data(), N + pad, a.data(), lda, la, b.data(), ldb, lb, M, N, K, true);
                        CAPTURE(M);
                        CAPTURE(N);
                        CAPTURE(K);
                        REQUIRE_EQ(compare("C", std::vector<double>(c.begin(), c.end()), want, HUGE_VAL,
                                           8 * eps * double(K + 2)),
                                   "");
                        // without accumulation the old contents do not matter, not even NaN
                        std::vector<T> fresh(c.size(), T(NAN)), sum = normals<T>("c", M * (N + pad));
                        matmul(fresh.data(), N + pad, a.data(), lda, la, b.data(), ldb, lb, M, N, K, false);
                        for (int64 i = 0; i < M; ++i)
                            for (int64 j = 0; j < N; ++j)
                                sum[size_t(i * (N + pad) + j)] += fresh[size_t(i * (N + pad) + j)];
                        REQUIRE_EQ(compare("C fresh", std::vector<double>(sum.begin(), sum.end()), want, HUGE_VAL,
                                           8 * eps * double(K + 2)),
                                   "");
                    }
}
TEST_CASE("matmul: every layout, stride and edge equals the triple loop") {
    matmul_against_triple_loop<float>();
    matmul_against_triple_loop<double>();
}

TEST_CASE("gradients: every op and the whole hybrid agree with central differences to 1e-6") {
    std::map<std::string, int> ops;
    for (const GradientError& e : gradient_check()) {
        CAPTURE(e.op);
        CAPTURE(e.tensor);
        CHECK(e.relative <= 1e-6);  // false for NaN
        ++ops[e.op];
    }
    for (const char* op : {"embedding", "linear", "rmsnorm", "rope", "attention", "ssd dt", "ssd recurrent",
                           "ssd quadratic", "ssd chunked", "residual", "residual, dropout", "swiglu", "cross-entropy",
                           "model, tied head", "model, untied head"}) {
        CAPTURE(op);
        CHECK(ops[op] >= 1);
    }
    CHECK_EQ(ops["ssd chunked"], 4);  // C|B|X, dt, dA, S_0
}

TEST_CASE("ssd: recurrent, quadratic and chunked are one function, forward and backward, for any T and Q") {
    const int64 Q = 5;
    for (const int64 T : {int64(1), Q - 1, Q, Q + 1, 2 * Q + 3})
        for (const int64 H : {1, 3})
            for (const bool wide : {false, true})
                for (const bool decay : {true, false})
                    for (const bool state : {true, false}) {
                        CAPTURE(T);
                        CAPTURE(H);
                        const SsdCase c(2, T, H, wide ? 6 : 4, wide ? 2 : 8, Q, decay);
                        const SsdResult truth = run_ssd<double>(c, Form::recurrent, state);
                        // double: about 100 sums of order 1, each 2e-16
                        check_equal(run_ssd<double>(c, Form::quadratic, state), truth, 1e-13);
                        check_equal(run_ssd<double>(c, Form::chunked, state), truth, 1e-13);
                    }
}

TEST_CASE("ssd: in float every form stays within rounding of the double recurrence") {
    // cs reaches about -2 * 0.26 * 64 = -33 in a chunk, so that cs_t - cs_s carries an error of 33 * 6e-8 = 2e-6, and
    // exp turns that into a relative 2e-6 per term; the gradients of the decay are differences of sums, ten times
    // larger.
    const SsdCase c(2, 150, 2, 16, 8, 64);
    const SsdResult truth = run_ssd<double>(c, Form::recurrent);
    for (const Form form : {Form::recurrent, Form::quadratic, Form::chunked})
        check_equal(run_ssd<float>(c, form), truth, 2e-5);
}

TEST_CASE("ssd: strong decay over a long chunk gives zeros, not NaN") {
    SsdCase c(1, 256, 1, 4, 4, 256);
    for (double& a : c.dA) a = -20;  // exp(+-5000) would appear if differences were not masked before exp
    const SsdResult r = run_ssd<float>(c, Form::chunked), truth = run_ssd<double>(c, Form::recurrent);
    check_equal(r, truth, 1e-5);
}

TEST_CASE("ssd: the state carries a sequence across calls") {
    const SsdCase c(1, 13, 2, 4, 6, 4);
    const int64 b = c.n.H * c.n.N, x = 2 * b, HP = c.n.H * c.n.P;
    const SsdResult whole = run_ssd<double>(c, Form::chunked);
    for (int64 cut = 1; cut < c.n.T; ++cut) {
        std::vector<double> Y(whole.Y.size()), S = c.S_0;
        for (int part = 0; part < 2; ++part) {
            const int64 from = part ? cut : 0, to = part ? c.n.T : cut;
            SsdShape n = c.n;
            n.T = to - from;
            const double* p = c.cbx.data() + from * n.ld;
            ssd_chunked_forward<double>(Y.data() + from * HP, S.data(), nullptr, p, p + b, p + x,
                                        c.dt.data() + from * n.H, c.dA.data() + from * n.H, S.data(), n);
        }
        CHECK_EQ(compare("Y", Y, whole.Y, 1e-14), "");
        CHECK_EQ(compare("S", S, whole.S_T, 1e-14), "");
    }
}

TEST_CASE("ssd dt: softplus keeps small values and large ones") {
    const double raw[] = {-40, -16, 0, 19.999, 20.001, 300}, zero[] = {0};
    double dt[6], dA[6];
    ssd_dt_forward(dt, dA, raw, zero, zero, true, 6, 1, 1);
    CHECK(dt[0] == doctest::Approx(std::exp(-40.0)).epsilon(1e-12));  // log(1 + x) would give 0
    CHECK(dt[1] == doctest::Approx(std::exp(-16.0)).epsilon(1e-6));
    CHECK(dt[2] == doctest::Approx(std::log(2.0)).epsilon(1e-15));
    CHECK(dt[3] == doctest::Approx(dt[4]).epsilon(2e-4));  // no step at the switch
    CHECK(dt[5] == 300);
    for (int i = 0; i < 6; ++i) CHECK(dA[i] == -dt[i]);  // A = -exp(0)
    ssd_dt_forward(dt, dA, raw, zero, zero, false, 6, 1, 1);
    for (int i = 0; i < 6; ++i) CHECK(dA[i] == 0);  // ssd_decay off: a_t = 1
}

TEST_CASE("rope: pairs are (j, j+d/2), turned by pos * theta^(-2j/d)") {
    RopeTable<double> table;
    table.extend(4, 10000, 8);
    double x[] = {1, 0, 0, 0,   // turns towards index 2 (not 1): half-split
                  0, 1, 0, 0};  // towards index 3, 100 times slower
    rope(x, table, 1, 2, 1, 4, 5, false);
    CHECK(x[0] == doctest::Approx(std::cos(5.0)));
    CHECK(x[1] == 0);
    CHECK(x[2] == doctest::Approx(std::sin(5.0)));
    CHECK(x[5] == doctest::Approx(std::cos(0.06)));  // second row: position 6
    CHECK(x[7] == doctest::Approx(std::sin(0.06)));
}

TEST_CASE("rope: <rot(a,m), rot(b,n)> depends on m-n only, for q and k (d = P) and for C and B (d = N)") {
    for (const int64 d : {16, 6}) {  // P and N of a model with N != P
        RopeTable<double> table;
        table.extend(d, 10000, 600);
        const auto a = normals<double>("a", d), b = normals<double>("b", d);
        const auto score = [&](int64 m, int64 n) {
            auto x = a, y = b;
            rope(x.data(), table, 1, 1, 1, d, m, false);
            rope(y.data(), table, 1, 1, 1, d, n, false);
            double s = 0;
            for (int64 i = 0; i < d; ++i) s += x[size_t(i)] * y[size_t(i)];
            return s;
        };
        for (const int64 offset : {0, 1, 7, 100})
            for (const int64 n : {0, 3, 250, 499})
                CHECK(score(n + offset, n) == doctest::Approx(score(offset, 0)).epsilon(1e-10));
        CHECK(std::fabs(score(7, 0) - score(0, 7)) > 1e-3);  // and it does depend on it, with its sign
        CHECK(std::fabs(score(7, 0) - score(1, 0)) > 1e-3);
    }
}

TEST_CASE("rope: a table extended step by step equals one made at once") {
    RopeTable<float> once, grown;
    once.extend(8, 500, 1000);
    for (int64 n = 1; n <= 1000; n += 37) grown.extend(8, 500, n);
    grown.extend(8, 500, 1000);
    grown.cos.resize(once.cos.size());
    grown.sin.resize(once.sin.size());
    CHECK_EQ(compare_bits("cos", grown.cos, once.cos), "");
    CHECK_EQ(compare_bits("sin", grown.sin, once.sin), "");
}

TEST_CASE("attention: equals softmax written out, with grouped heads, a cache and blocks of queries") {
    for (const int64 T : {1, 2, 63, 64, 65, 130})
        for (const int64 past : {0, 9})
            for (const int64 Hkv : {1, 2, 4}) {
                const int64 B = 2, H = 4, P = 6, S = T + past;
                const AttentionShape n{B, T, S, H, Hkv, P, H * P, Hkv * P, S * Hkv * P};
                const auto q = normals<double>("q", B * T * H * P, 2), k = normals<double>("k", B * S * Hkv * P, 2),
                           v = normals<double>("v", B * S * Hkv * P);
                std::vector<double> y(q.size()), lse(size_t(B * T * H)), want(q.size());
                attention_forward(y.data(), lse.data(), q.data(), k.data(), v.data(), n);
                for (int64 b = 0; b < B; ++b)
                    for (int64 t = 0; t < T; ++t)
                        for (int64 h = 0; h < H; ++h) {
                            const int64 g = h / (H / Hkv), q0 = ((b * T + t) * H + h) * P;
                            double z = 0;
                            for (int64 s = 0; s <= past + t; ++s) {
                                double score = 0;
                                for (int64 p = 0; p < P; ++p)
                                    score += q[size_t(q0 + p)] * k[size_t(((b * S + s) * Hkv + g) * P + p)];
                                const double e = std::exp(score / std::sqrt(double(P)));
                                z += e;
                                for (int64 p = 0; p < P; ++p)
                                    want[size_t(q0 + p)] += e * v[size_t(((b * S + s) * Hkv + g) * P + p)];
                            }
                            for (int64 p = 0; p < P; ++p) want[size_t(q0 + p)] /= z;
                            CHECK(lse[size_t((b * T + t) * H + h)] == doctest::Approx(std::log(z)).epsilon(1e-12));
                        }
                CHECK_EQ(compare("y", y, want, 1e-13), "");
            }
}

TEST_CASE("attention: huge scores do not overflow") {
    const AttentionShape n{1, 3, 3, 1, 1, 2, 2, 2, 6};
    const std::vector<float> q = {300, 0, 300, 0, 300, 0}, k = {300, 0, -300, 0, 300, 0}, v = {1, 2, 3, 4, 5, 6};
    std::vector<float> y(6), lse(3);
    attention_forward(y.data(), lse.data(), q.data(), k.data(), v.data(), n);
    CHECK_EQ(compare("y", y, std::vector<float>{1, 2, 1, 2, 3, 4}, 1e-6), "");
}

TEST_CASE("rmsnorm: a row is divided by its root mean square, epsilon inside the root") {
    const std::vector<double> x = {3, 4, 0, 0}, w = {1, 2, 1, 1};
    std::vector<double> u(4), rstd(1);
    rmsnorm_forward(u.data(), rstd.data(), x.data(), w.data(), 1e-6, 1, 4);
    CHECK(rstd[0] == doctest::Approx(1 / std::sqrt(6.25 + 1e-6)).epsilon(1e-15));
    CHECK_EQ(compare("u", u, std::vector<double>{3 * rstd[0], 8 * rstd[0], 0, 0}, 1e-15), "");
    const std::vector<double> zero(4, 0.0);
    rmsnorm_forward(u.data(), rstd.data(), zero.data(), w.data(), 1e-6, 1, 4);
    CHECK(rstd[0] == doctest::Approx(1e3));
}

TEST_CASE("swiglu: the float exp is exact to rounding from underflow to overflow") {
    std::vector<float> gate_up;
    for (int i = 0; i <= 4000; ++i) gate_up.push_back(-100.0f + 0.05f * float(i));
    const int64 F = int64(gate_up.size());
    for (int64 i = 0; i < F; ++i) gate_up.push_back(1);
    std::vector<float> h(static_cast<size_t>(F));
    swiglu_forward(h.data(), gate_up.data(), 1, F);
    for (int64 i = 0; i < F; ++i) {
        const double g = double(gate_up[size_t(i)]), want = g / (1 + std::exp(-g));
        CAPTURE(g);
        // three roundings of 6e-8 at most and exp's own 1e-7, measured 1.9e-7; below -87.3 exp(-g) is infinite in float
        // and silu is 0, off by 1e-36
        CHECK(std::fabs(double(h[size_t(i)]) - want) <= 2.2e-7 * std::fabs(want) + 2e-36);
    }
    const float bad[] = {NAN, 1};
    swiglu_forward(h.data(), bad, 1, 1);
    CHECK(std::isnan(h[0]));  // a NaN must survive, or it would be hidden from the check for it
}

TEST_CASE("cross-entropy: exact for known logits, finite for huge ones") {
    const int32_t target[] = {1, 1, 0};
    const std::vector<float> z = {0, 0, 0, 1000, 0, -1000, 88, 89, 90};
    std::vector<float> loss(3), d = z;
    cross_entropy_forward(loss.data(), z.data(), target, 3, 3);
    CHECK(loss[0] == doctest::Approx(std::log(3.0)).epsilon(1e-6));
    CHECK(loss[1] == doctest::Approx(1000.0));
    CHECK(loss[2] == doctest::Approx(2 + std::log(1 + std::exp(-1.0) + std::exp(-2.0))).epsilon(1e-6));
    cross_entropy_backward(d.data(), loss.data(), target, 1, 3, 3);
    CHECK_EQ(compare("d", std::vector<float>(d.begin(), d.begin() + 6),
                     std::vector<float>{1 / 3.0f, -2 / 3.0f, 1 / 3.0f, 1, -1, 0}, 1e-6),
             "");
}

TEST_CASE("cross-entropy: the largest logit is found wherever it stands") {
    for (const int32_t V : {1, 3, 15, 16, 17, 40, 64})
        for (int32_t target = 0; target < V; ++target) {
            std::vector<float> z(size_t(V), -1000.0f);
            z[size_t(target)] = 1000;  // exp of it without the largest subtracted is infinite
            float loss = -1;
            cross_entropy_forward(&loss, z.data(), &target, 1, V);
            CHECK_EQ(loss, 0.0f);
        }
}

TEST_CASE("embedding: a token that occurs twice collects both gradients") {
    const int32_t tokens[] = {1, 0, 1};
    const std::vector<double> dx = {1, 2, 10, 20, 100, 200};
    std::vector<double> d(6);
    embedding_backward(d.data(), dx.data(), tokens, 3, 2);
    CHECK_EQ(compare("d", d, std::vector<double>{10, 20, 101, 202, 0, 0}, 0), "");
}

TEST_CASE(
    "dropout: drops the right share, scales the rest, and is a function of seed, step, micro-batch, layer and place") {
    const int64 rows = 200, D = 250;
    const std::vector<float> x(size_t(rows * D), 0.0f), m(size_t(rows * D), 1.0f), w(size_t(D), 1.0f);
    const auto run = [&](Dropout d, int64 count) {
        std::vector<float> out(size_t(count * D));
        residual_forward(out.data(), x.data(), m.data(), w.data(), d, count, D);
        return out;
    };
    const Dropout base{0.3, {9, 4, 2}, 6};
    const auto mask = run(base, rows);
    int64 dropped = 0;
    for (const float f : mask) {
        dropped += f == 0;
        CHECK((f == 0 || f == float(1 / 0.7)));
    }
    // 50,000 draws of probability 0.3: standard deviation 102
    CHECK(std::fabs(double(dropped) - 15000) < 5 * 102);
    CHECK_EQ(compare_bits("same again", run(base, rows), mask), "");
    CHECK_EQ(compare_bits("fewer rows", run(base, 7), std::vector<float>(mask.begin(), mask.begin() + 7 * D)), "");
    for (int i = 0; i < 4; ++i) {
        Dropout other = base;
        (i == 0 ? other.key.step : i == 1 ? other.key.micro_batch : other.site) += i < 3 ? 1 : 0;
        if (i == 3) other.key.seed += 1;
        int64 equal = 0;
        const auto o = run(other, rows);
        for (size_t j = 0; j < o.size(); ++j) equal += (o[j] == 0) == (mask[j] == 0);
        CHECK(std::fabs(double(equal) - 0.58 * 50000) < 5 * 111);  // independent masks agree in 0.7^2 + 0.3^2
    }
}

TEST_CASE("adamw: equals the formula, with bias correction and decoupled decay") {
    const AdamW o{0.9, 0.99, 1e-8, 0.1};
    std::vector<double> w = {1.0}, m = {0.0}, v = {0.0};
    double w2 = 1, m2 = 0, v2 = 0;
    for (int64 step = 1; step <= 3; ++step) {
        const std::vector<double> g = {0.5 * double(step)};
        adamw_update(w.data(), m.data(), v.data(), g.data(), o, true, 0.01, step, 0.5, 1);
        const double gs = g[0] * 0.5;
        m2 = 0.9 * m2 + 0.1 * gs;
        v2 = 0.99 * v2 + 0.01 * gs * gs;
        const double t = double(step);
        w2 = w2 - 0.01 * 0.1 * w2 -
             0.01 * (m2 / (1 - std::pow(0.9, t))) / (std::sqrt(v2 / (1 - std::pow(0.99, t))) + 1e-8);
        CHECK(w[0] == doctest::Approx(w2).epsilon(1e-14));
    }
    std::vector<double> u = {1.0}, zero = {0.0};
    m = v = zero;
    adamw_update(u.data(), m.data(), v.data(), zero.data(), o, false, 0.01, 1, 1, 1);
    CHECK(u[0] == 1.0);  // no decay where the table says so
}
