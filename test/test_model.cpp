// The whole model and the CPU engine.
#include "check.h"

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace ref;

namespace {

Config small() {
    Config c;
    c.V = 29;  // V % 8 = 5
    c.D = 24;
    c.L = 3;
    c.H = 4;
    c.Hkv = 2;
    c.N = 8;  // P = 6
    c.F = 20;
    c.Q = 4;
    c.T = 11;
    c.attn_period = 3;
    c.attn_offset = 1;
    return c;
}

// Every kind of model that the options can make.
std::vector<std::pair<std::string, Config>> all_kinds() {
    std::vector<std::pair<std::string, Config>> kinds;
    const auto add = [&](const std::string& name, const std::function<void(Config&)>& change) {
        Config c = small();
        change(c);
        c.validate();
        kinds.emplace_back(name, c);
    };
    add("hybrid", [](Config&) {});
    add("transformer", [](Config& c) {
        c.attn_period = 1;
        c.attn_offset = 0;
    });
    add("pure ssm", [](Config& c) { c.attn_period = 0; });
    add("multi-head", [](Config& c) { c.Hkv = 4; });
    add("multi-query", [](Config& c) { c.Hkv = 1; });
    add("untied", [](Config& c) { c.tie = false; });
    add("N > P", [](Config& c) { c.N = 14; });
    add("one head", [](Config& c) { c.H = c.Hkv = 1; });
    add("no decay", [](Config& c) { c.ssd_decay = false; });
    add("dropout", [](Config& c) { c.dropout = 0.1; });
    add("chunk longer than the text", [](Config& c) { c.Q = 64; });
    add("chunk of one", [](Config& c) { c.Q = 1; });
    return kinds;
}

std::vector<int32_t> random_tokens(const Config& c, int64 n, const char* name = "tokens") {
    const Philox stream(5, name);
    std::vector<int32_t> t;
    for (int64 i = 0; i < n; ++i) t.push_back(int32_t(stream.at(uint64_t(i)).word[0] % uint32_t(c.V)));
    return t;
}

// Weights larger than the initial ones, norms away from 1: nothing vanishes and no mistake hides.
std::vector<float> lively_weights(const Config& c) {
    const ParamTable table(c);
    std::vector<float> w = initial_weights(c, 3);
    for (const ParamSpec& s : table.specs) {
        const Philox stream(4, s.name.c_str());
        for (int64 i = 0; i < s.count; ++i) {
            float& x = w[size_t(s.offset + i)];
            if (s.init == Init::normal) x *= 10;
            if (s.init == Init::ones) x += 0.2f * float(stream.normal_at(uint64_t(i)));
        }
    }
    return w;
}

std::unique_ptr<Engine> lively_engine(const Config& c) {
    auto e = make_cpu_engine(c);
    e->write(Buffer::weights, lively_weights(c).data());
    return e;
}

std::vector<float> read_buffer(const Engine& e, Buffer which) {
    std::vector<float> v(size_t(e.table.count));
    e.read(which, v.data());
    return v;
}

void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

}  // namespace

TEST_CASE(
    "model: prefill in any split and single steps equal one full pass, logits and states, for every kind of model") {
    for (const auto& kind : all_kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        const int64 B = 2, T = 11;
        const auto tokens = random_tokens(c, B * T);
        Model<double> m(c);
        const auto w = lively_weights(c);
        std::copy(w.begin(), w.end(), m.weights.begin());
        // truth: the training forward, whole sequences from the zero state
        m.forward(tokens.data(), tokens.data(), B, T, nullptr, nullptr);
        const std::vector<double> full = m.logits;
        ModelState<double> final_state(c, B, T);
        m.forward(tokens.data(), nullptr, B, T, nullptr, &final_state);
        CHECK_EQ(compare("logits, one prefill", m.logits, full, 1e-12), "");

        for (const std::vector<int64>& split : std::vector<std::vector<int64>>{
                 {1, 10}, {3, 8}, {4, 7}, {5, 6}, {4, 4, 3}, {2, 1, 1, 1, 6}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}}) {
            ModelState<double> state(c, B, T);
            int64 at = 0;
            for (const int64 n : split) {
                std::vector<int32_t> part;
                for (int64 b = 0; b < B; ++b)
                    part.insert(part.end(), tokens.begin() + b * T + at, tokens.begin() + b * T + at + n);
                const bool every = n % 2 == 1;  // both ways of asking for logits
                m.forward(part.data(), nullptr, B, n, nullptr, &state, every);
                for (int64 b = 0; b < B; ++b) {
                    const int64 first = every ? 0 : n - 1, count = n - first;
                    CHECK_EQ(compare("logits", m.logits.data() + b * count * c.V,
                                     full.data() + (b * T + at + first) * c.V, count * c.V, 1e-12),
                             "");
                }
                at += n;
            }
            CHECK_EQ(state.position, T);
            for (int64 i = 0; i < c.L; ++i) {
                const auto &got = state.layers[size_t(i)], &want = final_state.layers[size_t(i)];
                CHECK_EQ(compare("S", got.S, want.S, 1e-12), "");
                CHECK_EQ(compare("k", got.k, want.k, 1e-12), "");
                CHECK_EQ(compare("v", got.v, want.v, 1e-12), "");
            }
        }
    }
}

