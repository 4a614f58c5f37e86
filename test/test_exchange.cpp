// Tests of export and import: our checkpoints as files of the published PyTorch module, and its files as checkpoints.
#include "check.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Helpers
// ---------------------------------------------------------------------------------------------------------------------

const std::vector<std::string> model_files = {"config.json", "model.safetensors", "tokenizer.json"};

// Three layers; the published module has no state size of its own, so that N = P.
Config exchange_config(int64 attn_period, int64 attn_offset) {
    Config c;
    c.D = 16;
    c.L = 3;
    c.H = 4;
    c.Hkv = 2;
    c.N = 4;
    c.F = 20;
    c.T = 12;
    c.Q = 4;
    c.attn_period = attn_period;
    c.attn_offset = attn_offset;
    return c;
}

// A checkpoint whose matrices are great enough for every layer to matter in the logits.
struct Checkpoint {
    TempDir tmp;
    Config config;
    std::vector<float> weights;
    const std::string dir = tmp / "ours", out = tmp / "out";

    explicit Checkpoint(const Config& c = exchange_config(3, 2)) : config(c), weights(initial_weights(c, 5)) {
        for (const ParamSpec& s : ParamTable(c).specs)
            if (s.decay)
                for (int64 i = 0; i < s.count; ++i) weights[size_t(s.offset + i)] *= 15;
        make_directory(dir);
        save();
    }
    void save() const { save_model(dir, config, weights.data(), *make_byte_tokenizer()); }
    float* data(const std::string& name) { return weights.data() + ParamTable(config).find(name)->offset; }
    // What export or import says; and, where it refuses, that nothing was left.
    std::string error(void (*command)(const std::string&, const std::string&)) const {
        const std::vector<std::string> before = list_directory(tmp.path);
        const std::string message = error_of([&] { command(dir, out); });
        return list_directory(tmp.path) == before ? message : "(something was left) " + message;
    }
};
#define CHECK_REFUSED(checkpoint, command, ...) \
    CHECK_EQ(missing_part((checkpoint).error(command), std::vector<std::string>{__VA_ARGS__}), "")

// Every tensor of the published module, written down from its classes. `layers` has a letter for each: s(sd), a(ttention).
std::map<std::string, Shape> published_tensors(const Config& c, const std::string& layers, bool hidden_bias) {
    std::map<std::string, Shape> t;
    const auto linear = [&](const std::string& name, int64 out, int64 in) {
        t[name + ".weight"] = {out, in};
        if (hidden_bias) t[name + ".bias"] = {out};
    };
    t["model.word_embed.weight"] = {c.V, c.D};
    for (size_t i = 0; i < layers.size(); ++i) {
        const std::string layer = "model.layers." + std::to_string(i) + ".";
        for (const char* vector :
             {"pre_sequence_layernorm", "post_sequence_residual", "pre_state_layernorm", "post_state_residual"})
            t[layer + vector + ".weight"] = {c.D};
        if (layers[i] == 'a') {
            linear(layer + "attn.q_proj", c.D, c.D);
            linear(layer + "attn.k_proj", c.D / c.H * c.Hkv, c.D);
            linear(layer + "attn.v_proj", c.D / c.H * c.Hkv, c.D);
            linear(layer + "attn.o_proj", c.D, c.D);
        } else {
            for (const char* square : {"c_proj", "b_proj", "x_proj", "out_proj"})
                linear(layer + "ssd." + square, c.D, c.D);
            linear(layer + "ssd.dt_proj", c.H, c.D);
            t[layer + "ssd.A"] = {c.H};
        }
        linear(layer + "feed_forward.gate_proj", c.F, c.D);
        linear(layer + "feed_forward.up_proj", c.F, c.D);
        linear(layer + "feed_forward.down_proj", c.D, c.F);
    }
    t["model.final_layernorm.weight"] = {c.D};
    if (!c.tie) t["lm_head.weight"] = {c.V, c.D};
    return t;
}

// A safetensors file in memory, so that a test can change one tensor and write the rest.
struct Tensors {
    std::map<std::string, std::pair<Shape, std::vector<float>>> map;

