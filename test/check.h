// check.h: what the tests share: a comparator that cannot be fooled by NaN, temporary directories, running programs.
#pragma once

#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../transxssm.h"

#ifndef PROGRAM_DIR
#error "PROGRAM_DIR must name the directory of the built programs (the Makefile does)"
#endif
#ifndef SOURCE_DIR
#error "SOURCE_DIR must name the root of the repository (the Makefile does)"
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Comparing tensors
// ---------------------------------------------------------------------------------------------------------------------

// "" if |got - want| (L2) <= relative * |want| (L2) and no element differs by more than max_abs; otherwise one line
// with the tensor, the worst index, both values, max abs and relative L2. NaN and infinity on either side never pass:
// each test below is written so that a comparison with NaN is a failure. Use: CHECK_EQ(compare("dx", a, b, n, 1e-6),
// "").
template <class A, class B>
std::string compare(const std::string& tensor, const A* got, const B* want, int64 n, double relative,
                    double max_abs = std::numeric_limits<double>::infinity()) {
    double diff2 = 0, want2 = 0, worst = -1;
    int64 worst_at = 0, bad_at = -1;
    for (int64 i = 0; i < n; ++i) {
        const double a = double(got[i]), b = double(want[i]), d = std::fabs(a - b);
        if (bad_at < 0 && !(std::isfinite(a) && std::isfinite(b))) bad_at = i;
        if (d > worst) {
            worst = d;
            worst_at = i;
        }
        diff2 += d * d;
        want2 += b * b;
    }
    if (bad_at >= 0)
        return format("%s[%lld]: got %.9g, expected %.9g: not finite", tensor.c_str(), (long long)bad_at,
                      double(got[bad_at]), double(want[bad_at]));
    const double error = diff2 == 0 ? 0 : std::sqrt(diff2) / std::sqrt(want2);  // infinite where all of want is zero
    if (error <= relative && worst <= max_abs) return "";
    return format("%s[%lld]: got %.9g, expected %.9g; max abs %.3g, relative L2 %.3g (allowed %.3g)", tensor.c_str(),
                  (long long)worst_at, double(got[worst_at]), double(want[worst_at]), worst, error, relative);
}
template <class A, class B>
std::string compare(const std::string& tensor, const std::vector<A>& got, const std::vector<B>& want, double relative,
                    double max_abs = std::numeric_limits<double>::infinity()) {
    if (got.size() != want.size())
        return format("%s: got %zu elements, expected %zu", tensor.c_str(), got.size(), want.size());
    return compare(tensor, got.data(), want.data(), int64(got.size()), relative, max_abs);
}

// "" if both hold the same bits (so that 0 and -0 differ), else one line with the first difference.
template <class A>
std::string compare_bits(const std::string& tensor, const std::vector<A>& got, const std::vector<A>& want) {
    if (got.size() != want.size())
        return format("%s: got %zu elements, expected %zu", tensor.c_str(), got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i)
        if (memcmp(&got[i], &want[i], sizeof(A)) != 0)
            return format("%s[%zu]: got %.17g, expected %.17g: the bits differ", tensor.c_str(), i, double(got[i]),
                          double(want[i]));
    return "";
}

// ---------------------------------------------------------------------------------------------------------------------
// Text and errors
// ---------------------------------------------------------------------------------------------------------------------

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// The message of the Error that `body` throws; "(no error)" if it throws none, and a remark if it is not one line.
inline std::string error_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const Error& e) {
        const std::string s = e.what();
        return s.empty() || contains(s, "\n") ? "(not one line) " + s : s;
    }
    return "(no error)";
}

// CHECK_ERROR(expression, "part", "part", ...): it throws an Error whose one line contains every part.
inline std::string missing_part(const std::string& message, const std::vector<std::string>& parts) {
    if (contains(message, "(no error)") || contains(message, "(not one line)")) return message;
    for (const std::string& part : parts)
        if (!contains(message, part)) return "'" + part + "' is not in: " + message;
    return "";
}
#define CHECK_ERROR(expression, ...) \
    CHECK_EQ(missing_part(error_of([&] { (void)(expression); }), std::vector<std::string>{__VA_ARGS__}), "")

// Every tag closed in order, attributes quoted, no bare & or <, no NaN among the numbers: "" or what is wrong.
inline std::string xml_problem(const std::string& s) {
    std::vector<std::string> open_tags;
    for (size_t i = 0; i < s.size(); ++i) {
        if (s[i] == '&' && s.compare(i, 4, "&lt;") != 0 && s.compare(i, 4, "&gt;") != 0 &&
            s.compare(i, 5, "&amp;") != 0)
            return "a bare &";
        if (s[i] == '>') return "a bare >";
        if (s[i] != '<') continue;
        const size_t end = s.find('>', i);
        if (end == std::string::npos) return "a tag without end";
        const std::string tag = s.substr(i + 1, end - i - 1);
        if (contains(tag, "<")) return "a < inside a tag";
        if (std::count(tag.begin(), tag.end(), '"') % 2 != 0) return "an open quote in <" + tag + ">";
        const std::string name = tag.substr(0, tag.find(' '));
        if (name[0] == '/') {
            if (open_tags.empty() || "/" + open_tags.back() != name) return "unexpected <" + tag + ">";
            open_tags.pop_back();
        } else if (tag.back() != '/') {
            open_tags.push_back(name);
        }
        i = end;
    }
    if (!open_tags.empty()) return "<" + open_tags.back() + "> is not closed";
    for (const char* word : {"nan", "inf"})
        if (contains(s, word)) return word;
    return "";
}

