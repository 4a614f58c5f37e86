// Tests of the tokenizer: agreement with Hugging Face's library, files, bad input, the program.
#include "check.h"

namespace {

// What Hugging Face's library makes of a few hundred texts; test/make_tokenizer_cases.py writes it.
const Json& cases_file() {
    static const Json j = [] {
        const std::string path = std::string(SOURCE_DIR) + "/test/tokenizer_cases.json";
        return Json::parse(read_file(path), path);
    }();
    return j;
}
const char* const shapes[] = {"gpt2", "neox", "cl100k"};

std::unique_ptr<Tokenizer> shape(const TempDir& tmp, const std::string& name) {
    put_file(tmp / (name + ".json"), cases_file().find("tokenizers")->find(name)->dump());
    return load_tokenizer(tmp / (name + ".json"));
}
std::vector<int32_t> numbers(const Json& list) {
    std::vector<int32_t> v;
    for (const Json& n : list.items) v.push_back(int32_t(n.number));
    return v;
}
std::string listed(const std::vector<int32_t>& ids) {
    std::string s;
    for (const int32_t id : ids) s += std::to_string(id) + " ";
    return s;
}
std::string random_bytes(const Philox& r, uint64_t at, size_t longest) {
    static const char* const parts[] = {"a",
                                        "the",
                                        " ",
                                        "  ",
                                        "\n",
                                        "'s",
                                        "12",
                                        "\xC3\xA9",
                                        "\xCC\x81",
                                        "\xE4\xB8\x96",
                                        "\xF0\x9F\x98\x80",
                                        "\xFF",
                                        "\xC3",
                                        "\xE2\x80",
                                        "\xED\xA0\x80",
                                        "<|endoftext|>"};
    std::string s;
    const size_t n = r.at(at << 8).word[0] % (longest + 1);
    for (size_t i = 0; i < n; ++i) {
        const Philox::Block b = r.at((at << 8) + 1 + i);
        if (b.word[0] % 4 == 0) s += char(uint8_t(b.word[1]));
        else s += parts[b.word[1] % (sizeof parts / sizeof *parts)];
    }
    return s;
}

}  // namespace

TEST_CASE("tokenizer: ids equal those of Hugging Face's library for GPT-2, GPT-NeoX and cl100k shapes") {
    TempDir tmp;
    CHECK(cases_file().find("cases")->items.size() > 300);
    for (const char* name : shapes) {
        const auto t = shape(tmp, name);
        for (const Json& c : cases_file().find("cases")->items) {
            const std::string& text = c.find("text")->text;
            const std::vector<int32_t> ids = t->encode(text);
            CHECK_EQ(listed(ids), listed(numbers(*c.find(name))));
            if (std::string(name) != "neox") CHECK_EQ(t->decode(ids), text);
        }
        const int32_t end = t->end_of_text();
        CHECK(end >= 0);
        CHECK_EQ(t->bytes_of(end), "<|endoftext|>");
        CHECK_ERROR(t->bytes_of(int32_t(t->vocab_size())), "outside the vocabulary");
        CHECK_EQ(load_tokenizer(tmp / (std::string(name) + ".json"))->json(), t->json());
    }
}

TEST_CASE("tokenizer: added tokens with every flag are found where Hugging Face's library finds them") {
    TempDir tmp;
    int64 cases = 0, with_blanks = 0;
    for (const Json& set : cases_file().find("added")->items) {
        Json t = *cases_file().find("tokenizers")->find("gpt2");
        t.set("added_tokens", *set.find("added_tokens"));
        t.set("normalizer", *set.find("normalizer"));
        put_file(tmp / "t.json", t.dump());
        const auto tokenizer = load_tokenizer(tmp / "t.json");
        for (const Json& c : set.find("cases")->items) {
            const std::vector<int32_t> ids = tokenizer->encode(c.find("text")->text);
            CHECK_EQ(listed(ids), listed(numbers(*c.find("ids"))));
            ++cases;
            if (set.find("normalizer")->type == Json::Null && tokenizer->decode(ids) != c.find("text")->text)
                ++with_blanks;
        }
    }
    CHECK(cases > 500);
    CHECK(with_blanks > 0);  // lstrip and rstrip drop white space
}

