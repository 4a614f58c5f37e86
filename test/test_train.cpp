// The trainer, through the program: what a user can start, stop, kill, resume and get wrong.
#include <chrono>

#include "check.h"

namespace {

// Words, so that a few dozen steps learn something; no two files of different seeds are alike.
std::string make_text(size_t bytes, uint64_t seed = 1) {
    static const char* const words[] = {"state", "space", "and", "attention", "share", "the", "same", "positions"};
    const Philox random(seed, "text");
    std::string s;
    for (uint64_t i = 0; s.size() < bytes; ++i) {
        const uint32_t r = random.at(i).word[0];
        s += words[r % 8];
        s += r % 61 < 8 ? ".\n" : " ";
    }
    s.resize(bytes);
    return s;
}

using Args = std::vector<std::string>;

Args operator+(Args a, const Args& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

// A hybrid of 2 layers: one of each kind, grouped queries, N != P, a window that is no multiple of the chunk.
const Args small_model = {"--layers", "2", "--attn-period", "2",  "--attn-offset", "1", "--d-model",     "16",
                          "--heads",  "2", "--kv-heads",    "1",  "--d-state",     "6", "--d-ff",        "24",
                          "--chunk",  "7", "--seq-len",     "16", "--batch",       "2", "--eval-tokens", "150"};

// One thread unless a test is about threads: other processes may use the same cores.
RunOptions one_thread() {
    RunOptions options;
    options.env = {"OMP_NUM_THREADS=1"};
    return options;
}

RunResult train(const Args& args, RunOptions options = {}) {
    if (options.env.empty()) options.env = one_thread().env;
    return run_program("train", args, options);
}

// A refusal of `train` with these arguments.
std::string refused(int status, const Args& args, const std::vector<std::string>& parts) {
    return refusal(train(args), status, parts);
}

// log.csv without its last column, which is a measurement.
std::string log_of(const std::string& run) {
    std::string out;
    const std::string text = read_file(run + "/log.csv");
    for (size_t at = 0; at < text.size();) {
        const size_t end = text.find('\n', at);
        const std::string line = text.substr(at, end - at);
        out += line.substr(0, line.find_last_of(',')) + "\n";
        at = end + 1;
    }
    return out;
}

std::string sample_of(const std::string& out, int64 step) {
    const std::string title = format("--- sample after step %lld ---\n", (long long)step);
    const size_t from = out.find(title);
    return from == std::string::npos ? "(no sample)" : out.substr(from, out.find("\n---\n", from) - from);
}

// The column of log.csv in its last row.
double last_value(const std::string& run, int column) {
    const std::string text = log_of(run);
    std::string row = text.substr(text.find_last_of('\n', text.size() - 2) + 1);
    for (; column > 0; --column) row.erase(0, row.find(',') + 1);
    return strtod(row.c_str(), nullptr);
}

// "" if two checkpoints hold the same weights and moments, bit for bit.
std::string differing_file(const std::string& a, const std::string& b) {
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"})
        if (read_file(a + "/" + name) != read_file(b + "/" + name)) return name;
    return "";
}

std::vector<float> weights_of(const std::string& dir) {
    const std::string checkpoint = resolve_checkpoint(dir);
    return load_weights(checkpoint, load_config(checkpoint));
}

void sleep_ms(double ms) { usleep(useconds_t(1000 * ms)); }

// Waits, at most 20 seconds, until the program has printed `text`.
bool wait_for(const Process& p, const std::string& text) {
    for (int i = 0; i < 4000 && !contains(p.output(), text); ++i) sleep_ms(5);
    return contains(p.output(), text);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The pure functions
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("train: the learning rate warms up, peaks, and reaches its floor at the last step") {
    CHECK(learning_rate(0, 100, 2.0, 0.1, 0.1) == doctest::Approx(0.2));
    CHECK(learning_rate(4, 100, 2.0, 0.1, 0.1) == doctest::Approx(1.0));
    CHECK(learning_rate(9, 100, 2.0, 0.1, 0.1) == doctest::Approx(2.0));
    CHECK(learning_rate(10, 100, 2.0, 0.1, 0.1) == doctest::Approx(2.0));
    CHECK(learning_rate(99, 100, 2.0, 0.1, 0.1) == doctest::Approx(0.2));
    CHECK(learning_rate(50, 101, 1.0, 0, 0) == doctest::Approx(0.5));  // halfway down the cosine
    CHECK(learning_rate(0, 101, 1.0, 0, 0) == doctest::Approx(1.0));
    CHECK(learning_rate(99, 100, 2.0, 1, 0.1) == doctest::Approx(2.0));  // all warm-up
    for (int64 s = 11; s < 100; ++s)
        CHECK(learning_rate(s, 100, 2.0, 0.1, 0.1) < learning_rate(s - 1, 100, 2.0, 0.1, 0.1));
    CHECK(std::isfinite(learning_rate(0, 1, 1.0, 0.1, 0.1)));
}

TEST_CASE("train: windows cover all of the data evenly and are a function of (seed, step, row)") {
    const int64 tokens = 50, T = 10, choices = tokens - T;
    std::vector<int> hits(static_cast<size_t>(choices));
    const int draws = 40000;
    for (int i = 0; i < draws; ++i) {
        const int64 at = window_start(7, i / 8, i % 8, tokens, T);
        REQUIRE(at >= 0);
        REQUIRE(at < choices);  // so that T tokens and their targets exist
        ++hits[size_t(at)];
    }
    // 1000 expected in each place, standard deviation 32: five of them cannot happen by chance (and the seed is fixed).
    for (const int n : hits) CHECK(std::abs(n - draws / int(choices)) < 160);
    CHECK(window_start(1, 3, 0, 11, 10) == 0);  // one place only
    int differ = 0;
    for (int row = 0; row < 20; ++row)
        differ += window_start(1, 5, row, 1 << 20, 10) != window_start(2, 5, row, 1 << 20, 10);
    CHECK(differ == 20);
}

TEST_CASE("train: loss.svg is well-formed whatever the log holds") {
    std::vector<LogRow> rows;
    CHECK_EQ(xml_problem(loss_svg(rows, 100, "empty")), "");
    rows.push_back({1, 10, 5.5, NAN, 1e-3, 1, 100});
    CHECK_EQ(xml_problem(loss_svg(rows, 1, "one row")), "");
    for (int64 s = 2; s <= 5000; ++s)
        rows.push_back({s, 10 * s, 2 + 3 * std::exp(-double(s) / 500), s % 500 ? NAN : 2.5, 1e-3, 1, 100});
    const std::string svg = loss_svg(rows, 6000, "a < b & \"c\" > \xFF");
    CHECK_EQ(xml_problem(svg), "");
    CHECK(svg.size() < 100000);
    for (const char* text :
         {"step", "nats per token", "validation: 2.5000", "running mean: 2.0001", ">6,000<", "a &lt; b"})
        CHECK_MESSAGE(contains(svg, text), text);
    rows.back().train_loss = 1e30;  // a run that blew up
    CHECK_EQ(xml_problem(loss_svg(rows, 6000, "up")), "");
    rows.assign(3, {1, 10, 0, 0, 0, 0, 0});
    CHECK_EQ(xml_problem(loss_svg(rows, 3, "all zero")), "");
    CHECK(xml_problem("<a><b></a>") != "");
}

// ---------------------------------------------------------------------------------------------------------------------
// A run
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("train: a run learns, and leaves a checkpoint, a log, a curve, and what to do next") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(6000));
    const RunResult r = train(small_model + Args{"--data", tmp / "text", "--steps", "120", "--lr", "1e-2",
                                                 "--eval-every", "40", "--sample-every", "60", "--out", tmp / "run"});
    REQUIRE_EQ(r.err, "");
    REQUIRE(r.status == 0);
    CHECK_EQ(list_directory(tmp / "run"), Args{"best", "latest", "log.csv", "loss.svg", "step-120"});
    CHECK_EQ(list_directory(tmp / "run/step-120"),
             Args{"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer.json"});
    CHECK_EQ(read_file(tmp / "run/latest"), "step-120\n");
    const std::string log = log_of(tmp / "run");
    CHECK_EQ(log.substr(0, log.find('\n')), "step,tokens,train_loss,val_loss,lr,grad_norm");
    CHECK(std::count(log.begin(), log.end(), '\n') == 121);
    CHECK(contains(log, "\n120,3840,"));
    CHECK(last_value(tmp / "run", 3) < 2.5);  // an untrained model has ln 256 = 5.5
    CHECK(last_value(tmp / "run", 4) == doctest::Approx(1e-3));
    CHECK_EQ(xml_problem(read_file(tmp / "run/loss.svg")), "");
    for (const char* part :
         {"0 SSD, 1 attention", "validation loss", "bits/byte", "ETA", "--- sample after step 60 ---",
          "--- sample after step 120 ---", have_gpu() ? "transxssm sample" : "ref_cpu sample", "--resume"})
        CHECK_MESSAGE(contains(r.out, part), part);
    // The same directory is refused, and its run is left alone.
    CHECK_EQ(refused(2, small_model + Args{"--data", tmp / "text", "--out", tmp / "run"}, {"--out", "--resume"}), "");
    CHECK_EQ(log_of(tmp / "run"), log);
    // A directory alone is enough to evaluate.
    const RunResult eval = run_program("ref_cpu", {"eval", tmp / "run", "--data", tmp / "text"}, one_thread());
    CHECK(eval.status == 0);
    CHECK(contains(eval.out, "bits/byte"));
}

TEST_CASE("train: the latest and the best checkpoint are kept, and no others") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(6000));
    // Validation text that grows less likely as the model learns its training text: the best comes early.
    write_file(tmp / "other", make_text(400, 2) + std::string(2000, '#'));
    REQUIRE(
        train(small_model + Args{"--data", tmp / "text", "--val-data", tmp / "other", "--eval-tokens", "0", "--steps",
                                 "60", "--lr", "3e-2", "--eval-every", "5", "--save-every", "7", "--out", tmp / "run"})
            .status == 0);
    const std::string best = read_file(tmp / "run/best");
    REQUIRE(best != "step-60\n");
    CHECK_EQ(read_file(tmp / "run/latest"), "step-60\n");
    Args names = {"best", "latest", "log.csv", "loss.svg", "step-60", best.substr(0, best.size() - 1)};
    std::sort(names.begin(), names.end());
    CHECK_EQ(list_directory(tmp / "run"), names);
    CHECK(weights_of(tmp / "run" + "/" + best.substr(0, best.size() - 1)).size() > 0);
}

