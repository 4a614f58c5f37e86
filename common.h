// common.h: the small pieces that every program here shares. Nothing in this file knows the model.
//
//   1  errors          fail(), usage_error(), run_main(), spin_briefly()
//   2  random numbers  Philox4x32-10: a number is a pure function of (seed, name, counter)
//   3  text            number parsing, UTF-8
//   4  JSON            a small strict reader and writer
//   5  sha256
//   6  files           whole-file read, durable write, atomic replace
//   7  named tensors   .safetensors reader and writer
//   8  options         one table that parses, prints --help and echoes the settings
//
// Everything is C++17 and POSIX. Functions report bad input by throwing Error with one complete line.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using int64 = int64_t;

static_assert(sizeof(float) == 4 && sizeof(double) == 8 && sizeof(size_t) == 8, "needs IEEE floats and 64-bit sizes");

// ---------------------------------------------------------------------------------------------------------------------
// 1  Errors
// ---------------------------------------------------------------------------------------------------------------------

// A run-time failure: exit status 1. The message names the file, tensor or value, what was expected and what was found.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// A mistake on the command line: exit status 2.
struct UsageError : Error {
    using Error::Error;
};

inline std::string vformat(const char* fmt, va_list args) {
    va_list copy;
    va_copy(copy, args);
    const int n = vsnprintf(nullptr, 0, fmt, copy);
    va_end(copy);
    std::string s(size_t(n > 0 ? n : 0) + 1, '\0');
    vsnprintf(&s[0], s.size(), fmt, args);
    s.resize(s.size() - 1);
    return s;
}

