// tokenizer.cpp: text to token ids and back, by byte-level byte-pair encoding (BPE).
//
// A text is cut at its special tokens, normalised if the tokenizer asks for it, split into pre-tokens (a word with the
// blank before it, a number, ...), and the bytes of each pre-token are joined pair by pair in the order in which the
// merges were learnt. Ids, files and training agree with Hugging Face's `tokenizers`; docs/tokenizer.md has a worked
// example. The byte tokenizer is the case of no merges, where a token's id is its byte.
//
//   1  characters          classes of characters, NFC, the byte alphabet
//   2  pre-tokens          the split patterns gpt2 and cl100k
//   3  Bpe                 vocabulary, merges, encode, decode
//   4  tokenizer.json      writing; reading, with a clear refusal of what is not supported
//   5  training            which merges a text asks for
//   6  token files         the llm.c .bin layouts
//   7  the program
#include <deque>
#include <unordered_map>

#include "transxssm.h"
#include "unicode.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1  Characters
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// What the split patterns tell apart: \p{L}, \p{N}, \s and the rest.
enum CharClass : uint8_t { Other, Letter, Number, Space };

// The next number of a table in unicode.h; its digits are explained in test/make_unicode.py.
uint32_t table_number(const char** p) {
    uint32_t v = 0;
    for (;;) {
        const uint32_t digit = uint32_t(*(*p)++ - '#');
        v = v * 28 + digit % 28;
        if (digit < 28) return v;
    }
}

// The class of every code point, and whether it is in \w, a character of a word.
struct CharTables {
    std::vector<uint8_t> classes = std::vector<uint8_t>(0x110000, Other);
    std::vector<bool> in_word = std::vector<bool>(0x110000, false);
    CharTables() {
        size_t at = 0;
        for (const char* p = unicode_classes; *p;) {
            at += table_number(&p);
            const uint32_t run = table_number(&p), kind = run % 4;
            for (const size_t end = at + run / 4; at < end; ++at) {
                classes[at] = kind == 0 ? Letter : kind < 3 ? Number : Other;
                in_word[at] = kind != 2;
            }
        }
        for (uint32_t s : {0x09u, 0x0Au, 0x0Bu, 0x0Cu, 0x0Du, 0x20u, 0x85u, 0xA0u, 0x1680u, 0x2028u, 0x2029u, 0x202Fu,
                           0x205Fu, 0x3000u})
            classes[s] = Space;
        for (uint32_t s = 0x2000; s <= 0x200A; ++s) classes[s] = Space;
    }
    static const CharTables& get() {
        static const CharTables tables;
        return tables;
    }
};

// The code point of a whole valid UTF-8 sequence of n bytes.
uint32_t code_point(const char* s, int n) {
    const auto low = [&](int i) { return uint32_t(uint8_t(s[i]) & 63); };
    switch (n) {
        case 1: return uint8_t(s[0]);
        case 2: return uint32_t(uint8_t(s[0]) & 31) << 6 | low(1);
        case 3: return uint32_t(uint8_t(s[0]) & 15) << 12 | low(1) << 6 | low(2);
        default: return uint32_t(uint8_t(s[0]) & 7) << 18 | low(1) << 12 | low(2) << 6 | low(3);
    }
}

// NFC, the composed form of a text. Bytes that are not UTF-8 stay as they are; nothing composes across them.
class Nfc {
  public:
    std::string operator()(const std::string& text) const {
        // Everything below U+0300, whose first byte in UTF-8 is CC, is in NFC already.
        if (std::none_of(text.begin(), text.end(), [](char c) { return uint8_t(c) >= 0xCC; })) return text;
        std::vector<Char> chars;  // decomposed
        for (size_t i = 0; i < text.size();) {
            const int n = utf8_sequence(text.data() + i, text.size() - i);
            if (n > 0) decompose(code_point(&text[i], n), &chars);
            else chars.push_back({stray + uint8_t(text[i]), 0});
            i += size_t(std::max(n, 1));
        }
        for (size_t i = 0; i < chars.size();) {  // marks of a character in the order of their combining classes
            size_t end = i + 1;
            if (chars[i].combining) {
                while (end < chars.size() && chars[end].combining) ++end;
                std::stable_sort(chars.begin() + int64(i), chars.begin() + int64(end),
                                 [](const Char& a, const Char& b) { return a.combining < b.combining; });
            }
            i = end;
        }
        return compose(chars);
    }
    static const Nfc& get() {
        static const Nfc nfc;
        return nfc;
    }

  private:
    struct Char {
        uint32_t code;
        uint8_t combining;  // canonical combining class; 0: a character that marks may follow
    };
    enum : uint32_t { stray = 0x110000 };  // + byte: a byte that is not UTF-8
    // Hangul syllables are arithmetic: a leading consonant, a vowel and perhaps a trailing consonant.
    enum : uint32_t { S = 0xAC00, L = 0x1100, V = 0x1161, T = 0x11A7, Ls = 19, Vs = 21, Ts = 28, Ss = Ls * Vs * Ts };

    std::unordered_map<uint32_t, uint8_t> combining;
    std::unordered_map<uint32_t, std::pair<uint32_t, uint32_t>> parts;  // second part 0: there is none
    std::unordered_map<uint64_t, uint32_t> whole;                       // first part << 32 | second part

    Nfc() {
        uint32_t at = 0;
        for (const char* p = unicode_combining; *p;) {
            at += table_number(&p);
            const uint32_t end = at + table_number(&p), value = table_number(&p);
            for (; at < end; ++at) combining[at] = uint8_t(value);
        }
        at = 0;
        for (const char* p = unicode_decompositions; *p;) {
            const uint32_t step = table_number(&p), first = table_number(&p);
            at += step / 2;
            const uint32_t second = step & 1 ? table_number(&p) : 0;
            parts[at] = {first, second / 2};
            if (second & 1) whole[uint64_t(first) << 32 | second / 2] = at;
        }
    }
    void decompose(uint32_t c, std::vector<Char>* out) const {
        if (c - S < Ss) {
            out->push_back({L + (c - S) / (Vs * Ts), 0});
            out->push_back({V + (c - S) / Ts % Vs, 0});
            if ((c - S) % Ts) out->push_back({T + (c - S) % Ts, 0});
            return;
        }
        const auto p = c < 0xC0 ? parts.end() : parts.find(c);
        if (p != parts.end()) {
            decompose(p->second.first, out);
            if (p->second.second) decompose(p->second.second, out);
            return;
        }
        const auto m = c < 0x300 ? combining.end() : combining.find(c);
        out->push_back({c, m == combining.end() ? uint8_t(0) : m->second});
    }
    uint32_t composed(uint32_t a, uint32_t b) const {  // 0: they do not compose
        if (a - L < Ls && b - V < Vs) return S + ((a - L) * Vs + (b - V)) * Ts;
        if (a - S < Ss && (a - S) % Ts == 0 && b - (T + 1) < Ts - 1) return a + (b - T);
        const auto w = whole.find(uint64_t(a) << 32 | b);
        return w == whole.end() ? 0 : w->second;
    }
    std::string compose(const std::vector<Char>& chars) const {
        std::vector<uint32_t> out;
        size_t starter = SIZE_MAX;  // in out: the last character of combining class 0
        uint8_t last = 0;           // combining class of the last mark kept after it; 0: there is none
        for (const Char& c : chars) {
            if (starter != SIZE_MAX && (c.combining > last || (c.combining == 0 && starter + 1 == out.size())))
                if (const uint32_t w = composed(out[starter], c.code)) {
                    out[starter] = w;
                    continue;
                }
            if (c.combining == 0) starter = out.size();
            last = c.combining;
            out.push_back(c.code);
        }
        std::string text;
        for (const uint32_t c : out) {
            if (c >= stray) text += char(uint8_t(c - stray));
            else append_utf8(&text, c);
        }
        return text;
    }
};

// tokenizer.json is JSON, which holds characters, not bytes; GPT-2 gave every byte a visible character: the printable
// ones of Latin-1 stand for themselves, the other 68 bytes for U+0100, U+0101, ... in their order. (A blank is U+0120.)
std::vector<uint32_t> byte_code_points() {
    std::vector<uint32_t> codes(256);
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) {
        const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        codes[b] = printable ? b : next++;
    }
    return codes;
}
std::vector<std::string> byte_alphabet() {
    std::vector<std::string> characters;
    for (const uint32_t c : byte_code_points()) append_utf8(&characters.emplace_back(), c);
    return characters;
}