TEST_CASE("train: without --out each run has a new directory, and --dry-run writes nothing") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    RunOptions here;
    here.directory = tmp.path;
    const Args args = small_model + Args{"--data", "text", "--steps", "2", "--sample-every", "0"};
    const RunResult dry = train(args + Args{"--dry-run"}, here);
    CHECK(dry.status == 0);
    CHECK_EQ(list_directory(tmp.path), Args{"text"});
    for (const char* part :
         {"0 SSD, 1 attention", "parameters", "memory", "2,700 tokens", "300 tokens", "2 steps of 32 tokens"})
        CHECK_MESSAGE(contains(dry.out, part), part);
    for (int i = 0; i < 2; ++i) CHECK(train(args, here).status == 0);
    CHECK_EQ(list_directory(tmp / "out"), Args{"tiny-1", "tiny-2"});
    CHECK_EQ(log_of(tmp / "out/tiny-1"), log_of(tmp / "out/tiny-2"));  // the same command gives the same bits
    CHECK_EQ(differing_file(tmp / "out/tiny-1/step-2", tmp / "out/tiny-2/step-2"), "");
    // Data is remembered by its whole path, and OUT may move: a run can be resumed from anywhere.
    REQUIRE(rename((tmp / "out/tiny-1").c_str(), (tmp / "moved").c_str()) == 0);
    CHECK(train({"--resume", tmp / "moved", "--steps", "4"}).status == 0);
    CHECK_EQ(read_file(tmp / "moved/latest"), "step-4\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// Data
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("train: each file gives its last tenth to validation, unless there is --val-data") {
    const TempDir tmp;
    write_file(tmp / "a", make_text(1000));
    write_file(tmp / "b", make_text(501));
    std::string accents;
    for (int i = 0; i < 55; ++i) accents += "\xC3\xA9";
    write_file(tmp / "c", accents);
    const auto dry = [&](const Args& args) { return train(small_model + args + Args{"--dry-run"}).out; };
    CHECK(
        contains(dry({"--data", tmp / "a", tmp / "b"}), "training 1,350 tokens (1,350 bytes), validation 151 tokens"));
    CHECK(contains(dry({"--data", tmp / "a", "--val-data", tmp / "b"}),
                   "training 1,000 tokens (1,000 bytes), validation 501"));
    CHECK(contains(dry({"--data", tmp / "c"}), "training 98 tokens (98 bytes), validation 12"));  // no character is cut
    CHECK_EQ(refused(2, {"--val-data", tmp / "b"}, {"--val-data", "--data"}), "");
}

TEST_CASE("train: the default text is this repository's and does not depend on where the program is called from") {
    const TempDir tmp;
    std::string sha[2], counts[2];
    for (int i = 0; i < 2; ++i) {
        const std::string out = tmp / ("run" + std::to_string(i));
        RunOptions options;
        options.directory = i ? tmp.path : SOURCE_DIR;
        const RunResult r = train(small_model + Args{"--steps", "1", "--sample-every", "0", "--out", out}, options);
        REQUIRE_EQ(r.err, "");
        const Json j = Json::parse(read_file(out + "/step-1/trainer.json"), "trainer.json");
        sha[i] = j.find("train_sha256")->text + j.find("val_sha256")->text;
        counts[i] = r.out.substr(r.out.find("training "), 40);
        CHECK(contains(r.out, "this repository"));
    }
    CHECK_EQ(sha[0], sha[1]);
    CHECK_EQ(counts[0], counts[1]);
    CHECK_EQ(differing_file(tmp / "run0/step-1", tmp / "run1/step-1"), "");
}

TEST_CASE("train: four micro-batches of two windows equal one batch of eight") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const Args args = small_model + Args{"--data", tmp / "text", "--steps", "4", "--sample-every", "0"};
    REQUIRE(train(args + Args{"--batch", "8", "--out", tmp / "one"}).status == 0);
    REQUIRE(train(args + Args{"--batch", "2", "--grad-accum", "4", "--out", tmp / "four"}).status == 0);
    // Float sums in another order: relative errors of some 1e-7 per gradient. AdamW divides each by its own size, so
    // that those few near zero may move by up to the learning rate: 1e-4 of the norm of all weights allows for them.
    for (const int column : {2, 5})
        CHECK(last_value(tmp / "one", column) == doctest::Approx(last_value(tmp / "four", column)).epsilon(1e-5));
    CHECK_EQ(compare("weights", weights_of(tmp / "four"), weights_of(tmp / "one"), 1e-4), "");
    CHECK(contains(log_of(tmp / "four"), "\n4,512,"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Stop and resume
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("train: 10 steps, a stop and 10 more equal 20 steps bit for bit, on 1, 2 and 3 threads") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(8000));
    // Large enough for all loops to be shared among threads (for the products alone in a sanitizer build, which is
    // thirty times slower); dropout and micro-batches have random numbers of their own.
#ifdef __SANITIZE_ADDRESS__
    const char* const length = "20";
#else
    const char* const length = "72";
#endif
    const Args args = {"--data",         tmp / "text", "--layers", "2",  "--attn-period", "2",  "--attn-offset", "1",
                       "--d-model",      "64",         "--heads",  "4",  "--d-state",     "16", "--d-ff",        "96",
                       "--seq-len",      length,       "--batch",  "4",  "--grad-accum",  "2",  "--dropout",     "0.1",
                       "--steps",        "20",         "--chunk",  "16", "--eval-every",  "6",  "--eval-tokens", "300",
                       "--sample-every", "10"};
    std::string first, first_sample;
    for (const int threads : {1, 2, 3}) {
        RunOptions options;
        // Passive: threads that wait in a loop slow each other down where there are fewer cores than threads.
        options.env = {"OMP_NUM_THREADS=" + std::to_string(threads), "OMP_WAIT_POLICY=passive"};
        const std::string n = std::to_string(threads), straight = tmp / ("straight" + n), parts = tmp / ("parts" + n);
        const RunResult whole = train(args + Args{"--out", straight}, options);
        REQUIRE_EQ(whole.err, "");
        const RunResult half = train(args + Args{"--out", parts, "--stop-after", "10"}, options);
        CHECK(half.status == 0);
        CHECK(contains(half.out, "stopped after step 10 of 20"));
        CHECK_EQ(read_file(parts + "/latest"), "step-10\n");
        const RunResult rest = train({"--resume", parts}, options);
        CHECK(rest.status == 0);
        CHECK_EQ(differing_file(parts + "/step-20", straight + "/step-20"), "");
        CHECK_EQ(log_of(parts), log_of(straight));
        CHECK_EQ(sample_of(half.out, 10), sample_of(whole.out, 10));
        CHECK_EQ(sample_of(rest.out, 20), sample_of(whole.out, 20));
        CHECK(sample_of(whole.out, 20).size() > 100);
        if (first.empty()) {
            first = straight;
            first_sample = sample_of(whole.out, 20);
        }
        CHECK_EQ(differing_file(straight + "/step-20", first + "/step-20"), "");
        CHECK_EQ(log_of(straight), log_of(first));
        CHECK_EQ(sample_of(whole.out, 20), first_sample);
    }
}

TEST_CASE("train: --resume refuses changed settings, data and files, each by name") {
    const TempDir tmp;
    const std::string text = make_text(4000), run = tmp / "run";
    write_file(tmp / "text", text);
    write_file(tmp / "val", make_text(500, 2));
    REQUIRE(train(small_model + Args{"--data", tmp / "text", "--val-data", tmp / "val", "--steps", "20", "--stop-after",
                                     "5", "--sample-every", "0", "--out", run})
                .status == 0);
    const auto resume = [&](int status, const Args& more, const std::vector<std::string>& parts) {
        return refused(status, Args{"--resume", run} + more, parts);
    };
    CHECK_EQ(resume(2, {"--lr", "1e-3"}, {"--lr", "--resume"}), "");
    CHECK_EQ(resume(2, {"--seed=1"}, {"--seed"}), "");  // not even the same value
    CHECK_EQ(resume(2, {"--d-model", "32"}, {"--d-model"}), "");
    CHECK_EQ(resume(2, {"--preset", "5m"}, {"--preset"}), "");
    CHECK_EQ(resume(2, {"--data", tmp / "text"}, {"--data"}), "");
    CHECK_EQ(resume(2, {"--init-from", run}, {"--init-from"}), "");
    CHECK_EQ(resume(2, {"--steps", "3"}, {"--steps", "3", "step 5"}), "");
    CHECK_EQ(resume(2, {"--stop-after", "3"}, {"--stop-after", "3", "step 5"}), "");
    CHECK_EQ(refused(1, {"--resume", tmp / "nowhere"}, {"nowhere"}), "");

    std::string changed = text;
    changed[100] = '!';
    write_file(tmp / "text", changed);
    CHECK_EQ(resume(1, {}, {tmp / "text", "training data has changed", "sha256"}), "");
    unlink((tmp / "text").c_str());
    CHECK_EQ(resume(1, {}, {tmp / "text", "No such file"}), "");
    write_file(tmp / "text", text);
    write_file(tmp / "val", make_text(500, 3));
    CHECK_EQ(resume(1, {}, {"validation data has changed"}), "");
    write_file(tmp / "val", make_text(500, 2));

    // Files of the checkpoint: each is read with care.
    const std::string checkpoint = run + "/step-5/", trainer = read_file(checkpoint + "trainer.json"),
                      optimizer = read_file(checkpoint + "optimizer.safetensors");
    const auto with = [&](const char* name, const std::string& contents, const std::vector<std::string>& parts) {
        const std::string before = read_file(checkpoint + name);
        write_file(checkpoint + name, contents);
        const std::string problem = resume(1, {}, parts);
        write_file(checkpoint + name, before);
        return problem;
    };
    const auto swapped = [](std::string s, const std::string& from, const std::string& to) {
        const size_t at = s.find(from);
        if (at == std::string::npos) fail("'%s' is not there", from.c_str());
        return s.replace(at, from.size(), to);
    };
    CHECK_EQ(with("trainer.json", "{}", {"trainer.json", "schema"}), "");
    CHECK_EQ(with("trainer.json", trainer.substr(0, 50), {"trainer.json", "not valid JSON"}), "");
    CHECK_EQ(with("trainer.json", swapped(trainer, "trainer.1", "trainer.9"), {"trainer.json", "trainer.9"}), "");
    CHECK_EQ(with("trainer.json", swapped(trainer, "\"step\": 5", "\"step\": -5"), {"trainer.json", "step", "-5"}), "");
    CHECK_EQ(with("trainer.json", swapped(trainer, "\"lr\": \"", "\"lr\": \"x"), {"trainer.json", "--lr"}), "");
    CHECK_EQ(with("trainer.json", swapped(trainer, "\"clip\"", "\"clap\""), {"trainer.json", "clip"}), "");
    const std::string damage[][3] = {{"\"step\": 5", "\"step\": 4", "step-5"},
                                     {"\"tokens\": 160", "\"tokens\": 161", "expected 160"},
                                     {"\"best_step\": null", "\"best_loss\": 1, \"best_step\": 6", "best_step"},
                                     {"\"steps\": \"20\"", "\"steps\": \"4\"", "'steps'"},
                                     {"\"device\": \"auto", "\"device\": \"gpu", "--device"},
                                     {"\"precision\": \"auto", "\"precision\": \"fp8", "--precision"},
                                     {"\"preset\": \"tiny", "\"preset\": \"../x", "--preset"},
                                     {"\"batch\": \"2\"", "\"batch\": \"0\"", "--batch"}};
    for (const auto& d : damage)
        CHECK_EQ(with("trainer.json", swapped(swapped(trainer, "\"best_loss\": null,", ""), d[0], d[1]),
                      {"trainer.json: ", d[2]}),
                 "");
    CHECK_EQ(with("optimizer.safetensors", optimizer.substr(0, optimizer.size() - 4),
                  {"optimizer.safetensors", "truncated"}),
             "");
    CHECK_EQ(with("optimizer.safetensors", swapped(optimizer, "exp_avg_sq.model.word", "exp_avg_sq.model.wurd"),
                  {"optimizer.safetensors", "exp_avg_sq.model.word_embed.weight", "missing"}),
             "");
    std::string with_nan = optimizer;
    memset(&with_nan[with_nan.size() - 4], 0xFF, 4);
    CHECK_EQ(with("optimizer.safetensors", with_nan, {"optimizer.safetensors", "exp_avg_sq.", "finite"}), "");
    // After all that nothing has changed: the run goes on.
    CHECK(train({"--resume", run, "--stop-after", "6"}).status == 0);
    REQUIRE(unlink((run + "/step-6/trainer.json").c_str()) == 0);
    CHECK_EQ(resume(1, {}, {"trainer.json", "cannot be resumed"}), "");
}

TEST_CASE("train: --resume cuts the log back, needs no best, and branches off into another directory") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const Args args =
        small_model + Args{"--data", tmp / "text", "--steps", "20", "--eval-every", "4", "--sample-every", "0"};
    REQUIRE(train(args + Args{"--out", tmp / "straight"}).status == 0);
    REQUIRE(train(args + Args{"--out", tmp / "run", "--stop-after", "10"}).status == 0);
    // A run that went on after its last checkpoint and was killed while it wrote a line.
    write_file(tmp / "run/log.csv", read_file(tmp / "run/log.csv") + "11,352,9,,1,1,1\n12,384,9");
    make_directory(tmp / "run/step-12.tmp");
    write_file(tmp / "run/step-12.tmp/config.json", "{");
    CHECK(train({"--resume", tmp / "run/step-10", "--out", tmp / "branch"}).status == 0);
    unlink((tmp / "run/best").c_str());
    CHECK(train({"--resume", tmp / "run"}).status == 0);
    for (const char* name : {"run", "branch"}) {
        CHECK_EQ(log_of(tmp / name), log_of(tmp / "straight"));
        CHECK_EQ(differing_file(tmp / name + "/step-20", tmp / "straight/step-20"), "");
        CHECK_EQ(list_directory(tmp / name), list_directory(tmp / "straight"));
    }
    // A finished run says so; a longer schedule goes on.
    const RunResult finished = train({"--resume", tmp / "run"});
    CHECK(finished.status == 0);
    CHECK(contains(finished.out, "is finished"));
    CHECK(train({"--resume", tmp / "run", "--steps", "24"}).status == 0);
    CHECK(contains(log_of(tmp / "run"), "\n24,768,"));
    // Going back within a directory would destroy what came after.
    REQUIRE(train({"--resume", tmp / "branch", "--steps", "40", "--stop-after", "21", "--eval-every", "100"}).status ==
            0);
    CHECK_EQ(refused(2, {"--resume", tmp / "branch/step-20", "--steps", "30"}, {"step-21", "--out"}), "");
}

