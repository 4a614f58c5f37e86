// The oracle and compare: that files can be made again, that right candidates pass, and that no wrong one does.
#include "check.h"

namespace {

// How test/oracle.safetensors was made: both kinds of layer, grouped heads, N != P, a ragged last chunk, a tied head.
const std::vector<std::string> stored_options = {
    "--batch",       "1", "--layers",      "2", "--d-model",     "8",  "--heads", "2", "--kv-heads", "1",
    "--d-state",     "6", "--d-ff",        "8", "--vocab",       "11", "--chunk", "4", "--seq-len",  "7",
    "--attn-period", "2", "--attn-offset", "1", "--adamw-steps", "3"};

std::string stored_file() { return std::string(SOURCE_DIR) + "/test/oracle.safetensors"; }

RunResult oracle(const std::vector<std::string>& options, const std::string& out, const RunOptions& how = {}) {
    std::vector<std::string> words = {"oracle", "--out", out};
    words.insert(words.end(), options.begin(), options.end());
    return run_program("ref_cpu", words, how);
}
RunResult compare_files(const std::string& a, const std::string& b, const std::vector<std::string>& options = {}) {
    std::vector<std::string> words = {"compare", a, b};
    words.insert(words.end(), options.begin(), options.end());
    return run_program("ref_cpu", words);
}

// A tensor file in memory, to be changed and written again.
struct Tensors {
    struct Tensor {
        std::string name;
        DType dtype;
        Shape shape;
        std::vector<double> values;
    };
    std::vector<Tensor> list;
    std::vector<std::pair<std::string, std::string>> metadata;

    explicit Tensors(const std::string& path) {
        const SafeTensors file(path);
        metadata.assign(file.metadata.begin(), file.metadata.end());
        for (const SafeTensors::Entry& e : file.entries) {
            list.push_back({e.name, e.dtype, e.shape, std::vector<double>(size_t(element_count(e.shape)))});
            if (e.dtype == DType::I64) file.read_integers(e, list.back().values.data());
            else file.read(e, list.back().values.data());
        }
    }
    Tensor& at(const std::string& name) {
        for (Tensor& t : list)
            if (t.name == name) return t;
        FAIL("no tensor " << name);
        return list[0];
    }
    void remove(const std::string& name) {
        list.erase(std::remove_if(list.begin(), list.end(), [&](const Tensor& t) { return t.name == name; }),
                   list.end());
    }
    void write(const std::string& path) const {
        std::vector<TensorView> views;
        std::vector<std::string> bytes(list.size());
        for (size_t i = 0; i < list.size(); ++i) {
            const Tensor& t = list[i];
            const auto put = [&](auto v) { bytes[i].append(reinterpret_cast<const char*>(&v), sizeof v); };
            for (const double v : t.values) {
                if (t.dtype == DType::F64) put(v);
                else if (t.dtype == DType::F32) put(float(v));
                else if (t.dtype == DType::I64) put(int64(v));
                else put(uint16_t(0));
            }
            views.push_back({t.name, t.dtype, t.shape, bytes[i].data()});
        }
        write_safetensors(path, views, metadata);
    }
};

std::string first_difference(const RunResult& r) {
    const size_t at = r.out.find("FIRST DIFFERENCE: ");
    if (at == std::string::npos) return "none";
    const size_t from = at + strlen("FIRST DIFFERENCE: ");
    return r.out.substr(from, r.out.find(' ', from) - from);
}

}  // namespace