TEST_CASE("tokenizer: added tokens take linear time, and their white space ends at bytes that are not UTF-8") {
    TempDir tmp;
    const auto with = [&](const std::string& added) {
        Json t = *cases_file().find("tokenizers")->find("gpt2");
        t.set("added_tokens", Json::parse(added, "t"));
        put_file(tmp / "t.json", t.dump());
        return load_tokenizer(tmp / "t.json");
    };
    const auto t = with(R"([{"id":420,"content":"\n","lstrip":false,"rstrip":true,"special":true},
                            {"id":421,"content":"<x>","lstrip":true,"rstrip":true,"special":true},
                            {"id":422,"content":"<y>","single_word":true,"special":true}])");
    std::string text;
    for (int i = 0; i < 300000; ++i) text += i % 2 ? "\n" : " ";
    const double start = wall_seconds();
    CHECK_EQ(t->encode(text).size(), 150001);  // the first blank, and every newline
    CHECK_EQ(t->encode(std::string(300000, ' ') + "<x>" + std::string(300000, ' ')).size(), 1);
    // Neither does a long token of which each place of a text is a beginning.
    const auto u = with(format(R"([{"id":420,"content":"%s","special":true},{"id":64,"content":"a","special":true}])",
                               (std::string(1023, 'a') + "b").c_str()));
    CHECK_EQ(u->encode(std::string(3000000, 'a')).size(), 3000000);
    CHECK_EQ(listed(u->encode(std::string(1024, 'a') + "ba")), "64 420 64 ");
    CHECK(wall_seconds() - start < 5);
    CHECK_EQ(t->decode(t->encode("\xE3\x80<x>\xE3\x80\x80 \xE3\x80")), "\xE3\x80<x>\xE3\x80");
    CHECK_EQ(t->encode("\xC3<y>\xA9")[1], 422);  // halves of a letter are no letters
    CHECK(t->encode("\xC3\xA9<y>").back() != 422);
}

TEST_CASE("tokenizer: decode(encode(x)) == x for every byte string where there is no normaliser") {
    TempDir tmp;
    const Philox r(1, "tokenizer");
    for (const char* name : {"gpt2", "cl100k"}) {
        const auto t = shape(tmp, name);
        for (uint64_t i = 0; i < 2000; ++i) {
            const std::string text = random_bytes(r, i, 40);
            CHECK_EQ(t->decode(t->encode(text)), text);
        }
    }
    const auto neox = shape(tmp, "neox");  // normalised once, a text stays as it is
    for (uint64_t i = 0; i < 2000; ++i) {
        const std::string once = neox->decode(neox->encode(random_bytes(r, i, 40)));
        CHECK_EQ(neox->decode(neox->encode(once)), once);
    }
}

TEST_CASE("tokenizer: a run of one character costs no more than its length") {
    TempDir tmp;
    for (const char* name : shapes) {
        const auto t = shape(tmp, name);
        for (const char* unit : {"a", " ", "\n", "-", "1", "'", "a\xCC\x81"}) {
            std::string text;
            while (text.size() < 300000) text += unit;
            const double start = wall_seconds();
            const std::vector<int32_t> ids = t->encode(text);
            CHECK(wall_seconds() - start < 5);  // 0.03 s; a quadratic walk would take minutes
            if (std::string(name) != "neox") CHECK(t->decode(ids) == text);
        }
    }
}