TEST_CASE("train: kill -9 at any instant leaves a checkpoint that loads and goes on exactly") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const std::string run = tmp / "run";
    const Args args = small_model + Args{"--data",       tmp / "text", "--steps",        "100000",
                                         "--eval-every", "3",          "--sample-every", "100000"};
    REQUIRE(train(args + Args{"--save-every", "1", "--stop-after", "1", "--out", run}).status == 0);
    const auto start = std::chrono::steady_clock::now();
    REQUIRE(train({"--resume", run, "--stop-after", "5"}).status == 0);
    const std::chrono::duration<double, std::milli> four_saves = std::chrono::steady_clock::now() - start;
    const Philox random(20240607, "kill");
    int64 step = 5, torn = 0;
    for (uint64_t i = 0; i < 30; ++i) {
        Process p("train", {"--resume", run}, one_thread());
        REQUIRE(wait_for(p, "\nout "));  // it is about to train
        sleep_ms(std::min(250.0, four_saves.count()) * random.uniform_at(i));
        p.send(SIGKILL);
        REQUIRE(p.wait().status == 128 + SIGKILL);
        const std::string checkpoint = resolve_checkpoint(run);
        CHECK(weights_of(run).size() > 0);
        const int64 now = atoll(checkpoint.c_str() + checkpoint.find_last_of('-') + 1);
        CHECK(now >= step);
        step = now;
        for (const std::string& name : list_directory(run)) torn += contains(name, ".tmp");
    }
    INFO("30 kills left ", torn, " unfinished writes; they came as far as step ", step);
    CHECK(torn > 0);  // some fell into a save
    CHECK(run_program("ref_cpu", {"info", run}, one_thread()).status == 0);
    const std::string last = std::to_string(step + 2);
    REQUIRE(train({"--resume", run, "--stop-after", last}).status == 0);
    REQUIRE(train(args + Args{"--save-every", "0", "--stop-after", last, "--out", tmp / "straight"}).status == 0);
    CHECK_EQ(differing_file(run + "/step-" + last, tmp / "straight" + "/step-" + last), "");
    CHECK_EQ(log_of(run), log_of(tmp / "straight"));
    CHECK_EQ(list_directory(run), list_directory(tmp / "straight"));  // nothing half-written is left
}

