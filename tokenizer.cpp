// tokenizer.cpp: text to token ids and back.
//
// One kind so far: the byte tokenizer, where a token's id is its byte. Its file is a Hugging Face tokenizer.json of
// byte-level BPE without merges, so that a model directory holds the same three files whatever its tokenizer is.
//
//   1  the byte alphabet   how tokenizer.json writes bytes as characters
//   2  ByteTokenizer       id = byte
//   3  tokenizer.json      reading, with a clear refusal of what is not supported
//   4  the program
#include "transxssm.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1  The byte alphabet
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// tokenizer.json is JSON, which holds characters, not bytes; GPT-2 gave every byte a visible character: the printable
// ones of Latin-1 stand for themselves, the other 68 bytes for U+0100, U+0101, ... in their order. (A blank is U+0120.)
std::vector<std::string> byte_alphabet() {
    std::vector<std::string> characters(256);
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) {
        const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        append_utf8(&characters[b], printable ? b : next++);
    }
    return characters;
}

Json make_object(const std::vector<std::pair<std::string, Json>>& keys) {
    Json j = Json::object();
    j.keys = keys;
    return j;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 2  ByteTokenizer
// ---------------------------------------------------------------------------------------------------------------------

namespace {

class ByteTokenizer : public Tokenizer {
  public:
    int64 vocab_size() const override { return 256; }

    std::vector<int32_t> encode(const std::string& text) const override {
        std::vector<int32_t> ids;
        ids.reserve(text.size());
        for (const char c : text) ids.push_back(uint8_t(c));
        return ids;
    }

    std::string bytes_of(int32_t id) const override {
        if (id < 0 || id > 255) fail("token id %d is outside the vocabulary of 256 bytes", id);
        return std::string(1, char(uint8_t(id)));
    }

    std::string json() const override {
        const Json byte_level = make_object(
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}});
        const std::vector<std::string> alphabet = byte_alphabet();
        Json vocab = Json::object();
        for (int b = 0; b < 256; ++b) vocab.keys.emplace_back(alphabet[size_t(b)], b);
        const Json model = make_object({{"type", "BPE"},
                                        {"dropout", Json()},
                                        {"unk_token", Json()},
                                        {"continuing_subword_prefix", Json()},
                                        {"end_of_word_suffix", Json()},
                                        {"fuse_unk", false},
                                        {"byte_fallback", false},
                                        {"vocab", vocab},
                                        {"merges", Json::array()}});
        return make_object({{"version", "1.0"},
                            {"truncation", Json()},
                            {"padding", Json()},
                            {"added_tokens", Json::array()},
                            {"normalizer", Json()},
                            {"pre_tokenizer", byte_level},
                            {"post_processor", Json()},
                            {"decoder", byte_level},
                            {"model", model}})
                   .dump() +
               "\n";
    }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// 3  tokenizer.json
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// A value for a message: scalars as JSON, the rest by kind.
std::string shown(const Json& j) {
    if (j.type == Json::Array) return format("a list of %zu", j.items.size());
    if (j.type == Json::Object) {
        const Json* type = j.find("type");
        return type && type->type == Json::String ? "an object of type " + Json::quote(type->text) : "an object";
    }
    return j.dump(0);
}

// Reads the parts of a tokenizer.json; every refusal names the field.
class TokenizerFile {
  public:
    explicit TokenizerFile(const std::string& path) : file(path), root(Json::parse(read_file(path), path)) {}

    std::unique_ptr<Tokenizer> load() const {
        if (root.type != Json::Object) fail("%s: expected a JSON object, found %s", file.c_str(), shown(root).c_str());
        const Json* model = root.find("model");
        if (!model || model->type != Json::Object)
            fail("%s: model is missing or not an object: not a tokenizer.json", file.c_str());
        const Json* type = model->find("type");
        if (!type || type->type != Json::String || type->text != "BPE")
            fail("%s: model.type is %s, supported is \"BPE\"", file.c_str(), type ? shown(*type).c_str() : "missing");

        only_null(root, "", "normalizer");
        only_null(root, "", "truncation");
        only_null(root, "", "padding");
        byte_level(root, "pre_tokenizer", true);
        byte_level(root, "decoder", true);
        byte_level(root, "post_processor", false);  // ByteLevel there changes offsets only
        empty_list(root, "", "added_tokens");

        only_null(*model, "model.", "dropout");
        only_null(*model, "model.", "unk_token");
        empty_text(*model, "continuing_subword_prefix");
        empty_text(*model, "end_of_word_suffix");
        empty_list(*model, "model.", "merges");
        check_byte_vocabulary(*model);
        return make_byte_tokenizer();
    }

  private:
    const std::string file;
    const Json root;

    [[noreturn]] void unsupported(const std::string& field, const Json& found, const char* supported) const {
        fail("%s: %s is %s, which is not supported (supported: %s)", file.c_str(), field.c_str(), shown(found).c_str(),
             supported);
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
    void empty_list(const Json& parent, const char* prefix, const char* key) const {
        const Json* j = parent.find(key);
        if (j && !(j->type == Json::Array && j->items.empty()))
            unsupported(std::string(prefix) + key, *j, "an empty list: the tokenizer of single bytes");
    }
    void byte_level(const Json& parent, const char* key, bool required) const {
        const Json* j = parent.find(key);
        if (!required && (!j || j->type == Json::Null)) return;
        if (!j) fail("%s: %s is missing, expected ByteLevel", file.c_str(), key);
        const Json* type = j->find("type");
        if (!type || type->type != Json::String || type->text != "ByteLevel") unsupported(key, *j, "ByteLevel");
        const Json* space = j->find("add_prefix_space");
        if (space && space->type != Json::Bool)
            fail("%s: %s.add_prefix_space is %s, expected true or false", file.c_str(), key, shown(*space).c_str());
        // Only the pre-tokenizer would insert a space; its default, where the key is absent, is true.
        if (!strcmp(key, "pre_tokenizer") && (!space || space->boolean))
            fail("%s: %s.add_prefix_space is %s, which is not supported (supported: false)", file.c_str(), key,
                 space ? "true" : "missing");
    }
    void check_byte_vocabulary(const Json& model) const {
        const Json* vocab = model.find("vocab");
        if (!vocab || vocab->type != Json::Object) fail("%s: model.vocab is missing or not an object", file.c_str());
        const std::vector<std::string> alphabet = byte_alphabet();
        for (int64 b = 0; b < 256; ++b) {
            const std::string& character = alphabet[size_t(b)];
            const Json* id = vocab->find(character);
            int64 found = -1;
            if (!id)
                fail("%s: model.vocab lacks %s, byte %lld", file.c_str(), Json::quote(character).c_str(), (long long)b);
            if (!id->integer(&found) || found != b)
                fail("%s: model.vocab: %s has id %s, supported is its byte, %lld", file.c_str(),
                     Json::quote(character).c_str(), shown(*id).c_str(), (long long)b);
        }
        if (vocab->keys.size() != 256)
            fail("%s: model.vocab has %zu tokens, supported are the 256 single bytes", file.c_str(),
                 vocab->keys.size());
    }
};

}  // namespace

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& file) { return TokenizerFile(file).load(); }

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& choice) {
    return choice == "bytes" ? make_byte_tokenizer() : load_tokenizer(choice);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  The program
// ---------------------------------------------------------------------------------------------------------------------

#ifdef TOKENIZER_MAIN

namespace {

const char* const program_help =
    "usage: tokenizer encode [FILE] [--tokenizer bytes|FILE]   text to ids, separated by blanks\n"
    "       tokenizer decode [FILE] [--tokenizer bytes|FILE]   ids to text\n"
    "       tokenizer info [--tokenizer bytes|FILE]            what the tokenizer is\n"
    "FILE is standard input where it is left out or \"-\".\n";

void encode_command(const Tokenizer& tokenizer, const std::string& file) {
    const std::vector<int32_t> ids = tokenizer.encode(read_input(file));
    for (size_t i = 0; i < ids.size(); ++i) printf("%s%d", i ? " " : "", ids[i]);
    printf("\n");
}

void decode_command(const Tokenizer& tokenizer, const std::string& file) {
    const std::string text = read_input(file), where = file == "-" ? "standard input" : file;
    const char* const blanks = " \t\r\n";
    std::string out;  // all of it, so that a bad id late in the text leaves no part of an answer
    for (size_t at = text.find_first_not_of(blanks); at != std::string::npos;) {
        const size_t end = std::min(text.find_first_of(blanks, at), text.size());
        int64 id;
        std::string pending, word = text.substr(at, std::min<size_t>(end - at, 40));
        if (!parse_int(word, &id))
            fail("%s: '%s' at byte %zu is not a token id", where.c_str(), utf8_stream(&pending, word, true).c_str(),
                 at);
        if (id < 0 || id >= tokenizer.vocab_size())
            fail("%s: token id %lld is outside the vocabulary of %lld", where.c_str(), (long long)id,
                 (long long)tokenizer.vocab_size());
        out += tokenizer.bytes_of(int32_t(id));
        at = text.find_first_not_of(blanks, end);
    }
    fwrite(out.data(), 1, out.size(), stdout);
}

int tokenizer_main(int argc, char** argv) {
    const std::vector<std::string> commands = {"encode", "decode", "info"};
    const std::string command = argc > 1 ? argv[1] : "--help";
    if (command == "--help" || command == "-h") {
        printf("%s", program_help);
        return 0;
    }
    if (std::find(commands.begin(), commands.end(), command) == commands.end())
        usage_error("unknown command '%s'; did you mean '%s'?", command.c_str(),
                    nearest_word(command, commands).c_str());
    std::string choice = "bytes";
    std::vector<std::string> words;
    Options options("tokenizer", program_help);
    options.add("tokenizer", &choice, "bytes, or a tokenizer.json");
    if (!options.parse(argc, argv, 2, &words)) return 0;
    const size_t allowed = command == "info" ? 0 : 1;
    if (words.size() > allowed) usage_error("%s: unexpected word '%s'", command.c_str(), words[allowed].c_str());

    const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(choice);
    const std::string file = words.empty() ? "-" : words[0];
    if (command == "encode") encode_command(*tokenizer, file);
    if (command == "decode") decode_command(*tokenizer, file);
    if (command == "info")
        printf("tokenizer   %s: byte-level, %lld tokens, %s\n", choice.c_str(), (long long)tokenizer->vocab_size(),
               tokenizer->end_of_text() < 0 ? "no end-of-text token" : "with an end-of-text token");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return run_main("tokenizer", [&] { return tokenizer_main(argc, argv); });
}

#endif