TEST_CASE("tokenizer: long words are joined in the order of short ones") {
    TempDir tmp;  // 1024 bytes is where encode() changes its queue
    const auto t = shape(tmp, "gpt2");
    const std::string unit = "thetokenthatoccursaaaaaaa";
    std::string text;
    while (text.size() < 1023) text += unit;
    for (size_t n = 1000; n < 1023; ++n) {
        const std::vector<int32_t> ids = t->encode(text.substr(0, n)),
                                   more = t->encode(text.substr(0, n) + unit + unit);
        for (size_t i = 0; i + 20 < ids.size(); ++i) CHECK_EQ(more[i], ids[i]);
    }
}

TEST_CASE("tokenizer: a changed tokenizer.json is refused in one line or works, never a crash") {
    // 150 changes of each file; `make sanitize` goes on for FUZZ_SECONDS in all.
    const double seconds = getenv("FUZZ_SECONDS") ? atof(getenv("FUZZ_SECONDS")) / 3 : 0;
    TempDir tmp;
    const Philox r(2, "mutation");
    for (const char* name : shapes) {
        const std::string text = cases_file().find("tokenizers")->find(name)->dump();
        const double until = wall_seconds() + seconds;
        for (uint64_t i = 0; i < 150 || wall_seconds() < until; ++i) {
            std::string changed = text;
            for (uint64_t k = 0; k <= i % 3; ++k) {
                const Philox::Block b = r.at(i * 8 + k);
                static const char bytes[] = "0193\"[]{},: -.eantf\\u\xC3";
                const size_t at = b.word[0] % changed.size(), span = b.word[2] % 40;
                if (b.word[3] % 3 == 0) changed.erase(at, span);
                else if (b.word[3] % 3 == 1) changed[at] = bytes[b.word[1] % (sizeof bytes - 1)];
                else changed.insert(at, changed.substr(b.word[1] % changed.size(), span));
            }
            put_file(tmp / "t.json", changed);
            const std::string e =
                error_of([&] { load_tokenizer(tmp / "t.json")->encode("the text is\xFF <|endoftext|>"); });
            CHECK(!contains(e, "(not one line)"));
        }
    }
}

TEST_CASE("tokenizer train: merges and vocabulary equal those of Hugging Face's trainer") {
    TempDir tmp;
    put_file(tmp / "text", cases_file().find("text")->text);
    for (const char* name : shapes) {
        std::vector<std::string> args = {"train", tmp / "text",   "--vocab-size", "420",
                                         "--out", tmp / "t.json", "--lines",      "false"};
        if (std::string(name) == "cl100k") args.insert(args.end(), {"--pattern", "cl100k"});
        if (std::string(name) == "neox") args.insert(args.end(), {"--special", "<|endoftext|>"});
        const RunResult run = run_program("tokenizer", args);
        CHECK_EQ(run.status, 0);
        const Json made = Json::parse(read_file(tmp / "t.json"), "t"),
                   &wanted = *cases_file().find("tokenizers")->find(name);
        const Json &model = *made.find("model"), &wanted_model = *wanted.find("model");
        std::string merges, wanted_merges;
        for (const Json& m : model.find("merges")->items) merges += m.text + "\n";
        for (const Json& m : wanted_model.find("merges")->items)
            wanted_merges += m.items[0].text + " " + m.items[1].text + "\n";
        CHECK_EQ(merges, wanted_merges);
        CHECK_EQ(model.find("vocab")->keys.size(), wanted_model.find("vocab")->keys.size());
        for (const auto& t : wanted_model.find("vocab")->keys) {
            const Json* id = model.find("vocab")->find(t.first);
            CHECK_EQ(id ? id->text : "none", t.second.text);
        }
        const auto t = load_tokenizer(tmp / "t.json");
        CHECK_EQ(t->end_of_text(), std::string(name) == "neox" ? 0 : -1);
    }
}