TEST_CASE("train: Ctrl-C and SIGTERM end a run after its step, with a checkpoint; a second Ctrl-C ends it at once") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const RunOptions options = one_thread();
    const Args args = small_model + Args{"--data", tmp / "text",   "--steps", "1000000",      "--sample-every",
                                         "0",      "--eval-every", "0",       "--save-every", "0"};
    for (const int signal : {SIGINT, SIGTERM}) {
        const std::string run = tmp / ("run" + std::to_string(signal));
        Process p("train", args + Args{"--out", run}, options);
        REQUIRE(wait_for(p, "\nout "));
        sleep_ms(30);
        if (signal == SIGINT) {  // while it runs, no other may write there
            for (int i = 0; i < 1000 && !file_exists(run + "/log.csv"); ++i) sleep_ms(5);
            CHECK_EQ(refused(1, args + Args{"--out", run}, {"log.csv", "another run"}), "");
        }
        p.send(signal);
        const RunResult r = p.wait();
        CHECK(r.status == 0);
        CHECK(contains(r.err, "stopping"));
        CHECK(contains(r.out, "--resume " + run));
        const std::string step = resolve_checkpoint(run).substr(run.size() + 6);
        CHECK(contains(log_of(run), "\n" + step + ","));
        CHECK(train({"--resume", run, "--stop-after", std::to_string(atoll(step.c_str()) + 1)}).status == 0);
    }
    // A step of seconds, so that both signals fall into it.
    Process p("train", {"--data", tmp / "text", "--batch", "256", "--out", tmp / "slow"}, options);
    REQUIRE(wait_for(p, "\nout "));
    p.send(SIGINT);
    sleep_ms(50);
    p.send(SIGINT);
    CHECK(p.wait().status == 130);
}

