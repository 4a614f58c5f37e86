// train.cpp: from text to a trained model. Program `train`; it sees the model only through the Engine of transxssm.h.
//
//   1  settings     the options, and what each preset trains with
//   2  data         text files to tokens, 90% for training and 10% for validation; random windows
//   3  schedule     warm-up, then a cosine
//   4  log          log.csv, and loss.svg drawn from it
//   5  checkpoints  OUT/step-N, `latest` and `best`; exact resume
//   6  progress     the line that moves
//   7  the loop     forward, backward, clip, update; evaluate, sample, save
//   8  the program
//
// A run is a pure function of its settings and its data: every random number is addressed by (seed, name, counter), so
// that there is no generator to save and a run that was stopped and resumed is the run that was not, bit for bit.
#include <dirent.h>
#include <signal.h>

#include "transxssm.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// 1  Settings
// ---------------------------------------------------------------------------------------------------------------------

struct Settings {
    // what is read
    std::vector<std::string> data, val_data;
    std::string tokenizer = "bytes";
    // what computes
    std::string preset_name = "tiny", device = "auto", precision = "auto";
    bool recompute = false;
    // the model; config.T is --seq-len, config.V follows from the tokenizer
    Config config;
    // how it learns
    int64 batch = 0, grad_accum = 0, steps = 0, stop_after = 0;
    double lr = 0, min_lr_frac = 0.1, warmup_frac = 0.1, clip = 1;
    AdamW adamw;
    uint64_t seed = 1;
    // what it leaves behind
    int64 eval_every = 0, eval_tokens = 0, sample_every = 0, save_every = 0;
    std::string out, resume, init_from;
    bool dry_run = false;

    int64 rows_per_step() const { return batch * grad_accum; }
    int64 tokens_per_step() const { return rows_per_step() * config.T; }
};

// What a preset trains with unless told otherwise. `tiny` is sized for a minute on two CPU cores; 320m and 1.3b follow
// the paper (1M and 2M tokens a step, its learning rates), in micro-batches that fit one large GPU.
struct Recipe {
    const char* preset;
    int64 batch, grad_accum, steps;
    double lr;
    int64 eval_every, eval_tokens, sample_every, save_every;
};
const Recipe recipes[] = {
    // preset  batch accum  steps     lr  eval     tokens sample  save
    {"tiny", 4, 1, 1200, 3e-3, 100, 0, 300, 300},
    {"5m", 4, 1, 2000, 1e-3, 200, 0, 500, 500},
    {"10m", 64, 1, 2000, 1e-3, 250, 0, 500, 500},
    {"320m", 16, 16, 10000, 3e-4, 250, 1 << 22, 1000, 1000},
    {"1.3b", 4, 128, 10000, 2e-4, 250, 1 << 22, 1000, 1000},
};

// A model of --init-from that was not made with a preset, or does not say which.
const char* const no_preset = "model";

void apply_preset(Settings* s, const std::string& name) {
    if (name != no_preset) s->config = preset(name);
    s->preset_name = name;
    const Recipe* r = &recipes[0];
    for (const Recipe& candidate : recipes)
        if (name == candidate.preset) r = &candidate;
    s->batch = r->batch;
    s->grad_accum = r->grad_accum;
    s->steps = r->steps;
    s->lr = r->lr;
    s->eval_every = r->eval_every;
    s->eval_tokens = r->eval_tokens;
    s->sample_every = r->sample_every;
    s->save_every = r->save_every;
}

std::string join(const std::vector<std::string>& words, const char* separator) {
    std::string s;
    for (const std::string& w : words) s += (s.empty() ? "" : separator) + w;
    return s;
}

void add_options(Options* o, Settings* s) {
    static const std::string presets = join(preset_names(), ", ") + "; the options below change it";
    const int64 big = int64(1) << 40;
    o->section("Data");
    o->add("data", &s->data, "text files; default: the text of this repository");
    o->add("val-data", &s->val_data, "validation files; default: the last tenth of each data file");
    o->add("tokenizer", &s->tokenizer, "bytes, or a tokenizer.json");
    o->section("Model");
    o->add("preset", &s->preset_name, presets.c_str());
    add_model_options(o, &s->config);
    o->add("dropout", &s->config.dropout, "after the mixer and the feed-forward", 0, 0.999);
    o->section("Training");
    o->add("seq-len", &s->config.T, "tokens of a window", 1, big);
    o->add("batch", &s->batch, "windows of a micro-batch", 1, 1 << 24);
    o->add("grad-accum", &s->grad_accum, "micro-batches of a step", 1, 1 << 24);
    o->add("steps", &s->steps, "length of the schedule", 1, INT32_MAX);
    o->add("stop-after", &s->stop_after, "stop once so many steps are done; 0: at the end", 0, INT32_MAX);
    o->add("lr", &s->lr, "peak learning rate", 0);
    o->add("min-lr-frac", &s->min_lr_frac, "the last step's share of it", 0, 1);
    o->add("warmup-frac", &s->warmup_frac, "share of the steps that warm up", 0, 1);
    o->add("beta1", &s->adamw.beta1, "AdamW: decay of the mean", 0, 0.999999);
    o->add("beta2", &s->adamw.beta2, "AdamW: decay of the mean square", 0, 0.99999999);
    o->add("weight-decay", &s->adamw.weight_decay, "AdamW: of the matrices, times the learning rate", 0);
    o->add("clip", &s->clip, "largest gradient norm; 0: any", 0);
    o->add("seed", &s->seed, "of weights, windows, dropout and samples");
    o->section("Output");
    o->add("eval-every", &s->eval_every, "validate every N steps; 0: only at the end", 0, INT32_MAX);
    o->add("eval-tokens", &s->eval_tokens, "on the first N validation tokens; 0: all", 0, big);
    o->add("sample-every", &s->sample_every, "print a sample every N steps; 0: only at the end", 0, INT32_MAX);
    o->add("save-every", &s->save_every, "write a checkpoint every N steps; 0: when validation improves", 0, INT32_MAX);
    o->add("out", &s->out, "directory of the run; default: out/PRESET-1, or -2, ...");
    o->section("Start");
    o->add("resume", &s->resume, "DIR: go on with the run that was saved there, with its settings");
    o->add("init-from", &s->init_from, "DIR: a new run from the weights saved there");
    o->add("dry-run", &s->dry_run, "print the plan; train nothing, write nothing");
    o->section("Machine");
    o->add("device", &s->device, "auto, cpu or cuda");
    o->add("precision", &s->precision, "auto, fp32 or bf16 (on cuda)");
    o->add("recompute", &s->recompute, "less memory for more work (on cuda)");
}

// A setting is remembered as JSON, which is UTF-8.
void check_text(const char* option, const std::string& text, bool may_be_empty = false) {
    if (text.empty() && !may_be_empty) usage_error("--%s: an empty value", option);
    for (size_t i = 0; i < text.size();) {
        const int n = utf8_sequence(text.data() + i, text.size() - i);
        if (n <= 0) usage_error("--%s: '%s' is not UTF-8", option, text.c_str());
        i += size_t(n);
    }
}

// What the range of each option leaves open. Checked before any work is done, and where a checkpoint is read.
void check_settings(const Settings& s) {
    for (const std::string& f : s.data) check_text("data", f);
    for (const std::string& f : s.val_data) check_text("val-data", f);
    check_text("tokenizer", s.tokenizer);
    check_text("init-from", s.init_from, true);
    if (!s.val_data.empty() && s.data.empty()) usage_error("--val-data needs --data");
    const std::vector<std::string> presets = preset_names();
    if (s.preset_name != no_preset && std::find(presets.begin(), presets.end(), s.preset_name) == presets.end())
        usage_error("--preset: '%s' is not one of %s", s.preset_name.c_str(), join(presets, ", ").c_str());
    if (s.device != "auto" && s.device != "cpu" && s.device != "cuda")
        usage_error("--device: '%s' is not auto, cpu or cuda", s.device.c_str());
    if (s.precision != "auto" && s.precision != "fp32" && s.precision != "bf16")
        usage_error("--precision: '%s' is not auto, fp32 or bf16", s.precision.c_str());
    int64 n = 0;
    if (__builtin_mul_overflow(s.batch, s.grad_accum, &n) || __builtin_mul_overflow(n, s.config.T, &n) ||
        __builtin_mul_overflow(n, s.steps, &n))
        usage_error("--batch %lld, --grad-accum %lld, --seq-len %lld and --steps %lld make more tokens than 2^63",
                    (long long)s.batch, (long long)s.grad_accum, (long long)s.config.T, (long long)s.steps);
}