TEST_CASE("tokenizer train: mistakes get one line, and nothing is written") {
    TempDir tmp;
    put_file(tmp / "text", "abc abc abc\n");
    const auto failure = [&](std::vector<std::string> args, int status, const std::vector<std::string>& parts) {
        args.insert(args.begin(), "train");
        CHECK_EQ(refusal(run_program("tokenizer", args), status, parts), "");
    };
    const std::string text = tmp / "text", out = tmp / "t.json";
    failure({text, "--out", out}, 2, {"--vocab-size is missing"});
    failure({text, "--vocab-size", "300"}, 2, {"--out is missing"});
    failure({"--vocab-size", "300", "--out", out}, 2, {"no FILE"});
    failure({text, "--vocab-size", "255", "--out", out}, 2, {"--vocab-size: 255 is below 256"});
    failure({text, "--vocab-size", "256", "--out", out, "--special", "<x>"}, 2, {"256 is below 257"});
    failure({text, "--vocab-size", "300", "--out", out, "--special", "<x>", "<x>"}, 2,
            {"--special: '<x>' is there twice"});
    failure({text, "--vocab-size", "300", "--out", out, "--special", "a"}, 2, {"'a' is the name of a byte"});
    failure({text, "--vocab-size", "300", "--out", out, "--pattern", "gpt3"}, 2, {"--pattern: 'gpt3'", "cl100k"});
    failure({text, "--vocab-size", "300", "--out", out, "--special", "<\xFF>"}, 2,
            {"--special: '<<FF>>' is not UTF-8"});
    failure({text, "--vocab-size", "300", "--out", "-"}, 2, {"--out: expected a file, found '-'"});
    failure({text, "--vocab-size", "300", "--out", tmp.path + "/./text"}, 2, {"/./text: is an input too"});
    CHECK_EQ(read_file(text), "abc abc abc\n");
    failure({tmp / "none", "--vocab-size", "300", "--out", out}, 1, {"none", "No such file"});
    failure({text, "--vocab-size", "300", "--out", tmp / "no" + "/t.json"}, 1, {"t.json", "cannot write"});
    CHECK_EQ(list_directory(tmp.path), std::vector<std::string>{"text"});
    const RunResult run = run_program("tokenizer", {"train", text, "--vocab-size", "300", "--out", out});
    CHECK_EQ(run.status, 0);
    CHECK(contains(run.out, "no more pairs"));
}

TEST_CASE("tokenizer program: token files are those of llm.c, and bad ones are refused") {
    TempDir tmp;
    shape(tmp, "cl100k");
    const std::string text = "The tokens, 12345\n\n caf\xC3\xA9<|endoftext|>\xFF", file = tmp / "a.bin";
    RunOptions in;
    in.input = text;
    CHECK_EQ(run_program("tokenizer", {"encode", "--tokenizer", tmp / "cl100k.json", "--out", file}, in).status, 0);
    const std::string data = read_file(file);
    const std::vector<int32_t> ids = load_tokenizer(tmp / "cl100k.json")->encode(text);
    CHECK_EQ(data.size(), 1024 + 2 * ids.size());
    int32_t header[256];
    memcpy(header, data.data(), 1024);
    CHECK_EQ(header[0], 20240520);
    CHECK_EQ(header[1], 1);
    CHECK_EQ(header[2], int32_t(ids.size()));
    for (int i = 3; i < 256; ++i) CHECK_EQ(header[i], 0);
    CHECK_EQ(run_program("tokenizer", {"decode", file, "--tokenizer", tmp / "cl100k.json"}).out, text);

    const auto refused = [&](const std::string& bytes, const std::vector<std::string>& parts) {
        put_file(tmp / "bad.bin", bytes);
        CHECK_EQ(refusal(run_program("tokenizer", {"decode", tmp / "bad.bin", "--tokenizer", tmp / "cl100k.json"}), 1,
                         parts),
                 "");
    };
    refused(data.substr(0, 1023), {"bad.bin", "1023 bytes", "1024"});
    refused(data.substr(0, data.size() - 1), {"bad.bin", "the header says"});
    refused(data + "x", {"bad.bin", "the header says"});
    std::string changed = data;
    changed[4] = 9;
    refused(changed, {"bad.bin", "version 9", "1"});
    changed = data;
    changed[11] = char(0xFF);
    refused(changed, {"bad.bin", "the header says -"});
    changed = data;
    changed[1025] = char(0xFF);
    refused(changed, {"bad.bin", "token 0", "outside the vocabulary"});

    // More than 65,536 ids: 32 bits a token.
    Json wide = Json::parse(read_file(tmp / "cl100k.json"), "t");
    wide.set("added_tokens", Json::parse(R"([{"id":70000,"content":"<|endoftext|>","special":true}])", "t"));
    for (auto& k : wide.keys)
        if (k.first == "model") {
            Json vocab = *k.second.find("vocab");
            vocab.set("<|endoftext|>", 70000);
            k.second.set("vocab", vocab);
        }
    put_file(tmp / "wide.json", wide.dump());
    CHECK_EQ(run_program("tokenizer", {"encode", "--tokenizer", tmp / "wide.json", "--out", file}, in).status, 0);
    memcpy(header, read_file(file).data(), 1024);
    CHECK_EQ(header[0], 20240801);
    CHECK_EQ(header[1], 7);
    CHECK_EQ(int64(read_file(file).size()), 1024 + 4 * int64(header[2]));
    CHECK_EQ(run_program("tokenizer", {"decode", file, "--tokenizer", tmp / "wide.json"}).out, text);
}