TEST_CASE("train: --init-from starts from a model's weights and takes its shape") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const Args data = {"--data", tmp / "text", "--sample-every", "0"};
    REQUIRE(train(small_model + data + Args{"--steps", "30", "--lr", "1e-2", "--out", tmp / "first"}).status == 0);
    const Args from = data + Args{"--init-from", tmp / "first", "--batch", "2", "--eval-tokens", "150"};
    REQUIRE(train(from + Args{"--steps", "1", "--lr", "0", "--out", tmp / "same"}).status == 0);
    CHECK_EQ(compare_bits("weights", weights_of(tmp / "same"), weights_of(tmp / "first")), "");
    CHECK(last_value(tmp / "same", 3) == last_value(tmp / "first", 3));
    CHECK(contains(log_of(tmp / "same"), "\n1,32,"));  // it counts from the beginning, at the model's length
    REQUIRE(train(from +
                  Args{"--steps", "1", "--seq-len", "24", "--dropout", "0.2", "--d-model", "16", "--out", tmp / "long"})
                .status == 0);
    CHECK(load_config(resolve_checkpoint(tmp / "long")).T == 24);
    // The name is the preset that the model was made with; without a trainer.json nobody knows.
    CHECK(contains(train(data + Args{"--init-from", tmp / "first", "--dry-run"}).out, "preset=tiny"));
    REQUIRE(unlink((tmp / "same/step-1/trainer.json").c_str()) == 0);
    CHECK(contains(train(data + Args{"--init-from", tmp / "same", "--dry-run"}).out, "preset=model"));
    CHECK_EQ(refused(2, from + Args{"--d-model", "32"}, {"--d-model", "32", "16", "--init-from"}), "");
    CHECK_EQ(refused(2, from + Args{"--tie", "false"}, {"--tie"}), "");
    CHECK_EQ(refused(2, from + Args{"--preset", "5m"}, {"5m", "layers"}), "");
    CHECK_EQ(refused(1, data + Args{"--init-from", tmp / "none"}, {"none"}), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// What lies in OUT
// ---------------------------------------------------------------------------------------------------------------------

// A pipe in the place of a data file holds a program up after it has looked at OUT and before it takes the lock.
struct SlowData {
    std::string file, text;
    int fd = -1;
    SlowData(const std::string& path, const std::string& contents) : file(path), text(contents) {
        unlink(file.c_str());
        if (mkfifo(file.c_str(), 0600) != 0) fail("mkfifo: %s", strerror(errno));
    }
    bool wait_for_reader() {  // at most 20 seconds; then the name is free for another file, and the reader still waits
        for (int i = 0; i < 4000 && (fd = open(file.c_str(), O_WRONLY | O_NONBLOCK)) < 0; ++i) sleep_ms(5);
        unlink(file.c_str());
        return fd >= 0;
    }
    void release() {
        if (write(fd, text.data(), text.size()) != ssize_t(text.size())) fail("write: %s", strerror(errno));
        close(fd);
    }
};

TEST_CASE("train: a run that has gone on, or begun, since a second program looked at it is left alone") {
    const TempDir tmp;
    const std::string text = make_text(4000), run = tmp / "run", file = tmp / "text";
    write_file(file, text);
    // The best, step-5, stays where it is: only `latest` tells the second program that the first went on.
    const Args args =
        small_model + Args{"--data", file, "--steps", "20", "--eval-every", "5", "--sample-every", "0", "--out", run};
    {
        SlowData slow(file, text);
        Process second("train", args, one_thread());
        REQUIRE(slow.wait_for_reader());
        write_file(file, text);
        REQUIRE(train(args + Args{"--stop-after", "5"}).status == 0);
        slow.release();
        CHECK_EQ(refusal(second.wait(), 2, {"--out", "--resume " + run}), "");
    }
    {
        SlowData slow(file, text);
        Process second("train", {"--resume", run}, one_thread());
        REQUIRE(slow.wait_for_reader());
        write_file(file, text);
        REQUIRE(train({"--resume", run, "--stop-after", "7"}).status == 0);
        slow.release();
        CHECK_EQ(refusal(second.wait(), 1, {run, "another run", "step-5"}), "");
    }
    CHECK_EQ(read_file(run + "/latest"), "step-7\n");
    CHECK(last_value(run, 0) == 7);
    CHECK(train({"--resume", run, "--stop-after", "8"}).status == 0);
}

TEST_CASE("train: a log.csv that is no log, or does not reach the checkpoint, is not overwritten") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    const std::string run = tmp / "run", log = run + "/log.csv";
    const Args args = small_model + Args{"--data", tmp / "text", "--steps", "9", "--sample-every", "0", "--out", run};
    make_directory(run);
    write_file(log, "my notes\n");
    CHECK_EQ(refused(1, args, {log, "not a log", "step,tokens"}), "");
    CHECK_EQ(read_file(log), "my notes\n");
    unlink(log.c_str());
    REQUIRE(mkfifo(log.c_str(), 0600) == 0);
    CHECK_EQ(refused(1, args, {log, "regular file"}), "");
    unlink(log.c_str());
    REQUIRE(train(args + Args{"--stop-after", "5"}).status == 0);

    const std::string whole = read_file(log);
    const auto resume = [&](const std::string& contents, const std::vector<std::string>& parts) {
        write_file(log, contents);
        const std::string problem = refused(1, {"--resume", run, "--stop-after", "6"}, parts);
        return read_file(log) == contents ? problem : "log.csv was changed";
    };
    std::string crlf, bad = whole;
    for (const char c : whole) crlf += c == '\n' ? std::string("\r\n") : std::string(1, c);
    bad[bad.find("\n3,") + 1] = 'x';
    CHECK_EQ(resume(crlf, {log, "not a log"}), "");
    CHECK_EQ(resume(bad, {log, "line 4", "step 5"}), "");
    CHECK_EQ(resume(whole.substr(0, whole.find("\n5,") + 1), {log, "step 4", "step 5"}), "");
    // None at all, or one that a kill left without a row, is begun anew.
    for (const std::string& contents : {std::string("step,tok"), std::string()}) {
        unlink(log.c_str());
        if (!contents.empty()) write_file(log, contents);
        const int64 step = atoll(read_file(run + "/latest").c_str() + 5);
        CHECK(train({"--resume", run, "--stop-after", std::to_string(step + 1)}).status == 0);
        CHECK(last_value(run, 0) == double(step + 1));
    }
    CHECK(train({"--resume", run, "--stop-after", "8"}).status == 0);
    CHECK(contains(log_of(run), "\n7,224,"));
    CHECK(contains(log_of(run), "\n8,256,"));
}