// The engine that --device and --precision ask for; `note` says why it is not the GPU, if auto chose.
std::unique_ptr<Engine> make_engine(const Settings& s, std::string* note) {
#ifdef WITH_CUDA
    const std::string problem = s.device == "cpu" ? "" : cuda::problem();
    if (s.device == "cuda" || (s.device == "auto" && problem.empty()))
        return make_cuda_engine(s.config, s.precision == "fp32" ? Precision::fp32 : Precision::bf16, s.recompute);
#else
    const std::string problem = "no CUDA engine in this build";
#endif
    if (s.device == "auto") *note = " (" + problem + ")";
    return make_cpu_engine(s.config);
}

// Refuses what this build or machine cannot do, before anything is read or written.
void check_device(const Settings& s) {
#ifdef WITH_CUDA
    const std::string problem = s.device == "cpu" ? "" : cuda::problem();
    if (s.device == "cuda" && !problem.empty()) fail("--device cuda: %s; --device cpu or auto works", problem.c_str());
    if (s.device == "cuda" || (s.device == "auto" && problem.empty())) return;
#else
    if (s.device == "cuda") fail("--device cuda: this build has no CUDA engine; --device cpu or auto works");
#endif
    if (s.precision == "bf16") fail("--precision bf16: the CPU engine computes in fp32 only");
    if (s.recompute) fail("--recompute: the CPU engine keeps all activations; only the CUDA engine can recompute them");
}

// ---------------------------------------------------------------------------------------------------------------------
// 2  Data
// ---------------------------------------------------------------------------------------------------------------------

struct Tokens {
    std::vector<int32_t> ids;
    int64 bytes = 0;
    std::string sha256;  // of every part: its length in 8 bytes, then its text
};

struct Data {
    Tokens train, val;
    std::string source;  // for a person
};

bool ends_with(const std::string& s, const char* end) {
    const size_t n = strlen(end);
    return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

std::vector<std::string> entries_of(const std::string& directory) {
    std::vector<std::string> names;
    if (DIR* d = opendir(directory.c_str())) {
        while (const dirent* e = readdir(d)) {
            const std::string name = e->d_name;
            if (name != "." && name != "..") names.push_back(name);
        }
        closedir(d);
    }
    std::sort(names.begin(), names.end());  // readdir has no order of its own
    return names;
}

std::string absolute_path(const std::string& path) {
    char* p = realpath(path.c_str(), nullptr);
    if (!p) return path;
    const std::string s = p;
    free(p);
    return s;
}

// The directory that the program was started from, wherever it was called from.
std::string program_directory(const char* argv0) {
    char buffer[4096];
    const ssize_t n = readlink("/proc/self/exe", buffer, sizeof buffer);
    if (n > 0 && size_t(n) < sizeof buffer) return parent_directory(std::string(buffer, size_t(n)));
    return parent_directory(absolute_path(argv0));
}

// The repository's own text: what was written by hand and nothing that was built, downloaded or trained. The program
// lies in the root of the repository, or in a build directory below it.
std::vector<std::string> repository_files(const char* argv0) {
    const std::string start = program_directory(argv0);
    std::string root = start;
    for (int up = 0; up < 4 && !file_exists(root + "/transxssm.h"); ++up) root = parent_directory(root);
    if (!file_exists(root + "/transxssm.h"))
        fail("the repository's text is not at %s; name text files with --data", start.c_str());
    std::vector<std::string> files;
    const auto take = [&](const std::string& directory, const std::vector<const char*>& endings) {
        for (const std::string& name : entries_of(root + directory))
            for (const char* ending : endings)
                if (name[0] != '.' && ends_with(name, ending)) {
                    const std::string path = root + directory + "/" + name;
                    struct stat st;
                    if (stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) files.push_back(path);
                    break;
                }
    };
    take("", {".md", ".h", ".cpp", ".cu", "Makefile", "LICENSE"});
    take("/docs", {".md"});
    take("/test", {".h", ".cpp", ".cu", ".sh"});
    std::sort(files.begin(), files.end());
    return files;
}

std::string read_text(const std::string& file) {
    std::string text = read_file(file);
    if (text.empty()) fail("%s: the file is empty", file.c_str());
    return text;
}

// Where the training part ends: 90% of the bytes, moved back to the start of a UTF-8 character.
size_t split_point(const std::string& text) {
    size_t cut = text.size() / 10 * 9 + text.size() % 10 * 9 / 10;
    for (int i = 0; i < 3 && cut > 0 && (uint8_t(text[cut]) & 0xC0) == 0x80; ++i) --cut;
    return cut;
}

class TokenWriter {
  public:
    TokenWriter(Tokens* tokens, const Tokenizer& t) : to(tokens), tokenizer(t) {}
    void add(const std::string& text) {
        const uint64_t length = text.size();
        sha.add(&length, sizeof length);
        sha.add(text.data(), text.size());
        if (text.empty()) return;
        if (!to->ids.empty() && tokenizer.end_of_text() >= 0) to->ids.push_back(tokenizer.end_of_text());
        const std::vector<int32_t> ids = tokenizer.encode(text);
        to->ids.insert(to->ids.end(), ids.begin(), ids.end());
        to->bytes += int64(text.size());
    }
    void finish() { to->sha256 = sha.hex(); }

  private:
    Tokens* to;
    const Tokenizer& tokenizer;
    Sha256 sha;
};

Data load_data(const Settings& s, const Tokenizer& tokenizer, const char* argv0) {
    Data d;
    const std::vector<std::string> files = s.data.empty() ? repository_files(argv0) : s.data;
    TokenWriter train(&d.train, tokenizer), val(&d.val, tokenizer);
    for (const std::string& file : files) {
        const std::string text = read_text(file);
        const size_t cut = s.val_data.empty() ? split_point(text) : text.size();
        train.add(text.substr(0, cut));
        if (s.val_data.empty()) val.add(text.substr(cut));
    }
    for (const std::string& file : s.val_data) val.add(read_text(file));
    train.finish();
    val.finish();

    d.source = s.data.empty()      ? format("this repository, %zu files", files.size())
               : files.size() == 1 ? files[0]
                                   : format("%zu files, %s ...", files.size(), files[0].c_str());
    const int64 n = int64(d.train.ids.size()), need = s.config.T + 1;
    if (n < need)
        fail("%s: %lld training tokens%s, but one window of --seq-len %lld needs %lld", d.source.c_str(), (long long)n,
             s.val_data.empty() ? " (the first 90%)" : "", (long long)s.config.T, (long long)need);
    const size_t n_val = d.val.ids.size();
    if (n_val < 2)
        fail("%s: %zu validation tokens%s, but at least 2 are needed",
             s.val_data.empty() ? d.source.c_str() : s.val_data[0].c_str(), n_val,
             s.val_data.empty() ? " (the last 10%)" : "");
    return d;
}

}  // namespace

// Where the window of one row begins, 0 .. tokens - T - 1, drawn with replacement. A row is a place in the whole step,
// all of its micro-batches counted, so that the same windows are drawn however a step is cut into micro-batches.
int64 window_start(uint64_t seed, int64 step, int64 row, int64 tokens, int64 T) {
    const Philox::Block r =
        Philox(seed, "window")(uint32_t(step), uint32_t(step >> 32), uint32_t(row), uint32_t(row >> 32));
    const int64 choices = tokens - T;
    return std::min(choices - 1, int64(Philox::uniform(r.word[0], r.word[1]) * double(choices)));
}