TEST_CASE("tokenizer info: says what the tokenizer is and how a text splits") {
    TempDir tmp;
    shape(tmp, "neox");
    put_file(tmp / "text", "The tokens\n");
    const std::string out =
        run_program("tokenizer", {"info", tmp / "text", "--tokenizer", tmp / "neox.json", "--show", "100"}).out;
    for (const char* part : {"NFC", "gpt2", "longest", "<|endoftext|>", "bytes per token", "with an end-of-text token"})
        CHECK_EQ(contains(out, part) ? "" : part + (" is not in " + out), "");
}

TEST_CASE("tokenizer: the byte tokenizer's ids are the bytes, and every byte string survives") {
    const auto t = make_byte_tokenizer();
    std::string all;
    for (int i = 0; i < 256; ++i) all += char(uint8_t(i));
    const std::vector<int32_t> ids = t->encode(all);
    for (int i = 0; i < 256; ++i) CHECK_EQ(ids[size_t(i)], i);
    CHECK_EQ(t->decode(ids), all);
    CHECK_EQ(t->vocab_size(), 256);
    CHECK_EQ(t->end_of_text(), -1);
    CHECK_ERROR(t->bytes_of(256), "token id 256");
    CHECK_ERROR(t->bytes_of(-1), "token id -1");
}