TEST_CASE("train: a checkpoint that `latest` does not name yet can be gone on from, and links are not followed") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    const std::string run = tmp / "run";
    const Args args = small_model + Args{"--data", tmp / "text", "--steps", "9", "--sample-every", "0", "--out", run};
    REQUIRE(train(args + Args{"--stop-after", "5"}).status == 0);
    unlink((run + "/latest").c_str());
    CHECK_EQ(refused(2, args, {"--out", "--resume " + run + "/step-5"}), "");
    CHECK_EQ(refused(1, {"--resume", run}, {run + "/step-5"}), "");
    make_directory(tmp / "elsewhere");
    write_file(tmp / "elsewhere/file", "mine");
    REQUIRE(symlink((tmp / "elsewhere").c_str(), (run + "/step-6.tmp").c_str()) == 0);
    REQUIRE(symlink((tmp / "elsewhere").c_str(), (run + "/step-2").c_str()) == 0);
    CHECK(train({"--resume", run + "/step-5", "--stop-after", "6"}).status == 0);
    CHECK_EQ(list_directory(run), Args{"latest", "log.csv", "loss.svg", "step-6"});
    CHECK_EQ(read_file(tmp / "elsewhere/file"), "mine");
    // A save that fails once the checkpoint is whole: here `latest` cannot be replaced.
    make_directory(run + "/latest.tmp");
    CHECK_EQ(refused(1, {"--resume", run, "--stop-after", "7"},
                     {"latest.tmp", "the last good checkpoint is " + run + "/step-7"}),
             "");
    rmdir((run + "/latest.tmp").c_str());
    CHECK_EQ(read_file(run + "/latest"), "step-6\n");
    CHECK(train({"--resume", run + "/step-7", "--stop-after", "8"}).status == 0);
    CHECK_EQ(read_file(run + "/latest"), "step-8\n");
}