TEST_CASE("model: a token's logits do not depend on later tokens, nor a sequence's on its neighbours") {
    const Config c = small();
    const int64 T = 11;
    auto tokens = random_tokens(c, 2 * T);
    Model<double> m(c);
    const auto w = lively_weights(c);
    std::copy(w.begin(), w.end(), m.weights.begin());
    m.forward(tokens.data(), tokens.data(), 2, T, nullptr, nullptr);
    const auto before = m.logits;
    tokens[7] = (tokens[7] + 1) % int32_t(c.V);
    m.forward(tokens.data(), tokens.data(), 2, T, nullptr, nullptr);
    CHECK_EQ(compare("earlier tokens", m.logits.data(), before.data(), 7 * c.V, 0), "");
    CHECK_EQ(compare("the other sequence", m.logits.data() + T * c.V, before.data() + T * c.V, T * c.V, 0), "");
    CHECK(compare("later tokens", m.logits.data() + 7 * c.V, before.data() + 7 * c.V, 4 * c.V, 1e-6) != "");
    m.forward(tokens.data() + T, tokens.data(), 1, T, nullptr, nullptr);
    CHECK_EQ(compare("alone", m.logits.data(), before.data() + T * c.V, T * c.V, 1e-13), "");
}

TEST_CASE("model: every kind trains: the loss of one batch falls below 0.05") {
    for (const auto& kind : all_kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        for (const int64 T : {int64(11), int64(1), c.Q > 1 ? c.Q - 1 : int64(3)}) {
            CAPTURE(T);
            const int64 B = T == 1 ? 4 : 1;  // batch 1, but for T = 1, where it would be one token in all
            auto e = make_cpu_engine(c);
            e->write(Buffer::weights, initial_weights(c, 1).data());
            const std::vector<int32_t> tokens = T == 1 ? std::vector<int32_t>{3, 1, 4, 15} : random_tokens(c, B * T);
            const auto targets = random_tokens(c, B * T, "targets");
            double loss = 0, first = 0;
            for (int64 step = 1; step <= 300; ++step) {
                const DropoutKey key{1, uint32_t(step), 0};
                loss = e->forward(tokens.data(), targets.data(), B, T, &key);
                if (step == 1) first = loss;
                e->zero_gradients();
                e->backward(1);
                const double norm = e->gradient_norm();
                e->update(AdamW{0.9, 0.99, 1e-8, 0}, 1e-2, step, norm > 1 ? 1 / norm : 1);
            }
            loss = e->forward(tokens.data(), targets.data(), B, T);
            CHECK(first > 2);
            CHECK(loss < 0.05);
        }
    }
}

TEST_CASE("model: float follows double, loss, logits and gradients") {
    for (const auto& kind : all_kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        const int64 B = 2, T = 11;
        const auto tokens = random_tokens(c, B * T), targets = random_tokens(c, B * T, "targets");
        const auto w = lively_weights(c);
        Model<double> d(c);
        Model<float> f(c);
        std::copy(w.begin(), w.end(), d.weights.begin());
        f.weights = w;
        const DropoutKey key{1, 2, 3};
        const double want = d.forward(tokens.data(), targets.data(), B, T, &key, nullptr);
        const double got = f.forward(tokens.data(), targets.data(), B, T, &key, nullptr);
        CHECK(got == doctest::Approx(want).epsilon(1e-5));
        // Rounding of 6e-8 per operation, through about 20 ops, amplified by weights of 0.2 and norms: measured 2e-6.
        CHECK_EQ(compare("logits", f.logits, d.logits, 2e-5), "");
        d.backward(1);
        f.backward(1);
        for (const ParamSpec& s : d.table.specs) {
            if (s.param == Param::A_log && !c.ssd_decay) continue;  // exactly zero
            CHECK_EQ(compare("gradient of " + s.name, f.gradients.data() + s.offset, d.gradients.data() + s.offset,
                             s.count, 1e-4),
                     "");
        }
    }
}