TEST_CASE("tokenizer: tokenizer.json is read back; what is not supported is named") {
    TempDir tmp;
    const std::string text = make_byte_tokenizer()->json();
    write_file(tmp / "t.json", text);
    CHECK_EQ(load_tokenizer(tmp / "t.json")->json(), text);
    CHECK_EQ(open_tokenizer("bytes")->json(), text);
    CHECK_ERROR(open_tokenizer(tmp / "none.json"), "none.json", "No such file");

    const auto refused = [&](const std::function<void(Json*)>& change, const std::vector<std::string>& parts) {
        Json j = Json::parse(text, "t");
        change(&j);
        put_file(tmp / "bad.json", j.dump());
        CHECK_EQ(missing_part(error_of([&] { load_tokenizer(tmp / "bad.json"); }), parts), "");
    };
    const auto model = [](Json* j) -> Json& {
        for (auto& k : j->keys)
            if (k.first == "model") return k.second;
        return *j;
    };
    const Json word = Json::parse("{\"type\":\"Whitespace\"}", "t");
    refused([&](Json* j) { j->set("normalizer", Json::parse("{\"type\":\"NFKC\"}", "t")); },
            {"bad.json", "normalizer", "NFKC", "NFC"});
    refused([&](Json* j) { j->set("pre_tokenizer", word); }, {"pre_tokenizer", "Whitespace", "ByteLevel"});
    refused([&](Json* j) { j->set("pre_tokenizer", Json()); }, {"pre_tokenizer", "null"});
    refused(
        [&](Json* j) { j->set("pre_tokenizer", Json::parse(R"({"type":"ByteLevel","add_prefix_space":true})", "t")); },
        {"pre_tokenizer.add_prefix_space", "true"});
    refused([&](Json* j) { j->set("decoder", word); }, {"decoder", "Whitespace"});
    refused([&](Json* j) { j->set("post_processor", word); }, {"post_processor", "Whitespace"});
    refused([&](Json* j) { j->set("added_tokens", Json::parse("[{}]", "t")); }, {"added_tokens[0].content is missing"});
    refused([&](Json* j) { j->set("model", 3); }, {"model is missing or not an object"});
    refused([&](Json* j) { *j = Json::array(); }, {"expected a JSON object"});
    refused([&](Json* j) { model(j).set("type", "WordPiece"); }, {"model.type", "WordPiece", "BPE"});
    refused([&](Json* j) { model(j).set("merges", Json::parse("[\"a b\"]", "t")); },
            {"model.merges[0]", "\"ab\" is not in model.vocab"});
    refused([&](Json* j) { model(j).set("dropout", 0.1); }, {"model.dropout", "0.1"});
    refused([&](Json* j) { model(j).set("vocab", Json::object()); }, {"model.vocab lacks"});
    refused(
        [&](Json* j) {
            Json vocab = *model(j).find("vocab");
            vocab.set("A", 66);
            model(j).set("vocab", vocab);
        },
        {"model.vocab", "\"B\" is 66", "the id of \"A\""});
    // What is in the file, one field at a time.
    const auto parsed = [](const char* s) { return Json::parse(s, "t"); };
    const auto in_vocab = [&](const char* token, const Json& id) {
        return [&model, token, id](Json* j) {
            Json vocab = *model(j).find("vocab");
            vocab.set(token, id);
            model(j).set("vocab", vocab);
        };
    };
    refused(in_vocab("AB", "x"), {"model.vocab: the id of \"AB\" is \"x\"", "an integer"});
    refused(in_vocab("AB", 1.5), {"model.vocab: the id of \"AB\" is 1.5"});
    refused(in_vocab("AB", -1), {"model.vocab: the id of \"AB\" is -1", "from 0"});
    refused(in_vocab("AB", int64(1) << 40), {"model.vocab: the id of \"AB\" is 1099511627776"});
    refused(in_vocab("AB", Json::parse("1e300", "t")), {"model.vocab: the id of \"AB\" is 1e300"});
    refused(in_vocab("", 256), {"model.vocab has an empty token"});
    for (const char* merge : {"\"ab\"", "\"a b c\"", "\"a  b\"", "\" a\"", "\"a \"", "3", "[]", "[\"a\"]", "[\"a\",1]",
                              "[\"a\",\"b\",\"c\"]", "[\"\",\"a\"]", "null"})
        refused([&](Json* j) { model(j).set("merges", Json::parse("[" + std::string(merge) + "]", "t")); },
                {"model.merges[0] is", "expected two tokens"});
    refused([&](Json* j) { model(j).set("merges", Json()); }, {"model.merges is missing or not a list"});
    refused([&](Json* j) { model(j).set("ignore_merges", 1); }, {"model.ignore_merges is 1", "true or false"});
    refused([&](Json* j) { model(j).set("end_of_word_suffix", "</w>"); }, {"model.end_of_word_suffix", "</w>"});
    refused([&](Json* j) { model(j).set("surprise", 1); }, {"\"model.surprise\" is not supported"});
    refused([&](Json* j) { j->set("version", "2.0"); }, {"version is \"2.0\"", "supported: \"1.0\""});
    refused([&](Json* j) { j->set("surprise", 1); }, {"\"surprise\" is not supported"});
    refused([&](Json* j) { j->set("truncation", parsed("{\"max_length\":3}")); }, {"truncation"});
    refused([&](Json* j) { j->set("post_processor", parsed("{\"type\":\"TemplateProcessing\"}")); },
            {"post_processor", "TemplateProcessing"});
    const auto added = [&](const char* text_of) { return [=](Json* j) { j->set("added_tokens", parsed(text_of)); }; };
    refused(added("3"), {"added_tokens is 3"});
    refused(added("[3]"), {"added_tokens[0] is 3"});
    refused(added(R"([{"id":256,"content":""}])"), {"added_tokens[0].content is \"\""});
    refused(added(R"([{"content":"x"}])"), {"added_tokens[0].id is missing"});
    refused(added(R"([{"id":65,"content":"xx"}])"), {"added_tokens[0].id is 65", "the id of \"A\" already"});
    refused(added(R"([{"id":300,"content":"A"}])"), {"added_tokens[0].id is 300", "model.vocab has 65 for \"A\""});
    refused(added(R"([{"id":256,"content":"xx"},{"id":257,"content":"xx"}])"), {"added_tokens[1].content", "twice"});
    refused(added(R"([{"id":256,"content":"xx","lstrip":1}])"), {"added_tokens[0].lstrip is 1"});
    refused(added(R"([{"id":256,"content":"xx"},{"id":300,"content":"yy"}])"),
            {"added_tokens[1].id is 300, expected 257"});
    // A token whose id would mean two texts: in the vocabulary, U+00E9 is the byte E9.
    refused(added("[{\"id\":233,\"content\":\"\xC3\xA9\"}]"), {"added_tokens[0].content is", "other bytes"});
    refused(
        [&](Json* j) {
            j->set("normalizer", parsed("{\"type\":\"NFC\"}"));
            added("[{\"id\":256,\"content\":\"<\xC3\xA9>\"},{\"id\":257,\"content\":\"<e\xCC\x81>\"}]")(j);
        },
        {"added_tokens[1].content", "the normaliser makes equal to added_tokens[0].content"});
    refused(added(R"([{"id":256,"content":"xx","special":1}])"), {"added_tokens[0].special is 1"});
    const auto split = [&](const char* regex, const char* behavior, bool invert, bool use_regex) {
        return [=](Json* j) {
            Json s = parsed(R"({"type":"Split","pattern":{}})"),
                 b = parsed(R"({"type":"ByteLevel","add_prefix_space":false})");
            Json pattern = Json::object(), sequence = parsed(R"({"type":"Sequence","pretokenizers":[]})");
            pattern.set("Regex", regex);
            s.set("pattern", pattern);
            s.set("behavior", behavior);
            s.set("invert", invert);
            b.set("use_regex", use_regex);
            Json list = Json::array();
            list.items = {s, b};
            sequence.set("pretokenizers", list);
            j->set("pre_tokenizer", sequence);
        };
    };
    const char* gpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
    refused(split("x+", "Isolated", false, false), {"pre_tokenizer.pretokenizers[0].pattern.Regex is \"x+\""});
    refused(split(gpt2, "Removed", false, false), {"pretokenizers[0].behavior is \"Removed\"", "invert is false"});
    refused(split(gpt2, "Isolated", false, true), {"pretokenizers[1].use_regex is true"});
    Json good = Json::parse(text, "t");
    split(gpt2, "Removed", true, false)(&good);
    put_file(tmp / "good.json", good.dump());
    CHECK_EQ(load_tokenizer(tmp / "good.json")->vocab_size(), 256);
    std::string deep(100000, '[');
    put_file(tmp / "bad.json", deep);
    CHECK_ERROR(load_tokenizer(tmp / "bad.json"), "bad.json", "nested deeper");
    put_file(tmp / "bad.json", "{\"model\":{\"vocab\":{\"a\":" + std::string(10000000, '9'));
    CHECK_ERROR(load_tokenizer(tmp / "bad.json"), "bad.json", "in model.vocab.a: a number");
    put_file(tmp / "bad.json", "{\"model\":{\"merges\":[[\"a\",\"b\"],[\"a\",!");
    CHECK_ERROR(load_tokenizer(tmp / "bad.json"), "bad.json", "in model.merges[1][1]: expected a value");
    put_file(tmp / "bad.json", "{\"\\n\xC3\xA9" + std::string(1000, 'x') + "\":!}");
    CHECK_ERROR(load_tokenizer(tmp / "bad.json"), "in \\n\xC3\xA9xxxxx", "xxx...: expected a value");
    for (size_t n = 0; n + 2 < text.size(); n += 61) {
        put_file(tmp / "bad.json", text.substr(0, n));
        CHECK_ERROR(load_tokenizer(tmp / "bad.json"), "bad.json: not valid JSON");
    }
}