TEST_CASE("oracle: the stored file is made again, to 1e-12, and twice the same bits for any number of threads") {
    TempDir tmp;
    REQUIRE_EQ(oracle(stored_options, tmp / "a").status, 0);
    REQUIRE_EQ(oracle(stored_options, tmp / "b", RunOptions{"", "", {"OMP_NUM_THREADS=1"}, ""}).status, 0);
    CHECK(read_file(tmp / "a") == read_file(tmp / "b"));

    // Another machine or compiler adds up in another order: 1e-12 is some thousand times the unit of a double (2e-16), for
    // sums of a few hundred terms and three optimizer steps.
    Tensors stored(stored_file()), again(tmp / "a");
    REQUIRE_EQ(stored.list.size(), again.list.size());
    for (size_t i = 0; i < stored.list.size(); ++i) {
        CHECK_EQ(stored.list[i].name, again.list[i].name);
        CHECK(stored.list[i].shape == again.list[i].shape);
        CHECK_EQ(compare(stored.list[i].name, again.list[i].values, stored.list[i].values, 1e-12), "");
    }
    for (const auto& kv : stored.metadata)
        if (kv.first != "noise") CHECK_EQ(SafeTensors(tmp / "a").metadata.at(kv.first), kv.second);
}

TEST_CASE("oracle: every value of interest is there, with its gradient") {
    Tensors file(stored_file());
    for (const char* name : {"embedding",
                             "layers.0.norm1",
                             "layers.0.ssd.C_before_rope",
                             "layers.0.ssd.cs",
                             "layers.0.ssd.state_out",
                             "layers.0.ssd.final_state",
                             "layers.1.attn.lse",
                             "layers.1.ffn.hidden",
                             "logits",
                             "losses",
                             "loss",
                             "objective",
                             "grad.layers.0.ssd.dA",
                             "grad.layers.1.attn.q_before_rope",
                             "grad.embedding",
                             "grad.model.layers.0.ssd.A_log",
                             "decode.split_5.after_7.layers.1.k",
                             "decode.split_1.after_5.logits",
                             "adamw.loss",
                             "adamw.param_norm.model.final_layernorm.weight",
                             "sampler.token"})
        CHECK(!file.at(name).values.empty());
    // What can be said without computing: the mean of the losses, and the objective's other part.
    double mean = 0, other = 0;
    for (const double l : file.at("losses").values) mean += l / 7;
    for (size_t i = 0; i < file.at("layers.0.ssd.final_state").values.size(); ++i)
        other +=
            file.at("layers.0.ssd.final_state").values[i] * file.at("cotangent.layers.0.ssd.final_state").values[i];
    CHECK(std::fabs(file.at("loss").values[0] - mean) < 1e-14);
    CHECK(std::fabs(file.at("objective").values[0] - mean - other) < 1e-14);
    CHECK(std::fabs(other) > 1e-4);
    // No mistake hides behind a weight of 1 or a gradient of 0.
    for (const auto& t : file.list)
        if (t.name.compare(0, 5, "grad.") == 0) {
            double largest = 0;
            for (const double v : t.values) largest = std::max(largest, std::fabs(v));
            CHECK_MESSAGE(largest > 1e-9, t.name);
        }
    CHECK(std::fabs(file.at("model.final_layernorm.weight").values[0] - 1) > 1e-3);
    for (const auto& t : file.list)
        if (t.name.compare(0, 6, "model.") == 0)
            for (const double v : t.values) {
                const float f = float(v);
                uint32_t bits;
                memcpy(&bits, &f, 4);
                CHECK_MESSAGE((bits & 0xffff) == 0, t.name);  // on the bf16 grid
            }
}