__attribute__((format(printf, 1, 2))) inline std::string format(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    return s;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    throw Error(s);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void usage_error(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    throw UsageError(s);
}

// Called first in main. GCC's OpenMP lets a thread that waits spin for about a millisecond; where another process wants
// the processor too, that keeps off the very thread that is waited for, and a train step takes up to eight times as
// long. Spinning for about 30 microseconds costs nothing on a quiet machine. The library reads its setting before main,
// so the program sets it and starts itself again; a setting of the user's is left alone.
inline void spin_briefly(char** argv) {
#if defined(_OPENMP) && defined(__linux__)
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    char path[PATH_MAX + 1] = {};  // the file itself, so that ps and pkill show its name
    if (readlink("/proc/self/exe", path, PATH_MAX) <= 0) return;
    setenv("GOMP_SPINCOUNT", "3000", 1);
    execv(path, argv);  // returns only if it fails: then go on without
#else
    (void)argv;
#endif
}

// A message on one line: control characters, which file names may hold, become \xNN and cannot reach a terminal.
inline std::string one_line(const std::string& message) {
    std::string s;
    for (const char c : message)
        s += uint8_t(c) < 0x20 || c == 0x7F ? format("\\x%02x", unsigned(c)) : std::string(1, c);
    return s;
}

// Runs a program's body; turns what it throws into one line on standard error and an exit status.
inline int run_main(const char* program, const std::function<int()>& body) {
    signal(SIGXFSZ, SIG_IGN);  // a file at its size limit is an error of write(), which is reported, not a death
    // A standard stream that came closed would be the number of the first file opened, and output would go into that. Open
    // for reading, so that writing to it is an error as it was.
    for (int fd = open("/dev/null", O_RDONLY); fd >= 0; fd = open("/dev/null", O_RDONLY))
        if (fd > 2) {
            close(fd);
            break;
        }
    const auto report = [&](const std::string& message, int status) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", program, one_line(message).c_str());
        return status;
    };
    static const char memory[] =
        "out of memory; a smaller model, --batch, --seq-len or --tokens, or less data, needs less";
    std::set_terminate(
        [] {  // what is thrown inside an OpenMP region, a failed allocation say, cannot be caught outside it
            try {
                if (std::current_exception()) std::rethrow_exception(std::current_exception());
            } catch (const std::bad_alloc&) {
                fprintf(stderr, "%s\n", memory);
            } catch (const std::exception& e) {
                fprintf(stderr, "%s\n", one_line(e.what()).c_str());
            }
            _exit(1);
        });
    try {
        const int status = body();
        if (fflush(stdout) != 0 || ferror(stdout)) fail("standard output: %s", strerror(errno));
        return status;
    } catch (const UsageError& e) {
        return report(e.what(), 2);
    } catch (const std::bad_alloc&) {
        return report(memory, 1);
    } catch (const std::length_error&) {  // a vector of more elements than there can be
        return report(memory, 1);
    } catch (const std::exception& e) {
        return report(e.what(), 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2  Random numbers
// ---------------------------------------------------------------------------------------------------------------------
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It is counter based: there is no
// generator state to save, so that any engine, any thread and a resumed run draw the same numbers.

struct Philox {
    uint32_t key[2];

    // The stream called `name` under `seed`. All 64 bits of the seed count: the low half is the first key word, the
    // high half is mixed into the hash of the name (FNV-1a).
    Philox(uint64_t seed, const char* name) {
        uint32_t h = 2166136261u;
        for (const char* c = name; *c; ++c) h = (h ^ uint8_t(*c)) * 16777619u;
        key[0] = uint32_t(seed);
        key[1] = h ^ uint32_t(seed >> 32) * 0x9E3779B9u;
    }

    struct Block {
        uint32_t word[4];
    };

    Block operator()(uint32_t c0, uint32_t c1 = 0, uint32_t c2 = 0, uint32_t c3 = 0) const {
        uint32_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
            c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
            c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
            c1 = uint32_t(p1);
            c3 = uint32_t(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {{c0, c1, c2, c3}};
    }
    Block at(uint64_t counter) const { return (*this)(uint32_t(counter), uint32_t(counter >> 32)); }

    // Uniform in the open interval (0,1), 53 bits: never 0, so that its logarithm is finite.
    static double uniform(uint32_t hi, uint32_t lo) {
        return (double((uint64_t(hi) << 32 | lo) >> 12) + 0.5) * (1.0 / 4503599627370496.0);
    }
    double uniform_at(uint64_t counter) const {
        const Block r = at(counter);
        return uniform(r.word[0], r.word[1]);
    }
    // Standard normal by Box-Muller, one per counter.
    double normal_at(uint64_t counter) const {
        const Block r = at(counter);
        const double u = uniform(r.word[0], r.word[1]), v = uniform(r.word[2], r.word[3]);
        return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586476925 * v);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3  Text
// ---------------------------------------------------------------------------------------------------------------------

// Whole-string number parsing: no blanks, no trailing characters, no overflow. False if `s` is not such a number.
inline bool parse_int(const std::string& s, int64* out) {
    if (s.empty() || isspace(uint8_t(s[0]))) return false;
    char* end = nullptr;
    errno = 0;
    const long long v = strtoll(s.c_str(), &end, 10);
    if (errno || end != s.c_str() + s.size()) return false;  // not *end: a NUL may stand in the middle
    *out = v;
    return true;
}
inline bool parse_uint(const std::string& s, uint64_t* out) {
    if (s.empty() || !isdigit(uint8_t(s[0]))) return false;
    char* end = nullptr;
    errno = 0;
    const unsigned long long v = strtoull(s.c_str(), &end, 10);
    if (errno || end != s.c_str() + s.size()) return false;
    *out = v;
    return true;
}
inline bool parse_double(const std::string& s, double* out) {
    if (s.empty() || !(isdigit(uint8_t(s[0])) || s[0] == '-' || s[0] == '.')) return false;
    if (s.find_first_of("xXnN") != std::string::npos) return false;  // no hexadecimal, no nan, no inf
    char* end = nullptr;
    errno = 0;
    const double v = strtod(s.c_str(), &end);
    if (end != s.c_str() + s.size() || !std::isfinite(v)) return false;
    *out = v;
    return true;
}
// The shortest decimal form that reads back as the same double.
inline std::string to_text(double v) {
    if (v == std::floor(v) && std::fabs(v) < 1e15) return format("%.0f", v);  // 100, not 1e+02
    for (int digits = 1; digits < 17; ++digits) {
        std::string s = format("%.*g", digits, v);
        if (strtod(s.c_str(), nullptr) == v) return s;
    }
    return format("%.17g", v);
}

// Numbers for people: 5,324,088 and 21.3 MB.
inline std::string with_commas(int64 n) {
    std::string s = std::to_string(n);
    for (int64 i = int64(s.size()) - 3; i > (n < 0 ? 1 : 0); i -= 3) s.insert(size_t(i), ",");
    return s;
}
inline std::string byte_text(double bytes) {
    static const char* const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    int unit = 0;
    for (; bytes >= 999.5 && unit < 6; ++unit) bytes /= 1000;
    return format(unit == 0 || bytes >= 99.95 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
}
inline double wall_seconds() {  // since some fixed moment
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Length in bytes of the UTF-8 sequence at s[0..n): 1..4 if whole and valid, 0 if it is a valid beginning cut short by
// the end of the text, -1 if it can never become valid (overlong forms and surrogates included).
inline int utf8_sequence(const char* s, size_t n) {
    const auto byte = [&](size_t i) { return uint8_t(s[i]); };
    if (n == 0) return 0;
    const uint8_t b = byte(0);
    if (b < 0x80) return 1;
    const int len = b >= 0xC2 && b <= 0xDF ? 2 : b >= 0xE0 && b <= 0xEF ? 3 : b >= 0xF0 && b <= 0xF4 ? 4 : -1;
    if (len < 0) return -1;
    for (int i = 1; i < len; ++i) {
        if (size_t(i) >= n) return 0;
        uint8_t lo = 0x80, hi = 0xBF;
        if (i == 1) {
            if (b == 0xE0) lo = 0xA0;
            if (b == 0xED) hi = 0x9F;
            if (b == 0xF0) lo = 0x90;
            if (b == 0xF4) hi = 0x8F;
        }
        if (byte(size_t(i)) < lo || byte(size_t(i)) > hi) return -1;
    }
    return len;
}

inline void append_utf8(std::string* s, uint32_t cp) {
    if (cp < 0x80) {
        *s += char(cp);
    } else if (cp < 0x800) {
        *s += char(0xC0 | cp >> 6);
        *s += char(0x80 | (cp & 63));
    } else if (cp < 0x10000) {
        *s += char(0xE0 | cp >> 12);
        *s += char(0x80 | (cp >> 6 & 63));
        *s += char(0x80 | (cp & 63));
    } else {
        *s += char(0xF0 | cp >> 18);
        *s += char(0x80 | (cp >> 12 & 63));
        *s += char(0x80 | (cp >> 6 & 63));
        *s += char(0x80 | (cp & 63));
    }
}

// Printable form of bytes for a message or a streamed sample: whole UTF-8 characters pass, every other byte becomes
// U+FFFD. What may still be completed by later bytes stays in *pending unless `last`.
inline std::string utf8_stream(std::string* pending, const std::string& bytes, bool last) {
    *pending += bytes;
    std::string out;
    size_t i = 0;
    while (i < pending->size()) {
        const int n = utf8_sequence(pending->data() + i, pending->size() - i);
        if (n == 0 && !last) break;
        if (n > 0) {
            out.append(*pending, i, size_t(n));
            i += size_t(n);
        } else {
            out += "\xEF\xBF\xBD";
            ++i;
        }
    }
    pending->erase(0, i);
    return out;
}

// Text for a terminal, which no sampled or foreign text may drive: control characters other than line feed and tab become
// U+FFFD, and a carriage return nothing, since many texts end their lines with one.
inline std::string terminal_text(const std::string& text) {
    std::string s;
    for (const char c : text)
        if ((uint8_t(c) < 0x20 && c != '\n' && c != '\t' && c != '\r') || c == 0x7F) s += "\xEF\xBF\xBD";
        else if (c != '\r') s += c;
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  JSON (RFC 8259, strict: no comments, no trailing commas, no duplicate keys, valid UTF-8, depth at most 64)
// ---------------------------------------------------------------------------------------------------------------------

struct Json {
    enum Type { Null, Bool, Number, String, Array, Object } type = Null;
    bool boolean = false;
    double number = 0;
    std::string text;         // String: the value. Number: as written, so that integers stay exact
    std::vector<Json> items;  // Array
    std::vector<std::pair<std::string, Json>> keys;  // Object, in file order

    Json() = default;
    Json(bool b) : type(Bool), boolean(b) {}
    Json(double d) : type(Number), number(d), text(to_text(d)) {}
    Json(int64 i) : type(Number), number(double(i)), text(std::to_string(i)) {}
    Json(int i) : Json(int64(i)) {}
    Json(const std::string& s) : type(String), text(s) {}
    Json(const char* s) : type(String), text(s) {}
    static Json array() { return of(Array); }
    static Json object() { return of(Object); }

    const Json* find(const std::string& key) const {
        for (const auto& k : keys)
            if (k.first == key) return &k.second;
        return nullptr;
    }
    void set(const std::string& key, Json value) {
        for (auto& k : keys)
            if (k.first == key) {
                k.second = std::move(value);
                return;
            }
        keys.emplace_back(key, std::move(value));
    }
    // An exact integer in the range of int64; false for 1.5, 1e3 and everything else.
    bool integer(int64* out) const { return type == Number && parse_int(text, out); }

    static Json parse(const std::string& text, const std::string& where);  // `where` begins every error message
    std::string dump(int indent = 2) const {
        std::string s;
        write(&s, indent, 0);
        return s;
    }
    static std::string quote(const std::string& s) {
        for (size_t i = 0; i < s.size();) {
            const int n = utf8_sequence(s.data() + i, s.size() - i);
            if (n <= 0) fail("'%s' is not valid UTF-8 and cannot be written as JSON", s.c_str());
            i += size_t(n);
        }
        std::string out = "\"";
        for (const char c : s) {
            if (c == '"' || c == '\\') {
                out += '\\';
                out += c;
            } else if (c == '\n') {
                out += "\\n";
            } else if (c == '\t') {
                out += "\\t";
            } else if (c == '\r') {
                out += "\\r";
            } else if (uint8_t(c) < 0x20) {
                out += format("\\u%04x", unsigned(c));
            } else {
                out += c;
            }
        }
        return out + "\"";
    }

  private:
    static Json of(Type t) {
        Json j;
        j.type = t;
        return j;
    }
    // indent 0 writes one line; otherwise arrays of scalars stay on one line
    void write(std::string* s, int indent, int depth) const {
        const auto newline = [&](int d) {
            if (indent) *s += "\n" + std::string(size_t(indent * d), ' ');
        };
        switch (type) {
            case Null: *s += "null"; break;
            case Bool: *s += boolean ? "true" : "false"; break;
            case Number: *s += text; break;
            case String: *s += quote(text); break;
            case Array:
                *s += '[';
                for (size_t i = 0; i < items.size(); ++i) {
                    if (i) *s += indent ? ", " : ",";
                    items[i].write(s, indent, depth + 1);
                }
                *s += ']';
                break;
            case Object:
                *s += '{';
                for (size_t i = 0; i < keys.size(); ++i) {
                    if (i) *s += ',';
                    newline(depth + 1);
                    *s += quote(keys[i].first) + (indent ? ": " : ":");
                    keys[i].second.write(s, indent, depth + 1);
                }
                if (!keys.empty()) newline(depth);
                *s += '}';
                break;
        }
    }
};

class JsonParser {
  public:
    JsonParser(const std::string& text, const std::string& place) : s(text), where(place) {}
    Json document() {
        Json j = value(0);
        blank();
        if (i != s.size()) bad("unexpected text after the value");
        return j;
    }

  private:
    enum : size_t { longest_number = 512, most_values = size_t(1) << 24 };
    struct Step {
        const std::string* key;  // null: a place in a list
        size_t index;
    };
    const std::string& s;
    const std::string& where;
    size_t i = 0, values = 0;
    std::vector<Step> path;  // from the document to the value at i

    // "..., in model.vocab.a"; nothing at the top
    std::string place() const {
        std::string name;
        for (const Step& p : path)
            name += p.key ? (name.empty() ? "" : ".") + p.key->substr(0, 100) : "[" + std::to_string(p.index) + "]";
        size_t cut = std::min<size_t>(name.size(), 80);
        while (cut > 0 && cut < name.size() && (uint8_t(name[cut]) & 0xC0) == 0x80) --cut;
        const std::string quoted = Json::quote(name.substr(0, cut));  // no control characters
        return path.empty() ? "" : ", in " + quoted.substr(1, quoted.size() - 2) + (cut < name.size() ? "..." : "");
    }
    [[noreturn]] void bad(const char* what) const {
        fail("%s: not valid JSON at byte %zu%s: %s", where.c_str(), i, place().c_str(), what);
    }
    void blank() {
        while (i < s.size() && (s[i] == ' ' || s[i] == '\n' || s[i] == '\t' || s[i] == '\r')) ++i;
    }
    bool take(char c) {
        if (i >= s.size() || s[i] != c) return false;
        ++i;
        return true;
    }
    void word(const char* w) {
        if (s.compare(i, strlen(w), w) != 0) bad("unknown word");
        i += strlen(w);
    }
    Json value(int depth) {
        if (depth > 64) bad("nested deeper than 64 levels");
        if (++values > most_values) bad("more than 16,777,216 values");
        blank();
        if (i >= s.size()) bad("unexpected end");
        switch (s[i]) {
            case 'n': word("null"); return Json();
            case 't': word("true"); return Json(true);
            case 'f': word("false"); return Json(false);
            case '"': return Json(string());
            case '[': return list(depth);
            case '{': return object(depth);
            default: return number();
        }
    }
    Json list(int depth) {
        Json j = Json::array();
        ++i;
        blank();
        if (take(']')) return j;
        for (;;) {
            path.push_back({nullptr, j.items.size()});
            j.items.push_back(value(depth + 1));
            path.pop_back();
            blank();
            if (take(']')) return j;
            if (!take(',')) bad("expected ',' or ']'");
        }
    }
    Json object(int depth) {
        Json j = Json::object();
        std::set<std::string> seen;
        ++i;
        blank();
        if (take('}')) return j;
        for (;;) {
            blank();
            if (i >= s.size() || s[i] != '"') bad("expected a key in quotes");
            std::string key = string();
            if (!seen.insert(key).second) bad("the same key twice");
            blank();
            if (!take(':')) bad("expected ':'");
            path.push_back({&key, 0});
            Json v = value(depth + 1);
            path.pop_back();
            j.keys.emplace_back(std::move(key), std::move(v));
            blank();
            if (take('}')) return j;
            if (!take(',')) bad("expected ',' or '}'");
        }
    }
    bool digit() const { return i < s.size() && s[i] >= '0' && s[i] <= '9'; }
    void digits(size_t from) {  // of the number that begins there
        if (!digit()) bad("expected a digit");
        for (; digit(); ++i)
            if (i - from >= longest_number) bad("a number of more than 512 characters");
    }
    Json number() {
        const size_t from = i;
        take('-');
        if (!digit()) bad("expected a value");
        if (take('0')) {
            if (digit()) bad("a number must not begin with 0");
        } else {
            digits(from);
        }
        if (take('.')) digits(from);
        if (i < s.size() && (s[i] == 'e' || s[i] == 'E')) {
            ++i;
            if (!take('+')) take('-');
            digits(from);
        }
        Json j(0);
        j.text = s.substr(from, i - from);
        j.number = strtod(j.text.c_str(), nullptr);
        if (!std::isfinite(j.number)) bad("a number out of range");
        return j;
    }
    uint32_t hex4() {
        uint32_t v = 0;
        for (int k = 0; k < 4; ++k, ++i) {
            if (i >= s.size() || !isxdigit(uint8_t(s[i]))) bad("expected four hexadecimal digits");
            v = v * 16 + uint32_t(isdigit(uint8_t(s[i])) ? s[i] - '0' : (s[i] | 32) - 'a' + 10);
        }
        return v;
    }
    std::string string() {
        std::string out;
        ++i;
        for (;;) {
            if (i >= s.size()) bad("a string without end");
            const char c = s[i];
            if (c == '"') {
                ++i;
                return out;
            }
            if (uint8_t(c) < 0x20) bad("a control character inside a string");
            if (c != '\\') {
                const int n = utf8_sequence(s.data() + i, s.size() - i);
                if (n <= 0) bad("invalid UTF-8 inside a string");
                out.append(s, i, size_t(n));
                i += size_t(n);
                continue;
            }
            ++i;
            const char e = i < s.size() ? s[i++] : '\0';
            const char* from = "\"\\/bfnrt";
            const char* to = "\"\\/\b\f\n\r\t";
            if (const char* p = e ? strchr(from, e) : nullptr) {
                out += to[p - from];
            } else if (e == 'u') {
                uint32_t cp = hex4();
                if (cp >= 0xD800 && cp < 0xDC00) {
                    if (!take('\\') || !take('u')) bad("a lone surrogate");
                    const uint32_t low = hex4();
                    if (low < 0xDC00 || low > 0xDFFF) bad("a lone surrogate");
                    cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
                } else if (cp >= 0xDC00 && cp < 0xE000) {
                    bad("a lone surrogate");
                }
                append_utf8(&out, cp);
            } else {
                bad("unknown escape");
            }
        }
    }
};

inline Json Json::parse(const std::string& text, const std::string& where) {
    return JsonParser(text, where).document();
}

// ---------------------------------------------------------------------------------------------------------------------
// 5  SHA-256 (FIPS 180-4): says whether data has changed
// ---------------------------------------------------------------------------------------------------------------------

class Sha256 {
  public:
    void add(const void* data, size_t n) {
        const uint8_t* p = static_cast<const uint8_t*>(data);
        total += n;
        while (n) {
            const size_t take = std::min(n, sizeof block - used);
            memcpy(block + used, p, take);
            used += take;
            p += take;
            n -= take;
            if (used == sizeof block) {
                compress();
                used = 0;
            }
        }
    }
    std::string hex() {
        const uint64_t bits = total * 8;
        add("\x80", 1);
        while (used != 56) add("", 1);
        uint8_t length[8];
        for (int i = 0; i < 8; ++i) length[i] = uint8_t(bits >> (56 - 8 * i));
        add(length, 8);
        std::string s;
        for (const uint32_t w : h) s += format("%08x", w);
        return s;
    }

  private:
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block[64];
    size_t used = 0;
    uint64_t total = 0;

    static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }
    void compress() {
        static const uint32_t k[64] = {
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
            0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
            0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
            0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
            0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
            0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
            0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        uint32_t w[64], v[8];
        for (int i = 0; i < 16; ++i)
            w[i] = uint32_t(block[4 * i]) << 24 | uint32_t(block[4 * i + 1]) << 16 | uint32_t(block[4 * i + 2]) << 8 |
                   block[4 * i + 3];
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            const uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + a + w[i - 7] + b;
        }
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; ++i) {
            const uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
            const uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            const uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
            const uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            for (int j = 7; j > 0; --j) v[j] = v[j - 1];
            v[4] += t1;
            v[0] = t1 + t2;
        }
        for (int i = 0; i < 8; ++i) h[i] += v[i];
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 6  Files
// ---------------------------------------------------------------------------------------------------------------------

inline bool is_directory(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}
inline bool file_exists(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0;
}

// All bytes of an open stream, at most `most`; `name` is for the message.
inline std::string read_stream(FILE* f, const std::string& name, size_t most = SIZE_MAX) {
    std::string data;
    char buffer[1 << 16];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) {
        if (n > most - data.size())
            fail("%s: larger than %s, the most supported", name.c_str(), byte_text(double(most)).c_str());
        data.append(buffer, n);
    }
    if (ferror(f)) fail("%s: cannot read: %s", name.c_str(), strerror(errno));
    return data;
}
// The whole file (or pipe) as bytes.
inline std::string read_file(const std::string& path, size_t most = SIZE_MAX) {
    if (is_directory(path)) fail("%s: is a directory, expected a file", path.c_str());
    FILE* f = fopen(path.c_str(), "rb");
    if (!f) fail("%s: cannot read: %s", path.c_str(), strerror(errno));
    const std::unique_ptr<FILE, int (*)(FILE*)> closer(f, fclose);
    return read_stream(f, path, most);
}
// The same where "-" means standard input.
inline std::string read_input(const std::string& path) {
    return path == "-" ? read_stream(stdin, "standard input") : read_file(path);
}

// Makes one directory; one that exists already is fine.
inline void make_directory(const std::string& path) {
    if (mkdir(path.c_str(), 0777) != 0 && !(errno == EEXIST && is_directory(path)))
        fail("%s: cannot create directory: %s", path.c_str(), strerror(errno));
}

// Makes a directory's entries (new names, renames) survive a power cut.
inline void sync_directory(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY);
    if (fd < 0) fail("%s: cannot open directory: %s", path.c_str(), strerror(errno));
    fsync(fd);
    close(fd);
}

// A file being written. Every error, a full disk included, throws and removes the file; finish() returns once the
// bytes are on the disk. A file that was not finished is removed.
class FileWriter {
  public:
    explicit FileWriter(const std::string& file) : path(file), f(fopen(file.c_str(), "wb")) {
        if (!f) fail("%s: cannot write: %s", path.c_str(), strerror(errno));
    }
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;
    ~FileWriter() { discard(); }
    void write(const void* data, size_t n) {
        if (n && fwrite(data, 1, n, f) != n) bad();
    }
    void finish() {
        if (fflush(f) != 0) bad();
        if (fsync(fileno(f)) != 0 && errno != EINVAL) bad();  // EINVAL: a pipe or device, which has nothing to sync
        FILE* g = f;
        f = nullptr;
        if (fclose(g) != 0) bad();
    }

  private:
    std::string path;
    FILE* f;
    void discard() {
        if (f) {
            fclose(f);
            f = nullptr;
            struct stat st;
            if (stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode)) unlink(path.c_str());
        }
    }
    [[noreturn]] void bad() {
        const int e = errno;
        discard();
        fail("%s: cannot write: %s", path.c_str(), strerror(e));
    }
};

inline void write_file(const std::string& path, const std::string& data) {
    FileWriter w(path);
    w.write(data.data(), data.size());
    w.finish();
}

inline std::string parent_directory(const std::string& path) {
    const size_t slash = path.find_last_of('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// Do two paths lead to one regular file?
inline bool same_file(const std::string& a, const std::string& b) {
    struct stat x, y;
    return stat(a.c_str(), &x) == 0 && stat(b.c_str(), &y) == 0 && S_ISREG(x.st_mode) && x.st_dev == y.st_dev &&
           x.st_ino == y.st_ino;
}

// Replaces a file so that a reader, or a kill at any instant, sees the old or the new contents, never a mixture. A link
// stays one; a device or a pipe, which a rename would replace by a file, is written to.
inline void replace_file(const std::string& name, const std::string& data) {
    struct stat st;
    const bool exists = stat(name.c_str(), &st) == 0;
    if (exists && !S_ISREG(st.st_mode)) {
        write_file(name, data);
        return;
    }
    const std::unique_ptr<char, void (*)(void*)> target(exists ? realpath(name.c_str(), nullptr) : nullptr, free);
    const std::string path = target ? target.get() : name;
    write_file(path + ".tmp", data);
    if (rename((path + ".tmp").c_str(), path.c_str()) != 0) {
        const int e = errno;
        unlink((path + ".tmp").c_str());
        fail("%s: cannot replace: %s", path.c_str(), strerror(e));
    }
    sync_directory(parent_directory(path));
}

// ---------------------------------------------------------------------------------------------------------------------
// 7  Named tensors: the safetensors format (8 bytes header length, JSON header, raw little-endian data)
// ---------------------------------------------------------------------------------------------------------------------

enum class DType { F32, F64, BF16, F16, I64, I32 };
inline const char* dtype_name(DType t) {
    static const char* const names[] = {"F32", "F64", "BF16", "F16", "I64", "I32"};
    return names[int(t)];
}
inline int64 dtype_size(DType t) {
    static const int sizes[] = {4, 8, 2, 2, 8, 4};
    return sizes[int(t)];
}

using Shape = std::vector<int64>;
inline int64 element_count(const Shape& shape) {
    int64 n = 1;
    for (const int64 d : shape) n *= d;
    return n;
}
inline std::string to_text(const Shape& shape) {
    std::string s = "(";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? "," : "") + std::to_string(shape[i]);
    return s + ")";
}

// A tensor to be written: borrowed memory of element_count(shape) elements of `dtype`.
struct TensorView {
    std::string name;
    DType dtype;
    Shape shape;
    const void* data;
};

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "tensor files are little-endian and are read without swapping");

inline void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors,
                              const std::vector<std::pair<std::string, std::string>>& metadata = {}) {
    Json header = Json::object();
    if (!metadata.empty()) {
        Json m = Json::object();
        for (const auto& kv : metadata) m.set(kv.first, kv.second);
        header.keys.emplace_back("__metadata__", m);
    }
    int64 offset = 0;
    for (const TensorView& t : tensors) {
        const int64 bytes = element_count(t.shape) * dtype_size(t.dtype);
        Json e = Json::object(), shape = Json::array(), range = Json::array();
        for (const int64 d : t.shape) shape.items.emplace_back(d);
        range.items = {Json(offset), Json(offset + bytes)};
        e.keys = {{"dtype", dtype_name(t.dtype)}, {"shape", shape}, {"data_offsets", range}};
        header.keys.emplace_back(t.name, std::move(e));
        offset += bytes;
    }
    std::string text = header.dump(0);
    text.append((8 - text.size() % 8) % 8, ' ');  // data begins at a multiple of 8
    const uint64_t length = text.size();
    FileWriter w(path);
    w.write(&length, 8);
    w.write(text.data(), text.size());
    for (const TensorView& t : tensors) w.write(t.data, size_t(element_count(t.shape) * dtype_size(t.dtype)));
    w.finish();
}

// An open safetensors file. The constructor checks the whole header: length, JSON, each dtype, shape and byte range,
// and that the ranges cover the data exactly once.
class SafeTensors {
  public:
    struct Entry {
        std::string name;
        DType dtype;
        Shape shape;
        int64 begin, end;  // bytes from the start of the data
    };
    std::string path;
    std::vector<Entry> entries;  // in file order
    std::map<std::string, std::string> metadata;

    explicit SafeTensors(const std::string& file) : path(file) {
        if (is_directory(path)) fail("%s: is a directory, expected a .safetensors file", path.c_str());
        f.reset(fopen(path.c_str(), "rb"));
        if (!f) fail("%s: cannot read: %s", path.c_str(), strerror(errno));
        struct stat st;
        if (fstat(fileno(f.get()), &st) != 0 || !S_ISREG(st.st_mode)) fail("%s: not a regular file", path.c_str());
        const int64 size = st.st_size;
        uint64_t length = 0;
        if (size < 8 || fread(&length, 1, 8, f.get()) != 8)
            fail("%s: %lld bytes are too few for a safetensors file", path.c_str(), (long long)size);
        if (length > 100000000 || int64(length) > size - 8)
            fail("%s: header length is %llu bytes, but the file has %lld", path.c_str(), (unsigned long long)length,
                 (long long)size);
        std::string text(length, '\0');
        if (fread(&text[0], 1, length, f.get()) != length) fail("%s: cannot read the header", path.c_str());
        data_start = 8 + int64(length);
        const Json header = Json::parse(text, path + ": header");
        if (header.type != Json::Object) fail("%s: header: expected a JSON object", path.c_str());
        for (const auto& key : header.keys) {
            if (key.first == "__metadata__") read_metadata(key.second);
            else entries.push_back(read_entry(key.first, key.second));
        }
        std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
            return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
        });
        int64 at = 0;
        for (const Entry& e : entries) {
            if (e.begin != at)
                fail("%s: tensor '%s': data begins at byte %lld, expected %lld (a hole or an overlap)", path.c_str(),
                     e.name.c_str(), (long long)e.begin, (long long)at);
            at = e.end;
        }
        if (data_start + at != size)
            fail("%s: the header promises %lld bytes of data, the file has %lld (truncated or too long)", path.c_str(),
                 (long long)at, (long long)(size - data_start));
    }

    const Entry* find(const std::string& name) const {
        for (const Entry& e : entries)
            if (e.name == name) return &e;
        return nullptr;
    }

    // Reads a tensor of any floating dtype as T (float or double); refuses NaN and infinity unless told otherwise.
    template <class T>
    void read(const Entry& e, T* out, bool must_be_finite = true) const {
        const int64 n = element_count(e.shape), width = dtype_size(e.dtype);
        if (e.dtype == DType::I64 || e.dtype == DType::I32)
            fail("%s: tensor '%s' is %s, expected floating-point numbers", path.c_str(), e.name.c_str(),
                 dtype_name(e.dtype));
        const int64 block = 1 << 16;
        std::vector<char> buffer(size_t(block * width));
        seek(e);
        for (int64 i = 0; i < n; i += block) {
            const int64 m = std::min(block, n - i);
            if (fread(buffer.data(), size_t(width), size_t(m), f.get()) != size_t(m))
                fail("%s: tensor '%s': cannot read its data", path.c_str(), e.name.c_str());
            for (int64 j = 0; j < m; ++j) {
                const double v = decode(buffer.data() + j * width, e.dtype);
                if (must_be_finite && !std::isfinite(v))
                    fail("%s: tensor '%s': element %lld is %g, expected a finite number", path.c_str(), e.name.c_str(),
                         (long long)(i + j), v);
                out[i + j] = T(v);
                if (must_be_finite && !std::isfinite(out[i + j]))
                    fail("%s: tensor '%s': element %lld is %g, which is out of range", path.c_str(), e.name.c_str(),
                         (long long)(i + j), v);
            }
        }
    }
    // Integers as T, which must hold them: int64, or double where they are known to be small.
    template <class T>
    void read_integers(const Entry& e, T* out) const {
        if (e.dtype != DType::I64 && e.dtype != DType::I32)
            fail("%s: tensor '%s' is %s, expected integers", path.c_str(), e.name.c_str(), dtype_name(e.dtype));
        seek(e);
        for (int64 i = 0; i < element_count(e.shape); ++i) {
            int64 wide = 0;
            int32_t narrow = 0;
            if (e.dtype == DType::I64 ? fread(&wide, 8, 1, f.get()) != 1 : fread(&narrow, 4, 1, f.get()) != 1)
                fail("%s: tensor '%s': cannot read its data", path.c_str(), e.name.c_str());
            out[i] = T(e.dtype == DType::I64 ? wide : narrow);
        }
    }
    int64 read_integer(const Entry& e) const {
        int64 value = 0;
        if (element_count(e.shape) != 1 || (e.dtype != DType::I64 && e.dtype != DType::I32))
            fail("%s: tensor '%s' is %s %s, expected one integer", path.c_str(), e.name.c_str(), dtype_name(e.dtype),
                 to_text(e.shape).c_str());
        read_integers(e, &value);
        return value;
    }

  private:
    struct Close {
        void operator()(FILE* p) const { fclose(p); }
    };
    std::unique_ptr<FILE, Close> f;
    int64 data_start = 0;

    void seek(const Entry& e) const {
        if (fseeko(f.get(), off_t(data_start + e.begin), SEEK_SET) != 0)
            fail("%s: tensor '%s': cannot seek", path.c_str(), e.name.c_str());
    }
    static double decode(const char* p, DType t) {
        float f32;
        double f64;
        uint16_t h;
        switch (t) {
            case DType::F32: memcpy(&f32, p, 4); return f32;
            case DType::F64: memcpy(&f64, p, 8); return f64;
            case DType::BF16: {
                memcpy(&h, p, 2);
                const uint32_t bits = uint32_t(h) << 16;
                memcpy(&f32, &bits, 4);
                return f32;
            }
            default: {  // F16: sign, 5 bits of exponent (bias 15), 10 bits of fraction
                memcpy(&h, p, 2);
                const int exponent = h >> 10 & 31, fraction = h & 1023;
                const double v = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                                : std::ldexp(fraction, -24);
                return h >> 15 ? -v : v;
            }
        }
    }
    void read_metadata(const Json& m) {
        if (m.type != Json::Object) fail("%s: header: __metadata__ must be an object", path.c_str());
        for (const auto& kv : m.keys) {
            if (kv.second.type != Json::String)
                fail("%s: header: __metadata__.%s must be a string", path.c_str(), kv.first.c_str());
            metadata[kv.first] = kv.second.text;
        }
    }
    Entry read_entry(const std::string& name, const Json& j) const {
        const auto bad = [&](const char* what) { fail("%s: tensor '%s': %s", path.c_str(), name.c_str(), what); };
        if (j.type != Json::Object) bad("its header entry must be an object");
        for (const auto& k : j.keys)
            if (k.first != "dtype" && k.first != "shape" && k.first != "data_offsets")
                fail("%s: tensor '%s': unknown header field '%s'", path.c_str(), name.c_str(), k.first.c_str());
        const Json *dtype = j.find("dtype"), *shape = j.find("shape"), *range = j.find("data_offsets");
        Entry e;
        e.name = name;
        if (!dtype || dtype->type != Json::String) bad("dtype is missing or not a string");
        int type = 0;
        while (type <= int(DType::I32) && dtype->text != dtype_name(DType(type))) ++type;
        if (type > int(DType::I32))
            fail("%s: tensor '%s': dtype '%s' is not supported (F32, F64, BF16, F16, I64, I32)", path.c_str(),
                 name.c_str(), dtype->text.c_str());
        e.dtype = DType(type);
        if (!shape || shape->type != Json::Array || shape->items.size() > 16) bad("shape is missing or not a list");
        int64 bytes = dtype_size(e.dtype);
        for (const Json& d : shape->items) {
            int64 n;
            if (!d.integer(&n) || n < 0) bad("shape has an entry that is not a size");
            if (__builtin_mul_overflow(bytes, n, &bytes)) bad("shape is too large");
            e.shape.push_back(n);
        }
        if (!range || range->type != Json::Array || range->items.size() != 2 || !range->items[0].integer(&e.begin) ||
            !range->items[1].integer(&e.end) || e.begin < 0 || e.end < e.begin)
            bad("data_offsets is missing or not a pair of increasing byte offsets");
        if (e.end - e.begin != bytes)
            fail("%s: tensor '%s': data_offsets span %lld bytes, but %s %s needs %lld", path.c_str(), name.c_str(),
                 (long long)(e.end - e.begin), dtype_name(e.dtype), to_text(e.shape).c_str(), (long long)bytes);
        return e;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 8  Options
// ---------------------------------------------------------------------------------------------------------------------

// Edit distance, for "did you mean".
inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t up = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
            diagonal = up;
        }
    }
    return row[b.size()];
}
inline std::string nearest_word(const std::string& word, const std::vector<std::string>& words) {
    std::string best;
    size_t distance = SIZE_MAX;
    for (const std::string& w : words)
        if (edit_distance(word, w) < distance) {
            distance = edit_distance(word, w);
            best = w;
        }
    return best;
}

// One table per program. add() binds a long option to a variable whose value at that moment is the default; parse()
// fills the variables. `--name value` and `--name=value` both work; a list option takes every word up to the next
// option; a bool may stand alone for true.
class Options {
  public:
    enum class Kind { Int, Uint, Double, Bool, Text, List };

    Options(const std::string& program_name, const std::string& usage_text)
        : program(program_name), usage(usage_text) {}

    void section(const std::string& title) { pending_section = title; }
    void add(const char* name, int64* v, const char* help, int64 low = INT64_MIN, int64 high = INT64_MAX) {
        push(name, Kind::Int, v, help);
        table.back().low = double(low);
        table.back().high = double(high);
    }
    void add(const char* name, uint64_t* v, const char* help) { push(name, Kind::Uint, v, help); }
    void add(const char* name, double* v, const char* help, double low = -HUGE_VAL, double high = HUGE_VAL) {
        push(name, Kind::Double, v, help);
        table.back().low = low;
        table.back().high = high;
    }
    void add(const char* name, bool* v, const char* help) { push(name, Kind::Bool, v, help); }
    void add(const char* name, std::string* v, const char* help) { push(name, Kind::Text, v, help); }
    void add(const char* name, std::vector<std::string>* v, const char* help) { push(name, Kind::List, v, help); }

    // Parses argv[first..argc). Returns false after printing --help. Words that are not options go to *positional;
    // where that is null they are refused.
    bool parse(int argc, const char* const* argv, int first, std::vector<std::string>* positional = nullptr) {
        for (int i = first; i < argc; ++i) {
            std::string word = argv[i], value;
            if (word == "--help" || word == "-h") {
                print_help();
                return false;
            }
            if (word.compare(0, 2, "--") != 0) {
                if (!positional) usage_error("unexpected word '%s' (options begin with --)", word.c_str());
                positional->push_back(word);
                continue;
            }
            const size_t equals = word.find('=');
            const bool inline_value = equals != std::string::npos;
            if (inline_value) {
                value = word.substr(equals + 1);
                word.resize(equals);
            }
            Option& o = lookup(word.substr(2));
            const auto next_is_value = [&] { return i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0; };
            if (o.kind == Kind::List) {
                auto* list = static_cast<std::vector<std::string>*>(o.variable);
                list->clear();
                if (inline_value) list->push_back(value);
                while (!inline_value && next_is_value()) list->push_back(argv[++i]);
                if (list->empty()) usage_error("--%s needs at least one value", o.name.c_str());
                o.given = true;
                continue;
            }
            if (!inline_value) {
                if (o.kind == Kind::Bool) {
                    const std::string next = next_is_value() ? argv[i + 1] : "";
                    value = next == "true" || next == "false" ? argv[++i] : "true";
                } else {
                    if (!next_is_value())
                        usage_error("--%s needs a value (one that begins with -- is given as --%s=VALUE)",
                                    o.name.c_str(), o.name.c_str());
                    value = argv[++i];
                }
            }
            assign(o, value);
            o.given = true;
        }
        return true;
    }

    bool given(const std::string& name) const {
        for (const Option& o : table)
            if (o.name == name) return o.given;
        return false;
    }
    std::vector<std::string> given_names() const {
        std::vector<std::string> names;
        for (const Option& o : table)
            if (o.given) names.push_back(o.name);
        return names;
    }
    // Every setting as JSON text or list of texts, and back: how a run remembers its options.
    Json to_json() const {
        Json j = Json::object();
        for (const Option& o : table) {
            if (o.kind == Kind::List) {
                Json list = Json::array();
                for (const std::string& s : *static_cast<std::vector<std::string>*>(o.variable))
                    list.items.emplace_back(s);
                j.keys.emplace_back(o.name, list);
            } else {
                j.keys.emplace_back(o.name, text_of(o));
            }
        }
        return j;
    }
    void from_json(const Json& j, const std::string& where) {
        for (Option& o : table) {
            const Json* v = j.find(o.name);
            if (!v) fail("%s: setting '%s' is missing", where.c_str(), o.name.c_str());
            const bool list = o.kind == Kind::List;
            if (v->type != (list ? Json::Array : Json::String))
                fail("%s: setting '%s' has the wrong type", where.c_str(), o.name.c_str());
            if (!list) {
                try {
                    assign(o, v->text);
                } catch (const UsageError& e) {
                    fail("%s: setting %s", where.c_str(), e.what());
                }
                continue;
            }
            auto* items = static_cast<std::vector<std::string>*>(o.variable);
            items->clear();
            for (const Json& s : v->items) {
                if (s.type != Json::String) fail("%s: setting '%s' has the wrong type", where.c_str(), o.name.c_str());
                items->push_back(s.text);
            }
        }
    }

    void print_help() const {
        printf("%s\n", usage.c_str());
        for (const Option& o : table) {
            if (!o.section.empty()) printf("\n%s\n", o.section.c_str());
            static const char* const value[] = {" N", " N", " X", "", " TEXT", " ..."};
            const std::string left = "  --" + o.name + value[int(o.kind)];
            std::string d = o.kind == Kind::List ? "" : o.default_text;
            if (!d.empty()) d = " [" + d + "]";
            printf("%-24s %s%s\n", left.c_str(), o.help.c_str(), d.c_str());
        }
        printf("  %-22s %s\n", "--help", "print this and exit");
    }
    // "name value" pairs, wrapped to `width` columns; lists and empty texts are left out.
    std::string echo(size_t width = 110) const {
        std::string out, line;
        for (const Option& o : table) {
            const std::string v = o.kind == Kind::List ? "" : text_of(o);
            if (v.empty()) continue;
            const std::string word = o.name + "=" + v;
            if (!line.empty() && line.size() + word.size() + 2 > width) {
                out += line + "\n";
                line.clear();
            }
            line += (line.empty() ? "" : "  ") + word;
        }
        return out + line + "\n";
    }

  private:
    struct Option {
        std::string name, help, section, default_text;
        Kind kind;
        void* variable;
        double low = -HUGE_VAL, high = HUGE_VAL;
        bool given = false;
    };
    std::string program, usage, pending_section;
    std::vector<Option> table;

    void push(const char* name, Kind kind, void* v, const char* help) {
        Option o;
        o.name = name;
        o.kind = kind;
        o.variable = v;
        o.help = help;
        o.section = pending_section;
        pending_section.clear();
        if (kind != Kind::List) o.default_text = text_of(o);
        table.push_back(o);
    }
    static std::string text_of(const Option& o) {
        switch (o.kind) {
            case Kind::Int: return std::to_string(*static_cast<int64*>(o.variable));
            case Kind::Uint: return std::to_string(*static_cast<uint64_t*>(o.variable));
            case Kind::Double: return to_text(*static_cast<double*>(o.variable));
            case Kind::Bool: return *static_cast<bool*>(o.variable) ? "true" : "false";
            default: return *static_cast<std::string*>(o.variable);
        }
    }
    Option& lookup(const std::string& name) {
        std::vector<std::string> names = {"help"};
        for (Option& o : table) {
            if (o.name == name) return o;
            names.push_back(o.name);
        }
        usage_error("unknown option --%s; did you mean --%s?", name.c_str(), nearest_word(name, names).c_str());
    }
    static void assign(Option& o, const std::string& text) {
        static const char* const wanted[] = {"an integer", "a non-negative integer", "a number", "true or false"};
        const auto bad = [&]() {
            usage_error("--%s: '%s' is not %s", o.name.c_str(), text.c_str(), wanted[int(o.kind)]);
        };
        const auto check = [&](double v) {
            if (v >= o.low && v <= o.high) return;
            if (o.high == HUGE_VAL || o.high >= 9e18)
                usage_error("--%s: %s is below %s", o.name.c_str(), text.c_str(), to_text(o.low).c_str());
            usage_error("--%s: %s is outside %s..%s", o.name.c_str(), text.c_str(), to_text(o.low).c_str(),
                        to_text(o.high).c_str());
        };
        int64 i = 0;
        uint64_t u = 0;
        double d = 0;
        switch (o.kind) {
            case Kind::Int:
                if (!parse_int(text, &i)) bad();
                check(double(i));
                *static_cast<int64*>(o.variable) = i;
                break;
            case Kind::Uint:
                if (!parse_uint(text, &u)) bad();
                *static_cast<uint64_t*>(o.variable) = u;
                break;
            case Kind::Double:
                if (!parse_double(text, &d)) bad();
                check(d);
                *static_cast<double*>(o.variable) = d;
                break;
            case Kind::Bool:
                if (text != "true" && text != "false") bad();
                *static_cast<bool*>(o.variable) = text == "true";
                break;
            default: *static_cast<std::string*>(o.variable) = text;
        }
    }
};