    explicit Tensors(const std::string& file) {
        const SafeTensors in(file);
        for (const SafeTensors::Entry& e : in.entries) {
            map[e.name] = {e.shape, std::vector<float>(size_t(element_count(e.shape)))};
            in.read(e, map[e.name].second.data());
        }
    }
    void write(const std::string& file) const {
        std::vector<TensorView> views;
        for (const auto& t : map) views.push_back({t.first, DType::F32, t.second.first, t.second.second.data()});
        write_safetensors(file, views, {{"format", "pt"}});
    }
};

std::vector<double> logits_of(const Config& c, const std::vector<float>& weights) {
    ref::Model<double> model(c);
    model.weights.assign(weights.begin(), weights.end());
    std::vector<int32_t> tokens;
    for (int i = 0; i < 11; ++i) tokens.push_back(int32_t(i * i * 7 % 251));
    model.forward(tokens.data(), nullptr, 1, int64(tokens.size()), nullptr, nullptr);
    return model.logits;
}

struct Plan {
    const char* name;
    int64 attn_period, attn_offset;
    bool tie;
    const char* layers;
};
const Plan plans[] = {{"hybrid, tied head", 3, 2, true, "ssa"}, {"hybrid, untied head", 2, 1, false, "sas"},
                      {"plain Transformer", 1, 0, true, "aaa"}, {"plain Transformer, untied head", 1, 0, false, "aaa"},
                      {"pure state space", 0, 0, true, "sss"},  {"pure state space by its offset", 2, 2, false, "sss"}};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Export
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("export: the tensors of the published module, all of them and no others, with our values") {
    for (const Plan& plan : plans) {
        CAPTURE(plan.name);
        Config c = exchange_config(plan.attn_period, plan.attn_offset);
        c.tie = plan.tie;
        Checkpoint m(c);
        export_model(m.dir, m.out);
        CHECK_EQ(list_directory(m.out), model_files);
        CHECK_EQ(list_directory(m.tmp.path), std::vector<std::string>{"ours", "out"});

        const SafeTensors file(m.out + "/model.safetensors");
        CHECK_EQ(file.metadata.at("format"), "pt");
        std::map<std::string, Shape> found;
        for (const SafeTensors::Entry& e : file.entries) {
            CHECK_EQ(e.dtype, DType::F32);
            found[e.name] = e.shape;
        }
        const bool ssd = std::string(plan.layers) != "aaa";  // biases only where dt needs one
        const std::map<std::string, Shape> expected = published_tensors(c, plan.layers, ssd);
        for (const auto& t : expected)
            CHECK_EQ(t.first + " " + to_text(found[t.first]), t.first + " " + to_text(t.second));
        CHECK_EQ(found.size(), expected.size());

        // Each of our parameters is found under its name there, bit for bit; A is computed; the other biases are zero.
        Tensors there(m.out + "/model.safetensors");
        for (const ParamSpec& s : ParamTable(c).specs) {
            const float* const ours = m.data(s.name);
            std::vector<float> want(ours, ours + s.count);
            std::string name = s.name;
            if (s.param == Param::dt_bias) name.replace(name.find("dt_bias"), 7, "dt_proj.bias");
            if (s.param == Param::A_log) {
                name.replace(name.find("A_log"), 5, "A");
                for (float& v : want) v = float(-std::exp(double(v)));
            }
            CHECK_EQ(compare_bits(name, there.map[name].second, want), "");
            there.map.erase(name);
        }
        for (const auto& t : there.map) {
            CHECK(contains(t.first, ".bias"));
            for (const float v : t.second.second) CHECK_EQ(v, 0);
        }
    }
}

TEST_CASE("export: config.json as the published module needs it") {
    for (const Plan& plan : plans) {
        CAPTURE(plan.name);
        const Checkpoint m(exchange_config(plan.attn_period, plan.attn_offset));
        export_model(m.dir, m.out);
        const Json j = Json::parse(read_file(m.out + "/config.json"), "config.json");
        const auto text = [&](const char* key) { return j.find(key) ? j.find(key)->dump(0) : "(absent)"; };
        CHECK_EQ(text("model_type"), "\"TransXSSM\"");
        CHECK_EQ(text("hidden_bias"), std::string(plan.layers) == "aaa" ? "false" : "true");
        CHECK_EQ(text("rope_scaling"), "null");
        CHECK_EQ(text("pad_token_id"), "null");
        CHECK_EQ(text("torch_dtype"), "\"float32\"");
        CHECK_EQ(text("num_key_value_heads"), "2");
        // Its rule for the kind of layer i is i % period == offset, which fails for period 0.
        int64 period = 0, offset = 0;
        REQUIRE(j.find("attn_layer_period")->integer(&period));
        REQUIRE(j.find("attn_layer_offset")->integer(&offset));
        REQUIRE(period > 0);
        std::string layers;
        for (int64 i = 0; i < m.config.L; ++i) layers += i % period == offset ? 'a' : 's';
        CHECK_EQ(layers, plan.layers);
    }
}