TEST_CASE("oracle: this program in fp32 and in bf16 agrees with every kind of model and every op") {
    TempDir tmp;
    const std::vector<std::string> size = {"--d-model", "24", "--heads", "4", "--d-state", "10", "--d-ff", "20",
                                           "--vocab",   "19", "--chunk", "4", "--seq-len", "11"};
    const auto with = [&](std::vector<std::string> words) {
        words.insert(words.end(), size.begin(), size.end());
        return words;
    };
    std::vector<std::vector<std::string>> kinds = {
        with({"--layers", "3", "--attn-period", "3", "--attn-offset", "1", "--kv-heads", "2"}),
        with({"--layers", "2", "--attn-period", "1", "--attn-offset", "0", "--tie", "false"}),
        with({"--layers", "2", "--attn-period", "0"}),
        with({"--layers", "2", "--attn-period", "2", "--attn-offset", "1", "--ssd-decay", "false"}),
        with({"--layers", "2", "--attn-period", "2", "--attn-offset", "1", "--state-cotangent", "false"}),
        // One token: the gradients of its q and k are exactly zero.
        {"--layers",  "2", "--attn-period", "2", "--attn-offset", "1",  "--d-model", "8", "--heads",   "2",
         "--d-state", "4", "--d-ff",        "6", "--vocab",       "11", "--chunk",   "4", "--seq-len", "1"}};
    for (const char* op :
         {"ssd", "attention", "rmsnorm", "rope", "linear", "embedding", "swiglu", "residual", "cross_entropy"})
        kinds.push_back(with({"--op", op}));
    for (const auto& options : kinds) {
        CAPTURE(options[1]);
        REQUIRE_EQ(oracle(options, tmp / "o").status, 0);
        for (const std::string dtype : {"fp64", "fp32", "bf16"}) {
            REQUIRE_EQ(oracle({"--inputs", tmp / "o", "--precision", dtype}, tmp / "c").status, 0);
            const RunResult r = compare_files(tmp / "o", tmp / "c", {"--dtype", dtype});
            CHECK_EQ(first_difference(r), "none");
            CHECK_EQ(r.status, 0);
        }
        const RunResult r = compare_files(tmp / "o", tmp / "c");  // bf16 is not good enough for fp32's tolerances
        if (options[1] != "embedding") CHECK_EQ(r.status, 1);     // but nothing is rounded there
    }
}

TEST_CASE("compare: names the tensor that was changed, whichever it is") {
    TempDir tmp;
    REQUIRE_EQ(oracle(stored_options, tmp / "o").status, 0);
    REQUIRE_EQ(oracle({"--inputs", tmp / "o", "--precision", "fp32"}, tmp / "c").status, 0);
    const Tensors right(tmp / "c");
    for (size_t i = 0; i < right.list.size(); i += 3) {
        Tensors wrong = right;
        Tensors::Tensor& t = wrong.list[i];
        double largest = 0;
        for (const double v : t.values) largest = std::max(largest, std::fabs(v));
        double& v = t.values[t.values.size() / 2];  // one element
        v += t.dtype == DType::I64 ? 1 : 1e-3 * (largest + 1e-6);
        wrong.write(tmp / "wrong");
        const RunResult r = compare_files(tmp / "o", tmp / "wrong");
        CHECK_EQ(first_difference(r), t.name);
        CHECK_EQ(r.status, 1);
    }
}