TEST_CASE("model: rope_theta turns both q, k and C, B, and norm_eps reaches every norm") {
    for (const auto& kind : all_kinds()) {
        if (kind.first != "transformer" && kind.first != "pure ssm") continue;
        CAPTURE(kind.first);
        const int64 T = 11;
        const auto logits = [&](const std::function<void(Config&)>& change) {
            Config c = kind.second;
            change(c);
            Model<double> m(c);
            const auto w = lively_weights(c);
            for (size_t i = 0; i < w.size(); ++i) m.weights[i] = double(w[i]);
            const auto tokens = random_tokens(c, T);
            m.forward(tokens.data(), nullptr, 1, T, nullptr, nullptr);
            return m;
        };
        const Model<double> base = logits([](Config&) {}), theta = logits([](Config&c) { c.rope_theta = 50; }),
                            eps = logits([](Config&c) { c.norm_eps = 0.3; });
        CHECK(compare("logits", theta.logits, base.logits, 1e-3) != "");
        // u = x * rstd * w, so that rstd tells the epsilon: 1/rstd^2 = mean(x^2) + eps, at every norm
        const Config& c = eps.config;
        const auto check = [&](const std::vector<double>& rstd, const std::vector<double>& x) {
            for (int64 r = 0; r < T; ++r) {
                double squares = 0;
                for (int64 d = 0; d < c.D; ++d) squares += x[size_t(r * c.D + d)] * x[size_t(r * c.D + d)];
                CHECK(1 / (rstd[size_t(r)] * rstd[size_t(r)]) ==
                      doctest::Approx(squares / double(c.D) + 0.3).epsilon(1e-12));
            }
        };
        for (const auto& layer : eps.layers) {
            check(layer.rstd1, layer.x);
            check(layer.rstd2, layer.x_mid);
        }
        check(eps.rstd_final, eps.x_final);
    }
}

TEST_CASE("model: every layer and half has a dropout mask of its own") {
    Config c = small();
    c.dropout = 0.5;
    Model<double> m(c);
    const auto w = lively_weights(c);
    std::copy(w.begin(), w.end(), m.weights.begin());
    const auto tokens = random_tokens(c, 11);
    const DropoutKey key{1, 2, 3};
    m.forward(tokens.data(), tokens.data(), 1, 11, &key, nullptr);
    std::vector<std::vector<bool>> masks;  // dropped: out is exactly res * x
    for (int64 i = 0; i < c.L; ++i) {
        const auto& a = m.layers[size_t(i)];
        const auto& next = i + 1 < c.L ? m.layers[size_t(i + 1)].x : m.x_final;
        const double *res1 = &m.weights[size_t(m.table.offset(Param::res1, i))],
                     *res2 = &m.weights[size_t(m.table.offset(Param::res2, i))];
        std::vector<bool> mixer, ffn;
        for (size_t e = 0; e < next.size(); ++e) {
            mixer.push_back(a.x_mid[e] == res1[e % size_t(c.D)] * a.x[e]);
            ffn.push_back(next[e] == res2[e % size_t(c.D)] * a.x_mid[e]);
        }
        masks.push_back(mixer);
        masks.push_back(ffn);
    }
    for (size_t i = 0; i < masks.size(); ++i) {
        const auto dropped = std::count(masks[i].begin(), masks[i].end(), true);
        CHECK(std::fabs(double(dropped) - 132) < 5 * 8.2);  // 264 draws of probability 1/2
        for (size_t j = 0; j < i; ++j) CHECK(masks[i] != masks[j]);
    }
}