TEST_CASE("export: what has no counterpart there is refused by its name, and nothing is left") {
    Config c = exchange_config(3, 2);
    c.N = 6;
    CHECK_REFUSED(Checkpoint(c), export_model, "config.json: ssd_state_size is 6", "here 4");
    c.N = 4;
    c.ssd_decay = false;
    CHECK_REFUSED(Checkpoint(c), export_model, "config.json: ssd_decay is false");
    c = exchange_config(1, 0);  // a model without SSD layers does not use either
    c.N = 6;
    c.ssd_decay = false;
    CHECK_EQ(error_of([&] {
                 const Checkpoint m(c);
                 export_model(m.dir, m.out);
             }),
             "(no error)");
    for (const float bad : {-100.0f, 100.0f}) {  // exp underflows to a subnormal number, or overflows
        Checkpoint m;
        m.data("model.layers.1.ssd.A_log")[2] = bad;
        m.save();
        CHECK_REFUSED(m, export_model, "tensor 'model.layers.1.ssd.A_log': element 2 is " + to_text(double(bad)),
                      "out of the range of float32");
    }
}

TEST_CASE("export, import: OUT must be new; a failed write leaves neither OUT nor OUT.tmp") {
    for (const auto command : {export_model, import_model}) {
        const Checkpoint m;
        make_directory(m.out);
        CHECK_REFUSED(m, command, m.out + ": exists already");
        remove_tree(m.out);
        write_file(m.out, "text");
        CHECK_REFUSED(m, command, m.out + ": exists already");
        CHECK_EQ(read_file(m.out), "text");
        remove_tree(m.out);
        REQUIRE(symlink("nowhere", m.out.c_str()) == 0);
        CHECK_REFUSED(m, command, m.out + ": exists already");
        remove_tree(m.out);
        make_directory(m.out + ".tmp");  // perhaps someone else's: it is not touched
        write_file(m.out + ".tmp/config.json", "text");
        CHECK_REFUSED(m, command, m.out + ".tmp: cannot create directory", "remove it");
        CHECK_EQ(read_file(m.out + ".tmp/config.json"), "text");
        remove_tree(m.out + ".tmp");
        CHECK_ERROR(command(m.dir, ""), "OUT is empty");
        CHECK_ERROR(command(m.dir, m.tmp / "none/out"), "none/out.tmp: cannot create directory");
        CHECK_ERROR(command(m.tmp / "none", m.out), "none: no such directory");
        command(m.dir, m.out + "/");
        CHECK_EQ(list_directory(m.out), model_files);
    }
    // A limit of a few kilobytes on the size of files stands for a full disk.
    const Checkpoint m;
    for (const char* command : {"export", "import"}) {
        const RunResult r = run_program(
            "/bin/sh", {"-c", "ulimit -f 8; exec \"$0\" \"$@\"", program_path("ref_cpu"), command, m.dir, m.out});
        CHECK_EQ(refusal(r, 1, {m.out + ".tmp/model.safetensors: cannot write"}), "");
        CHECK_EQ(list_directory(m.tmp.path), std::vector<std::string>{"ours"});
    }
}