TEST_CASE("compare: missing, misshapen, transposed, non-finite and mistyped tensors never pass") {
    TempDir tmp;
    REQUIRE_EQ(oracle({"--inputs", stored_file(), "--precision", "fp32"}, tmp / "c").status, 0);
    const Tensors right(tmp / "c");
    const auto verdict = [&](const std::function<void(Tensors&)>& change,
                             const std::vector<std::string>& options = {}) {
        Tensors t = right;
        change(t);
        t.write(tmp / "changed");
        return compare_files(stored_file(), tmp / "changed", options);
    };
    const auto fails_at = [&](const std::string& name, const std::string& remark, const RunResult& r) {
        CHECK_EQ(r.status, 1);
        CHECK_EQ(first_difference(r), name);
        CHECK_MESSAGE(contains(r.out, remark), r.out);
    };
    const std::string y = "layers.0.ssd.y";
    CHECK_EQ(verdict([](Tensors&) {}).status, 0);

    RunResult r = verdict([&](Tensors& t) { t.remove(y); });
    CHECK_EQ(r.status, 1);
    CHECK(contains(r.out, "missing   layers.0.ssd.y"));
    CHECK(contains(r.out, ", 1 missing"));
    CHECK_EQ(verdict([&](Tensors& t) { t.remove(y); }, {"--partial"}).status, 0);
    CHECK_EQ(verdict([&](Tensors& t) { t.remove(y); }, {"--only", "layers.1", "logits"}).status, 0);
    CHECK_EQ(verdict([&](Tensors& t) { t.remove(y); }, {"--only", y}).status, 1);
    CHECK_EQ(verdict([&](Tensors& t) { t.list.resize(1); }, {"--partial", "--only", "layers"}).status,
             1);  // nothing left

    r = verdict([&](Tensors& t) { t.at(y).name = "layers.0.ssd.yy"; });
    CHECK(contains(r.out, "layers.0.ssd.yy: the oracle has no tensor of this name; did you mean layers.0.ssd.y?"));
    CHECK_EQ(r.status, 1);

    fails_at(y, "has shape (7,2,4), expected (1,7,2,4)", verdict([&](Tensors& t) { t.at(y).shape = {7, 2, 4}; }));
    fails_at(y, "the same dimensions in another order", verdict([&](Tensors& t) { t.at(y).shape = {1, 2, 7, 4}; }));
    fails_at(y, "not finite", verdict([&](Tensors& t) { t.at(y).values[5] = NAN; }));
    fails_at(y, "not finite", verdict([&](Tensors& t) { t.at(y).values[5] = -INFINITY; }));
    fails_at(y, "[0,0,1,1]", verdict([&](Tensors& t) { t.at(y).values[5] = NAN; }));
    fails_at(y, "expected floating-point numbers", verdict([&](Tensors& t) {
                 t.at(y).dtype = DType::I64;
                 for (double& v : t.at(y).values) v = 1;
             }));
    fails_at("sampler.token", "expected integers",
             verdict([&](Tensors& t) { t.at("sampler.token").dtype = DType::F64; }));
    const std::string q = "layers.1.attn.out";  // (1,7,8)
    fails_at("grad.model.layers.0.ssd.x_proj.weight", "dimensions 0 and 1 are swapped", verdict([&](Tensors& t) {
                 std::vector<double>& w = t.at("grad.model.layers.0.ssd.x_proj.weight").values;  // (8,8)
                 const std::vector<double> before = w;
                 for (size_t i = 0; i < 64; ++i) w[i] = before[i % 8 * 8 + i / 8];
             }));
    fails_at(q, "relative RMS", verdict([&](Tensors& t) {
                 for (double& v : t.at(q).values) v = 0;
             }));
    // Of several, the first in the order of computation, whatever their order in the file.
    const auto several = [&](Tensors& t) {
        for (const char* name : {"logits", "layers.0.norm1", "layers.1.norm1", "adamw.loss"}) t.at(name).values[0] += 1;
        std::reverse(t.list.begin(), t.list.end());
    };
    fails_at("layers.0.norm1", "", verdict(several));
    // Other programs write an oracle's tensors again in an order of their own.
    Tensors again(stored_file());
    std::sort(again.list.begin(), again.list.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    again.write(tmp / "again");
    fails_at("layers.0.norm1", "", compare_files(tmp / "again", tmp / "changed"));
}

TEST_CASE("compare: the noise of bf16 lets no empty tensor pass, and what it makes useless is counted") {
    TempDir tmp;
    Tensors o(stored_file());
    for (auto& kv : o.metadata)
        if (kv.first == "noise") {
            const std::string name = "\"logits\":[";
            const size_t from = kv.second.find(name) + name.size(), to = kv.second.find(']', from);
            kv.second.replace(from, to - from, "1e-7,1e-7,0.3,1");
        }
    o.write(tmp / "o");
    REQUIRE_EQ(oracle({"--inputs", stored_file(), "--precision", "bf16"}, tmp / "c").status, 0);
    RunResult r = compare_files(tmp / "o", tmp / "c", {"--dtype", "bf16", "--only", "logits"});
    CHECK_EQ(r.status, 0);
    CHECK_MESSAGE(contains(r.out, "1 of them may err by a relative RMS of 0.5 or more (first: logits)"), r.out);
    Tensors c(tmp / "c");
    for (double& v : c.at("logits").values) v = 0;
    c.write(tmp / "c");
    r = compare_files(tmp / "o", tmp / "c", {"--dtype", "bf16", "--only", "logits"});
    CHECK_EQ(r.status, 1);
    CHECK_MESSAGE(contains(r.out, "zero everywhere"), r.out);
}

TEST_CASE("compare: a number that sums up may be a few units off, in each precision, and no more") {
    TempDir tmp;
    const std::pair<const char*, double> units[] = {
        {"fp64", std::ldexp(1, -52)}, {"fp32", std::ldexp(1, -23)}, {"bf16", std::ldexp(1, -23)}};
    for (const auto& unit : units) {
        Tensors t(stored_file());
        for (auto& kv : t.metadata)  // as when all runs that measured the noise came out right by luck
            if (kv.first == "noise") {
                const std::string name = "\"adamw.loss\":[";
                const size_t from = kv.second.find(name) + name.size(), to = kv.second.find(']', from);
                kv.second.replace(from, to - from, "0,0,0,0");
            }
        t.write(tmp / "o");
        const std::vector<double> exact = t.at("adamw.loss").values;
        for (const double off : {4, 20}) {
            for (size_t i = 0; i < exact.size(); ++i) t.at("adamw.loss").values[i] = exact[i] * (1 + off * unit.second);
            t.write(tmp / "c");
            const RunResult r = compare_files(tmp / "o", tmp / "c", {"--dtype", unit.first, "--only", "adamw.loss"});
            CHECK_EQ(r.status, off == 4 ? 0 : 1);
        }
    }
}

TEST_CASE("compare: damaged files, other models and wrong words get one line") {
    TempDir tmp;
    REQUIRE_EQ(oracle({"--inputs", stored_file(), "--precision", "fp32"}, tmp / "c").status, 0);
    const std::string file = read_file(tmp / "c"), good = read_file(stored_file());
    put_file(tmp / "cut", file.substr(0, file.size() - 8));
    CHECK_EQ(refusal(compare_files(stored_file(), tmp / "cut"), 1, {"cut", "truncated"}), "");
    put_file(tmp / "cut", good.substr(0, good.size() / 2));
    CHECK_EQ(refusal(compare_files(tmp / "cut", tmp / "c"), 1, {"cut", "truncated"}), "");
    CHECK_EQ(refusal(compare_files(tmp / "c", stored_file()), 1, {"fp32", "expected an oracle"}), "");
    CHECK_EQ(refusal(compare_files(stored_file(), tmp / "none"), 1, {"none", "cannot read"}), "");
    CHECK_EQ(refusal(compare_files(stored_file(), tmp / "c", {"--dtype", "fp16"}), 2, {"--dtype", "fp16"}), "");
    CHECK_EQ(refusal(compare_files(stored_file(), tmp / "c", {"--only", "layer.0"}), 2, {"layer.0", "did you mean"}),
             "");
    CHECK_EQ(refusal(run_program("ref_cpu", {"compare", stored_file()}), 2, {"expected two files"}), "");

    // Another seed, another length, and a file that is no oracle.
    std::vector<std::string> options = stored_options;
    options.insert(options.end(), {"--seed", "2"});
    REQUIRE_EQ(oracle(options, tmp / "other").status, 0);
    CHECK_EQ(refusal(compare_files(stored_file(), tmp / "other"), 1, {"other", "inputs_sha256"}), "");
    Tensors bare(tmp / "other");  // no metadata: the numbers tell
    bare.metadata.clear();
    bare.write(tmp / "bare");
    CHECK_EQ(compare_files(stored_file(), tmp / "bare").status, 1);
    CHECK_EQ(refusal(compare_files(tmp / "bare", stored_file()), 1, {"bare", "schema"}), "");

    // Metadata that lies.
    const auto damaged = [&](const std::string& key, const std::string& value) {
        Tensors t(stored_file());
        for (auto& kv : t.metadata)
            if (kv.first == key) kv.second = value;
        t.write(tmp / "damaged");
        return compare_files(tmp / "damaged", tmp / "c");
    };
    CHECK_EQ(refusal(damaged("schema", "2"), 1, {"schema", "'2'"}), "");
    CHECK_EQ(refusal(damaged("kind", "nothing"), 1, {"kind", "nothing"}), "");
    CHECK_EQ(refusal(damaged("config", "{"), 1, {"config"}), "");
    CHECK_EQ(refusal(damaged("seed", "x"), 1, {"seed", "'x'"}), "");
    CHECK_EQ(refusal(damaged("noise", "[]"), 1, {"noise"}), "");
    CHECK_EQ(refusal(damaged("noise", "{\"logits\": [1, 2, -3, 4]}"), 1, {"noise", "logits"}), "");
    CHECK_EQ(refusal(damaged("adamw", "{}"), 1, {"adamw", "steps"}), "");
}

TEST_CASE("oracle: options that make no sense are refused in one line, and nothing is written") {
    TempDir tmp;
    const std::string out = tmp / "o";
    CHECK_EQ(refusal(run_program("ref_cpu", {"oracle"}), 2, {"--out is missing"}), "");
    CHECK_EQ(refusal(oracle({"--op", "sdd"}, out), 2, {"'sdd'", "did you mean 'ssd'"}), "");
    CHECK_EQ(refusal(oracle({"--precision", "fp16"}, out), 2, {"--precision", "fp16"}), "");
    CHECK_EQ(refusal(oracle({"--preset", "huge"}, out), 2, {"huge"}), "");
    CHECK_EQ(refusal(oracle({"--head-dim", "8"}, out), 2, {"--head-dim"}), "");
    CHECK_EQ(refusal(oracle({"--heads", "3"}, out), 1, {"hidden_size", "num_attention_heads 3"}), "");
    CHECK_EQ(
        refusal(oracle({"--inputs", stored_file(), "--layers", "2"}, out), 2, {"--layers", "says what to compute"}),
        "");
    CHECK_EQ(refusal(oracle({"--inputs", tmp / "none"}, out), 1, {"none", "cannot read"}), "");
    put_file(tmp / "ids", "1 2 3\n4 5\n");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids"}, out), 1, {"ids", "sequence 1 has 2 ids"}), "");
    put_file(tmp / "ids", "1 2 300\n");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids"}, out), 1, {"300", "vocabulary of 256"}), "");
    put_file(tmp / "ids", "1 two 3\n");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids"}, out), 1, {"'two'", "not a token id"}), "");
    put_file(tmp / "ids", "1 2 3\n");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids", "--batch", "2"}, out), 2, {"--tokens", "--batch"}), "");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids"}, tmp / "ids"), 2, {"ids", "is read from"}), "");
    CHECK_EQ(read_file(tmp / "ids"), "1 2 3\n");
    put_file(tmp / "stored", read_file(stored_file()));
    CHECK_EQ(refusal(oracle({"--inputs", tmp / "stored"}, tmp / "stored"), 2, {"stored", "is read from"}), "");
    CHECK(read_file(tmp / "stored") == read_file(stored_file()));
    // Before the work: this one would take hours.
    const std::vector<std::string> long_work = {"--seq-len", "1000000"};
    CHECK_EQ(refusal(oracle(long_work, tmp / "none/o"), 1, {"none/o", "cannot write"}), "");
    CHECK_EQ(refusal(oracle(long_work, tmp / ""), 1, {"cannot write"}), "");
    put_file(tmp / "ids", "\n");
    CHECK_EQ(refusal(oracle({"--tokens", tmp / "ids"}, out), 1, {"ids", "at least 2"}), "");
    CHECK_FALSE(file_exists(out));
}