// Is a token of tokenizer.json written in the byte alphabet? Its bytes then go to *bytes.
bool in_byte_alphabet(const std::string& token, std::string* bytes) {
    static const std::vector<int> byte_of = [] {
        std::vector<int> of(0x200, -1);
        const std::vector<uint32_t> codes = byte_code_points();
        for (size_t b = 0; b < 256; ++b) of[codes[b]] = int(b);
        return of;
    }();
    for (size_t i = 0; i < token.size();) {
        const int n = utf8_sequence(token.data() + i, token.size() - i);
        const uint32_t c = n > 0 ? code_point(&token[i], n) : UINT32_MAX;
        if (c >= byte_of.size() || byte_of[c] < 0) return false;
        *bytes += char(uint8_t(byte_of[c]));
        i += size_t(n);
    }
    return true;
}
// The bytes that it stands for: one that is not written in the byte alphabet stands for itself.
std::string bytes_of_token(const std::string& token) {
    std::string bytes;
    return in_byte_alphabet(token, &bytes) ? bytes : token;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 2  Pre-tokens
// ---------------------------------------------------------------------------------------------------------------------
// Two regular expressions, written out as loops: nothing backtracks, so that no text takes more than linear time. A byte
// that is not part of valid UTF-8 is a character of its own, neither letter nor number nor space.

namespace {

enum class Pattern { None, Gpt2, Cl100k };

struct PatternName {
    Pattern pattern;
    const char *name, *regex;
};
const PatternName patterns[] = {
    {Pattern::None, "none", ""},
    {Pattern::Gpt2, "gpt2", R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"},
    {Pattern::Cl100k, "cl100k",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
};

class Splitter {
  public:
    Splitter(Pattern p, const char* text, size_t size)
        : pattern(p), s(text), n(size), classes(CharTables::get().classes.data()) {}

    // The end of the pre-token that begins at i < size.
    size_t piece_end(size_t i) const {
        return pattern == Pattern::Gpt2 ? gpt2(i) : pattern == Pattern::Cl100k ? cl100k(i) : n;
    }

  private:
    const Pattern pattern;
    const char* const s;
    const size_t n;
    const uint8_t* const classes;

    struct Char {
        uint8_t kind;
        uint8_t length;
    };
    Char at(size_t i) const {
        const uint8_t b = uint8_t(s[i]);
        if (b < 0x80) return {classes[b], 1};
        const int length = utf8_sequence(s + i, n - i);
        if (length <= 0) return {Other, 1};
        return {classes[code_point(s + i, length)], uint8_t(length)};
    }
    // The end of the run of characters of one class from i on.
    size_t run(uint8_t kind, size_t i) const {
        while (i < n) {
            const Char c = at(i);
            if (c.kind != kind) break;
            i += c.length;
        }
        return i;
    }
    bool newline(size_t i) const { return s[i] == '\n' || s[i] == '\r'; }

    // 's 't 're 've 'm 'll 'd after an apostrophe at i: the end, or i if there is none. (?i: also means that the long s,
    // U+017F, is an s.
    size_t contraction(size_t i, bool any_case) const {
        if (s[i] != '\'' || i + 1 >= n) return i;
        const auto lower = [&](size_t k) { return any_case && s[k] >= 'A' && s[k] <= 'Z' ? char(s[k] | 32) : s[k]; };
        const char a = lower(i + 1);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
        if (i + 2 >= n) return i;
        if (any_case && a == '\xC5' && s[i + 2] == '\xBF') return i + 3;
        const char b = lower(i + 2);
        return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? i + 3 : i;
    }
    // \s+(?!\S)|\s+ at the white space i: all of the run at the end of the text, else all but its last character, which
    // goes with what follows; a run of one is taken whole.
    size_t white_space(size_t i, bool lines) const {
        size_t end = i, last = i, after_newline = 0;
        while (end < n) {
            const Char c = at(end);
            if (c.kind != Space) break;
            last = end;
            if (newline(end)) after_newline = end + 1;
            end += c.length;
        }
        if (lines && after_newline) return after_newline;  // \s*[\r\n]+
        return end == n || last == i ? end : last;
    }
    size_t gpt2(size_t i) const {
        const size_t c = contraction(i, false);
        if (c > i) return c;
        Char first = at(i);
        if (s[i] == ' ' && i + 1 < n) {
            const Char next = at(i + 1);
            if (next.kind != Space) {
                ++i;
                first = next;
            }
        }
        return first.kind == Space ? white_space(i, false) : run(first.kind, i + first.length);
    }
    size_t cl100k(size_t i) const {
        const size_t c = contraction(i, true);
        if (c > i) return c;
        const Char first = at(i);
        const size_t second = i + first.length;
        if (first.kind == Letter) return run(Letter, second);
        if (first.kind == Number) {
            size_t end = second;
            for (int k = 1; k < 3 && end < n; ++k) {
                const Char d = at(end);
                if (d.kind != Number) break;
                end += d.length;
            }
            return end;
        }
        const Char next = second < n ? at(second) : Char{Space, 0};
        if (next.kind == Letter && !newline(i)) return run(Letter, second + next.length);
        if (first.kind == Other || (s[i] == ' ' && next.kind == Other)) {
            size_t end = run(Other, second);
            while (end < n && newline(end)) ++end;
            return end;
        }
        return white_space(i, true);
    }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 3  Bpe
// ---------------------------------------------------------------------------------------------------------------------

namespace {

uint64_t mixed(uint64_t h) {  // the bits of a number, spread evenly (a multiplication and a fold)
    h *= 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}
uint64_t hash_bytes(const char* p, size_t n) {
    uint64_t h = n, word;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&word, p, 8);
        h = mixed(h ^ word);
    }
    word = 0;
    memcpy(&word, p, n);
    return mixed(mixed(h ^ word));
}

// A map from pairs of ids to 32-bit numbers: open addressing, half full at most, so that a look-up is one cache miss.
class PairMap {
  public:
    static uint64_t key(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

    int32_t find(int32_t a, int32_t b) const {  // -1: not there
        if (slots.empty()) return -1;
        const uint64_t k = key(a, b);
        for (size_t i = mixed(k) & mask;; i = (i + 1) & mask) {
            if (slots[i].value < 0) return -1;
            if (slots[i].key == k) return slots[i].value;
        }
    }
    int32_t& operator()(int32_t a, int32_t b) {  // -1 where it is new: the caller sets it
        if (2 * (count + 1) > slots.size()) grow();
        const uint64_t k = key(a, b);
        for (size_t i = mixed(k) & mask;; i = (i + 1) & mask) {
            if (slots[i].value < 0) {
                ++count;
                slots[i].key = k;
                return slots[i].value;
            }
            if (slots[i].key == k) return slots[i].value;
        }
    }

  private:
    struct Slot {
        uint64_t key;
        int32_t value;
    };
    std::vector<Slot> slots;
    size_t mask = 0, count = 0;

    void grow() {
        std::vector<Slot> old(std::max<size_t>(1024, 2 * slots.size()), Slot{0, -1});
        old.swap(slots);
        mask = slots.size() - 1;
        for (const Slot& s : old) {
            if (s.value < 0) continue;
            size_t i = mixed(s.key) & mask;
            while (slots[i].value >= 0) i = (i + 1) & mask;
            slots[i] = s;
        }
    }
};

struct AddedToken {
    int32_t id;
    std::string content;
    bool special, normalized;             // normalized: it is looked for after the normaliser
    bool single_word = false;             // not found beside a character of a word (\w)
    bool lstrip = false, rstrip = false;  // takes the white space before it, after it
};

// Finds added tokens in a text, the longest at the leftmost place. A text is read from its end through a trie of the
// tokens written backwards: what ends in the node reached at byte i begins in the text at i. Where the trie has no child
// for a byte, `fail` leads to the node of the longest shorter text that it has, so that no text takes more than linear
// time (the automaton of Aho and Corasick).
class AddedTokens {
  public:
    void add(const std::string& content, const AddedToken& token) {
        int32_t at = 0;
        for (size_t i = content.size(); i-- > 0;) {
            const uint8_t byte = uint8_t(content[i]);
            int32_t& child = children(at, byte);
            if (child < 0) {
                child = int32_t(nodes.size());
                nodes.push_back({at, byte, nodes[size_t(at)].depth + 1, 0, -1});
            }
            at = child;
        }
        nodes[size_t(at)].token = int32_t(tokens.size());
        tokens.push_back(token);
        lengths.push_back(content.size());
    }
    void finish() {  // after the last add()
        std::vector<int32_t> order;
        for (size_t i = 1; i < nodes.size(); ++i) order.push_back(int32_t(i));
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return nodes[size_t(a)].depth < nodes[size_t(b)].depth; });
        for (const int32_t i : order) {
            Node& v = nodes[size_t(i)];
            ends[v.byte] = ends[v.byte] || v.parent == 0;
            v.fail = v.parent == 0 ? 0 : step(nodes[size_t(v.parent)].fail, v.byte);
            if (v.token < 0) v.token = nodes[size_t(v.fail)].token;
        }
    }
    // The pieces of a text between the tokens go to piece(s, n), the ids of the tokens to found(id).
    template <class Piece, class Found>
    void split(const char* s, size_t n, const Piece& piece, const Found& found) const {
        std::vector<std::pair<size_t, int32_t>> places;  // where tokens begin, from the last; the longest of each place
        if (!tokens.empty()) {
            int32_t at = 0;
            for (size_t i = n; i > 0;) {
                if (at == 0)
                    while (i > 0 && !ends[uint8_t(s[i - 1])]) --i;
                if (i == 0) break;
                at = step(at, uint8_t(s[--i]));
                if (nodes[size_t(at)].token >= 0) places.emplace_back(i, nodes[size_t(at)].token);
            }
        }
        size_t from = 0, end = 0, blank = 0;  // from: what lies before it is done
        for (; !places.empty(); places.pop_back()) {
            if (places.back().first < end) continue;  // inside the token before it
            const AddedToken& t = tokens[size_t(places.back().second)];
            size_t begin = places.back().first;
            end = begin + lengths[size_t(places.back().second)];
            if (t.single_word && (in_word(s, n, begin, true) || in_word(s, n, end, false))) continue;
            if (t.lstrip)
                while (begin > from && is_space(s, n, begin, true)) begin -= length_beside(s, n, begin, true);
            if (begin > from) piece(s + from, begin - from);
            size_t after = end;
            if (t.rstrip) {
                after = std::max(end, blank);
                while (is_space(s, n, after, false)) after += length_beside(s, n, after, false);
                blank = after;  // how far white space was taken
            }
            // A token that is white space itself may begin in what the one before it took. As in Hugging Face's library
            // it is found there all the same, and the text goes on behind it, unless lstrip leaves nothing of it.
            if (!t.lstrip || after > from) found(t.id);
            from = after;
        }
        if (n > from) piece(s + from, n - from);
    }

  private:
    struct Node {
        int32_t parent;
        uint8_t byte;  // from the parent to this node
        int32_t depth;
        int32_t fail;
        int32_t token;  // the longest that ends here; -1: none does
    };
    std::vector<Node> nodes = {{0, 0, 0, 0, -1}};  // node 0 is the root
    PairMap children;                              // (node, byte) -> node
    bool ends[256] = {};                           // bytes that tokens end with
    std::vector<AddedToken> tokens;
    std::vector<size_t> lengths;  // of the tokens in the text, which is normalised

    int32_t step(int32_t at, uint8_t byte) const {
        for (;; at = nodes[size_t(at)].fail) {
            const int32_t child = children.find(at, byte);
            if (child >= 0) return child;
            if (at == 0) return 0;
        }
    }
    // The character that ends (before) or begins at i: its length, 0 if there is none or it is not UTF-8.
    static size_t length_beside(const char* s, size_t n, size_t i, bool before) {
        if (!before) return size_t(std::max(utf8_sequence(s + i, n - i), 0));
        for (size_t k = 1; k <= 4 && k <= i; ++k)
            if (utf8_sequence(s + i - k, k) == int(k)) return k;
        return 0;
    }
    static bool is_space(const char* s, size_t n, size_t i, bool before) {
        const size_t k = length_beside(s, n, i, before);
        return k && CharTables::get().classes[code_point(s + i - (before ? k : 0), int(k))] == Space;
    }
    static bool in_word(const char* s, size_t n, size_t i, bool before) {
        const size_t k = length_beside(s, n, i, before);
        return k && CharTables::get().in_word[code_point(s + i - (before ? k : 0), int(k))];
    }
};

// Queues of (rank, position): pop() gives the lowest rank, and the lowest position of it; false if the queue is empty.
class HeapQueue {
  public:
    void push(uint32_t rank, uint32_t position) {
        heap.push_back(uint64_t(rank) << 32 | position);
        std::push_heap(heap.begin(), heap.end(), std::greater<uint64_t>());
    }
    bool pop(uint32_t* rank, uint32_t* position) {
        if (heap.empty()) return false;
        *rank = uint32_t(heap.front() >> 32);
        *position = uint32_t(heap.front());
        std::pop_heap(heap.begin(), heap.end(), std::greater<uint64_t>());
        heap.pop_back();
        return true;
    }

  private:
    std::vector<uint64_t> heap;
};

// The same for long pre-tokens. A merge goes through a text from left to right, so that the positions of a rank mostly
// come in order: they are kept as a list, and only those out of order in a heap. A run of ten million blanks, where each
// rank has millions of positions, then takes linear time.
class RankQueue {
  public:
    void push(uint32_t rank, uint32_t position) {
        if (rank >= slots.size()) slots.resize(std::max<size_t>(rank + 1, 2 * slots.size()));
        Slot& s = slots[rank];
        if (s.in_order.empty() && s.others.empty()) {
            ranks.push_back(rank);
            std::push_heap(ranks.begin(), ranks.end(), std::greater<uint32_t>());
        }
        if (s.in_order.empty() || position >= s.in_order.back()) {
            s.in_order.push_back(position);
        } else {
            s.others.push_back(position);
            std::push_heap(s.others.begin(), s.others.end(), std::greater<uint32_t>());
        }
    }
    bool pop(uint32_t* rank, uint32_t* position) {
        if (ranks.empty()) return false;
        *rank = ranks.front();
        Slot& s = slots[*rank];
        if (s.others.empty() || (s.taken < s.in_order.size() && s.in_order[s.taken] <= s.others.front())) {
            *position = s.in_order[s.taken++];
        } else {
            *position = s.others.front();
            std::pop_heap(s.others.begin(), s.others.end(), std::greater<uint32_t>());
            s.others.pop_back();
        }
        if (s.taken == s.in_order.size() && s.others.empty()) {
            s = Slot();
            std::pop_heap(ranks.begin(), ranks.end(), std::greater<uint32_t>());
            ranks.pop_back();
        }
        return true;
    }

  private:
    struct Slot {
        std::vector<uint32_t> in_order, others;
        size_t taken = 0;  // of in_order
    };
    std::vector<Slot> slots;      // by rank
    std::vector<uint32_t> ranks;  // a heap of those that have positions
};

class Bpe : public Tokenizer {
  public:
    std::string file_text;            // tokenizer.json
    std::vector<std::string> tokens;  // id -> bytes; an id that no token has is ""
    int32_t byte_ids[256];            // the tokens of single bytes
    PairMap merges;                   // pair of ids -> rank
    std::vector<int32_t> merged;      // rank -> id of the token that the merge makes
    std::vector<AddedToken> added;
    Pattern pattern = Pattern::None;
    bool nfc = false;            // normalise to NFC
    bool ignore_merges = false;  // a pre-token that is a token is that token, whatever the merges say
    std::unordered_map<std::string, int32_t> id_of;  // bytes -> id, where ignore_merges needs it

    void index_added() {
        for (const AddedToken& a : added) {
            if (a.normalized) after.add(nfc ? Nfc::get()(a.content) : a.content, a);
            else before.add(a.content, a);
            for (const char* end : {"<|endoftext|>", "<|end_of_text|>", "</s>"})
                if (a.content == end && (end_id < 0 || end[1] == '|')) end_id = a.id;
        }
        before.finish();
        after.finish();
    }

    int64 vocab_size() const override { return int64(tokens.size()); }
    std::string bytes_of(int32_t id) const override {
        if (id < 0 || size_t(id) >= tokens.size())
            fail("token id %d is outside the vocabulary of %zu", id, tokens.size());
        return tokens[size_t(id)];
    }
    int32_t end_of_text() const override { return end_id; }
    std::string json() const override { return file_text; }

    std::vector<int32_t> encode(const std::string& text) const override {
        Encoder e(*this);
        e.ids.reserve(text.size() / 3);
        const auto found = [&](int32_t id) { e.ids.push_back(id); };
        before.split(
            text.data(), text.size(),
            [&](const char* s, size_t n) {
                if (nfc) {
                    e.normalised.push_back(Nfc::get()(std::string(s, n)));
                    s = e.normalised.back().data();
                    n = e.normalised.back().size();
                }
                after.split(
                    s, n, [&](const char* t, size_t m) { e.text(t, m); }, found);
            },
            found);
        return std::move(e.ids);
    }

  private:
    AddedTokens before, after;  // looked for before and after the normaliser
    int32_t end_id = -1;

    // One call of encode(). The pre-tokens seen so far are remembered by where their bytes and their ids lie.
    struct Encoder {
        const Bpe& bpe;
        std::vector<int32_t> ids;
        std::deque<std::string> normalised;  // texts, which must not move

        explicit Encoder(const Bpe& b) : bpe(b) {}

        void text(const char* s, size_t n) {
            if (bpe.merged.empty() && !bpe.ignore_merges) {
                for (size_t i = 0; i < n; ++i) ids.push_back(bpe.byte_ids[uint8_t(s[i])]);
                return;
            }
            const Splitter split(bpe.pattern, s, n);
            for (size_t i = 0; i < n;) {
                const size_t end = split.piece_end(i);
                piece(s + i, end - i);
                i = end;
            }
        }

      private:
        struct Seen {
            const char* text;
            size_t first;  // its ids are ids[first .. first + count)
            uint32_t hash, length, count;
        };
        std::vector<Seen> seen;  // open addressing; text is null where a slot is free
        size_t used = 0;
        enum : size_t { longest_seen = 128, most_seen = size_t(1) << 21 };

        void piece(const char* s, size_t n) {
            if (n == 1) {
                ids.push_back(bpe.byte_ids[uint8_t(*s)]);
                return;
            }
            if (n > longest_seen) {
                join(s, n);
                return;
            }
            if (2 * (used + 1) > seen.size() && used < most_seen) grow();
            const uint32_t h = uint32_t(hash_bytes(s, n));
            size_t i = h & (seen.size() - 1);
            for (; seen[i].text; i = (i + 1) & (seen.size() - 1)) {
                if (seen[i].hash != h || seen[i].length != n || memcmp(seen[i].text, s, n) != 0) continue;
                const size_t first = seen[i].first, at = ids.size(), count = seen[i].count;
                ids.resize(at + count);
                for (size_t k = 0; k < count; ++k) ids[at + k] = ids[first + k];
                return;
            }
            const size_t first = ids.size();
            join(s, n);
            if (used >= most_seen) return;  // bounds the memory; half of the slots stay free
            seen[i] = {s, first, h, uint32_t(n), uint32_t(ids.size() - first)};
            ++used;
        }
        void grow() {
            std::vector<Seen> old(std::max<size_t>(64, 2 * seen.size()), Seen{nullptr, 0, 0, 0, 0});
            old.swap(seen);
            for (const Seen& o : old) {
                if (!o.text) continue;
                size_t i = o.hash & (seen.size() - 1);
                while (seen[i].text) i = (i + 1) & (seen.size() - 1);
                seen[i] = o;
            }
        }

        // Joins the bytes of a pre-token: always the merge of lowest rank, the leftmost of those. A queue holds the
        // candidates, a linked list the symbols. A candidate that no longer fits what lies at its position is dropped
        // when it comes up.
        struct Symbol {
            int32_t id, previous, next;  // id -1: joined to the symbol before it; next -1: the last
        };
        std::vector<Symbol> symbols;
        HeapQueue heap;
        RankQueue ranks;
        enum : size_t { long_piece = 1024 };

        void join(const char* s, size_t n) {
            if (bpe.ignore_merges) {
                const auto whole = bpe.id_of.find(std::string(s, n));
                if (whole != bpe.id_of.end()) {
                    ids.push_back(whole->second);
                    return;
                }
            }
            if (n > INT32_MAX)
                fail("a word of %zu bytes is too long to encode, at most %d are supported", n, INT32_MAX);
            symbols.resize(n);
            for (size_t i = 0; i < n; ++i)
                symbols[i] = {bpe.byte_ids[uint8_t(s[i])], int32_t(i) - 1, i + 1 < n ? int32_t(i) + 1 : -1};
            if (n < long_piece) join_symbols(&heap);
            else join_symbols(&ranks);
            for (int32_t i = 0; i >= 0; i = symbols[size_t(i)].next) ids.push_back(symbols[size_t(i)].id);
        }
        template <class Queue>
        void join_symbols(Queue* queue) {
            const auto candidate = [&](size_t position) {
                const Symbol& a = symbols[position];
                const int32_t rank = bpe.merges.find(a.id, symbols[size_t(a.next)].id);
                if (rank >= 0) queue->push(uint32_t(rank), uint32_t(position));
            };
            for (size_t i = 0; i + 1 < symbols.size(); ++i) candidate(i);
            uint32_t top, position;
            while (queue->pop(&top, &position)) {
                Symbol& a = symbols[position];
                if (a.id < 0 || a.next < 0) continue;
                Symbol& b = symbols[size_t(a.next)];
                const int32_t rank = bpe.merges.find(a.id, b.id), made = bpe.merged[top];
                // Not "another rank": two pairs can make the same token, and Hugging Face compares that.
                if (rank < 0 || bpe.merged[size_t(rank)] != made) continue;
                a.id = made;
                a.next = b.next;
                b.id = -1;
                if (a.next >= 0) symbols[size_t(a.next)].previous = int32_t(position);
                if (a.previous >= 0) candidate(size_t(a.previous));
                if (a.next >= 0) candidate(position);
            }
        }
    };
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 4  tokenizer.json
// ---------------------------------------------------------------------------------------------------------------------

namespace {

Json make_object(const std::vector<std::pair<std::string, Json>>& keys) {
    Json j = Json::object();
    j.keys = keys;
    return j;
}
Json make_list(const std::vector<Json>& items) {
    Json j = Json::array();
    j.items = items;
    return j;
}

// `vocabulary` in the order of the ids, as tokenizer.json writes it; the first `special` of them are special tokens.
std::string tokenizer_json(Pattern pattern, size_t special, const std::vector<std::string>& vocabulary,
                           const std::vector<std::pair<int32_t, int32_t>>& merges) {
    const auto byte_level = [](bool use_regex) {
        return make_object(
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}});
    };
    Json split = byte_level(pattern == Pattern::Gpt2);
    if (pattern == Pattern::Cl100k) {
        const Json regex = make_object({{"type", "Split"},
                                        {"pattern", make_object({{"Regex", patterns[int(pattern)].regex}})},
                                        {"behavior", "Isolated"},
                                        {"invert", false}});
        split = make_object({{"type", "Sequence"}, {"pretokenizers", make_list({regex, split})}});
    }
    Json added = Json::array(), vocab = Json::object(), pairs = Json::array();
    for (size_t i = 0; i < vocabulary.size(); ++i) {
        vocab.keys.emplace_back(vocabulary[i], int64(i));
        if (i < special)
            added.items.push_back(make_object({{"id", int64(i)},
                                               {"content", vocabulary[i]},
                                               {"single_word", false},
                                               {"lstrip", false},
                                               {"rstrip", false},
                                               {"normalized", false},
                                               {"special", true}}));
    }
    // "a b" in place of ["a", "b"]: every version of Hugging Face's library reads it, and no token has a blank.
    for (const auto& m : merges)
        pairs.items.emplace_back(vocabulary[size_t(m.first)] + " " + vocabulary[size_t(m.second)]);
    const Json model = make_object({{"type", "BPE"},
                                    {"dropout", Json()},
                                    {"unk_token", Json()},
                                    {"continuing_subword_prefix", Json()},
                                    {"end_of_word_suffix", Json()},
                                    {"fuse_unk", false},
                                    {"byte_fallback", false},
                                    {"vocab", vocab},
                                    {"merges", pairs}});
    return make_object({{"version", "1.0"},
                        {"truncation", Json()},
                        {"padding", Json()},
                        {"added_tokens", added},
                        {"normalizer", Json()},
                        {"pre_tokenizer", split},
                        {"post_processor", Json()},
                        {"decoder", byte_level(pattern == Pattern::Gpt2)},
                        {"model", model}})
               .dump() +
           "\n";
}

// A value for a message: scalars as JSON, the rest by kind.
std::string shown(const Json& j) {
    if (j.type == Json::Array) return format("a list of %zu", j.items.size());
    if (j.type == Json::Object) {
        const Json* type = j.find("type");
        return type && type->type == Json::String ? "an object of type " + shown(*type) : "an object";
    }
    std::string text = j.dump(0);
    if (text.size() <= 80) return text;
    size_t cut = 80;  // at the beginning of a character
    while (cut > 0 && (uint8_t(text[cut]) & 0xC0) == 0x80) --cut;
    return text.substr(0, cut) + "...";
}

// Reads the parts of a tokenizer.json; every refusal names the field.
class TokenizerFile {
  public:
    TokenizerFile(const std::string& path, std::string contents)
        : file(path), text(std::move(contents)), root(Json::parse(text, path)) {}

    std::unique_ptr<Bpe> load() {
        if (root.type != Json::Object) fail("%s: expected a JSON object, found %s", file.c_str(), shown(root).c_str());
        const Json* model = root.find("model");
        if (!model || model->type != Json::Object)
            fail("%s: model is missing or not an object: not a tokenizer.json", file.c_str());
        const Json* type = model->find("type");  // GPT-2's own file has none
        if (type && !(type->type == Json::String && type->text == "BPE"))
            fail("%s: model.type is %s, supported is \"BPE\"", file.c_str(), shown(*type).c_str());
        only_keys(root, "",
                  {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
                   "decoder", "model"});
        only_keys(*model, "model.",
                  {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                   "byte_fallback", "ignore_merges", "vocab", "merges"});
        const Json* version = root.find("version");
        if (version && !(version->type == Json::String && version->text == "1.0"))
            unsupported("version", *version, "\"1.0\"");
        only_null(root, "", "truncation");
        only_null(root, "", "padding");
        read_normalizer();
        read_pre_tokenizer();
        byte_level(root, "", "decoder");
        byte_level(root, "", "post_processor", true);  // ByteLevel there changes offsets only

        const Json* dropout = model->find("dropout");
        if (dropout && !(dropout->type == Json::Number && dropout->number == 0)) only_null(*model, "model.", "dropout");
        empty_text(*model, "continuing_subword_prefix");
        empty_text(*model, "end_of_word_suffix");
        // Every byte is a token, so that nothing is unknown and these change nothing.
        const Json* unknown = model->find("unk_token");
        if (unknown && unknown->type != Json::String) only_null(*model, "model.", "unk_token");
        flag(*model, "model.", "fuse_unk", false);
        flag(*model, "model.", "byte_fallback", false);
        bpe->ignore_merges = flag(*model, "model.", "ignore_merges", false);

        read_vocabulary(*model);
        read_merges(*model);
        read_added_tokens();
        bpe->tokens.resize(size_t(size));
        for (const auto& t : ids) bpe->tokens[size_t(t.second)] = bytes_of_token(t.first);
        for (const AddedToken& a : bpe->added) bpe->tokens[size_t(a.id)] = a.content;
        bpe->index_added();
        if (bpe->ignore_merges)
            for (const auto& t : ids) {
                std::string bytes;  // a token that is not written in the byte alphabet is never a pre-token
                if (in_byte_alphabet(t.first, &bytes)) bpe->id_of[bytes] = t.second;
            }
        bpe->file_text = std::move(text);
        return std::move(bpe);
    }

  private:
    const std::string file;
    std::string text;
    const Json root;
    std::unique_ptr<Bpe> bpe = std::make_unique<Bpe>();
    std::unordered_map<std::string, int32_t> ids;  // model.vocab
    std::unordered_map<int32_t, std::string> names;
    int64 size = 0;  // one more than the largest id
    enum : int64 { most_tokens = int64(1) << 21 };

    [[noreturn]] void unsupported(const std::string& field, const Json& found, const char* supported) const {
        fail("%s: %s is %s, which is not supported (supported: %s)", file.c_str(), field.c_str(), shown(found).c_str(),
             supported);
    }
    void only_keys(const Json& object, const char* prefix, const std::vector<std::string>& known) const {
        for (const auto& k : object.keys)
            if (std::find(known.begin(), known.end(), k.first) == known.end())
                fail("%s: %s is not supported", file.c_str(), shown(Json(prefix + k.first)).c_str());
    }
    void only_null(const Json& parent, const char* prefix, const char* key) const {
        const Json* j = parent.find(key);
        if (j && j->type != Json::Null) unsupported(std::string(prefix) + key, *j, "null");
    }
    void empty_text(const Json& parent, const char* key) const {
        const Json* j = parent.find(key);
        if (j && j->type != Json::Null && !(j->type == Json::String && j->text.empty()))
            unsupported(std::string("model.") + key, *j, "null");
    }
    bool flag(const Json& parent, const std::string& prefix, const char* key, bool otherwise) const {
        const Json* j = parent.find(key);
        if (!j || (j->type == Json::Null && prefix == "model.")) return otherwise;
        if (j->type != Json::Bool)
            fail("%s: %s%s is %s, expected true or false", file.c_str(), prefix.c_str(), key, shown(*j).c_str());
        return j->boolean;
    }
    static bool is_type(const Json& j, const char* name) {
        const Json* type = j.find("type");
        return type && type->type == Json::String && type->text == name;
    }
    // A ByteLevel object at parent.key.
    const Json* byte_level(const Json& parent, const std::string& prefix, const char* key,
                           bool optional = false) const {
        const Json* j = parent.find(key);
        if (optional && (!j || j->type == Json::Null)) return nullptr;
        if (!j) fail("%s: %s%s is missing, expected ByteLevel", file.c_str(), prefix.c_str(), key);
        check_byte_level(*j, prefix + key);
        return j;
    }
    void check_byte_level(const Json& j, const std::string& field) const {
        if (!is_type(j, "ByteLevel")) unsupported(field, j, "ByteLevel");
        only_keys(j, (field + ".").c_str(), {"type", "add_prefix_space", "trim_offsets", "use_regex"});
        flag(j, field + ".", "add_prefix_space", true);
        flag(j, field + ".", "trim_offsets", true);
        flag(j, field + ".", "use_regex", true);
    }
    // As a pre-tokenizer it must not put a blank before the text; its default, where the key is absent, is to do so.
    void no_prefix_space(const Json& j, const std::string& field) const {
        if (flag(j, field + ".", "add_prefix_space", true))
            fail("%s: %s.add_prefix_space is %s, which is not supported (supported: false)", file.c_str(),
                 field.c_str(), j.find("add_prefix_space") ? "true" : "missing");
    }
    void read_normalizer() {
        const Json* j = root.find("normalizer");
        if (!j || j->type == Json::Null) return;
        if (!is_type(*j, "NFC")) unsupported("normalizer", *j, "null and NFC");
        bpe->nfc = true;
    }
    void read_pre_tokenizer() {
        const Json* j = root.find("pre_tokenizer");
        if (!j || !is_type(*j, "Sequence")) {
            byte_level(root, "", "pre_tokenizer");
            no_prefix_space(*j, "pre_tokenizer");
            bpe->pattern = flag(*j, "pre_tokenizer.", "use_regex", true) ? Pattern::Gpt2 : Pattern::None;
            return;
        }
        const Json* list = j->find("pretokenizers");
        if (!list || list->type != Json::Array)
            fail("%s: pre_tokenizer.pretokenizers is missing or not a list", file.c_str());
        const std::string field = "pre_tokenizer.pretokenizers";
        if (list->items.size() != 2) unsupported(field, *list, "two: Split, then ByteLevel");
        const Json &split = list->items[0], &bytes = list->items[1];
        if (!is_type(split, "Split")) unsupported(field + "[0]", split, "Split");
        check_byte_level(bytes, field + "[1]");
        no_prefix_space(bytes, field + "[1]");
        if (flag(bytes, field + "[1].", "use_regex", true))
            fail("%s: %s[1].use_regex is true, which is not supported after Split (supported: false)", file.c_str(),
                 field.c_str());
        const Json *pattern = split.find("pattern"), *regex = pattern ? pattern->find("Regex") : nullptr;
        if (!regex || regex->type != Json::String)
            fail("%s: %s[0].pattern.Regex is missing or not a string", file.c_str(), field.c_str());
        for (const PatternName& p : patterns)
            if (p.pattern != Pattern::None && regex->text == p.regex) bpe->pattern = p.pattern;
        if (bpe->pattern == Pattern::None)
            unsupported(field + "[0].pattern.Regex", *regex, "the patterns of gpt2 and cl100k");
        // The patterns match every character, so that these two are the same.
        const Json* behavior = split.find("behavior");
        const bool invert = flag(split, field + "[0].", "invert", false);
        const char* wanted = invert ? "Removed" : "Isolated";
        if (!behavior || behavior->type != Json::String || behavior->text != wanted)
            fail("%s: %s[0].behavior is %s, which is not supported where invert is %s (supported: \"%s\")",
                 file.c_str(), field.c_str(), behavior ? shown(*behavior).c_str() : "missing",
                 invert ? "true" : "false", wanted);
    }

    // Takes an id for a token, from model.vocab or added_tokens.
    void take_id(const std::string& field, const std::string& token, const Json& id, int32_t* out) {
        int64 v;
        if (!id.integer(&v)) fail("%s: %s is %s, expected an integer", file.c_str(), field.c_str(), shown(id).c_str());
        if (v < 0 || v >= most_tokens)
            fail("%s: %s is %lld, supported are ids from 0 to %lld", file.c_str(), field.c_str(), (long long)v,
                 (long long)most_tokens - 1);
        const auto taken = names.emplace(int32_t(v), token);
        if (!taken.second && taken.first->second != token)
            fail("%s: %s is %lld, the id of %s already", file.c_str(), field.c_str(), (long long)v,
                 shown(Json(taken.first->second)).c_str());
        size = std::max(size, v + 1);
        *out = int32_t(v);
    }
    void read_vocabulary(const Json& model) {
        const Json* vocab = model.find("vocab");
        if (!vocab || vocab->type != Json::Object) fail("%s: model.vocab is missing or not an object", file.c_str());
        ids.reserve(vocab->keys.size());
        for (const auto& t : vocab->keys) {
            if (t.first.empty()) fail("%s: model.vocab has an empty token", file.c_str());
            take_id("model.vocab: the id of " + shown(Json(t.first)), t.first, t.second, &ids[t.first]);
        }
        const std::vector<std::string> alphabet = byte_alphabet();
        for (size_t b = 0; b < 256; ++b) {
            const auto id = ids.find(alphabet[b]);
            if (id == ids.end())
                fail("%s: model.vocab lacks %s, byte %zu", file.c_str(), Json::quote(alphabet[b]).c_str(), b);
            bpe->byte_ids[b] = id->second;
        }
    }
    void read_merges(const Json& model) {
        const Json* list = model.find("merges");
        if (!list || list->type != Json::Array) fail("%s: model.merges is missing or not a list", file.c_str());
        for (size_t i = 0; i < list->items.size(); ++i) {
            const Json& m = list->items[i];
            std::string a, b;
            if (m.type == Json::String) {  // "a b"
                const size_t blank = m.text.find(' ');
                if (blank != std::string::npos && m.text.find(' ', blank + 1) == std::string::npos) {
                    a = m.text.substr(0, blank);
                    b = m.text.substr(blank + 1);
                }
            } else if (m.type == Json::Array && m.items.size() == 2 && m.items[0].type == Json::String &&
                       m.items[1].type == Json::String) {
                a = m.items[0].text;
                b = m.items[1].text;
            }
            if (a.empty() || b.empty())
                fail("%s: model.merges[%zu] is %s, expected two tokens, neither empty: \"a b\" or [\"a\", \"b\"]",
                     file.c_str(), i, shown(m).c_str());
            int32_t id[3];
            const std::string both = a + b, *const names_of[3] = {&a, &b, &both};
            for (int k = 0; k < 3; ++k) {
                const auto t = ids.find(*names_of[k]);
                if (t == ids.end())
                    fail("%s: model.merges[%zu]: %s is not in model.vocab", file.c_str(), i,
                         shown(Json(*names_of[k])).c_str());
                id[k] = t->second;
            }
            bpe->merges(id[0], id[1]) =
                int32_t(i);  // of two equal pairs the later counts, as in Hugging Face's library
            bpe->merged.push_back(id[2]);
        }
    }
    void read_added_tokens() {
        const Json* list = root.find("added_tokens");
        if (!list || list->type == Json::Null) return;
        if (list->type != Json::Array)
            fail("%s: added_tokens is %s, expected a list", file.c_str(), shown(*list).c_str());
        std::set<std::string> contents;
        std::map<std::string, size_t> normalised;  // -> place in the list
        std::vector<bool> made(size_t(most_tokens),
                               bpe->ignore_merges);  // may text that is no added token get this id?
        for (const int32_t id : bpe->byte_ids) made[size_t(id)] = true;
        for (const int32_t id : bpe->merged) made[size_t(id)] = true;
        int64 next_id = int64(ids.size());
        for (size_t i = 0; i < list->items.size(); ++i) {
            const Json& t = list->items[i];
            const std::string field = format("added_tokens[%zu]", i);
            if (t.type != Json::Object)
                fail("%s: %s is %s, expected an object", file.c_str(), field.c_str(), shown(t).c_str());
            only_keys(t, (field + ".").c_str(),
                      {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
            const Json *content = t.find("content"), *id = t.find("id");
            if (!content || content->type != Json::String || content->text.empty() || content->text.size() > 1024)
                fail("%s: %s.content is %s, expected a text of 1 to 1024 bytes", file.c_str(), field.c_str(),
                     content ? shown(*content).c_str() : "missing");
            if (!id) fail("%s: %s.id is missing", file.c_str(), field.c_str());
            if (!contents.insert(content->text).second)
                fail("%s: %s.content: %s is there twice", file.c_str(), field.c_str(), shown(*content).c_str());
            AddedToken a;
            a.content = content->text;
            a.special = flag(t, field + ".", "special", false);
            a.normalized = flag(t, field + ".", "normalized", !a.special);
            a.single_word = flag(t, field + ".", "single_word", false);
            a.lstrip = flag(t, field + ".", "lstrip", false);
            a.rstrip = flag(t, field + ".", "rstrip", false);
            take_id(field + ".id", a.content, *id, &a.id);
            const auto in_vocab = ids.find(a.content);
            if (in_vocab != ids.end() && in_vocab->second != a.id)
                fail("%s: %s.id is %d, but model.vocab has %d for %s", file.c_str(), field.c_str(), a.id,
                     in_vocab->second, shown(*content).c_str());
            // Hugging Face's library numbers the others itself.
            if (in_vocab == ids.end() && a.id != next_id)
                fail("%s: %s.id is %d, expected %lld: tokens that model.vocab lacks are numbered on from its size",
                     file.c_str(), field.c_str(), a.id, (long long)next_id);
            next_id = std::max(next_id, int64(a.id) + 1);
            if (in_vocab != ids.end() && made[size_t(a.id)] && bytes_of_token(a.content) != a.content)
                fail("%s: %s.content is %s, whose id other bytes have in model.vocab", file.c_str(), field.c_str(),
                     shown(*content).c_str());
            if (a.normalized && bpe->nfc) {
                const auto twin = normalised.emplace(Nfc::get()(a.content), i);
                if (!twin.second)
                    fail("%s: %s.content is %s, which the normaliser makes equal to added_tokens[%zu].content",
                         file.c_str(), field.c_str(), shown(*content).c_str(), twin.first->second);
            }
            bpe->added.push_back(a);
        }
    }
};

std::unique_ptr<Bpe> load_bpe(const std::string& file) {
    return TokenizerFile(file, read_file(file, size_t(1) << 30)).load();
}

std::unique_ptr<Bpe> byte_bpe() {
    return TokenizerFile("bytes", tokenizer_json(Pattern::None, 0, byte_alphabet(), {})).load();
}

}  // namespace

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return byte_bpe(); }

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& file) { return load_bpe(file); }

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& choice) {
    return choice == "bytes" ? make_byte_tokenizer() : load_tokenizer(choice);
}

#ifdef TOKENIZER_MAIN  // what only the program does

// ---------------------------------------------------------------------------------------------------------------------
// 5  Training
// ---------------------------------------------------------------------------------------------------------------------
// The merges of Hugging Face's BpeTrainer. Ids: the special tokens, the 256 bytes in the order of their characters in the
// byte alphabet, then one new token a merge. Each step merges the pair with the highest count; of equal counts the pair
// with the lower first id, then the lower second id. A merge walks each word that has the pair from left to right, and
// only the counts of the pairs beside it change, so that a step costs what it touches.
//
// Two habits of that trainer show in its results and are kept. The count of a merged pair itself is not cleared. And a
// merge may make a token that is there already (from another pair): the token keeps its id, so that a pair which was in
// the queue can get new occurrences; those are a second entry in the queue with the words of their own.

namespace {

// Unique pre-tokens and how often each occurs.
class WordCounts {
  public:
    struct Word {
        size_t begin;  // of its bytes
        uint32_t hash, length;
        int64 count;
    };
    std::vector<Word> words;
    std::string bytes;

    void add_text(Pattern pattern, const char* s, size_t n) {
        const Splitter split(pattern, s, n);
        for (size_t i = 0; i < n;) {
            const size_t end = split.piece_end(i);
            add(s + i, end - i);
            i = end;
        }
    }

  private:
    std::vector<uint32_t> slots;  // 1 + index of a word; 0 is free

    void add(const char* s, size_t n) {
        if (n > INT32_MAX) fail("a word of %zu bytes is too long to train on, at most %d are supported", n, INT32_MAX);
        if (2 * (words.size() + 1) > slots.size()) grow();
        const uint32_t h = uint32_t(hash_bytes(s, n));
        size_t i = h & (slots.size() - 1);
        for (; slots[i]; i = (i + 1) & (slots.size() - 1)) {
            Word& w = words[slots[i] - 1];
            if (w.hash != h || w.length != n || memcmp(&bytes[w.begin], s, n) != 0) continue;
            ++w.count;
            return;
        }
        words.push_back({bytes.size(), h, uint32_t(n), 1});
        bytes.append(s, n);
        slots[i] = uint32_t(words.size());
    }
    void grow() {
        slots.assign(std::max<size_t>(1024, 2 * slots.size()), 0);
        for (size_t w = 0; w < words.size(); ++w) {
            size_t i = words[w].hash & (slots.size() - 1);
            while (slots[i]) i = (i + 1) & (slots.size() - 1);
            slots[i] = uint32_t(w + 1);
        }
    }
};

struct TrainOptions {
    int64 vocab_size = 0, min_frequency = 0;
    Pattern pattern = Pattern::Gpt2;
    std::vector<std::string> special;
};

class Trainer {
  public:
    std::vector<std::string> vocabulary;  // id -> token in the byte alphabet
    std::vector<std::pair<int32_t, int32_t>> merges;

    Trainer(const TrainOptions& o, WordCounts&& w, const std::function<void(int64 tokens)>& progress)
        : options(o), counts(std::move(w)) {
        for (const std::string& s : options.special) new_token(s);
        const std::vector<std::string> alphabet = byte_alphabet();
        std::vector<std::string> sorted = alphabet;  // UTF-8 sorts as code points do
        std::sort(sorted.begin(), sorted.end());
        for (const std::string& c : sorted) new_token(c);
        int32_t byte_id[256];
        for (size_t b = 0; b < 256; ++b) byte_id[b] = id_of.at(alphabet[b]);

        for (const WordCounts::Word& word : counts.words) {
            starts.push_back(int64(symbols.size()));
            lengths.push_back(int32_t(word.length));
            for (size_t i = 0; i < word.length; ++i) symbols.push_back(byte_id[uint8_t(counts.bytes[word.begin + i])]);
        }
        for (size_t w_index = 0; w_index < starts.size(); ++w_index) {
            const int32_t* word = &symbols[size_t(starts[w_index])];
            for (int32_t i = 0; i + 1 < lengths[w_index]; ++i) change(word[i], word[i + 1], int32_t(w_index), 1);
        }
        enqueue_changed();
        while (int64(vocabulary.size()) < options.vocab_size && merge_one()) progress(int64(vocabulary.size()));
    }

  private:
    struct Pair {
        int32_t a, b;
        int64 count = 0;
        std::vector<int32_t> words;  // that got the pair since it was last put into the queue
    };
    struct Entry {
        int64 count;
        int32_t a, b, pair;
        std::vector<int32_t> words;
        bool operator<(const Entry& o) const {  // comes after o
            return count != o.count ? count < o.count : a != o.a ? a > o.a : b > o.b;
        }
    };
    const TrainOptions options;
    const WordCounts counts;
    std::unordered_map<std::string, int32_t> id_of;
    std::vector<int32_t> symbols;  // of all words, one after another
    std::vector<int64> starts;     // of each word in symbols
    std::vector<int32_t> lengths;  // of each word now
    PairMap pair_index;
    std::vector<Pair> pairs;
    std::vector<int32_t> changed;  // pairs that have words to put into the queue
    std::vector<Entry> queue;      // a heap

    int32_t new_token(const std::string& token) {
        const auto t = id_of.emplace(token, int32_t(vocabulary.size()));
        if (t.second) vocabulary.push_back(token);
        return t.first->second;
    }
    // The pair (a, b) occurs once more or once less in a word.
    void change(int32_t a, int32_t b, int32_t word, int times) {
        int32_t& index = pair_index(a, b);
        if (index < 0) {
            index = int32_t(pairs.size());
            pairs.emplace_back();
            pairs.back().a = a;
            pairs.back().b = b;
        }
        Pair& p = pairs[size_t(index)];
        p.count += times * counts.words[size_t(word)].count;
        if (times < 0) return;
        if (p.words.empty()) changed.push_back(index);
        if (p.words.empty() || p.words.back() != word) p.words.push_back(word);  // words come one after another
    }
    void enqueue_changed() {
        for (const int32_t index : changed) {
            Pair& p = pairs[size_t(index)];
            if (p.count > 0) {
                queue.push_back({p.count, p.a, p.b, index, std::move(p.words)});
                std::push_heap(queue.begin(), queue.end());
            }
            p.words = {};
        }
        changed.clear();
    }
    bool merge_one() {  // false: nothing is left to merge
        Entry top;
        for (;;) {
            if (queue.empty()) return false;
            std::pop_heap(queue.begin(), queue.end());
            const int64 now = pairs[size_t(queue.back().pair)].count;
            if (queue.back().count == now) break;
            queue.back().count = now;  // it has lost occurrences to other merges: back to its place
            std::push_heap(queue.begin(), queue.end());
        }
        top = std::move(queue.back());
        queue.pop_back();
        if (top.count < 1 || top.count < options.min_frequency) return false;

        const int32_t made = new_token(vocabulary[size_t(top.a)] + vocabulary[size_t(top.b)]);
        merges.emplace_back(top.a, top.b);
        for (const int32_t w : top.words) {
            int32_t* const word = &symbols[size_t(starts[size_t(w)])];
            const int32_t n = lengths[size_t(w)];
            int32_t to = 0;
            for (int32_t i = 0; i < n; ++to) {
                if (word[i] != top.a || i + 1 >= n || word[i + 1] != top.b) {
                    word[to] = word[i++];
                    continue;
                }
                if (to > 0) {
                    change(word[to - 1], top.a, w, -1);
                    change(word[to - 1], made, w, 1);
                }
                i += 2;
                if (i < n) {
                    change(top.b, word[i], w, -1);
                    change(made, word[i], w, 1);
                }
                word[to] = made;
            }
            lengths[size_t(w)] = to;
        }
        enqueue_changed();
        return true;
    }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 6  Token files
// ---------------------------------------------------------------------------------------------------------------------
// The layouts of llm.c: a header of 256 int32 (magic, version, number of tokens, zeros), then the tokens as uint16, or as
// uint32 under another magic where the vocabulary has more than 65,536. Little-endian.

namespace {

struct BinLayout {
    int32_t magic, version;
    size_t width;  // bytes of a token
};
const BinLayout bin_layouts[] = {{20240520, 1, 2}, {20240801, 7, 4}};

void write_bin(const std::string& path, const std::vector<int32_t>& ids, int64 vocab_size) {
    const BinLayout& layout = bin_layouts[vocab_size > 65536];
    if (ids.size() > INT32_MAX)
        fail("%s: %zu tokens, but a .bin file holds at most %d; encode the text in parts", path.c_str(), ids.size(),
             INT32_MAX);
    std::vector<int32_t> header(256, 0);
    header[0] = layout.magic;
    header[1] = layout.version;
    header[2] = int32_t(ids.size());
    FileWriter w(path);
    w.write(header.data(), 1024);
    if (layout.width == 4) w.write(ids.data(), ids.size() * 4);
    else {
        const std::vector<uint16_t> narrow(ids.begin(), ids.end());
        w.write(narrow.data(), narrow.size() * 2);
    }
    w.finish();
}

// Is `data` a token file? Ids as text never begin like one.
const BinLayout* bin_layout(const std::string& data) {
    for (const BinLayout& l : bin_layouts)
        if (data.size() >= 4 && memcmp(data.data(), &l.magic, 4) == 0) return &l;
    return nullptr;
}

std::vector<int32_t> read_bin(const std::string& data, const BinLayout& layout, const std::string& where,
                              int64 vocab_size) {
    if (data.size() < 1024) fail("%s: a token file of %zu bytes, but its header has 1024", where.c_str(), data.size());
    int32_t header[3];
    memcpy(header, data.data(), sizeof header);
    if (header[1] != layout.version)
        fail("%s: token file version %d, supported is %d", where.c_str(), header[1], layout.version);
    const size_t bytes = data.size() - 1024;
    if (header[2] < 0 || size_t(header[2]) * layout.width != bytes)
        fail("%s: the header says %d tokens of %zu bytes, but %zu bytes follow it", where.c_str(), header[2],
             layout.width, bytes);
    std::vector<int32_t> ids(size_t(header[2]), 0);
    for (size_t i = 0; i < ids.size(); ++i) {
        uint32_t id = 0;
        memcpy(&id, &data[1024 + i * layout.width], layout.width);
        if (int64(id) >= vocab_size)
            fail("%s: token %zu: token id %u is outside the vocabulary of %lld", where.c_str(), i, id,
                 (long long)vocab_size);
        ids[i] = int32_t(id);
    }
    return ids;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 7  The program
// ---------------------------------------------------------------------------------------------------------------------

namespace {

const char* const program_help =
    "usage: tokenizer train FILE... --vocab-size N --out tokenizer.json [--pattern gpt2|cl100k] [--special TEXT...]\n"
    "       tokenizer encode [FILE] [--tokenizer bytes|FILE] [--out tokens.bin]   text to ids, separated by blanks\n"
    "       tokenizer decode [FILE] [--tokenizer bytes|FILE]   ids, or a token file, to text\n"
    "       tokenizer info [FILE] [--tokenizer bytes|FILE]     what the tokenizer is, and what it makes of a text\n"
    "FILE is standard input where it is \"-\" or, but for info, left out. `tokenizer COMMAND --help` lists the options.\n";

std::string name_of_input(const std::string& file) { return file == "-" ? "standard input" : file; }

// Counts the words of a file. Line by line, so that no word goes on beyond a newline, as Hugging Face's train() reads
// its files, and in bounded memory; or the text as a whole, as encode() splits it.
void count_words(const std::string& file, const TrainOptions& o, bool lines, WordCounts* counts, int64* bytes) {
    const auto add_lines = [&](const char* s, size_t n) {
        while (n) {
            const void* newline = memchr(s, '\n', n);
            const size_t length = newline ? size_t(static_cast<const char*>(newline) - s) + 1 : n;
            counts->add_text(o.pattern, s, length);
            s += length;
            n -= length;
        }
    };
    if (!lines) {
        const std::string text = read_input(file);
        *bytes += int64(text.size());
        counts->add_text(o.pattern, text.data(), text.size());
        return;
    }
    if (is_directory(file)) fail("%s: is a directory, expected a file", file.c_str());
    FILE* const f = file == "-" ? stdin : fopen(file.c_str(), "rb");
    if (!f) fail("%s: cannot read: %s", file.c_str(), strerror(errno));
    const std::unique_ptr<FILE, void (*)(FILE*)> closer(f, [](FILE* p) {
        if (p != stdin) fclose(p);
    });
    std::string pending, block(size_t(1) << 20, '\0');
    for (size_t n; (n = fread(&block[0], 1, block.size(), f)) > 0;) {
        *bytes += int64(n);
        const size_t last = block.rfind('\n', n - 1), whole = last == std::string::npos ? 0 : last + 1;
        pending.append(block, 0, whole);
        if (whole) {
            add_lines(pending.data(), pending.size());
            pending.clear();
        }
        pending.append(block, whole, n - whole);
    }
    if (ferror(f)) fail("%s: cannot read: %s", name_of_input(file).c_str(), strerror(errno));
    add_lines(pending.data(), pending.size());
}

// Bytes for people: control characters and what is not UTF-8 as <0A>.
std::string visible(const std::string& bytes) {
    std::string out;
    for (size_t i = 0; i < bytes.size();) {
        const int n = utf8_sequence(bytes.data() + i, bytes.size() - i);
        const uint32_t c = n > 0 ? code_point(&bytes[i], n) : 0;
        if (c < 0x20 || (c >= 0x7F && c < 0xA0)) out += format("<%02X>", unsigned(uint8_t(bytes[i])));
        else out.append(bytes, i, size_t(n));
        if (c >= 0x7F && c < 0xA0) out += format("<%02X>", unsigned(uint8_t(bytes[i + 1])));
        i += size_t(std::max(n, 1));
    }
    return out;
}

void check_special(const TrainOptions& o) {
    const std::vector<std::string> alphabet = byte_alphabet();
    std::set<std::string> seen;
    for (const std::string& s : o.special) {
        std::string pending;
        const std::string name = visible(s);
        if (s.empty() || s.size() > 1024) usage_error("--special: a text of %zu bytes, expected 1 to 1024", s.size());
        if (utf8_stream(&pending, s, true) != s) usage_error("--special: '%s' is not UTF-8", name.c_str());
        if (!seen.insert(s).second) usage_error("--special: '%s' is there twice", s.c_str());
        if (std::find(alphabet.begin(), alphabet.end(), s) != alphabet.end())
            usage_error("--special: '%s' is the name of a byte", s.c_str());
    }
    const int64 least = 256 + int64(o.special.size());
    if (o.vocab_size < least)
        usage_error("--vocab-size: %lld is below %lld, the 256 bytes and %zu special tokens", (long long)o.vocab_size,
                    (long long)least, o.special.size());
}

void train_command(const TrainOptions& o, const std::vector<std::string>& files, bool lines, const std::string& out) {
    const double start = wall_seconds();
    double last_shown = start;
    bool line_open = false;
    const auto show = [&](const std::string& what) {  // on long runs, twice a second
        if (wall_seconds() - last_shown < 0.5) return;
        last_shown = wall_seconds();
        fprintf(stderr, "\r%s ", what.c_str());
        line_open = true;
    };
    WordCounts counts;
    int64 bytes = 0;
    for (const std::string& file : files) {
        show("reading " + name_of_input(file));
        count_words(file, o, lines, &counts, &bytes);
    }
    const size_t unique = counts.words.size();
    const Trainer trained(o, std::move(counts), [&](int64 tokens) {
        if (tokens % 64 == 0)
            show(format("%s of %s tokens", with_commas(tokens).c_str(), with_commas(o.vocab_size).c_str()));
    });
    if (line_open) fprintf(stderr, "\r\n");
    replace_file(out, tokenizer_json(o.pattern, o.special.size(), trained.vocabulary, trained.merges));
    printf("%s: %s tokens, %s merges, from %s, %s different words, in %.2f s\n", out.c_str(),
           with_commas(int64(trained.vocabulary.size())).c_str(), with_commas(int64(trained.merges.size())).c_str(),
           byte_text(double(bytes)).c_str(), with_commas(int64(unique)).c_str(), wall_seconds() - start);
    if (int64(trained.vocabulary.size()) < o.vocab_size)
        printf("fewer than --vocab-size %lld: the text has no more pairs to merge\n", (long long)o.vocab_size);
}

void encode_command(const Tokenizer& tokenizer, const std::string& file, const std::string& out) {
    const std::vector<int32_t> ids = tokenizer.encode(read_input(file));
    if (!out.empty()) {
        write_bin(out, ids, tokenizer.vocab_size());
        printf("%s: %s tokens\n", out.c_str(), with_commas(int64(ids.size())).c_str());
        return;
    }
    std::string text;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (i) text += ' ';
        text += std::to_string(ids[i]);
        if (text.size() > 1 << 16) {
            fwrite(text.data(), 1, text.size(), stdout);
            text.clear();
        }
    }
    text += '\n';
    fwrite(text.data(), 1, text.size(), stdout);
}

void decode_command(const Tokenizer& tokenizer, const std::string& file) {
    const std::string text = read_input(file), where = name_of_input(file);
    std::string out;  // all of it, so that a bad id late in the text leaves no part of an answer
    if (const BinLayout* layout = bin_layout(text)) {
        out = tokenizer.decode(read_bin(text, *layout, where, tokenizer.vocab_size()));
        fwrite(out.data(), 1, out.size(), stdout);
        return;
    }
    const char* const blanks = " \t\r\n";
    for (size_t at = text.find_first_not_of(blanks); at != std::string::npos;) {
        const size_t end = std::min(text.find_first_of(blanks, at), text.size());
        int64 id;
        const std::string word = text.substr(at, std::min<size_t>(end - at, 40));
        if (end - at > 40 || !parse_int(word, &id))
            fail("%s: '%s%s' at byte %zu is not a token id", where.c_str(), visible(word).c_str(),
                 end - at > 40 ? "..." : "", at);
        if (id < 0 || id >= tokenizer.vocab_size())
            fail("%s: token id %lld is outside the vocabulary of %lld", where.c_str(), (long long)id,
                 (long long)tokenizer.vocab_size());
        out += tokenizer.bytes_of(int32_t(id));
        at = text.find_first_not_of(blanks, end);
    }
    fwrite(out.data(), 1, out.size(), stdout);
}

void info_command(const Bpe& bpe, const std::string& choice, const std::vector<std::string>& files, int64 longest,
                  int64 show) {
    printf("tokenizer   %s: byte-level, %s tokens, %s\n", choice.c_str(), with_commas(bpe.vocab_size()).c_str(),
           bpe.end_of_text() < 0 ? "no end-of-text token" : "with an end-of-text token");
    printf("merges      %s\n", with_commas(int64(bpe.merged.size())).c_str());
    printf("split       %s\n", patterns[int(bpe.pattern)].name);
    printf("normaliser  %s\n", bpe.nfc ? "NFC" : "none");
    printf("added       %zu tokens", bpe.added.size());
    for (size_t i = 0; i < bpe.added.size() && i < 8; ++i)
        printf("%s '%s' %d", i ? "," : ":", visible(bpe.added[i].content).c_str(), bpe.added[i].id);
    printf("%s\n", bpe.added.size() > 8 ? ", ..." : "");
    std::vector<int32_t> order;
    for (size_t id = 0; id < bpe.tokens.size(); ++id)
        if (bpe.tokens[id].size() > 1) order.push_back(int32_t(id));
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return bpe.tokens[size_t(a)].size() > bpe.tokens[size_t(b)].size(); });
    for (size_t i = 0; i < order.size() && int64(i) < longest; ++i)
        printf("%s%8d  '%s'\n", i ? "            " : "longest     ", order[i],
               visible(bpe.tokens[size_t(order[i])]).c_str());
    for (const std::string& file : files) {
        const std::string text = read_input(file);
        const double start = wall_seconds();
        const std::vector<int32_t> ids = bpe.encode(text);
        const double seconds = std::max(wall_seconds() - start, 1e-9);
        printf("%s: %s, %s tokens, %.3f bytes per token, encoded at %.1f MB/s\n", name_of_input(file).c_str(),
               byte_text(double(text.size())).c_str(), with_commas(int64(ids.size())).c_str(),
               ids.empty() ? 0 : double(text.size()) / double(ids.size()), double(text.size()) / seconds / 1e6);
        const bool colour = isatty(1);
        for (size_t i = 0, shown_bytes = 0; i < ids.size() && int64(shown_bytes) < show; ++i) {
            const std::string& token = bpe.tokens[size_t(ids[i])];
            shown_bytes += token.size();
            static const char* const colours[] = {"\033[30;46m", "\033[30;43m", "\033[30;42m", "\033[30;45m"};
            const std::string v = visible(token), end = token.find('\n') != std::string::npos ? "\n" : "";
            printf(colour ? "%s%s\033[0m%s" : "%s%s|%s", colour ? colours[i % 4] : "", v.c_str(), end.c_str());
        }
        if (show > 0) printf("\n");
    }
}

int tokenizer_main(int argc, char** argv) {
    const std::vector<std::string> commands = {"train", "encode", "decode", "info"};
    const std::string command = argc > 1 ? argv[1] : "--help";
    if (command == "--help" || command == "-h") {
        printf("%s", program_help);
        return 0;
    }
    if (std::find(commands.begin(), commands.end(), command) == commands.end())
        usage_error("unknown command '%s'; did you mean '%s'?", command.c_str(),
                    nearest_word(command, commands).c_str());
    std::string choice = "bytes", out, pattern = "gpt2";
    TrainOptions train;
    bool lines = true;
    int64 longest = 10, show = 0;
    std::vector<std::string> words;
    Options options("tokenizer", program_help);
    if (command == "train") {
        options.add("vocab-size", &train.vocab_size, "tokens to make, special ones and the 256 bytes included", 0,
                    1 << 21);
        options.add("out", &out, "the tokenizer.json to write");
        options.add("pattern", &pattern, "how text is split into words: gpt2 or cl100k");
        options.add("special", &train.special, "special tokens, which get the first ids");
        options.add("min-frequency", &train.min_frequency, "stop at pairs that occur less often", 0);
        options.add("lines", &lines, "read line by line, so that no word goes on beyond a newline");
    } else {
        options.add("tokenizer", &choice, "bytes, or a tokenizer.json");
        if (command == "encode")
            options.add("out", &out, "a token file (.bin as in llm.c) in place of standard output");
        if (command == "info") {
            options.add("longest", &longest, "show so many of the longest tokens", 0);
            options.add("show", &show, "show how about so many bytes of the text split", 0);
        }
    }
    if (!options.parse(argc, argv, 2, &words)) return 0;
    if (out == "-") usage_error("--out: expected a file, found '-'");
    for (const std::string& word : words)
        if (!out.empty() && same_file(word, out))
            usage_error("--out %s: is an input too, and would be lost", out.c_str());
    if (command == "train") {
        for (const PatternName& p : patterns)
            if (pattern == p.name) train.pattern = p.pattern;
        if (pattern != patterns[int(train.pattern)].name || train.pattern == Pattern::None)
            usage_error("--pattern: '%s' is not gpt2 or cl100k", pattern.c_str());
        if (words.empty()) usage_error("train: no FILE to train on");
        if (!options.given("vocab-size")) usage_error("train: --vocab-size is missing");
        if (out.empty()) usage_error("train: --out is missing");
        check_special(train);
        train_command(train, words, lines, out);
        return 0;
    }
    if (words.size() > 1 && command != "info")
        usage_error("%s: unexpected word '%s'", command.c_str(), words[1].c_str());

    const std::unique_ptr<Bpe> tokenizer = choice == "bytes" ? byte_bpe() : load_bpe(choice);
    const std::string file = words.empty() ? "-" : words[0];
    if (command == "encode") encode_command(*tokenizer, file, out);
    if (command == "decode") decode_command(*tokenizer, file);
    if (command == "info") info_command(*tokenizer, choice, words, longest, show);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return run_main("tokenizer", [&] { return tokenizer_main(argc, argv); });
}

#endif