TEST_CASE("export: kill -9 at any instant leaves no OUT or a whole one") {
    Config c = exchange_config(3, 2);
    c.F = 4000;  // a file of some size
    const Checkpoint m(c);
    for (int i = 0; i < 20; ++i) {
        Process p("ref_cpu", {"export", m.dir, m.out});
        while (p.running() && !file_exists(m.out + ".tmp")) usleep(20);
        usleep(useconds_t(i * i * 50));  // writing takes some milliseconds from here, flushing included
        p.send(SIGKILL);
        p.wait();
        if (file_exists(m.out)) {
            CHECK_EQ(list_directory(m.out), model_files);
            const std::vector<float> w = load_weights(m.out, load_config(m.out));
            CHECK_EQ(compare("weights", w, m.weights, 1e-6), "");
            CHECK(load_tokenizer(m.out + "/tokenizer.json")->vocab_size() == 256);
        }
        remove_tree(m.out);
        remove_tree(m.out + ".tmp");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// There and back
// ---------------------------------------------------------------------------------------------------------------------

// The only number that is not copied is A. With u = 2^-24, A = -exp(A_log) is rounded by u relative, which its logarithm
// shows as u absolute, and that logarithm is rounded by u relative: |difference| <= u (1 + |A_log|). (1% more for the
// second order and for exp and log in double.) At most 2.3e-7 for the initial values of A_log, 0 to 2.8.
TEST_CASE("export, import: the same weights up to the rounding of A, the same configuration, tokenizer and logits") {
    for (const Plan& plan : plans) {
        CAPTURE(plan.name);
        Config c = exchange_config(plan.attn_period, plan.attn_offset);
        c.tie = plan.tie;
        c.dropout = 0.25;
        c.rope_theta = 12345.5;
        c.norm_eps = 1e-5;
        Checkpoint m(c);
        for (const ParamSpec& s : ParamTable(c).specs)  // some that are not exact: above 1, those of the start are
            for (int64 h = 0; s.param == Param::A_log && h < s.count; ++h)
                m.data(s.name)[h] = std::vector<float>{0.1f, -0.7f, 2.3f, -20.0f}[size_t(h)] / float(s.layer + 1);
        m.save();
        const std::string back = m.tmp / "back";
        export_model(m.dir, m.out);
        import_model(m.out, back);
        CHECK_EQ(list_directory(back), model_files);
        CHECK_EQ(read_file(back + "/config.json"), read_file(m.dir + "/config.json"));
        CHECK_EQ(read_file(back + "/tokenizer.json"), read_file(m.dir + "/tokenizer.json"));

        const std::vector<float> w = load_weights(back, load_config(back));
        const SafeTensors file(back + "/model.safetensors");
        REQUIRE_EQ(w.size(), m.weights.size());
        const ParamTable table(c);
        CHECK_EQ(file.entries.size(), table.specs.size());
        std::vector<float> moved = m.weights;  // with A_log changed by a hundred times the tolerance
        for (const ParamSpec& s : table.specs) {
            CHECK(file.find(s.name));
            const float* const ours = m.data(s.name);
            const std::vector<float> got(w.begin() + s.offset, w.begin() + s.offset + s.count),
                want(ours, ours + s.count);
            if (s.param != Param::A_log) {
                CHECK_EQ(compare_bits(s.name, got, want), "");
                continue;
            }
            for (int64 h = 0; h < s.count; ++h) {
                const double tolerance = std::ldexp(1.01, -24) * (1 + std::fabs(double(want[size_t(h)])));
                CHECK(std::fabs(double(got[size_t(h)]) - double(want[size_t(h)])) <= tolerance);
                moved[size_t(s.offset + h)] += float(100 * tolerance);
            }
        }
        // A change d of A_log changes a decay exp(-x) by at most x exp(-x) d <= d/e. That is below 1e-7; three layers and
        // sums of both signs may show a multiple. In double, so that there is no other difference.
        const std::vector<double> logits = logits_of(c, m.weights);
        CHECK_EQ(compare("logits", logits_of(load_config(back), w), logits, 3e-7), "");
        if (contains(plan.layers, "s")) CHECK_NE(compare("logits", logits_of(c, moved), logits, 3e-7), "");
    }
}

TEST_CASE("ref_cpu sample and eval take an exported directory as it is") {
    const Checkpoint m;
    REQUIRE_EQ(run_program("ref_cpu", {"export", m.dir, m.out}).status, 0);
    const auto sample = [&](const std::string& dir) {
        return run_program("ref_cpu", {"sample", dir, "--prompt", "abc", "--tokens", "20", "--temperature", "0"});
    };
    CHECK_EQ(sample(m.out).status, 0);
    CHECK_EQ(sample(m.out).out, sample(m.dir).out);
    write_file(m.tmp / "text", "some text to predict, byte by byte");
    CHECK_EQ(run_program("ref_cpu", {"eval", m.out, "--data", m.tmp / "text"}).status, 0);
    CHECK_EQ(run_program("ref_cpu", {"info", m.out}).status, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Import
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE(
    "import: a model as the published module saves it by default, which has no bias, no tokenizer and other keys") {
    Checkpoint m(exchange_config(3, 2));
    Tensors t(m.dir + "/model.safetensors");
    for (const char* ssd : {"model.layers.0.ssd.", "model.layers.1.ssd."}) {
        t.map.erase(std::string(ssd) + "dt_bias");
        t.map.erase(std::string(ssd) + "A_log");
        t.map[std::string(ssd) + "A"] = {{4}, {-1, -0.5f, -16, -1e-3f}};
    }
    t.write(m.dir + "/model.safetensors");
    unlink((m.dir + "/tokenizer.json").c_str());
    write_file(m.dir + "/config.json",
               R"({"architectures": ["TransXSSMForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 2,
                   "attn_layer_period": 3, "bos_token_id": 0, "dynamic_mask_ratio": 0.0, "eos_token_id": 1, "hidden_act": "silu",
                   "hidden_bias": false, "hidden_dropout": 0.0, "hidden_size": 16, "initializer_range": 0.02,
                   "intermediate_size": 20, "max_position_embeddings": 2048, "model_type": "TransXSSM",
                   "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 2,
                   "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 2048,
                   "rope_type": "dynamic"}, "rope_theta": 10000.0, "ssd_chunk_size": 256, "torch_dtype": "bfloat16",
                   "transformers_version": "4.48.3", "use_cache": true, "vocab_size": 256})");
    CHECK_EQ(refusal(run_program("ref_cpu", {"sample", m.dir}), 1, {"tokenizer.json: is missing", "`ref_cpu import`"}),
             "");
    const RunResult r = run_program("ref_cpu", {"import", m.dir, m.out});
    CHECK_EQ(r.status, 0);
    CHECK(contains(r.out, "bytes"));
    CHECK_EQ(list_directory(m.out), model_files);
    CHECK_EQ(read_file(m.out + "/tokenizer.json"), make_byte_tokenizer()->json());
    CHECK_EQ(run_program("ref_cpu", {"sample", m.out, "--tokens", "3"}).status, 0);

    const Config c = load_config(m.out);
    CHECK(c.tie);
    CHECK_EQ(c.N, 4);
    CHECK_EQ(c.Q, 256);
    const std::vector<float> w = load_weights(m.out, c);
    for (const ParamSpec& s : ParamTable(c).specs) {
        const std::vector<float> got(w.begin() + s.offset, w.begin() + s.offset + s.count);
        const float* const ours = m.data(s.name);
        std::vector<float> want(ours, ours + s.count);
        if (s.param == Param::dt_bias) want.assign(4, 0);
        if (s.param == Param::A_log)
            want = {0, float(std::log(0.5)), float(std::log(16.0)), float(std::log(double(1e-3f)))};
        CHECK_EQ(compare_bits(s.name, got, want), "");
    }
}

TEST_CASE("import: a tensor that has no counterpart here is refused by its name, and nothing is left") {
    const Checkpoint ours;
    export_model(ours.dir, ours.out);
    const Tensors whole(ours.out + "/model.safetensors");
    const auto refused = [&](const std::string& name, const Shape& shape, const std::vector<float>& values,
                             const std::vector<std::string>& parts) {
        Checkpoint m;
        Tensors t = whole;
        t.map[name] = {shape, values};
        t.write(m.dir + "/model.safetensors");
        CHECK_EQ(missing_part(m.error(import_model), parts), "");
        CHECK_ERROR(load_weights(m.dir, m.config), m.dir, "tensor '" + name + "'");
    };
    std::vector<std::string> biases;
    for (const auto& t : whole.map)
        if (contains(t.first, ".bias") && !contains(t.first, "dt_proj")) biases.push_back(t.first);
    CHECK_EQ(biases.size(), 2 * 7 + 7);  // C, B, X, out in two layers, q, k, v, o in one; gate, up, down in each
    for (const std::string& name : biases) {
        const Shape shape = whole.map.at(name).first;
        std::vector<float> values(static_cast<size_t>(shape[0]));
        values[3] = -0.25f;
        refused(name, shape, values, {"tensor '" + name + "': element 3 is -0.25", "no bias other than dt_bias"});
        refused(name, {2}, {0, 0}, {"tensor '" + name + "' has shape (2)"});
    }
    refused("lm_head.bias", {256}, std::vector<float>(256), {"tensor 'lm_head.bias' (256) is not part of the model"});
    refused("model.layers.0.attn.q_proj.bias", {16}, std::vector<float>(16), {"not part of the model"});
    refused("model.layers.0.ssd.A", {4}, {-1, -1, 0, -1}, {"ssd.A': element 2 is 0", "below 0", "without bound"});
    refused("model.layers.0.ssd.A", {4}, {-1, 1, -1, -1}, {"ssd.A': element 1 is 1", "below 0", "without bound"});

    Checkpoint both;  // ours and theirs
    Tensors t = whole;
    t.map["model.layers.0.ssd.dt_bias"] = {{4}, {0, 0, 0, 0}};
    t.write(both.dir + "/model.safetensors");
    CHECK_REFUSED(both, import_model, "tensor 'model.layers.0.ssd.dt_proj.bias' (4) is not part of the model");
}

TEST_CASE("import: other forms of weights, missing and unsuitable tokenizers are refused with what to do") {
    for (const char* name : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
        Checkpoint m;
        unlink((m.dir + "/model.safetensors").c_str());
        CHECK_REFUSED(m, import_model, "model.safetensors: cannot read: No such file");
        write_file(m.dir + "/" + name, "\x80\x02");
        CHECK_REFUSED(m, import_model, m.dir + "/" + name, "convert", "model.safetensors");
        CHECK_EQ(refusal(run_program("ref_cpu", {"sample", m.dir}), 1, {name, "convert"}), "");
        m.save();
        CHECK_EQ(m.error([](const std::string& a, const std::string& b) {
            import_model(a, b);
            remove_tree(b);
        }),
                 "(no error)");
    }
    Checkpoint parts;
    unlink((parts.dir + "/model.safetensors").c_str());
    write_file(parts.dir + "/model.safetensors.index.json", "{}");
    CHECK_REFUSED(parts, import_model, "model.safetensors.index.json: weights in several files", "join");

    Config c = exchange_config(3, 2);
    c.V = 300;
    const Checkpoint wide(c);
    unlink((wide.dir + "/tokenizer.json").c_str());
    CHECK_REFUSED(wide, import_model, wide.dir + "/tokenizer.json: is missing", "vocab_size 256", "300");
    write_file(wide.dir + "/tokenizer.json", R"({"model": {"type": "Unigram"}})");
    CHECK_REFUSED(wide, import_model, wide.dir + "/tokenizer.json");
    c.V = 200;
    CHECK_REFUSED(Checkpoint(c), import_model, "tokenizer.json: 256 tokens", "vocabulary is 200");
}

TEST_CASE("ref_cpu export, import: the words of the command line") {
    const Checkpoint m;
    for (const char* command : {"export", "import"}) {
        const auto run = [&](const std::vector<std::string>& words) {
            std::vector<std::string> args = {command};
            args.insert(args.end(), words.begin(), words.end());
            return run_program("ref_cpu", args);
        };
        CHECK_EQ(refusal(run({}), 2, {command, "DIR", "OUT", "found 0"}), "");
        CHECK_EQ(refusal(run({m.dir}), 2, {command, "found 1"}), "");
        CHECK_EQ(refusal(run({m.dir, m.out, "x"}), 2, {command, "found 3"}), "");
        CHECK_EQ(refusal(run({m.dir, m.out, "--dtype", "bf16"}), 2, {"--dtype"}), "");
        CHECK_EQ(refusal(run({m.dir, m.dir}), 1, {m.dir + ": exists already"}), "");
        const RunResult help = run({"--help"});
        CHECK_EQ(help.status, 0);
        CHECK(contains(help.out, std::string("ref_cpu ") + command + " DIR OUT"));
        CHECK_FALSE(file_exists(m.out));
    }
    // DIR may be a run's OUT.
    write_file(m.tmp / "latest", "ours\n");
    const RunResult r = run_program("ref_cpu", {"export", m.tmp.path, m.out});
    CHECK_EQ(r.status, 0);
    CHECK_EQ(r.out, m.out + " is for the published PyTorch module\n");
    CHECK_EQ(list_directory(m.out), model_files);
}