TEST_CASE("train: best is what the checkpoint says, and a branch counts its own") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    write_file(tmp / "other", make_text(400, 2) + std::string(1000, '#'));
    const std::string run = tmp / "run";
    REQUIRE(train(small_model + Args{"--data", tmp / "text", "--val-data", tmp / "other", "--eval-tokens", "0",
                                     "--steps", "60", "--lr", "3e-2", "--eval-every", "5", "--stop-after", "50",
                                     "--sample-every", "0", "--out", run})
                .status == 0);
    const std::string best = read_name(run + "/best");
    REQUIRE(best != "step-50");
    // The branch does not have that checkpoint: it must not claim it.
    const RunResult branch = train({"--resume", run, "--out", tmp / "branch", "--stop-after", "56"});
    CHECK(branch.status == 0);
    const std::string its_best = read_name(tmp / "branch/best");
    CHECK(is_directory(tmp / "branch/" + its_best));
    CHECK(contains(branch.out, "at step " + its_best.substr(5) + "\n"));
    // In place: a name that was lost or is wrong is set right; a checkpoint that was lost is forgotten.
    write_file(run + "/best", "step-50\n");
    REQUIRE(train({"--resume", run, "--stop-after", "51"}).status == 0);
    CHECK_EQ(read_name(run + "/best"), best);
    CHECK(is_directory(run + "/" + best));
    remove_tree(run + "/" + best);
    const RunResult lost = train({"--resume", run, "--stop-after", "52"});
    CHECK(lost.status == 0);
    CHECK(!contains(lost.out, "best validation"));
    CHECK_EQ(list_directory(run), Args{"latest", "log.csv", "loss.svg", "step-52"});
}

TEST_CASE("train: OUT may have any name, and the curve may fail") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    const std::string run = tmp / "\xFF run";
    const Args args = small_model + Args{"--data", tmp / "text", "--steps", "9", "--sample-every", "0"};
    REQUIRE(train(args + Args{"--stop-after", "2", "--out", run}).status == 0);
    make_directory(run + "/loss.svg.tmp");
    const RunResult r = train({"--resume", run, "--stop-after", "4", "--save-every", "1"});
    CHECK_EQ(refusal(r, 0, {"warning", "loss.svg"}), "");
    CHECK(contains(r.out, "step-4 (the latest), log.csv\n"));
    CHECK_EQ(read_name(run + "/latest"), "step-4");
    // Called by its bare name, the program knows where the others are.
    RunOptions options = one_thread();
    options.env.push_back(std::string("PATH=") + PROGRAM_DIR + ":/usr/bin:/bin");
    rmdir((run + "/loss.svg.tmp").c_str());
    const RunResult path = run_program("/bin/sh", {"-c", "train --resume \"$1\" --stop-after 5", "sh", run}, options);
    CHECK(path.status == 0);
    const std::string sampler = have_gpu() ? "/transxssm" : "/ref_cpu";
    CHECK(contains(path.out, sampler));
    CHECK(!contains(path.out, "." + sampler));
}

// ---------------------------------------------------------------------------------------------------------------------
// What can go wrong
// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("train: a loss that is not finite stops the run, names a tensor and leaves the last good checkpoint") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(4000));
    const Args args =
        small_model + Args{"--data", tmp / "text", "--steps", "20", "--sample-every", "0", "--lr", "1e30"};
    CHECK_EQ(
        refused(1, args + Args{"--save-every", "1", "--out", tmp / "run"},
                {"step 2", "NaN", "first bad tensor: ", "layers.", "last good checkpoint is " + tmp / "run/step-1"}),
        "");
    CHECK(weights_of(tmp / "run").size() > 0);
    CHECK_EQ(read_file(tmp / "run/latest"), "step-1\n");
    CHECK_EQ(refused(1, args + Args{"--out", tmp / "none"}, {"no checkpoint"}), "");
    CHECK(!file_exists(tmp / "none/latest"));
}