TEST_CASE("engine: an update is AdamW of every parameter, with decay by the table, clipping and bias correction") {
    const Config c = small();
    auto e = lively_engine(c);
    std::vector<double> w, m(size_t(e->table.count), 0.0), v = m;
    for (const float x : lively_weights(c)) w.push_back(double(x));
    const AdamW o{0.8, 0.9, 1e-3, 0.5};
    for (int64 step = 1; step <= 3; ++step) {
        const Philox stream(uint64_t(step), "gradient");
        std::vector<float> g(w.size());
        for (size_t i = 0; i < g.size(); ++i) g[i] = float(stream.normal_at(i));
        e->write(Buffer::gradients, g.data());
        e->update(o, 0.01, step, 0.25);
        for (const ParamSpec& s : e->table.specs)
            for (size_t i = size_t(s.offset); i < size_t(s.offset + s.count); ++i) {
                const double gi = 0.25 * double(g[i]), t = double(step);
                m[i] = o.beta1 * m[i] + (1 - o.beta1) * gi;
                v[i] = o.beta2 * v[i] + (1 - o.beta2) * gi * gi;
                const double decay = s.shape.size() == 2 ? o.weight_decay * w[i] : 0;
                w[i] -=
                    0.01 * (m[i] / (1 - std::pow(o.beta1, t)) / (std::sqrt(v[i] / (1 - std::pow(o.beta2, t))) + o.eps) +
                            decay);
            }
        // float: a few roundings of 6e-8 of weights of order 0.2 to 1
        CHECK_EQ(compare("weights", read_buffer(*e, Buffer::weights), std::vector<float>(w.begin(), w.end()), 1e-6),
                 "");
    }
}

TEST_CASE("engine: backward without a forward that had targets is refused") {
    const Config c = small();
    auto e = lively_engine(c);
    const auto tokens = random_tokens(c, 12);
    CHECK_ERROR(e->backward(1), "forward");
    e->forward(tokens.data(), tokens.data() + 1, 1, 11);
    e->backward(1);
    CHECK_ERROR(e->backward(1), "forward");  // twice
    const auto state = e->new_state(1, 20);
    std::vector<float> logits(size_t(c.V));
    e->forward(tokens.data(), tokens.data() + 1, 1, 11);
    e->step(*state, tokens.data(), 3, logits.data());
    CHECK_ERROR(e->backward(1), "forward");
    CHECK_ERROR(e->step(*state, tokens.data(), 0, logits.data()), "0 tokens");
}

TEST_CASE("engine: the same bits for 1, 2 and 3 threads") {
    Config c = small();
    c.D = 96;  // large enough that every parallel loop is parallel
    c.N = 32;
    c.F = 130;
    c.V = 300;
    c.Q = 16;
    c.dropout = 0.1;
    const int64 B = 3, T = 70;
    const auto tokens = random_tokens(c, B * T + 1);
    std::vector<float> want;
#ifdef _OPENMP
    const int usual = omp_get_max_threads();
#else
    const int usual = 1;
#endif
    for (const int threads : {1, 2, 3}) {
        set_threads(threads);
        auto e = lively_engine(c);
        std::vector<float> got;
        for (int64 step = 1; step <= 2; ++step) {
            const DropoutKey key{1, uint32_t(step), 0};
            got.push_back(float(e->forward(tokens.data(), tokens.data() + 1, B, T, &key)));
            e->zero_gradients();
            e->backward(0.5);
            got.push_back(float(e->gradient_norm()));
            e->update(AdamW(), 1e-3, step, 0.7);
        }
        for (const Buffer b : {Buffer::weights, Buffer::gradients, Buffer::exp_avg, Buffer::exp_avg_sq}) {
            const auto v = read_buffer(*e, b);
            got.insert(got.end(), v.begin(), v.end());
        }
        const auto state = e->new_state(1, 64);
        std::vector<float> logits(size_t(c.V));
        e->step(*state, tokens.data(), 40, logits.data());
        got.insert(got.end(), logits.begin(), logits.end());
        e->step(*state, tokens.data(), 1, logits.data());
        got.insert(got.end(), logits.begin(), logits.end());
        if (threads == 1) want = got;
        CHECK_EQ(compare_bits("everything", got, want), "");
    }
    set_threads(usual);
}