// ---------------------------------------------------------------------------------------------------------------------
// 3  Schedule
// ---------------------------------------------------------------------------------------------------------------------

// Step s = 0, 1, ...: peak (s+1)/W for s < W, the warm-up; then half a cosine from the peak down to min_frac of it at
// the last step.
double learning_rate(int64 step, int64 steps, double peak, double warmup_frac, double min_frac) {
    const int64 W = llround(warmup_frac * double(steps));
    if (step < W) return peak * double(step + 1) / double(W);
    const int64 span = steps - 1 - W;
    const double progress = span > 0 ? std::min(1.0, double(step - W) / double(span)) : 1.0;
    return peak * (min_frac + (1 - min_frac) * 0.5 * (1 + std::cos(3.14159265358979323846 * progress)));
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  Log
// ---------------------------------------------------------------------------------------------------------------------

namespace {

const char* const log_header = "step,tokens,train_loss,val_loss,lr,grad_norm,tokens_per_s";

std::string csv_line(const LogRow& r) {
    return format("%lld,%lld,%.9g,%s,%.9g,%.9g,%.0f\n", (long long)r.step, (long long)r.tokens, r.train_loss,
                  std::isfinite(r.val_loss) ? format("%.9g", r.val_loss).c_str() : "", r.lr, r.grad_norm,
                  r.tokens_per_s);
}

bool parse_csv_line(const std::string& line, LogRow* r) {
    std::vector<std::string> field(1);
    for (const char c : line) {
        if (c == ',') field.emplace_back();
        else field.back() += c;
    }
    if (field.size() != 7) return false;
    r->val_loss = NAN;
    return parse_int(field[0], &r->step) && parse_int(field[1], &r->tokens) && parse_double(field[2], &r->train_loss) &&
           (field[3].empty() || parse_double(field[3], &r->val_loss)) && parse_double(field[4], &r->lr) &&
           parse_double(field[5], &r->grad_norm) && parse_double(field[6], &r->tokens_per_s);
}

// Opening a pipe would wait for its other end.
void check_regular(const std::string& file) {
    struct stat st;
    if (lstat(file.c_str(), &st) == 0 && !S_ISREG(st.st_mode)) fail("%s: expected a regular file", file.c_str());
}

const std::string log_start = std::string(log_header) + "\n";

// False if the log holds nothing yet: no text, or a header cut short by a kill. Anything else than a log is refused,
// because it is about to be overwritten and may be someone's.
bool is_log(const std::string& file, const std::string& text) {
    if (text.size() < log_start.size() && log_start.compare(0, text.size(), text) == 0) return false;
    if (text.compare(0, log_start.size(), log_start) != 0)
        fail("%s: not a log: its first line is not '%s'; move it away", file.c_str(), log_header);
    return true;
}

// The rows of a log up to `step`, in order, and how many bytes they take with the header. What follows them (later
// steps, or a line cut short by a kill) does not count. A log is on the disk before its checkpoint is, so that it must
// reach `step`, unless it was begun anew after that.
size_t parse_log(const std::string& file, const std::string& text, int64 step, std::vector<LogRow>* rows) {
    if (!is_log(file, text)) return 0;
    size_t at = log_start.size(), line = 2;
    bool readable = true;
    for (size_t end; (end = text.find('\n', at)) != std::string::npos; at = end + 1, ++line) {
        LogRow r;
        readable = parse_csv_line(text.substr(at, end - at), &r) && (rows->empty() || r.step > rows->back().step);
        if (!readable || r.step > step) break;
        rows->push_back(r);
    }
    if (rows->empty() ? !readable : rows->back().step != step)
        fail("%s: line %zu: %s, but the checkpoint is at step %lld; repair the file, or move it away", file.c_str(),
             line,
             readable ? format("step %lld is the last before it", (long long)rows->back().step).c_str()
                      : "not a row that follows the line before",
             (long long)step);
    return at;
}

// log.csv, open for the whole run and locked, so that two runs cannot write into one directory.
class Log {
  public:
    std::vector<LogRow> rows;

    // Takes the lock. Nothing is changed yet; a file that was not there is empty.
    explicit Log(const std::string& file) : path(file), f(nullptr, fclose) {
        check_regular(path);
        const int fd = ::open(path.c_str(), O_RDWR | O_CREAT, 0666);
        if (fd < 0) bad();
        f.reset(fdopen(fd, "r+b"));
        if (!f) bad();
        struct flock lock {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        if (fcntl(fd, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN))
            fail("%s: another run is writing into this directory", path.c_str());
    }
    // Goes on after the row of `step`; what follows it is cut off.
    void go_on(int64 step) {
        const size_t keep = parse_log(path, text(), step, &rows);
        cut(keep);
        if (keep == 0) write(log_start);
    }
    // Begins anew, with the rows of another log up to `step` if `other` names one.
    void begin(const std::string& other, int64 step) {
        is_log(path, text());
        std::string start;
        if (!other.empty()) {
            check_regular(other);
            start = read_file(other);
            start.resize(parse_log(other, start, step, &rows));
        }
        cut(0);
        write(start.empty() ? log_start : start);
    }

    void add(const LogRow& r) {
        rows.push_back(r);
        write(csv_line(r));
    }
    void sync() { fsync(fileno(f.get())); }

  private:
    std::string path;
    std::unique_ptr<FILE, int (*)(FILE*)> f;

    // Read through `f`: the lock is lost as soon as any other descriptor of the file is closed.
    std::string text() const { return read_stream(f.get(), path); }
    void cut(size_t size) {
        if (ftruncate(fileno(f.get()), off_t(size)) != 0 || fseeko(f.get(), 0, SEEK_END) != 0) bad();
    }
    void write(const std::string& data) {
        if (fwrite(data.data(), 1, data.size(), f.get()) != data.size() || fflush(f.get()) != 0) bad();
    }
    [[noreturn]] void bad() { fail("%s: cannot write: %s", path.c_str(), strerror(errno)); }
};

}  // namespace

// The loss curve: the training loss of every step (pale), its running mean, and the validation loss (dots).
std::string loss_svg(const std::vector<LogRow>& rows, int64 steps, const std::string& title) {
    // The mean over 1% of the schedule to either side, less near the ends, so that it neither lags nor leads.
    std::vector<double> smooth(rows.size()), total(rows.size() + 1, 0.0);
    for (size_t i = 0; i < rows.size(); ++i) total[i + 1] = total[i] + rows[i].train_loss;
    for (size_t i = 0; i < rows.size(); ++i) {
        const size_t half = std::min(i, size_t(std::max<int64>(1, steps / 100)));
        const size_t from = i - half, to = std::min(rows.size(), i + half + 1);
        smooth[i] = (total[to] - total[from]) / double(to - from);
    }

    Plot plot(title, "step", "loss, nats per token");
    plot.x_low = 0;
    plot.x_high = double(std::max<int64>(1, std::max(steps, rows.empty() ? 0 : rows.back().step)));
    // The vertical axis holds every value, but for a run that blew up: it ends at 1.5 times the first loss.
    if (!rows.empty() && rows[0].train_loss > 0)
        for (const LogRow& r : rows)
            if (std::max(r.train_loss, r.val_loss) > 1.5 * rows[0].train_loss) plot.y_high = 1.5 * rows[0].train_loss;

    // Curves of at most 1000 points: the mean of each run of neighbours.
    Plot::Curve each{"training, each step", {}, "#9ecae9", 1, false}, mean{"running mean", {}, "#1f6fb4", 2, false},
        validation{"validation", {}, "#d1495b", 1.5, true};
    const size_t stride = (rows.size() + 999) / 1000;
    for (size_t i = 0; i < rows.size(); i += stride) {
        const size_t end = std::min(rows.size(), i + stride);
        double x = 0, loss = 0, smoothed = 0;
        for (size_t j = i; j < end; ++j) {
            x += double(rows[j].step) / double(end - i);
            loss += rows[j].train_loss / double(end - i);
            smoothed += smooth[j] / double(end - i);
        }
        each.points.emplace_back(x, loss);
        mean.points.emplace_back(x, smoothed);
    }
    for (const LogRow& r : rows)
        if (std::isfinite(r.val_loss)) {
            validation.points.emplace_back(double(r.step), r.val_loss);
            validation.label = format("validation: %.4f", r.val_loss);
        }
    if (!rows.empty()) mean.label = format("running mean: %.4f", smooth.back());
    plot.curves = {each, mean, validation};
    return plots_svg({plot});
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// 5  Checkpoints
// ---------------------------------------------------------------------------------------------------------------------

const char* const trainer_schema = "transxssm.trainer.1";

// What trainer.json holds besides the settings.
struct Trainer {
    int64 step = 0, tokens = 0;
    double best_loss = HUGE_VAL;  // of the validation data so far
    int64 best_step = -1;
    std::string train_sha256, val_sha256;

    void forget_best() {
        best_loss = HUGE_VAL;
        best_step = -1;
    }
};

Json trainer_json(const Trainer& t, const Options& options, const Engine& engine) {
    Json j = Json::object();
    j.set("schema", trainer_schema);
    j.set("step", t.step);
    j.set("tokens", t.tokens);
    j.set("best_loss", t.best_step < 0 ? Json() : Json(t.best_loss));
    j.set("best_step", t.best_step < 0 ? Json() : Json(t.best_step));
    // Windows and dropout masks are Philox4x32-10 at (seed, name, step, ...): the step is the position in the data and
    // the state of every generator.
    j.set("random", "philox4x32-10");
    j.set("device", engine.device());  // and what else the bits depend on, for a person who compares two runs
    Json products = Json::array();
    for (const std::string& line : engine.gemm_choices()) products.items.emplace_back(line);
    if (!products.items.empty()) j.set("matrix_products", products);
    j.set("train_sha256", t.train_sha256);
    j.set("val_sha256", t.val_sha256);
    Json settings = options.to_json();
    settings.set("stop-after", "0");  // these four concern one start of the program, not the run
    settings.set("resume", "");
    settings.set("out", "");
    settings.set("dry-run", "false");
    j.set("settings", settings);
    return j;
}

Trainer read_trainer(const std::string& file, Json* settings) {
    const Json j = Json::parse(read_file(file), file);
    const auto get = [&](const char* key, Json::Type type) {
        const Json* v = j.type == Json::Object ? j.find(key) : nullptr;
        if (!v || v->type != type) fail("%s: '%s' is missing or has the wrong type", file.c_str(), key);
        return *v;
    };
    const auto count = [&](const char* key) {
        int64 n = 0;
        const Json v = get(key, Json::Number);
        if (!v.integer(&n) || n < 0) fail("%s: '%s' is %s, expected a count", file.c_str(), key, v.text.c_str());
        return n;
    };
    const std::string schema = get("schema", Json::String).text;
    if (schema != trainer_schema) fail("%s: schema '%s', expected '%s'", file.c_str(), schema.c_str(), trainer_schema);
    Trainer t;
    t.step = count("step");
    t.tokens = count("tokens");
    const Json* best = j.find("best_step");
    if (best && best->type != Json::Null) {
        t.best_step = count("best_step");
        t.best_loss = get("best_loss", Json::Number).number;
    }
    t.train_sha256 = get("train_sha256", Json::String).text;
    t.val_sha256 = get("val_sha256", Json::String).text;
    *settings = get("settings", Json::Object);
    return t;
}

const char* const moment_names[] = {"exp_avg.", "exp_avg_sq."};
const Buffer moment_buffers[] = {Buffer::exp_avg, Buffer::exp_avg_sq};

// One buffer of the engine on the host. A checkpoint must not hold what a reader would refuse.
std::vector<float> read_buffer(const Engine& engine, Buffer which, const char* prefix) {
    std::vector<float> v(size_t(engine.table.count));
    engine.read(which, v.data());
    for (size_t i = 0; i < v.size(); ++i)
        if (!std::isfinite(v[i])) {
            const ParamSpec& p = engine.table.at(int64(i));
            fail("tensor '%s%s': element %lld is %g", prefix, p.name.c_str(), (long long)(int64(i) - p.offset),
                 double(v[i]));
        }
    return v;
}

void write_optimizer(const std::string& file, const Engine& engine) {
    std::vector<float> moments[2];
    std::vector<TensorView> tensors;
    for (int m = 0; m < 2; ++m) {
        moments[m] = read_buffer(engine, moment_buffers[m], moment_names[m]);
        for (const ParamSpec& p : engine.table.specs)
            tensors.push_back({moment_names[m] + p.name, DType::F32, p.shape, moments[m].data() + p.offset});
    }
    write_safetensors(file, tensors, {{"format", "pt"}});
}

void read_optimizer(const std::string& file, Engine* engine) {
    const SafeTensors in(file);
    const size_t expected = 2 * engine->table.specs.size();
    std::vector<float> v(size_t(engine->table.count));
    for (int m = 0; m < 2; ++m) {
        for (const ParamSpec& p : engine->table.specs) {
            const std::string name = moment_names[m] + p.name;
            const SafeTensors::Entry* e = in.find(name);
            if (!e) fail("%s: tensor '%s' is missing", file.c_str(), name.c_str());
            if (e->shape != p.shape || e->dtype != DType::F32)
                fail("%s: tensor '%s' is %s %s, expected F32 %s", file.c_str(), name.c_str(), dtype_name(e->dtype),
                     to_text(e->shape).c_str(), to_text(p.shape).c_str());
            float* at = v.data() + p.offset;
            in.read(*e, at);
            for (int64 i = 0; m == 1 && i < p.count; ++i)
                if (at[i] < 0)
                    fail("%s: tensor '%s': element %lld is %g, a mean square cannot be negative", file.c_str(),
                         name.c_str(), (long long)i, double(at[i]));
        }
        engine->write(moment_buffers[m], v.data());
    }
    if (in.entries.size() != expected) fail("%s: %zu tensors, expected %zu", file.c_str(), in.entries.size(), expected);
}

std::string step_name(int64 step) { return "step-" + std::to_string(step); }

// The step of "step-N" or "step-N.tmp"; -1 for any other name.
int64 step_of(std::string name, bool* temporary) {
    *temporary = ends_with(name, ".tmp");
    if (*temporary) name.resize(name.size() - 4);
    uint64_t n = 0;
    if (name.compare(0, 5, "step-") != 0 || !parse_uint(name.substr(5), &n) || n > INT64_MAX) return -1;
    return step_name(int64(n)) == name ? int64(n) : -1;
}

// A checkpoint has no subdirectories. What cannot be removed stays: it does no harm. A link is not followed.
void remove_directory(const std::string& path) {
    struct stat st;
    if (lstat(path.c_str(), &st) != 0) return;
    if (!S_ISDIR(st.st_mode)) {
        unlink(path.c_str());
        return;
    }
    for (const std::string& name : entries_of(path)) unlink((path + "/" + name).c_str());
    rmdir(path.c_str());
}

// A word of a command that a person can paste into a shell.
std::string shell_word(const std::string& s) {
    if (!s.empty() && s.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+=:,@%") ==
                          std::string::npos)
        return s;
    std::string out = "'";
    for (const char c : s) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return out + "'";
}

// The directory OUT of a run.
class RunDirectory {
  public:
    std::string path;
    int64 saved = -1;  // step of the newest whole checkpoint

    std::string of(const std::string& name) const { return path + "/" + name; }
    int64 newest_step() const {  // -1: there is no checkpoint
        int64 newest = -1;
        bool temporary;
        for (const std::string& name : entries_of(path)) {
            const int64 step = step_of(name, &temporary);
            if (!temporary) newest = std::max(newest, step);
        }
        return newest;
    }
    // A run that is there must not be overwritten.
    void refuse_run() const {
        const bool named = file_exists(of("latest"));
        const int64 step = newest_step();
        if (named || step >= 0)
            usage_error("--out %s: holds a run already; choose another directory, or go on with it by --resume %s",
                        path.c_str(), shell_word(named ? path : of(step_name(step))).c_str());
    }

    // Everything is written beside its place and moved there by a rename, and `latest` moves last: whenever the program
    // is killed, `latest` names a whole checkpoint.
    void save(const Trainer& t, const Options& options, const Config& config, const Tokenizer& tokenizer,
              const Engine& engine) {
        const std::string name = step_name(t.step), final_path = of(name), tmp = final_path + ".tmp";
        remove_directory(tmp);
        make_directory(tmp);
        try {
            save_model(tmp, config, read_buffer(engine, Buffer::weights, "").data(), tokenizer);
            write_optimizer(tmp + "/optimizer.safetensors", engine);
            write_file(tmp + "/trainer.json", trainer_json(t, options, engine).dump() + "\n");
            sync_directory(tmp);
        } catch (...) {
            remove_directory(tmp);
            throw;
        }
        if (rename(tmp.c_str(), final_path.c_str()) != 0) {
            const int e = errno;
            remove_directory(tmp);
            fail("%s: cannot rename from %s.tmp: %s", final_path.c_str(), name.c_str(), strerror(e));
        }
        saved = t.step;  // whole, even if naming it should fail
        sync_directory(path);
        if (t.best_step == t.step) replace_file(of("best"), name + "\n");
        replace_file(of("latest"), name + "\n");
        prune();
    }

    // Before a run goes on here: forgets what was written after its checkpoint and was never named by `latest`. What
    // is the best is told by the checkpoint; if that one is gone, the best is counted anew.
    void rewind(Trainer* t) {
        const std::string name = step_name(t->step), best = step_name(t->best_step);
        if (read_name(of("latest")) != name) replace_file(of("latest"), name + "\n");
        if (t->best_step < 0 || !is_directory(of(best))) {
            t->forget_best();
            unlink(of("best").c_str());
        } else if (read_name(of("best")) != best) {
            replace_file(of("best"), best + "\n");
        }
        saved = t->step;
        prune();
    }

  private:
    // Removes all checkpoints but the latest and the best. Each first loses its name, so that no kill leaves half of
    // one under a name that looks whole.
    void prune() const {
        const std::string latest = read_name(of("latest")), best = read_name(of("best"));
        for (const std::string& name : entries_of(path)) {
            bool temporary;
            if (step_of(name, &temporary) < 0 || name == latest || name == best) continue;
            const std::string tmp = of(temporary ? name : name + ".tmp");
            if (!temporary) {
                remove_directory(tmp);
                if (rename(of(name).c_str(), tmp.c_str()) != 0) continue;
            }
            remove_directory(tmp);
        }
    }
};

// Makes OUT and its parents. Without --out: the first of out/PRESET-1, -2, ... that is not there yet.
std::string make_out(const std::string& out, const std::string& preset_name) {
    if (out.empty()) {
        make_directory("out");
        for (int64 i = 1;; ++i) {
            const std::string path = "out/" + preset_name + "-" + std::to_string(i);
            if (mkdir(path.c_str(), 0777) == 0) return path;
            if (errno != EEXIST) fail("%s: cannot create directory: %s", path.c_str(), strerror(errno));
        }
    }
    for (size_t slash = out.find('/', 1); slash != std::string::npos; slash = out.find('/', slash + 1))
        if (!is_directory(out.substr(0, slash))) make_directory(out.substr(0, slash));
    make_directory(out);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6  Progress
// ---------------------------------------------------------------------------------------------------------------------

std::string duration_text(double seconds) {
    const int64 s = llround(std::max(0.0, std::min(seconds, 1e9)));
    if (s >= 86400) return format("%lldd %02lldh", (long long)(s / 86400), (long long)(s / 3600 % 24));
    if (s >= 3600) return format("%lldh %02lldm", (long long)(s / 3600), (long long)(s / 60 % 60));
    return format("%lld:%02lld", (long long)(s / 60), (long long)(s % 60));
}

// On a terminal one line that is rewritten; elsewhere some twenty lines for the whole run, or one every ten seconds.
class Progress {
  public:
    // From step `from` to `to` of a schedule of `total` steps. A token takes `share` of what the device can do in a second
    // (0: not known).
    Progress(int64 from, int64 to, int64 total, double share)
        : first(from), last(to), steps(total), peak_share(share), terminal(isatty(1)), shown_at(wall_seconds()) {}

    void step(const std::vector<LogRow>& rows, double busy_seconds) {
        const LogRow& r = rows.back();
        const double t = wall_seconds();
        const bool due = terminal ? t - shown_at >= 0.1 || r.step == last
                                  : r.step % std::max<int64>(1, steps / 20) == 0 || t - shown_at >= 10;
        if (!due) return;
        shown_at = t;
        const double per_step = busy_seconds / double(r.step - first);
        const size_t n = std::min<size_t>(rows.size(), 20);
        double loss = 0, rate = 0;
        for (size_t i = rows.size() - n; i < rows.size(); ++i) {
            loss += rows[i].train_loss / double(n);
            rate += 1 / std::max(1.0, rows[i].tokens_per_s) / double(n);
        }
        const std::string mfu = peak_share > 0 ? format("  MFU %.1f%%", 100 * peak_share / rate) : "";
        const std::string line =
            format("%s  loss %.4f  lr %.2e  |grad| %.3f  %s tokens/s%s  ETA %s", label(r.step).c_str(), loss, r.lr,
                   r.grad_norm, with_commas(llround(1 / rate)).c_str(), mfu.c_str(),
                   duration_text(per_step * double(last - r.step)).c_str());
        printf(terminal ? "\r\033[K%s" : "%s\n", line.c_str());
        fflush(stdout);
        moving = terminal;
    }
    // A line that stays.
    void say(const std::string& line) {
        printf("%s%s\n", moving ? "\r\033[K" : "", line.c_str());
        fflush(stdout);
        moving = false;
    }
    // Leaves the moving line as it is and goes to a fresh one.
    void end() {
        if (moving) printf("\n");
        fflush(stdout);
        moving = false;
    }
    std::string label(int64 at) const {
        const std::string total = std::to_string(steps);
        return format("step %*lld/%s", int(total.size()), (long long)at, total.c_str());
    }

  private:
    int64 first, last, steps;
    double peak_share;
    bool terminal, moving = false;
    double shown_at;
};

// The first Ctrl-C asks the loop to stop after the step that it is at; the second one ends the program at once.
volatile sig_atomic_t stop_requested = 0;
void on_signal(int) {
    if (stop_requested) _exit(130);
    stop_requested = 1;
    const char message[] = "\nstopping after this step; again to quit at once\n";
    if (write(2, message, sizeof message - 1) < 0) return;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7  The loop
// ---------------------------------------------------------------------------------------------------------------------

std::string not_finite(double v) { return std::isnan(v) ? "NaN" : v < 0 ? "-infinity" : "infinity"; }

// Everything that the loop works on.
struct Run {
    const Settings& s;
    const Options& options;
    const Data& data;
    const Tokenizer& tokenizer;
    Engine& engine;
    RunDirectory dir;
    Trainer at;
    std::string program;  // as it was called

    Evaluation last_eval;
    int64 last_eval_step = -1;
    bool drawn = false, warned = false;  // loss.svg

    bool due(int64 every) const { return at.step == s.steps || (every > 0 && at.step % every == 0); }

    std::string last_good() const {
        return dir.saved >= 0 ? "the last good checkpoint is " + dir.of(step_name(dir.saved))
                              : std::string("no checkpoint had been written");
    }
    // `what` was found not to be finite: names the tensor where it began.
    [[noreturn]] void stop_non_finite(int64 step, const std::string& what) const {
        const std::string tensor = engine.find_non_finite();
        fail("step %lld: %s; first bad tensor: %s; %s; a lower --lr may help", (long long)step, what.c_str(),
             tensor.empty() ? "none (the numbers overflowed in a sum)" : tensor.c_str(), last_good().c_str());
    }

    // One optimizer step; `at` moves on. Returns the row of the log, its rate still missing.
    LogRow train_step() {
        const int64 B = s.batch, T = s.config.T, step = at.step;
        std::vector<int32_t> tokens(size_t(B * T)), targets(size_t(B * T));
        double loss = 0;
        engine.zero_gradients();
        for (int64 micro = 0; micro < s.grad_accum; ++micro) {
            for (int64 b = 0; b < B; ++b) {
                const int64 from = window_start(s.seed, step, micro * B + b, int64(data.train.ids.size()), T);
                const int32_t* window = data.train.ids.data() + from;
                std::copy(window, window + T, tokens.begin() + b * T);
                std::copy(window + 1, window + T + 1, targets.begin() + b * T);
            }
            const DropoutKey key{s.seed, uint32_t(step), uint32_t(micro)};
            const double micro_loss =
                engine.forward(tokens.data(), targets.data(), B, T, s.config.dropout > 0 ? &key : nullptr);
            if (!std::isfinite(micro_loss)) stop_non_finite(step + 1, "the loss is " + not_finite(micro_loss));
            engine.backward(1.0 / double(s.grad_accum));
            loss += micro_loss / double(s.grad_accum);
        }
        const double norm = engine.gradient_norm();
        if (!std::isfinite(norm)) stop_non_finite(step + 1, "the gradient norm is " + not_finite(norm));
        const double lr = learning_rate(step, s.steps, s.lr, s.warmup_frac, s.min_lr_frac);
        const double scale = s.clip > 0 && norm > s.clip ? s.clip / norm : 1;
        engine.update(s.adamw, lr, step + 1, scale);
        at.step = step + 1;
        at.tokens += s.tokens_per_step();
        return {at.step, at.tokens, loss, NAN, lr, norm, 0};
    }

    // Returns true if this is the best so far.
    bool validate() {
        std::vector<int32_t> part;
        const bool all = s.eval_tokens == 0 || s.eval_tokens + 1 >= int64(data.val.ids.size());
        if (!all) part.assign(data.val.ids.begin(), data.val.ids.begin() + s.eval_tokens + 1);
        last_eval = evaluate(engine, tokenizer, all ? data.val.ids : part, s.batch, s.config.T);
        last_eval_step = at.step;
        const double loss = last_eval.nats_per_token;
        if (!std::isfinite(loss)) stop_non_finite(at.step, "the validation loss is " + not_finite(loss));
        if (!(loss < at.best_loss)) return false;
        at.best_loss = loss;
        at.best_step = at.step;
        return true;
    }

    void print_sample(Progress* progress) const {
        progress->say(format("--- sample after step %lld ---", (long long)at.step));
        Sampler sampler;
        sampler.seed = s.seed + uint64_t(at.step);
        std::string pending;
        const auto print = [&](const std::string& bytes, bool last) {
            fputs(terminal_text(utf8_stream(&pending, bytes, last)).c_str(), stdout);
        };
        // Text begins after a line break; most of this repository's begins with a comment.
        const std::string prompt = s.data.empty() ? "// " : "\n";
        if (s.data.empty()) print(prompt, false);
        generate(engine, tokenizer, prompt, 240, sampler, [&](const std::string& bytes) { print(bytes, false); });
        print("", true);
        progress->say("\n---");
    }

    void save() {
        try {
            dir.save(at, options, s.config, tokenizer, engine);
        } catch (const Error& e) {
            fail("step %lld: %s; %s", (long long)at.step, e.what(), last_good().c_str());
        }
    }

    // The curve can be drawn again from log.csv: that it cannot be written is no reason to stop, and is said once.
    void draw(const Log& log, Progress* progress) {
        const std::string title =
            format("%s, %s parameters", s.preset_name.c_str(), with_commas(engine.table.count).c_str());
        try {
            replace_file(dir.of("loss.svg"), loss_svg(log.rows, s.steps, title));
            drawn = true;
        } catch (const Error& e) {
            drawn = false;
            if (warned) return;
            warned = true;
            progress->end();
            fprintf(stderr, "train: warning: %s; training goes on\n", one_line(e.what()).c_str());
        }
    }

    // Trains to the end, to --stop-after or to a signal.
    void loop(Log* log) {
        const int64 first = at.step, end = s.stop_after > 0 ? std::min(s.stop_after, s.steps) : s.steps;
        const double peak = engine.peak();
        Progress progress(first, end, s.steps, peak > 0 ? flops_per_token(s.config, s.config.T) / peak : 0);
        const double began = wall_seconds();
        try {
            while (at.step < end && !stop_requested) {
                const double t0 = wall_seconds();
                LogRow row = train_step();
                row.tokens_per_s = double(s.tokens_per_step()) / std::max(1e-9, wall_seconds() - t0);
                bool best = false, evaluated = false;
                if (due(s.eval_every)) {
                    evaluated = true;
                    best = validate();
                    row.val_loss = last_eval.nats_per_token;
                }
                log->add(row);
                progress.step(log->rows, wall_seconds() - began);
                if (evaluated)
                    progress.say(format("%s  validation loss %.4f  perplexity %.2f  bits/byte %.4f%s",
                                        progress.label(at.step).c_str(), last_eval.nats_per_token,
                                        last_eval.perplexity(), last_eval.bits_per_byte(), best ? "  (best)" : ""));
                if (due(s.save_every) || best) {
                    log->sync();
                    save();
                }
                if (evaluated || due(s.save_every)) draw(*log, &progress);
                if (due(s.sample_every)) print_sample(&progress);
            }
        } catch (...) {
            progress.end();
            warned = true;  // the error on its way is the one to tell
            if (!log->rows.empty()) draw(*log, &progress);
            throw;
        }
        progress.end();
        if (dir.saved != at.step) {
            log->sync();
            save();
        }
        draw(*log, &progress);
    }

    void print_end(const Log& log, double seconds) const {
        const bool from_path = program.find('/') == std::string::npos;  // found by the shell, which may not be "here"
        const std::string bin = from_path ? program_directory(program.c_str()) : parent_directory(program);
        const std::string out = shell_word(dir.path);
        const bool finished = at.step >= s.steps;
        printf("\n%s after step %lld of %lld, %s tokens, %s\n", finished ? "finished" : "stopped", (long long)at.step,
               (long long)s.steps, with_commas(at.tokens).c_str(), duration_text(seconds).c_str());
        if (!log.rows.empty()) {
            const size_t n = std::min<size_t>(log.rows.size(), size_t(std::max<int64>(20, s.steps / 50)));
            double loss = 0;
            for (size_t i = log.rows.size() - n; i < log.rows.size(); ++i) loss += log.rows[i].train_loss / double(n);
            printf("  training loss    %.4f nats/token (mean of the last %zu steps)\n", loss, n);
        }
        if (last_eval_step == at.step)
            printf("  validation loss  %.4f nats/token, %.4f bits/byte, on %s tokens\n", last_eval.nats_per_token,
                   last_eval.bits_per_byte(), with_commas(last_eval.tokens).c_str());
        if (at.best_step >= 0)
            printf("  best validation  %.4f nats/token at step %lld\n", at.best_loss, (long long)at.best_step);
        const std::string best = read_name(dir.of("best")), latest = step_name(at.step);
        printf("  saved in         %s: %s, %slog.csv%s\n", dir.path.c_str(),
               (latest + (best == latest ? " (the latest and the best)" : " (the latest)")).c_str(),
               best.empty() || best == latest ? "" : (best + " (the best), ").c_str(), drawn ? ", loss.svg" : "");
        const bool on_cpu = engine.device().compare(0, 3, "CPU") == 0;
        printf("  sample           %s sample %s --prompt 'The '\n",
               shell_word(bin + (on_cpu ? "/ref_cpu" : "/transxssm")).c_str(), out.c_str());
        printf("  %s %s --resume %s%s\n", finished ? "train longer    " : "resume          ",
               shell_word(program).c_str(), out.c_str(),
               finished ? format(" --steps %lld", (long long)std::min<int64>(2 * s.steps, INT32_MAX)).c_str() : "");
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 8  The program
// ---------------------------------------------------------------------------------------------------------------------

// The preset whose settings are the defaults of the other options: that of --preset, or the one that the model of
// --init-from was made with. Found by a first reading of the command line; what is wrong in it the second one tells.
std::string preset_of(int argc, const char* const* argv) {
    std::vector<const char*> words(argv, argv + argc);
    for (const char*& w : words)  // help must wait for the defaults: words that are read alike and ask for none
        if (strcmp(w, "--help") == 0) w = "--dry-run";
        else if (strcmp(w, "-h") == 0) w = "-H";
    Settings s;
    apply_preset(&s, s.preset_name);
    Options options("train", "");
    add_options(&options, &s);
    try {
        std::vector<std::string> ignored;
        options.parse(argc, words.data(), 1, &ignored);
    } catch (const UsageError&) {
    }
    if (options.given("preset")) {
        preset(s.preset_name);  // refuses unknown names
        return s.preset_name;
    }
    if (!options.given("init-from") || options.given("resume")) return s.preset_name;
    try {
        Json settings;
        read_trainer(resolve_checkpoint(s.init_from) + "/trainer.json", &settings);
        const Json* name = settings.find("preset");
        if (name && name->type == Json::String) {
            preset(name->text);
            return name->text;
        }
    } catch (const Error&) {  // a model needs no trainer.json; another mistake will be met again
    }
    return no_preset;
}

// What trainer.json says must fit together.
void check_trainer(const Trainer& t, const Settings& s, const std::string& checkpoint, const std::string& file) {
    try {
        check_settings(s);
    } catch (const UsageError& e) {
        fail("%s: setting %s", file.c_str(), e.what());
    }
    bool temporary;
    const std::string name = checkpoint.substr(checkpoint.find_last_of('/') + 1);
    const long long step = t.step, named = step_of(name, &temporary);
    if (named >= 0 && step != named)
        fail("%s: 'step' is %lld, but the directory is %s", file.c_str(), step, name.c_str());
    if (step > s.steps)
        fail("%s: 'step' is %lld, beyond its setting 'steps', %lld", file.c_str(), step, (long long)s.steps);
    // No overflow: check_settings has looked at the product with s.steps.
    if (t.tokens != step * s.tokens_per_step())
        fail("%s: 'tokens' is %lld, expected %lld for %lld steps of %lld", file.c_str(), (long long)t.tokens,
             (long long)(step * s.tokens_per_step()), step, (long long)s.tokens_per_step());
    if (t.best_step > step)
        fail("%s: 'best_step' is %lld, beyond 'step', %lld", file.c_str(), (long long)t.best_step, step);
}

// With --resume: takes the settings of the checkpoint, then those few that may be given anew.
Trainer take_settings(const std::string& checkpoint, Options* options, Settings* s, int argc, const char* const* argv) {
    static const std::vector<std::string> allowed = {"steps",        "stop-after", "out",     "eval-every",
                                                     "sample-every", "save-every", "dry-run", "recompute"};
    for (const std::string& name : options->given_names())
        if (name != "resume" && std::find(allowed.begin(), allowed.end(), name) == allowed.end())
            usage_error("--%s cannot be given with --resume, which takes the settings of %s; what can be is --%s",
                        name.c_str(), checkpoint.c_str(), join(allowed, ", --").c_str());
    Json settings;
    const std::string file = checkpoint + "/trainer.json";
    if (!file_exists(file)) fail("%s: not there, so %s cannot be resumed", file.c_str(), checkpoint.c_str());
    const Trainer t = read_trainer(file, &settings);
    options->from_json(settings, file);
    s->config = load_config(checkpoint);
    check_trainer(t, *s, checkpoint, file);
    s->out.clear();  // where it lies now, which may not be where it was first written
    options->parse(argc, argv, 1);
    if (t.step > s->steps)
        usage_error("--steps %lld: %s is already at step %lld", (long long)s->steps, checkpoint.c_str(),
                    (long long)t.step);
    return t;
}

// With --init-from: the model's shape comes from DIR. Options that would change what its weights mean are refused; the
// length of a window, the chunk length and dropout are free.
void take_config(const std::string& checkpoint, const Options& options, Settings* s) {
    Config c = load_config(checkpoint);
    const Config& given = s->config;
    const struct {
        const char* name;
        double given, model;
    } fields[] = {
        {"layers", double(given.L), double(c.L)},
        {"d-model", double(given.D), double(c.D)},
        {"heads", double(given.H), double(c.H)},
        {"kv-heads", double(given.Hkv), double(c.Hkv)},
        {"d-state", double(given.N), double(c.N)},
        {"d-ff", double(given.F), double(c.F)},
        {"attn-period", double(given.attn_period), double(c.attn_period)},
        {"attn-offset", double(given.attn_offset), double(c.attn_offset)},
        {"rope-theta", given.rope_theta, c.rope_theta},
        {"tie", double(given.tie), double(c.tie)},
        {"ssd-decay", double(given.ssd_decay), double(c.ssd_decay)},
    };
    for (const auto& f : fields)
        if (f.given != f.model && (options.given(f.name) || options.given("preset")))
            usage_error("--%s%s: %s is %s, but the model of --init-from %s has %s",
                        options.given(f.name) ? f.name : "preset ", options.given(f.name) ? "" : s->preset_name.c_str(),
                        f.name, to_text(f.given).c_str(), s->init_from.c_str(), to_text(f.model).c_str());
    if (options.given("seq-len")) c.T = given.T;
    if (options.given("chunk")) c.Q = given.Q;
    if (options.given("dropout")) c.dropout = given.dropout;
    s->config = c;
}

// The message of Config::validate() in terms of the options.
std::string in_options(std::string message) {
    static const std::pair<const char*, const char*> names[] = {
        {"hidden_size", "--d-model"},           {"num_hidden_layers", "--layers"},
        {"num_attention_heads", "--heads"},     {"num_key_value_heads", "--kv-heads"},
        {"ssd_state_size", "--d-state"},        {"intermediate_size", "--d-ff"},
        {"ssd_chunk_size", "--chunk"},          {"max_position_embeddings", "--seq-len"},
        {"attn_layer_period", "--attn-period"}, {"attn_layer_offset", "--attn-offset"},
        {"rope_theta", "--rope-theta"},         {"hidden_dropout", "--dropout"},
    };
    for (const auto& n : names)
        for (size_t at; (at = message.find(n.first)) != std::string::npos;)
            message.replace(at, strlen(n.first), n.second);
    return message;
}

// The data must be what the run was trained on so far, or it would be another run.
void check_unchanged(const char* which, const std::string& was, const std::string& is, const Data& data) {
    if (was != is)
        fail("%s: the %s data has changed since the run was saved (sha256 %.12s..., was %.12s...)", data.source.c_str(),
             which, is.c_str(), was.c_str());
}

int train_program(int argc, char** argv) {
    Settings s;
    apply_preset(&s, preset_of(argc, argv));
    Options options(
        "train",
        "usage: train [--data FILE...] [options]\n"
        "       train --resume DIR\n\n"
        "Trains a model on text, reports and saves as it goes. With no option: the `tiny` preset on the text of "
        "this repository.");
    add_options(&options, &s);
    if (!options.parse(argc, argv, 1)) return 0;
    const std::string program = argv[0];
    for (const auto& o : {std::make_pair("resume", &s.resume), {"init-from", &s.init_from}, {"out", &s.out}})
        if (options.given(o.first) && o.second->empty()) usage_error("--%s: an empty value", o.first);
    if (options.given("heads") && !options.given("kv-heads")) s.config.Hkv = s.config.H;
    const bool resuming = options.given("resume"), from_model = options.given("init-from") && !resuming;

    // Settings: from the command line, or from the checkpoint.
    Trainer at;
    std::string checkpoint;
    if (resuming || from_model) checkpoint = resolve_checkpoint(resuming ? s.resume : s.init_from);
    if (resuming) at = take_settings(checkpoint, &options, &s, argc, argv);
    if (from_model) take_config(checkpoint, options, &s);
    check_settings(s);
    check_device(s);
    if (!resuming) {
        for (std::string& f : s.data) f = absolute_path(f);  // so that the run can be resumed from any directory
        for (std::string& f : s.val_data) f = absolute_path(f);
        check_settings(s);  // the directory that they lie in is part of them now
    }

    // Tokenizer and model.
    std::unique_ptr<Tokenizer> tokenizer;
    if (checkpoint.empty()) {
        tokenizer = open_tokenizer(s.tokenizer);
        s.config.V = tokenizer->vocab_size();
    } else {
        tokenizer = load_tokenizer(checkpoint + "/tokenizer.json");
        if (from_model && options.given("tokenizer") && open_tokenizer(s.tokenizer)->json() != tokenizer->json())
            usage_error("--tokenizer %s: the model of --init-from %s has another one", s.tokenizer.c_str(),
                        s.init_from.c_str());
        if (tokenizer->vocab_size() > s.config.V)
            fail("%s: %lld tokens, but the model's vocabulary is %lld", (checkpoint + "/tokenizer.json").c_str(),
                 (long long)tokenizer->vocab_size(), (long long)s.config.V);
    }
    try {
        s.config.validate();
    } catch (const UsageError&) {
        throw;
    } catch (const Error& e) {
        usage_error("%s", in_options(e.what()).c_str());
    }

    // Where it goes. A run in progress is never overwritten.
    RunDirectory dir;
    dir.path = strip_slashes(s.out);
    std::string old_log, latest;
    bool in_place = false;
    if (resuming) {
        const std::string name = strip_slashes(s.resume), here = absolute_path(checkpoint);
        const std::string from = file_exists(name + "/latest") ? name : parent_directory(here);
        const bool in_run = here == absolute_path(from) + "/" + step_name(at.step);
        if (in_run) old_log = from + "/log.csv";
        if (dir.path.empty() && in_run) dir.path = from;
        if (dir.path.empty())
            usage_error("--resume %s: is not the %s of a run; name a directory for the run with --out",
                        s.resume.c_str(), step_name(at.step).c_str());
        in_place = in_run && absolute_path(dir.path) == absolute_path(from);
        latest = read_name(from + "/latest");
        RunDirectory run;
        run.path = from;
        const std::string newest = latest.empty() ? step_name(run.newest_step()) : latest;
        bool temporary;
        if (in_place && newest != step_name(at.step) &&
            (step_of(newest, &temporary) < 0 || step_of(newest, &temporary) > at.step))
            usage_error("--resume %s: the run has gone on to %s; go on from here into another directory with --out",
                        s.resume.c_str(), newest.c_str());
    }
    if (!dir.path.empty() && !in_place) dir.refuse_run();
    if (s.stop_after > 0 && s.stop_after < at.step)
        usage_error("--stop-after %lld: %s is already at step %lld", (long long)s.stop_after, checkpoint.c_str(),
                    (long long)at.step);

    // Data.
    const Data data = load_data(s, *tokenizer, argv[0]);
    if (resuming) {
        check_unchanged("training", at.train_sha256, data.train.sha256, data);
        check_unchanged("validation", at.val_sha256, data.val.sha256, data);
    }
    at.train_sha256 = data.train.sha256;
    at.val_sha256 = data.val.sha256;

    // The plan.
    printf("%s\n", options.echo().c_str());
    printf("%s", describe(s.config, s.batch, s.config.T).c_str());
    printf("data        %s\n", data.source.c_str());
    printf("            training %s tokens (%s bytes), validation %s tokens (%s bytes)\n",
           with_commas(int64(data.train.ids.size())).c_str(), with_commas(data.train.bytes).c_str(),
           with_commas(int64(data.val.ids.size())).c_str(), with_commas(data.val.bytes).c_str());
    printf("training    %s steps of %s tokens (%lld windows of %lld), %s tokens in all, %.2f times the data\n",
           with_commas(s.steps).c_str(), with_commas(s.tokens_per_step()).c_str(), (long long)s.rows_per_step(),
           (long long)s.config.T, with_commas(s.steps * s.tokens_per_step()).c_str(),
           double(s.steps) * double(s.tokens_per_step()) / double(data.train.ids.size()));
    if (s.dry_run) {
        printf("out         %s\n", dir.path.empty() ? ("out/" + s.preset_name + "-...").c_str() : dir.path.c_str());
        printf("dry run: nothing was trained or written\n");
        return 0;
    }
    if (resuming && at.step >= s.steps) {
        printf("%s is finished: step %lld of %lld; --steps N with a larger N goes on\n", checkpoint.c_str(),
               (long long)at.step, (long long)s.steps);
        return 0;
    }

    // The engine, and what it starts from.
    std::string device_note;
    std::unique_ptr<Engine> engine = make_engine(s, &device_note);
    printf("device      %s%s\n", engine->device().c_str(), device_note.c_str());
    const std::string plan = engine->plan(s.batch, s.config.T);
    if (!plan.empty()) printf("            %s\n", plan.c_str());
    engine->write(Buffer::weights,
                  (checkpoint.empty() ? initial_weights(s.config, s.seed) : load_weights(checkpoint, s.config)).data());
    if (resuming) read_optimizer(checkpoint + "/optimizer.safetensors", engine.get());

    dir.path = make_out(dir.path, s.preset_name);
    Log log(dir.of("log.csv"));
    // OUT is this run's alone from here on. Another one may have been there since it was looked at.
    if (in_place) {
        if (read_name(dir.of("latest")) != latest || !is_directory(dir.of(step_name(at.step))))
            fail("%s: another run has gone on here since %s was read; start again", dir.path.c_str(),
                 checkpoint.c_str());
        log.go_on(at.step);
        const int64 best = at.best_step;
        dir.rewind(&at);
        if (best != at.best_step)
            printf("best        %s is not there any more; the best is counted anew\n", step_name(best).c_str());
    } else {
        dir.refuse_run();
        at.forget_best();  // it is the best of what OUT holds
        log.begin(file_exists(old_log) ? old_log : "", at.step);
    }
    if (resuming) printf("resume      %s, step %lld\n", checkpoint.c_str(), (long long)at.step);
    else if (from_model) printf("weights     %s\n", checkpoint.c_str());
    printf("out         %s\n\n", dir.path.c_str());
    fflush(stdout);

    // SA_RESTART: a signal during a write must not make it fail.
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    struct sigaction hangup {};
    if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN)  // else: started by nohup
        sigaction(SIGHUP, &action, nullptr);

    Run run{s, options, data, *tokenizer, *engine, dir, at, program, {}, -1, false, false};
    const double began = wall_seconds();
    run.loop(&log);
    run.print_end(log, wall_seconds() - began);
    return 0;
}

}  // namespace

int train_main(int argc, char** argv) {
    return run_main("train", [&] { return train_program(argc, argv); });
}

#ifdef TRAIN_MAIN
int main(int argc, char** argv) {
    spin_briefly(argv);
    return train_main(argc, argv);
}
#endif