TEST_CASE("oracle: a user's own weights, tokens and inputs take the place of the drawn ones") {
    TempDir tmp;
    Config c = preset("tiny");
    c.L = 2;
    c.attn_period = 2;
    c.attn_offset = 1;
    const std::vector<float> w = initial_weights(c, 3);
    make_directory(tmp / "model");
    save_model(tmp / "model", c, w.data(), *make_byte_tokenizer());
    put_file(tmp / "ids", "72 101 108 108 111\n87 111 114 108 100\n");
    REQUIRE_EQ(oracle({"--weights", tmp / "model", "--tokens", tmp / "ids", "--adamw-steps", "0"}, tmp / "o").status,
               0);
    Tensors o(tmp / "o");
    CHECK(o.at("tokens").shape == Shape{2, 4});
    CHECK(o.at("tokens").values == std::vector<double>{72, 101, 108, 108, 87, 111, 114, 108});
    CHECK(o.at("targets").values == std::vector<double>{101, 108, 108, 111, 111, 114, 108, 100});
    ref::Model<double> m(c);
    m.weights.assign(w.begin(), w.end());
    const std::vector<int32_t> tokens = {72, 101, 108, 108, 87, 111, 114, 108};
    m.forward(tokens.data(), nullptr, 2, 4, nullptr, nullptr);
    CHECK_EQ(compare_bits("logits", o.at("logits").values, std::vector<double>(m.logits.begin(), m.logits.end())), "");

    const std::vector<std::string> op = {"--op", "rmsnorm",   "--d-model", "8",       "--heads",
                                         "1",    "--seq-len", "3",         "--batch", "1"};
    REQUIRE_EQ(oracle(op, tmp / "op").status, 0);
    Tensors mine(tmp / "op");
    mine.metadata.clear();
    mine.list.resize(1);  // x
    for (double& v : mine.list[0].values) v = 2;
    mine.write(tmp / "mine");
    std::vector<std::string> with = op;
    with.insert(with.end(), {"--inputs", tmp / "mine"});
    REQUIRE_EQ(oracle(with, tmp / "op2").status, 0);
    Tensors result(tmp / "op2");
    CHECK(std::fabs(result.at("rstd").values[0] - 1 / std::sqrt(4 + 1e-6)) < 1e-15);
    CHECK_EQ(result.at("weight").values, Tensors(tmp / "op").at("weight").values);
    mine.list[0].name = "xx";
    mine.write(tmp / "mine");
    CHECK_EQ(refusal(oracle(with, tmp / "op3"), 1, {"mine", "'xx' is not an input of rmsnorm", "'x'"}), "");
    mine.list[0].name = "x";
    mine.list[0].shape = {1, 24};
    mine.write(tmp / "mine");
    CHECK_EQ(refusal(oracle(with, tmp / "op3"), 1, {"mine", "'x'", "(1,24)", "(1,3,8)"}), "");
}

TEST_CASE("oracle: in bf16 an op reads inputs that are off the grid as the nearest numbers on it") {
    TempDir tmp;
    const std::vector<std::string> op = {"--op", "cross_entropy", "--vocab", "9", "--seq-len", "5", "--batch", "1"};
    REQUIRE_EQ(oracle(op, tmp / "o").status, 0);
    Tensors in(tmp / "o");
    in.metadata.clear();
    in.list.resize(1);
    REQUIRE_EQ(in.list[0].name, "logits");
    const auto losses = [&](const std::string& precision) {
        in.write(tmp / "in");
        std::vector<std::string> words = op;
        words.insert(words.end(), {"--inputs", tmp / "in", "--precision", precision});
        REQUIRE_EQ(oracle(words, tmp / "out").status, 0);
        return Tensors(tmp / "out").at("losses").values;
    };
    const std::vector<double> bf16 = losses("bf16"), fp32 = losses("fp32");
    for (double& v : in.list[0].values) v *= 1 + 1.0 / 512;  // less than half a unit away
    CHECK_EQ(losses("bf16"), bf16);
    CHECK(losses("fp32") != fp32);
}