// Whether ./train --device auto takes a GPU.
inline bool have_gpu() {
#ifdef WITH_CUDA
    return cuda::problem().empty();
#else
    return false;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Temporary directories
// ---------------------------------------------------------------------------------------------------------------------

inline void remove_tree(const std::string& path) {
    struct stat st;
    if (lstat(path.c_str(), &st) != 0) return;
    if (S_ISDIR(st.st_mode)) {
        chmod(path.c_str(), 0700);
        if (DIR* d = opendir(path.c_str())) {
            while (const dirent* e = readdir(d)) {
                const std::string name = e->d_name;
                if (name != "." && name != "..") remove_tree(path + "/" + name);
            }
            closedir(d);
        }
        rmdir(path.c_str());
    } else {
        unlink(path.c_str());
    }
}

inline std::vector<std::string> list_directory(const std::string& path) {  // sorted
    std::vector<std::string> names;
    if (DIR* d = opendir(path.c_str())) {
        while (const dirent* e = readdir(d)) {
            const std::string name = e->d_name;
            if (name != "." && name != "..") names.push_back(name);
        }
        closedir(d);
    }
    std::sort(names.begin(), names.end());
    return names;
}

// write_file() without the wait for the disk, for tests that write thousands of files.
inline void put_file(const std::string& path, const std::string& data) {
    FILE* f = fopen(path.c_str(), "wb");
    if (!f) fail("%s: cannot write: %s", path.c_str(), strerror(errno));
    fwrite(data.data(), 1, data.size(), f);
    fclose(f);
}

// A directory of its own that is removed with everything in it: `TempDir tmp; write_file(tmp / "a.txt", ...)`.
struct TempDir {
    std::string path;
    TempDir() {
        const char* base = getenv("TMPDIR");
        path = std::string(base && *base ? base : "/tmp") + "/transxssm-test-XXXXXX";
        if (!mkdtemp(&path[0])) fail("%s: cannot create a temporary directory: %s", path.c_str(), strerror(errno));
    }
    ~TempDir() { remove_tree(path); }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Running programs
// ---------------------------------------------------------------------------------------------------------------------

struct RunResult {
    int status = -1;  // exit status; 128 + signal if a signal ended it
    std::string out, err;
};

struct RunOptions {
    std::string input;             // standard input
    std::string directory;         // to run in; "": here
    std::vector<std::string> env;  // additions, "NAME=value"
    std::string stdout_to;         // a file (or device) in place of RunResult::out
};

inline std::string program_path(const std::string& name) { return std::string(PROGRAM_DIR) + "/" + name; }

// A running program. It is killed if it is still there when the object goes.
class Process {
  public:
    Process(const std::string& program, const std::vector<std::string>& args, const RunOptions& options = {}) {
        write_file(tmp / "in", options.input);
        const std::string path = contains(program, "/") ? program : program_path(program);
        const std::string in = tmp / "in", out = options.stdout_to.empty() ? tmp / "out" : options.stdout_to,
                          err = tmp / "err";
        std::vector<std::string> words = {path};
        words.insert(words.end(), args.begin(), args.end());
        std::vector<char*> argv, envp;
        for (std::string& w : words) argv.push_back(&w[0]);
        argv.push_back(nullptr);
        std::vector<std::string> env = options.env;
        for (char** e = environ; *e; ++e) {
            const std::string entry = *e, name = entry.substr(0, entry.find('=') + 1);
            bool replaced = false;
            for (const std::string& o : options.env) replaced = replaced || o.compare(0, name.size(), name) == 0;
            if (!replaced) env.push_back(entry);
        }
        for (std::string& e : env) envp.push_back(&e[0]);
        envp.push_back(nullptr);
        pid = fork();
        if (pid < 0) fail("fork: %s", strerror(errno));
        if (pid == 0) {  // only async-signal-safe calls from here on
            const int i = open(in.c_str(), O_RDONLY), o = open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666),
                      e = open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
            const bool ok = dup2(i, 0) == 0 && dup2(o, 1) == 1 && dup2(e, 2) == 2 &&
                            (options.directory.empty() || chdir(options.directory.c_str()) == 0);
            if (ok) execve(argv[0], argv.data(), envp.data());
            _exit(127);
        }
        read_out = options.stdout_to.empty();
    }
    ~Process() {
        if (pid > 0) {
            kill(pid, SIGKILL);
            waitpid(pid, nullptr, 0);
        }
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;

    void send(int signal) const { kill(pid, signal); }
    bool running() const {
        siginfo_t info{};
        return waitid(P_PID, id_t(pid), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
    }
    std::string output() const { return file_exists(tmp / "out") ? read_file(tmp / "out") : ""; }  // so far
    RunResult wait() {
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
        }
        pid = -1;
        RunResult r;
        r.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (read_out) r.out = read_file(tmp / "out");
        r.err = read_file(tmp / "err");
        return r;
    }

  private:
    TempDir tmp;
    pid_t pid = -1;
    bool read_out = true;
};

// `run_program("train", {"--steps", "10"})` runs a built program to its end.
inline RunResult run_program(const std::string& program, const std::vector<std::string>& args,
                             const RunOptions& options = {}) {
    return Process(program, args, options).wait();
}

// "" if the program ended with `status` and exactly one line on standard error that contains every part.
inline std::string refusal(const RunResult& r, int status, const std::vector<std::string>& parts) {
    if (r.status != status) return format("exit status %d, expected %d; standard error: ", r.status, status) + r.err;
    if (r.err.empty() || r.err.find('\n') != r.err.size() - 1) return "not exactly one line: " + r.err;
    return missing_part(r.err, parts);
}