TEST_CASE("engine: gradients of micro-batches add up to those of the batch") {
    const Config c = small();
    const int64 B = 4, T = 11;
    const auto tokens = random_tokens(c, B * T), targets = random_tokens(c, B * T, "targets");
    auto e = lively_engine(c);
    e->zero_gradients();
    e->forward(tokens.data(), targets.data(), B, T);
    e->backward(1);
    const auto whole = read_buffer(*e, Buffer::gradients);
    e->zero_gradients();
    for (int64 half = 0; half < 2; ++half) {
        e->forward(tokens.data() + half * 2 * T, targets.data() + half * 2 * T, 2, T);
        e->backward(0.5);
    }
    CHECK_EQ(compare("gradients", read_buffer(*e, Buffer::gradients), whole, 2e-6), "");  // float, other order of sums
    double sum = 0;
    for (const float g : whole) sum += double(g) * double(g);
    e->write(Buffer::gradients, whole.data());
    CHECK(e->gradient_norm() == doctest::Approx(std::sqrt(sum)).epsilon(1e-12));
}

TEST_CASE("engine: a saved state continues bit for bit") {
    for (const auto& kind : all_kinds()) {
        CAPTURE(kind.first);
        const Config& c = kind.second;
        auto e = lively_engine(c);
        const auto tokens = random_tokens(c, 40);
        const int64 B = 2;
        const auto state = e->new_state(B, 20);
        std::vector<float> logits(size_t(B * c.V)), again(logits.size());
        e->step(*state, tokens.data(), 7, logits.data());
        const TempDir tmp;
        e->save_state(*state, tmp / "state.safetensors");
        const auto copy = e->load_state(tmp / "state.safetensors", 33);  // another capacity
        CHECK_EQ(copy->position, 7);
        for (int i = 0; i < 3; ++i) {
            e->step(*state, tokens.data() + 14 + 2 * i, 1, logits.data());
            e->step(*copy, tokens.data() + 14 + 2 * i, 1, again.data());
            CHECK_EQ(compare_bits("logits", again, logits), "");
        }
        CHECK_ERROR(e->load_state(tmp / "state.safetensors", 6), "state.safetensors", "position 7", "0..6");
        Config other = c;
        other.L = c.L + 3;
        CHECK_ERROR(make_cpu_engine(other)->load_state(tmp / "state.safetensors", 20), "layers.", "missing");
    }
}

TEST_CASE("engine: refuses tokens outside the vocabulary and states that are full") {
    const Config c = small();
    auto e = lively_engine(c);
    const auto state = e->new_state(1, 4);
    std::vector<float> logits(size_t(c.V));
    const int32_t bad[] = {3, 29}, negative[] = {-1, 0}, good[] = {1, 2, 3, 4, 5};
    CHECK_ERROR(e->step(*state, bad, 2, logits.data()), "token 29", "29");
    CHECK_ERROR(e->step(*state, negative, 2, logits.data()), "token -1");
    CHECK_ERROR(e->forward(good, bad, 1, 2), "token 29");
    CHECK_EQ(state->position, 0);
    CHECK_ERROR(e->step(*state, good, 5, logits.data()), "4 tokens", "5");
    e->step(*state, good, 4, logits.data());
    CHECK_EQ(state->position, 4);
}

TEST_CASE("engine: the first non-finite tensor is named, in the order of computation") {
    const Config c = small();
    auto e = lively_engine(c);
    const auto tokens = random_tokens(c, 12);
    e->forward(tokens.data(), tokens.data() + 1, 1, 11);
    e->zero_gradients();
    e->backward(1);
    CHECK_EQ(e->find_non_finite(), "");
    auto w = lively_weights(c);
    const ParamTable table(c);
    const int64 at = table.offset(Param::down_proj, 1) + 5;
    w[size_t(at)] = INFINITY;
    e->write(Buffer::weights, w.data());
    CHECK(contains(e->find_non_finite(), table.at(at).name));
    CHECK(contains(e->find_non_finite(), "element 5"));
    for (int64 i = 0; i < c.D * c.F; ++i) w[size_t(at - 5 + i)] = 3e38f;  // finite, but what comes out is not
    e->write(Buffer::weights, w.data());
    const double loss = e->forward(tokens.data(), tokens.data() + 1, 1, 11);
    CHECK(!std::isfinite(loss));
    CHECK(contains(e->find_non_finite(), "activation layers.2 input"));
}