TEST_CASE("tokenizer: with ignore_merges only tokens in the byte alphabet are whole words") {
    TempDir tmp;
    Json t = Json::parse(make_byte_tokenizer()->json(), "t");
    for (auto& k : t.keys)
        if (k.first == "model") {
            Json vocab = *k.second.find("vocab");
            vocab.set("\xE2\x82\xAC", 256);              // the euro sign itself, which no text gives
            vocab.set("\xC3\xA2\xC4\xA4\xC2\xAC", 257);  // its three bytes in the byte alphabet
            vocab.set("\xD0\x9F", 258);
            k.second.set("vocab", vocab);
            k.second.set("ignore_merges", true);
        }
    put_file(tmp / "t.json", t.dump());
    const auto tokenizer = load_tokenizer(tmp / "t.json");
    CHECK_EQ(listed(tokenizer->encode("\xE2\x82\xAC")), "257 ");
    CHECK_EQ(listed(tokenizer->encode("\xD0\x9F")), "208 159 ");
    CHECK_EQ(tokenizer->bytes_of(256), "\xE2\x82\xAC");
}

TEST_CASE("tokenizer program: encode and decode undo each other, mistakes get one line") {
    const std::string text = std::string("A\xC3\xA9\0\xFF\n", 6);
    RunOptions in;
    in.input = text;
    const RunResult ids = run_program("tokenizer", {"encode"}, in);
    CHECK_EQ(ids.out, "65 195 169 0 255 10\n");
    in.input = ids.out;
    CHECK_EQ(run_program("tokenizer", {"decode", "-"}, in).out, text);
    in.input = "1 x";
    CHECK_EQ(refusal(run_program("tokenizer", {"decode"}, in), 1, {"standard input: 'x' at byte 2"}), "");
    in.input = "1 " + std::string(44, '0') + "65";
    CHECK_EQ(refusal(run_program("tokenizer", {"decode"}, in), 1, {"'00000", "00...' at byte 2 is not a token id"}),
             "");
    in.input = std::string("65\0 66", 6);
    CHECK_EQ(refusal(run_program("tokenizer", {"decode"}, in), 1, {"'65<00>' at byte 0"}), "");
    in.input = "256";
    CHECK_EQ(refusal(run_program("tokenizer", {"decode"}, in), 1, {"token id 256", "vocabulary of 256"}), "");
    CHECK_EQ(refusal(run_program("tokenizer", {"encdoe"}), 2, {"unknown command 'encdoe'", "'encode'"}), "");
    CHECK_EQ(refusal(run_program("tokenizer", {"info", "--tokeniser", "x"}), 2, {"--tokeniser", "--tokenizer"}), "");
    CHECK_EQ(refusal(run_program("tokenizer", {"encode", "/no/such"}), 1, {"/no/such", "No such file"}), "");
    CHECK_EQ(run_program("tokenizer", {"--help"}).status, 0);
}