TEST_CASE("train: every mistake on the command line is one line that names it, exit status 2") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    const auto usage = [&](const Args& args, const std::vector<std::string>& parts) {
        return refused(2, Args{"--data", tmp / "text", "--dry-run"} + args, parts);
    };
    CHECK_EQ(usage({"--layer", "2"}, {"--layer", "--layers"}), "");
    CHECK_EQ(usage({"--laers", "2"}, {"--laers", "--layers"}), "");
    CHECK_EQ(usage({"stray"}, {"stray"}), "");
    CHECK_EQ(usage({"--steps", "1e3"}, {"--steps", "1e3"}), "");
    CHECK_EQ(usage({"--steps", "0"}, {"--steps", "0"}), "");
    CHECK_EQ(usage({"--lr", "fast"}, {"--lr", "fast"}), "");
    CHECK_EQ(usage({"--lr", "nan"}, {"--lr", "nan"}), "");
    CHECK_EQ(usage({"--beta2", "1"}, {"--beta2"}), "");
    CHECK_EQ(usage({"--dropout", "1"}, {"--dropout"}), "");
    CHECK_EQ(usage({"--seed", "-1"}, {"--seed", "-1"}), "");
    CHECK_EQ(usage({"--tie", "--lr"}, {"--lr", "value"}), "");
    CHECK_EQ(usage({"--preset", "tinny"}, {"tinny", "tiny"}), "");
    CHECK_EQ(usage({"--heads", "3"}, {"--d-model 128", "divisible", "--heads 3"}), "");
    CHECK_EQ(usage({"--d-model", "130", "--heads", "26"}, {"5", "even"}), "");
    CHECK_EQ(usage({"--d-state", "7"}, {"--d-state", "7", "even"}), "");
    CHECK_EQ(usage({"--kv-heads", "3"}, {"--heads 4", "--kv-heads 3", "divisible"}), "");
    for (const char* name : {"--data", "--val-data", "--tokenizer", "--resume", "--init-from", "--out"})
        CHECK_EQ(usage({name + std::string("=")}, {name, "empty"}), "");
    CHECK_EQ(usage({"--batch", "16777216", "--grad-accum", "16777216", "--steps", "2147483647"},
                   {"--batch 16777216", "--steps", "2^63"}),
             "");
    CHECK_EQ(usage({"--out", "--preset", "5m"}, {"--out", "value"}), "");
    CHECK_EQ(usage({"--device", "gpu"}, {"--device", "gpu"}), "");
    CHECK_EQ(usage({"--precision", "fp16"}, {"--precision", "fp16"}), "");
    CHECK(train({"--help"}).status == 0);
    CHECK(contains(train({"--preset", "320m", "--help"}).out, "--d-model N            width [768]"));
    CHECK(contains(train({"--help", "--preset=320m"}).out, "--d-model N            width [768]"));
    // A value is not an option.
    CHECK(contains(train({"--data", tmp / "text", "--out", "-h", "--preset", "5m", "--dry-run"}).out, "lr=0.001"));
}

TEST_CASE("train: data, devices and files that cannot be used are one line that names them, exit status 1") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    write_file(tmp / "empty", "");
    write_file(tmp / "short", make_text(16));
    const auto failure = [&](const Args& args, const std::vector<std::string>& parts) {
        return refused(1, small_model + args + Args{"--steps", "1"}, parts);
    };
    CHECK_EQ(failure({"--data", tmp / "none"}, {tmp / "none", "No such file"}), "");
    CHECK_EQ(failure({"--data", tmp.path}, {tmp.path, "directory"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", tmp / "empty"}, {tmp / "empty", "empty"}), "");
    CHECK_EQ(failure({"--data", tmp / "short"}, {tmp / "short", "14 ", "17"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--val-data", tmp / "empty"}, {tmp / "empty", "empty"}), "");
    CHECK_EQ(failure({"--data", tmp / "short", "--seq-len", "4", "--val-data", tmp / "none"}, {tmp / "none"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--tokenizer", tmp / "none"}, {tmp / "none"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--out", tmp / "text"}, {tmp / "text", "directory"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--out", tmp / "text/run"}, {tmp / "text", "directory"}), "");
    if (!have_gpu()) CHECK_EQ(failure({"--data", tmp / "text", "--device", "cuda"}, {"cuda"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--device", "cpu", "--precision", "bf16"}, {"bf16"}), "");
    CHECK_EQ(failure({"--data", tmp / "text", "--device", "cpu", "--recompute"}, {"--recompute"}), "");
    CHECK_EQ(list_directory(tmp.path), Args{"empty", "short", "text"});
}

TEST_CASE("train: a full disk stops the run with one line and leaves the last good checkpoint") {
    const TempDir tmp;
    write_file(tmp / "text", make_text(3000));
    const Args args = small_model + Args{"--data", tmp / "text", "--steps", "20", "--sample-every", "0"};
    REQUIRE(train(args + Args{"--stop-after", "5", "--out", tmp / "run"}).status == 0);
    const Args before = list_directory(tmp / "run");
    // No file may grow beyond 16 blocks (8 or 16 kB): enough for the log, not for the weights.
    const RunResult full = run_program("/bin/sh", {"-c", "ulimit -f 16; exec \"$@\"", "sh", program_path("train"),
                                                   "--resume", tmp / "run", "--stop-after", "7"});
    CHECK_EQ(refusal(full, 1,
                     {"step-7.tmp/", ".safetensors: cannot write", "last good checkpoint is " + tmp / "run/step-5"}),
             "");
    CHECK_EQ(list_directory(tmp / "run"), before);
    CHECK(train({"--resume", tmp / "run", "--stop-after", "7"}).status == 0);  // space has been made
    if (file_exists("/dev/full")) {
        RunOptions options;
        options.stdout_to = "/dev/full";
        const RunResult r = train(args + Args{"--stop-after", "1", "--out", tmp / "quiet"}, options);
        CHECK_EQ(refusal(r, 1, {"standard output"}), "");
    }
}
